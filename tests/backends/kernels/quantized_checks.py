"""Products with quantised matrices against float64, on any device: as `kernel_checks`, for `int_linear`, `fp8_linear`
and what they need.

The dequantisation here follows the formats' description, one value after the other, and shares nothing with theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from kernel_checks import TOLERANCE, Arena, _normal, assert_close, runs_kernels
from kernel_oracle import Result
from kernel_variants import fp8_flags, fp8_matrices, load
from torch import Tensor

Array = np.ndarray[Any, Any]
INPUT_SCALE = 2.0**-6 * 1.1  # what checkpoints have for activations
PARTS = 100.0  # how much larger the scales are of the second half of a matrix, as of one part of a fused one


@dataclass
class Matrix:
    """What a checkpoint holds of one, as the packages' `QuantizedMatrix` gives it, a few rows at a time."""

    q: Array  # uint8 [out, in]
    s: Array
    z: Array | None = None  # uint8 [out, groups]
    o: Array | None = None  # int32 [in]
    rows: int = 24

    def pieces(self) -> Iterator[tuple[int, Array]]:
        for row in range(0, len(self.q), self.rows):
            yield row, self.q[row : row + self.rows]

    # As some checkpoints lie: the outputs of a group side by side.
    def scales(self) -> Array:
        return np.asfortranarray(self.s)

    def input_scale(self) -> Array:
        return np.array([INPUT_SCALE], np.float32)

    def zeros(self) -> Array:
        assert self.z is not None
        return np.asfortranarray(self.z)

    def order(self) -> Array:
        assert self.o is not None
        return self.o


