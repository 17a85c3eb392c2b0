"""Ranks as processes: started by torchrun or by hand, watched, and counted when they should be gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

import qwenspec
from qwenspec.backend import package
from qwenspec.ir import shares

SCENARIOS = Path(__file__).with_name("scenarios.py")
PAGE = 4096  # bytes
PATIENCE = 600  # seconds: only what hangs takes longer, however busy the machine is
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHERS_OWN = ("TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "dtype": "float32",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 16, "qk_norm": "per_head"},
    "rope": {"theta": 10000.0},
}


def write_spec(folder: Path, **architecture: object) -> Path:
    """tiny.yaml with these changes."""
    document = {
        "schema_version": 1,
        "family": "tiny",
        "default_variant": "tiny",
        "architecture": TINY | architecture,
        "variants": {"tiny": {}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
    return folder / "tiny.yaml"


def write_team(folder: Path, **architecture: object) -> Path:
    """A package `team` with nothing but ranks.py and what that reads: the manifest of a tiny spec."""
    emitted = qwenspec.emit(qwenspec.load(write_spec(folder, **architecture)), "triton", folder)
    team = folder / "team"
    team.mkdir()
    runtime = package.HERE / "runtime"
    for file in (runtime / "ranks.py", runtime / "meeting.py", Path(shares.__file__), emitted / "MANIFEST.json"):
        shutil.copy(file, team)
    (team / "__init__.py").touch()
    return folder


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what a launcher said to it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_OWN)}
    return clean | {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"} | changes


def start(command: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    """A process in a session of its own, as a terminal would have it: one that Ctrl-C reaches, which it does not where
    tests run in the background. Its pipes hold a page: one that says much waits for its reader, however fast it is."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=PAGE,
        text=True,
        env=environment(**changes),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def scenario(folder: Path, name: str) -> list[str]:
    return [str(SCENARIOS), str(folder), name]


def torchrun(ranks: int, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    return start([*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", *arguments], **changes)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def by_hand(
    commands: Sequence[Sequence[str]], changes: Mapping[int, Mapping[str, str]] | None = None, **common: str
) -> list[subprocess.Popen[str]]:
    """A rank for each command, with the variables that any launcher sets; `changes` are those of one rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, command in enumerate(commands):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands))}
        own |= {**address, **common, **(changes or {}).get(rank, {})}
        ranks.append(start([sys.executable, *command], **own))
    return ranks


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; a process that does not end in time is an error, and is ended."""
    until = time.monotonic() + PATIENCE
    try:
        ended = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def said(process: subprocess.Popen[str], lines: int) -> list[list[str]]:
    """The words of the next lines of its stdout, sorted: ranks speak in any order."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().split() for _ in range(lines))


def left(word: str | Path) -> list[str]:
    """Command lines of running processes that have this word in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(word) in line and int(file.parent.name) != os.getpid():
            found.append(line)
    return found


def all_gone(word: str | Path) -> bool:
    return eventually(lambda: not left(word))


def eventually(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while not (found := true()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def rank_pid(word: str | Path, rank: int) -> int | None:
    """The running process that is this rank, of those whose command line has the word."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            line = file.with_name("cmdline").read_bytes().decode(errors="replace")
            if str(word) in line and f"RANK={rank}" in file.read_bytes().decode(errors="replace").split("\0"):
                return int(file.parent.name)
        except OSError:  # it has ended, or is another's
            continue
    return None
