"""What workloads have in them, and what becomes of a failure that one of them meets: on contenders that compute
nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import hypothesis
import pytest
from hypothesis import Phase
from hypothesis import strategies as st

from hf_parity.oracle import tiny_spec
from qwenspec.verify import machine
from qwenspec.verify.case import Case
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.search import DEFAULTS, search
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step, path

PAGE = 16
SIZES = CacheSizes(PAGE, 16, 4, 64)
SLIDING = tiny_spec({"attention": {"sliding_window": {"window": 21, "layers": "all"}}})
Fails = Callable[["Follower"], str]


class Follower(Session):
    """A session that keeps track of lengths, and computes nothing. `fails`: why the last step was wrong."""

    fails: Fails = staticmethod(lambda session: "")

    def __init__(self, case: Case, ledger: Ledger | None = None) -> None:
        self.case, self.ledger = case, ledger or Ledger()
        self.steps: list[Step] = []
        self.contenders = {"reference": None, "a": None}  # type: ignore[dict-item]
        self.lengths: dict[int, int] = {}
        self.trees: dict[int, tuple[int, ...]] = {}
        self.ends: list[int] = []  # lengths that prefills of one sequence came to

    def do(self, step: Step) -> bool:
        self.steps.append(step)
        match step:
            case Add(seq):
                self.lengths[seq] = 0
            case Forward(_, _, trees) if trees:
                self.trees = dict(trees)
            case Commit(leaves):
                for seq, leaf in leaves.items():
                    self.lengths[seq] += len(path(self.trees[seq], leaf))
            case Forward(tokens):
                for seq, ids in tokens.items():
                    self.lengths[seq] += len(ids)
                if len(tokens) == 1 and step.method in ("prefill", "batch_prefill"):
                    self.ends.append(self.lengths[next(iter(tokens))])
            case Fork(parent, child, at):
                assert at <= self.lengths[parent]
                self.lengths[child] = at
            case Popn(seq, n):
                self.lengths[seq] -= n
            case Remove(seq):
                del self.lengths[seq]
            case Restart():
                self.lengths = {}
        if reason := type(self).fails(self):
            raise Disagreement(self.case, list(self.steps), ("a", "reference"), reason)
        return True


@pytest.fixture(scope="module", autouse=True)
def _followers() -> Iterator[None]:
    with mock.patch.object(machine, "Session", Follower):
        yield


@pytest.fixture(autouse=True)
def _nothing_fails() -> Iterator[None]:
    yield
    Follower.fails = staticmethod(lambda session: "")


@pytest.fixture(scope="module")
def sessions(_followers: None) -> list[Follower]:
    """Of examples in which nothing fails."""
    return run()[1]


def run(examples: int = 60, seed: int = 0, shrinks: bool = False, **options: Any) -> tuple[Any, list[Follower]]:
    """What a search found, and the sessions of its examples."""
    sessions: list[Any] = []
    phases = [Phase.generate, *([Phase.shrink] if shrinks else [])]
    found = search(
        st.just(Case(SLIDING, 0, "float32", SIZES, ("reference", "a"))),
        st.just(SIZES),
        examples=examples,
        steps=12,
        seed=seed,
        ledger=Ledger(),
        on_start=sessions.append,
        settings=hypothesis.settings(DEFAULTS, phases=phases, report_multiple_bugs=False),
        **options,
    )
    return found, sessions


def test_prefills_end_where_a_page_does(sessions: list[Follower]) -> None:
    """And a token to either side: of lengths without a reason, 1 in 16 would end a page."""
    ends = [end for session in sessions for end in session.ends]
    assert len(ends) > 100
    at = {side: sum(end % PAGE == side % PAGE for end in ends) / len(ends) for side in (-1, 0, 1)}
    assert at[0] > 0.1, at
    assert sum(at.values()) > 0.3, at


def test_lengths_at_which_something_changes() -> None:
    """Every page's end, the window, LogN's training length, and RoPE's with its first doublings."""
    scaling = {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 11}
    spec = tiny_spec({"attention": {"logn": {"train_length": 27}}, "rope": {"scaling": scaling}})
    workload = machine.Workload()
    workload.cache_sizes, workload.max_length = SIZES, 72
    workload.case = Case(spec, 0, "float32", SIZES, ("reference", "a"))
    assert workload.edges() == {16, 32, 48, 64, 27, 11, 22, 44, 88}
    workload.case = Case(SLIDING, 0, "float32", SIZES, ("reference", "a"))
    assert workload.edges() == {16, 32, 48, 64, 21}


