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
    left_out, shared = {"__init__"}, ["checkpoint", "sequences", "stored", "text"]
    if shape.head == "embedding":
        left_out.add("generate")
    else:
        shared.append("generation")
    runtime = [file for file in sorted((HERE / "runtime").glob("*.py")) if file.stem not in left_out]
    if shape.weights or shape.head_weights:
        shared.append("quantized")
    return {
        **render(model, HERE / "templates", ["__init__", "__main__", "config", "layers", "model", "rope"]),
        **vendor(runtime, shape),
        **vendor(sorted((HERE / "kernels").glob("*.py")), shape, "kernels"),
        # TVM's cache cannot give pages back behind a window: it would lose the tokens' positions.
        **common(shape, *shared, EVICTS=False),
        **manifest(model),
    }
