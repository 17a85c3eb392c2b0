"""x Wᵀ on a CPU over weights packed in panels: scheduled TIR functions.

Sums are float32 and stay in registers. One row is bound by the memory that the weight streams from; more rows by the
multipliers, once whatever is loaded is used often enough: a vector of the weight for a tile of rows, a block of a panel
for a block of tiles, a block of x for a group of panels.

The functions are built by calls, not parsed from TVMScript, so that their parts can be Python functions at no cost.
"""

from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from .panels import num_panels

STREAMS = 4  # places that one row reads at once: more loads under way, shorter chains of additions
TILE = 6  # rows whose sums fill 16 vector registers
TILE_AVX512 = 12  # ... and 32
SMALL_TILE = 4  # for a few rows, where most of a whole tile would be idle
BLOCK_ROWS = 120  # with BLOCK_INPUTS: a block of x stays in the second-level cache
BLOCK_INPUTS = 512  # a block of a panel stays in the nearest caches
TASKS = 4  # for each core at least, for balance
AHEAD = 32  # inputs that a tile fetches ahead of itself


class Sizes(NamedTuple):
    """What a function is compiled for."""

    outputs: int
    width: int  # of a panel
    out_dtype: str
    cores: int

    @property
    def panels(self) -> int:
        return num_panels(self.outputs, self.width)

    @property
    def group(self) -> int:
        """Panels that make a task: fewer where a small matrix would not give every core a fair share of tasks."""
        return next(group for group in (4, 2, 1) if group == 1 or self.panels >= group * TASKS * self.cores)

    @property
    def tasks(self) -> int:
        return -(-self.panels // self.group)

    @property
    def tile(self) -> int:
        return TILE_AVX512 if self.width == 32 else TILE


class FloatPanels:
    """A weight in panels as `gemm` reads it, [panels, in, width]. Its positions are the inputs."""

    def __init__(self, weight) -> None:
        self.weight = weight
        self.width, self.positions = int(weight.shape[2]), int(weight.shape[1])
        blocks = -(-self.positions // BLOCK_INPUTS)
        self.block = -(-self.positions // blocks)  # positions in a block; the last may have fewer

    def x_at(self, x, row, position):
        """A position's value of x, float32."""
        return float32(x[row, position])

    def is_direct(self, tile: int) -> bool:
        """Whether tiles of so many rows take vectors of the weight, and not a block that was made float32 before."""
        return tile == SMALL_TILE or self.weight.dtype == "float32"

    def vector(self, panel, position, j):
        return float32(self.weight[panel, position, j])

    def read(self, values, panel, first, count) -> None:
        """values[i, j] = the panel's output j at the position first + i, float32."""
        with T.serial(count) as i, T.vectorized(self.width) as j:
            T.buffer_store(values, self.vector(panel, first + i, j), [i, j])

    def address(self, panel, position):
        """What `vector` and `read` read there first."""
        return T.address_of(self.weight[panel, position, 0])


@cache
def matmul(outputs: int, inputs: int, width: int, dtype: str, out_dtype: str, has_bias: bool, cores: int) -> PrimFunc:
    """x [n, in], weight [panels, in, width], bias [out] where has_bias -> out [n, out], for every n."""
    sizes = Sizes(outputs, width, out_dtype, cores)
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        x = argument("x", (n, inputs), dtype)
        weight = argument("weight", (sizes.panels, inputs, width), dtype)
        bias = argument("bias", (outputs,), dtype) if has_bias else None
        out = argument("out", (n, outputs), out_dtype)
        with T.If(n == 1):
            with T.Then():
                _gemv(x, weight, bias, out, sizes)
            with T.Else():
                gemm(x, FloatPanels(weight), bias, out, sizes)
    return builder.get()


@cache
def take_rows(panels: int, inputs: int, width: int, dtype: str) -> PrimFunc:
    """weight [panels, in, width], ids int32 [n] -> rows [n, in]."""
    with IRBuilder() as builder, scheduled_function():
        n = T.int64()
        weight = argument("weight", (panels, inputs, width), dtype)
        ids = argument("ids", (n,), "int32")
        out = argument("out", (n, inputs), dtype)
        with T.parallel(n) as i, T.serial(inputs) as k:
            T.buffer_store(out, weight[ids[i] // width, k, ids[i] % width], [i, k])
    return builder.get()


@contextmanager
def scheduled_function():
    with T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})  # 8: opaque, never fused
        yield


def argument(name: str, shape, dtype: str):
    buffer = T.match_buffer(T.arg(f"{name}_handle", T.handle()), shape, dtype)
    IRBuilder.name(name, buffer)
    return buffer


def _gemv(x, weight, bias, out, sizes: Sizes) -> None:
    """One row. A task reads its panels once, at STREAMS places at the same time: as many panels, or parts of panels."""
    inputs = int(weight.shape[1])
    row = T.alloc_buffer((inputs,), "float32")
    with T.serial(inputs) as k:
        T.buffer_store(row, float32(x[0, k]), [k])
    with T.parallel(sizes.tasks) as task:
        panels, parts = panels_of(task, sizes), STREAMS // sizes.group
        part = inputs // parts
        sums = T.alloc_buffer((sizes.group, parts, sizes.width), "float32")

        def add(p: int, s: int, k) -> None:
            with T.vectorized(sizes.width) as j:
                T.buffer_store(sums, sums[p, s, j] + row[k] * float32(weight[panels[p], k, j]), [p, s, j])

        clear(sums)
        with T.serial(part) as k:
            for p, s in product(range(sizes.group), range(parts)):
                add(p, s, s * part + k)
        for p, k in product(range(sizes.group), range(parts * part, inputs)):
            add(p, 0, k)
        store_parts(out, panels, sums, bias, sizes)


def gemm(x, weight, bias, out, sizes: Sizes) -> None:
    """Any number of rows.

    weight: FloatPanels or another class with its methods
    """
    n = x.shape[0]
    with T.If(T.And(n < 2 * sizes.tile, _padded(n, SMALL_TILE) < _padded(n, sizes.tile))):
        with T.Then():
            _tiles(x, weight, bias, out, sizes, SMALL_TILE)
        with T.Else():
            _tiles(x, weight, bias, out, sizes, sizes.tile)


def _tiles(x, weight, bias, out, sizes: Sizes, tile: int) -> None:
    """Rows in tiles of `tile`."""
    n = x.shape[0]
    tiles = T.Bind(T.ceildiv(n, tile))
    row_blocks = T.Bind(T.max(T.ceildiv(tiles, BLOCK_ROWS // tile), 1))
    height = T.Bind(T.ceildiv(tiles, row_blocks))
    x_tiles = T.alloc_buffer((tiles, weight.positions, tile), "float32")
    with T.parallel(tiles) as t, T.serial(weight.positions) as k:
        for r in range(tile):
            T.buffer_store(x_tiles, weight.x_at(x, T.min(t * tile + r, n - 1), k), [t, k, r])
    with T.parallel(sizes.tasks * row_blocks) as task:
        first_panel = T.Bind(task // row_blocks * sizes.group)
        first_tile = T.Bind(task % row_blocks * height)
        group = T.min(sizes.group, sizes.panels - first_panel)
        height = T.min(height, tiles - first_tile)
        sums = T.alloc_buffer((sizes.group, BLOCK_ROWS // tile, tile, sizes.width), "float32")
        values = None if weight.is_direct(tile) else T.alloc_buffer((weight.block, sizes.width), "float32")
        with T.serial(-(-weight.positions // weight.block)) as block, T.serial(group) as p:
            first = block * weight.block
            count = T.min(weight.block, weight.positions - first)
            if values is not None:
                weight.read(values, first_panel + p, first, count)
            with T.serial(height) as t:
                low, high = _tile_sums(x_tiles, first_tile + t, weight, first_panel + p, first, count, values)
                _add_to(sums, (p, t), low, high, is_first=block == 0)
        with T.serial(height) as t, T.serial(T.min(tile, n - (first_tile + t) * tile)) as r, T.serial(group) as p:
            row = (first_tile + t) * tile + r
            store(out, row, first_panel + p, lambda j: sums[p, t, r, j], bias, sizes)


def _tile_sums(x_tiles, tile, weight, panel, first, count, values):
    """Products of a tile of rows and a block of a panel, summed over the block: each row's low and high half.

    first, count: the block's positions
    values: the block in float32, or None to take it from the weight
    """
    rows, half = int(x_tiles.shape[2]), weight.width // 2
    # Two buffers: TVM keeps only small ones on the stack, from where LLVM makes them registers.
    low, high = T.alloc_buffer((rows, half), "float32"), T.alloc_buffer((rows, half), "float32")
    for r in range(rows):
        for sums in (low, high):
            with T.vectorized(half) as j:
                T.buffer_store(sums, T.float32(0), [r, j])
    with T.serial(count) as k:
        # Tiles that read the weight keep ahead of it; otherwise the next panel comes while this one is used.
        ahead = weight.address(panel, first + k + AHEAD) if values is None else weight.address(panel + 1, first + k)
        prefetch(ahead)
        for r in range(rows):
            for offset, sums in ((0, low), (half, high)):
                with T.vectorized(half) as j:
                    value = weight.vector(panel, first + k, offset + j) if values is None else values[k, offset + j]
                    T.buffer_store(sums, sums[r, j] + x_tiles[tile, first + k, r] * value, [r, j])
    return low, high


def _add_to(sums, at, low, high, is_first) -> None:
    """Adds a tile's sums of one block to those of the blocks before, where there are any."""
    rows, half = (int(size) for size in low.shape)

    def store(value) -> None:
        for r in range(rows):
            for offset, part in ((0, low), (half, high)):
                with T.vectorized(half) as j:
                    index = [*at, r, offset + j]
                    T.buffer_store(sums, value(part[r, j], sums[tuple(index)]), index)

    with T.If(is_first):
        with T.Then():
            store(lambda new, old: new)
        with T.Else():
            store(lambda new, old: old + new)


def panels_of(task, sizes: Sizes) -> list[Any]:
    """The panels of a task of one row. Past the last panel the last one is taken again.

    The next task's lie behind them: a thread, which takes tasks in a row, reads on where it is."""
    return [T.min(p * sizes.tasks + task, sizes.panels - 1) for p in range(sizes.group)]


def prefetch(address) -> None:
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, 0, 3, 1))  # to be read, kept close, as data


def clear(sums) -> None:
    """Zeros, a vector for each of the first two indices."""
    for p, s in product(range(int(sums.shape[0])), range(int(sums.shape[1]))):
        with T.vectorized(sums.shape[2]) as j:
            T.buffer_store(sums, T.float32(0), [p, s, j])


def store_parts(out, panels: list[Any], sums, bias, sizes: Sizes) -> None:
    """Writes one row's outputs of some panels, each summed in parts: sums [panels, parts, width]."""
    for p, panel in enumerate(panels):
        for s in range(1, int(sums.shape[1])):
            with T.vectorized(sizes.width) as j:
                T.buffer_store(sums, sums[p, 0, j] + sums[p, s, j], [p, 0, j])
        store(out, 0, panel, lambda j, p=p: sums[p, 0, j], bias, sizes)


def store(out, row, panel, value, bias, sizes: Sizes) -> None:
    """Writes one row of a panel's outputs, without the padding: value(j), plus the bias."""
    first = panel * sizes.width
    with T.serial(T.min(sizes.width, sizes.outputs - first)) as j:
        total = value(j) if bias is None else value(j) + float32(bias[first + j])
        T.buffer_store(out, T.cast(total, sizes.out_dtype), [row, first + j])


def _padded(n, tile: int):
    return T.ceildiv(n, tile) * tile


def float32(value):
    return T.cast(value, "float32")
