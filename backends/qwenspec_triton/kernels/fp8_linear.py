"""Products with float8 e4m3 matrices, which are never dequantised in memory as a whole.

[not ROUNDED_ACTIVATIONS] Kernels multiply by the numbers themselves, which any dtype holds exactly, and scale each
[not ROUNDED_ACTIVATIONS] block's sum in float32.
[ROUNDED_ACTIVATIONS and not ROW_SCALES] Activations are rounded to e4m3 as well, in groups of a block's inputs.
[ROUNDED_ACTIVATIONS and ROW_SCALES] Activations are rounded to e4m3 as well.
[ROUNDED_ACTIVATIONS] GPUs that multiply float8 do so; others multiply the same numbers in a wider dtype. Sums are
[ROUNDED_ACTIVATIONS] scaled in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import architecture, tl, triton, use_triton
from .e4m3 import decode, decode_torch, encode, encode_torch
from .fp8_matrix import Fp8Matrix

ROUNDED_ACTIVATIONS = tl.constexpr(True)  # flag: activations are rounded to e4m3 too
STATIC_ACTIVATIONS = tl.constexpr(True)  # flag: … with a scale that the checkpoint has
ROW_SCALES = tl.constexpr(True)  # flag: weights have a scale a row
BIAS = tl.constexpr(True)  # flag: some products have a bias

MATVEC_ROWS = 4  # outputs of a program
if ROW_SCALES:
    DECODED_ROWS = 256  # that a CPU has as float32 at once


def fp8_linear(x: Tensor, weight: Fp8Matrix, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ, accumulated in float32 and rounded once.

    x: [n, in], contiguous
    weight: [out, in]
    [BIAS] bias: [out], added before the rounding
    -> [n, out]
    """
    if not use_triton(x):
        return _fp8_linear_torch(x, weight, bias)
    assert x.is_contiguous()
    out = x.new_empty(len(x), weight.out_features)
    if ROUNDED_ACTIVATIONS:
        if STATIC_ACTIVATIONS:
            x, x_scales = scale_activations(x, weight.input_scale)
        else:
            x, x_scales = quantize_activations(x, weight.width)
    groups = triton.cdiv(weight.in_features, weight.width)
    if len(x) == 1:
        block_k = min(triton.next_power_of_2(weight.width), 512)
        _fp8_matvec_kernel[(triton.cdiv(weight.out_features, MATVEC_ROWS),)](
            x,
            x_scales,
            weight.qweight,
            weight.scales,
            bias,
            out,
            weight.out_features,
            weight.in_features,
            groups,
            HEIGHT=weight.height,
            WIDTH=weight.width,
            BLOCK_N=MATVEC_ROWS,
            BLOCK_GROUPS=min(512 // block_k, triton.next_power_of_2(groups)),
            BLOCK_K=block_k,
            num_warps=4,
        )
    else:
        if ROUNDED_ACTIVATIONS:
            native = _multiplies_fp8(x.device)
            step = 128 if native else 64
        else:
            step = 32 if x.dtype == torch.float32 else 64
        block_m, block_n, num_warps = _matmul_tile(len(x), out.dtype)
        _fp8_matmul_kernel[(triton.cdiv(len(x), block_m), triton.cdiv(weight.out_features, block_n))](
            x,
            x_scales,
            weight.qweight,
            weight.scales,
            bias,
            out,
            len(x),
            weight.out_features,
            weight.in_features,
            groups,
            HEIGHT=weight.height,
            WIDTH=weight.width,
            NATIVE=native,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=max(min(triton.next_power_of_2(weight.width), step), 32),  # tl.dot takes no fewer
            num_warps=num_warps,
            num_stages=2 if architecture(x.device).startswith("gfx") else 3,
        )
    return out


def _matmul_tile(n: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and columns of the output that a program computes, and its warps. tl.dot takes no fewer than 16."""
    if n <= 16 and dtype != torch.float32:  # narrow, so that there are enough programs
        return 16, 32, 4
    if n <= 64 or dtype == torch.float32:
        return 32, 64, 4
    return 128, 64, 8


if STATIC_ACTIVATIONS:

    def scale_activations(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x, divided by a scale and rounded to e4m3, at most 448 in magnitude.

        All numbers are float32's, divisions included, and the same on every device.

        x: [n, in], contiguous
        scale: [1], float32
        -> bits of e4m3, uint8 [n, in]; the scale, float32 [n, 1], NaN for rows that have a NaN
        """
        n, size = x.shape
        if not use_triton(x):
            return encode_torch(x.float() / scale), scale.expand(n, 1)
        values = x.new_empty(n, size, dtype=torch.uint8)
        scales = x.new_empty(n, 1, dtype=torch.float32)
        _scale_kernel[(n,)](x, scale, values, scales, size, BLOCK=1024, num_warps=4)
        return values, scales


if ROUNDED_ACTIVATIONS and not STATIC_ACTIVATIONS:

    def quantize_activations(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """x, rounded to e4m3 with a scale max|x| / 448 for each token and `width` inputs (the last may be fewer).

        All numbers are float32's, divisions included, and the same on every device. A group of zeros has the scale 0.

        x: [n, in], contiguous
        -> bits of e4m3, uint8 [n, in]; scales, float32 [n, groups]
        """
        n, size = x.shape
        groups = -(-size // width)
        if not use_triton(x):
            grouped = F.pad(x.float(), (0, groups * width - size)).unflatten(1, (groups, width))
            scales = grouped.abs().amax(2) / 448
            values = torch.where(scales.unsqueeze(2) == 0, 0, grouped / scales.unsqueeze(2))
            return encode_torch(values).flatten(1)[:, :size], scales
        values = x.new_empty(n, size, dtype=torch.uint8)
        scales = x.new_empty(n, groups, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        _quantize_kernel[(n, groups)](
            x, values, scales, size, WIDTH=width, BLOCK=block, num_warps=8 if ROW_SCALES else 1
        )
        return values, scales


if ROUNDED_ACTIVATIONS:

    def _multiplies_fp8(device: torch.device) -> bool:
        """Whether the GPU's tensor cores take e4m3."""
        chip = architecture(device)
        return chip.startswith("sm_") and int(chip.removeprefix("sm_")) >= 89


def _fp8_linear_torch(x: Tensor, weight: Fp8Matrix, bias: Tensor | None) -> Tensor:
    """Some rows at a time.

    [not ROW_SCALES] A row of blocks, whose scales multiply the activations, which are fewer than the weights."""
    dtype = x.dtype
    if ROUNDED_ACTIVATIONS:
        if STATIC_ACTIVATIONS:
            values, scales = scale_activations(x, weight.input_scale)
        else:
            values, scales = quantize_activations(x, weight.width)
        decoded = values.view(torch.float8_e4m3fn).float()
        x = decoded * scales if ROW_SCALES else decoded * _spread(scales, weight)
    else:
        x = x.float()
    if ROW_SCALES:
        outs = [x @ decode_torch(rows).T for rows in weight.qweight.split(DECODED_ROWS)]
        out = torch.cat(outs, dim=1) * (256 * weight.scales.flatten())
    else:
        blocks = zip(weight.qweight.split(weight.height), _spread(256 * weight.scales, weight), strict=True)
        outs = [(x * scales) @ decode_torch(rows).T for rows, scales in blocks]
        out = torch.cat(outs, dim=1)
    if BIAS:
        out = out if bias is None else out + bias
    return out.to(dtype)


def _spread(scales: Tensor, weight: Fp8Matrix) -> Tensor:
    """[…, groups] -> […, in], each scale as often as its block is wide."""
    return scales.repeat_interleave(weight.width, dim=-1)[..., : weight.in_features]


@triton.jit
def _fp8_matvec_kernel(
    x_ptr,
    x_scales_ptr,
    qweight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    in_features,
    groups,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of outputs). One row of x."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, out_features - 1)  # rows beyond the last are read and not written
    acc = tl.zeros([BLOCK_N, BLOCK_GROUPS, BLOCK_K], tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        g = first + tl.arange(0, BLOCK_GROUPS)
        scale_ptrs = scales_ptr + (row // HEIGHT)[:, None] * groups + g[None, :]
        scale = tl.load(scale_ptrs, mask=(g < groups)[None, :], other=0.0) * 256.0
        if ROUNDED_ACTIVATIONS:
            scale *= tl.load(x_scales_ptr + g, mask=g < groups, other=0.0)[None, :] * 256.0
        for start in range(0, WIDTH, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            k = g[:, None] * WIDTH + j[None, :]
            inside = (j < WIDTH)[None, :] & (k < in_features)
            qweight_ptrs = qweight_ptr + row.to(tl.int64)[:, None, None] * in_features + k[None, :, :]
            weight = decode(tl.load(qweight_ptrs, mask=inside[None, :, :], other=0))
            x = tl.load(x_ptr + k, mask=inside, other=0)
            x = decode(x) if ROUNDED_ACTIVATIONS else x.to(tl.float32)
            acc += weight * x[None, :, :] * scale[:, :, None]
    out = tl.sum(tl.sum(acc, 2), 1)
    if BIAS and bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < out_features)


@triton.jit
def _fp8_matmul_kernel(
    x_ptr,
    x_scales_ptr,
    qweight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    groups,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of rows, blocks of outputs)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = tl.minimum(m, rows - 1).to(tl.int64)  # rows beyond the last are read and not written
    row_n = tl.minimum(n, out_features - 1).to(tl.int64)
    x_ptrs = x_ptr + row_m[:, None] * in_features
    qweight_ptrs = qweight_ptr + row_n[None, :] * in_features
    scale_ptrs = scales_ptr + row_n // HEIGHT * groups
    blocks_of_group: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(groups * blocks_of_group):
        g = block // blocks_of_group
        j = block % blocks_of_group * BLOCK_K + tl.arange(0, BLOCK_K)
        k = g * WIDTH + j
        inside = (j < WIDTH) & (k < in_features)
        x = tl.load(x_ptrs + k[None, :], mask=inside[None, :], other=0)
        weight = tl.load(qweight_ptrs + k[:, None], mask=inside[:, None], other=0)
        scale = tl.load(scale_ptrs + g)[None, :]
        if ROUNDED_ACTIVATIONS:
            scale = scale * tl.load(x_scales_ptr + row_m * groups + g)[:, None]
            if NATIVE:
                sums = tl.dot(x.to(tl.float8e4nv, bitcast=True), weight.to(tl.float8e4nv, bitcast=True))
            else:
                sums = tl.dot(decode(x).to(tl.float16), decode(weight).to(tl.float16)) * 65536.0
        else:
            sums = tl.dot(x, decode(weight).to(x.dtype), input_precision="ieee") * 256.0
        acc += sums * scale
    if BIAS and bias_ptr is not None:
        acc += tl.load(bias_ptr + row_n).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < out_features)[None, :])


@triton.jit
def _quantize_kernel(x_ptr, values_ptr, scales_ptr, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, groups)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    j = tl.arange(0, BLOCK)
    k = group * WIDTH + j
    inside = (j < WIDTH) & (k < size)
    x = tl.load(x_ptr + row * size + k, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 448.0)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 0)  # tl.max does not see NaN
    scale = tl.where(finite == 1, scale, float("nan"))
    value = tl.where(scale == 0.0, 0.0, tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)))
    tl.store(values_ptr + row * size + k, encode(value), mask=inside)
    tl.store(scales_ptr + row * tl.num_programs(1) + group, scale)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, values_ptr, scales_ptr, size, BLOCK: tl.constexpr):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    numbers = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * size + k, mask=k < size, other=0.0).to(tl.float32)
        numbers = tl.minimum(numbers, (x == x).to(tl.int32))
        tl.store(values_ptr + row * size + k, encode(tl.div_rn(x, scale)), mask=k < size)
    scale = tl.where(tl.min(numbers, 0) == 1, scale, float("nan"))  # decoded codes are never NaN
    tl.store(scales_ptr + row, scale)
