"""What the TVM backend tells qwenspec about itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qwenspec.backend.api import Backend, Runner
from qwenspec.diagnostics import Diagnostic
from qwenspec.ir.nodes import Model
from qwenspec_tvm.emit import emit


class TvmBackend:
    """Relax modules over TVM's paged KV cache; on CPU with scheduled TIR kernels."""

    name = "tvm"
    libraries: tuple[str, ...] = ("apache-tvm", "safetensors", "numpy", "tokenizers")

    def unsupported(self, model: Model, quantization: Any | None) -> list[Diagnostic]:
        if quantization is None:
            return []
        return [
            Diagnostic(
                "unsupported",
                f"the tvm backend cannot execute quantization {quantization.scheme!r} yet ({model.name})",
                hint="generate from the full-precision checkpoint: leave `quantization` out, or null",
            )
        ]

    def emit(self, model: Model) -> dict[str, str]:
        return emit(model)

    def unavailable(self) -> Diagnostic | None:
        missing = [name for name in ("tvm", "safetensors", "numpy") if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        return Diagnostic(
            "backend-missing",
            f"the tvm backend cannot run here: {', '.join(missing)} not installed",
            hint="pip install 'qwenspec[tvm]'",
        )

    def devices(self) -> list[str]:
        import tvm

        gpus: list[str] = []
        while (gpu := tvm.cuda(len(gpus))).exist:
            gpus.append(f"cuda:{len(gpus)} {gpu.device_name}")
        return ["cpu", *gpus]

    def open(self, package: Path, weights: Path, device: str = "cpu", dtype: str | None = None) -> Runner:
        from qwenspec_tvm.runner import TvmRunner

        return TvmRunner(package, weights, device, dtype)


BACKEND: Backend = TvmBackend()
