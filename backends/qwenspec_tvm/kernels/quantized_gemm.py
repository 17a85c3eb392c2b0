"""x Wᵀ on a CPU over quantised weights in panels (quantized_panels.py): scheduled TIR functions, as those of gemm.py.

One row: values become float32 in registers, where the products of a run are summed, and a run's sum is scaled once.
What its zero point takes away, z · Σx, is the sum's first value; Σx is computed once for all outputs. More rows:
gemm.py's product, for which a block of a panel becomes float32, (q - z) · s, for many rows at once.
"""

from functools import cache
from itertools import product

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from .e4m3 import over_256
from .gemm import (
    BLOCK_INPUTS,
    STREAMS,
    Sizes,
    argument,
    clear,
    float32,
    gemm,
    panels_of,
    prefetch,
    scheduled_function,
    store_parts,
)
from .quantized_panels import Layout

FP8 = True  # flag: weights are float8
BITS = "4"  # flag: 4 or 8, of the linear layers' integers; empty where they are none
INT8_HEAD = True  # flag: the LM head is int8, unlike the linear layers
ZERO_POINTS = True  # flag: groups have zero points
QUANTIZED_HEAD = True  # flag: the LM head is quantised, and with it a tied embedding

LINE = 64  # bytes of memory that are fetched at once
AHEAD = 1024  # bytes that one row fetches ahead at each place: a line of values keeps it busy for long


