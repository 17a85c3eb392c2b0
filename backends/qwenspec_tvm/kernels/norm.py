"""RMSNorm, alone and fused with the residual addition before it."""

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from .rows import each_row, load, normalize, store
from .target import is_cpu, lanes

ONE_PLUS = True  # flag: the norm multiplies by 1 + weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last dimension, statistics in float32.

    [not ONE_PLUS] x̂ is rounded to x's dtype, then multiplied by the weight.
    [ONE_PLUS] w = 1 + weight, and the product is taken in float32.

    x: [n, d]
    weight: [d], x's dtype
    -> [n, d]
    """
    if not is_cpu():
        return op.tensor_expr_op(_rms_norm_te, "rms_norm", [x, weight, eps])
    function = _rms_norm_kernel.specialize(SIZE=int(x.shape[1]), DTYPE=x.dtype, EPS=eps, LANES=4 * lanes())
    return op.tensor_ir_op(function, "rms_norm", [x, weight], Tensor.placeholder(x.shape, x.dtype))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + residual, rounded to their dtype, and rms_norm(h). Neither argument is changed.

    x, residual: [n, d]
    weight: [d], x's dtype
    -> rms_norm(h) [n, d], h [n, d]
    """
    if not is_cpu():
        h = x + residual
        return rms_norm(h, weight, eps), h
    function = _add_rms_norm_kernel.specialize(SIZE=int(x.shape[1]), DTYPE=x.dtype, EPS=eps, LANES=4 * lanes())
    outputs = [Tensor.placeholder(x.shape, x.dtype) for _ in range(2)]
    out, h = op.tensor_ir_op(function, "add_rms_norm", [x, residual, weight], outputs)
    return out, h


def _rms_norm_te(x: te.Tensor, weight: te.Tensor, eps: float) -> te.Tensor:
    n, size = x.shape
    column = te.reduce_axis((0, size), "column")

    def square(row):
        value = x[row, column].astype("float32")
        return te.sum(value * value, axis=column)

    squares = te.compute((n,), square, "squares")

    def scale(row, i):
        unit = x[row, i].astype("float32") * tirx.rsqrt(squares[row] / tirx.const(int(size), "float32") + eps)
        scaled = unit * (1.0 + weight[i].astype("float32")) if ONE_PLUS else unit.astype(x.dtype) * weight[i]
        return scaled.astype(x.dtype)

    return te.compute((n, size), scale, "rms_norm")


def _add_and_normalize(x, residual, weight, out, h, row, eps, lanes):
    with T.serial(weight.shape[0]) as i:
        store(h, row, i, load(x, row, i) + load(residual, row, i))
    normalize(h, row, weight, out, row, eps, lanes)


@T.jit(private=True)
def _rms_norm_kernel(
    x_handle: T.handle,
    weight_handle: T.handle,
    out_handle: T.handle,
    *,
    SIZE: T.constexpr,
    DTYPE: T.constexpr,
    EPS: T.constexpr,
    LANES: T.constexpr,
):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
    n = T.int64()
    x = T.match_buffer(x_handle, (n, SIZE), DTYPE)
    weight = T.match_buffer(weight_handle, (SIZE,), DTYPE)
    out = T.match_buffer(out_handle, (n, SIZE), DTYPE)

    each_row(n, SIZE, lambda row: normalize(x, (row,), weight, out, (row,), EPS, LANES))


@T.jit(private=True)
def _add_rms_norm_kernel(
    x_handle: T.handle,
    residual_handle: T.handle,
    weight_handle: T.handle,
    out_handle: T.handle,
    h_handle: T.handle,
    *,
    SIZE: T.constexpr,
    DTYPE: T.constexpr,
    EPS: T.constexpr,
    LANES: T.constexpr,
):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
    n = T.int64()
    x = T.match_buffer(x_handle, (n, SIZE), DTYPE)
    residual = T.match_buffer(residual_handle, (n, SIZE), DTYPE)
    weight = T.match_buffer(weight_handle, (SIZE,), DTYPE)
    out = T.match_buffer(out_handle, (n, SIZE), DTYPE)
    h = T.match_buffer(h_handle, (n, SIZE), DTYPE)

    each_row(n, SIZE, lambda row: _add_and_normalize(x, residual, weight, out, h, (row,), EPS, LANES))
