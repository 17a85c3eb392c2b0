"""Inverse frequencies: against transformers where it has the scaling, else against values found by hand."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_specs import make_spec
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenspec.ir import nodes, rope
from qwenspec.ir.lower import lower

MAX_POSITION = 40960

thetas = st.sampled_from([1e4, 5e5, 1e6, 1e7]) | st.floats(10.0, 1e7)
factors = st.floats(1.0, 40.0)
head_dims = st.sampled_from([16, 24, 64, 80, 128])
partial_factors = st.sampled_from([1.0, 0.5, 0.25])
lengths = st.integers(1, 4 * MAX_POSITION) | st.sampled_from([MAX_POSITION, MAX_POSITION + 1])


@st.composite
def scalings(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3"]))
    factor = draw(factors)
    if kind in ("linear", "dynamic"):
        return {"kind": kind, "factor": factor}
    original = draw(st.integers(16, 512) | st.sampled_from([4096, 32768, MAX_POSITION]))
    scaling = {"kind": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "llama3":
        low = draw(st.floats(0.5, 4.0))
        return scaling | {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 8.0))}
    if draw(st.booleans()):
        scaling["attention_factor"] = draw(st.floats(0.5, 2.0))
    if kind == "yarn":
        slow = draw(st.floats(0.25, 2.0))
        scaling |= {"beta_slow": slow, "beta_fast": slow + draw(st.floats(0.5, 40.0))}
        scaling["truncate"] = draw(st.booleans())
        if draw(st.booleans()):
            scaling |= {"mscale": draw(st.floats(0.1, 2.0)), "mscale_all_dim": draw(st.floats(0.1, 2.0))}
        return scaling
    if draw(st.booleans()):
        del scaling["factor"]  # then max_position_embeddings / original_max_position_embeddings
    return scaling


@settings(max_examples=150, deadline=None)
@given(scalings(), thetas, head_dims, partial_factors, lengths, st.data())
def test_transformers_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    scaling: dict[str, Any],
    theta: float,
    head_dim: int,
    partial: float,
    length: int,
    data: st.DataObject,
) -> None:
    """Frequencies to float32's precision, attention factors exactly, through `lower`."""
    if scaling["kind"] == "longrope":
        pairs = int(head_dim * partial) // 2
        divisors = st.lists(st.floats(1.0, 64.0), min_size=pairs, max_size=pairs)
        scaling |= {"short_factor": data.draw(divisors), "long_factor": data.draw(divisors)}
    spec = make_spec(
        tmp_path_factory.getbasetemp(),
        attention={"head_dim": head_dim},
        max_position_embeddings=MAX_POSITION,
        rope={"theta": theta, "partial_rotary_factor": partial, "scaling": scaling},
    )
    ours = lower(spec).rope

    parameters = {key: value for key, value in scaling.items() if key != "kind"}
    parameters |= {"rope_type": scaling["kind"], "rope_theta": theta, "partial_rotary_factor": partial}
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=MAX_POSITION, rope_parameters=dict(parameters))
    assert config.rope_parameters == parameters, "transformers changed the parameters it was given"
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](config, "cpu", seq_len=length)

    # They blend llama3's bands in float32, over a difference that may be as small as a ninth of its terms.
    assert rope.frequencies(ours, length) == pytest.approx(theirs.tolist(), rel=2e-5)
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-14)


