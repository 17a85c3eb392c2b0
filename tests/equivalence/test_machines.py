"""Random specs and random workloads: every backend, the float64 reference and Hugging Face agree at every step.

Many short searches: in a long one Hypothesis draws ever more of what it has drawn before. TVM compiles every spec,
which costs more than the steps do, so that its examples have more of them, and go on with caches of other sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from qwenspec.spec.document import Spec
from qwenspec.verify.search import cases
from qwenspec.verify.strategies import SCALINGS, cache_sizes, spec_of, specs

DTYPES = ("float32", "bfloat16", "float16")
KINDS = (None, *SCALINGS)
Look = Callable[..., None]


@pytest.mark.parametrize("scaling", KINDS)
def test_all_backends(scaling: str | None, look: Look) -> None:
    drawn = cases(specs(scalings=[scaling]), cache_sizes(), ("triton", "tvm"), DTYPES)
    look(drawn, cache_sizes(), examples=8, steps=30, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", KINDS)
def test_triton(scaling: str | None, dtype: str, look: Look) -> None:
    drawn = cases(specs(scalings=[scaling], dtypes=[dtype]), cache_sizes(), ("triton",), DTYPES)
    look(drawn, cache_sizes(), examples=6, steps=16, seed=2)


@pytest.mark.parametrize("scaling", [None, "linear", "yarn", "llama3"])
def test_hugging_face(scaling: str | None, look: Look) -> None:
    """Specs that its configs can say."""
    drawn = cases(specs(scalings=[scaling], hugging_face=True), cache_sizes(), ("triton",))
    look(drawn, cache_sizes(), examples=6, steps=12, seed=8)


def test_pages_behind_every_window_are_given_back(look: Look) -> None:
    evicting = cache_sizes().map(lambda sizes: dataclasses.replace(sizes, evicts=True))
    look(cases(specs().map(sliding), evicting, ("triton",)), evicting, examples=8, steps=16, seed=3)


def sliding(spec: Spec) -> Spec:
    """The spec with a window in every layer."""
    architecture = spec.architecture.model_dump(mode="json", by_alias=True)
    architecture["attention"]["sliding_window"] = {"window": 3 + spec.architecture.vocab_size % 9, "layers": "all"}
    return spec.model_copy(update={"architecture": spec_of(architecture).architecture})
