"""Keys and values quantised into the KV cache's entries, and queries and outputs carried in them, on CPUs.

[KV_DTYPE == "fp8_e4m3"] x is cached as q, the e4m3 nearest to x / s, at most 448 in magnitude, and read as q · s.
[KV_DTYPE == "int8"] x is cached as q, the whole number nearest to x / s, halves to even, and read as q · s.
[not STORED_KV_SCALES and KV_DTYPE == "fp8_e4m3"] s is max|x| / 448 over a token's head; where it is 0, so is q.
[not STORED_KV_SCALES and KV_DTYPE == "int8"] s is max|x| / 127 over a token's head; where it is 0, so is q.
[not STORED_KV_SCALES] It depends on no other token: how a prompt is cut into chunks changes nothing.
[STORED_KV_SCALES] s is the layer's, one for keys and one for values. TVM's cache does not hand it to attention, which
[STORED_KV_SCALES] reads q alone. Its queries are multiplied by the keys' s instead, and its outputs by the values', in
[STORED_KV_SCALES] float32: it is linear in both.
"""

from functools import cache
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from .e4m3 import over_256
from .gemm import argument, scheduled_function
from .kv_layout import ENTRY_DTYPE, entry_size, query_entries
from .rows import Row, each_row, load, store

KV_DTYPE = "fp8_e4m3"  # flag: of what is cached
STORED_KV_SCALES = False  # flag: a layer has a scale for keys and one for values, from the checkpoint

LARGEST = 448.0 if KV_DTYPE == "fp8_e4m3" else 127.0  # magnitude of q


