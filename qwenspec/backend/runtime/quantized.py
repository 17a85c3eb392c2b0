"""Quantised matrices of a checkpoint as plain numbers, whatever packs them there.

[PACKING != "fp8"] W[n, k] = (q[n, k] - z[n, g]) · s[n, g], where g is the group of input k
[PACKING == "fp8" and FP8_SCALES == "block"] W[n, k] = q[n, k] · s[n // block[0], k // block[1]]
[PACKING == "fp8" and FP8_SCALES != "block"] W[n, k] = q[n, k] · s[n]

A matrix [out, in] is read a few rows at a time and never dequantised here; its scales come whole. Of several ranks,
each reads what it has of the matrix; where it has fewer rows or columns than room for them, the scales are zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np

from .shares import Piece, cut, read_entry
from .stored import PIECE, CheckpointError, Stored, Tensor

PACKING = "gptq"  # flag: awq, gptq, pack_quantized, fp8, int8 or int4, how the checkpoint stores the linear layers
FP8_SCALES = "block"  # flag: block, channel or tensor, what has a scale in the checkpoint
STATIC_ACTIVATIONS = True  # flag: modules have a scale for their inputs
GPTQ_V1 = True  # flag: the first format of gptq, with zero points less one
ZERO_POINTS = True  # flag: groups have zero points
ACT_ORDER = True  # flag: inputs belong to groups in an order of their own
INT8_HEAD = True  # flag: the LM head is int8, unlike the linear layers

INTEGERS = {
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "BF16": "<u2",
}  # floats that numpy has not, as bits
DTYPES = INTEGERS | {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
if PACKING in ("gptq", "pack_quantized"):
    G_IDX = "g_idx" if PACKING == "gptq" else "weight_g_idx"  # the group of each input
if PACKING == "awq":
    NIBBLES = np.array((0, 4, 1, 5, 2, 6, 3, 7))  # of a word, where each of its eight outputs is


@dataclass(frozen=True)
class Source:
    """The stored tensors, by suffix, of the next `rows` rows of a matrix."""

    rows: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class QuantizedMatrix:
    """What a rank has of a quantised parameter in a checkpoint. Raises CheckpointError where its numbers make no sense.

    shape: [out, in] on every rank
    rows, columns: those of the whole matrix that this one has"""

    name: str
    shape: tuple[int, int]
    rows: tuple[Piece, ...]
    columns: slice
    format: dict[str, Any]  # as in MANIFEST.json
    sources: tuple[Source, ...]
    stored: dict[str, Stored]

    @property
    def tensors(self) -> list[Tensor]:
        """What the checkpoint must hold of it."""
        return [tensor for source in self.sources for tensor in source.tensors.values()]

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rows from the top, some at a time: the index of the first, and q, uint8 [rows, in].

        [PACKING != "fp8"] Integers are unsigned: q is in 0 … 2^bits - 1.
        [PACKING == "fp8"] q is the bytes of float8 e4m3.
        [ACT_ORDER] Columns are sorted by group, as `order` says."""
        # Whole words; unpacking and packing anew take several times as much.
        step = max(8, PIECE // (8 * self.shape[1]) // 8 * 8)
        top = 0
        for source, piece in self._held():
            yield from self._zeros_between(top, piece.at)
            for start in range(piece.start, piece.stop, step):
                values = self._rows(source, slice(start, min(start + step, piece.stop)))
                if PACKING == "fp8" and (values & 0x7F == 0x7F).any():
                    raise CheckpointError(f"{self.name}: a value is not a number")
                missing = self.shape[1] - values.shape[1]
                whole = np.pad(values, ((0, 0), (0, missing))) if missing else values
                yield piece.at + start - piece.start, np.ascontiguousarray(whole)
            top = piece.at + piece.stop - piece.start
        yield from self._zeros_between(top, self.shape[0])

    def scales(self) -> np.ndarray:
        """All of s.

        [PACKING == "fp8" and FP8_SCALES == "block"] -> float32 [ceil(out / block[0]), ceil(in / block[1])]
        [PACKING == "fp8" and FP8_SCALES != "block"] -> float32 [out, 1]
        [PACKING == "int8"] -> float32 [out, 1]
        [PACKING == "pack_quantized"] -> float32 [out, groups]
        [PACKING not in ("fp8", "int8", "pack_quantized") and not INT8_HEAD] -> float16 [out, groups]
        [INT8_HEAD] -> float16 [out, groups], of the head float32 [out, 1]
        """
        scales = self._by_group(self._scales, np.float32)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.name}: a scale is not a finite number")
        if PACKING in ("fp8", "int8", "pack_quantized"):
            return scales
        if INT8_HEAD and self.format["packing"] == "int8":
            return scales
        return _float16(self.name, scales)

    if STATIC_ACTIVATIONS:

        def input_scale(self) -> np.ndarray:
            """What inputs are divided by before they are rounded to e4m3, float32 [1]."""
            (source,) = self.sources  # each part of a fused matrix has one of its own
            scale = _floats(self._read(source, "input_scale")).reshape(1)
            if not 0 < scale[0] < np.inf:
                raise CheckpointError(f"{source.tensors['input_scale'].name} is {scale[0]:g}, and a scale is above 0")
            return scale

    if ZERO_POINTS:

        def zeros(self) -> np.ndarray:
            """z, uint8 [out, groups]."""
            return self._by_group(self._zeros, np.uint8)

    if ACT_ORDER:

        def order(self) -> np.ndarray:
            """Which input each column multiplies, int32 [in]: y = x[:, order] Wᵀ."""
            return self._order

        @functools.cached_property
        def _order(self) -> np.ndarray:
            (source,) = self.sources  # each part of a fused matrix has an order of its own
            return np.argsort(self._read(source, G_IDX), kind="stable").astype(np.int32)

    if PACKING in ("gptq", "pack_quantized"):

        def check(self) -> Iterator[str]:
            """Where the tensors are not what the format says."""
            for source in self.sources:
                groups = source.tensors[G_IDX].name
                (inputs,) = source.tensors[G_IDX].shape
                size = self.format["group_size"] or inputs
                if ACT_ORDER:
                    if not np.array_equal(np.sort(self._read(source, G_IDX)), np.arange(inputs) // size):
                        yield f"groups: {groups} does not put {size} inputs in every group"
                elif groups in self.stored and (self._read(source, G_IDX) != np.arange(inputs) // size).any():
                    yield f"groups: {groups} has another order than the inputs': the spec must say `desc_act: true`"
                if PACKING == "pack_quantized":
                    said = self._read(source, "weight_shape").tolist()
                    if said != [source.rows, inputs]:
                        named = source.tensors["weight_shape"].name
                        yield f"shape: {named} says {said}, and {self.name} needs {[source.rows, inputs]}"
            if PACKING == "gptq" and not ZERO_POINTS:
                for source, piece in self._held():
                    points = self._zeros(source, slice(piece.start, piece.stop), self._groups(self.columns))
                    if (points != 1 << (self.format["bits"] - 1)).any():
                        named = source.tensors["qzeros"].name
                        yield f"zero points: {named} are not all in the middle: the spec must say `sym: false`"

    # --------------------------------------------------------------------------------------- what the rank has

    def _held(self) -> Iterator[tuple[Source, Piece]]:
        """The sources' rows that it has, and where they go; none if it has no column."""
        rows = self.rows if self.columns.start < self.columns.stop else ()
        for source, piece in cut(rows, [source.rows for source in self.sources]):
            yield self.sources[source], piece

    def _zeros_between(self, top: int, bottom: int) -> Iterator[tuple[int, np.ndarray]]:
        if top < bottom:
            yield top, np.zeros((bottom - top, self.shape[1]), np.uint8)

    def _by_group(self, read: Callable[[Source, slice, slice], np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        """What `read` gives of some rows of a source and of groups of columns, for all of the rank's matrix."""
        height = self.format["block"][0] if PACKING == "fp8" else 1
        columns, groups = self._groups(slice(0, self.shape[1])), self._groups(self.columns)
        found = np.zeros((-(-self.shape[0] // height), columns.stop), dtype)
        for source, piece in self._held():
            values = read(source, _blocks(slice(piece.start, piece.stop), height), groups)
            found[piece.at // height :][: len(values), : values.shape[1]] = values
        return found

    def _groups(self, columns: slice) -> slice:
        """Of columns that begin at a group: groups, or blocks."""
        size = self.format["block"][1] if PACKING == "fp8" else self.format["group_size"]
        return _blocks(columns, size) if size else slice(0, 1)

    # ------------------------------------------------------------------------------------------- as it is packed

    def _rows(self, source: Source, rows: slice) -> np.ndarray:
        """q of some rows of a source and the rank's columns, uint8."""
        columns = self.columns
        if PACKING == "fp8":
            return self._read(source, "weight", rows, columns)
        if PACKING == "awq":
            words = self._read(source, "qweight", columns, _blocks(rows, 8))
            return _nibbles(words).T[_within(rows, 8)]
        if PACKING in ("gptq", "pack_quantized"):
            per_word = 32 // self.format["bits"]
            if PACKING == "gptq":
                words = self._read(source, "qweight", _blocks(columns, per_word), rows).T
            else:
                words = self._read(source, "weight_packed", rows, _blocks(columns, per_word))
            values = _split(words, self.format["bits"])[:, _within(columns, per_word)]
            return values[:, self._order] if ACT_ORDER else values
        if PACKING == "int8":
            return _unsigned(self._read(source, "qweight", rows, columns))
        if INT8_HEAD and self.format["packing"] == "int8":
            return _unsigned(self._read(source, "qweight", rows, columns))
        return _halves(self._read(source, "qweight", rows, _blocks(columns, 2)))[:, _within(columns, 2)]

    def _scales(self, source: Source, rows: slice, groups: slice) -> np.ndarray:
        """s of some rows and groups of a source, of blocks of them in float8: float32."""
        if PACKING == "fp8" and FP8_SCALES == "block":
            return _floats(self._read(source, "weight_scale_inv", rows, groups))
        if PACKING == "fp8" and FP8_SCALES == "channel":
            return _floats(self._read(source, "weight_scale", rows, groups))
        if PACKING == "fp8":
            return np.full((rows.stop - rows.start, 1), _floats(self._read(source, "weight_scale")))[:, groups]
        if PACKING == "pack_quantized":
            return _floats(self._read(source, "weight_scale", rows, groups))
        if PACKING in ("awq", "gptq"):
            return _floats(self._read(source, "scales", groups, rows)).T
        if PACKING == "int8":
            return _floats(self._read(source, "scales", rows)).reshape(-1, 1)[:, groups]
        if INT8_HEAD and self.format["packing"] == "int8":
            return _floats(self._read(source, "scales", rows)).reshape(-1, 1)[:, groups]
        return _floats(self._read(source, "scales", rows, groups))

    if PACKING == "gptq" or ZERO_POINTS:

        def _zeros(self, source: Source, rows: slice, groups: slice) -> np.ndarray:
            """z of some rows and groups of a source, uint8."""
            if PACKING == "awq":
                return _nibbles(self._read(source, "qzeros", groups, _blocks(rows, 8))).T[_within(rows, 8)]
            per_word = 32 // self.format["bits"]
            if PACKING == "pack_quantized":
                words = self._read(source, "weight_zero_point", _blocks(rows, per_word), groups)
                return _split(words.T, self.format["bits"]).T[_within(rows, per_word)]
            words = self._read(source, "qzeros", groups, _blocks(rows, per_word))
            points = _split(words, self.format["bits"]).T[_within(rows, per_word)]
            if GPTQ_V1:
                if points.max() == 255:  # of 8 bits
                    raise CheckpointError(f"{source.tensors['qzeros'].name}: a zero point of 256 is beyond 8 bits")
                return points + np.uint8(1)
            return points

    def _read(self, source: Source, suffix: str, *index: slice) -> np.ndarray:
        return read_raw(self.stored, source.tensors[suffix].name, *index)


def read_quantized(
    entry: dict[str, Any], layer: int, stored: dict[str, Stored], rank: int = 0, degree: int = 1
) -> QuantizedMatrix:
    """What a rank has of the matrix of an entry of MANIFEST.json, in a layer."""

    def tensor(name: str, shape: list[int], dtypes: list[str], optional: bool) -> Tensor:
        return Tensor(name.replace("{i}", str(layer)), tuple(shape), tuple(dtypes), optional)

    sources = tuple(
        Source(source["rows"], {suffix: tensor(*told) for suffix, told in source["tensors"].items()})
        for source in entry["sources"]
    )
    shared = read_entry(entry)
    out_features, in_features = shared.share(degree)
    columns = shared.column_piece(degree, rank)
    return QuantizedMatrix(
        entry["name"].replace("{i}", str(layer)),
        (out_features, in_features),
        tuple(shared.row_pieces(degree, rank)),
        slice(columns.start, columns.stop),
        entry["format"],
        sources,
        stored,
    )


if PACKING in ("gptq", "pack_quantized"):

    def check_groups(matrices: list[QuantizedMatrix]) -> list[str]:
        """Every reason why they are not what the format says."""
        return [problem for matrix in matrices for problem in matrix.check()]


if PACKING == "gptq":

    def check_zeros(stored: dict[str, Stored], read: Iterable[str], patterns: list[str]) -> list[str]:
        """Tensors that match a pattern, that no parameter reads, and that are not all zero."""
        names = [n for n in stored if n not in read and any(fnmatch(n, pattern) for pattern in patterns)]
        return [f"not zero: {name}, a bias that the model has not" for name in names if read_raw(stored, name).any()]


def read_raw(stored: dict[str, Stored], name: str, *index: slice) -> np.ndarray:
    """A stored tensor or a part of it; float8 as bytes, bfloat16 as its 16 bits.

    Mapped for as long as the result lives: safetensors has no float8 for numpy, and reads whole rows alone."""
    found = stored[name]
    return np.memmap(found.file, DTYPES[found.dtype], "r", found.start, found.shape)[index]


def _blocks(span: slice, size: int) -> slice:
    """The blocks of `size` rows or columns that a span touches."""
    return slice(span.start // size, -(-span.stop // size))


def _within(span: slice, size: int) -> slice:
    """The span, in the blocks that it touches."""
    first = span.start // size * size
    return slice(span.start - first, span.stop - first)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """AutoAWQ's words [n, m], eight neighbouring outputs in each -> uint8 [n, 8 m]."""
    return _split(words, 4).reshape(len(words), -1, 8)[:, :, NIBBLES].reshape(len(words), -1)


def _split(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, m] of 32 / bits values each, the lowest bits first -> uint8 [n, m · 32 / bits]."""
    whole = np.ascontiguousarray(words).view(np.uint8)  # little-endian, as safetensors are
    return whole if bits == 8 else _halves(whole)


def _halves(whole: np.ndarray) -> np.ndarray:
    """uint8 [n, m] of two values each, the low half first -> uint8 [n, 2 m]."""
    return np.stack([whole & 15, whole >> 4], axis=-1).reshape(len(whole), -1)


def _unsigned(signed: np.ndarray) -> np.ndarray:
    """int8 -> uint8, more by 128."""
    return signed.view(np.uint8) ^ 128


def _float16(name: str, scales: np.ndarray) -> np.ndarray:
    """The same numbers; raises CheckpointError where they are not."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    if not np.array_equal(rounded, scales):
        raise CheckpointError(f"{name}: float16 cannot hold all of its scales, such as {scales[rounded != scales][0]}")
    return rounded


def _floats(array: np.ndarray) -> np.ndarray:
    """float32; what came as 16 bits was bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
