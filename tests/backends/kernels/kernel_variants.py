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
    "int_linear": {"BITS": ("4", "8")} | dict.fromkeys(("GROUPS", "ZERO_POINTS", "ACT_ORDER", "BIAS"), (False, True)),
    "int_matrix": {"BITS": ("4", "8")} | dict.fromkeys(("GROUPS", "ZERO_POINTS", "ACT_ORDER", "LOOKUP"), (False, True)),
    "fp8_linear": dict.fromkeys(("ROUNDED_ACTIVATIONS", "STATIC_ACTIVATIONS", "ROW_SCALES", "BIAS"), (False, True)),
    "fp8_matrix": dict.fromkeys(("STATIC_ACTIVATIONS", "ROW_SCALES"), (False, True)),
    "columns": {},
    "e4m3": {},
    "dispatch": {},
    "paged": {},
}
# What a KV cache is quantised to; empty: nothing.
KV_FLAGS: dict[str, dict[str, bool | str]] = {
    "": {"QUANTIZED_KV": False, "KV_DTYPE": "", "TOKEN_SCALES": False, "STORED_KV_SCALES": False},
    "int8": {"QUANTIZED_KV": True, "KV_DTYPE": "int8", "TOKEN_SCALES": True, "STORED_KV_SCALES": False},
    "fp8": {"QUANTIZED_KV": True, "KV_DTYPE": "fp8_e4m3", "TOKEN_SCALES": True, "STORED_KV_SCALES": False},
    "fp8_stored": {"QUANTIZED_KV": True, "KV_DTYPE": "fp8_e4m3", "TOKEN_SCALES": False, "STORED_KV_SCALES": True},
}


def combinations(file: str) -> list[dict[str, bool | str]]:
    """Every value of a file's flags."""
    return [dict(zip(FLAGS[file], values, strict=True)) for values in itertools.product(*FLAGS[file].values())]


def fp8_flags(activations: str, block: tuple[int, int] | None) -> dict[str, bool | str]:
    """Of fp8_linear, but for BIAS. `block`: None for a scale a row."""
    return {
        "ROUNDED_ACTIVATIONS": activations != "none",
        "STATIC_ACTIVATIONS": activations == "static",
        "ROW_SCALES": block is None,
    }


def fp8_matrices(flags: dict[str, bool | str]) -> ModuleType:
    """The fp8_matrix for these fp8_flags."""
    return load("fp8_matrix", **{name: flags[name] for name in FLAGS["fp8_matrix"]})


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_fold = _import("_qwenspec_fold", ROOT / "qwenspec" / "backend" / "fold.py")


def folded(file: str, kv: str = "", **flags: bool | str) -> str:
    """The text of a kernel file for one variant."""
    source = (BACKEND / "kernels" / f"{file}.py").read_text(encoding="utf-8")
    declared = _fold.declared_flags(source)
    text: str = _fold.fold(source, flags | {name: value for name, value in KV_FLAGS[kv].items() if name in declared})
    return text


@cache
def _package(kv: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="kernels"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / f"folded{kv}"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    for file in [*(file for file, flags in FLAGS.items() if not flags), *(["quantized_kv"] if kv else [])]:
        (package / f"{file}.py").write_text(folded(file, kv), encoding="utf-8")
    # One variant for all that import it, which they do for its type alone.
    for file in ("int_matrix", "fp8_matrix"):
        (package / f"{file}.py").write_text(folded(file, **combinations(file)[-1]), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return package


@cache
def load(file: str, kv: str = "", **flags: bool | str) -> ModuleType:
    """A variant of a kernel file as a module."""
    return _import_from(_package(kv), file, folded(file, kv, **flags), *flags.values())


def load_mistaken(right: str, wrong: str, file: str, kv: str = "", **flags: bool | str) -> ModuleType:
    """The variant with a mistake planted in its text, or in that of a file that a quantised KV cache takes."""
    package = Path(tempfile.mkdtemp(prefix="mistaken", dir=_package(kv).parent))
    shutil.copytree(_package(kv), package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    texts = {name: folded(name, kv) for name in ("quantized_kv", "e4m3") if kv} | {file: folded(file, kv, **flags)}
    assert sum(right in text for text in texts.values()) == 1, f"{right!r} is not in one of {list(texts)}"
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text.replace(right, wrong), encoding="utf-8")
    return _import_from(package, file, texts[file].replace(right, wrong))


def _import_from(package: Path, file: str, text: str, *variant: bool | str) -> ModuleType:
    name = "_".join([file, *map(str, variant)])
    (package / f"{name}.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    return importlib.import_module(f"{package.name}.{name}")
