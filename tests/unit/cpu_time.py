"""How long something takes, for comparisons with something else in the same process: no test knows the machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_seconds(run: Callable[[], object]) -> float:
    """This process's CPU time, the best of three."""

    def once() -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    return min(once() for _ in range(3))
