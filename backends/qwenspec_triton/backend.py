"""What the Triton backend tells qwenspec about itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qwenspec.backend.api import Backend, Runner
from qwenspec.diagnostics import Diagnostic
from qwenspec.ir.nodes import Model
from qwenspec_triton.emit import emit


class TritonBackend:
    """PyTorch modules over Triton kernels; on CPU the kernels' PyTorch paths."""

    name = "triton"
    libraries: tuple[str, ...] = ("torch", "triton", "safetensors", "numpy", "tokenizers")

    def unsupported(self, model: Model, quantization: Any | None) -> list[Diagnostic]:
        if quantization is None:
            return []
        return [
            Diagnostic(
                "unsupported",
                f"the triton backend cannot execute quantization {quantization.scheme!r} yet ({model.name})",
                hint="generate from the full-precision checkpoint: leave `quantization` out, or null",
            )
        ]

    def emit(self, model: Model) -> dict[str, str]:
        return emit(model)

    def unavailable(self) -> Diagnostic | None:
        # triton itself is optional at run time: it exists for Linux alone, and only a GPU needs it.
        missing = [name for name in ("torch", "safetensors", "numpy") if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        return Diagnostic(
            "backend-missing",
            f"the triton backend cannot run here: {', '.join(missing)} not installed",
            hint="pip install 'qwenspec[triton]'",
        )

    def devices(self) -> list[str]:
        import torch

        gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        return ["cpu", *gpus]

    def open(self, package: Path, weights: Path, device: str = "cpu", dtype: str | None = None) -> Runner:
        from qwenspec_triton.runner import TritonRunner

        return TritonRunner(package, weights, device, dtype)


BACKEND: Backend = TritonBackend()
