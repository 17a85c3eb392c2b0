"""The float64 reference's rotary embedding against values worked out by hand and with mpmath."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf

from qwenspec.spec.rope import Dynamic, DynamicQwen1, Linear, Llama3, LongRope, Ntk, Rope, RopeScaling, Yarn
from qwenspec.verify.reference_rope import attention_factor, inverse_frequencies, qwen1_alpha, rotate

mp.dps = 40
EXACT = {"rtol": 1e-12, "atol": 0}


def frequencies(theta: float, dim: int, scaling: RopeScaling | None, length: int = 1, max_position: int = 32):
    return inverse_frequencies(Rope(theta=theta, scaling=scaling), dim, max_position, length)


def slowing(theta: float, dim: int, scaling: RopeScaling | None) -> list[mpf]:
    """How much a scaling divides each frequency: 1 where it leaves it alone."""
    plain = [mp.exp(-mpf(2 * i) / dim * mp.log(mpf(theta))) for i in range(dim // 2)]
    return [a / mpf(float(b)) for a, b in zip(plain, frequencies(theta, dim, scaling), strict=True)]


@pytest.mark.parametrize(
    ("theta", "dim", "expected"),
    [
        (1e4, 4, [1, 1e-2]),  # 10000^(-1/2) = 1/100
        (1e4, 8, [1, 1e-1, 1e-2, 1e-3]),
        (1e6, 6, [1, 1e-2, 1e-4]),  # (10^6)^(-1/3) = 10^-2
        (81.0, 8, [1, 1 / 3, 1 / 9, 1 / 27]),
    ],
)
def test_without_scaling(theta, dim, expected):
    np.testing.assert_allclose(frequencies(theta, dim, None), expected, **EXACT)


def test_without_scaling_at_a_real_width():
    expected = [float(1 / mp.root(mpf(10) ** 6, 64) ** i) for i in range(64)]
    np.testing.assert_allclose(frequencies(1e6, 128, None), expected, **EXACT)


def test_linear_divides_every_frequency():
    scaling = Linear(kind="linear", factor=4.0)
    np.testing.assert_allclose(frequencies(1e4, 8, scaling), [0.25, 0.025, 0.0025, 0.00025], **EXACT)


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "expected"),
    [
        (1e4, 4, 3.0, [1, 1 / 300]),  # 3^(4/2) = 9: sqrt(90000) = 300
        (1e3, 6, 4.0, [1, 1 / 20, 1 / 400]),  # 4^(6/4) = 8: cbrt(8000) = 20
    ],
)
def test_ntk_raises_the_base(theta, dim, factor, expected):
    np.testing.assert_allclose(frequencies(theta, dim, Ntk(kind="ntk", factor=factor)), expected, **EXACT)


def test_ntk_slows_the_slowest_pair_by_the_factor():
    np.testing.assert_allclose(float(slowing(1e6, 128, Ntk(kind="ntk", factor=8.0))[-1]), 8, **EXACT)


@pytest.mark.parametrize(
    ("factor", "length", "slowest"),
    [
        (2.0, 5, 1 / 100),
        (2.0, 32, 1 / 100),  # up to max_position_embeddings the base is the spec's
        (2.0, 48, 1 / 200),  # 2 · 48/32 - 1 = 2: sqrt(10000 · 2²)
        (2.0, 64, 1 / 300),
        (1.0, 128, 1 / 400),  # factor 1: length / max_position_embeddings
        (4.0, 48, 1 / 300),  # 4 · 48/32 - 3 = 3
    ],
)
def test_dynamic_grows_the_base_with_the_length(factor, length, slowest):
    scaling = Dynamic(kind="dynamic", factor=factor)
    np.testing.assert_allclose(frequencies(1e4, 4, scaling, length), [1, slowest], **EXACT)


@pytest.mark.parametrize("train_length", [1, 16, 100, 2048, 8192])
def test_qwen1_alpha_is_the_power_of_two_step(train_length):
    for k, alpha in enumerate([1, 3, 7, 15, 31]):
        lengths = {(train_length << k >> 1) + 1, train_length << k} if k else {1, train_length}
        for length in lengths:
            assert qwen1_alpha(length, train_length) == alpha
            published = max(2 ** mp.ceil(mp.log(mpf(length) / train_length, 2) + 1) - 1, 1)
            assert published == alpha


@pytest.mark.parametrize(("length", "slowest"), [(16, 1 / 100), (17, 1 / 300), (32, 1 / 300), (33, 1 / 700)])
def test_dynamic_qwen1_frequencies(length, slowest):
    scaling = DynamicQwen1(kind="dynamic_qwen1", train_length=16)
    np.testing.assert_allclose(frequencies(1e4, 4, scaling, length), [1, slowest], **EXACT)


def test_dynamic_qwen1_is_dynamic_of_factor_two_at_the_next_power_of_two():
    for length, rounded in [(17, 32), (32, 32), (33, 64), (100, 128)]:
        qwen1 = frequencies(1e4, 16, DynamicQwen1(kind="dynamic_qwen1", train_length=16), length)
        hf = frequencies(1e4, 16, Dynamic(kind="dynamic", factor=2.0), rounded, max_position=16)
        np.testing.assert_allclose(qwen1, hf, **EXACT)


def yarn(**changes) -> Yarn:
    settings = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return Yarn(**(settings | changes))


def ramp_of(scaling: Yarn, theta: float, dim: int) -> list[mpf]:
    """f' = f·(1 - r) + f/s·r, solved for r."""
    return [(1 - 1 / s) / (1 - 1 / mpf(scaling.factor)) for s in slowing(theta, dim, scaling)]


