"""How far apart two tables of logits are, and whether that is too far.

Bounds are in tolerances.yaml, which says how each was measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, Field

from qwenspec.verify.bisect import ROUNDING
from qwenspec.verify.case import HUGGING_FACE, REFERENCE, Rounded

Rows = npt.NDArray[np.floating[Any]]
TOP_K = 5
TOLERANCES = Path(__file__).with_name("tolerances.yaml")


class Verdict(StrEnum):
    """From the best to the worst."""

    PASS = "pass"
    AMBIGUOUS = "ambiguous"
    FAIL = "fail"


@dataclass(frozen=True)
class Comparison:
    """Logits [rows, vocab] and what they should be, row by row: a row is a position.

    Where anything is not finite, or the shapes differ, errors are infinite, and rows that cannot be compared agree in
    nothing. Without rows nothing differs."""

    verdict: Verdict
    error: float  # the worst row's ‖actual - expected‖ / ‖expected‖: what the bound judges
    bound: float
    max_abs: float  # the largest |actual - expected|
    mean_abs: float  # the mean |actual - expected|
    max_relative: float  # max_abs / the largest |expected| of all rows
    cosine: float  # of the angle between actual and expected, in the row where that is the widest
    top_k_overlap: float  # share of expected's TOP_K tokens (of all, if there are fewer) in actual's; mean over rows
    argmax_agreement: float  # share of rows in which both prefer the same token
    near_ties: int  # rows within the bound in which they do not
    rows: int
    worst_row: int  # where `error` is; -1 without rows


def compare(actual: Rows, expected: Rows, bound: float) -> Comparison:
    """Logits [rows, vocab] of any floating dtype; `bound` is on `Comparison.error`.

    FAIL beyond the bound. AMBIGUOUS within it when some row's argmax differs: expected's logits of the two candidates
    are then at most √2 · bound · ‖row‖ apart, a near tie. PASS otherwise."""
    if actual.shape != expected.shape:
        return _incomparable(bound, len(expected))
    if not len(expected):
        return Comparison(Verdict.PASS, 0.0, bound, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0, 0, -1)
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(a).all(axis=-1) & np.isfinite(e).all(axis=-1)
    errors, cosines = np.full(len(e), np.inf), np.zeros(len(e))
    errors[finite], cosines[finite] = _errors(a[finite], e[finite]), _cosines(a[finite], e[finite])
    same_choice = finite & (a.argmax(axis=-1) == e.argmax(axis=-1))
    distances = np.abs(a - e) if finite.all() else np.full(1, np.inf)
    worst = int(errors.argmax())
    near_ties = int(np.count_nonzero(~same_choice & (errors <= bound)))
    return Comparison(
        verdict=Verdict.FAIL if errors[worst] > bound else Verdict.AMBIGUOUS if near_ties else Verdict.PASS,
        error=float(errors[worst]),
        bound=bound,
        max_abs=float(distances.max()),
        mean_abs=float(distances.mean()),
        max_relative=_ratio(float(distances.max()), float(np.abs(e).max())),
        cosine=float(cosines.min()),
        top_k_overlap=float((_top_k_overlaps(a, e) * finite).mean()),
        argmax_agreement=float(same_choice.mean()),
        near_ties=near_ties,
        rows=len(e),
        worst_row=worst,
    )


def _incomparable(bound: float, rows: int) -> Comparison:
    return Comparison(Verdict.FAIL, math.inf, bound, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0, 0, rows, 0)


def _errors(a: Rows, e: Rows) -> Rows:
    """‖a - e‖ / ‖e‖ of each row. Where a row is zero, any other is infinitely far."""
    distances, lengths = np.linalg.norm(a - e, axis=-1), np.linalg.norm(e, axis=-1)
    far = np.where(distances > 0, np.inf, 0.0)
    errors: Rows = np.divide(distances, lengths, out=far, where=lengths > 0)
    return errors


def _cosines(a: Rows, e: Rows) -> Rows:
    """Of each row; 1 for two zeros, 0 for one."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(e, axis=-1)
    without = np.where((a == e).all(axis=-1), 1.0, 0.0)
    cosines: Rows = np.divide((a * e).sum(axis=-1), lengths, out=without, where=lengths > 0)
    return np.clip(cosines, -1.0, 1.0)


