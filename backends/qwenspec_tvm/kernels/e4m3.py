"""float8 e4m3: its bytes as float32.

[ROUNDED_ACTIVATIONS] And activations rounded to it.
"""

from functools import cache
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from .gemm import argument, scheduled_function
from .rows import each_row, load, store
from .target import is_cpu

ROUNDED_ACTIVATIONS = True  # flag: activations are rounded to it
STATIC_ACTIVATIONS = True  # flag: … with a scale that the checkpoint has

LARGEST = 448.0
LEAST_NORMAL = 2.0**-6
SPACING = 2.0**-9  # of smaller numbers


def over_256(byte: Any) -> Any:
    """An e4m3, int8, as float32 and divided by 256: sign, exponent and fraction lie where float16 has them."""
    bits = T.bitwise_and(T.shift_left(T.cast(byte, "int16"), T.int16(7)), T.int16(0xBF80 - 0x10000))
    return T.cast(T.reinterpret("float16", bits), "float32")


if STATIC_ACTIVATIONS:

    def round_activations_by(x: Tensor, scale: Tensor) -> Tensor:
        """q · s with q = e4m3(x / s), at most 448 in magnitude.

        In float32, q to the nearest, ties to even; NaN stays so.

        x: [n, in]
        scale: [1], float32
        -> [n, in], float32
        """
        n, inputs = x.shape[0], int(x.shape[1])
        if not is_cpu():
            return op.tensor_expr_op(_round_by_te, "round_activations", [x, scale])
        function = _round_by_tir(inputs, x.dtype)
        return op.tensor_ir_op(function, "round_activations", [x, scale], Tensor.placeholder((n, inputs), "float32"))

elif ROUNDED_ACTIVATIONS:

    def round_activations(x: Tensor, group: int) -> Tensor:
        """q · s with q = e4m3(x / s) and s = max|x| / 448 over each `group` inputs of a row; the last may have fewer.

        In float32, q to the nearest, ties to even. A group of zeros stays so, and all of one with a NaN is NaN.

        x: [n, in]
        -> [n, in], float32
        """
        n, inputs = x.shape[0], int(x.shape[1])
        if not is_cpu():
            largest = op.tensor_expr_op(_largest_te, "largest", [x, group])
            return op.tensor_expr_op(_round_te, "round_activations", [x, largest, group])
        function = _round_tir(inputs, group, x.dtype)
        return op.tensor_ir_op(function, "round_activations", [x], Tensor.placeholder((n, inputs), "float32"))


def _magnitude(value: Any) -> Any:
    """float32 -> the bits of |x|, int32: ordered as the numbers are, and NaN above all."""
    return T.bitwise_and(T.reinterpret("int32", value), T.int32(0x7FFFFFFF))


def _rounded(value: Any, largest: Any) -> Any:
    """A float32 of a group whose largest magnitude is given, rounded."""
    scale = T.reinterpret("float32", largest) / T.float32(LARGEST)
    return T.Select(scale == T.float32(0), T.float32(0), _nearest(value / scale) * scale)


def _nearest(value: Any) -> Any:
    """The e4m3 nearest to a float32, as float32; the largest for all beyond; NaN for NaN."""
    bits = _magnitude(value)
    size = T.reinterpret("float32", bits)
    # Three bits of fraction are left of 23; below LEAST_NORMAL what is left is what float32 keeps beside a number whose
    # own last bit is worth SPACING. Counted in such bits: TVM takes (a + b) - b for a.
    to_nearest = bits + T.int32(0x7FFFF) + T.bitwise_and(T.shift_right(bits, T.int32(20)), T.int32(1))
    normal = T.reinterpret("float32", T.bitwise_and(to_nearest, T.int32(-0x100000)))
    beside = np.float32(SPACING * 2**23)
    count = T.reinterpret("int32", size + T.float32(beside)) - T.int32(beside.view(np.int32))
    small = T.cast(count, "float32") * T.float32(SPACING)
    size = T.Select(size < T.float32(LEAST_NORMAL), small, T.min(normal, T.float32(LARGEST)))
    sign = T.bitwise_and(T.reinterpret("int32", value), T.int32(-0x80000000))
    nearest = T.reinterpret("float32", T.bitwise_or(T.reinterpret("int32", size), sign))
    return T.Select(bits <= T.int32(0x7F800000), nearest, value)  # TVM takes value == value for true


@cache
def _round_tir(inputs: int, group: int, dtype: str) -> PrimFunc:
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        x, out = argument("x", (n, inputs), dtype), argument("out", (n, inputs), "float32")
        with T.sblock("root"):  # Relax takes for granted that functions of one input have a block
            each_row(n, inputs, lambda row: _round_row(x, out, row, group))
    return builder.get()


def _round_row(x, out, row, group: int) -> None:
    inputs = int(x.shape[1])
    largest = T.alloc_buffer((1,), "int32", scope="local")
    with T.serial(-(-inputs // group)) as g:
        count = T.min(group, inputs - g * group)
        store(largest, (), 0, 0)
        with T.serial(count) as i:
            store(largest, (), 0, T.max(largest[0], _magnitude(load(x, (row,), g * group + i))))
        with T.serial(count) as i:
            store(out, (row,), g * group + i, _rounded(load(x, (row,), g * group + i), largest[0]))


def _largest_te(x: te.Tensor, group: int) -> te.Tensor:
    """The largest magnitude of each group, as _magnitude has it."""
    n, inputs = x.shape
    i = te.reduce_axis((0, group), "i")

    def magnitude(row, g):
        k = g * group + i
        return te.max(tirx.if_then_else(k < inputs, _magnitude(x[row, k].astype("float32")), T.int32(0)), axis=i)

    return te.compute((n, -(-inputs // group)), magnitude, "largest")


def _round_te(x: te.Tensor, largest: te.Tensor, group: int) -> te.Tensor:
    return te.compute(
        x.shape, lambda row, k: _rounded(x[row, k].astype("float32"), largest[row, k // group]), "round_activations"
    )


@cache
def _round_by_tir(inputs: int, dtype: str) -> PrimFunc:
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        x, scale = argument("x", (n, inputs), dtype), argument("scale", (1,), "float32")
        out = argument("out", (n, inputs), "float32")
        with T.sblock("root"):
            each_row(n, inputs, lambda row: _round_row_by(x, scale, out, row))
    return builder.get()


def _round_row_by(x, scale, out, row) -> None:
    with T.serial(int(x.shape[1])) as k:
        store(out, (row,), k, _nearest(load(x, (row,), k) / scale[0]) * scale[0])


def _round_by_te(x: te.Tensor, scale: te.Tensor) -> te.Tensor:
    return te.compute(
        x.shape,
        lambda row, k: _nearest(x[row, k].astype("float32") / scale[0]) * scale[0],
        "round_activations",
    )