def floats(entries: Any, num_heads: int, head_dim: int) -> Any:
    """The float32 [n, num_heads, head_dim] at the start of each token's entries: a buffer in the same memory."""
    n, count, size = entries.shape
    strides = [int(count * size) // 4, head_dim, 1]
    return T.decl_buffer((n, num_heads, head_dim), "float32", data=entries.data, strides=strides)


def entry_value(entries: Any, row: Row, i: Any) -> Any:
    """Value i of an entry in float32.

    [not STORED_KV_SCALES] To be multiplied by entry_scale.
    [STORED_KV_SCALES] To be multiplied by attention_scale."""
    byte = entries[(*row, i)]
    if KV_DTYPE == "int8":
        return T.cast(byte, "float32")
    if STORED_KV_SCALES:
        is_nan = T.bitwise_and(byte, T.int8(0x7F)) == T.int8(0x7F)
        return T.Select(is_nan, T.float32(float("nan")), over_256(byte))
    return over_256(byte)


if not STORED_KV_SCALES:

    def entry_scale(entries: Any, row: Row, head_dim: int) -> Any:
        """What an entry's values are to be multiplied by."""
        lowest, *others = (T.cast(T.cast(entries[(*row, head_dim + i)], "uint8"), "uint32") for i in range(4))
        bits = lowest
        for i, byte in enumerate(others, start=1):
            bits = T.bitwise_or(bits, T.shift_left(byte, T.uint32(8 * i)))
        scale = T.reinterpret("float32", bits)
        return scale * T.float32(256) if KV_DTYPE == "fp8_e4m3" else scale


@cache
def pack(num_heads: int, num_cached: int, head_dim: int, dtype: str) -> PrimFunc:
    """qkv [n, num_heads + num_cached, head_dim] -> its entries [n, query_entries + num_cached, entry_size].

    [STORED_KV_SCALES] Takes k_scale and v_scale, [1] float32, after qkv.
    num_cached: key heads, then as many value heads
    """
    first, size = query_entries(num_heads, head_dim), entry_size(head_dim)
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        qkv = argument("qkv", (n, num_heads + num_cached, head_dim), dtype)
        if STORED_KV_SCALES:
            k_scale, v_scale = argument("k_scale", (1,), "float32"), argument("v_scale", (1,), "float32")
        out = argument("out", (n, first + num_cached, size), ENTRY_DTYPE)

        def pack_token(token: Any) -> None:
            queries = floats(out, num_heads, head_dim)
            with T.serial(num_heads) as head, T.serial(head_dim) as i:
                query = load(qkv, (token, head), i)
                store(queries, (token, head), i, query * attention_scale(k_scale) if STORED_KV_SCALES else query)
            with T.serial(num_cached) as head:
                x, entry = (token, num_heads + head), (token, first + head)
                if STORED_KV_SCALES:
                    scale = T.Select(head < num_cached // 2, k_scale[0], v_scale[0])
                    _quantize(qkv, x, out, entry, scale)
                else:
                    scale = T.alloc_buffer((1,), "float32", scope="local")
                    store(scale, (), 0, _largest(qkv, x) / T.float32(LARGEST))
                    _quantize(qkv, x, out, entry, scale[0])
                    bits = T.reinterpret("int32", scale[0])
                    for i in range(4):
                        store(out, entry, head_dim + i, T.shift_right(bits, T.int32(8 * i)))

        with T.sblock("root"):  # as Relax expects of functions of one input
            each_row(n, (num_heads + num_cached) * head_dim, pack_token)
    return builder.get()


@cache
def unpack(num_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """Entries [n, query_entries, entry_size] with attention's outputs -> these, rounded once, [n, num_heads, head_dim].

    [STORED_KV_SCALES] Takes v_scale, [1] float32, after the entries.
    """
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        entries = argument("entries", (n, query_entries(num_heads, head_dim), entry_size(head_dim)), ENTRY_DTYPE)
        if STORED_KV_SCALES:
            v_scale = argument("v_scale", (1,), "float32")
        out = argument("out", (n, num_heads, head_dim), dtype)

        def unpack_token(token: Any) -> None:
            outputs = floats(entries, num_heads, head_dim)
            with T.serial(num_heads) as head, T.serial(head_dim) as i:
                value = outputs[token, head, i]
                store(out, (token, head), i, value * attention_scale(v_scale) if STORED_KV_SCALES else value)

        with T.sblock("root"):  # as Relax expects of functions of one input
            each_row(n, num_heads * head_dim, unpack_token)
    return builder.get()


if STORED_KV_SCALES:

    def attention_scale(scale: Any) -> Any:
        """What entry_value is to be multiplied by, and attention does not."""
        return scale[0] * T.float32(256)


if not STORED_KV_SCALES:

    def _largest(x: Any, row: Row) -> Any:
        """Of the magnitudes in a row; NaN if there is one."""
        largest = T.alloc_buffer((1,), "int32", scope="local")
        store(largest, (), 0, 0)
        with T.serial(x.shape[-1]) as i:  # Bits of magnitudes are ordered as these are, and NaN's above all.
            store(largest, (), 0, T.max(largest[0], _magnitude_bits(load(x, row, i))))
        return T.reinterpret("float32", largest[0])


def _quantize(x: Any, row: Row, out: Any, entry: Row, scale: Any) -> None:
    """q of a row into an entry."""
    with T.serial(x.shape[-1]) as i:
        byte = _byte(load(x, row, i) / scale)
        store(out, entry, i, byte if STORED_KV_SCALES else T.Select(scale == T.float32(0), 0, byte))


if KV_DTYPE == "int8":

    def _byte(value: Any) -> Any:
        """The whole number nearest to a float32, halves to even, at most LARGEST, in the low byte of an int32."""
        value = T.max(T.min(value, T.float32(LARGEST)), T.float32(-LARGEST))
        # float32 counts in ones from 2^23 on.
        return T.reinterpret("int32", value + T.float32(1.5 * 2**23))

else:

    def _byte(value: Any) -> Any:
        """The e4m3 nearest to a float32, ties to even, at most LARGEST, in the low byte of an int32."""
        size = T.min(T.reinterpret("float32", _magnitude_bits(value)), T.float32(LARGEST))
        bits = T.reinterpret("int32", size)
        # 3 of 23 bits of the fraction are left, and the exponent's bias is 7, not 127.
        to_even = T.int32(0x7FFFF) + T.bitwise_and(T.shift_right(bits, T.int32(20)), T.int32(1))
        normal = T.shift_right(bits + to_even, T.int32(20)) - T.int32((127 - 7) << 3)
        # Below 2^-6 e4m3 counts in 2^-9, as float32 does from 2^14 on.
        small = T.reinterpret("int32", size + T.float32(2**14)) - T.int32((127 + 14) << 23)
        byte = T.Select(size < T.float32(2**-6), small, normal)
        # NaN by its bits: TVM takes value == value for true.
        byte = T.Select(_magnitude_bits(value) > T.int32(0x7F800000), T.int32(0x7F), byte)
        return T.bitwise_or(byte, T.shift_right(T.bitwise_and(T.reinterpret("int32", value), T.int32(-(2**31))), 24))


def _magnitude_bits(value: Any) -> Any:
    """float32 -> the bits of |x|, int32."""
    return T.bitwise_and(T.reinterpret("int32", value), T.int32(0x7FFFFFFF))
