"""What a forward is about, seen from the steps before it: a sequence may have been forked, rolled back or preempted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwenspec.verify.result import Check
from qwenspec.verify.steps import Add, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step, depths, path

Place = tuple[int, int]  # sequence and position of a row


@dataclass(frozen=True)
class Seen:
    """A forward's checks, and where each row of logits is that its method returns."""

    checks: frozenset[Check]
    places: tuple[Place, ...]


NOTHING = Seen(frozenset(), ())


@dataclass
class _Past:
    tokens: list[int] = field(default_factory=list)
    marks: frozenset[Check] = frozenset()  # what happened to the sequence, for every later forward


class History:
    """Follows the steps that were done, of one workload."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._sequences: dict[int, _Past] = {}
        self._removed: list[list[int]] = []
        self._trees: Forward | None = None

    def see(self, step: Step) -> Seen:
        """The next step. Of all but forwards, nothing is to be said."""
        match step:
            case Restart():
                self._begin()
            case Add(seq):
                self._sequences[seq] = _Past()
            case Fork(parent, child, at):
                old = self._sequences[parent]
                old.marks |= {Check.FORK}
                self._sequences[child] = _Past(old.tokens[:at] if at >= 0 else list(old.tokens), old.marks)
            case Popn(seq, n):
                past = self._sequences[seq]
                past.tokens = past.tokens[: len(past.tokens) - n]
                past.marks |= {Check.ROLLBACK} if n else frozenset()
            case Remove(seq):
                self._removed.append(self._sequences.pop(seq).tokens)
            case Commit(leaves):
                self._commit(leaves)
            case Forward():
                return self._forward(step)
            case Poison():
                pass
        return NOTHING

    def about(self, step: Step) -> frozenset[Check]:
        """The checks of a step that could not be done."""
        match step:
            case Forward():
                return copy.deepcopy(self).see(step).checks
            case Fork():
                return frozenset({Check.FORK})
            case Popn():
                return frozenset({Check.ROLLBACK})
            case Commit():
                return frozenset({Check.TOKEN_TREES})
            case _:
                return frozenset({Check.FORWARD})

    def _forward(self, step: Forward) -> Seen:
        checks: set[Check] = {Check.FORWARD}
        places: list[Place] = []
        for seq, ids in step.tokens.items():
            past = self._sequences[seq]
            length, parents = len(past.tokens), step.trees[seq] if step.trees is not None else None
            places += [(seq, length + depth) for depth in (range(len(ids)) if parents is None else depths(parents))]
            if not length and any(ids and old[: len(ids)] == list(ids) for old in self._removed):
                past.marks |= {Check.PREEMPTION}
            if parents is None:
                past.tokens = [*past.tokens, *ids]
                checks.add(_kind(length, len(ids)))
            checks |= past.marks
        if step.trees is not None:
            checks.add(Check.TOKEN_TREES)
            self._trees = step
        elif step.method == "batch_verify" and max(step.lengths) > 1:
            checks.add(Check.VERIFY_ROWS)
        if len(set(step.lengths)) > 1:
            checks.add(Check.MIXED_BATCH)
        return Seen(frozenset(checks), tuple(places[row] for row in step.rows))

    def _commit(self, leaves: Mapping[int, int]) -> None:
        assert self._trees is not None
        assert self._trees.trees is not None
        for seq, leaf in leaves.items():
            past, ids, parents = self._sequences[seq], self._trees.tokens[seq], self._trees.trees[seq]
            past.tokens = past.tokens + [ids[node] for node in path(parents, leaf)]
            past.marks |= {Check.TOKEN_TREES}


def _kind(length: int, new: int) -> Check:
    if length == 0:
        return Check.PREFILL
    return Check.DECODE if new == 1 else Check.CHUNKED_PREFILL


def brief(step: Step) -> str:
    """A step in a few characters: `prefill 0+7`, `fork 0 to 1 at 8`, `trees 0+4 2+3`."""
    match step:
        case Restart(sizes):
            return f"restart with {sizes.pages} pages of {sizes.page_size}"
        case Add(seq, None):
            return f"add {seq}"
        case Add(seq, prompt_length):
            return f"add {seq} for {prompt_length}"
        case Fork(parent, child, at):
            return f"fork {parent} to {child} at {at}"
        case Popn(seq, n):
            return f"pop {n} of {seq}"
        case Remove(seq):
            return f"remove {seq}"
        case Commit(leaves):
            return "keep " + " ".join(f"{seq}:{leaf}" for seq, leaf in leaves.items())
        case Poison():
            return "poison"
        case Forward():
            name = "trees" if step.trees is not None else step.method.replace("_", " ")
            return f"{name} " + " ".join(f"{seq}+{len(ids)}" for seq, ids in step.tokens.items())
