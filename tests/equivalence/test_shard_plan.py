"""What the tensor-parallel plan says, done: the ranks together compute what the reference computes on the whole.

With one rank this proves `lower` and the names of checkpoint tensors against the reference, and no backend has a part
in it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from sharded import ShardedModel

from qwenspec.diagnostics import SpecError
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import legal_degrees, plan
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Fp8, Fp8Block
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.reference import Reference
from qwenspec.verify.strategies import specs
from qwenspec.verify.strategies_quantized import QUANTIZATIONS
from qwenspec.verify.weights import stored_weights

EXAMPLES = settings().max_examples  # 100 in the `ci` profile
ERROR = 1e-9  # of float64, in terms of a row's largest value

seeds = st.integers(0, 1000)
lengths = st.integers(1, 60)


def assert_ranks_compute(spec: Spec, degrees: Iterable[int], seed: int, length: int) -> None:
    """Every position's logits, of random weights and tokens."""
    weights, model = Dequantized(spec, stored_weights(spec, seed)), lower(spec)
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
@given(specs(), seeds, lengths)
def test_ranks_together_are_the_reference(spec: Spec, seed: int, length: int) -> None:
    legal = legal_degrees(lower(spec))
    event(f"{max(legal)} ranks at most")
    assert_ranks_compute(spec, legal[1:], seed, length)


@settings(max_examples=EXAMPLES)
@given(specs(quantizations=list(QUANTIZATIONS)), seeds, lengths)
def test_ranks_share_what_groups_and_blocks_allow(spec: Spec, seed: int, length: int) -> None:
    """Of weights as they are once they are dequantised: the MLP's width is padded to whole groups."""
    if isinstance(spec.quantization, Fp8 | Fp8Block):  # the program does not say how activations are rounded
        spec = spec.model_copy(update={"quantization": spec.quantization.model_copy(update={"activations": "none"})})
    legal = legal_degrees(lower(spec))
    event(f"{max(legal)} ranks at most")
    assert_ranks_compute(spec, legal[1:], seed, length)


@settings(max_examples=EXAMPLES)
@given(specs())
def test_every_other_degree_is_refused(spec: Spec) -> None:
    """In full precision query heads alone must divide."""
    heads = spec.architecture.num_attention_heads
    for degree in range(heads + 2):
        if degree > 0 and heads % degree == 0:
            assert plan(lower(spec), degree).degree == degree
            continue
        with pytest.raises(SpecError) as refused:
            plan(lower(spec), degree)
        assert {diagnostic.code for diagnostic in refused.value.diagnostics} == {"tensor-parallel-degree"}
