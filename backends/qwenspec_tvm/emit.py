"""IR -> the files of a TVM package."""

from __future__ import annotations

from pathlib import Path

from qwenspec.backend.package import common, manifest, render, vendor
from qwenspec.backend.structure import structure
from qwenspec.ir.nodes import Model

HERE = Path(__file__).parent


def emit(model: Model) -> dict[str, str]:
    """Path inside the package -> text."""
    shape = structure(model)
    left_out = {"__init__"} | ({"generate"} if shape.head == "embedding" else set())
    runtime = [file for file in sorted((HERE / "runtime").glob("*.py")) if file.stem not in left_out]
    return {
        **render(model, HERE / "templates", ["__init__", "__main__", "config", "layers", "model", "rope"]),
        **vendor(runtime, shape),
        **vendor(sorted((HERE / "kernels").glob("*.py")), shape, "kernels"),
        # TVM's cache cannot give pages back behind a window: it would lose the tokens' positions.
        **common(shape, "checkpoint", "sequences", "text", EVICTS=False),
        **manifest(model),
    }
