"""Every step on every contender, and all their rows compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from qwenspec.backend.runtime.machine import out_of_memory
from qwenspec.verify.case import REFERENCE, Case
from qwenspec.verify.contenders import Contender, PackageContender, Rows
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.metrics import Comparison, Verdict, bound, compare
from qwenspec.verify.opening import open_contenders
from qwenspec.verify.steps import Forward, Step, kind_of

Pair = tuple[str, str]  # a contender, and what it is compared with


@dataclass
class Disagreement(AssertionError):
    """Two contenders differ, or one of them failed, at the last of `steps`."""

    case: Case
    steps: list[Step]
    pair: Pair
    reason: str
    comparison: Comparison | None = None  # None when a contender failed
    outputs: Mapping[str, Rows] | None = None  # of the last step

    def __str__(self) -> str:
        return f"{self.pair[0]} and {self.pair[1]}, step {len(self.steps)} ({kind_of(self.steps[-1])}): {self.reason}"


class Session:
    """A case's contenders and what they have done."""

    def __init__(self, case: Case, ledger: Ledger | None = None) -> None:
        """Opens every contender; raises what that raises."""
        assert case.contenders[0] == REFERENCE, "the reference comes first"
        self.case = case
        self.steps: list[Step] = []
        self.contenders: dict[str, Contender] = open_contenders(case)
        self.ledger = ledger or Ledger()

    @property
    def pairs(self) -> list[Pair]:
        """Each contender with the reference, then the others with each other."""
        others = list(self.contenders)[1:]
        return [(name, REFERENCE) for name in others] + list(itertools.combinations(others, 2))

    def do(self, step: Step) -> bool:
        """The step, done by all. False when all packages refused it: it needs more pages than are free, or tokens
        that are behind every window and gone.

        Raises Disagreement."""
        self.steps.append(step)
        packages = {name: self.contenders[name] for name in self.case.packages}
        outputs: dict[str, Rows | None] = {}
        refused: list[str] = []
        reason = ""
        for name, contender in packages.items():
            try:
                outputs[name] = self._done(name, contender, step)
            except _Refused as refusal:
                refused.append(name)
                reason = str(refusal)
        if refused and len(refused) < len(packages):
            other = next(name for name in packages if name not in refused)
            raise self._disagreement((refused[0], other), f"{refused[0]} is {reason}, {other} is not")
        self.ledger.step(reason if refused else kind_of(step))
        if refused:
            return False
        for name, contender in self.contenders.items():
            if name not in packages:
                outputs[name] = self._done(name, contender, step)
        if isinstance(step, Forward):
            self._compare({name: rows for name, rows in outputs.items() if rows is not None})
        return True

    def _done(self, name: str, contender: Contender, step: Step) -> Rows | None:
        try:
            return contender.do(step)
        except Exception as error:
            if out_of_memory(error):  # the machine's trouble, whoever meets it
                raise
            if type(error).__name__ == "OutOfPages":  # each package has its own
                raise _Refused("out of pages") from error
            if self.case.sizes.evicts and "were given back" in str(error):
                raise _Refused("behind the window") from error
            raise self._disagreement((name, REFERENCE), f"{type(error).__name__}: {error}") from error
        finally:
            if isinstance(contender, PackageContender):
                self.ledger.kernels_ran(name, contender.kernels)

    def _compare(self, outputs: Mapping[str, Rows]) -> None:
        case = self.case
        for pair in self.pairs:
            layers = case.spec.architecture.num_hidden_layers
            limit = bound(case.dtype, layers, pair, case.head_dtype, case.rounded)
            found = compare(outputs[pair[0]], outputs[pair[1]], limit)
            self.ledger.compared(pair, case.dtype, found, outputs)
            if found.verdict is Verdict.FAIL:
                reason = f"error {found.error:.3g} in row {found.worst_row}, where {limit:.3g} is allowed"
                raise self._disagreement(pair, reason, found, outputs)

    def _disagreement(
        self,
        pair: Pair,
        reason: str,
        comparison: Comparison | None = None,
        outputs: Mapping[str, Rows] | None = None,
    ) -> Disagreement:
        return Disagreement(self.case, list(self.steps), pair, reason, comparison, outputs)


class _Refused(Exception):
    """A contender cannot, and is as it was."""
