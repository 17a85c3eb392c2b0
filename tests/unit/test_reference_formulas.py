"""The float64 reference's norm, activations, softmax, LogN and windows against values worked out apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf

from qwenspec.spec.attention import LayersFrom, SlidingWindow
from qwenspec.spec.norm import Norm
from qwenspec.verify.reference import activation, logn, rms_norm, softmax, visible, window_of_layer

mp.dps = 40
EXACT = {"rtol": 1e-12, "atol": 0}
POINTS = [-300.0, -30.0, -6.5, -2.0, -1.0, -0.1, -1e-9, 1e-9, 0.3, 1.0, 2.0, 6.5, 30.0, 300.0]


def test_rms_norm():
    # mean([1, 49]) + 11 = 36, whose root is 6.
    x, weight = np.array([[1.0, 7.0]]), np.array([2.0, 3.0])
    np.testing.assert_allclose(rms_norm(x, weight, Norm(eps=11.0)), [[1 / 3, 7 / 2]], **EXACT)
    one_plus = rms_norm(x, weight, Norm(eps=11.0, weight="one_plus"))
    np.testing.assert_allclose(one_plus, [[1 / 2, 14 / 3]], **EXACT)


def test_rms_norm_is_of_each_row_and_head_apart():
    x = np.random.default_rng(0).normal(size=(3, 2, 5)) * [[[1.0]], [[1e3]], [[1e-3]]]
    weight = np.array([1.0, -2.0, 0.5, 3.0, 1e-2])
    out = rms_norm(x, weight, Norm(eps=1e-5))
    for row, head in np.ndindex(3, 2):
        values = [mpf(float(v)) for v in x[row, head]]
        root = mp.sqrt(mp.fsum(v**2 for v in values) / 5 + mpf(1e-5))
        expected = [float(v / root * mpf(w)) for v, w in zip(values, weight, strict=True)]
        np.testing.assert_allclose(out[row, head], expected, **EXACT)


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mp.exp(-x))


def normal_cdf(x: mpf) -> mpf:
    return mp.ncdf(x)


def tanh_gelu(x: mpf) -> mpf:
    """(1 + tanh u) / 2 is the sigmoid of 2u."""
    return sigmoid(2 * mp.sqrt(2 / mp.pi) * (x + mpf("0.044715") * x**3))


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("silu", sigmoid),
        ("swish", sigmoid),
        ("relu", lambda x: mpf(1 if x > 0 else 0)),
        ("gelu", normal_cdf),
    ],
)
def test_activation(kind, share):
    expected = [float(mpf(x) * share(mpf(x))) for x in POINTS]
    np.testing.assert_allclose(activation(kind, np.array(POINTS)), expected, **EXACT)


@pytest.mark.parametrize("kind", ["gelu_new", "gelu_pytorch_tanh"])
def test_tanh_approximation_of_gelu(kind):
    # Far below zero 1 + tanh cancels: what is left is less than 1e-16 of x, in Hugging Face too.
    expected = [float(mpf(x) * tanh_gelu(mpf(x))) for x in POINTS]
    np.testing.assert_allclose(activation(kind, np.array(POINTS)), expected, rtol=1e-12, atol=1e-14)


def test_activations_at_known_points():
    assert activation("silu", np.array([math.log(3)]))[0] == pytest.approx(0.75 * math.log(3), rel=1e-12)
    assert activation("gelu", np.array([1.0]))[0] == pytest.approx(0.841344746068542948585, rel=1e-12)  # Φ(1)
    for kind in ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"):
        assert activation(kind, np.array([0.0]))[0] == 0
        with np.errstate(all="raise", under="ignore"):
            assert activation(kind, np.array([-800.0, 800.0])).tolist() == pytest.approx([0, 800], abs=1e-300)


def test_exact_and_approximate_gelu_differ():
    x = np.array([2.0])
    assert 1e-5 < abs(activation("gelu", x) - activation("gelu_new", x))[0] < 1e-3


def test_softmax_of_logarithms_is_their_shares():
    scores = np.log([[1.0, 2.0, 5.0], [3.0, 1.0, 1.0]])
    shares = [[1 / 8, 2 / 8, 5 / 8], [3 / 5, 1 / 5, 1 / 5]]
    np.testing.assert_allclose(softmax(scores), shares, **EXACT)
    np.testing.assert_allclose(softmax(scores + 700), shares, **EXACT)


def test_softmax_gives_nothing_to_what_is_masked():
    assert softmax(np.array([[0.0, -np.inf, 0.0]])).tolist() == [[0.5, 0, 0.5]]


def test_logn():
    positions = np.array([0, 1, 6, 7, 8, 63, 511])
    # ln(p + 1) / ln 8 with p + 1 = 64 = 8² and 512 = 8³; up to p + 1 = 8 it is 1.
    expected = [1, 1, 1, 1, float(mp.log(9) / mp.log(8)), 2, 3]
    np.testing.assert_allclose(logn(positions, 8), expected, **EXACT)
    np.testing.assert_allclose(logn(np.array([4095]), 2048), [12 / 11], **EXACT)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("start", [0, 5])
def test_visible(window, start):
    """Key by key: the query's own position and the window - 1 before it."""
    length = 8
    seen = visible(np.arange(start, length), length, window)
    for query in range(start, length):
        first = 0 if window is None else max(query - window + 1, 0)
        expected = ["see" if first <= key <= query else "not" for key in range(length)]
        assert ["see" if s else "not" for s in seen[query - start]] == expected


def test_window_of_three():
    assert visible(np.array([5]), 7, 3).tolist() == [[False, False, False, True, True, True, False]]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [9, 9, 9, 9]),
        (LayersFrom.model_validate({"from": 2}), [None, None, 9, 9]),
        (LayersFrom.model_validate({"from": 4}), [None, None, None, None]),
        ((0, 3), [9, None, None, 9]),
        ((), [None, None, None, None]),
    ],
)
def test_window_of_layer(layers, expected):
    sliding = SlidingWindow(window=9, layers=layers)
    assert [window_of_layer(sliding, i) for i in range(4)] == expected
    assert window_of_layer(None, 0) is None
