"""When one rank fails, every rank ends, with the first cause on screen and without leaving anything behind."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.processes import (
    all_gone,
    by_hand,
    finish,
    free_port,
    left,
    said,
    scenario,
    start,
    torchrun,
    write_team,
)

SHORT = '{"SILENCE_SECONDS": 8}'
PATIENT = '{"TELL_SECONDS": 60}'  # all ranks do tell
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch warns, with pages, if a store goes while it is asked


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Path]:
    """Its name is in the command line of every process of a test."""
    yield write_team(tmp_path / "team")
    assert left(tmp_path) == []


def test_a_step_that_fails_on_one_rank(team: Path) -> None:
    ended = finish(*by_hand([scenario(team, "load")] * 2, FAILING="1", CONSTANTS=PATIENT))
    assert all(code != 0 for code, _, _ in ended)
    reason = f"rank 1 on {os.uname().nodename}: ValueError: file 1 is not readable\n"
    assert [out for _, out, _ in ended] == [f"refused: {reason}"] * 2
    assert "".join(err for _, _, err in ended) == f"error: {reason}"


def test_a_step_that_fails_on_all_ranks_alike(team: Path) -> None:
    """As it would on one."""
    ended = finish(*by_hand([scenario(team, "load")] * 2, FAILING="0,1", REASON="no such folder", CONSTANTS=PATIENT))
    assert [(code, out) for code, out, _ in ended] == [(1, "")] * 2
    screen = "".join(err for _, _, err in ended)
    assert screen.count("Traceback") == 1
    assert screen.endswith("ValueError: no such folder\n")


def test_a_step_that_fails_while_another_rank_is_at_it(team: Path) -> None:
    """That rank is ended where it is."""
    ranks = by_hand([scenario(team, "load for ever"), scenario(team, "load")], FAILING="0,1")
    ended = finish(*ranks)
    assert all(code != 0 for code, _, _ in ended)
    reason = f"error: rank 1 on {os.uname().nodename}: ValueError: file 1 is not readable\n"
    assert "".join(err for _, _, err in ended) == reason


def test_an_error_of_one_rank_that_nobody_expected(team: Path) -> None:
    ((code, _, err),) = finish(torchrun(2, *scenario(team, "fail"), FAILING="1"))
    assert code != 0
    assert err.count("MemoryError: no memory left") == 1
    assert [line for line in err.splitlines() if "scenarios.py" in line and "File" in line] != []


def test_ranks_that_fail_at_once(team: Path) -> None:
    """Neither waits for the other to tell, and one of them does."""
    ranks = by_hand([scenario(team, "fail beside another")] * 2, LOCAL_RANK="0", CONSTANTS=PATIENT)
    ended = finish(*ranks)
    assert all(code != 0 for code, _, _ in ended)
    assert "".join(err for _, _, err in ended).count("error: ") == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed(killed: int, team: Path) -> None:
    run = torchrun(2, *scenario(team, "work for ever"))
    pids = [int(pid) for _, pid in said(run, 2)]
    os.kill(pids[killed], signal.SIGKILL)
    ((code, out, err),) = finish(run)
    assert code != 0
    assert f"Signal 9 (SIGKILL) received by PID {pids[killed]}" in err
    assert err.count("Traceback") == 1, "torchrun's own"
    assert out == ""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_and_no_launcher_sees_it(killed: int, team: Path) -> None:
    """Rank 0 takes the store with it."""
    ranks = by_hand([scenario(team, "work for ever")] * 2, **QUIET)
    for rank in ranks:
        said(rank, 1)
    ranks[killed].kill()
    code, _, err = finish(*ranks)[1 - killed]
    assert code == 1
    assert err.startswith(f"error: rank {1 - killed} on ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_or_stuck_while_the_others_wait_for_it(stop: signal.Signals, team: Path) -> None:
    ranks = by_hand([scenario(team, "load for ever")] * 2, {0: {"CONSTANTS": SHORT}}, FAILING="1")
    for rank in ranks:
        said(rank, 1)
    ranks[1].send_signal(stop)
    ((code, _, err),) = finish(ranks[0])
    ranks[1].kill()
    assert (code, err) == (1, "error: rank 1 was not heard of for 8 s\n")
    finish(ranks[1])


@pytest.mark.parametrize("work", ["load for ever", "work for ever"])
def test_ranks_end_with_their_launcher(work: str, team: Path) -> None:
    run = torchrun(2, *scenario(team, work), FAILING="0,1", **QUIET)
    said(run, 2)
    run.kill()
    assert all_gone(team)
    ((_, _, err),) = finish(run)
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(line.startswith("error: rank ") for line in lines)


def test_ranks_end_with_any_launcher(team: Path) -> None:
    """Here one that keeps no store, whose end nobody but its children sees."""
    rank = shlex.join([sys.executable, *scenario(team, "work for ever")])
    both = " & ".join(f"RANK={number} LOCAL_RANK={number} {rank}" for number in range(2))
    shell = start(
        ["bash", "-c", f"{both} & wait"], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **QUIET
    )
    said(shell, 2)
    shell.kill()
    assert all_gone(team)
    ((_, _, err),) = finish(shell)
    assert err.startswith("error: rank ")
    assert "ends with its launcher" in err
    assert err.count("\n") <= 2


@pytest.mark.parametrize(
    ("sign", "everybody"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_ends_every_rank(sign: signal.Signals, everybody: bool, team: Path) -> None:
    """Ctrl-C reaches torchrun, which has its ranks in other sessions; a service manager's kill may reach all."""
    run = torchrun(2, *scenario(team, "work for ever"))
    pids = [int(pid) for _, pid in said(run, 2)]
    for pid in [run.pid, *pids] if everybody else [run.pid]:
        os.kill(pid, sign)
    ((code, out, err),) = finish(run)
    assert (code != 0, out) == (True, "")
    assert err.count("Traceback") == 1, "torchrun's own"
    assert all_gone(team)


def test_ctrl_c_without_torchrun(team: Path) -> None:
    ranks = by_hand([scenario(team, "work for ever")] * 2)
    for rank in ranks:
        said(rank, 1)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    assert finish(*ranks) == [(-signal.SIGINT, "", "")] * 2
