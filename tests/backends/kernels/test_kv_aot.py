"""The kernels of quantised KV caches compile for every chip, with no spills and within shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from aot import MAX_REGISTERS, SHARED_MEMORY, TARGETS, Launch, assembly, page_addresses, record, resources
from kernel_variants import load
from kv_checks import KV
from test_kernels_aot import (
    CACHE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE_SIZE,
    PAGES,
    TENSOR_CORE_DECODE,
    TENSOR_CORE_PREFILL,
    ints,
    meta,
)

pytestmark = pytest.mark.aot

BF16, F32 = torch.bfloat16, torch.float32


def cache(kv: str, head_dim: int) -> list[torch.Tensor]:
    pages = meta(PAGES, PAGE_SIZE, KV_HEADS, head_dim, dtype=torch.int8 if kv == "int8" else torch.uint8)
    scales = meta(1, dtype=F32) if kv == "fp8_stored" else meta(PAGES, PAGE_SIZE, KV_HEADS, dtype=F32)
    return [pages, pages, scales, scales]


def rotate(target: str, kv: str, half: int, tables: torch.dtype, *rest: object, **flags: bool) -> list[Launch]:
    module = load("qkv", kv, **dict.fromkeys(("QK_NORM", "ONE_PLUS", "LOGN", "PARTIAL_ROTARY"), False) | flags)
    tensors = meta(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM), meta(8, half, dtype=tables), meta(8, half, dtype=tables)
    return record(module, target, lambda: module.rotate_and_cache(*tensors, *cache(kv, HEAD_DIM), ints(8), *rest))


def decode(target: str, kv: str, *window: int, head_dim: int = HEAD_DIM, dtype: torch.dtype = BF16) -> list[Launch]:
    module = load("decode_attention", kv, SLIDING=bool(window))
    q, rest = meta(4, HEADS, head_dim, dtype=dtype), (ints(4, 256), ints(4), 0.1)
    return record(module, target, lambda: module.decode_attention(q, *cache(kv, head_dim), *rest, *window))[:1]


def prefill(
    target: str,
    kv: str,
    longest: int,
    *window: int,
    tree: bool = False,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = BF16,
) -> list[Launch]:
    module = load("prefill_attention", kv, SLIDING=bool(window))
    q, trees = meta(2048, HEADS, head_dim, dtype=dtype), [ints(2048, 3)] if tree else []
    rest = ints(4, 256), ints(5), ints(4), longest, 0.1, *window, *trees
    return record(module, target, lambda: module.prefill_attention(q, *cache(kv, head_dim), *rest))


def launches(target: str, kv: str) -> Iterator[tuple[str, Launch]]:
    """What each variant launches on a chip."""
    norms, scale = (meta(HEAD_DIM), meta(HEAD_DIM), 1e-6), meta(8, dtype=F32)
    every = dict.fromkeys(("QK_NORM", "ONE_PLUS", "LOGN", "PARTIAL_ROTARY"), True)
    rotating, decoding, prefilling = (partial(use, target, kv) for use in (rotate, decode, prefill))
    groups = {
        "qkv": rotating(64, BF16, *norms, QK_NORM=True),
        "qkv-all": rotating(32, F32, *norms, scale, **every),
        "decode": decoding(),
        "decode-sliding": decoding(4096),
        "decode-float32": decoding(dtype=F32),
        "decode-256": decoding(head_dim=256),
        "prefill": prefilling(2048),
        "prefill-short": prefilling(64),
        "prefill-sliding": prefilling(2048, 4096),
        "prefill-tree": prefilling(256, tree=True),
        "prefill-tree-sliding": prefilling(256, 4096, tree=True),
        "prefill-tree-256": prefilling(64, tree=True, head_dim=256),
        "prefill-256": prefilling(2048, head_dim=256),
        "prefill-float32": prefilling(2048, dtype=F32),
    }
    for name, group in groups.items():
        for launch in group:
            yield f"{kv} {name}{launch.kernel.__name__}", launch


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # a default that is about to change


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kv", KV)
def test_kernels_fit_the_chip(kv: str, target: str) -> None:
    for name, launch in launches(target, kv):
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
            assert "xi64>" in line, f"{name}: an address overflows 32 bits: {line}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_division_and_small_numbers_are_exact(target: str) -> None:
    """Nothing is rounded otherwise than IEEE 754 does it: bytes are the same on every chip."""
    (launch,) = rotate(target, "fp8", 64, BF16)
    text = assembly(launch.compile(target))
    assert "div.rn.f32" in text
    assert "div.full" not in text
    assert "mul.ftz" not in assembly(decode(target, "fp8")[0].compile(target))
