"""Metrics against values computed by hand, what cannot be compared, and the file of bounds."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwenspec.spec.document import Spec
from qwenspec.verify import metrics, reference
from qwenspec.verify.metrics import Comparison, Verdict, bound, compare, tolerances
from qwenspec.verify.reference_rope import attention_factor
from qwenspec.verify.strategies import specs
from qwenspec.verify.weights import random_weights

EXPECTED = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 10.0]])
PACKAGE, PACKAGES = ("triton", "reference"), ("triton", "tvm")
HUGGING_FACE = ("huggingface", "reference")


def test_values_by_hand() -> None:
    actual = EXPECTED + np.array([[0.3, -0.4, 0.0], [0.0, 0.0, 2.0]], np.float32)
    found = compare(actual, EXPECTED, 0.5)
    assert found.verdict is Verdict.PASS
    assert found.error == pytest.approx(0.2)  # 2 of 10; in the first row 0.5 of 5
    assert found.worst_row == 1
    assert found.max_abs == pytest.approx(2.0)
    assert found.mean_abs == pytest.approx(2.7 / 6)
    assert found.max_relative == pytest.approx(0.2)
    assert found.cosine == pytest.approx((3.3 * 3 + 3.6 * 4) / (5 * math.hypot(3.3, 3.6)))
    assert (found.top_k_overlap, found.argmax_agreement, found.near_ties, found.rows) == (1.0, 1.0, 0, 2)
    assert found.bound == 0.5


def test_beyond_the_bound_fails() -> None:
    assert compare(EXPECTED * 1.25, EXPECTED, 0.25).verdict is Verdict.PASS
    assert compare(EXPECTED * 1.25, EXPECTED, 0.2499).verdict is Verdict.FAIL


def test_a_near_tie_is_ambiguous() -> None:
    expected = np.array([[1.0, 1.001, 0.0], [5.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    actual = expected.copy()
    actual[0, 0] = 1.002
    found = compare(actual, expected, 0.01)
    assert (found.verdict, found.near_ties, found.argmax_agreement) == (Verdict.AMBIGUOUS, 1, pytest.approx(2 / 3))
    assert compare(actual, expected, 1e-4).verdict is Verdict.FAIL


def test_a_row_that_fails_is_no_near_tie() -> None:
    found = compare(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), 0.1)
    assert (found.verdict, found.near_ties, found.argmax_agreement) == (Verdict.FAIL, 0, 0.0)
    assert found.error == pytest.approx(math.sqrt(2))


def test_the_tokens_of_a_near_tie_are_as_near_as_the_bound_says() -> None:
    random = np.random.default_rng(0)
    expected = random.standard_normal((2000, 5))
    actual = expected + 0.2 * random.standard_normal((2000, 5))
    found = compare(actual, expected, 0.5)
    rows = np.arange(2000)
    gaps = expected[rows, expected.argmax(-1)] - expected[rows, actual.argmax(-1)]
    lengths = np.linalg.norm(expected, axis=-1)
    within = np.linalg.norm(actual - expected, axis=-1) <= 0.5 * lengths
    differ = expected.argmax(-1) != actual.argmax(-1)
    assert found.near_ties == np.count_nonzero(within & differ) > 100
    assert (gaps <= math.sqrt(2) * 0.5 * lengths)[within & differ].all()


def test_top_k_is_of_sets() -> None:
    expected = np.array([[9.0, 8, 7, 6, 5, 0, 0, 0], [9.0, 8, 7, 6, 5, 0, 0, 0]])
    actual = np.array([[5.0, 6, 7, 8, 9, 0, 0, 0], [9.0, 8, 7, 0, 0, 6, 5, 0]])
    assert compare(actual, expected, 9.0).top_k_overlap == pytest.approx((1 + 3 / 5) / 2)
    assert compare(actual[:, :2], expected[:, :2], 9.0).top_k_overlap == 1.0  # fewer tokens than TOP_K


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_fails(wrong: float, side: int) -> None:
    tables = [EXPECTED.copy(), EXPECTED.copy()]
    tables[side][1, 0] = wrong
    found = compare(tables[0], tables[1], 1e9)
    assert (found.verdict, found.worst_row, found.rows) == (Verdict.FAIL, 1, 2)
    assert found.error == found.max_abs == found.mean_abs == found.max_relative == math.inf
    assert (found.cosine, found.top_k_overlap, found.argmax_agreement) == (0.0, 0.5, 0.5)


def test_both_infinite_is_no_agreement() -> None:
    assert compare(np.full((1, 2), np.inf), np.full((1, 2), np.inf), 1.0).verdict is Verdict.FAIL


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 3), (6,), (2, 3, 1), (0, 3)])
def test_other_shapes_fail(shape: tuple[int, ...]) -> None:
    found = compare(np.ones(shape), EXPECTED, 1e9)
    assert (found.verdict, found.error, found.rows) == (Verdict.FAIL, math.inf, 2)


def test_no_rows() -> None:
    found = compare(np.zeros((0, 3)), np.zeros((0, 3)), 1e-9)
    assert (found.verdict, found.rows, found.worst_row) == (Verdict.PASS, 0, -1)
    assert compare(np.zeros((1, 3)), np.zeros((0, 3)), 1e-9).verdict is Verdict.FAIL


def test_one_token() -> None:
    found = compare(np.array([[2.0], [3.0]], np.float32), np.array([[2.0], [2.5]]), 0.3)
    assert found.error == pytest.approx(0.2)
    assert (found.top_k_overlap, found.argmax_agreement, found.cosine) == (1.0, 1.0, 1.0)


def test_a_row_of_zeros() -> None:
    zero, one = np.zeros((1, 2)), np.array([[1.0, 0.0]])
    assert compare(zero, zero, 1e-9) == Comparison(Verdict.PASS, 0.0, 1e-9, 0, 0, 0, 1.0, 1.0, 1.0, 0, 1, 0)
    found = compare(one, zero, 1e9)
    assert (found.verdict, found.error, found.max_relative, found.cosine) == (Verdict.FAIL, math.inf, math.inf, 0.0)


def test_halves_are_compared_in_float64() -> None:
    """In float16 the lengths of such rows are infinite, and nothing would differ."""
    actual, expected = np.full((1, 100), 40000, np.float16), np.full((1, 100), 20000, np.float16)
    assert compare(actual, expected, 0.5).error == pytest.approx(1.0)


@given(seed=st.integers(0, 1 << 32), rows=st.integers(1, 6), spoiled=st.sets(st.sampled_from("frizn")))
def test_every_row_is_judged(seed: int, rows: int, spoiled: set[str]) -> None:
    """By a loop over rows, of which some are far off, reordered, infinite, zero or not a number."""
    random = np.random.default_rng(seed)
    expected = random.standard_normal((rows, 7))
    actual = expected + 0.02 * random.standard_normal((rows, 7)) * random.integers(0, 2, (rows, 1))
    for what in sorted(spoiled):
        row = random.integers(rows)
        values = {"f": expected[row] * 1.3, "r": expected[row][::-1], "i": np.inf, "z": 0.0, "n": np.nan}
        actual[row] = values[what]
    errors = [
        float(np.linalg.norm(a - e) / np.linalg.norm(e)) if np.isfinite(a).all() else math.inf
        for a, e in zip(actual, expected, strict=True)
    ]
    found, limit = compare(actual, expected, 0.1), 0.1
    differ = [a.argmax() != e.argmax() for a, e in zip(actual, expected, strict=True)]
    ties = sum(error <= limit and other for error, other in zip(errors, differ, strict=True))
    assert found.error == pytest.approx(max(errors))
    assert found.worst_row == errors.index(max(errors))
    assert found.near_ties == ties
    worst = Verdict.FAIL if max(errors) > limit else Verdict.AMBIGUOUS if ties else Verdict.PASS
    assert found.verdict is worst


def test_a_near_tie_excuses_no_other_row() -> None:
    expected = np.array([[1.0, 1.001, 0.0], [5.0, 0.0, 0.0]])
    actual = np.array([[1.001, 1.0, 0.0], [5.0, 1.0, 0.0]])
    found = compare(actual, expected, 0.01)
    assert (found.verdict, found.near_ties, found.worst_row) == (Verdict.FAIL, 1, 1)


# ---------------------------------------------------------------------------------------------------- bounds


def test_bounds_follow_dtype_and_depth() -> None:
    entry, depth = tolerances().bounds["package-reference"]["float16"], tolerances().depth
    assert bound("float16", 3, PACKAGE) == pytest.approx(entry.k * 2**-11 * math.sqrt(depth(3)))
    assert depth(5) - depth(4) == depth(1) - depth(0) == len(tolerances().layer)
    assert bound("float32", 2, PACKAGE) < bound("float16", 2, PACKAGE) < bound("bfloat16", 2, PACKAGE) < 0.5
    assert bound("float32", 1, PACKAGE) < bound("float32", 2, PACKAGE)


def test_a_narrower_head_rounds_once_more() -> None:
    for layers in (1, 3):
        added = bound("float32", layers, PACKAGE, "bfloat16") - bound("float32", layers, PACKAGE)
        assert added == pytest.approx(tolerances().head.k * 2**-8)
    assert bound("bfloat16", 2, PACKAGE, "float32") == bound("bfloat16", 2, PACKAGE, "bfloat16")
    assert bound("bfloat16", 2, PACKAGE, "bfloat16") == bound("bfloat16", 2, PACKAGE)


def test_what_a_spec_rounds_counts_in_every_layer_and_dtype() -> None:
    entry = tolerances().rounded["activations"]
    for dtype, layers in itertools.product(("float32", "bfloat16"), (1, 3)):
        added = bound(dtype, layers, PACKAGE, rounded=["activations"]) - bound(dtype, layers, PACKAGE)
        assert added == pytest.approx(entry.k * 2**-4 * math.sqrt(4 * layers))
    assert bound("bfloat16", 3, PACKAGE, rounded=["activations"]) < 0.6


def test_every_pair_has_bounds() -> None:
    for pair in (PACKAGE, PACKAGES, HUGGING_FACE, ("triton", "huggingface"), ("huggingface", "tvm")):
        assert bound("float32", 1, pair) > 0
    for dtype in ("float16", "bfloat16"):
        assert bound(dtype, 1, PACKAGE) > 0
        assert bound(dtype, 1, PACKAGES) > 0


def test_a_reference_is_judged_by_nobody() -> None:
    with pytest.raises(AssertionError, match="the reference is what others are compared with"):
        bound("float32", 1, ("reference", "triton"))


def test_a_bound_is_no_wider_than_what_was_measured_explains() -> None:
    """Three times the largest error that was seen of what is right, and a little for round numbers."""
    by_kind = tolerances().bounds
    entries = [entry for kind in ("package-reference", "huggingface-reference") for entry in by_kind[kind].values()]
    entries += [*by_kind["package-huggingface"].values(), *tolerances().rounded.values(), tolerances().head]
    for entry in entries:
        largest = max(float(number.rstrip(".")) for number in re.findall(r"largest\s+([\d.]+)", entry.measured))
        assert 1.5 * largest < entry.k < 3.3 * largest, entry
    assert {name: entry.k for name, entry in by_kind["package-package"].items()} == {
        name: entry.k for name, entry in by_kind["package-reference"].items()
    }


@pytest.mark.parametrize(("dtype", "planted"), [("float32", 3e-5), ("float16", 0.05), ("bfloat16", 0.25)])
def test_a_small_mistake_of_known_size_is_noticed(dtype: str, planted: float) -> None:
    """Relative, in three layers, of every pair that is compared."""
    right = np.random.default_rng(0).standard_normal((4, 50))
    wrong = right.copy()
    wrong[1] += planted * np.linalg.norm(right[1]) / math.sqrt(50)
    for pair in [PACKAGE, PACKAGES, *([HUGGING_FACE, ("triton", "huggingface")] if dtype == "float32" else [])]:
        found = compare(wrong, right, bound(dtype, 3, pair))
        assert (found.verdict, found.worst_row) == (Verdict.FAIL, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [("head:", "heads:"), ("layer:", "layers:"), ("measured:", "guessed:"), ("package-package:", "package-packages:")],
)
def test_a_bad_file_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "tolerances.yaml"
    text = metrics.TOLERANCES.read_text()
    file.write_text(text.replace(old, new))
    monkeypatch.setattr(metrics, "TOLERANCES", file)
    with pytest.raises(ValidationError):
        tolerances.__wrapped__()
    file.write_text(text)
    assert tolerances.__wrapped__() == tolerances()


def test_every_bound_says_how_it_was_measured() -> None:
    entries = [entry for by_dtype in tolerances().bounds.values() for entry in by_dtype.values()]
    for entry in (*entries, tolerances().head, *tolerances().rounded.values()):
        assert "largest" in entry.measured
        assert any(character.isdigit() for character in entry.measured)


@settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=specs(dtypes=("float32",)))
def test_float32_shows_an_attention_factor_that_is_off_by_a_hundredth(spec: Spec) -> None:
    window = spec.architecture.attention.sliding_window
    assume(window is None or window.window > 1)  # the scores of a single key do not matter
    right = logits(spec)
    with mock.patch.object(reference, "attention_factor", lambda *given: 1.01 * attention_factor(*given)):
        wrong = logits(spec)
    limit = bound("float32", spec.architecture.num_hidden_layers, PACKAGE)
    assert compare(wrong, right, limit).verdict is Verdict.FAIL


def logits(spec: Spec) -> np.ndarray:
    ids = [(7919 * i + 17) % spec.architecture.vocab_size for i in range(30)]
    return reference.Reference(spec, random_weights(spec, 0)).sequence().forward(ids)
