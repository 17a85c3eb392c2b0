"""What generated packages say of their modules, against the float64 reference's, whatever a forward is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qwenspec
from hf_parity.cases import CASES, LENGTH, PARTIAL_ROTARY, attention, scaling, sliding
from hf_parity.oracle import QWEN2, QWEN3, Oracle, some_ids, tiny_spec
from qwenspec.backend.api import Runner
from qwenspec.spec.document import Spec
from qwenspec.verify.contenders import PackageContender, ReferenceContender
from qwenspec.verify.reference import Reference
from qwenspec.verify.steps import Add, CacheSizes, Commit, Forward, Step

BRANCHING = (-1, 0, 0, 1, 2, 2, -1, 6)
FAN = (-1, -1, -1)
# Of every kind of forward, beside each other in one cache.
WORKLOAD: list[Step] = [
    Add(0),
    Forward({0: tuple(range(9))}),
    Add(1, prompt_length=12),
    Forward({1: tuple(range(20, 27)), 0: (30,)}),
    Forward({0: (31, 32, 33), 1: tuple(range(40, 45))}),
    Forward({0: (50,), 1: (51,)}),
    Forward({1: tuple(range(60, 68)), 0: (70, 71, 72)}, trees={1: BRANCHING, 0: FAN}),
    Commit({0: 2, 1: 5}),
    Forward({0: (80,), 1: tuple(range(81, 90))}),
]
EVERYTHING = [
    QWEN3,
    scaling("dynamic", factor=2.0),
    {"max_position_embeddings": 16, "num_hidden_layers": 3, "tie_word_embeddings": True},
    {"rope": {"partial_rotary_factor": 0.5, "compute_dtype": "float32"}, "norm": {"weight": "one_plus"}},
    attention(logn={"train_length": 4}, bias={"qkv": True, "output": True}),
    sliding(5, {"from": 1}),
    {"lm_head": {"dtype": "float32"}, "mlp": {"bias": True}},
]
CHANGES = (
    CASES | PARTIAL_ROTARY | {"everything": EVERYTHING, "float32-head": [QWEN2, {"lm_head": {"dtype": "float32"}}]}
)
TRITON = ["qwen2", "all-biases", "qwen1-long", "logn-after-qk-norm", "qwen3-tied", "qwen3-embedding", "one-plus-norm"]
TRITON += ["qwen2-sliding-all", "qwen3-sliding-some", "qwen3-longrope-long", "qwen3-rotary-0.25", "everything"]
PACKAGES = [("triton", case, "float32") for case in TRITON]
PACKAGES += [("triton", case, dtype) for case in ("everything", "float32-head") for dtype in ("bfloat16", "float16")]
PACKAGES += [("tvm", "everything", "float32"), ("tvm", "everything", "float16"), ("tvm", "float32-head", "bfloat16")]
# What rounding may take away of a row's length: before attention first mixes rows, and anywhere in a few layers.
EARLY = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
LATE = {"float32": 5e-5, "float16": 5e-2, "bfloat16": 2e-1}
Open = Callable[[str, str, str], tuple[Spec, dict[str, Any], Runner]]


@pytest.fixture(scope="module")
def open_package(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """open_package(backend, case, dtype) -> the case's spec, its weights, and a runner of the package with them."""

    def open_package(backend: str, case: str, dtype: str) -> tuple[Spec, dict[str, Any], Runner]:
        spec = tiny_spec(*CHANGES[case])
        oracle = Oracle(tiny_spec(*CHANGES[case], {"rope": {"partial_rotary_factor": 1.0}}))
        weights = oracle.save(tmp_path_factory.mktemp("weights"), getattr(torch, dtype))
        package = qwenspec.emit(spec, backend, tmp_path_factory.mktemp("package"))
        return spec, oracle.weights(), qwenspec.open_runner(package, weights, dtype=dtype)

    return open_package


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The worst row's, of its length."""
    expected = expected.reshape(len(expected), -1)
    distance = np.linalg.norm(actual.reshape(len(actual), -1) - expected, axis=1)
    return float((distance / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize(("backend", "variant", "dtype"), PACKAGES, ids=map("-".join, PACKAGES))
def test_every_module_of_every_forward(backend: str, variant: str, dtype: str, open_package: Open) -> None:
    """The reference's addresses in its order; logits and what stays in the cache are to the bit `batch_verify`'s."""
    spec, weights, runner = open_package(backend, variant, dtype)
    sizes = CacheSizes(page_size=4, pages=32, max_batch_size=4, chunk=64)
    reference = ReferenceContender(spec, weights)
    tapped, plain = (PackageContender(backend, runner, sizes) for _ in range(2))
    for step in WORKLOAD:
        logits = plain.do(step)
        if not isinstance(step, Forward):
            reference.do(step)
            tapped.do(step)
            continue
        expected, actual = reference.taps(step), tapped.taps(step)
        assert list(actual) == list(expected)
        assert {output.dtype for output in actual.values()} == {np.dtype(np.float32)}
        errors = {address: error(actual[address], expected[address]) for address in expected}
        early = list(errors.values())[: list(errors).index("layers.0.attention.context")]
        assert max(early) <= EARLY[dtype], errors
        assert max(errors.values()) <= LATE[dtype], errors
        np.testing.assert_array_equal(actual["logits"], logits)


def test_pages_behind_the_window_are_given_back(open_package: Open) -> None:
    spec, weights, runner = open_package("triton", "qwen2-sliding-all", "float32")
    cache = runner.create_paged_kv_cache(1, 32, 32, page_size=4, support_sliding_window=True)
    cache.add_sequence(0)
    sequence = Reference(spec, weights).sequence()
    for chunk in np.array_split(some_ids(spec, LENGTH), 3):
        cache.begin_forward([0], [len(chunk)])
        actual = runner.taps(chunk, cache)
        cache.end_forward()
        sequence.forward(chunk)
        assert max(error(actual[address], output) for address, output in sequence.taps.items()) <= LATE["float32"]
    assert cache.sequences._sequences[0].evicted > 0


def test_a_forward_that_fails_is_no_longer_watched(open_package: Open) -> None:
    spec, _, runner = open_package("triton", "qwen3-tied", "float32")
    layers, cache = runner.module.layers, runner.create_paged_kv_cache(1, 8, 8, page_size=4)
    names = ("rotate_and_cache", "decode_attention", "prefill_attention")
    before = [getattr(layers, name) for name in names]
    with pytest.raises(RuntimeError, match="begin_forward"):
        runner.taps(some_ids(spec, 3), cache)
    assert [getattr(layers, name) for name in names] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in runner.model.modules())
