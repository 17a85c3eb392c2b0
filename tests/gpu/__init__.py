"""Checks and measurements for a machine with a GPU; run.py is the command."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "backends" / "kernels"))
sys.path.insert(0, str(ROOT))
