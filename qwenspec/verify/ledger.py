"""What ran: how many examples had which feature, on whom, and what was compared. Every process counts for itself."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenspec.verify.case import Case
from qwenspec.verify.contenders import Rows
from qwenspec.verify.metrics import Comparison, Verdict

Pair = tuple[str, str]  # a contender, and what it is compared with


@dataclass
class Compared:
    """All comparisons of a pair in one dtype: their number, their rows, their verdicts, and the worst of them."""

    comparisons: int = 0
    rows: int = 0
    passed: int = 0
    ambiguous: int = 0
    failed: int = 0
    error: float = 0.0  # the largest
    used: float = 0.0  # the largest error / bound: above 1 is a failure

    def add(self, comparison: Comparison) -> None:
        verdict = comparison.verdict
        self.merge(
            Compared(
                1,
                comparison.rows,
                int(verdict is Verdict.PASS),
                int(verdict is Verdict.AMBIGUOUS),
                int(verdict is Verdict.FAIL),
                comparison.error,
                comparison.error / comparison.bound,
            )
        )

    def merge(self, other: Compared) -> None:
        for name in ("comparisons", "rows", "passed", "ambiguous", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.error, self.used = max(self.error, other.error), max(self.used, other.used)


class Ledger:
    """Counts, from which the tables are made."""

    def __init__(self) -> None:
        self.examples = 0
        self.specs: set[str] = set()  # hashes of those that differ
        self.pairs: Counter[Pair] = Counter()  # examples of each
        self.features: Counter[tuple[str, Pair]] = Counter()  # examples of each, by pair
        self.steps: Counter[str] = Counter()
        self.kernels: Counter[tuple[str, str]] = Counter()  # calls, by contender and kernel
        self.comparisons: dict[tuple[Pair, str], Compared] = {}  # by pair and dtype

    # ---------------------------------------------------------------------------------------------- counting

    def example(self, case: Case, features: Iterable[str], pairs: Iterable[Pair]) -> None:
        """A case that begins, with the features of its spec and the pairs that it compares."""
        pairs = list(pairs)
        self.examples += 1
        self.specs.add(case.spec.sha256()[:16])
        self.pairs.update(pairs)
        self.features.update((feature, pair) for feature in set(features) for pair in pairs)

    def step(self, kind: str) -> None:
        """A step that all contenders have done: `forward.batch_decode`, `fork`, `out of pages`, …"""
        self.steps[kind] += 1

    def compared(self, pair: Pair, dtype: str, comparison: Comparison, outputs: Mapping[str, Rows]) -> None:
        """The rows of a forward. `outputs`: every contender's."""
        self.comparisons.setdefault((pair, dtype), Compared()).add(comparison)

    def kernels_ran(self, contender: str, calls: Counter[str]) -> None:
        """Kernels that ran so many times; the counts start anew. One with a count of 0 is in the table all the same."""
        for name, count in calls.items():
            self.kernels[contender, name] += count
            calls[name] = 0

    def missing(self, schema: Iterable[str], contender: str | None = None) -> frozenset[str]:
        """The features that no example had; with a contender, that no example had in which it took part."""
        seen = {
            feature
            for (feature, pair), count in self.features.items()
            if count and (contender is None or contender in pair)
        }
        return frozenset(schema) - seen

    # ------------------------------------------------------------------------------------------ JSON, and merging

    def merge(self, other: Ledger) -> None:
        """What another process counted, added to this."""
        self.examples += other.examples
        self.specs |= other.specs
        self.pairs.update(other.pairs)
        self.features.update(other.features)
        self.steps.update(other.steps)
        self.kernels.update(other.kernels)
        for key, compared in other.comparisons.items():
            self.comparisons.setdefault(key, Compared()).merge(compared)

    def to_data(self) -> dict[str, Any]:
        """For JSON, whose keys are text: tables are lists of rows. Infinity, which it has not, is null."""
        return {
            "examples": self.examples,
            "specs": sorted(self.specs),
            "pairs": [[*pair, count] for pair, count in self.pairs.items()],
            "features": [[feature, *pair, count] for (feature, pair), count in self.features.items()],
            "steps": dict(self.steps),
            "kernels": [[*key, count] for key, count in self.kernels.items()],
            "comparisons": [
                {"pair": list(pair), "dtype": dtype, **_finite(dataclasses.asdict(compared))}
                for (pair, dtype), compared in self.comparisons.items()
            ],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Ledger:
        """What to_data wrote. Raises KeyError, TypeError or ValueError for anything else."""
        ledger = cls()
        ledger.examples = data["examples"]
        ledger.specs = set(data["specs"])
        ledger.pairs.update({(actual, expected): count for actual, expected, count in data["pairs"]})
        rows = data["features"]
        ledger.features.update({(feature, (actual, expected)): count for feature, actual, expected, count in rows})
        ledger.steps.update(data["steps"])
        ledger.kernels.update({(contender, name): count for contender, name, count in data["kernels"]})
        for row in data["comparisons"]:
            numbers = {field.name: row[field.name] for field in dataclasses.fields(Compared)}
            numbers = {name: math.inf if number is None else number for name, number in numbers.items()}
            actual, expected = row["pair"]
            ledger.comparisons[(actual, expected), row["dtype"]] = Compared(**numbers)
        return ledger

    # ----------------------------------------------------------------------------------------------- tables

    def tables(self, markdown: bool = False) -> str:
        """All tables, as aligned text or as Markdown: examples by feature and pair, steps, kernels, comparisons."""
        parts = (
            ("Examples by feature and pair", self._features()),
            ("Comparisons by pair and dtype", self._comparisons()),
            ("Steps", [["step", "times"], *_sorted(self.steps)]),
            ("Kernels", [["contender", "kernel", "calls"], *_by_key(self.kernels)]),
        )
        shown = _markdown if markdown else _text
        return "\n\n".join(f"{'### ' if markdown else ''}{title}\n\n{shown(rows)}" for title, rows in parts if rows[1:])

    def _features(self) -> list[list[str]]:
        pairs = list(self.pairs)
        rows = [["feature", *map(_pair, pairs)], ["(all)", *(str(self.pairs[pair]) for pair in pairs)]]
        for feature in sorted({feature for feature, _ in self.features}):
            rows.append([feature, *(str(self.features[feature, pair]) for pair in pairs)])
        return rows if pairs else rows[:1]

    def _comparisons(self) -> list[list[str]]:
        head = ["pair", "dtype", "comparisons", "rows", "pass", "ambiguous", "fail", "worst error", "of its bound"]
        rows = []
        for (pair, dtype), c in self.comparisons.items():
            counts = map(str, (c.comparisons, c.rows, c.passed, c.ambiguous, c.failed))
            rows.append([_pair(pair), dtype, *counts, f"{c.error:.1e}", f"{c.used:.2f}"])
        return [head, *sorted(rows)]


def _pair(pair: Pair) -> str:
    return " / ".join(pair)


def _sorted(counts: Mapping[str, int]) -> list[list[str]]:
    """The most frequent first."""
    return [[name, str(count)] for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _by_key(counts: Mapping[tuple[str, str], int]) -> list[list[str]]:
    return [[*key, str(count)] for key, count in sorted(counts.items())]


def _text(rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers to the right, others to the left."""
    columns = [_aligned(column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [cell.rjust(width) if _numbers(column) else cell.ljust(width) for cell in column]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [[f"`{cell}`" if "=" in cell else cell.replace("|", "\\|") for cell in row] for row in rows]
    lines.insert(1, ["---:" if _numbers(column) else "---" for column in zip(*rows, strict=True)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _numbers(column: Sequence[str]) -> bool:
    """Whether all cells below the head are numbers."""
    return all(cell[0].isdigit() or cell == "inf" for cell in column[1:])


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
