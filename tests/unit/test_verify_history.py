"""What a forward is about, and where its rows are."""

from __future__ import annotations

import pytest

from qwenspec.verify.history import History, Seen, brief
from qwenspec.verify.result import Check
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step

EVERY = Check.FORWARD


def last(*steps: Step) -> Seen:
    history = History()
    for step in steps[:-1]:
        history.see(step)
    return history.see(steps[-1])


def test_prefill_chunks_and_decode() -> None:
    start = (Poison(), Add(0), Forward({0: (1, 2)}, "prefill"))
    assert last(*start) == Seen(frozenset({EVERY, Check.PREFILL}), ((0, 1),))
    chunk = last(*start, Forward({0: (3, 4, 5)}))
    assert chunk == Seen(frozenset({EVERY, Check.CHUNKED_PREFILL, Check.VERIFY_ROWS}), ((0, 2), (0, 3), (0, 4)))
    assert last(*start, Forward({0: (3,)}, "decode")) == Seen(frozenset({EVERY, Check.DECODE}), ((0, 2),))
    assert last(*start, Forward({0: (3,)})).checks == {EVERY, Check.DECODE}


def test_a_mixed_batch_keeps_the_order_of_the_batch() -> None:
    mixed = last(Add(0), Add(1), Forward({1: (1, 2)}, "prefill"), Forward({1: (3,), 0: (4, 5)}, "batch_prefill"))
    assert mixed.checks == {EVERY, Check.MIXED_BATCH, Check.DECODE, Check.PREFILL}
    assert mixed.places == ((1, 2), (0, 1))


def test_a_fork_marks_parent_and_child() -> None:
    steps = (Add(0), Forward({0: (1, 2, 3)}), Fork(0, 7, 2))
    child = last(*steps, Forward({7: (9,)}, "decode"))
    assert child == Seen(frozenset({EVERY, Check.DECODE, Check.FORK}), ((7, 2),))
    assert Check.FORK in last(*steps, Forward({0: (9,)}, "decode")).checks
    assert Check.FORK not in last(*steps, Add(1), Forward({1: (9,)}, "prefill")).checks


def test_a_rollback_marks_what_follows() -> None:
    steps = (Add(0), Forward({0: (1, 2, 3)}))
    assert last(*steps, Popn(0, 2), Forward({0: (5,)})) == Seen(
        frozenset({EVERY, Check.DECODE, Check.ROLLBACK}), ((0, 1),)
    )
    assert Check.ROLLBACK not in last(*steps, Popn(0, 0), Forward({0: (5,)})).checks


def test_a_sequence_that_comes_back_was_preempted() -> None:
    steps = (Add(0), Forward({0: (1, 2, 3)}), Remove(0), Add(4))
    resumed = (*steps, Forward({4: (1, 2)}, "prefill"))
    assert Check.PREEMPTION in last(*resumed).checks
    assert Check.PREEMPTION in last(*resumed, Forward({4: (3,)})).checks
    assert Check.PREEMPTION not in last(*steps, Forward({4: (1, 9)}, "prefill")).checks


def test_trees_have_depths_and_a_kept_path() -> None:
    tree = Forward({0: (10, 11, 12, 13)}, "batch_verify", {0: (-1, 0, 0, 2)})
    start = (Add(0), Forward({0: (1, 2)}))
    seen = last(*start, tree)
    assert seen == Seen(frozenset({EVERY, Check.TOKEN_TREES}), ((0, 2), (0, 3), (0, 3), (0, 4)))
    after = last(*start, tree, Commit({0: 3}), Forward({0: (5,)}))
    assert after == Seen(frozenset({EVERY, Check.TOKEN_TREES, Check.DECODE}), ((0, 5),))
    assert last(*start, tree, Commit({0: -1}), Forward({0: (5,)})).places == ((0, 2),)


def test_a_restart_forgets() -> None:
    seen = last(Add(0), Forward({0: (1,)}), Remove(0), Restart(CacheSizes(4, 4, 2, 8)), Add(0), Forward({0: (1,)}))
    assert seen.checks == {EVERY, Check.PREFILL}


@pytest.mark.parametrize(
    ("step", "check"),
    [
        (Fork(0, 1, 1), Check.FORK),
        (Popn(0, 1), Check.ROLLBACK),
        (Commit({0: -1}), Check.TOKEN_TREES),
        (Add(1), EVERY),
        (Forward({0: (1,)}), Check.DECODE),
    ],
)
def test_a_step_that_fails_is_about_something_too(step: Step, check: Check) -> None:
    history = History()
    history.see(Add(0))
    history.see(Forward({0: (1, 2)}))
    assert check in history.about(step)
    assert history.see(Forward({0: (3,)})).places == ((0, 2),)  # nothing was done


def test_steps_in_short() -> None:
    told = {
        Restart(CacheSizes(4, 9, 2, 8)): "restart with 9 pages of 4",
        Poison(): "poison",
        Add(0): "add 0",
        Add(0, 12): "add 0 for 12",
        Fork(0, 1, 8): "fork 0 to 1 at 8",
        Popn(0, 2): "pop 2 of 0",
        Remove(3): "remove 3",
    }
    assert {step: brief(step) for step in told} == told
    assert brief(Commit({0: 3, 1: -1})) == "keep 0:3 1:-1"
    assert brief(Forward({0: (1, 2), 3: (4,)}, "batch_decode")) == "batch decode 0+2 3+1"
    assert brief(Forward({0: (1, 2)}, "batch_verify", {0: (-1, 0)})) == "trees 0+2"
