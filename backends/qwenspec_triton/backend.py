"""What the Triton backend tells qwenspec about itself."""

from __future__ import annotations

from pathlib import Path

from qwenspec.backend.adapter import PackageBackend
from qwenspec.backend.api import Backend, Runner
from qwenspec.ir.nodes import Model
from qwenspec_triton.emit import emit


class TritonBackend(PackageBackend):
    """PyTorch modules over Triton kernels; on CPU the kernels' PyTorch paths."""

    name = "triton"
    libraries: tuple[str, ...] = ("torch", "triton", "safetensors", "numpy", "tokenizers")
    # triton itself is optional at run time: it exists for Linux alone, and only a GPU needs it.
    modules: tuple[str, ...] = ("torch", "safetensors", "numpy")

    def emit(self, model: Model) -> dict[str, str]:
        return emit(model)

    def devices(self) -> list[str]:
        import torch

        gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        return ["cpu", *gpus]

    def open(self, package: Path, weights: Path, device: str = "cpu", dtype: str | None = None) -> Runner:
        from qwenspec_triton.runner import TritonRunner

        return TritonRunner(package, weights, device, dtype)


BACKEND: Backend = TritonBackend()
