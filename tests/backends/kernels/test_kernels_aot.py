"""Every kernel compiles for every chip, at the sizes of real models, with no spills and within shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from aot import MAX_REGISTERS, SHARED_MEMORY, TARGETS, Launch, assembly, page_addresses, record, resources
from kernel_variants import load

pytestmark = pytest.mark.aot

CACHE = Path(__file__).parents[3] / ".cache" / "triton"
HEADS, KV_HEADS, HEAD_DIM, PAGES, PAGE_SIZE = 32, 8, 128, 1024, 16

# Tiles of 16 query heads are too small for the instructions of a warp group.
TENSOR_CORE_DECODE = dict.fromkeys(("sm_80", "sm_90", "sm_100"), "mma.sync") | {"gfx942": "v_mfma"}
TENSOR_CORE_PREFILL = TENSOR_CORE_DECODE | {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pages(head_dim: int = HEAD_DIM, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return meta(PAGES, PAGE_SIZE, KV_HEADS, head_dim, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def norm(module: ModuleType) -> None:
    module.rms_norm(meta(8, 4096), meta(4096), 1e-6)
    module.add_rms_norm(meta(8, 4096), meta(8, 4096), meta(4096), 1e-6)


def rotate(module: ModuleType, half: int, tables: torch.dtype, *rest: object) -> None:
    tensors = meta(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM), meta(8, half, dtype=tables), meta(8, half, dtype=tables)
    module.rotate_and_cache(*tensors, pages(), pages(), ints(8), *rest)


def decode(module: ModuleType, *window: int, head_dim: int = HEAD_DIM, dtype: torch.dtype = torch.bfloat16) -> None:
    cache = pages(head_dim, dtype)
    module.decode_attention(meta(4, HEADS, head_dim, dtype=dtype), cache, cache, ints(4, 256), ints(4), 0.1, *window)


def prefill(
    module: ModuleType,
    longest: int,
    *rest: object,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    q, cache = meta(2048, HEADS, head_dim, dtype=dtype), pages(head_dim, dtype)
    module.prefill_attention(q, cache, cache, ints(4, 256), ints(5), ints(4), longest, 0.1, *rest)


def launches(target: str) -> Iterator[tuple[str, Launch]]:
    """What each variant launches on a chip."""

    def call(file: str, use: Callable[..., None], *args: object, **flags: bool | str) -> list[Launch]:
        module = load(file, **flags)
        return record(module, target, partial(use, module, *args))

    qkv = {"QK_NORM": False, "ONE_PLUS": False, "LOGN": False, "PARTIAL_ROTARY": False}
    norms = meta(HEAD_DIM), meta(HEAD_DIM), 1e-6
    scale = meta(8, dtype=torch.float32)
    groups = {
        "norm": call("norm", norm, ONE_PLUS=False),
        "silu": call("activation", lambda m: m.act_and_mul(meta(8, 2 * 12288)), ACTIVATION="silu"),
        "gelu": call("activation", lambda m: m.act_and_mul(meta(8, 2 * 12288)), ACTIVATION="gelu"),
        "qkv": call("qkv", rotate, 64, torch.bfloat16, *norms, **qkv | {"QK_NORM": True}),
        "qkv-logn": call("qkv", rotate, 64, torch.float32, scale, **qkv | {"LOGN": True}),
        "qkv-all": call("qkv", rotate, 32, torch.float32, *norms, scale, **dict.fromkeys(qkv, True)),
        "decode": call("decode_attention", decode, SLIDING=False),
        "decode-sliding": call("decode_attention", decode, 4096, SLIDING=True)[:1],
        "decode-float32": call("decode_attention", partial(decode, dtype=torch.float32), SLIDING=False)[:1],
        "decode-256": call("decode_attention", partial(decode, head_dim=256), SLIDING=False)[:1],
        "prefill": call("prefill_attention", prefill, 2048, SLIDING=False),
        "prefill-short": call("prefill_attention", prefill, 64, SLIDING=False),
        "prefill-sliding": call("prefill_attention", prefill, 2048, 4096, SLIDING=True),
        "prefill-tree": call("prefill_attention", prefill, 256, ints(2048, 3), SLIDING=False),
        "prefill-tree-sliding": call("prefill_attention", prefill, 256, 4096, ints(2048, 3), SLIDING=True),
        "prefill-tree-256": call("prefill_attention", partial(prefill, head_dim=256), 64, ints(2048, 3), SLIDING=False),
        "prefill-256": call("prefill_attention", partial(prefill, head_dim=256), 2048, SLIDING=False),
        "prefill-float32": call("prefill_attention", partial(prefill, dtype=torch.float32), 2048, SLIDING=False),
    }
    for name, group in groups.items():
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
        if "float32" not in name and "decode_split" in name:
            assert TENSOR_CORE_DECODE[target] in assembly(compiled), name
        if "float32" not in name and "prefill_kernel" in name:
            assert TENSOR_CORE_PREFILL[target] in assembly(compiled), name
        for line in page_addresses(compiled.asm["ttir"]):
            assert "xi64>" in line, f"{name}: a page's address overflows 32 bits: {line}"
