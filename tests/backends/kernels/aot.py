"""Ahead-of-time compilation without a GPU, and what the compiled kernel takes of the chip.

What is compiled is what would run: a kernel file's Python function is called with tensors that have no data, and
the launches it asks for are recorded, with their argument types, constants, warps and stages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # a program's, bytes
MAX_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}  # a thread's
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def source(self) -> ASTSource:
        """With the specialisation that a launch gets: tensors and multiples of 16 are aligned, 1 is a constant."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.args, strict=False)) | {k: v for k, v in self.kwargs.items() if k in names}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        constants |= {name for name, value in values.items() if value is None or (type(value) is int and value == 1)}
        signature, attributes = {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if name in constants:
                signature[name] = "constexpr"
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*{_TYPES[value.dtype]}" if is_tensor else "i32" if isinstance(value, int) else "fp32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): values[name] for name in constants},
            attrs=attributes,
        )

    def compile(self, target: str) -> Any:
        options = {k: v for k, v in self.kwargs.items() if k in ("num_warps", "num_stages")}
        return triton.compile(self.source(), target=TARGETS[target], options=options)


def record(module: ModuleType, target: str, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` asks for on a chip. It uses the module, with tensors on the meta device."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    chip = {
        "use_triton": lambda x: True,
        "architecture": lambda device: target,
        "num_processors": lambda device: 132,
    }
    present = {name: value for name, value in chip.items() if hasattr(module, name)}
    with mock.patch("triton.runtime.jit.JITFunction.run", run), mock.patch.multiple(module, **present):
        call()
    return launches


def assembly(compiled: Any) -> str:
    text: str = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    return text


def page_addresses(ttir: str) -> list[str]:
    """The first additions to the base addresses of a cache's pages and scales."""
    bases = re.findall(r"(%\S+) = tt\.splat %[kv]_(?:pages|scales)_ptr", ttir)
    found = [line for line in ttir.splitlines() if any(f"tt.addptr {base}," in line for base in bases)]
    assert len(found) >= len(bases)
    assert bool(bases) == ("_pages_ptr" in ttir)
    return found


@dataclass(frozen=True)
class Resources:
    registers: int  # a thread's
    spilled: int  # bytes of a thread's stack on NVIDIA, registers on AMD
    shared: int  # bytes a program


def resources(compiled: Any, target: str) -> Resources:
    if TARGETS[target].backend == "hip":
        assembly = compiled.asm["amdgcn"]
        vector, spilled_vector, spilled_scalar = (
            int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        )
        return Resources(vector, spilled_vector + spilled_scalar, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return Resources(registers, stack, compiled.metadata.shared)
