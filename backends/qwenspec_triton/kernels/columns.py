"""Matrices of bytes for products on a CPU: what TILE outputs have for an input lies together.

torch's embedding_bag_byte adds rows of bytes, each times a number, in float32 and without unpacking them to memory
first; it runs on all threads. Here rows are inputs, bags are groups of them, and the numbers are activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 256  # outputs
TAIL = 8  # bytes after each row: scale and bias of embedding_bag_byte, float32


def empty_columns(outputs: int, inputs: int, zero: int) -> Tensor:
    """Room for bytes that count from `zero`: [tiles, inputs, TILE + TAIL] uint8."""
    columns = torch.empty(-(-outputs // TILE), inputs, TILE + TAIL, dtype=torch.uint8)
    columns[:, :, TILE:].view(torch.float32)[:] = torch.tensor([1.0, -zero])
    return columns


def put_columns(columns: Tensor, first: int, rows: Tensor) -> None:
    """Fill in outputs first, first + 1 …: rows [outputs, inputs]."""
    for start in range(-(first % TILE), len(rows), TILE):
        tile, column = divmod(first + max(start, 0), TILE)
        part = rows[max(start, 0) : start + TILE]
        columns[tile, :, column : column + len(part)] = part.T


def to_columns(matrix: Tensor) -> Tensor:
    """[outputs, m] -> [tiles, m, TILE], zero beyond the outputs."""
    padded = F.pad(matrix, (0, 0, 0, -len(matrix) % TILE))
    return padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def from_columns(columns: Tensor, outputs: Tensor) -> Tensor:
    """[tiles, m, TILE] and indices [n] -> [n, m]."""
    return columns[outputs // TILE, :, outputs % TILE]


def sum_bags(columns: Tensor, x: Tensor, size: int) -> Tensor:
    """Σ x · (byte - zero) over each `size` inputs.

    columns: [tiles, inputs, TILE + TAIL] uint8, contiguous
    x: [n, inputs] float32
    -> [tiles, n, inputs / size, TILE] float32
    """
    tiles, inputs, _ = columns.shape
    n = len(x)
    # A tile meets all rows of x while it is in the processor's cache.
    order = torch.arange(tiles * inputs, dtype=torch.int32).view(tiles, 1, inputs).repeat(1, n, 1)
    starts = torch.arange(0, tiles * n * inputs, size, dtype=torch.int32)
    bags = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        columns.flatten(0, 1), order.view(-1), starts, per_sample_weights=x.repeat(tiles, 1).view(-1)
    )
    return bags.view(tiles, n, inputs // size, TILE)