def test_yarn_of_qwen25():
    """128 values a head, theta 10^6, 32768 tokens: a ramp from 23.596 to 39.651, truncated 23 and 40."""
    ramp = ramp_of(yarn(), 1e6, 128)
    expected = [mpf(0)] * 24 + [mpf(i - 23) / 17 for i in range(24, 40)] + [mpf(1)] * 24
    np.testing.assert_allclose([float(r) for r in ramp], [float(r) for r in expected], rtol=1e-12, atol=1e-12)


def test_yarn_without_truncation():
    """The ramp runs between the pairs that would turn 32 times and once in the original context."""

    def pair_that_turns(times: int) -> mpf:
        return mp.findroot(lambda i: 32768 / (2 * mp.pi) * mpf(10) ** (-6 * i / 64) - times, 30)

    low, high = pair_that_turns(32), pair_that_turns(1)
    expected = [min(max((i - low) / (high - low), 0), 1) for i in range(64)]
    ramp = ramp_of(yarn(truncate=False), 1e6, 128)
    np.testing.assert_allclose([float(r) for r in ramp], [float(r) for r in expected], rtol=1e-12, atol=1e-12)


def test_yarn_with_other_betas():
    # e^(2·8/16) = e, so pair i turns 1024/(2π e^i) times: ln(1024/(2π·8)) = 3.01 and ln(1024/(2π·2)) = 4.40.
    scaling = yarn(original_max_position_embeddings=1024, beta_fast=8.0, beta_slow=2.0, factor=2.0)
    expected = [1, 1, 1, 1, 1 / (1 - 0.5 / 2), 2, 2, 2]  # low 3, high 5: a half at 4
    actual = slowing(math.exp(8), 16, scaling)
    np.testing.assert_allclose([float(s) for s in actual], expected, **EXACT)


def test_yarn_ramp_is_kept_inside_the_head():
    # Pair i turns 4096/(2π 2^i) times: 32 at i = 4.35, once at 9.35; but a head of 8 ends at 7.
    scaling = yarn(original_max_position_embeddings=4096, factor=2.0)
    assert [float(s) for s in slowing(16.0, 8, scaling)] == pytest.approx([1, 1, 1, 1], rel=1e-12)
    # 100000 turns never happen: the ramp starts at 0, not before it, and ends at 10.
    ramp = ramp_of(scaling.model_copy(update={"beta_fast": 1e5}), 2.0**16, 32)
    assert [float(r) for r in ramp] == pytest.approx([min(i / 10, 1) for i in range(16)], rel=1e-12, abs=1e-12)


