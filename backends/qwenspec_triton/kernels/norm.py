"""RMSNorm, alone and fused with the residual addition before it."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import tl, triton, use_triton

ONE_PLUS = tl.constexpr(True)  # flag: the norm multiplies by 1 + weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last dimension, statistics in float32.

    [not ONE_PLUS] x̂ is rounded to x's dtype, then multiplied by the weight.
    [ONE_PLUS] w = 1 + weight, and the product is taken in float32.

    x: [n, d], contiguous
    weight: [d]
    -> [n, d]
    """
    if not use_triton(x):
        return _rms_norm_torch(x, weight, eps)
    assert x.is_contiguous()
    n, size = x.shape
    out = x.new_empty(n, size)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(n,)](x, weight, out, size, eps, BLOCK=block, num_warps=_num_warps(block))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + residual, rounded to their dtype, and rms_norm(h). Neither argument is changed.

    x, residual: [n, d], contiguous
    weight: [d]
    -> rms_norm(h) [n, d], h [n, d]
    """
    if not use_triton(x):
        h = x + residual
        return _rms_norm_torch(h, weight, eps), h
    assert x.is_contiguous()
    assert residual.is_contiguous()
    n, size = x.shape
    h, out = x.new_empty(n, size), x.new_empty(n, size)
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(n,)](x, residual, weight, h, out, size, eps, BLOCK=block, num_warps=_num_warps(block))
    return out, h


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if ONE_PLUS:
        return F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).to(x.dtype)
    else:
        return F.rms_norm(x, weight.shape, None, eps) * weight


def _num_warps(block: int) -> int:
    """16 values a thread: two 16-byte loads of a 16-bit dtype."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row + column, _normalize(x, weight, size, eps), mask=inside)


@triton.jit
def _add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, h_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    h = (x + residual).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row + column, h, mask=inside)
    tl.store(out_ptr + row + column, _normalize(h, weight, size, eps), mask=inside)


@triton.jit
def _normalize(x, weight, size, eps):
    """x, weight [BLOCK], zero from `size` on -> [BLOCK] in x's dtype."""
    x32 = x.to(tl.float32)
    unit = x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / size + eps)
    if ONE_PLUS:
        scaled = unit * (1.0 + weight.to(tl.float32))
    else:
        scaled = unit.to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    return scaled.to(x.dtype)
