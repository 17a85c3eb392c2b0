"""qwenspec: one YAML spec of a Qwen variant in, a standalone implementation out, on any backend.

spec = qwenspec.load("qwen3-0.6b")  # or of a file: load("specs/qwen3.yaml", variant="qwen3-0.6b")
model = qwenspec.lower(spec)
package = qwenspec.emit(spec, backend="triton", out="build")
runner = qwenspec.open_runner(package, weights="DIR", device="cpu", dtype="float32")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenspec.backend.emit import emit
    from qwenspec.backend.registry import open_runner
    from qwenspec.ir.lower import lower
    from qwenspec.spec.load import load

__all__ = ["__version__", "emit", "load", "lower", "open_runner"]
__version__ = "0.1.0"

_HOMES = {
    "emit": "qwenspec.backend.emit",
    "load": "qwenspec.spec.load",
    "lower": "qwenspec.ir.lower",
    "open_runner": "qwenspec.backend.registry",
}


def __getattr__(name: str) -> object:
    """Imports a function when it is first asked for, so that `import qwenspec` costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenspec' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
