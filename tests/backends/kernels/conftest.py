"""TRITON_INTERPRET is read when triton is imported and decides for the whole process, so there are two kinds of run:

TRITON_INTERPRET=1 pytest -m interpreter tests/backends/kernels    the kernels, interpreted
pytest tests/backends/kernels                                      everything else
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["test_*_aot.py", "test_*_cpu.py"] if INTERPRETED else ["test_*_interpreter.py"]
