"""What a rank does in these tests: python scenarios.py FOLDER SCENARIO. FOLDER holds a package `team` with ranks.py.

In the environment, CONSTANTS are seconds of meeting.py that a test shortens, as JSON, FAILING the ranks that fail,
WITH facts that ranks compare, as JSON, and TOGETHER how many processes wait for one another before they begin.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[1])
from team import meeting, ranks

RANK = int(os.environ.get("RANK", "0"))
FAILS = str(RANK) in os.environ.get("FAILING", "").split(",")


def say(text: object) -> None:
    """A line in one piece: ranks share torchrun's standard output."""
    os.write(sys.stdout.fileno(), f"{text}\n".encode())


def add_up(here: Any) -> None:
    import torch
    import torch.distributed as dist

    total = torch.full((1,), here.rank + 1.0)
    dist.all_reduce(total)
    say(f"{here}: {total.item():g}")


def add_up_for_ever() -> None:
    """The first sum is said, with this process's number."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    say(f"{RANK} {os.getpid()}")
    while True:
        dist.all_reduce(torch.ones(1))


def say_threads() -> None:
    """Those of the process group that are still there."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    say([name for name in names if "gloo" in name])


def begin_together(folder: Path, processes: int) -> None:
    """What takes long has been done: they join within moments of one another."""
    importlib.import_module("torch.distributed")
    (folder / f"{RANK}.ready").touch()
    while len(list(folder.glob("*.ready"))) < processes:
        time.sleep(0.01)


def load() -> int:
    if FAILS:
        raise ValueError(os.environ.get("REASON") or f"file {RANK} is not readable")
    return RANK


def load_for_ever() -> None:
    say(f"{RANK} {os.getpid()}")
    if FAILS:
        time.sleep(1000)


def main(scenario: str) -> None:
    for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
        assert hasattr(meeting, name)
        setattr(meeting, name, value)
    facts = json.loads(os.environ.get("WITH", "{}"))
    if together := int(os.environ.get("TOGETHER", "0")):
        begin_together(Path(sys.argv[1]), together)
    if scenario == "join":
        add_up(ranks.join("cpu", **facts))
    elif scenario == "join twice":
        add_up(ranks.join("cpu"))
        add_up(ranks.join("cpu", **facts))
    elif scenario == "join at the second attempt":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            facts["attempt"] = RANK
        add_up(ranks.join("cpu", **facts))
    elif scenario == "end":
        atexit.register(say_threads)  # before joining, and so called after leaving
        here = ranks.join("cpu")
        importlib.import_module("torch.distributed.nn")

        say_threads()
        add_up(here)
    elif scenario == "leave slowly":
        here = ranks.join("cpu")
        dist = importlib.import_module("torch.distributed")
        destroy = dist.destroy_process_group
        dist.destroy_process_group = lambda: (time.sleep(RANK), destroy())
        add_up(here)
    elif scenario == "load":
        say(ranks.together(ranks.join("cpu"), load))
    elif scenario == "fail":
        here = ranks.join("cpu")
        if FAILS:
            raise MemoryError("no memory left")
        add_up(here)
    elif scenario == "fail beside another":
        ranks.join("cpu")
        has = meeting.Store.has
        meeting.Store.has = lambda store, *keys: (has(store, *keys), time.sleep(0.5))[0]
        raise MemoryError("no memory left")
    elif scenario == "load for ever":
        ranks.together(ranks.join("cpu"), load_for_ever)
    elif scenario == "work for ever":
        ranks.join("cpu")
        add_up_for_ever()


try:
    main(sys.argv[2])
except ranks.RankError as error:
    say(f"refused: {error}")
    raise
