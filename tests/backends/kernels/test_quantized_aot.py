"""The kernels of products with quantised matrices compile for every chip, with no spills and within shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aot import MAX_REGISTERS, SHARED_MEMORY, TARGETS, Launch, record, resources
from kernel_variants import fp8_flags, fp8_matrices, load

pytestmark = pytest.mark.aot

CACHE = Path(__file__).parents[3] / ".cache" / "triton"
IN, OUT = 4096, 6144
ROWS = {"matvec": 1, "batch": 8, "short": 64, "prefill": 2048}
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
FP8_TENSOR_CORE = {"sm_90": "e4m3.e4m3", "sm_100": "kind::f8f6f4"}
BYTE_LOAD = dict.fromkeys(TARGETS, "ld.global.b8") | {"gfx942": "global_load_ubyte"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int_launches(
    target: str, rows: int, dtype: torch.dtype, bits: int, group_size: int | None, zero_points: bool
) -> list[Launch]:
    flags = {"GROUPS": group_size is not None, "ZERO_POINTS": zero_points, "ACT_ORDER": False}
    module = load("int_linear", BITS=str(bits), **flags, BIAS=True)
    matrix = load("int_matrix", BITS=str(bits), **flags, LOOKUP=False).IntMatrix
    weight = matrix(OUT, IN, group_size) if group_size else matrix(OUT, IN)
    weight.qweight = meta(OUT, weight.groups * weight.width, dtype=torch.uint8)
    weight.scales = meta(OUT, weight.groups, dtype=torch.float16 if group_size else torch.float32)
    weight.zeros = meta(OUT, weight.groups, dtype=torch.uint8)
    return record(module, target, lambda: module.int_linear(meta(rows, IN, dtype=dtype), weight, meta(OUT)))


def fp8_launches(target: str, rows: int, dtype: torch.dtype, activations: str, blocks: bool = True) -> list[Launch]:
    flags = fp8_flags(activations, (128, 128) if blocks else None)
    module = load("fp8_linear", **flags, BIAS=True)
    weight = fp8_matrices(flags).Fp8Matrix(OUT, IN, *([(128, 128)] if blocks else []))
    weight.qweight = meta(OUT, IN, dtype=torch.uint8)
    weight.scales = meta(*((OUT // 128, IN // 128) if blocks else (OUT, 1)), dtype=torch.float32)
    weight.input_scale = meta(1, dtype=torch.float32)
    return record(module, target, lambda: module.fp8_linear(meta(rows, IN, dtype=dtype), weight, meta(OUT)))


def launches(target: str) -> Iterator[tuple[str, Launch]]:
    """What each variant launches on a chip."""
    cases: dict[str, list[Launch]] = {}
    for size, rows in ROWS.items():
        for dtype in (torch.bfloat16, torch.float32) if rows in (1, 64) else (torch.bfloat16,):
            name = f"{size}-{str(dtype).removeprefix('torch.')}"
            cases[f"int4-{name}"] = int_launches(target, rows, dtype, 4, 32, False)
            cases[f"awq-{name}"] = int_launches(target, rows, dtype, 4, 128, True)
            cases[f"int8-{name}"] = int_launches(target, rows, dtype, 8, None, False)
            cases[f"gptq8-{name}"] = int_launches(target, rows, dtype, 8, 128, True)
            cases[f"fp8-{name}"] = fp8_launches(target, rows, dtype, "dynamic")
            cases[f"fp8 weights-{name}"] = fp8_launches(target, rows, dtype, "none")
            cases[f"fp8 rows-{name}"] = fp8_launches(target, rows, dtype, "dynamic", blocks=False)
            cases[f"fp8 static-{name}"] = fp8_launches(target, rows, dtype, "static", blocks=False)
    for name, group in cases.items():
        for launch in group:
            yield f"{name}{launch.kernel.__name__}", launch


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # a default that is about to change


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_the_chip(target: str) -> None:
    for name, launch in launches(target):
        compiled = launch.compile(target)
        used = resources(compiled, target)
        assert used.spilled == 0, f"{name}: {used}"
        assert used.registers <= MAX_REGISTERS[target], f"{name}: {used}"
        assert used.shared <= SHARED_MEMORY[target], f"{name}: {used}"
        code: str = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
        if name.endswith("matvec_kernel") and not name.startswith(("awq", "gptq8")):  # whose zero points are bytes
            assert BYTE_LOAD[target] not in code, f"{name} reads weights byte by byte"
        if name.endswith("matmul_kernel") and "prefill" in name:
            assert TENSOR_CORE[target] in code, name
            if name.startswith("fp8-"):
                assert FP8_TENSOR_CORE.get(target, "") in code, f"{name} does not multiply float8"
