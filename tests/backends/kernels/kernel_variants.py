"""Folded variants of the kernel files, imported as a generated package imports them.

Everything is loaded by path: the machine that runs the GPU tests has torch and triton, and not all of qwenspec's
own requirements, which `import qwenspec_triton` needs.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
BACKEND = ROOT / "backends" / "qwenspec_triton"

FLAGS: dict[str, dict[str, tuple[bool | str, ...]]] = {
    "norm": {"ONE_PLUS": (False, True)},
    "qkv": dict.fromkeys(("QK_NORM", "ONE_PLUS", "LOGN", "PARTIAL_ROTARY"), (False, True)),
    "decode_attention": {"SLIDING": (False, True)},
    "prefill_attention": {"SLIDING": (False, True)},
    "activation": {"ACTIVATION": ("silu", "relu", "gelu", "gelu_tanh")},
    "dispatch": {},
    "paged": {},
}


def combinations(file: str) -> list[dict[str, bool | str]]:
    """Every value of a file's flags."""
    return [dict(zip(FLAGS[file], values, strict=True)) for values in itertools.product(*FLAGS[file].values())]


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fold = _import("_qwenspec_fold", ROOT / "qwenspec" / "backend" / "fold.py").fold


def folded(file: str, **flags: bool | str) -> str:
    """The text of a kernel file for one variant."""
    text: str = fold((BACKEND / "kernels" / f"{file}.py").read_text(encoding="utf-8"), flags)
    return text


@cache
def _package() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="kernels"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "folded").mkdir()
    (folder / "folded" / "__init__.py").write_text("", encoding="utf-8")
    for file in ("dispatch", "paged"):
        (folder / "folded" / f"{file}.py").write_text(folded(file), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return folder / "folded"


@cache
def load(file: str, **flags: bool | str) -> ModuleType:
    """A variant of a kernel file as a module."""
    name = "_".join([file, *(str(value) for value in flags.values())])
    path = _package() / f"{name}.py"
    path.write_text(folded(file, **flags), encoding="utf-8")
    return importlib.import_module(f"folded.{name}")
