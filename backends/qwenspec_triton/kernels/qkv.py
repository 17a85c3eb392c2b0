"""What happens between the QKV projection and attention, the write to the paged cache included."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import tl, triton, use_triton
from .quantized_kv import magnitude, quantize, quantize_torch, token_scale, token_scales

QK_NORM = tl.constexpr(True)  # flag: RMSNorm of each query and key head before RoPE
ONE_PLUS = tl.constexpr(True)  # flag: the norm multiplies by 1 + weight
LOGN = tl.constexpr(True)  # flag: queries are scaled by their position after RoPE
PARTIAL_ROTARY = tl.constexpr(True)  # flag: rotary_dim < head_dim
QUANTIZED_KV = tl.constexpr(True)  # flag: what is cached is quantised
TOKEN_SCALES = tl.constexpr(True)  # flag: … with a scale for each token and head
STORED_KV_SCALES = tl.constexpr(True)  # flag: … with the layer's scales


def rotate_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    slots: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    query_scale: Tensor,
) -> Tensor:
    """Rotated queries; rotated keys and the values go to their slots in the cache.

    [QUANTIZED_KV] They are rounded to qkv's dtype and then quantised.

    [QK_NORM] Each query and key head is normalised first, x̂ = x / sqrt(mean(x²) + eps) in float32,
    [QK_NORM and not ONE_PLUS] then rounded to its dtype and multiplied by the weight.
    [QK_NORM and ONE_PLUS] then multiplied by 1 + weight in float32.
    [not PARTIAL_ROTARY] RoPE turns the pairs (i, i + head_dim / 2) of every head, in float32.
    [PARTIAL_ROTARY] RoPE turns the pairs (i, i + rotary_dim / 2) of every head's first rotary_dim values, in
    [PARTIAL_ROTARY] float32; the other values stay as they are.

    qkv: [n, (num_heads + 2 num_kv_heads) head_dim], contiguous: query heads, key heads, value heads
    cos, sin: [n, rotary_dim / 2], any float dtype, contiguous
    k_pages, v_pages: [pages, page_size, num_kv_heads, head_dim], contiguous, written in place
    [TOKEN_SCALES] k_scales, v_scales: [pages, page_size, num_kv_heads] float32, contiguous, written in place
    [STORED_KV_SCALES] k_scales, v_scales: [1] float32, the layer's
    slots: [n] int64, page · page_size + offset, or -1 for a token that is not cached
    [QK_NORM] q_norm_weight, k_norm_weight: [head_dim]
    [LOGN] query_scale: [n] float32, LogN's factor of each query, applied after RoPE
    -> queries [n, num_heads, head_dim], contiguous
    """
    kv_heads, head_dim = k_pages.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if not use_triton(qkv):
        x = qkv.view(-1, heads + 2 * kv_heads, head_dim)
        qk, v = x.split([heads + kv_heads, kv_heads], dim=1)
        if QK_NORM:
            qk = _norm_torch(qk, heads, q_norm_weight, k_norm_weight, eps)
        qk = _rotate_torch(qk.float(), cos.float().unsqueeze(1), sin.float().unsqueeze(1))
        if LOGN:
            qk[:, :heads] *= query_scale.view(-1, 1, 1)
        q, k = qk.to(qkv.dtype).split([heads, kv_heads], dim=1)
        if slots.min() < 0:
            cached = slots >= 0
            slots, k, v = slots[cached], k[cached], v[cached]
        if TOKEN_SCALES:
            k_scale, v_scale = token_scales(k), token_scales(v)
            k_scales.flatten(0, 1).index_copy_(0, slots, k_scale)
            v_scales.flatten(0, 1).index_copy_(0, slots, v_scale)
            k, v = quantize_torch(k, k_scale.unsqueeze(-1)), quantize_torch(v, v_scale.unsqueeze(-1))
        if STORED_KV_SCALES:
            k, v = quantize_torch(k, k_scales), quantize_torch(v, v_scales)
        k_pages.flatten(0, 1).index_copy_(0, slots, k)
        v_pages.flatten(0, 1).index_copy_(0, slots, v)
        return q.contiguous()
    assert qkv.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert k_pages.is_contiguous()
    assert v_pages.is_contiguous()
    n, half = cos.shape
    q = qkv.new_empty(n, heads, head_dim)
    block_heads, block_half = 4, triton.next_power_of_2(half)
    _rotate_and_cache_kernel[(n, triton.cdiv(heads + kv_heads, block_heads))](
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        slots,
        q,
        q_norm_weight,
        k_norm_weight,
        eps,
        query_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half),
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=max(block_heads * block_half // 256, 1),
    )
    return q


def _norm_torch(qk: Tensor, heads: int, q_weight: Tensor, k_weight: Tensor, eps: float) -> Tensor:
    """Query heads with one weight, key heads with the other."""
    unit = F.rms_norm(qk.float() if ONE_PLUS else qk, q_weight.shape, None, eps)
    unit[:, :heads] *= 1.0 + q_weight.float() if ONE_PLUS else q_weight
    unit[:, heads:] *= 1.0 + k_weight.float() if ONE_PLUS else k_weight
    return unit.to(qk.dtype) if ONE_PLUS else unit


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, head_dim], cos and sin [n, 1, rotary_dim / 2], all float32."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    if PARTIAL_ROTARY:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)


@triton.jit
def _rotate_and_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    q_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    query_scale_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Grid (tokens, blocks of query and key heads). A key head takes its value head along."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = head < HEADS
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # The key heads of a token that is not cached are left out.
    cached = (head >= HEADS) & (head < tl.where(slot >= 0, HEADS + KV_HEADS, HEADS))
    source = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM
    q_row = q_ptr + (token * HEADS + head)[:, None] * HEAD_DIM
    cache_row = (slot * KV_HEADS + head - HEADS)[:, None] * HEAD_DIM

    column = tl.arange(0, BLOCK_DIM)[None, :]
    v_mask = cached[:, None] & (column < HEAD_DIM)
    if QUANTIZED_KV:
        v = tl.load(qkv_ptr + source + KV_HEADS * HEAD_DIM + column, mask=v_mask, other=0.0).to(tl.float32)
        if TOKEN_SCALES:
            token_head = slot * KV_HEADS + head - HEADS
            v_scale = token_scale(magnitude(v))
            tl.store(v_scales_ptr + token_head, v_scale, mask=cached)
            v = quantize(v, v_scale[:, None])
        else:
            v = quantize(v, tl.load(v_scales_ptr))
        tl.store(v_pages_ptr + cache_row + column, v, mask=v_mask)
    else:
        v = tl.load(qkv_ptr + source + KV_HEADS * HEAD_DIM + column, mask=v_mask)
        tl.store(v_pages_ptr + cache_row + column, v.to(v_pages_ptr.dtype.element_ty), mask=v_mask)

    i = tl.arange(0, BLOCK_HALF)[None, :]
    needed = (is_q | cached)[:, None]
    first = tl.load(qkv_ptr + source + i, mask=needed & (i < HALF), other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + source + HALF + i, mask=needed & (i < HALF), other=0.0).to(tl.float32)
    if PARTIAL_ROTARY:
        j = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.load(qkv_ptr + source + j, mask=needed & (j < HEAD_DIM), other=0.0).to(tl.float32)
    if QK_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if PARTIAL_ROTARY:
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        first = _scale(first * inverse, q_norm_ptr + i, k_norm_ptr + i, is_q, i < HALF, dtype)
        second = _scale(second * inverse, q_norm_ptr + HALF + i, k_norm_ptr + HALF + i, is_q, i < HALF, dtype)
        if PARTIAL_ROTARY:
            rest = _scale(rest * inverse, q_norm_ptr + j, k_norm_ptr + j, is_q, j < HEAD_DIM, dtype)

    cos = tl.load(cos_ptr + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    if LOGN:
        # Keys of the same block are not scaled.
        query_scale = tl.where(is_q, tl.load(query_scale_ptr + token), 1.0)[:, None]
        turned_first *= query_scale
        turned_second *= query_scale
        if PARTIAL_ROTARY:
            rest *= query_scale

    k_row = k_pages_ptr + cache_row
    if QUANTIZED_KV:
        rounded: tl.constexpr = q_ptr.dtype.element_ty
        turned_first = turned_first.to(rounded).to(tl.float32)
        turned_second = turned_second.to(rounded).to(tl.float32)
        if PARTIAL_ROTARY:
            rest = rest.to(rounded).to(tl.float32)
    if TOKEN_SCALES:
        largest = tl.maximum(magnitude(turned_first), magnitude(turned_second))
        if PARTIAL_ROTARY:
            largest = tl.maximum(largest, magnitude(rest))
        k_scale = token_scale(largest)
        tl.store(k_scales_ptr + token_head, k_scale, mask=cached)
        k_scale = k_scale[:, None]
    if STORED_KV_SCALES:
        k_scale = tl.load(k_scales_ptr)
    _store(q_row + i, k_row + i, turned_first, k_scale, is_q, cached, i < HALF)
    _store(q_row + HALF + i, k_row + HALF + i, turned_second, k_scale, is_q, cached, i < HALF)
    if PARTIAL_ROTARY:
        _store(q_row + j, k_row + j, rest, k_scale, is_q, cached, j < HEAD_DIM)


@triton.jit
def _scale(unit, q_weight_ptr, k_weight_ptr, is_q, inside, dtype: tl.constexpr):
    """unit [BLOCK_HEADS, columns] float32 times the weight of its kind of head, rounded as a norm is."""
    q_weight = tl.load(q_weight_ptr, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight, k_weight)
    scaled = unit * (1.0 + weight) if ONE_PLUS else unit.to(dtype).to(tl.float32) * weight
    return scaled.to(dtype).to(tl.float32)


@triton.jit
def _store(q_ptr, k_ptr, x, k_scale, is_q, is_k, inside):
    """Rows of x to the query or the key cache."""
    tl.store(q_ptr, x.to(q_ptr.dtype.element_ty), mask=is_q[:, None] & inside)
    if QUANTIZED_KV:
        tl.store(k_ptr, quantize(x, k_scale), mask=is_k[:, None] & inside)
    else:
        tl.store(k_ptr, x.to(k_ptr.dtype.element_ty), mask=is_k[:, None] & inside)
