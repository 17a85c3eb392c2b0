"""Which path runs: a Triton kernel on a GPU and in Triton's interpreter, plain PyTorch everywhere else."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

triton: Any
tl: Any
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
