"""Random specs and random workloads: every backend, the float64 reference and Hugging Face agree at every step.

Many short searches: in a long one Hypothesis draws ever more of what it has drawn before. TVM compiles every spec,
which costs more than the steps do, so that its examples have more of them, and go on with caches of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from qwenspec.spec.document import Spec
from qwenspec.verify.search import cases
from qwenspec.verify.steps import CacheSizes
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


def test_pages_behind_every_window_are_given_back(look: Look) -> None:
    evicting = cache_sizes().map(lambda s: CacheSizes(s.page_size, s.pages, s.max_batch_size, s.chunk, evicts=True))
    look(cases(specs().map(sliding), evicting, ("triton",)), evicting, examples=8, steps=16, seed=3)


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_long_sequences_and_wide_layers(backend: str, look: Look) -> None:
    """Beyond the blocks that kernels work in."""
    wide = st.sampled_from([wide_spec(), wide_spec({"sliding_window": {"window": 70}})])
    roomy = st.just(CacheSizes(page_size=16, pages=50, max_batch_size=3, chunk=100))
    look(cases(wide, roomy, (backend,)), roomy, examples=4, steps=20, seed=4, max_length=300)


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_scores_beyond_what_exp_can_hold(backend: str, look: Look) -> None:
    """Their differences are as small as ever: q and k have a large bias, which all tokens share."""
    large = st.just(wide_spec({"scale": 20.0}))
    roomy = st.just(CacheSizes(page_size=8, pages=20, max_batch_size=2, chunk=16))
    look(cases(large, roomy, (backend,)), roomy, examples=2, steps=10, seed=5)


def wide_spec(attention: dict[str, Any] | None = None) -> Spec:
    return spec_of(
        {
            "vocab_size": 40,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 600,
            "max_position_embeddings": 512,
            "dtype": "float32",
            "norm": {"eps": 1e-6},
            "attention": {"head_dim": 16, "bias": {"qkv": True}, **(attention or {})},
            "rope": {"theta": 10000.0},
            "mlp": {"bias": True},
        }
    )


def sliding(spec: Spec) -> Spec:
    """The spec with a window in every layer."""
    architecture = spec.architecture.model_dump(mode="json", by_alias=True)
    architecture["attention"]["sliding_window"] = {"window": 3 + spec.architecture.vocab_size % 9, "layers": "all"}
    return spec_of(architecture)
