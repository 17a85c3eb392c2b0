"""Ranks meet, and refuse to go on when they do not fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwenspec
from distributed.processes import by_hand, environment, finish, scenario, torchrun, write_spec, write_team
from qwenspec.backend.runtime.ranks import RankError, Ranks, read_environment
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import obstacles


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_team(tmp_path_factory.mktemp("team"))


def refusals(ended: list[tuple[int, str, str]]) -> list[str]:
    """What each rank raised; on screen it was once."""
    assert all(code != 0 for code, _, _ in ended)
    reasons = [out.removeprefix("refused: ").strip() for _, out, _ in ended]
    screen = "".join(err for _, _, err in ended)
    assert screen.count(reasons[0]) == 1, screen
    assert "Traceback" not in screen
    return reasons


def test_variables_of_any_launcher_will_do(team: Path) -> None:
    ended = finish(*by_hand([scenario(team, "join")] * 2))
    assert [code for code, _, _ in ended] == [0, 0]
    assert [out for _, out, _ in ended] == [f"{Ranks(rank, 2, rank)}: 3\n" for rank in range(2)]
    assert [err for _, _, err in ended] == ["", ""]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names in /proc")
def test_no_thread_of_the_process_group_is_left_when_the_interpreter_ends(team: Path) -> None:
    """It would free tensors, for which it needs the interpreter: without one the process aborts."""
    for code, out, err in finish(*by_hand([scenario(team, "end")] * 2)):
        assert (code, err) == (0, "")
        before, _, after = out.splitlines()
        assert "gloo" in before
        assert after == "[]"


def test_a_rank_that_takes_its_time_to_leave(team: Path) -> None:
    """Rank 0 keeps the store for as long as another is not yet through."""
    slow = by_hand([scenario(team, "leave slowly")] * 2, CONSTANTS='{"BEAT_SECONDS": 0.1}')
    assert [(code, err) for code, _, err in finish(*slow)] == [(0, ""), (0, "")]


def test_one_rank_imports_nothing_for_it(team: Path) -> None:
    ask = "import sys, team.ranks as r; assert r.join('cpu') == r.Ranks(); assert r.together(r.Ranks(), dict) == {}; "
    command = [sys.executable, "-c", ask + "assert 'torch' not in sys.modules"]
    for world in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        subprocess.run(command, cwd=team, env=environment(**world), check=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2, and MASTER_PORT is not set: start the ranks with torchrun"),
        ({"LOCAL_RANK": ""}, "WORLD_SIZE is 2, and LOCAL_RANK is not set: start the ranks with torchrun"),
        ({"RANK": "2"}, "WORLD_SIZE=2, RANK=2, LOCAL_RANK=0: ranks count from 0 to WORLD_SIZE - 1"),
        ({"RANK": "-1"}, "WORLD_SIZE=2, RANK=-1, LOCAL_RANK=0: ranks count from 0 to WORLD_SIZE - 1"),
    ],
)
def test_an_environment_that_says_too_little(
    changes: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in good.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == Ranks(1, 2, 0)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError) as error:
        read_environment()
    assert reason in str(error.value)


def test_packages_of_different_specs(team: Path, tmp_path: Path) -> None:
    other = write_team(tmp_path / "other", rope={"theta": 20000.0})
    reasons = refusals(finish(*by_hand([scenario(team, "join"), scenario(other, "join")])))
    ours, theirs = (
        json.loads((folder / "team" / "MANIFEST.json").read_text())["spec_sha256"][:12] for folder in (team, other)
    )
    assert reasons[0] == reasons[1]
    assert f'spec_sha256 is "{ours}" on rank 0' in reasons[0]
    assert f'"{theirs}" on rank 1' in reasons[0]


def test_packages_whose_files_differ(team: Path, tmp_path: Path) -> None:
    other = write_team(tmp_path / "other")
    (tmp_path / "other" / "team" / "__init__.py").write_text("SIZE = 3\n")
    reasons = refusals(finish(*by_hand([scenario(team, "join"), scenario(other, "join")])))
    assert reasons[0] == reasons[1]
    assert "hash of the package's files is " in reasons[0]


@pytest.mark.parametrize("sizes", [("2", "4"), ("4", "2")])
def test_ranks_of_different_worlds(sizes: tuple[str, str], team: Path) -> None:
    """Also when rank 0 still waits for a rank of which no other knows."""
    worlds = {rank: {"WORLD_SIZE": size} for rank, size in enumerate(sizes)}
    reasons = refusals(finish(*by_hand([scenario(team, "join")] * 2, worlds)))
    assert reasons[0] == reasons[1]
    assert f"WORLD_SIZE is {sizes[0]} on rank 0" in reasons[0]
    assert f"and {sizes[1]} on rank 1" in reasons[0]


def test_facts_are_compared_each_time(team: Path) -> None:
    facts = {rank: {"WITH": json.dumps({"dtype": dtype})} for rank, dtype in enumerate(("float32", "bfloat16"))}
    ended = finish(*by_hand([scenario(team, "join twice")] * 2, facts))
    assert [out.splitlines()[0] for _, out, _ in ended] == [f"{Ranks(rank, 2, rank)}: 3" for rank in range(2)]
    reasons = refusals([(code, out.split("\n", 1)[1], err) for code, out, err in ended])
    assert reasons[0] == reasons[1]
    assert 'dtype is "float32" on rank 0' in reasons[0]
    assert '"bfloat16" on rank 1' in reasons[0]


def test_a_rank_that_does_not_come(team: Path) -> None:
    few = {"WORLD_SIZE": "4", "CONSTANTS": '{"JOIN_SECONDS": 10}', "TOGETHER": "2"}
    reasons = refusals(finish(*by_hand([scenario(team, "join")] * 2, **few)))
    assert reasons[0] == reasons[1]
    assert reasons[0].endswith("waited 10 s for 4 ranks; not there: 2, 3")


def test_rank_0_does_not_come(team: Path) -> None:
    alone = {0: {"RANK": "1", "WORLD_SIZE": "2", "CONSTANTS": '{"JOIN_SECONDS": 2}'}}
    ((code, out, err),) = finish(*by_hand([scenario(team, "join")], alone))
    assert code != 0
    assert out.startswith("refused: rank 1 on ")
    assert "cannot reach rank 0, or its launcher, at 127.0.0.1:" in out
    assert "frame #" not in err, "pages of torch's client"


def test_two_processes_that_are_the_same_rank(team: Path) -> None:
    ranks = by_hand([scenario(team, "work for ever")] * 3, {2: {"RANK": "1"}}, WORLD_SIZE="2")
    ended = finish(*ranks)
    assert all(code != 0 for code, _, _ in ended)
    (line,) = "".join(err for _, _, err in ended).splitlines()
    assert "two processes say that they are rank 1: process " in line
    assert all(f"process {rank.pid} on " in line for rank in ranks[1:])


def test_a_number_of_ranks_that_cannot_share_the_model(team: Path) -> None:
    """What `plan` says, word for word."""
    reasons = refusals(finish(*by_hand([scenario(team, "join")] * 3)))
    (problem,) = obstacles(lower(qwenspec.load(write_spec(team))), 3)
    assert reasons == [f"{problem.message}\n{problem.hint}"] * 3


def test_another_attempt_starts_anew(team: Path) -> None:
    """torchrun keeps its store when it starts the ranks again."""
    again = torchrun(2, "--max-restarts=1", *scenario(team, "join at the second attempt"))
    ((code, out, _),) = finish(again)
    assert code == 0
    assert sorted(line for line in out.splitlines() if line.startswith("Ranks")) == [
        f"{Ranks(rank, 2, rank)}: 3" for rank in range(2)
    ]
    assert "attempt is 0 on rank 0" in out
