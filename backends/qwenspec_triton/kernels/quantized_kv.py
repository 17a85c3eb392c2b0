"""Keys and values as bytes.

[KV_DTYPE == "int8"] x̂ = q · s, where s is a token's and head's: its largest magnitude over 127.
[TOKEN_SCALES and KV_DTYPE == "fp8_e4m3"] x̂ = q · s, with q in e4m3, where s is a token's and head's: its largest
[TOKEN_SCALES and KV_DTYPE == "fp8_e4m3"] magnitude over 448.
[STORED_KV_SCALES] x̂ = q · s, with q in e4m3, where s is a layer's for keys or for values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import tl, triton
from .e4m3 import decode, decode_torch, decode_with_nan_torch, encode, encode_torch
from .paged import sequence_kv

KV_DTYPE = tl.constexpr("fp8_e4m3")  # flag: or int8, of what is cached
TOKEN_SCALES = tl.constexpr(True)  # flag: each token and head has a scale
STORED_KV_SCALES = tl.constexpr(True)  # flag: a layer has two, from the checkpoint

# What kernels read numbers in: a scale times it is about as large as what it scales, and so is fit for float16.
UNIT = tl.constexpr(256.0 if KV_DTYPE == "fp8_e4m3" else 64.0)


def quantize_torch(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, float32, as bytes. Ties are rounded to even.

    [TOKEN_SCALES] 0 where the scale is 0.
    """
    unit = x.float() / scale
    if TOKEN_SCALES:
        unit = torch.where(scale > 0, unit, 0.0)
    if KV_DTYPE == "fp8_e4m3":
        return encode_torch(unit)
    return unit.clamp(-127, 127).round().to(torch.int8)


if TOKEN_SCALES:

    def token_scales(x: Tensor) -> Tensor:
        """x [n, num_kv_heads, head_dim] -> float32 [n, num_kv_heads]."""
        largest = x.float().abs().amax(-1)
        return largest / 448 if KV_DTYPE == "fp8_e4m3" else largest / 127


class SequenceKv(NamedTuple):
    """Keys and values of one sequence's tokens as numbers, and what to multiply these with.

    k, v: [num_kv_heads, tokens, head_dim] float32
    [TOKEN_SCALES] k_scale, v_scale: [num_kv_heads, 1, tokens] float32
    [STORED_KV_SCALES] k_scale, v_scale: [1] float32
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor


def read_sequence(
    k_pages: Tensor, v_pages: Tensor, k_scales: Tensor, v_scales: Tensor, table: Tensor, start: int, stop: int
) -> SequenceKv:
    """Tokens start … stop - 1, from the cache as attention takes it and the sequence's page numbers."""
    k, v = sequence_kv(k_pages, v_pages, table, start, stop)
    if TOKEN_SCALES:
        k_scales, v_scales = (s.unsqueeze(1) for s in sequence_kv(k_scales, v_scales, table, start, stop))
    if STORED_KV_SCALES:
        return SequenceKv(decode_with_nan_torch(k), decode_with_nan_torch(v), 256 * k_scales, 256 * v_scales)
    elif KV_DTYPE == "fp8_e4m3":
        return SequenceKv(decode_torch(k), decode_torch(v), 256 * k_scales, 256 * v_scales)
    else:
        return SequenceKv(k.float(), v.float(), k_scales, v_scales)


def attend(q: Tensor, kv: SequenceKv, scale: float, tokens: slice = slice(None), mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q Kᵀ) V over some of the tokens, in float32.

    q: [m, num_heads, head_dim]
    mask: [m, tokens] bool, which of them a query sees; None for all
    -> [m, num_heads, head_dim] float32
    """
    m, heads, head_dim = q.shape
    k, v, k_scale, v_scale = kv.k[:, tokens], kv.v[:, tokens], kv.k_scale, kv.v_scale
    if TOKEN_SCALES:
        k_scale, v_scale = k_scale[:, :, tokens], v_scale[:, :, tokens]
    # The query heads that share a KV head take the place of more queries: it is read once.
    scores = q.float().transpose(0, 1).reshape(len(k), -1, head_dim) @ k.mT * (scale * k_scale)
    if mask is not None:
        scores.unflatten(1, (-1, m)).masked_fill_(~mask, -torch.inf)
    out = (scores.softmax(-1) * v_scale) @ v
    return out.view(heads, m, head_dim).transpose(0, 1)


@triton.jit
def quantize(x, scale):
    """x / scale, float32, as bytes. Ties are rounded to even.

    [TOKEN_SCALES] 0 where the scale is 0.
    """
    unit = tl.div_rn(x, scale)
    if TOKEN_SCALES:
        unit = tl.where(scale > 0, unit, 0.0)
    if KV_DTYPE == "fp8_e4m3":
        return encode(unit)
    else:
        # The last bit of 1.5 · 2^23 is 1: the sum is rounded to integers, and its last byte is theirs.
        return (tl.minimum(tl.maximum(unit, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


if TOKEN_SCALES:

    @triton.jit
    def magnitude(x):
        """The largest of each row of float32, as bits: they are in the numbers' order, and NaN is above all."""
        return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)

    @triton.jit
    def token_scale(magnitude):
        """float32, of its head's `magnitude`."""
        return tl.div_rn(magnitude.to(tl.float32, bitcast=True), 448.0 if KV_DTYPE == "fp8_e4m3" else 127.0)


@triton.jit
def numbers(codes, dtype: tl.constexpr):
    """Bytes as numbers in UNIT, which every dtype holds exactly."""
    if STORED_KV_SCALES:
        x = decode(codes)
        return tl.where(tl.abs(x) > 1.75, float("nan"), x).to(dtype)
    elif KV_DTYPE == "fp8_e4m3":
        return decode(codes).to(dtype)
    else:
        # Added to the mantissa of 2^17, whose last bit is 2^-6: faster than a conversion to float16.
        return ((codes.to(tl.int32) + 0x48000080).to(tl.float32, bitcast=True) - 131074.0).to(dtype)
