"""Which path runs: a Triton kernel on a GPU and in Triton's interpreter, plain PyTorch everywhere else."""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

__all__ = ["architecture", "num_processors", "tl", "triton", "use_triton"]

try:
    import triton
    import triton.language as tl

    INTERPRET: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read when triton is imported
except ImportError:  # a platform without Triton: its kernels are defined all the same, and never launched
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)
    INTERPRET = False


def use_triton(x: Tensor) -> bool:
    """Whether kernels can run on x."""
    return x.is_cuda or INTERPRET


@cache
def architecture(device: torch.device) -> str:
    """The chip kernels are configured for: sm_90, gfx942, …"""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@cache
def num_processors(device: torch.device) -> int:
    """The chip's streaming multiprocessors; the interpreter's programs run one after the other on any number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