class QuantizedPanels:
    """A quantised weight with the methods of gemm.FloatPanels. Its arrays are the function's next arguments."""

    def __init__(self, layout: Layout) -> None:
        assert layout.width is not None
        arrays = {name: argument(name, *array) for name, array in layout.arrays.items()}
        self.layout, self.values, self.scales = layout, arrays["values"], arrays["scales"]
        if ZERO_POINTS:
            self.zeros = arrays["zeros"]
        self.width, self.positions = layout.width, layout.positions
        self.block = layout.run * max(1, BLOCK_INPUTS // layout.run)

    def x_at(self, x, row, position):
        if self.positions == self.layout.inputs:
            return float32(x[row, position])
        k, is_filled = self.layout.input_at(position)
        return T.if_then_else(is_filled, float32(x[row, k]), T.float32(0))

    def is_direct(self, _: int) -> bool:
        return False

    def read(self, values, panel, first, count) -> None:
        words = self.layout.words_in_run
        with T.serial(count // self.layout.run) as r, T.serial(words) as w:
            run = first // self.layout.run + r
            for i in range(self.layout.per_word):
                with T.vectorized(self.width) as j:
                    value = self.weight_at(panel, run, run * words + w, i, j)
                    T.buffer_store(values, value, [(r * words + w) * self.layout.per_word + i, j])

    def address(self, panel, position):
        return T.address_of(self.values[panel, position // self.layout.per_word, 0])

    def weight_at(self, panel, run, word, i: int, j):
        """The dequantised weight of output j of a panel, at value i of a word."""
        layout = self.layout
        q = _value(self.values[panel, word, j], i, layout) * T.float32(_units(layout)[i])
        if FP8:
            return q * self.scale(panel, run, j)
        return (q - self.zero(panel, run, j)) * self.scale(panel, run, j)

    def scale(self, panel, run, j):
        return float32(self.scales[panel, run // self.layout.runs_in_group, j])

    if not FP8:

        def zero(self, panel, run, j):
            """Of the values as they are stored."""
            if ZERO_POINTS:
                return float32(self.zeros[panel, run // self.layout.runs_in_group, j])
            return T.float32(self.layout.zero)


@cache
def quantized_matmul(layout: Layout, dtype: str, out_dtype: str, bias_dtype: str | None, cores: int) -> PrimFunc:
    """x [n, in], the arrays of `layout`, bias [out] where it has a dtype -> out [n, out], for every n."""
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        x = argument("x", (n, layout.inputs), dtype)
        weight = QuantizedPanels(layout)
        bias = argument("bias", (layout.outputs,), bias_dtype) if bias_dtype else None
        out = argument("out", (n, layout.outputs), out_dtype)
        sizes = Sizes(layout.outputs, weight.width, out_dtype, cores)
        with T.If(n == 1):
            with T.Then():
                _gemv(x, weight, bias, out, sizes)
            with T.Else():
                gemm(x, weight, bias, out, sizes)
    return builder.get()


if QUANTIZED_HEAD:

    @cache
    def take_quantized_rows(layout: Layout, dtype: str) -> PrimFunc:
        """The arrays of `layout`, ids int32 [n] -> rows [n, in], dequantised in float32 and rounded once."""
        with IRBuilder() as builder, scheduled_function():
            n = T.int64()
            weight = QuantizedPanels(layout)
            ids = argument("ids", (n,), "int32")
            out = argument("out", (n, layout.inputs), dtype)
            with T.parallel(n) as row, T.serial(layout.positions // layout.per_word) as w:
                panel, j = ids[row] // weight.width, ids[row] % weight.width
                for i in range(layout.per_word):
                    k, is_filled = layout.input_at(w * layout.per_word + i)
                    with T.If(is_filled), T.Then():
                        value = weight.weight_at(panel, w // layout.words_in_run, w, i, j)
                        T.buffer_store(out, T.cast(value, dtype), [row, k])
        return builder.get()


def _value(word, i: int, layout: Layout):
    """A word's value i as float32, divided by its unit: from bits that are used where they are."""
    if FP8:
        return over_256(word)
    if BITS == "8":
        return float32(word)
    if INT8_HEAD and layout.bits == 8:
        return float32(word)
    half = word if i < 4 else T.shift_right(word, T.int32(16))
    return float32(T.bitwise_and(half, T.int32(15 << i % 4 * 4)))


def _units(layout: Layout) -> list[float]:
    """Powers of two, one for each value of a word."""
    if FP8:
        return [256.0]
    if BITS == "8":
        return [1.0]
    return [16.0 ** -(i % 4) for i in range(layout.per_word)]


def _gemv(x, weight: QuantizedPanels, bias, out, sizes: Sizes) -> None:
    """One row. A task reads its panels once, at STREAMS places at the same time, or fewer where runs are few."""
    layout = weight.layout
    row = _row(x, weight)
    if ZERO_POINTS or (BITS != "8" and not FP8):
        first_sums = _first_sums(x, weight)
    parts = min(STREAMS // sizes.group, layout.runs)
    part = layout.runs // parts
    with T.parallel(sizes.tasks) as task:
        panels = panels_of(task, sizes)
        totals = T.alloc_buffer((sizes.group, parts, sizes.width), "float32")
        clear(totals)
        with T.serial(part) as i:
            streams = [(p, s, s * part + i) for p, s in product(range(sizes.group), range(parts))]
            _add_runs(totals, streams, panels, weight, row, first_sums)
        for run in range(parts * part, layout.runs):
            _add_runs(totals, [(p, 0, run) for p in range(sizes.group)], panels, weight, row, first_sums)
        store_parts(out, panels, totals, bias, sizes)


def _row(x, weight: QuantizedPanels):
    """The one row of x, each value multiplied by its position's unit: float32 [positions]."""
    layout = weight.layout
    row = T.alloc_buffer((layout.positions,), "float32")
    with T.serial(layout.positions // layout.per_word) as w:
        for i, unit in enumerate(_units(layout)):
            position = w * layout.per_word + i
            T.buffer_store(row, weight.x_at(x, 0, position) * T.float32(unit), [position])
    return row


def _first_sums(x, weight: QuantizedPanels):
    """-Σx of each run, float32 [runs].

    [not ZERO_POINTS] Times the zero point that all have.
    """
    layout = weight.layout
    first_sums = T.alloc_buffer((layout.runs,), "float32")
    sums = T.alloc_buffer((layout.per_word,), "float32")  # several: each addition waits for the one before
    with T.serial(layout.runs) as run:
        for i in range(layout.per_word):
            T.buffer_store(sums, T.float32(0), [i])
        with T.serial(layout.words_in_run) as w:
            for i in range(layout.per_word):
                value = weight.x_at(x, 0, (run * layout.words_in_run + w) * layout.per_word + i)
                T.buffer_store(sums, sums[i] + value, [i])
        total = sum((sums[i] for i in range(1, layout.per_word)), sums[0])
        T.buffer_store(first_sums, -total if ZERO_POINTS else -total * T.float32(layout.zero), [run])
    return first_sums


def _add_runs(totals, streams, panels, weight: QuantizedPanels, row, first_sums) -> None:
    """totals[p, s] += scale · Σ (q - z) x over a run, for each (p, s, run) of the streams at the same time."""
    layout = weight.layout
    sums = T.alloc_buffer((len(streams), weight.width), "float32")
    for at, (p, _, run) in enumerate(streams):
        with T.vectorized(weight.width) as j:
            first = first_sums[run] if ZERO_POINTS or (BITS != "8" and not FP8) else T.float32(0)
            T.buffer_store(sums, first * weight.zero(panels[p], run, j) if ZERO_POINTS else first, [at, j])
    with T.serial(layout.words_in_run) as w:
        for p, _, run in streams:
            _fetch_ahead(weight, panels[p], run * layout.words_in_run + w)
        for i, (at, (p, _, run)) in product(range(layout.per_word), enumerate(streams)):
            word = run * layout.words_in_run + w
            with T.vectorized(weight.width) as j:
                value = _value(weight.values[panels[p], word, j], i, layout)
                T.buffer_store(sums, sums[at, j] + row[word * layout.per_word + i] * value, [at, j])
    for at, (p, s, run) in enumerate(streams):
        with T.vectorized(weight.width) as j:
            T.buffer_store(totals, totals[p, s, j] + sums[at, j] * weight.scale(panels[p], run, j), [p, s, j])


def _fetch_ahead(weight: QuantizedPanels, panel, word) -> None:
    size = 4 if weight.layout.bits == 4 else 1  # bytes of a word
    for j in range(0, weight.width, LINE // size):
        prefetch(T.address_of(weight.values[panel, word + AHEAD // (weight.width * size), j]))