def test_every_kind_of_step_is_taken(sessions: list[Follower]) -> None:
    kinds = Counter(type(step) for session in sessions for step in session.steps)
    assert min(kinds[kind] for kind in (Add, Forward, Commit, Fork, Popn, Remove, Poison, Restart)) >= 10, kinds
    methods = Counter(step.method for session in sessions for step in session.steps if isinstance(step, Forward))
    assert set(methods) == {"prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"}
    batches = Counter(len(step.tokens) for session in sessions for step in session.steps if isinstance(step, Forward))
    assert {1, 2, 3} <= set(batches)


def test_a_workload_begins_on_pages_of_nan_and_ends_with_an_empty_cache(sessions: list[Follower]) -> None:
    """Whose pages are then counted: what was lost is noticed."""
    assert all(isinstance(session.steps[0], Poison) for session in sessions)
    assert all(session.steps[-1] == Restart(SIZES) for session in sessions)


def test_after_a_fork_both_go_on(sessions: list[Follower]) -> None:
    forks = [(session.steps[i + 1], step) for session in sessions for i, step in followed(session, Fork)]
    together = [
        fork for then, fork in forks if isinstance(then, Forward) and {fork.parent, fork.child} <= set(then.tokens)
    ]
    assert len(together) > 0.7 * len(forks) > 5
    starts = [fork.at % PAGE == 0 for _, fork in forks]
    assert sum(starts) > 0.3 * len(starts)


def test_what_was_rolled_back_goes_on_otherwise(sessions: list[Follower]) -> None:
    after = [(session.steps[i + 1], step) for session in sessions for i, step in followed(session, Popn)]
    going_on = [step for then, step in after if isinstance(then, Forward) and step.seq in then.tokens]
    assert len(going_on) > 0.3 * len(after) > 5


def followed(session: Follower, kind: type[Step]) -> list[tuple[int, Any]]:
    return [(i, step) for i, step in enumerate(session.steps[:-1]) if isinstance(step, kind)]


def test_tokens_are_all_sorts(sessions: list[Follower]) -> None:
    long = [
        step.ids for session in sessions for step in session.steps if isinstance(step, Forward) and len(step.ids) > 9
    ]
    assert all(len(set(ids)) > len(ids) // 2 for ids in long)
    firsts = Counter(ids[0] for ids in long)
    assert max(firsts.values()) < len(long) / 2


# --------------------------------------------------------------------------------------------------- failures


def test_a_seed_draws_the_same_again_and_another_seed_others() -> None:
    steps = [[session.steps for session in run(examples=8, seed=seed)[1]] for seed in (1, 1, 2)]
    assert steps[0] == steps[1] != steps[2]


def test_a_failure_is_made_small() -> None:
    """The least that fails, of a fault that only three tokens in a row show, and everybody is told on the way."""
    told: list[Disagreement] = []
    Follower.fails = staticmethod(
        lambda session: "wrong" if isinstance(last := session.steps[-1], Forward) and len(last.ids) >= 3 else ""
    )
    found, _ = run(shrinks=True, on_disagreement=told.append)
    assert isinstance(found, Disagreement)
    assert found.reason == "wrong"
    assert [type(step) for step in found.steps] == [Poison, Add, Forward]
    assert len(found.steps[-1].ids) == 3
    assert told[-1].steps == found.steps
    assert len(told) > 1


def test_a_failure_that_does_not_come_again_is_told_all_the_same() -> None:
    left = [1]

    def once(session: Follower) -> str:
        return "flaky" if isinstance(session.steps[-1], Fork) and left and left.pop() else ""

    Follower.fails = staticmethod(once)
    found, _ = run(shrinks=True)
    assert isinstance(found, Disagreement)
    assert found.reason == "flaky"


def test_a_failure_at_the_very_end_counts() -> None:
    Follower.fails = staticmethod(lambda session: "lost a page" if session.steps[-1] == Restart(SIZES) else "")
    found, _ = run(examples=3)
    assert found is not None
    assert found.reason == "lost a page"


def test_without_a_failure_there_is_none_and_every_example_is_counted() -> None:
    ledger, sessions = Ledger(), list[Session]()
    case = Case(SLIDING, 0, "float32", SIZES, ("reference", "a"))
    options: dict[str, Any] = {"examples": 7, "steps": 5, "seed": 0, "ledger": ledger, "on_start": sessions.append}
    assert search(st.just(case), st.just(SIZES), **options) is None
    assert ledger.examples == len(sessions) >= 7
    assert ledger.pairs == {("a", "reference"): ledger.examples}
