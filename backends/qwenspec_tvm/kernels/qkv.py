"""What happens between the QKV projection and attention."""

import math
from functools import partial
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from .rows import each_row, load, normalize, store
from .target import is_cpu, lanes

QK_NORM = True  # flag: RMSNorm of each query and key head before RoPE
ONE_PLUS = True  # flag: the norm multiplies by 1 + weight
LOGN = True  # flag: queries are scaled by their position after RoPE
PARTIAL_ROTARY = True  # flag: rotary_dim < head_dim
DYNAMIC_ROPE = True  # flag: rotary frequencies follow the sequence's length
ROUND_TABLES = True  # flag: cos and sin are rounded to the activation dtype
ATTENTION_FACTOR = True  # flag: cos and sin are multiplied by a factor


def rotary_tables(positions: Tensor, inv_freq: Tensor, dtype: str, attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles.

    positions: [n], int32
    [not DYNAMIC_ROPE] inv_freq: [rotary_dim / 2], float32, radians a position
    [DYNAMIC_ROPE] inv_freq: [n, rotary_dim / 2], float32, radians a position
    [ROUND_TABLES] dtype: the tables', computed in float32
    [ATTENTION_FACTOR] attention_factor: of both
    [ROUND_TABLES] -> cos, sin [n, rotary_dim / 2]
    [not ROUND_TABLES] -> cos, sin [n, rotary_dim / 2], float32
    """

    def tables(positions: te.Tensor, inv_freq: te.Tensor) -> list[te.Tensor]:
        def table(function: Any, name: str) -> te.Tensor:
            def value(token, i):
                frequency = inv_freq[token, i] if DYNAMIC_ROPE else inv_freq[i]
                angle = positions[token].astype("float32") * frequency
                # In float64: nvcc's fast float32 functions, which TVM asks for, are wrong for large angles.
                result = function(angle.astype("float64")).astype("float32")
                if ATTENTION_FACTOR:
                    result = result * tirx.const(attention_factor, "float32")
                return result.astype(dtype) if ROUND_TABLES else result

            return te.compute((positions.shape[0], inv_freq.shape[-1]), value, name)

        return [table(tirx.cos, "cos"), table(tirx.sin, "sin")]

    cos, sin = op.tensor_expr_op(tables, "rotary_tables", [positions, inv_freq])
    return cos, sin


if LOGN:

    def logn_scale(positions: Tensor, train_length: int) -> Tensor:
        """LogN's factor of each query: ln(position + 1) / ln(train_length), at least 1.

        positions: [n], int32
        -> [n], float32
        """

        def scale(positions: te.Tensor) -> te.Tensor:
            def value(token):
                length = positions[token].astype("float32") + 1.0
                return tirx.max(tirx.log(length) / tirx.const(math.log(train_length), "float32"), 1.0)

            return te.compute(positions.shape, value, "logn_scale")

        return op.tensor_expr_op(scale, "logn_scale", [positions])


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    query_scale: Tensor,
) -> Tensor:
    """Rotated queries and keys, and the values as they are.

    [QK_NORM] Each query and key head is normalised first, x̂ = x / sqrt(mean(x²) + eps) in float32,
    [QK_NORM and not ONE_PLUS] then rounded to its dtype and multiplied by the weight.
    [QK_NORM and ONE_PLUS] then multiplied by 1 + weight in float32.
    [not PARTIAL_ROTARY] RoPE turns the pairs (i, i + head_dim / 2) of every head, in float32.
    [PARTIAL_ROTARY] RoPE turns the pairs (i, i + rotary_dim / 2) of every head's first rotary_dim values, in
    [PARTIAL_ROTARY] float32; the other values stay as they are.

    qkv: [n, num_heads + 2 num_kv_heads, head_dim]: query heads, key heads, value heads
    cos, sin: [n, rotary_dim / 2], any float dtype
    [QK_NORM] q_norm_weight, k_norm_weight: [head_dim], qkv's dtype
    [LOGN] query_scale: [n] float32, LogN's factor of each query, applied after RoPE
    -> [n, num_heads + 2 num_kv_heads, head_dim]
    """
    inputs = [qkv, cos, sin]
    sizes: dict[str, Any] = {"HEADS": num_heads, "KV_HEADS": num_kv_heads}
    if QK_NORM:
        inputs += [q_norm_weight, k_norm_weight]
        sizes |= {"EPS": eps}
    if LOGN:
        inputs += [query_scale]
    if not is_cpu():
        return op.tensor_expr_op(partial(_rotate_te, **sizes), "rotate", inputs)
    if QK_NORM:
        sizes |= {"LANES": lanes()}
    sizes |= {"HEAD_DIM": int(qkv.shape[2]), "HALF": int(cos.shape[1])}
    function = _rotate_kernel.specialize(**sizes, DTYPE=qkv.dtype, TABLES=cos.dtype)
    return op.tensor_ir_op(function, "rotate", inputs, Tensor.placeholder(qkv.shape, qkv.dtype))


def _rotate_te(
    qkv: te.Tensor,
    cos: te.Tensor,
    sin: te.Tensor,
    q_norm_weight: te.Tensor,
    k_norm_weight: te.Tensor,
    query_scale: te.Tensor,
    *,
    HEADS: int,
    KV_HEADS: int,
    EPS: float,
) -> te.Tensor:
    n, _, head_dim = qkv.shape
    half = cos.shape[1]
    if QK_NORM:
        column = te.reduce_axis((0, head_dim), "column")

        def square(token, head):
            x = qkv[token, head, column].astype("float32")
            return te.sum(x * x, axis=column)

        # Of value heads too: dlight gives the rotation the grid of this reduction, and would leave the rest out.
        squares = te.compute((n, HEADS + 2 * KV_HEADS), square, "squares")

    def normalized(token, head, i):
        x = qkv[token, head, i].astype("float32")
        if QK_NORM:
            unit = x * tirx.rsqrt(squares[token, head] / tirx.const(int(head_dim), "float32") + EPS)
            weight = tirx.if_then_else(head < HEADS, q_norm_weight[i], k_norm_weight[i])
            if ONE_PLUS:
                x = (unit * (1.0 + weight.astype("float32"))).astype(qkv.dtype).astype("float32")
            else:
                x = (unit.astype(qkv.dtype) * weight).astype("float32")
        return x

    def rotated(token, head, i):
        is_first = i < half
        pair = tirx.if_then_else(is_first, i, i - half)
        partner = normalized(token, head, tirx.if_then_else(is_first, i + half, i - half))
        turned = tirx.if_then_else(is_first, -partner, partner) * sin[token, pair].astype("float32")
        turned = normalized(token, head, i) * cos[token, pair].astype("float32") + turned
        if PARTIAL_ROTARY:
            turned = tirx.if_then_else(i < 2 * half, turned, normalized(token, head, i))
        if LOGN:
            turned = turned * tirx.if_then_else(head < HEADS, query_scale[token], 1.0)
        return tirx.if_then_else(head < HEADS + KV_HEADS, turned.astype(qkv.dtype), qkv[token, head, i])

    return te.compute(qkv.shape, rotated, "rotate")


def _rotate_token(qkv, cos, sin, q_norm, k_norm, query_scale, out, token, heads, kv_heads, eps, lanes):
    head_dim = qkv.shape[2]
    if QK_NORM:
        normalized = T.alloc_buffer((head_dim,), "float32", scope="local")
    with T.serial(heads) as head:
        row = token, head
        if QK_NORM:
            normalize(qkv, row, q_norm, normalized, (), eps, lanes)
            _turn(normalized, (), cos, sin, out, row, load(query_scale, (), token))
        else:
            _turn(qkv, row, cos, sin, out, row, load(query_scale, (), token))
    with T.serial(heads, heads + kv_heads) as head:
        row = token, head
        if QK_NORM:
            normalize(qkv, row, k_norm, normalized, (), eps, lanes)
            _turn(normalized, (), cos, sin, out, row, 1.0)
        else:
            _turn(qkv, row, cos, sin, out, row, 1.0)
    with T.serial(heads + kv_heads, heads + 2 * kv_heads) as head, T.serial(head_dim) as i:
        T.buffer_store(out, qkv[token, head, i], [token, head, i])


def _turn(x, x_row, cos, sin, out, row, scale):
    """out[*row] = x[*x_row], rotated and scaled."""
    half = cos.shape[1]
    with T.serial(half) as i:
        first, second = load(x, x_row, i), load(x, x_row, half + i)
        c, s = load(cos, row[:1], i), load(sin, row[:1], i)
        turned = first * c - second * s, second * c + first * s
        store(out, row, i, turned[0] * scale if LOGN else turned[0])
        store(out, row, half + i, turned[1] * scale if LOGN else turned[1])
    if PARTIAL_ROTARY:
        with T.serial(2 * half, out.shape[2]) as i:
            store(out, row, i, load(x, x_row, i) * scale if LOGN else load(x, x_row, i))


@T.jit(private=True)
def _rotate_kernel(
    qkv_handle: T.handle,
    cos_handle: T.handle,
    sin_handle: T.handle,
    q_norm_handle: T.handle,
    k_norm_handle: T.handle,
    query_scale_handle: T.handle,
    out_handle: T.handle,
    *,
    HEADS: T.constexpr,
    KV_HEADS: T.constexpr,
    HEAD_DIM: T.constexpr,
    HALF: T.constexpr,
    EPS: T.constexpr,
    DTYPE: T.constexpr,
    TABLES: T.constexpr,
    LANES: T.constexpr,
):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
    n = T.int64()
    qkv = T.match_buffer(qkv_handle, (n, HEADS + 2 * KV_HEADS, HEAD_DIM), DTYPE)
    cos = T.match_buffer(cos_handle, (n, HALF), TABLES)
    sin = T.match_buffer(sin_handle, (n, HALF), TABLES)
    if QK_NORM:
        q_norm = T.match_buffer(q_norm_handle, (HEAD_DIM,), DTYPE)
        k_norm = T.match_buffer(k_norm_handle, (HEAD_DIM,), DTYPE)
    if LOGN:
        query_scale = T.match_buffer(query_scale_handle, (n,), "float32")
    out = T.match_buffer(out_handle, (n, HEADS + 2 * KV_HEADS, HEAD_DIM), DTYPE)

    each_row(
        n,
        (HEADS + 2 * KV_HEADS) * HEAD_DIM,
        lambda token: _rotate_token(
            qkv, cos, sin, q_norm, k_norm, query_scale, out, token, HEADS, KV_HEADS, EPS, LANES
        ),
    )
