"""Parameters in memory as a library reads them, from a Hugging Face checkpoint."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from tvm.runtime import Device, Tensor

from .checkpoint import Checkpoint, Parameter
from .kernels.panels import pack_into
from .kernels.quantized_panels import Layout, store_scales, store_values, store_zeros
from .quantized import QuantizedMatrix

QUANTIZED = True  # flag: some matrices are quantised
FP8 = True  # flag: … in float8
ZERO_POINTS = True  # flag: … with zero points
ACT_ORDER = True  # flag: … with an order of their inputs
ROW_SCALES = True  # flag: float8 has a scale a row
STATIC_ACTIVATIONS = True  # flag: … and one for its inputs

ALIGNMENT = 64  # of every parameter, which compiled code relies on


def load_parameters(
    checkpoint: Checkpoint, described: Sequence[dict[str, Any]], device: Device, first_token: int = 0
) -> list[Tensor]:
    """Every parameter as a library's metadata describe it: {name, shape, dtype}, in their order.

    A matrix [out, in] that is described by three sizes is packed in panels as it is read.
    [QUANTIZED] A quantised one is several parameters: its values, scales and more.

    first_token: of the vocabulary's part that the checkpoint's rank has
    """
    if device.type == "cpu":
        memory = _memory([_size(one) for one in described])
        return [_read(checkpoint, one, next(memory), first_token) for one in described]
    tensors = []
    for one in described:  # through the host's memory one at a time
        tensors.append(_read(checkpoint, one, next(_memory([_size(one)])), first_token).copyto(device))
    return tensors


def share(array: np.ndarray) -> Tensor:
    """A tensor on the CPU in an array's own memory, which starts at a multiple of ALIGNMENT."""
    if array.dtype != ml_dtypes.bfloat16:
        return tvm.runtime.from_dlpack(array)
    # numpy gives no DLPack tensor of a dtype that is not its own.
    return tvm.runtime.from_dlpack(array.view(np.uint16))._create_view(array.shape, "bfloat16")


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """The same in memory that `share` takes."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def finite(values: np.ndarray) -> bool:
    """Whether none is NaN or infinite: those have every bit of the exponent."""
    bits = values.view(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(bits.dtype)
    return bool((bits & infinity).max() < infinity)


def _read(checkpoint: Checkpoint, described: dict[str, Any], buffer: np.ndarray, first_token: int) -> Tensor:
    """One parameter in a zeroed buffer of bytes, which the tensor keeps alive."""
    array = buffer.view(_dtype(described)).reshape(described["shape"])
    if described["name"] == "first_token":
        array[0] = first_token
        return share(array)
    if QUANTIZED:
        name, _, content = described["name"].rpartition(".")
        if matrix := next((matrix for matrix in checkpoint.matrices if matrix.name == name), None):
            _fill_quantized(array, matrix, content)
            return share(array)
    parameter = next(parameter for parameter in checkpoint.parameters if parameter.name == described["name"])
    _fill(array, checkpoint, parameter)
    return share(array)


def _fill(array: np.ndarray, checkpoint: Checkpoint, parameter: Parameter) -> None:
    """What a rank has no rows or columns for stays zero."""
    packed = array.ndim > len(parameter.shape)
    for row, piece in checkpoint.pieces(parameter, "np"):
        if not finite(piece):
            raise checkpoint.not_finite(parameter, row)
        if packed:
            pack_into(array[:, : piece.shape[1]], _cast(piece, array.dtype), row)
        else:
            array[row : row + len(piece)][..., : piece.shape[-1]] = _cast(piece, array.dtype)


if QUANTIZED:

    def _fill_quantized(array: np.ndarray, matrix: QuantizedMatrix, content: str) -> None:
        """A parameter of kernels/quantized.py's QuantizedWeight: what it is called there."""
        if content == "values":
            layout = _layout(matrix, array)
            for row, q in matrix.pieces():
                store_values(array, q, row, layout)
        elif content == "scales":
            scales = matrix.scales()
            if FP8 and not ROW_SCALES:
                scales = np.repeat(scales, matrix.format["block"][0], axis=0)[: matrix.shape[0]]
            store_scales(array, scales)
        elif ZERO_POINTS and content == "zeros":
            store_zeros(array, matrix.zeros())
        elif ACT_ORDER and content == "order":
            array[:] = matrix.order()
        elif STATIC_ACTIVATIONS and content == "input_scale":
            array[:] = matrix.input_scale()

    def _layout(matrix: QuantizedMatrix, values: np.ndarray) -> Layout:
        width = values.shape[2] if values.ndim == 3 else None
        if FP8 and ROW_SCALES:
            return Layout(*matrix.shape, 8, None, width)
        if FP8:
            return Layout(*matrix.shape, 8, matrix.format["block"][1], width)
        return Layout(*matrix.shape, matrix.format["bits"], matrix.format["group_size"], width)


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:  # its upper half, and faster than astype
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def _memory(sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Zeroed buffers of so many bytes each, in one piece of memory and, where Linux can, on huge pages.

    A decode step reads all of it: with pages of 4 KiB, looking their addresses up would take a part of its time."""
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, int(starts[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones stay small
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, int(starts[-1]))
    everything = np.frombuffer(memory, np.uint8)
    for start, size in zip(starts, sizes, strict=False):
        yield everything[start : start + size]


def _size(described: dict[str, Any]) -> int:
    return math.prod(described["shape"]) * _dtype(described).itemsize


def _dtype(described: dict[str, Any]) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if described["dtype"] == "bfloat16" else described["dtype"])