@given(thetas, st.sampled_from([2, 4, 16, 128]))
def test_default(theta: float, dim: int) -> None:
    found = rope.default(dim, theta)
    assert len(found) == dim // 2
    assert found == pytest.approx([math.exp(-2 * i / dim * math.log(theta)) for i in range(dim // 2)], rel=1e-12)


@given(thetas, factors, st.sampled_from([4, 16, 128]))
def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor(
    theta: float, factor: float, dim: int
) -> None:
    plain, scaled = rope.default(dim, theta), rope.ntk(dim, theta, factor)
    assert scaled[0] == 1.0
    assert plain[-1] / scaled[-1] == pytest.approx(factor, rel=1e-12)
    # Between them the divisor grows geometrically, pair by pair.
    divisors = [a / b for a, b in zip(plain, scaled, strict=True)]
    assert divisors == pytest.approx([factor ** (i / (dim // 2 - 1)) for i in range(dim // 2)], rel=1e-12)


@pytest.mark.parametrize("train_length", [10, 16, 2048, 8192, 32768])
def test_qwen1_alpha_steps(train_length: int) -> None:
    """α is 1 to T, 3 to 2T, 7 to 4T, 15 to 8T; the slowest pair is divided by exactly α."""
    t = train_length
    expected = {1: 1, t // 2: 1, t: 1, t + 1: 3, 2 * t: 3, 2 * t + 1: 7, 4 * t: 7, 4 * t + 1: 15, 8 * t: 15}
    slowest = rope.default(128, 1e4)[-1]
    found = {length: slowest / rope.dynamic_qwen1(128, 1e4, t, length)[-1] for length in expected}
    assert found == pytest.approx(expected, rel=1e-12)


def test_qwen1_by_hand() -> None:
    """8 values, base 10000, α = 7: base' = 10000 · 7^(8/6) = 133905.1…, pairs base'^0, ^-¼, ^-½, ^-¾."""
    root = 10.0 * 7 ** (1 / 3)  # base'^¼
    assert rope.dynamic_qwen1(8, 1e4, 16, 40) == pytest.approx([1, 1 / root, root**-2, root**-3], rel=1e-12)


def test_qwen1_meets_hugging_face_at_whole_steps() -> None:
    """At 2ⁿ·T tokens its step equals Hugging Face's dynamic NTK with factor 2; just below it is ahead."""
    for length in (16, 32, 64, 128):
        assert rope.dynamic_qwen1(32, 1e4, 16, length) == rope.dynamic(32, 1e4, 2.0, 16, length)
    assert rope.dynamic_qwen1(32, 1e4, 16, 17)[-1] < rope.dynamic(32, 1e4, 2.0, 16, 17)[-1]


def test_yarn_of_qwen3() -> None:
    """128 values, base 10⁶, 32768 tokens, factor 4: the ramp runs from pair 23 to 40 (23.6, 39.7)."""
    plain = rope.default(128, 1e6)
    scaled = rope.yarn(128, 1e6, 4.0, 32768, 32.0, 1.0, True)
    kept = [scaled[i] / plain[i] for i in (0, 23, 31, 40, 63)]
    assert kept == pytest.approx([1, 1, 1 - 0.75 * 8 / 17, 0.25, 0.25], rel=1e-12)
    assert rope.yarn_attention_factor(4.0, None, None) == pytest.approx(1.138629436111989, rel=1e-15)


def test_attention_factors_by_hand() -> None:
    assert rope.yarn_attention_factor(1.0, 2.0, 0.5) == 1.0
    assert rope.yarn_attention_factor(math.e, 1.0, 0.5) == pytest.approx(1.1 / 1.05, rel=1e-15)
    assert rope.yarn_attention_factor(math.e, 1.0, None) == pytest.approx(1.1, rel=1e-15)
    assert rope.longrope_attention_factor(1.0, 4096) == 1.0
    assert rope.longrope_attention_factor(8.0, 4096) == pytest.approx(math.sqrt(1.25), rel=1e-15)


def test_longrope_switches_after_the_original_length() -> None:
    factors = (1.0, 2.0), (4.0, 8.0)
    assert rope.longrope(4, 100.0, *factors, 64, 64) == pytest.approx([1.0, 0.05], rel=1e-15)
    assert rope.longrope(4, 100.0, *factors, 64, 65) == pytest.approx([0.25, 0.0125], rel=1e-15)


SCALINGS = [
    nodes.DefaultRope(),
    nodes.LinearRope(4.0),
    nodes.NtkRope(4.0),
    nodes.DynamicRope(4.0, 64),
    nodes.DynamicQwen1Rope(64),
    nodes.YarnRope(4.0, 64, 32.0, 1.0, True),
    nodes.LongRope((1.0,) * 8, (3.0,) * 8, 64),
    nodes.Llama3Rope(8.0, 1.0, 4.0, 64),
]


def test_every_scaling_is_listed() -> None:
    assert {type(scaling) for scaling in SCALINGS} == set(get_args(nodes.RopeScaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_each_formula_stands_alone(scaling: nodes.RopeScaling) -> None:
    """Its source text, with `math` and nothing else, computes the same: that is how packages carry it."""
    formula = rope.formula(scaling)
    alone: dict[str, Any] = {"math": math}
    exec(inspect.getsource(formula), alone)
    node = nodes.Rope(16, 1e4, "activation", scaling, 1.0)
    arguments = {"dim": 16, "theta": 1e4, "length": 200}
    arguments |= {name: getattr(scaling, name) for name in scaling.__dataclass_fields__}
    names = inspect.signature(formula).parameters
    assert rope.follows_length(scaling) == ("length" in names)
    found = alone[formula.__name__](**{name: arguments[name] for name in names})
    assert found == rope.frequencies(node, 200)
    assert len(found) == 8
    assert (rope.frequencies(node, 1) == found) != rope.follows_length(scaling)
