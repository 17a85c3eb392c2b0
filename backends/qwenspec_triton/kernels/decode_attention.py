"""Attention of one new token a sequence over its paged keys and values (flash-decoding).

Each sequence's keys are split among several programs, so that a small batch fills the GPU; a second kernel
joins the parts. The query heads that share a KV head are one tile, so that keys and values are read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import architecture, num_processors, tl, triton, use_triton
from .paged import sequence_kv
from .quantized_kv import UNIT, attend, numbers, read_sequence

SLIDING = tl.constexpr(True)  # flag: some layer has a sliding window
QUANTIZED_KV = tl.constexpr(True)  # flag: what is cached is quantised
TOKEN_SCALES = tl.constexpr(True)  # flag: … with a scale for each token and head
STORED_KV_SCALES = tl.constexpr(True)  # flag: … with the layer's scales

MAX_SPLITS = 64


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """softmax(scale · q Kᵀ) V of the last token of each sequence, in float32.

    Launches depend on shapes alone, never on the tensors' contents, so a CUDA graph can capture them.

    q: [b, num_heads, head_dim], contiguous
    k_pages, v_pages: [pages, page_size, num_kv_heads, head_dim], contiguous; the new token is already there
    [TOKEN_SCALES] k_scales, v_scales: [pages, page_size, num_kv_heads] float32, contiguous
    [STORED_KV_SCALES] k_scales, v_scales: [1] float32, the layer's
    block_tables: [b, max_blocks] int, each sequence's page numbers, contiguous
    kv_lens: [b] int, tokens of each sequence, the new one included; 0 for a row of padding, whose output is 0
    scale: of the scores, usually 1 / sqrt(head_dim)
    [SLIDING] window: how many of the last tokens are seen, or None for all
    -> [b, num_heads · head_dim]
    """
    b, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    max_len = block_tables.shape[1] * page_size
    if SLIDING:
        seen = max_len if window is None else min(window, max_len)
    if not use_triton(q):
        return _decode_attention_torch(q, k_pages, v_pages, k_scales, v_scales, block_tables, kv_lens, scale, seen)
    for tensor in (q, k_pages, v_pages, block_tables):
        assert tensor.is_contiguous()
    block_dim = triton.next_power_of_2(head_dim)
    block_n = 64 if block_dim * q.element_size() <= 256 else 32
    if QUANTIZED_KV and architecture(q.device).startswith("gfx"):
        block_n = 32  # bytes are converted in registers
    blocks = triton.cdiv(seen if SLIDING else max_len, block_n)
    splits = _num_splits(b * kv_heads, blocks, num_processors(q.device))
    out = q.new_empty(b, heads * head_dim)
    parts = q.new_empty(b * heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(b * heads, splits, dtype=torch.float32)
    _decode_split_kernel[(b, kv_heads, splits)](
        q,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        block_tables,
        kv_lens,
        parts if splits > 1 else out,
        lse,
        scale,
        block_tables.shape[1],
        seen,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        SPLITS=splits,
        BLOCK_GROUP=max(triton.next_power_of_2(heads // kv_heads), 16),  # tl.dot's least
        BLOCK_DIM=block_dim,
        BLOCK_N=block_n,
        num_warps=8 if q.dtype == torch.float32 else 4,
        num_stages=1
        if QUANTIZED_KV and q.dtype == torch.float32
        else 2
        if architecture(q.device).startswith("gfx")
        else 3,
    )
    if splits > 1:
        _decode_join_kernel[(b * heads,)](
            parts,
            lse,
            out,
            HEAD_DIM=head_dim,
            SPLITS=splits,
            BLOCK_DIM=block_dim,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out


def _num_splits(programs: int, blocks: int, processors: int) -> int:
    """Two programs a processor, and no more splits than blocks of keys in the longest sequence."""
    return max(1, min(-(-2 * processors // programs), blocks, MAX_SPLITS))


def _decode_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    if not QUANTIZED_KV:
        kv_heads = k_pages.shape[2]
    out = torch.zeros_like(q)
    for i, length in enumerate(kv_lens.tolist()):
        if length == 0:
            continue
        start = max(length - window, 0) if SLIDING else 0
        if QUANTIZED_KV:
            kv = read_sequence(k_pages, v_pages, k_scales, v_scales, block_tables[i], start, length)
            attended = attend(q[i : i + 1], kv, scale)
        else:
            k, v = sequence_kv(k_pages, v_pages, block_tables[i], start, length)
            # The query heads of a group take the place of query positions: each KV head is read once.
            group = q[i].view(1, kv_heads, -1, q.shape[-1])
            attended = F.scaled_dot_product_attention(group, k.unsqueeze(0), v.unsqueeze(0), scale=scale)
        out[i] = attended.reshape(q.shape[1:])
    return out.flatten(1)


@triton.jit
def _decode_split_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_tables_ptr,
    kv_lens_ptr,
    out_ptr,
    lse_ptr,
    scale,
    max_blocks,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (sequences, KV heads, splits). Writes each split's normalised output and the log2 of its sum."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    kv_len = tl.load(kv_lens_ptr + sequence).to(tl.int32)
    if SLIDING:
        first = tl.maximum(kv_len - window, 0) // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(kv_len - first if SLIDING else kv_len, BLOCK_N), SPLITS) * BLOCK_N
    start = first + split * per_split if SLIDING else split * per_split
    stop = tl.minimum(start + per_split, kv_len)

    g = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    n = tl.arange(0, BLOCK_N)
    row = (sequence * kv_heads + kv_head) * GROUP + g
    mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    if STORED_KV_SCALES:
        scale *= tl.load(k_scales_ptr) * UNIT
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * max_blocks
    # A finite start keeps exp2(peak - new_peak) from becoming NaN before the first key.
    peak = tl.full([BLOCK_GROUP], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for block in range(start, stop, BLOCK_N):
        position = block + n
        visible = position < stop
        if SLIDING:
            visible = visible & (position >= kv_len - window)
        # Keys and values that are not visible are not loaded: unused pages may hold NaN, and 0 · NaN is NaN.
        page = tl.load(table_ptr + position // PAGE_SIZE, mask=visible, other=0).to(tl.int64)
        offset = ((page * PAGE_SIZE + position % PAGE_SIZE) * kv_heads + kv_head) * HEAD_DIM
        kv_mask = visible[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_pages_ptr + offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_pages_ptr + offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        if QUANTIZED_KV:
            k, v = numbers(k, q.dtype), numbers(v, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        if TOKEN_SCALES:
            token_head = (page * PAGE_SIZE + position % PAGE_SIZE) * kv_heads + kv_head
            scores *= tl.load(k_scales_ptr + token_head, mask=visible, other=0.0)[None, :] * UNIT
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        if TOKEN_SCALES:
            weights *= tl.load(v_scales_ptr + token_head, mask=visible, other=0.0)[None, :] * UNIT
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = new_peak

    if STORED_KV_SCALES:
        acc *= tl.load(v_scales_ptr) * UNIT
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    part = row * SPLITS + split
    tl.store(out_ptr + part[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        tl.store(lse_ptr + part, tl.where(total > 0, peak + tl.log2(total), -float("inf")), mask=g < GROUP)


@triton.jit
def _decode_join_kernel(
    parts_ptr,
    lse_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Grid (sequences · query heads). The mean of the splits' outputs, weighted with their sums."""
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_DIM)
    lse = tl.load(lse_ptr + row * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1.0e30))  # all 0 for a row of padding
    mask = (weights > 0)[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + (row * SPLITS + s)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
