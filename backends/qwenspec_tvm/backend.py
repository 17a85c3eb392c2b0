"""What the TVM backend tells qwenspec about itself."""

from __future__ import annotations

from pathlib import Path

from qwenspec.backend.adapter import PackageBackend
from qwenspec.backend.api import Backend, Runner
from qwenspec.ir.nodes import Model
from qwenspec_tvm.emit import emit


class TvmBackend(PackageBackend):
    """Relax modules over TVM's paged KV cache; on CPU with scheduled TIR kernels."""

    name = "tvm"
    libraries: tuple[str, ...] = ("apache-tvm", "safetensors", "numpy", "tokenizers")
    modules: tuple[str, ...] = ("tvm", "safetensors", "numpy")

    def emit(self, model: Model) -> dict[str, str]:
        return emit(model)

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
