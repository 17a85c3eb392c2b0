"""Importing a generated package from where it lies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_package(folder: Path) -> ModuleType:
    """Import a package from its folder, anew, under a name that no other package has."""
    folder = folder.resolve()
    name = f"_qwenspec_{folder.name}_{abs(hash(str(folder))):x}"
    for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
