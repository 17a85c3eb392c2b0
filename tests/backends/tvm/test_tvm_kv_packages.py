"""TVM packages with a quantised KV cache, whole, against the float64 reference; their memory, and what they refuse."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kv_cache import FORMATS, kv_spec, package

import qwenspec
from hf_parity.oracle import Oracle
from qwenspec.ir.cost import kv_bytes_per_token
from qwenspec.spec.document import Spec
from qwenspec.verify.contenders import PackageContender, ReferenceContender
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Popn, Step

BRANCHING = (-1, 0, 0, 1, 2, 2, -1, 6)
CHAIN = (-1, 0, 1)
# The last tree but one branches and the last is a chain: accepted nodes are then moved by the package (cache.py).
WORKLOAD: list[Step] = [
    Add(0),
    Forward({0: tuple(range(9))}),
    Add(1),
    Forward({1: tuple(range(20, 27)), 0: (30,)}),
    Forward({0: (31, 32, 33), 1: tuple(range(40, 45))}),
    Fork(0, 2, 6),
    Forward({0: (50,), 1: (51,), 2: (52,)}),
    Popn(1, 6),
    Forward({1: tuple(range(60, 68)), 0: (70, 71, 72)}, trees={1: BRANCHING, 0: CHAIN}),
    Commit({0: 1, 1: 5}),
    Forward({0: (80,), 1: tuple(range(81, 90)), 2: (90, 91)}),
    Forward({0: (92,), 1: (93,), 2: (94,)}),
]
SIZES = CacheSizes(page_size=4, pages=48, max_batch_size=4, chunk=64)


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
        yield


def opened(kind: str, dtype: str, folder: Path) -> tuple[Spec, dict[str, np.ndarray], Any]:
    spec = kv_spec(kind)
    oracle = Oracle(spec)
    if kind == "fp8 stored":
        for i in range(2):
            for part, scale, shape in (("k", 0.0125, ()), ("v", 0.004, (1,))):
                name = f"model.layers.{i}.self_attn.{part}_scale"
                oracle.state[name] = torch.full(shape, scale * (i + 1))
    weights = oracle.save(folder, getattr(torch, dtype))
    runner = qwenspec.open_runner(Path(package(kind).__file__).parent, weights, dtype=dtype)
    return spec, oracle.weights(), runner


def errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Each row's, of its length."""
    expected = expected.reshape(len(expected), -1)
    return np.linalg.norm(actual.reshape(len(actual), -1) - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in FORMATS), ("fp8 stored", "bfloat16")])
def test_every_kind_of_forward(kind: str, dtype: str, tmp_path: Path) -> None:
    spec, weights, runner = opened(kind, dtype, tmp_path)
    full = Spec.model_validate(spec.model_dump(by_alias=True) | {"kv_cache": None})
    reference, unquantized = ReferenceContender(spec, weights), ReferenceContender(full, weights)
    actual = PackageContender("tvm", runner, SIZES)
    found, effect = [], []
    for step in WORKLOAD:
        expected, plain, logits = reference.do(step), unquantized.do(step), actual.do(step)
        if isinstance(step, Forward):
            found.append(errors(logits, expected))
            effect.append(errors(plain, expected))
    # float32 and float64 may round to different q, seldom.
    usual, worst = {"float32": (1e-5, 1e-2), "bfloat16": (2e-2, 1e-1)}[dtype]
    assert np.median(np.concatenate(found)) < usual
    assert np.concatenate(found).max() < worst
    if dtype == "float32":
        assert np.median(np.concatenate(effect)) > 100 * usual


def test_taps_have_keys_as_they_are_cached(tmp_path: Path) -> None:
    for kind in ("int8", "fp8 stored"):
        spec, weights, runner = opened(kind, "float32", tmp_path / kind)
        reference = ReferenceContender(spec, weights)
        tapped, plain = (PackageContender("tvm", runner, SIZES) for _ in range(2))
        for step in WORKLOAD:
            logits = plain.do(step)
            if not isinstance(step, Forward):
                reference.do(step)
                tapped.do(step)
                continue
            expected, actual = reference.taps(step), tapped.taps(step)
            assert list(actual) == list(expected)
            for address, output in expected.items():
                assert np.median(errors(actual[address], output)) < 1e-5, address
            np.testing.assert_array_equal(actual["logits"], logits)


def test_chunks_do_not_matter(tmp_path: Path) -> None:
    """Whole, in chunks or token by token: the same logits, but for rare q that float32 rounds the other way."""
    _, _, runner = opened("fp8", "float32", tmp_path)
    ids = np.random.default_rng(0).integers(0, 101, 40).astype(np.int32)

    def logits(chunk: int) -> np.ndarray:
        cache = runner.create_paged_kv_cache(1, 64, 64, page_size=4)
        cache.add_sequence(0)
        found = []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            cache.begin_forward([0], [len(part)])
            found.append(runner.batch_verify(runner.embed(part), cache)[0])
            cache.end_forward()
        return np.concatenate(found)

    whole = logits(40)
    for chunk in (1, 7, 16):
        difference = errors(logits(chunk), whole)
        assert np.median(difference) < 1e-5
        assert difference.max() < 1e-2


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_a_token(kind: str, tmp_path: Path) -> None:
    """What a cache takes of this process's addresses is what `cost` says."""
    spec, _, runner = opened(kind, "float32", tmp_path)
    tokens = 1 << 21
    caches, sizes = [], []
    for count in (tokens, 3 * tokens):  # and what a cache needs whatever its size
        before = address_space()
        caches.append(runner.create_paged_kv_cache(1, count, 4, page_size=4096))
        sizes.append(address_space() - before)
    expected = kv_bytes_per_token(qwenspec.lower(spec))
    assert (sizes[1] - sizes[0]) / (2 * tokens) == pytest.approx(expected, rel=0.01)
    heads, head_dim = 2 * 2 * 2, 16  # layers · (keys, values) · heads
    assert expected == heads * (head_dim + (0 if kind == "fp8 stored" else 4))


def address_space() -> int:
    """Bytes of addresses that this process has: pages that nothing was written to count."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:sm_90", "nvidia/nvidia-h100"])
def test_gpus_are_refused(device: str, tmp_path: Path) -> None:
    module, build = (importlib.import_module(f"{package('int8').__name__}{name}") for name in ("", ".build"))
    with pytest.raises(module.BuildError, match=r"a quantised KV cache works on CPUs alone here.*device 'cpu'"):
        build.build(device, "float32", tmp_path / "model.so")
    with pytest.raises(module.BuildError, match="--kv-cache none"):
        module.Model.load(tmp_path, device=device)
    assert not list(tmp_path.iterdir())


def test_no_trace_of_a_quantized_cache_in_other_packages(tmp_path: Path) -> None:
    spec = Spec.model_validate(kv_spec("int8").model_dump(by_alias=True) | {"kv_cache": None})
    folder = qwenspec.emit(spec, "tvm", tmp_path)
    text = "".join(file.read_text() for file in folder.rglob("*.py"))
    names = "kv_entries|kv_layout|QUANTIZED_KV|k_scale"
    assert not re.search(f"{names}|quantised KV|values quantised|cached quantised", text)
