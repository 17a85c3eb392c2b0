"""The gate of a gated MLP."""

import math
from functools import cache
from typing import Any

from tvm import te
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .attention_parts import LOG2_E, exp2
from .rows import each_row, load, store
from .target import is_cpu

ACTIVATION = "silu"  # flag: silu, relu, gelu or gelu_tanh


def act_and_mul(gate_up: Tensor) -> Tensor:
    """act(gate) · up, in float32, rounded once.

    gate_up: [n, 2i]: gate, then up
    -> [n, i]
    """
    n, width = gate_up.shape
    size = int(width) // 2
    if not is_cpu():
        return op.tensor_expr_op(_act_and_mul_te, "act_and_mul", [gate_up])
    function = _act_and_mul_tir(size, gate_up.dtype)
    return op.tensor_ir_op(function, "act_and_mul", [gate_up], Tensor.placeholder((n, size), gate_up.dtype))


def _act(x: Any) -> Any:
    """float32 -> float32."""
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "relu":
        return T.max(x, T.float32(0))
    elif ACTIVATION == "gelu":
        return T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(math.sqrt(0.5))))
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        return x * _sigmoid(T.float32(2 * math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x))


def _sigmoid(x: Any) -> Any:
    if not is_cpu():
        return T.sigmoid(x)
    # From e^-|x|, which does not overflow.
    power = exp2(T.float32(-LOG2_E) * T.max(x, -x))
    return T.Select(x < T.float32(0), power, T.float32(1)) / (T.float32(1) + power)


def _act_and_mul_te(gate_up: te.Tensor) -> te.Tensor:
    n, width = gate_up.shape
    size = width // 2

    def gated(row, i):
        gate, up = gate_up[row, i].astype("float32"), gate_up[row, size + i].astype("float32")
        return (_act(gate) * up).astype(gate_up.dtype)

    return te.compute((n, size), gated, "act_and_mul")


def _gate(gate_up, out, row):
    size = out.shape[1]
    with T.serial(size) as i:
        store(out, row, i, _act(load(gate_up, row, i)) * load(gate_up, row, size + i))


@cache
def _act_and_mul_tir(size: int, dtype: str) -> PrimFunc:
    # The one kernel in S-TIR, with a block: Relax takes for granted that functions of one input are.
    @T.prim_func(private=True, s_tir=True)
    def act_and_mul(gate_up_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int64()
        gate_up = T.match_buffer(gate_up_handle, (n, 2 * size), dtype)
        out = T.match_buffer(out_handle, (n, size), dtype)

        with T.sblock("root"):
            each_row(n, 2 * size, lambda row: _gate(gate_up, out, (row,)))

    return act_and_mul
