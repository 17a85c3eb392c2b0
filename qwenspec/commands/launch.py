"""A package's ranks under torchrun's launcher: python -m qwenspec.commands.launch N PACKAGE ARGUMENTS...

It is a process of its own, which says of a failure what ranks have not said themselves, and ends with its exit code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def main(ranks: int, package: Path, arguments: Sequence[str]) -> int:
    """Run `python -m PACKAGE ARGUMENTS` as so many ranks on this machine; the exit code of the first that fails."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.update(environment(ranks, package))
    logging.disable(logging.ERROR)  # the launcher's own remarks on a failure
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    try:
        # Its folder of logs, which stays empty, goes with the package's.
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={package.parent / 'logs'}"]
        run.main([*options, "-m", package.name, *arguments])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return told({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def told(codes: Mapping[int, int]) -> int:
    """Of the ranks' exit codes the one to end with; what a signal ended has not said why."""
    rank = next((rank for rank, code in codes.items() if code != -signal.SIGTERM), min(codes))  # which the others get
    if codes[rank] > 0:
        return codes[rank]
    print(f"error: rank {rank} was ended by {signal.Signals(-codes[rank]).name}", file=sys.stderr)
    return 128 - codes[rank]


def environment(ranks: int, package: Path) -> dict[str, str]:
    """What ranks need beside what the launcher tells them; cores are shared, unless the user says how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // ranks))
    defaults = {"OMP_NUM_THREADS": threads, "TVM_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    # The current folder may hold another package of this name.
    return {**defaults, **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def end_with(parent: int) -> None:
    """Ranks have no use when whoever asked for them is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
