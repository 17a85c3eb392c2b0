"""Quantised KV caches in every backend: drawn specs of each kind, with weights that are quantised or not, and the
lengths at which a page or a window ends, for certain."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
from test_edges import PAGE, SIZES, WINDOW, forks_and_rollbacks, spec
from test_machines import sliding

from qwenspec.verify.case import Case
from qwenspec.verify.search import cases
from qwenspec.verify.strategies import DTYPES, SCALINGS, cache_sizes, specs
from qwenspec.verify.strategies_quantized import KV_CACHES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["triton", "tvm"]
WEIGHTS = (None, None, "int8", "int4", "fp8_block")
pytestmark = [
    *([pytest.mark.interpreter] if INTERPRETED else []),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
many = pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow for many examples")
Look = Callable[..., None]


@many
@pytest.mark.parametrize("kind", KV_CACHES)
def test_all_backends(kind: str, look: Look) -> None:
    drawn = specs(max_layers=2, scalings=[None, *SCALINGS], quantizations=WEIGHTS, kv_caches=[kind])
    look(cases(drawn, cache_sizes(), ("triton", "tvm"), DTYPES), cache_sizes(), examples=6, steps=24, seed=21)


@many
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KV_CACHES)
def test_triton(kind: str, dtype: str, look: Look) -> None:
    drawn = specs(dtypes=[dtype], quantizations=WEIGHTS, kv_caches=[kind])
    look(cases(drawn, cache_sizes(), ("triton",), (dtype,)), cache_sizes(), examples=6, steps=16, seed=22)


@many
def test_pages_behind_every_window_are_given_back(look: Look) -> None:
    evicting = cache_sizes().map(lambda sizes: dataclasses.replace(sizes, evicts=True))
    drawn = specs(kv_caches=list(KV_CACHES)).map(sliding)
    look(cases(drawn, evicting, ("triton",)), evicting, examples=6, steps=16, seed=23)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [None, [1]], ids=["full", "mixed"])
@pytest.mark.parametrize("kind", KV_CACHES)
def test_pages_and_windows(kind: str, layers: Any, backend: str, follow: Callable[..., None]) -> None:
    window = layers and {"window": WINDOW, "layers": layers}
    case = Case(spec(window=window, kv_cache=KV_CACHES[kind]), 1, "float32", SIZES, ("reference", backend))
    lengths = [PAGE, WINDOW + 1] if INTERPRETED else [1, PAGE, PAGE + 1, 2 * PAGE]
    follow(case, forks_and_rollbacks(lengths, [None]))