def test_yarn_ramp_of_no_width_is_a_step():
    # Both ends at i = 3.01: pairs 0 to 3 stay, the others are slowed.
    scaling = yarn(original_max_position_embeddings=1024, beta_fast=8.0, beta_slow=8.0, factor=2.0, truncate=False)
    actual = [float(s) for s in slowing(math.exp(8), 16, scaling)]
    assert actual == pytest.approx([1, 1, 1, 1, 2, 2, 2, 2], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, mpf("1.138629436111989061883446424291635313615")),  # ln 4 = 1.38629436…
        ({"factor": 1.0}, 1),
        ({"attention_factor": 0.75}, mpf("0.75")),
        ({"mscale": 0.5}, 1 + mp.log(4) / 10),  # alone it is not read
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1),
        ({"factor": 40.0, "mscale": 0.5, "mscale_all_dim": 0.25}, (20 + mp.log(40)) / (20 + mp.log(40) / 2)),
        ({"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 2.0}, 2),
    ],
)
def test_yarn_attention_factor(changes, expected):
    assert attention_factor(yarn(**changes), 131072) == pytest.approx(float(expected), rel=1e-12)


def longrope(**changes) -> LongRope:
    settings = {"kind": "longrope", "short_factor": (1.0, 2.0), "long_factor": (4.0, 8.0)}
    return LongRope(**(settings | {"original_max_position_embeddings": 32} | changes))


@pytest.mark.parametrize(("length", "expected"), [(1, [1, 0.005]), (32, [1, 0.005]), (33, [0.25, 0.00125])])
def test_longrope_divides_by_the_list_for_the_length(length, expected):
    np.testing.assert_allclose(frequencies(1e4, 4, longrope(), length), expected, **EXACT)


@pytest.mark.parametrize(
    ("changes", "max_position", "expected"),
    [
        ({}, 128, math.sqrt(1.4)),  # factor 128/32 = 2², 32 = 2⁵: 1 + 2/5
        ({"factor": 8.0}, 128, math.sqrt(1.6)),
        ({}, 32, 1.0),
        ({"factor": 1.0}, 128, 1.0),
        ({"attention_factor": 1.25}, 128, 1.25),
    ],
)
def test_longrope_attention_factor(changes, max_position, expected):
    assert attention_factor(longrope(**changes), max_position) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("theta", "dim", "original"),
    [(5e5, 128, 8192), (20.0, 512, 40)],
    ids=["llama-3.1", "many pairs at both ends of the blend"],
)
def test_llama3(theta, dim, original):
    """By wavelength: beyond original/1 divided by 8, below original/4 left alone, between blended."""
    scaling = Llama3(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )
    expected = []
    for i in range(dim // 2):
        wavelength = 2 * mp.pi * mp.root(mpf(theta), dim // 2) ** i
        if wavelength > original:
            expected.append(mpf(8))
        elif wavelength < mpf(original) / 4:
            expected.append(mpf(1))
        else:
            share = (original / wavelength - 1) / 3
            expected.append(1 / ((1 - share) / 8 + share))
    assert {1.0, 8.0} < {float(e) for e in expected}  # and some lie between
    actual = slowing(theta, dim, scaling)
    np.testing.assert_allclose([float(s) for s in actual], [float(e) for e in expected], **EXACT)


@pytest.mark.parametrize("kind", [None, Linear(kind="linear", factor=2.0), Dynamic(kind="dynamic", factor=2.0)])
def test_other_scalings_have_no_attention_factor(kind):
    assert attention_factor(kind, 4096) == 1


def test_rotation_is_a_complex_product():
    """Values i and i + half of a head are the real and imaginary part of a number that turns."""
    x = np.random.default_rng(0).normal(size=(3, 2, 8))
    positions, freqs = [0, 7, 1000], [1.0, 0.25]
    out = rotate(x, np.array(positions), np.array(freqs), 1.5)
    for n, position in enumerate(positions):
        for head in range(2):
            for i, frequency in enumerate(freqs):
                turn = mp.expj(mpf(position) * mpf(frequency))
                expected = mp.mpc(x[n, head, i], x[n, head, i + 2]) * turn * 1.5
                assert out[n, head, i] == pytest.approx(float(expected.real), rel=1e-12, abs=1e-12)
                assert out[n, head, i + 2] == pytest.approx(float(expected.imag), rel=1e-12, abs=1e-12)
    assert (out[:, :, 4:] == x[:, :, 4:]).all()  # a partial rotation leaves the rest of the head


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 16))
    freqs = frequencies(1e4, 16, None)

    def score(query: int, key: int) -> float:
        turned = (rotate(v, np.array([p]), freqs, 1.0) for v, p in ((q, query), (k, key)))
        return float(np.sum(next(turned) * next(turned)))

    assert score(9, 4) == pytest.approx(score(109, 104), rel=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
