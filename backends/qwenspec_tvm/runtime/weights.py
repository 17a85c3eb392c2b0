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

ALIGNMENT = 64  # of every parameter, which compiled code relies on


def load_parameters(checkpoint: Checkpoint, described: Sequence[dict[str, Any]], device: Device) -> list[Tensor]:
    """Every parameter as a library's metadata describe it: {name, shape, dtype}, in their order.

    A matrix [out, in] that is described by three sizes is packed in panels as it is read."""
    parameters = {parameter.name: parameter for parameter in checkpoint.parameters}
    if device.type == "cpu":
        memory = _memory([_size(one) for one in described])
        return [_read(checkpoint, parameters[one["name"]], one, next(memory)) for one in described]
    tensors = []
    for one in described:  # through the host's memory one at a time
        buffer = next(_memory([_size(one)]))
        tensors.append(_read(checkpoint, parameters[one["name"]], one, buffer).copyto(device))
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


def _read(checkpoint: Checkpoint, parameter: Parameter, described: dict[str, Any], buffer: np.ndarray) -> Tensor:
    """One parameter in a zeroed buffer of bytes, which the tensor keeps alive."""
    dtype = np.dtype(ml_dtypes.bfloat16 if described["dtype"] == "bfloat16" else described["dtype"])
    array = buffer.view(dtype).reshape(described["shape"])
    packed = len(described["shape"]) > len(parameter.shape)
    for row, piece in checkpoint.pieces(parameter, "np"):
        if packed:
            pack_into(array, _cast(piece, dtype), row)
        else:
            array[row : row + len(piece)] = _cast(piece, dtype)
    return share(array)


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
    return math.prod(described["shape"]) * (4 if described["dtype"] == "float32" else 2)
