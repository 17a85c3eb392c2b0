"""Which tensors a conversion writes, of which it makes them, and where in which file they go."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwenspec.backend.runtime.stored import Stored
from qwenspec.ir.nodes import IntFormat, Model, Source
from qwenspec.ir.quantized import stored_tensors

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}  # of a number; dtypes by safetensors' names
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One that is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor of the checkpoint, and by suffix what becomes of it; without a format, it is copied."""

    tensor: str
    shape: tuple[int, ...]
    format: IntFormat | None
    written: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.written.values())


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file: its jobs, its header, and where in it each tensor begins."""

    jobs: tuple[Job, ...]
    header: bytes
    offsets: dict[str, int]
    size: int


def jobs(model: Model, stored: dict[str, Stored]) -> Iterator[Job]:
    """What is to be done for a model with quantised weights, in the order of its forward pass."""
    for param in model.params():
        for source in param.sources:
            shape = (source.rows, *param.shape[1:])
            if source.format is None:
                copy = Tensor(source.tensor, stored[source.tensor].dtype, shape)
                yield Job(source.tensor, shape, None, {"weight": copy})
            else:
                yield _rounding(source, shape)


def shards(all_jobs: Iterable[Job], limit: int) -> list[Shard]:
    """Files of at most `limit` bytes of tensors, or of one job's where those are more."""
    files: list[list[Job]] = []
    filled = 0
    for job in all_jobs:
        if not files or filled + job.bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(job)
        filled += job.bytes
    return [_shard(tuple(file)) for file in files]


def _rounding(source: Source, shape: tuple[int, ...]) -> Job:
    format = source.format
    assert isinstance(format, IntFormat), "only int8 and int4 are converted to"
    dtypes = {"qweight": "I8", "scales": "F32"} if format.packing == "int8" else {"qweight": "U8", "scales": "F16"}
    written = {
        suffix: Tensor(tensor.name, dtypes[suffix], tensor.shape)
        for suffix, tensor in stored_tensors(source, shape[1]).items()
    }
    return Job(source.tensor, shape, format, written)


def _shard(inside: tuple[Job, ...]) -> Shard:
    """Larger numbers go first, so that all begin at multiples of their size, as safetensors wants."""
    tensors = [tensor for job in inside for tensor in job.written.values()]
    tensors.sort(key=lambda tensor: (-BYTES[tensor.dtype], tensor.name))
    spans = list(itertools.pairwise(itertools.accumulate((tensor.bytes for tensor in tensors), initial=0)))
    entries: dict[str, object] = {
        tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(span)}
        for tensor, span in zip(tensors, spans, strict=True)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    offsets = {tensor.name: begin + start for tensor, (start, _) in zip(tensors, spans, strict=True)}
    return Shard(inside, len(text).to_bytes(8, "little") + text, offsets, begin + spans[-1][1])
