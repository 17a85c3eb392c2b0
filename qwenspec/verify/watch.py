"""A ledger that also keeps, of every comparison, what it was about and where it happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np

from qwenspec.verify.case import REFERENCE, Case
from qwenspec.verify.contenders import Rows
from qwenspec.verify.history import NOTHING, History, Seen, brief
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.metrics import Comparison, Verdict
from qwenspec.verify.result import Curve, Example, NearTie, Verification
from qwenspec.verify.session import Disagreement, Pair, Session
from qwenspec.verify.steps import Forward, kind_of


class Watch(Ledger):
    """Follows the sessions of searches in one dtype and fills in a Verification: its cells, near ties and examples.

    Nothing is kept after a disagreement, when Hypothesis runs the same again, only smaller, until `go_on`."""

    def __init__(self, result: Verification) -> None:
        super().__init__()
        self.result = result
        self.bounds: dict[tuple[str, str], float] = {}  # of a contender in a dtype, against the reference
        self._by_position: dict[tuple[str, str], dict[int, float]] = {}
        self._examples: list[tuple[Case, list[str]]] = []  # but for those without a forward
        self._first = len(result.examples)
        self._over_since: float | None = None
        self._seen: Seen = NOTHING

    def start(self, session: Session) -> None:
        """To be told of every session before its first step."""
        if self.over:
            return
        self._session, self._history = session, History()
        self._steps: list[str] = []

    @property
    def over(self) -> bool:
        """Whether there was a disagreement."""
        return self._over_since is not None

    @property
    def seconds_over(self) -> float:
        """How long ago."""
        return 0.0 if self._over_since is None else time.monotonic() - self._over_since

    @property
    def examples_so_far(self) -> int:
        """Hypothesis gives up some before their first forward; they are no examples."""
        return len(self._examples)

    def step(self, kind: str) -> None:
        super().step(kind)
        if self.over:
            return
        step = self._session.steps[-1]
        refused = kind != kind_of(step)  # it says why nobody could do it
        self._seen = NOTHING if refused else self._history.see(step)
        self._steps.append(brief(step) + (f", {kind}" if refused else ""))
        if isinstance(step, Forward) and not any(steps is self._steps for _, steps in self._examples[-1:]):
            self._examples.append((self._session.case, self._steps))

    def compared(self, pair: Pair, dtype: str, comparison: Comparison, outputs: Mapping[str, Rows]) -> None:
        super().compared(pair, dtype, comparison, outputs)
        if self.over:
            return
        for check in sorted(self._seen.checks):
            self.result.cell(pair, check, dtype).add(comparison)
        actual, expected = outputs[pair[0]], outputs[pair[1]]
        if comparison.verdict is Verdict.AMBIGUOUS:
            self._near_ties(pair, dtype, actual, expected)
        if pair[1] == REFERENCE and actual.shape == expected.shape:
            self.bounds[pair[0], dtype] = comparison.bound
            self._positions(pair[0], dtype, actual, expected)

    def go_on(self) -> None:
        """Another search begins."""
        self._over_since = None

    def finish(self) -> None:
        """Writes down what was gathered over all sessions."""
        for number, (case, steps) in enumerate(self._examples, self._first + 1):
            sizes = case.sizes
            told = (
                f"{sizes.pages} pages of {sizes.page_size}, {sizes.max_batch_size} sequences, chunks of {sizes.chunk}"
            )
            told += ", gives pages back" if sizes.evicts else ""
            self.result.examples.append(Example(number, case.dtype, case.seed, told, tuple(_counted(steps))))
        for (name, dtype), errors in self._by_position.items():
            self.result.by_position.append(Curve(name, dtype, self.bounds[name, dtype], tuple(sorted(errors.items()))))

    def fail(self, disagreement: Disagreement) -> None:
        """To be told of every disagreement. A comparison has its cells; of what failed without one, the step says what
        it was about."""
        if self.over:
            return
        self._over_since = time.monotonic()
        self._steps.append(f"{brief(disagreement.steps[-1])}, where {disagreement.pair[0]} fails")
        if disagreement.comparison is None:
            for check in self._history.about(disagreement.steps[-1]):
                cell = self.result.cell(disagreement.pair, check, disagreement.case.dtype)
                cell.verdict, cell.note = Verdict.FAIL, "does not run"

    def _near_ties(self, pair: Pair, dtype: str, actual: Rows, expected: Rows) -> None:
        ours, theirs = actual.argmax(axis=-1), expected.argmax(axis=-1)
        for row in np.flatnonzero(ours != theirs):
            a, b = int(ours[row]), int(theirs[row])
            margin = max(actual[row, a] - actual[row, b], expected[row, b] - expected[row, a])
            sequence, position = self._seen.places[row]
            example, step = self._first + len(self._examples), len(self._session.steps)
            self.result.near_ties.append(NearTie(example, step, sequence, position, pair, dtype, (a, b), float(margin)))

    def _positions(self, name: str, dtype: str, actual: Rows, expected: Rows) -> None:
        errors = self._by_position.setdefault((name, dtype), {})
        found = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        for (_, position), error in zip(self._seen.places, np.nan_to_num(found, nan=np.inf), strict=True):
            errors[position] = max(errors.get(position, 0.0), float(error))


def _counted(steps: list[str]) -> Iterator[str]:
    """Equal steps in a row as one: `decode 0+1 ×3`."""
    for step, equal in groupby(steps):
        count = len(list(equal))
        yield step if count == 1 else f"{step} ×{count}"
