"""Generated packages as several ranks, by torchrun, by hand and by `qwenspec run --tp`: what they print, and how they
end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qwenspec
from distributed.processes import (
    all_gone,
    by_hand,
    environment,
    finish,
    left,
    rank_pid,
    start,
    torchrun,
    write_spec,
)
from unit.cli_runs import write_checkpoint

QWENSPEC = [sys.executable, "-m", "qwenspec"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder with tiny.yaml, weights/ of it and the Triton package. It is in the command line of every process that a
    test starts: none is left."""
    spec = write_spec(tmp_path)
    write_checkpoint(spec, tmp_path / "weights")
    qwenspec.emit(qwenspec.load(spec), "triton", tmp_path)
    yield tmp_path
    assert left(tmp_path) == []


def options(folder: Path, tokens: int, *more: str) -> list[str]:
    return ["--weights", str(folder / "weights"), "--prompt=CAB", f"--max-tokens={tokens}", "--device=cpu", *more]


def run(folder: Path, tokens: int, *more: str) -> list[str]:
    return [*QWENSPEC, "run", str(folder / "tiny.yaml"), *options(folder, tokens, *more)]


def temporary(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir()
    return {"TMPDIR": str(folder / "tmp")}


def leftovers(folder: Path) -> list[str]:
    """In the temporary folder; torch's cache of what it has compiled is meant to stay."""
    return [name for name in os.listdir(folder / "tmp") if not name.startswith("torchinductor")]


SAMPLED = ["--prompt=H", "--temperature=0.8", "--top-k=20", "--seed=3", "--json"]


@pytest.mark.parametrize(("backend", "more"), [("triton", []), ("triton", SAMPLED), ("tvm", SAMPLED)])
def test_ranks_print_what_one_prints(backend: str, more: list[str], here: Path) -> None:
    """To the byte; and nothing stays in the temporary folder."""
    command, tmp = [*run(here, 30, *more), f"--backend={backend}"], temporary(here)
    (code, one, _), (codes, ranks, said) = finish(start(command, **tmp), start([*command, "--tp=2"], **tmp))
    assert (code, codes, ranks) == (0, 0, one)
    assert len(one) > 3
    assert said == "" or said.startswith("note: compiling")
    assert leftovers(here) == []


def test_another_package_in_the_current_folder_is_not_run(here: Path) -> None:
    (here / "tiny_triton" / "__main__.py").write_text("raise SystemExit(9)\n")
    done = subprocess.run([*run(here, 5), "--tp=2"], cwd=here, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_a_rank_that_is_killed_while_tokens_come(backend: str, here: Path) -> None:
    process = start([*run(here, 4000), "--tp=2", f"--backend={backend}"], **temporary(here))
    assert process.stdout is not None
    assert process.stdout.read(5)
    pid = rank_pid(here, 1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ((code, _, err),) = finish(process)
    assert code == 128 + signal.SIGKILL
    assert [line for line in err.splitlines() if not line.startswith("note: compiling")] == [
        "error: rank 1 was ended by SIGKILL"
    ]
    assert leftovers(here) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_tokens_come(sign: signal.Signals, here: Path) -> None:
    process = start([*run(here, 4000), "--tp=2"], **temporary(here))
    assert process.stdout is not None
    assert process.stdout.read(5)
    os.kill(process.pid, sign)
    ((code, _, err),) = finish(process)
    assert (code, err) == (128 + sign, "")
    assert left(here) == []
    assert leftovers(here) == []


def test_ctrl_c_before_ranks_have_met(here: Path) -> None:
    """They are importing, and say nothing."""
    process = start([*run(here, 10), "--tp=2"], **temporary(here))
    while rank_pid(here, 1) is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    ((code, _, err),) = finish(process)
    assert (code, err) == (128 + signal.SIGINT, "")
    assert left(here) == []


def test_ranks_end_when_the_command_is_killed(here: Path) -> None:
    process = start([*run(here, 4000), "--tp=2"], **temporary(here))
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.kill()
    assert all_gone(here)
    finish(process)


def test_ctrl_c_at_torchrun_while_tokens_come(here: Path) -> None:
    command = ["-m", "tiny_triton", *options(here, 4000)]
    process = torchrun(2, *command, PYTHONPATH=str(here))
    assert process.stdout is not None
    assert process.stdout.read(5)
    os.killpg(process.pid, signal.SIGINT)
    ((code, _, err),) = finish(process)
    assert code != 0
    assert err.count("Traceback") == 1, "torchrun's own"
    assert all_gone(here)


def truncate(weights: Path) -> str:
    with (weights / "model.safetensors").open("r+b") as file:
        file.truncate(3000)
    return "CheckpointError: "


def remove(weights: Path) -> str:
    (weights / "tokenizer.json").unlink()
    return "TextError: "


@pytest.mark.parametrize("spoil", [truncate, remove])
def test_a_checkpoint_that_one_rank_cannot_read(spoil: Callable[[Path], str], here: Path) -> None:
    shutil.copytree(here / "weights", here / "other" / "weights")
    kind = spoil(here / "other" / "weights")
    commands = [["-m", "tiny_triton", *options(folder, 10)] for folder in (here, here / "other")]
    ended = finish(*by_hand(commands, PYTHONPATH=str(here)))
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    screen = "".join(err for _, _, err in ended)
    assert screen.startswith(f"error: rank 1 on {os.uname().nodename}: {kind}")
    assert screen.count("error: ") == 1
    assert str(here / "other") in screen


def test_a_checkpoint_that_no_rank_can_read(here: Path) -> None:
    """As one rank says it, with the same exit code."""
    (here / "weights" / "model.safetensors").unlink()
    one, ranks = finish(start(run(here, 10)), start([*run(here, 10), "--tp=2"]))
    assert one == ranks
    assert ranks[0] == 2
    assert ranks[2].startswith("error: ")


def test_packages_of_different_specs(here: Path) -> None:
    other = write_spec(here / "other", rope={"theta": 20000.0})
    qwenspec.emit(qwenspec.load(other), "triton", here / "other")
    command = ["-m", "tiny_triton", *options(here, 10)]
    paths = {0: {"PYTHONPATH": str(here)}, 1: {"PYTHONPATH": str(here / "other")}}
    ended = finish(*by_hand([command] * 2, paths))
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    (line,) = "".join(err for _, _, err in ended).splitlines()
    assert line.startswith("error: spec_sha256 is ")


def test_ranks_that_are_told_different_things(here: Path) -> None:
    commands = [["-m", "tiny_triton", *options(here, tokens)] for tokens in (10, 11)]
    ended = finish(*by_hand(commands, PYTHONPATH=str(here)))
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    (line,) = "".join(err for _, _, err in ended).splitlines()
    assert line.startswith("error: --max_tokens is 10 on rank 0 on ")
