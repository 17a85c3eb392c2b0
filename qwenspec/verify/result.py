"""What `qwenspec verify` found, as data: what was checked, on whom, how far apart they were, and what was drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qwenspec.verify.metrics import Comparison, Verdict


class Check(StrEnum):
    """What a comparison was about. One comparison may be about several: a forward of a fork that decodes."""

    FORWARD = "every forward"
    PREFILL = "prefill"
    CHUNKED_PREFILL = "chunked prefill"
    DECODE = "decode"
    MIXED_BATCH = "mixed batch"
    VERIFY_ROWS = "verify rows"
    TOKEN_TREES = "token trees"
    FORK = "fork"
    ROLLBACK = "rollback"
    PREEMPTION = "preempt and resume"
    ROPE = "rope at full size"
    PARAMETERS = "parameters"


MEANING = {
    Check.FORWARD: "all rows of logits that were compared",
    Check.PREFILL: "the first tokens of a sequence",
    Check.CHUNKED_PREFILL: "more of a prompt, after what is in the cache",
    Check.DECODE: "one token a sequence",
    Check.MIXED_BATCH: "sequences with different numbers of new tokens in one batch",
    Check.VERIFY_ROWS: "the logits of every new token, as speculation needs them",
    Check.TOKEN_TREES: "trees of draft tokens, and what follows once a path is kept",
    Check.FORK: "sequences that share pages",
    Check.ROLLBACK: "sequences of which the last tokens were forgotten",
    Check.PREEMPTION: "sequences that were removed and computed again",
    Check.ROPE: "frequencies and attention factor of the package as it is, around every length that matters",
    Check.PARAMETERS: "names and shapes of the checkpoint's tensors that the package reads",
}


@dataclass
class Cell:
    """All comparisons of one check between two contenders in one dtype; the numbers are the worst of them.

    `dtype` is empty for what has none. `error` and `bound` are of the comparison that used most of its bound."""

    actual: str
    expected: str
    check: Check
    dtype: str = ""
    verdict: Verdict = Verdict.PASS
    comparisons: int = 0
    rows: int = 0
    near_ties: int = 0
    error: float = 0.0
    bound: float = 0.0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_relative: float = 0.0
    cosine: float = 1.0
    top_k_overlap: float = 1.0
    argmax_agreement: float = 1.0
    note: str = ""

    @property
    def used(self) -> float:
        """The part of the bound that the error used: above 1 is a failure."""
        return self.error / self.bound if self.bound else 0.0

    def add(self, comparison: Comparison) -> None:
        self.merge(
            Cell(
                self.actual,
                self.expected,
                self.check,
                self.dtype,
                comparisons=1,
                **{name: getattr(comparison, name) for name in _FROM_COMPARISON},
            )
        )

    def merge(self, other: Cell) -> None:
        """Counts are added, and the worst of each number stays."""
        if not other.used <= self.used:  # NaN too
            self.error, self.bound = other.error, other.bound
        self.verdict = worst([self.verdict, other.verdict])
        for name in ("comparisons", "rows", "near_ties"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("max_abs", "mean_abs", "max_relative"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for name in ("cosine", "top_k_overlap", "argmax_agreement"):
            setattr(self, name, min(getattr(self, name), getattr(other, name)))
        self.note = self.note or other.note


_FROM_COMPARISON = [field.name for field in dataclasses.fields(Comparison) if field.name != "worst_row"]


@dataclass(frozen=True)
class Entrant:
    """A contender: what it is, or in `absent` why it did not take part."""

    name: str
    description: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Curve:
    """Relative errors of a contender against the reference, in one dtype: by module or by position, in order."""

    contender: str
    dtype: str
    bound: float
    points: tuple[tuple[str | int, float], ...]


@dataclass(frozen=True)
class NearTie:
    """Two contenders prefer different tokens, and nearly prefer each other's. `margin` is the larger of the two
    differences between the candidates' logits."""

    example: int
    step: int
    sequence: int
    position: int
    pair: tuple[str, str]
    dtype: str
    candidates: tuple[int, int]
    margin: float


@dataclass(frozen=True)
class Example:
    """What was drawn: the seed of the weights, the cache's sizes, and the steps in short."""

    number: int
    dtype: str
    seed: int
    sizes: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """What is wrong. Of a workload, the folder that has the smallest one that shows it, and what runs it again."""

    reason: str
    folder: str = ""
    command: str = ""


@dataclass
class Verification:
    """Everything the report says."""

    spec: str
    file: str
    sha256: str
    size: str  # what was compared: the spec made smaller, or a checkpoint
    seed: int
    command: str
    dtypes: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    entrants: list[Entrant] = dataclasses.field(default_factory=list)
    cells: list[Cell] = dataclasses.field(default_factory=list)
    by_layer: list[Curve] = dataclasses.field(default_factory=list)
    by_position: list[Curve] = dataclasses.field(default_factory=list)
    near_ties: list[NearTie] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        return Verdict.FAIL if self.failures else worst(cell.verdict for cell in self.cells)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Who was compared with whom, in the order in which they were."""
        return list(dict.fromkeys((cell.actual, cell.expected) for cell in self.cells))

    def cell(self, pair: tuple[str, str], check: Check, dtype: str = "") -> Cell:
        """The cell of that name, which is made when there is none."""
        for cell in self.cells:
            if (cell.actual, cell.expected, cell.check, cell.dtype) == (*pair, check, dtype):
                return cell
        self.cells.append(Cell(*pair, check, dtype))
        return self.cells[-1]

    def merged(self, pair: tuple[str, str], check: Check) -> Cell | None:
        """All dtypes of a pair and a check in one; None when nothing of that kind was compared."""
        found = [cell for cell in self.cells if (cell.actual, cell.expected, cell.check) == (*pair, check)]
        if not found:
            return None
        total = Cell(*pair, check)
        for cell in found:
            total.merge(cell)
        return total

    def to_data(self) -> dict[str, Any]:
        """For JSON, `verdict` first; numbers that are not finite, which JSON has not, are null."""
        data: dict[str, Any] = _finite({"verdict": self.verdict.value, **dataclasses.asdict(self)})
        return data


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)
