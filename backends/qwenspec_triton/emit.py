"""IR -> the files of a PyTorch/Triton package."""

from __future__ import annotations

from pathlib import Path

from qwenspec.backend.package import common, manifest, render, vendor
from qwenspec.backend.structure import structure
from qwenspec.ir.nodes import Model

HERE = Path(__file__).parent


def emit(model: Model) -> dict[str, str]:
    """Path inside the package -> text."""
    shape = structure(model)
    runtime, shared = ["cache", "graphs", "weights"], ["checkpoint", "sequences", "stored", "text"]
    if shape.head != "embedding":
        runtime.append("generate")
        shared.append("generation")
    if shape.weights or shape.head_weights:
        shared.append("quantized")
    return {
        **render(model, HERE / "templates", ["__init__", "__main__", "config", "layers", "model", "rope"]),
        **vendor((HERE / "runtime" / f"{name}.py" for name in runtime), shape),
        **vendor(sorted((HERE / "kernels").glob("*.py")), shape, "kernels"),
        **common(shape, *shared),
        **manifest(model),
    }
