"""Matrix products with quantised weights, which become float32 in registers: (q - z) · s, products summed in float32.

No weight is ever in memory in full precision: scheduled TIR over panels on a CPU, elsewhere a product whose operand is
an expression.
"""

from typing import Any

from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.script.ir_builder import tirx as T

from .e4m3 import over_256, round_activations, round_activations_by
from .linear import panel_width
from .quantized_gemm import quantized_matmul, take_quantized_rows
from .quantized_panels import Layout
from .target import cores, is_cpu

FP8 = True  # flag: weights are float8
ROUNDED_ACTIVATIONS = True  # flag: … and activations are rounded to it
STATIC_ACTIVATIONS = True  # flag: … with a scale that the checkpoint has
BITS = "4"  # flag: 4 or 8, of the linear layers' integers; empty where they are none
INT8_HEAD = True  # flag: the LM head is int8, unlike the linear layers
ZERO_POINTS = True  # flag: groups have zero points
ACT_ORDER = True  # flag: inputs belong to groups in an order of their own
QUANTIZED_HEAD = True  # flag: the LM head is quantised, and with it a tied embedding


class QuantizedWeight(nn.Module):
    """A weight [out, in], stored as the current target's kernels read it (see quantized_panels.py)."""

    def __init__(self, out_features: int, in_features: int, bits: int, group_size: int | None) -> None:
        """group_size: inputs that share a scale; None: all."""
        self.layout = Layout(out_features, in_features, bits, group_size, panel_width() if is_cpu() else None)
        arrays = self.layout.arrays
        self.values = _Stored(*arrays["values"])
        self.scales = _Stored(*arrays["scales"])
        if ZERO_POINTS:
            self.zeros = _Stored(*arrays["zeros"])
        if ACT_ORDER:
            self.order = _Stored((in_features,), "int32")  # which input each column multiplies
        if STATIC_ACTIVATIONS:
            self.input_scale = _Stored((1,), "float32")

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: str | None = None) -> Tensor:
        """x Wᵀ + b, rounded once.

        [ROUNDED_ACTIVATIONS and not STATIC_ACTIVATIONS] x is rounded to e4m3 first (see e4m3.round_activations).
        [STATIC_ACTIVATIONS] x is rounded to e4m3 first (see e4m3.round_activations_by).

        x: [n, in]
        bias: [out]
        out_dtype: x's dtype unless given
        -> [n, out]
        """
        out_dtype = out_dtype or x.dtype
        if ACT_ORDER:
            x = op.tensor_expr_op(_columns_te, "columns", [x, self.order])
        if STATIC_ACTIVATIONS:
            x = round_activations_by(x, self.input_scale)
        elif ROUNDED_ACTIVATIONS:
            x = round_activations(x, self.layout.group)
        if not is_cpu():
            out = op.tensor_expr_op(self._matmul_te, "NT_matmul", [x, *self._arrays])
            if bias is not None:
                out = out + bias.astype("float32")
            return out.astype(out_dtype)
        bias_dtype = None if bias is None else bias.dtype
        function = quantized_matmul(self.layout, x.dtype, out_dtype, bias_dtype, cores())
        inputs = [x, *self._arrays] if bias is None else [x, *self._arrays, bias]
        out = Tensor.placeholder((x.shape[0], self.layout.outputs), out_dtype)
        return op.tensor_ir_op(function, "linear", inputs, out)

    if QUANTIZED_HEAD:

        def take(self, ids: Tensor, dtype: str) -> Tensor:
            """Rows, as an embedding reads them, rounded once.

            ids: [n], int32, each less than out
            -> [n, in], dtype
            """
            if not is_cpu():
                return op.tensor_expr_op(self._take_te, "take", [ids, dtype, *self._arrays])
            function = take_quantized_rows(self.layout, dtype)
            out = Tensor.placeholder((ids.shape[0], self.layout.inputs), dtype)
            return op.tensor_ir_op(function, "take", [*self._arrays, ids], out)

        def _take_te(self, ids: te.Tensor, dtype: str, *arrays: te.Tensor) -> te.Tensor:
            shape = ids.shape[0], self.layout.inputs
            return te.compute(shape, lambda i, k: self._weight_at(arrays, ids[i], k).astype(dtype), "take")

    @property
    def _arrays(self) -> list[Tensor]:
        return [self.values, self.scales, self.zeros] if ZERO_POINTS else [self.values, self.scales]

    def _matmul_te(self, x: te.Tensor, *arrays: te.Tensor) -> te.Tensor:
        """float32 [n, out]. The weight is a stage of its own, which every schedule computes where it is used."""
        layout = self.layout
        weight = te.compute(
            (layout.outputs, layout.inputs), lambda row, k: self._weight_at(arrays, row, k), "dequantized"
        )
        k = te.reduce_axis((0, layout.inputs), "k")
        return te.compute(
            (x.shape[0], layout.outputs),
            lambda i, j: te.sum(x[i, k].astype("float32") * weight[j, k], axis=k),
            "NT_matmul",
        )

    def _weight_at(self, arrays: Any, row: Any, k: Any) -> Any:
        """The dequantised weight of an output and an input, float32."""
        layout, group = self.layout, k // self.layout.group
        position = group * layout.filled_group + k % layout.group
        word, scale = arrays[0][row, position // layout.per_word], arrays[1][row, group].astype("float32")
        if FP8:
            return over_256(word) * T.float32(256) * scale
        zero = arrays[2][row, group].astype("float32") if ZERO_POINTS else T.float32(layout.zero)
        return (_value(word, position, layout) - zero) * scale


def _columns_te(x: te.Tensor, order: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda row, k: x[row, order[k]], "columns")


def _value(word: Any, position: Any, layout: Layout) -> Any:
    """A word's value at a position, as float32."""
    if BITS == "8":
        return word.astype("float32")
    if INT8_HEAD and layout.bits == 8:
        return word.astype("float32")
    shift = (position % layout.per_word * 4).astype("int32")
    return T.bitwise_and(T.shift_right(word, shift), T.int32(15)).astype("float32")


class _Stored(nn.Parameter):
    """A parameter of a dtype of its own, whatever the model's is."""

    def to(self, dtype: str | None = None) -> None:
        pass
