"""The processes that share a model: how they find one another, agree that it is the same model, and end together.

torchrun starts them and says in the environment which is which; any launcher will do that sets RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. What ranks tell one another beside their work goes through the launcher's
store of keys and values. A rank ends when its launcher or another rank is gone, with the first cause on the screen of
every machine. On one rank nothing of this happens, and torch.distributed is not imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .meeting import Meeting, RankError, Ranks
from .shares import explanation, obstacles, read_shared

__all__ = ["RankError", "Ranks", "join", "tell", "together"]

T = TypeVar("T")

_meeting: Meeting | None = None


def join(device: str, **facts: object) -> Ranks:
    """Meet the other ranks, and compare facts with theirs before anything else: the package, the number of ranks,
    torch's version, the device, and the `facts` given here. A second call in a process only compares again.

    device: "cpu", where ranks talk through gloo, or "cuda", which is GPU number LOCAL_RANK, through NCCL.
    Raises RankError on every rank where facts differ, a rank is missing, or so many ranks cannot share the model.
    """
    global _meeting
    ranks = read_environment()
    if ranks.size == 1:
        return ranks
    try:
        import torch
        import torch.distributed as dist
    except ModuleNotFoundError as error:
        raise RankError(f"{ranks.size} ranks need torch to talk to one another: pip install torch") from error
    _meeting = _meeting or Meeting(ranks)
    _meeting.compare(_package() | {"torch": torch.__version__, "device": device} | facts, _problem(ranks, device))
    gpu = None if device == "cpu" else torch.device("cuda", ranks.local_rank)
    if gpu:
        torch.cuda.set_device(gpu)
    if not dist.is_initialized():
        # It keeps the group that is there when it is first imported, which torch may do at any time. A group that is
        # kept outlives its end, and one of its threads may want the interpreter when that is gone, which aborts.
        import torch.distributed.nn

        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(
            backend, store=_meeting.store.torch, rank=ranks.rank, world_size=ranks.size, device_id=gpu
        )
    return ranks


def together(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run a step on every rank, and wait until all have: where one fails, none goes on.

    An error that all ranks have alike is raised as it is; else all raise RankError with what went wrong first.
    """
    if ranks.size == 1:
        return step()
    assert _meeting is not None, "join comes first"
    return _meeting.together(step)


def tell(message: str) -> None:
    """Print why ranks end, on standard error, once a machine, and return when that is done: the first rank that
    ends makes a launcher end the others."""
    if _meeting is None:
        print(message, file=sys.stderr)
    else:
        _meeting.tell(message, _meeting.store)


def read_environment() -> Ranks:
    """What the launcher says; raises RankError where that is not all."""
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if given["WORLD_SIZE"] in ("", "1"):
        return Ranks()
    for name in (*given, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise RankError(
                f"WORLD_SIZE is {given['WORLD_SIZE']}, and {name} is not set: start the ranks with torchrun"
            )
    if not all(value.isdecimal() for value in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise RankError(f"the environment says {said}: ranks count from 0 to WORLD_SIZE - 1")
    return Ranks(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]))


def _package() -> dict[str, str]:
    """The spec that this package was generated from, and a hash of all its files."""
    folder = Path(__file__).parent
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.py")}
    digest = hashlib.sha256((folder / "MANIFEST.json").read_bytes())
    for name, text in sorted(files.items()):
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return {"spec_sha256": _manifest()["spec_sha256"][:12], "hash of the package's files": digest.hexdigest()[:12]}


def _problem(ranks: Ranks, device: str) -> str:
    """Why this rank cannot take part; empty when it can."""
    parameters = read_shared(_manifest()["parameters"])
    if reasons := obstacles(parameters, ranks.size):
        return "\n".join([*reasons, explanation(parameters)])
    if device == "cpu":
        return ""
    import torch

    if device != "cuda":
        return f"each of {ranks.size} ranks takes the GPU of its own number: the device is cuda, and not {device}"
    if ranks.local_rank >= (found := torch.cuda.device_count()):
        return f"rank {ranks.rank} needs GPU {ranks.local_rank} of {socket.gethostname()}, which has {found}"
    return ""


def _manifest() -> Any:
    return json.loads((Path(__file__).parent / "MANIFEST.json").read_text())
