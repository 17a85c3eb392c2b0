"""Pieces of the CPU kernels that work on rows: the loop over them, values in float32, a row's norm.

Plain functions that build TIR where a TVMScript function calls them: TVM parses its own macros slowly.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

ONE_PLUS = True  # flag: the norm multiplies by 1 + weight

SERIAL_VALUES = 32768  # fewer take less time than starting threads on them and waiting for these

Row = tuple[Any, ...]  # the indices of a buffer but the last


def each_row(n: Any, values: int, body: Callable[[Any], None]) -> None:
    """body(row) for each of n rows, by all threads where rows of so many values are enough work."""
    with T.If(n * values < SERIAL_VALUES):
        with T.Then(), T.serial(n) as row:
            body(row)
        with T.Else(), T.parallel(n) as row:
            body(row)


def load(buffer: Any, row: Row, i: Any) -> Any:
    """buffer[*row, i] in float32."""
    return T.cast(buffer[(*row, i)], "float32")


def store(buffer: Any, row: Row, i: Any, value: Any) -> None:
    """buffer[*row, i] = value, a float32."""
    T.buffer_store(buffer, T.cast(value, buffer.dtype), [*row, i])


def rounded(value: Any, dtype: str) -> Any:
    """A float32 rounded to dtype, still a float32."""
    if dtype == "bfloat16":
        # By its bits, to nearest, ties to even: TVM leaves out casts to bfloat16 and back, and keeps what is
        # stored in between, if it is in a local buffer, in float32.
        bits = T.reinterpret("uint32", value)
        bits = bits + T.uint32(0x7FFF) + T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
        return T.reinterpret("float32", T.bitwise_and(bits, T.uint32(0xFFFF0000)))
    return T.cast(T.cast(value, dtype), "float32")


def normalize(x: Any, row: Row, weight: Any, out: Any, out_row: Row, eps: float, lanes: int) -> None:
    """out[*out_row] = x[*row] / sqrt(mean(x²) + eps) · w, rounded to x's dtype as `norm.rms_norm` says."""
    size = int(weight.shape[0])
    squares = T.alloc_buffer((lanes,), "float32", scope="local")
    with T.vectorized(lanes) as lane:
        store(squares, (), lane, 0.0)
    with T.serial(-(-size // lanes)) as block, T.vectorized(lanes) as lane:
        i = block * lanes + lane
        with T.If(i < size), T.Then():
            store(squares, (), lane, squares[lane] + load(x, row, i) * load(x, row, i))
    total = T.alloc_buffer((1,), "float32", scope="local")
    store(total, (), 0, 0.0)
    with T.unroll(lanes) as lane:
        store(total, (), 0, total[0] + squares[lane])
    store(total, (), 0, T.rsqrt(total[0] / float(size) + eps))
    with T.serial(size) as i:
        unit, w = load(x, row, i) * total[0], load(weight, (), i)
        scaled = unit * (1.0 + w) if ONE_PLUS else rounded(unit, x.dtype) * w
        store(out, out_row, i, rounded(scaled, x.dtype))