def _top_k_overlaps(a: Rows, e: Rows) -> Rows:
    k = min(TOP_K, e.shape[-1])
    ours, theirs = (np.argpartition(-x, k - 1, axis=-1)[:, :k] for x in (a, e))
    found: Rows = (ours[:, :, None] == theirs[:, None, :]).any(axis=1).mean(axis=-1)
    return found


def _ratio(part: float, whole: float) -> float:
    if not (math.isfinite(part) and math.isfinite(whole)):
        return math.inf
    return part / whole if whole else math.inf if part else 0.0


# ---------------------------------------------------------------------------------------------------- bounds

Dtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["package-reference", "package-package", "huggingface-reference", "package-huggingface"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Model):
    """How many times the rounding error that depth alone explains is allowed, and how that was measured."""

    k: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    measured: Annotated[str, Field(min_length=20)]


class RoundedEntry(Entry):
    """… of a rounding that a spec asks for."""

    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # what it makes at most, relative
    layer: Annotated[tuple[str, ...], Field(min_length=1)]  # what each layer rounds so


class Tolerances(_Model):
    """tolerances.yaml."""

    layer: Annotated[tuple[str, ...], Field(min_length=1)]  # what each layer rounds
    outside: Annotated[tuple[str, ...], Field(min_length=1)]  # what is rounded once
    bounds: dict[Kind, dict[Dtype, Entry]]
    head: Entry  # of the rounding in a head that has a narrower dtype of its own
    rounded: dict[Rounded, RoundedEntry]  # what specs round so coarsely that two computations may do it differently

    def depth(self, layers: int) -> int:
        """Roundings one after the other, from the tokens to the logits."""
        return len(self.layer) * layers + len(self.outside)


@functools.cache
def tolerances() -> Tolerances:
    """The file, read once. A mistake in it is ours, and a ValueError."""
    return Tolerances.model_validate(yaml.safe_load(TOLERANCES.read_text(encoding="utf-8")))


def bound(
    dtype: str,
    layers: int,
    pair: tuple[str, str],
    head_dtype: str | None = None,
    rounded: Sequence[Rounded] = (),
) -> float:
    """The largest `Comparison.error` that rounding explains, for a contender and what it is compared with.

    k · u · √(roundings in depth), with k from tolerances.yaml, and u what one rounding to `dtype` makes at most.
    `head_dtype`: the LM head's own; one narrower than `dtype` rounds the last hidden state once more. `rounded`: what
    the spec itself rounds."""
    entries = tolerances().bounds[_kind(pair)]
    assert dtype in entries, f"{pair} is not compared in {dtype}"
    unit, depth = ROUNDING[dtype], tolerances().depth(layers)
    narrower = ROUNDING[head_dtype] if head_dtype and ROUNDING[head_dtype] > unit else 0.0
    coarse = [tolerances().rounded[what] for what in rounded]
    flips = sum(entry.k * entry.unit * math.sqrt(len(entry.layer) * layers) for entry in coarse)
    return entries[dtype].k * unit * math.sqrt(depth) + tolerances().head.k * narrower + flips


def _kind(pair: tuple[str, str]) -> Kind:
    words = {REFERENCE: "reference", HUGGING_FACE: "huggingface"}
    match tuple(words.get(name, "package") for name in pair):
        case ("package", "reference"):
            return "package-reference"
        case ("huggingface", "reference"):
            return "huggingface-reference"
        case ("package", "package"):
            return "package-package"
        case ("package", "huggingface") | ("huggingface", "package"):
            return "package-huggingface"
    raise AssertionError(f"the reference is what others are compared with, not {pair}")
