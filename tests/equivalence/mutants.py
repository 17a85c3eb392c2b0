"""The planted mistakes, each of which the suite must catch (`plant.py` plants them, one at a time).

They are in the files beside this one that are called mutants_*.py, one tuple of them in each. Left out: code that only
a GPU runs, and mistakes that are no larger than a dtype's rounding (the order of a norm's casts, the dtype of cos and
sin, a head's dtype where both are 16 bits wide).
"""

from __future__ import annotations

import importlib
from pathlib import Path

from mutant import Mutant


def listed(module: str) -> tuple[Mutant, ...]:
    """The mistakes of one file, in their order."""
    values = vars(importlib.import_module(module)).values()
    lists = [value for value in values if isinstance(value, tuple) and any(isinstance(one, Mutant) for one in value)]
    assert len(lists) == 1, f"{module}.py has {len(lists)} lists of mistakes, not one"
    return lists[0]


FILES = sorted(file.stem for file in Path(__file__).parent.glob("mutants_*.py"))
MUTANTS = tuple(mutant for file in FILES for mutant in listed(file))
