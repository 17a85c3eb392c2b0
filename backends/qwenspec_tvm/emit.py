"""IR -> the files of a TVM package."""

from __future__ import annotations

from pathlib import Path

from qwenspec.backend.package import common, manifest, render, vendor
from qwenspec.backend.structure import Structure, structure
from qwenspec.ir.nodes import Fp8Format, Model

HERE = Path(__file__).parent


def emit(model: Model) -> dict[str, str]:
    """Path inside the package -> text."""
    shape = structure(model)
    left_out = {"__init__"}
    shared = ["checkpoint", "checks", "console", "machine", "ranks", "sequences", "stored", "text", "tokenizer"]
    if shape.head != "embedding":
        shared += ["answers", "chat", "conversation", "detokenizer", "generation"]
    else:
        left_out.add("generate")
    runtime = [file for file in sorted((HERE / "runtime").glob("*.py")) if file.stem not in left_out]
    quantized = shape.weights or shape.head_weights
    if quantized:
        shared.append("quantized")
    kernels = [
        file
        for file in sorted((HERE / "kernels").glob("*.py"))
        if (quantized or not file.stem.startswith("quantized"))
        and (shape.kv_cache or not file.stem.startswith("kv_"))
        and (isinstance(shape.weights, Fp8Format) or _has_fp8_cache(shape) or file.stem != "e4m3")
    ]
    return {
        **render(model, HERE / "templates", ["__init__", "__main__", "config", "layers", "model", "rope"]),
        **vendor(runtime, shape),
        **vendor(kernels, shape, "kernels"),
        # TVM's cache cannot give pages back behind a window: it would lose the tokens' positions.
        **common(shape, *shared, EVICTS=False, GPU_TENSORS=False),
        **manifest(model),
    }


def _has_fp8_cache(shape: Structure) -> bool:
    return shape.kv_cache is not None and shape.kv_cache.dtype == "fp8_e4m3"
