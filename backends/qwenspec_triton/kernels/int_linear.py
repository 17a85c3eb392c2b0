"""Products with matrices of small integers, which are never dequantised in memory as a whole.

Kernels multiply by q - z, which activations of any dtype hold exactly, and scale each group's sum in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .columns import TILE, empty_columns, sum_bags
from .dispatch import architecture, tl, triton, use_triton
from .int_matrix import IntMatrix

BITS = tl.constexpr("4")  # flag: 4 or 8, of a value
GROUPS = tl.constexpr(True)  # flag: inputs are in groups, of which the last may have fewer
ZERO_POINTS = tl.constexpr(True)  # flag: groups have zero points
ACT_ORDER = True  # flag: inputs belong to groups in an order of their own
BIAS = tl.constexpr(True)  # flag: some products have a bias

MIDDLE = 8 if BITS == "4" else 128  # of the values
MATVEC_ROWS = 4  # outputs of a program
BAG_ROWS = 8 if BITS == "4" else 24  # rows of x; for more, a CPU had better unpack the matrix
if BITS == "4":
    BUFFER = 4 << 20  # bytes that a CPU unpacks at once


def int_linear(x: Tensor, weight: IntMatrix, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ, accumulated in float32 and rounded once.

    x: [n, in], contiguous
    weight: [out, in]
    [BIAS] bias: [out], added before the rounding
    -> [n, out]
    """
    if ACT_ORDER:
        x = x[:, weight.order]
    if not use_triton(x):
        product = _matvec_torch if len(x) <= BAG_ROWS else _matmul_torch
        out = product(x.float(), weight)
        if BIAS:
            out = out if bias is None else out + bias
        return out.to(x.dtype)
    assert x.is_contiguous()
    out = x.new_empty(len(x), weight.out_features)
    if len(x) == 1:
        block_bytes = min(triton.next_power_of_2(weight.width), 512)
        _int_matvec_kernel[(triton.cdiv(weight.out_features, MATVEC_ROWS),)](
            x,
            weight.qweight,
            weight.scales,
            weight.zeros,
            bias,
            out,
            weight.out_features,
            weight.in_features,
            weight.groups,
            GROUP_SIZE=weight.group_size,
            WIDTH=weight.width,
            ZERO=MIDDLE,
            BLOCK_N=MATVEC_ROWS,
            BLOCK_GROUPS=min(512 // block_bytes, triton.next_power_of_2(weight.groups)),
            BLOCK_BYTES=block_bytes,
            num_warps=4,
        )
    else:
        step = 16 if x.dtype == torch.float32 else 32 if BITS == "4" else 64
        block_m, block_n, num_warps = _matmul_tile(len(x), x.dtype)
        _int_matmul_kernel[(triton.cdiv(len(x), block_m), triton.cdiv(weight.out_features, block_n))](
            x,
            weight.qweight,
            weight.scales,
            weight.zeros,
            bias,
            out,
            len(x),
            weight.out_features,
            weight.in_features,
            weight.groups,
            GROUP_SIZE=weight.group_size,
            WIDTH=weight.width,
            ZERO=MIDDLE,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_BYTES=max(min(triton.next_power_of_2(weight.width), step), 16),  # tl.dot takes no fewer
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


def _matvec_torch(x: Tensor, weight: IntMatrix) -> Tensor:
    """x [n, in] float32 -> [n, out] float32."""
    x = _grouped(x, weight)  # [n, groups, group_size]
    if BITS == "4":
        # A byte is lower + 16 · upper, so that a · lower + b · upper = (a - b / 16) · lower + b / 16 · byte: the upper
        # bits need not be unpacked.
        a, b = F.pad(x, (0, weight.group_size % 2)).chunk(2, dim=2)
        b = b / 16
        a, b = (a - b).flatten(1), b.flatten(1)  # [n, groups · width]
        rows = weight.groups * weight.width
        step = max(1, BUFFER // (rows * TILE))
        lower = empty_columns(step * TILE, rows, zero=8)
        outs = []
        for i in range(0, len(weight.qweight), step):
            columns = weight.qweight[i : i + step]
            part = lower[: len(columns)]
            torch.bitwise_and(columns[:, :, :TILE], 15, out=part[:, :, :TILE])
            sums = sum_bags(columns, b, weight.width).add_(sum_bags(part, a, weight.width))
            outs.append(_scaled(sums, x, weight, slice(i, i + step)))
        out = torch.cat(outs)
    else:
        out = _scaled(sum_bags(weight.qweight, x.flatten(1), weight.group_size), x, weight, slice(None))
    return out.transpose(0, 1).flatten(1)[:, : weight.out_features]


def _scaled(sums: Tensor, x: Tensor, weight: IntMatrix, tiles: slice) -> Tensor:
    """Groups' sums of x · (q - middle), [tiles, n, groups, TILE] -> [tiles, n, TILE].

    [ZERO_POINTS] x: [n, groups, group_size]"""
    if ZERO_POINTS:
        sums.sub_(x.sum(2, keepdim=True) * (weight.zeros[tiles].float() - MIDDLE).unsqueeze(1))
    return sums.mul_(weight.scales[tiles].unsqueeze(1)).sum(2)


def _matmul_torch(x: Tensor, weight: IntMatrix) -> Tensor:
    """The same, with a tile at a time dequantised."""
    x = _grouped(x, weight).flatten(1)
    outs = []
    for i, tile in enumerate(weight.qweight):
        values = tile[:, :TILE].unflatten(0, (weight.groups, weight.width))
        if BITS == "4":
            values = torch.cat([values & 15, values >> 4], dim=1)[:, : weight.group_size]
        above = values.float().sub_(weight.zeros[i].unsqueeze(1) if ZERO_POINTS else MIDDLE)
        outs.append(x @ above.mul_(weight.scales[i].unsqueeze(1)).flatten(0, 1))
    return torch.cat(outs, dim=1)[:, : weight.out_features]


def _grouped(x: Tensor, weight: IntMatrix) -> Tensor:
    """[n, in] -> [n, groups, group_size], the inputs padded with 0."""
    padding = weight.groups * weight.group_size - weight.in_features
    return F.pad(x, (0, padding)).unflatten(1, (weight.groups, weight.group_size))


@triton.jit
def _int_matvec_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    in_features,
    groups,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Grid (blocks of outputs). One row of x."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # rows beyond the last are read and not written
    acc = tl.zeros([BLOCK_N, BLOCK_GROUPS, BLOCK_BYTES], tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        g = first + tl.arange(0, BLOCK_GROUPS)
        of_group = row[:, None] * groups + g[None, :]
        scale = tl.load(scales_ptr + of_group, mask=(g < groups)[None, :], other=0.0).to(tl.float32)[:, :, None]
        if ZERO_POINTS:
            zero = tl.load(zeros_ptr + of_group, mask=(g < groups)[None, :], other=0).to(tl.float32)[:, :, None]
        else:
            zero = ZERO
        for start in range(0, WIDTH, BLOCK_BYTES):
            j = start + tl.arange(0, BLOCK_BYTES)
            k = g[:, None] * GROUP_SIZE + j[None, :]
            inside = (j < WIDTH)[None, :] & (k < in_features)
            qweight = tl.load(
                qweight_ptr + of_group[:, :, None] * WIDTH + j[None, None, :], mask=inside[None, :, :], other=0
            ).to(tl.int32)
            x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)[None, :, :]
            if BITS == "4":
                inside = (WIDTH + j < GROUP_SIZE)[None, :] & (WIDTH + k < in_features)
                upper_x = tl.load(x_ptr + WIDTH + k, mask=inside, other=0.0).to(tl.float32)[None, :, :]
                acc += (_above(qweight & 15, zero) * x + _above(qweight >> 4, zero) * upper_x) * scale
            else:
                acc += _above(qweight, zero) * x * scale
    out = tl.sum(tl.sum(acc, 2), 1)
    if BIAS and bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < out_features)


@triton.jit
def _int_matmul_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    groups,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Grid (blocks of rows, blocks of outputs)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * in_features
    first_group = tl.minimum(n, out_features - 1).to(tl.int64) * groups  # rows beyond the last are not written
    blocks_of_group: tl.constexpr = (WIDTH + BLOCK_BYTES - 1) // BLOCK_BYTES
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(groups * blocks_of_group):
        g = block // blocks_of_group
        j = block % blocks_of_group * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        k = g * GROUP_SIZE + j
        inside = (j < WIDTH) & (k < in_features)
        qweight = tl.load(
            qweight_ptr + ((first_group + g) * WIDTH)[None, :] + j[:, None], mask=inside[:, None], other=0
        ).to(tl.int32)
        x = tl.load(x_ptrs + k[None, :], mask=inside[None, :], other=0.0)
        zero = tl.load(zeros_ptr + first_group + g).to(tl.float32)[None, :] if ZERO_POINTS else ZERO
        if BITS == "4":
            sums = tl.dot(x, _above(qweight & 15, zero).to(x.dtype), input_precision="ieee")
            inside = (WIDTH + j < GROUP_SIZE) & (WIDTH + k < in_features)
            x = tl.load(x_ptrs + WIDTH + k[None, :], mask=inside[None, :], other=0.0)
            sums = tl.dot(x, _above(qweight >> 4, zero).to(x.dtype), sums, input_precision="ieee")
        else:
            sums = tl.dot(x, _above(qweight, zero).to(x.dtype), input_precision="ieee")
        if GROUPS:
            acc += sums * tl.load(scales_ptr + first_group + g).to(tl.float32)[None, :]
        else:
            acc += sums
    if not GROUPS:
        acc *= tl.load(scales_ptr + first_group).to(tl.float32)[None, :]
    if BIAS and bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(n, out_features - 1)).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < out_features)[None, :])


@triton.jit
def _above(q, zero):
    """q - zero in float32, exactly. 2^23 + q is 2^23 with q as its last bits, which is cheaper than a conversion."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
