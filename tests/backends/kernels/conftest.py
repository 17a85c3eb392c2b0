"""TRITON_INTERPRET is read when triton is imported and decides for the whole process, so there are two kinds of run:

TRITON_INTERPRET=1 pytest -m interpreter tests/backends/kernels    the kernels, interpreted
pytest tests/backends/kernels                                      everything else
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_interpreted, _others = "test_kernels_interpreter.py", ("test_kernels_aot.py", "test_kernels_cpu.py")
collect_ignore = list(_others) if INTERPRETED else [_interpreted]
