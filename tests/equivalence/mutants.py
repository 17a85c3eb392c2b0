"""The planted mistakes, each of which the suite must catch (`plant.py` plants them, one at a time).

They are in the files beside this one that are called mutants_*.py, in tuples. Left out: code that only
a GPU runs, and mistakes that are no larger than a dtype's rounding (the order of a norm's casts, the dtype of cos and
sin, a head's dtype where both are 16 bits wide).
"""

from __future__ import annotations

import importlib
from pathlib import Path

from mutant import Mutant


def listed(module: str) -> tuple[Mutant, ...]:
    """The mistakes of one file, in their order."""
    tuples = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, tuple)]
    return tuple(dict.fromkeys(one for several in tuples for one in several if isinstance(one, Mutant)))


FILES = sorted(file.stem for file in Path(__file__).parent.glob("mutants_*.py"))
MUTANTS = tuple(mutant for file in FILES for mutant in listed(file))
