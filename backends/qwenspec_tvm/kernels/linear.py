"""Matrix products: scheduled TIR over packed weights on a CPU, Relax's matmul elsewhere."""

from tvm.relax.frontend.nn import Tensor, op

from .gemm import matmul, take_rows
from .panels import num_panels
from .target import cores, is_cpu, lanes


def panel_width() -> int:
    """Outputs in a panel of a packed weight: two vectors of float32."""
    return 2 * lanes()


def weight_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape in which the current target wants a weight [out, in] stored.

    -> [panels, in, width] on a CPU (see panels.py), otherwise [out, in]
    """
    if not is_cpu():
        return out_features, in_features
    return num_panels(out_features, panel_width()), in_features, panel_width()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, out_dtype: str | None = None) -> Tensor:
    """x Wᵀ + b, accumulated in float32 and rounded once.

    x: [n, in]
    weight: weight_shape(out, in), x's dtype
    bias: [out], x's dtype
    out_dtype: x's dtype unless given
    -> [n, out]
    """
    n, in_features = x.shape
    out_dtype = out_dtype or x.dtype
    if not is_cpu():
        out = op.matmul(x, op.permute_dims(weight), out_dtype="float32")
        if bias is not None:
            out = out + bias.astype("float32")
        return out.astype(out_dtype)
    function = matmul(out_features, int(in_features), panel_width(), x.dtype, out_dtype, bias is not None, cores())
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return op.tensor_ir_op(function, "linear", inputs, Tensor.placeholder((n, out_features), out_dtype))


def take(weight: Tensor, ids: Tensor, in_features: int) -> Tensor:
    """Rows of a weight, as an embedding reads them.

    weight: weight_shape(out, in)
    ids: [n], int32, each less than out
    -> [n, in]
    """
    if not is_cpu():
        return op.take(weight, ids, axis=0)
    function = take_rows(int(weight.shape[0]), in_features, panel_width(), weight.dtype)
    out = Tensor.placeholder((ids.shape[0], in_features), weight.dtype)
    return op.tensor_ir_op(function, "take", [weight, ids], out)