def int_matrix(
    seed: int, out: int, inputs: int, bits: int, group_size: int | None, zero_points: bool, act_order: bool
) -> tuple[Matrix, Tensor]:
    """A random one, and W in float64."""
    draw = np.random.default_rng(seed)
    size = group_size or inputs
    groups = -(-inputs // size)
    q = draw.integers(0, 1 << bits, (out, inputs)).astype(np.uint8)
    s = draw.uniform(0.001, 0.003, (out, groups)).astype(np.float16 if group_size else np.float32)
    s[out // 2 :] *= PARTS
    z = draw.integers(0, min((1 << bits) + 1, 256), (out, groups)).astype(np.uint8) if zero_points else None
    order = draw.permutation(inputs).astype(np.int32) if act_order else None
    weight = np.empty((out, inputs))
    for k in range(inputs):
        zero = (1 << (bits - 1)) if z is None else z[:, k // size].astype(np.float64)
        column = k if order is None else order[k]
        weight[:, column] = (q[:, k].astype(np.float64) - zero) * s[:, k // size].astype(np.float64)
    return Matrix(q, s, z, order), torch.from_numpy(weight)


@cache
def e4m3_values() -> Array:
    """What each byte stands for, float64; NaN for the two that are none."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(float("nan") if code & 127 == 127 else -size if code & 128 else size)
    return np.array(values)


def fp8_matrix(seed: int, out: int, inputs: int, block: tuple[int, int]) -> tuple[Matrix, Tensor]:
    """A random one, and W in float64."""
    draw = np.random.default_rng(seed)
    height, width = block
    q = draw.integers(0, 256, (out, inputs)).astype(np.uint8)
    q[q & 127 == 127] = 1
    s = draw.uniform(0.001, 0.003, (-(-out // height), -(-inputs // width))).astype(np.float32)
    s[len(s) // 2 :] *= PARTS
    rows, columns = np.arange(out) // height, np.arange(inputs) // width
    return Matrix(q, s), torch.from_numpy(e4m3_values()[q] * s.astype(np.float64)[rows][:, columns])


def rounded_activations(x: Tensor, width: int, given: float | None = None) -> tuple[Array, Array]:
    """x [n, in] -> bits of e4m3 [n, in], scales float32 [n, groups]: to the nearest, ties to even mantissas.

    given: the scale of all"""
    sizes = e4m3_values()[:127].astype(np.float32)
    middles = (sizes[:-1].astype(np.float64) + sizes[1:]) / 2
    values = x.float().cpu().numpy()
    codes, scales = [], []
    for start in range(0, values.shape[1], width):
        group = values[:, start : start + width]
        scale = np.abs(group).max(axis=1, keepdims=True) / np.float32(448)
        if given is not None:
            scale = np.full_like(scale, given)
        quotient = np.divide(group, scale, out=np.zeros_like(group), where=scale != 0)
        size = np.minimum(np.abs(quotient), np.float32(448)).astype(np.float64)
        code = np.searchsorted(middles, size, side="left")
        tie = (code < 126) & (size == middles[np.minimum(code, 125)]) & (code % 2 == 1)
        codes.append(code + tie + 128 * np.signbit(quotient))
        scales.append(scale)
    return np.concatenate(codes, axis=1).astype(np.uint8), np.concatenate(scales, axis=1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Result:
    x, added = x.double().cpu(), 0.0 if bias is None else bias.double().cpu()
    magnitude = x.abs() @ weight.abs().T
    return x @ weight.T + added, magnitude + (0.0 if bias is None else added.abs())


def packed(arena: Arena, weight: Any, matrix: Matrix) -> Any:
    """The module with its tensors between guard regions."""
    weight.pack(matrix, arena.device)
    for name, tensor in list(weight.named_buffers()):
        assert tensor.is_contiguous()
        setattr(weight, name, arena.put(tensor))
    return weight


# -------------------------------------------------------------------------------------------------------- checks


def check_int_linear(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    out: int,
    inputs: int,
    bits: int,
    group_size: int | None,
    zero_points: bool = False,
    act_order: bool = False,
    biased: bool = False,
) -> None:
    flags = {"GROUPS": group_size is not None, "ZERO_POINTS": zero_points, "ACT_ORDER": act_order}
    module = load("int_linear", BITS=str(bits), **flags, BIAS=biased)
    matrices = load("int_matrix", BITS=str(bits), **flags, LOOKUP=False)
    arena = Arena(device)
    matrix, dense = int_matrix(out + inputs, out, inputs, bits, group_size, zero_points, act_order)
    sizes = (out, inputs) if group_size is None else (out, inputs, group_size)
    weight = packed(arena, matrices.IntMatrix(*sizes), matrix)
    x = arena.put(_normal(21, n, inputs, dtype=dtype))
    bias = arena.put(_normal(22, out, dtype=dtype)) if biased else None
    with arena.watch(["_int_matvec_kernel" if n == 1 else "_int_matmul_kernel"]):
        y = module.int_linear(x, weight, *([bias] if biased else []))
    assert_close(f"int{bits}", y, product(x, dense, bias), dtype)
    if biased:
        y = module.int_linear(x, weight)
        assert_close(f"int{bits} without bias", y, product(x, dense, None), dtype)


def check_int_embedding(
    device: torch.device, dtype: torch.dtype, out: int, inputs: int, bits: int, group_size: int | None
) -> None:
    """Exact: (q - z) · s fits float32, and is rounded once."""
    flags = {"GROUPS": group_size is not None, "ZERO_POINTS": False, "ACT_ORDER": False, "LOOKUP": True}
    arena = Arena(device)
    matrix, dense = int_matrix(out, out, inputs, bits, group_size, False, False)
    sizes = (out, inputs) if group_size is None else (out, inputs, group_size)
    weight = packed(arena, load("int_matrix", BITS=str(bits), **flags).IntMatrix(*sizes), matrix)
    ids = torch.tensor([0, out - 1, out // 2, 0])
    rows = weight.embedding(ids.to(device), dtype)
    assert rows.dtype == dtype
    assert rows.is_contiguous()
    assert torch.equal(rows.cpu(), dense[ids].float().to(dtype))


def check_fp8_linear(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    out: int,
    inputs: int,
    block: tuple[int, int] | None,
    activations: str = "none",
    biased: bool = False,
    chip: str = "",
) -> None:
    """`block`: None for a scale a row. `chip`: the one that the device passes for."""
    flags = fp8_flags(activations, block)
    module, matrices = load("fp8_linear", **flags, BIAS=biased), fp8_matrices(flags)
    arena = Arena(device)
    height, width = block or (1, inputs)
    matrix, dense = fp8_matrix(out + inputs, out, inputs, (height, width))
    weight = packed(arena, matrices.Fp8Matrix(out, inputs, *([block] if block else [])), matrix)
    x = _normal(23, n, inputs, dtype=dtype)
    x[0, width : 2 * width] = 0  # a group of zeros
    if activations == "static":
        x[-1, 0] = 1000  # beyond 448 · INPUT_SCALE
    x = arena.put(x)
    bias = arena.put(_normal(24, out, dtype=dtype)) if biased else None
    kernels = {"none": [], "dynamic": ["_quantize_kernel"], "static": ["_scale_kernel"]}[activations]
    kernels += ["_fp8_matvec_kernel" if n == 1 else "_fp8_matmul_kernel"]
    passed_for = mock.patch.object(module, "architecture", return_value=chip) if chip else nullcontext()
    with passed_for, arena.watch(kernels):
        y = module.fp8_linear(x, weight, *([bias] if biased else []))
    exact = x
    if activations != "none":
        codes, scales = rounded_activations(x, width, INPUT_SCALE if activations == "static" else None)
        spread = scales.astype(np.float64)[:, np.arange(inputs) // width]
        exact = torch.from_numpy(e4m3_values()[codes] * spread)
    assert_close("fp8", y, product(exact, dense, bias), dtype)


def check_quantize_activations(device: torch.device, dtype: torch.dtype, n: int, inputs: int, width: int) -> None:
    """The same bits everywhere."""
    arena = Arena(device)
    x = _normal(25, n, inputs, dtype=torch.float32)
    x = (x * torch.exp2(torch.arange(inputs) % 23 - 11.0)).to(dtype)  # down to numbers that e4m3 has not
    x[0, :width] = 0
    x[-1, -1] = 448 * 2.0**-7  # scales that are powers of two: many ties
    module = load("fp8_linear", **fp8_flags("dynamic", (128, width)), BIAS=False)
    x = arena.put(x)
    with arena.watch(["_quantize_kernel"]):
        codes, scales = module.quantize_activations(x, width)
    want, want_scales = rounded_activations(x, width)
    assert np.array_equal(scales.cpu().numpy(), want_scales)
    assert np.array_equal(codes.cpu().numpy() & 127, want & 127)
    assert np.array_equal(e4m3_values()[codes.cpu().numpy()], e4m3_values()[want])
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[0, 0] = bad
        codes, scales = module.quantize_activations(broken, width)
        decoded = torch.from_numpy(e4m3_values()[codes.cpu().numpy()])[0, :width] * scales[0, 0].double().cpu()
        assert bool(decoded.isnan().all()), f"{bad} is lost"
        assert not bool(scales[1:].isnan().any())


def check_scale_activations(device: torch.device, dtype: torch.dtype, n: int, inputs: int) -> None:
    """The same bits everywhere; NaN is not lost, and what is too large is the largest."""
    arena = Arena(device)
    x = _normal(26, n, inputs, dtype=torch.float32)
    x = arena.put((x * torch.exp2(torch.arange(inputs) % 23 - 11.0)).to(dtype))
    module = load("fp8_linear", **fp8_flags("static", None), BIAS=False)
    scale = torch.full((1,), INPUT_SCALE, device=device)
    with arena.watch(["_scale_kernel"]):
        codes, scales = module.scale_activations(x, scale)
    want, want_scales = rounded_activations(x, inputs, INPUT_SCALE)
    assert np.array_equal(scales.cpu().numpy(), want_scales)
    assert np.array_equal(e4m3_values()[codes.cpu().numpy()], e4m3_values()[want])
    assert int(codes.max()) > 0x7E, "some are negative"
    broken = x.clone()
    broken[0, -1], broken[-1, 0] = float("nan"), float("-inf")
    codes, scales = module.scale_activations(broken, scale)
    decoded = torch.from_numpy(e4m3_values()[codes.cpu().numpy()]) * scales.double().cpu()
    assert bool(decoded[0, -1].isnan()), "NaN is lost"
    assert bool(scales[0].isnan()) or not runs_kernels(device), "kernels decode no NaN"
    assert decoded[-1, 0] == -448 * float(np.float32(INPUT_SCALE))
    assert not bool(decoded[1:].isnan().any())


def check_all(device: torch.device) -> None:
    """A fixed set of cases that covers every branch of every kernel, in every dtype."""
    for dtype in TOLERANCE:
        for bits, group_size, zero_points, act_order in (
            (4, 32, False, False),
            (4, 32, True, True),
            (4, None, False, False),
            (8, None, False, False),
            (8, 32, True, False),
        ):
            for n in (1, 3):
                biased = n == 3
                check_int_linear(device, dtype, n, 24, 80, bits, group_size, zero_points, act_order, biased)
        for bits, group_size in ((4, 32), (8, None), (4, None)):
            check_int_embedding(device, dtype, 30, 80, bits, group_size)
        for block, activations in (((16, 32), "none"), ((16, 32), "dynamic"), (None, "dynamic"), (None, "static")):
            for n in (1, 3):
                check_fp8_linear(device, dtype, n, 40, 80, block, activations, biased=n == 3)
        check_quantize_activations(device, dtype, 3, 70, 32)
        check_scale_activations(device, dtype, 3, 1100)
    # Ragged edges: odd groups, inputs that fill no group, several tiles of outputs.
    for n in (1, 2, 5, 70):
        check_int_linear(device, torch.float32, n, 301, 50, 4, 7, zero_points=True)
        check_int_linear(device, torch.float32, n, 7, 3, 4, None)
        check_int_linear(device, torch.float32, n, 257, 131, 8, 24, zero_points=True, act_order=True, biased=True)
        check_fp8_linear(device, torch.float32, n, 257, 131, (24, 40))
        check_fp8_linear(device, torch.float32, n, 21, 50, (7, 5), "dynamic", biased=True)
        check_fp8_linear(device, torch.float32, n, 257, 131, None)
        check_fp8_linear(device, torch.float32, n, 21, 50, None, "dynamic", biased=True)
        check_fp8_linear(device, torch.float32, n, 21, 600, None, "static")
    check_int_linear(device, torch.float32, 1, 5, 1100, 8, None)
    check_int_linear(device, torch.float32, 17, 5, 300, 4, 128)
    check_int_embedding(device, torch.float32, 300, 50, 4, 7)
    check_fp8_linear(device, torch.float32, 3, 130, 300, (128, 128), "dynamic")
    check_quantize_activations(device, torch.float32, 2, 300, 128)
    if runs_kernels(device) and device.type == "cpu":  # the interpreter multiplies float8 too
        check_fp8_linear(device, torch.bfloat16, 3, 40, 80, (16, 32), "dynamic", chip="sm_90")
        check_fp8_linear(device, torch.bfloat16, 3, 40, 80, None, "static", chip="sm_90")
