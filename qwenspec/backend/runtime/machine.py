"""Errors that are about the machine and not about the program: memory, disks, files that nobody may read."""

from __future__ import annotations

import errno
import io
import os
import re

# How torch, CUDA's libraries and TVM say that there is no memory, in errors of every type.
_NO_MEMORY = re.compile(
    r"(?i:out.of.memory|allocate memory|bad_alloc|alloc_failed|storage size calculation overflowed)"
)
_ASKED = re.compile(r"(?i:(?:tried|unable) to allocate) ([\d.]+) ?(\w+)")


def machine_problem(error: BaseException) -> str | None:
    """What the machine refused, in a sentence; None for an error that is about anything else."""
    if out_of_memory(error):
        return f"there is not enough memory{_asked(str(error))}"
    if not isinstance(error, OSError) or isinstance(error, io.UnsupportedOperation):
        return None
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None or isinstance(error.filename, int):
        return reason
    return f"{os.fsdecode(error.filename)}: {reason}"


def out_of_memory(error: BaseException) -> bool:
    """Python's and NumPy's MemoryError, torch's and TVM's RuntimeError, and the system's ENOMEM."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _asked(text: str) -> str:
    """Of which device, and for how much at once, as far as the error says it."""
    place = " on the GPU" if re.search("CUDA|CUBLAS|cuda", text) else ""
    if not (asked := _ASKED.search(text)):
        return place
    amount, unit = asked.groups()
    if unit != "bytes":
        return f"{place}: {amount} {unit} were asked for at once"
    return f"{place}: {int(amount) / 2**30:,.2f} GiB were asked for at once"
