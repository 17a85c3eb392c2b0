"""Quantised matrices of a checkpoint as plain numbers, whatever packs them there.

[PACKING != "fp8"] W[n, k] = (q[n, k] - z[n, g]) · s[n, g], where g is the group of input k
[PACKING == "fp8"] W[n, k] = q[n, k] · s[n // block[0], k // block[1]]

A matrix [out, in] is read a few rows at a time and never dequantised here; its scales come whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from .stored import PIECE, CheckpointError, Stored, Tensor

PACKING = "gptq"  # flag: awq, gptq, fp8, int8 or int4, how the checkpoint stores the linear layers
GPTQ_V1 = True  # flag: the first format of gptq, with zero points less one
ZERO_POINTS = True  # flag: groups have zero points
ACT_ORDER = True  # flag: inputs belong to groups in an order of their own
INT8_HEAD = True  # flag: the LM head is int8, unlike the linear layers

INTEGERS = {"I32": "<i4", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "BF16": "<u2"}  # floats that numpy has not, as bits
DTYPES = INTEGERS | {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
if PACKING == "awq":
    NIBBLES = np.array((0, 4, 1, 5, 2, 6, 3, 7))  # of a word, where each of its eight outputs is


@dataclass(frozen=True)
class Source:
    """The stored tensors, by suffix, of the next `rows` rows of a matrix."""

    rows: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised parameter [out, in] in a checkpoint. Raises CheckpointError where its numbers make no sense."""

    name: str
    shape: tuple[int, int]
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
        row = 0
        for source in self.sources:
            # Whole words; unpacking and packing anew take several times as much.
            step = max(8, PIECE // (8 * self.shape[1]) // 8 * 8)
            for start in range(0, source.rows, step):
                values = self._rows(source, slice(start, min(start + step, source.rows)))
                if PACKING == "fp8" and (values & 0x7F == 0x7F).any():
                    raise CheckpointError(f"{self.name}: a value is not a number")
                yield row + start, np.ascontiguousarray(values)
            row += source.rows

    def scales(self) -> np.ndarray:
        """All of s.

        [PACKING == "fp8"] -> float32 [ceil(out / block[0]), ceil(in / block[1])]
        [PACKING == "int8"] -> float32 [out, 1]
        [PACKING not in ("fp8", "int8") and not INT8_HEAD] -> float16 [out, groups]
        [INT8_HEAD] -> float16 [out, groups], of the head float32 [out, 1]
        """
        scales = np.concatenate([self._scales(source) for source in self.sources])
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.name}: a scale is not a finite number")
        if PACKING in ("fp8", "int8"):
            return scales
        if INT8_HEAD and self.format["packing"] == "int8":
            return scales
        return _float16(self.name, scales)

    if ZERO_POINTS:

        def zeros(self) -> np.ndarray:
            """z, uint8 [out, groups]."""
            return np.concatenate([self._zeros(source) for source in self.sources])

    if ACT_ORDER:

        def order(self) -> np.ndarray:
            """Which input each column multiplies, int32 [in]: y = x[:, order] Wᵀ."""
            return self._order

        @functools.cached_property
        def _order(self) -> np.ndarray:
            (source,) = self.sources  # each part of a fused matrix has an order of its own
            return np.argsort(self._read(source, "g_idx"), kind="stable").astype(np.int32)

    if PACKING == "gptq":

        def check(self) -> Iterator[str]:
            """Where groups and zero points are not what the format says."""
            inputs, size = self.shape[1], self.format["group_size"] or self.shape[1]
            for source in self.sources:
                groups, points = source.tensors["g_idx"].name, source.tensors["qzeros"].name
                if ACT_ORDER:
                    if not np.array_equal(np.sort(self._read(source, "g_idx")), np.arange(inputs) // size):
                        yield f"groups: {groups} does not put {size} inputs in every group"
                elif groups in self.stored and (self._read(source, "g_idx") != np.arange(inputs) // size).any():
                    yield f"groups: {groups} has another order than the inputs': the spec must say `desc_act: true`"
                if not ZERO_POINTS and (self._zeros(source) != 1 << (self.format["bits"] - 1)).any():
                    yield f"zero points: {points} are not all in the middle: the spec must say `sym: false`"

    # ------------------------------------------------------------------------------------------- as it is packed

    def _rows(self, source: Source, rows: slice) -> np.ndarray:
        """q of some rows, uint8 [rows, in]."""
        if PACKING == "fp8":
            return self._read(source, "weight", rows)
        if PACKING == "awq":
            words = self._read(source, "qweight", slice(None), slice(rows.start // 8, -(-rows.stop // 8)))
            return _nibbles(words).T
        if PACKING == "gptq":
            columns = _split(self._read(source, "qweight", slice(None), rows).T, self.format["bits"])
            return columns[:, self._order] if ACT_ORDER else columns
        stored = self._read(source, "qweight", rows)
        if PACKING == "int8":
            return _unsigned(stored)
        if INT8_HEAD and self.format["packing"] == "int8":
            return _unsigned(stored)
        return _halves(stored)[:, : self.shape[1]]

    def _scales(self, source: Source) -> np.ndarray:
        """s of a source, float32."""
        if PACKING == "fp8":
            return _floats(self._read(source, "weight_scale_inv"))
        if PACKING in ("awq", "gptq"):
            return _floats(self._read(source, "scales")).T
        return _floats(self._read(source, "scales")).reshape(source.rows, -1)

    if PACKING in ("awq", "gptq"):

        def _zeros(self, source: Source) -> np.ndarray:
            words = self._read(source, "qzeros")
            if PACKING == "awq":
                return _nibbles(words).T
            points = _split(words, self.format["bits"]).T
            if GPTQ_V1:
                if points.max() == 255:  # of 8 bits
                    raise CheckpointError(f"{source.tensors['qzeros'].name}: a zero point of 256 is beyond 8 bits")
                return points + np.uint8(1)
            return points

    def _read(self, source: Source, suffix: str, *index: slice) -> np.ndarray:
        return read_raw(self.stored, source.tensors[suffix].name, *index)


def read_quantized(entry: dict[str, Any], layer: int, stored: dict[str, Stored]) -> QuantizedMatrix:
    """The matrix of an entry of MANIFEST.json, in a layer."""

    def tensor(name: str, shape: list[int], dtypes: list[str], optional: bool) -> Tensor:
        return Tensor(name.replace("{i}", str(layer)), tuple(shape), tuple(dtypes), optional)

    sources = tuple(
        Source(source["rows"], {suffix: tensor(*told) for suffix, told in source["tensors"].items()})
        for source in entry["sources"]
    )
    name = entry["name"].replace("{i}", str(layer))
    return QuantizedMatrix(name, tuple(entry["shape"]), entry["format"], sources, stored)


if PACKING == "gptq":

    def check_groups(matrices: list[QuantizedMatrix]) -> list[str]:
        """Every reason why groups and zero points are not what the format says."""
        return [problem for matrix in matrices for problem in matrix.check()]

    def check_zeros(stored: dict[str, Stored], read: Iterable[str], patterns: list[str]) -> list[str]:
        """Tensors that match a pattern, that no parameter reads, and that are not all zero."""
        names = [n for n in stored if n not in read and any(fnmatch(n, pattern) for pattern in patterns)]
        return [f"not zero: {name}, a bias that the model has not" for name in names if read_raw(stored, name).any()]


def read_raw(stored: dict[str, Stored], name: str, *index: slice) -> np.ndarray:
    """A stored tensor or a part of it; float8 as bytes, bfloat16 as its 16 bits.

    Mapped for as long as the result lives: safetensors has no float8 for numpy, and reads whole rows alone."""
    found = stored[name]
    start = _offsets(found.file, found.file.stat().st_mtime_ns)[name]
    return np.memmap(found.file, DTYPES[found.dtype], "r", start, found.shape)[index]


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


@functools.cache
def _offsets(file: Path, written: int) -> dict[str, int]:
    """Where each tensor of a safetensors file begins. `written`: when, for another may take its place."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}
