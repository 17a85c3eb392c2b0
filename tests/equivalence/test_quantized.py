"""Quantised weights in every backend: drawn specs of each scheme, sizes beyond the blocks that kernels work in, and
activations that all round alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qwenspec.spec.document import Spec
from qwenspec.verify.case import Case
from qwenspec.verify.opening import open_contenders
from qwenspec.verify.search import cases
from qwenspec.verify.steps import Add, CacheSizes, Fork, Forward, Poison, Popn, Restart, Step
from qwenspec.verify.strategies import DTYPES, SCALINGS, cache_sizes, spec_of, specs
from qwenspec.verify.strategies_quantized import QUANTIZATIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["triton", "tvm"]
pytestmark = [
    *([pytest.mark.interpreter] if INTERPRETED else []),
    # Rows of padding divide 0 by 0, and what comes of it is not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
Look = Callable[..., None]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is of Triton's kernels")
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_all_backends(scheme: str, look: Look) -> None:
    drawn = specs(max_layers=2, scalings=[None, *SCALINGS], quantizations=[scheme])
    look(cases(drawn, cache_sizes(), ("triton", "tvm"), DTYPES), cache_sizes(), examples=6, steps=20, seed=11)


# The interpreter takes minutes for these: it has 16 bits in test_wide_layers_in_16_bits.
@pytest.mark.parametrize("dtype", ["float32"] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_triton(scheme: str, dtype: str, look: Look) -> None:
    most = {"examples": 2, "steps": 5, "max_length": 16} if INTERPRETED else {"examples": 6, "steps": 12}
    drawn = specs(max_layers=1 if INTERPRETED else 3, dtypes=[dtype], quantizations=[scheme])
    look(cases(drawn, cache_sizes(), ("triton",), (dtype,), not INTERPRETED), cache_sizes(), seed=12, **most)


# ------------------------------------------------------------------------------------------------ larger sizes

ROWS = 19 if INTERPRETED else 67
SIZES = CacheSizes(page_size=16, pages=16, max_batch_size=3, chunk=70)
# 624 inputs of `down` are 4 groups of 128 and 112 more, and 78 words of 8; 168 are 1 and 40.
WIDE: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 168,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 624,
    "max_position_embeddings": 512,
    "dtype": "float32",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 40, "bias": {"qkv": True}},
    "rope": {"theta": 10000.0},
    "mlp": {"bias": True},
}
# The interpreter takes too long for these: as many groups of fewer.
SMALL: dict[str, Any] = {
    "hidden_size": 56,
    "intermediate_size": 104,
    "attention": {"head_dim": 16, "bias": {"qkv": True}},
}
DOWN, K = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "fp8_block"},
    "fp8, weights alone": {"scheme": "fp8_block", "block": [128, 64], "activations": "none"},
    "fp8, rows": {"scheme": "fp8", "skip": [K]},
    "pack_quantized": {"scheme": "pack_quantized", "bits": 4, "group_size": 128, "sym": False},
    "awq": {"scheme": "awq", "group_size": 24},
    "gptq": {"scheme": "gptq", "bits": 4, "group_size": 128, "sym": False},
    "gptq, 8 bits, in one group": {"scheme": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "gptq, ordered": {"scheme": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "skip": [DOWN]},
    "int8": {"scheme": "int8", "skip": [K]},
    "int4": {"scheme": "int4", "group_size": 128, "head": "int4"},
}


def wide_spec(name: str, tied: bool) -> Spec:
    quantization, sizes = SCHEMES[name], WIDE
    if INTERPRETED:
        fewer = {"group_size": 8 if name == "awq" else 24} if quantization.get("group_size", 0) > 0 else {}
        quantization, sizes = quantization | fewer, WIDE | SMALL
    return spec_of(sizes | {"tie_word_embeddings": tied}, quantization)


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple((7 * i + 11 * seed) % WIDE["vocab_size"] for i in range(n))


def steps() -> Iterator[Step]:
    """Many rows at once, one, and a few."""
    yield Poison(1)
    yield Add(0)
    yield Forward({0: ids(ROWS, 1)}, "batch_verify")
    yield Forward({0: ids(1, 2)}, "decode")
    yield Fork(0, 1, 10)
    yield Popn(0, 3)
    yield Add(2)
    yield Forward({2: ids(9, 3), 1: ids(3, 4), 0: ids(5, 5)}, "batch_verify")
    yield Forward({1: ids(1, 6), 0: ids(1, 7), 2: ids(1, 8)}, "batch_decode")
    yield Restart(SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_wide_layers(name: str, backend: str, follow: Callable[..., None]) -> None:
    spec = wide_spec(name, tied=name.startswith("int"))
    follow(Case(spec, 4, "float32", SIZES, ("reference", backend)), steps())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fp8", "awq", "int8", "int4"])
def test_wide_layers_in_16_bits(name: str, backend: str, follow: Callable[..., None]) -> None:
    follow(Case(wide_spec(name, tied=False), 5, "bfloat16", SIZES, ("reference", backend)), steps())


# ------------------------------------------------------------------------------------------ rounded activations

ALIKE = 2e-5  # of a row: what float32 explains, with all roundings to e4m3 alike


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("quantization", "skip"),
    [
        ({"scheme": "fp8_block", "block": (16, 16)}, []),
        ({"scheme": "fp8_block", "block": (20, 12)}, [K]),
        ({"scheme": "fp8_block", "block": (128, 128)}, [DOWN]),
        ({"scheme": "fp8"}, [K]),
        ({"scheme": "fp8", "activations": "static"}, []),
    ],
    ids=["even", "ragged", "large", "token", "stored"],
)
def test_activations_are_rounded_alike(quantization: dict[str, Any], skip: list[str], backend: str) -> None:
    """In float32 most rows of all modules are those of the reference: a rounding that goes the other way, as a sum is
    another in its last bit, is rare, and then every module of the token shows it. A scale that is not the group's, or
    another way to round, would show everywhere."""
    alike = total = 0
    for layout in ("qwen2", "qwen1"):
        named = [] if layout == "qwen1" else skip
        spec = spec_of(WIDE | SMALL | {"checkpoint": {"layout": layout}}, quantization | {"skip": named})
        case = Case(spec, 0, "float32", SIZES, ("reference", backend))
        taps = []
        for contender in open_contenders(case).values():
            contender.do(Add(0))
            taps.append(contender.taps(Forward({0: ids(30, 0)})))
        for address, expected in taps[0].items():
            rows = expected.reshape(30, -1)
            far = np.linalg.norm(taps[1][address].reshape(30, -1) - rows, axis=1) / np.linalg.norm(rows, axis=1)
            alike, total = alike + np.count_nonzero(far < ALIKE), total + 30
    assert total >= 900
    assert alike > 0.75 * total, f"{alike} of {total} rows"
