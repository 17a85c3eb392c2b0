"""Pieces of attention kernels on CPUs: base-2 softmax, bounds of a window, rows of keys and values."""

import math
from typing import Any

from tvm.script import tirx as T

from .kv_entries import entry_scale, entry_value

QUANTIZED_KV = False  # flag: keys and values are cached quantised
STORED_KV_SCALES = False  # flag: … with scales from the checkpoint
LOG2_E = math.log2(math.e)
NO_KEY = -1.0e30  # the peak of a row that has seen no key: finite, for -inf minus -inf is NaN
FAR = 1 << 30  # more than any position

# 2^f on [-1/2, 1/2], a Chebyshev interpolation: within 3e-9 relative, 1e-7 with float32's rounding.
_EXP2 = (1.54614447e-4, 1.34004282e-3, 9.61805668e-3, 5.55032723e-2, 2.40226509e-1, 6.93147207e-1, 1.0)


def exp2(x: Any) -> Any:
    """2^x for x <= 0, float32; 0 below -126. Arithmetic alone, so that vectors stay vectors, unlike calls of libm."""
    bounded = T.max(x, T.float32(-126))
    whole = T.floor(bounded + T.float32(0.5))
    fraction = bounded - whole
    power: Any = T.float32(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * fraction + T.float32(coefficient)
    exponent = T.reinterpret("float32", T.shift_left(T.cast(whole, "int32") + 127, T.int32(23)))
    return T.Select(x < T.float32(-126), T.float32(0), power * exponent)


def reach(sm_scale: Any, window: int | None) -> Any:
    """How many of the last tokens a layer sees: a sliding layer says that it slides by a negative scale."""
    return T.int32(FAR) if window is None else T.if_then_else(sm_scale < T.float32(0), T.int32(window), T.int32(FAR))


def num_keys(pages: Any, page_size: Any, last_page_len: Any) -> Any:
    """Tokens in a sequence's pages, all full but the last."""
    return T.if_then_else(pages > 0, (pages - 1) * page_size + last_page_len, 0)


if not QUANTIZED_KV:

    def _element(source: Any, row: tuple[Any, ...], d: Any) -> Any:
        return source[(*row, d)]

    @T.inline
    def copy_row(tile, j, source, row, head_dim, lanes):
        """source[*row, :head_dim] into tile[j], as float32."""
        for c in T.serial(head_dim // lanes):
            for lane in T.vectorized(lanes):
                tile[j, c * lanes + lane] = T.cast(_element(source, row, c * lanes + lane), "float32")
        if head_dim % lanes > 0:
            for lane in T.vectorized(head_dim % lanes):
                tile[j, head_dim // lanes * lanes + lane] = T.cast(
                    _element(source, row, head_dim // lanes * lanes + lane), "float32"
                )

else:

    def _value(source: Any, row: tuple[Any, ...], d: Any, scale: Any) -> Any:
        return entry_value(source, row, d) if STORED_KV_SCALES else entry_value(source, row, d) * scale

    @T.inline
    def copy_row(tile, j, source, row, head_dim, lanes):
        """The values of the entry source[*row] into tile[j], as float32."""
        if not STORED_KV_SCALES:
            scale: T.let[T.float32] = entry_scale(source, row, head_dim)
        for c in T.serial(head_dim // lanes):
            for lane in T.vectorized(lanes):
                tile[j, c * lanes + lane] = _value(source, row, c * lanes + lane, scale)
        if head_dim % lanes > 0:
            for lane in T.vectorized(head_dim % lanes):
                tile[j, head_dim // lanes * lanes + lane] = _value(source, row, head_dim // lanes * lanes + lane, scale)


def fold(values: Any, row: int, width: int, combine: Any) -> None:
    """values[row, 0] becomes all of values[row, :width] combined; width: a power of two."""
    while width > 1:
        width //= 2
        _fold(values, row, width, combine)


@T.inline
def _fold(values, row, half, combine):
    for lane in T.vectorized(half):
        values[row, lane] = combine(values[row, lane], values[row, half + lane])
