"""What the tensor-parallel plan says, done: the ranks together compute what the reference computes on the whole.

With one rank this proves `lower` and the names of checkpoint tensors against the reference, and no backend has a part
in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from sharded import ShardedModel

from qwenspec.diagnostics import SpecError
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import legal_degrees, plan
from qwenspec.spec.document import Spec
from qwenspec.verify.reference import Reference
from qwenspec.verify.strategies import specs
from qwenspec.verify.weights import random_weights

EXAMPLES = settings().max_examples  # 100 in the `ci` profile
ERROR = 1e-9  # of float64, in terms of a row's largest value

seeds = st.integers(0, 1000)
lengths = st.integers(1, 60)


@st.composite
def shared_specs(draw: Callable[..., Any]) -> Spec:
    """Specs whose MLP can be shared by as many ranks as the query heads can."""
    spec = draw(specs())
    arch = spec.architecture
    width = arch.num_attention_heads * draw(st.integers(1, 8))
    return spec.model_copy(update={"architecture": arch.model_copy(update={"intermediate_size": width})})


def assert_ranks_compute(spec: Spec, degrees: Iterable[int], seed: int, length: int) -> None:
    """Every position's logits, of random weights and tokens."""
    weights, model = random_weights(spec, seed), lower(spec)
    ids = np.random.default_rng(seed).integers(spec.architecture.vocab_size, size=length)
    expected = Reference(spec, weights).logits(ids)
    for degree in degrees:
        found = ShardedModel(model, weights, degree).outputs(ids)
        assert found.shape == expected.shape
        error = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
        assert error.max() < ERROR, f"{degree} ranks: positions {np.flatnonzero(error >= ERROR)} are off"


@settings(max_examples=10 * EXAMPLES)
@given(specs(), seeds, lengths)
def test_one_rank_is_the_reference(spec: Spec, seed: int, length: int) -> None:
    assert_ranks_compute(spec, [1], seed, length)


@settings(max_examples=3 * EXAMPLES)
@given(shared_specs(), seeds, lengths)
def test_ranks_together_are_the_reference(spec: Spec, seed: int, length: int) -> None:
    legal = legal_degrees(lower(spec))
    event(f"{max(legal)} ranks at most")
    assert_ranks_compute(spec, legal[1:], seed, length)


@settings(max_examples=EXAMPLES)
@given(specs() | shared_specs())
def test_every_other_degree_is_refused(spec: Spec) -> None:
    """By the sizes that a spec gives: what each degree must divide."""
    arch = spec.architecture
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads or arch.num_attention_heads
    for degree in range(heads + 2):
        divides = degree > 0 and heads % degree == 0 and arch.intermediate_size % degree == 0
        if divides and (kv_heads % degree == 0 or degree % kv_heads == 0):
            assert plan(lower(spec), degree).degree == degree
            continue
        with pytest.raises(SpecError) as refused:
            plan(lower(spec), degree)
        assert {diagnostic.code for diagnostic in refused.value.diagnostics} == {"tensor-parallel-degree"}
