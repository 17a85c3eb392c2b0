"""A matrix of small integers: W[n, k] = (q[n, k] - z) · s[n, g], where g is the group of input k.

[BITS == "4" and ZERO_POINTS] q is in 0 … 15, and each group of each output has a zero point z.
[BITS == "4" and not ZERO_POINTS] q is in 0 … 15, and z is 8.
[BITS == "8" and ZERO_POINTS] q is in 0 … 255, and each group of each output has a zero point z.
[BITS == "8" and not ZERO_POINTS] q is in 0 … 255, and z is 128.
[not GROUPS] All inputs are one group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns import empty_columns, from_columns, put_columns, to_columns
from .dispatch import use_triton

BITS = "4"  # flag: 4 or 8, of a value
GROUPS = True  # flag: inputs are in groups, of which the last may have fewer
ZERO_POINTS = True  # flag: groups have zero points
ACT_ORDER = True  # flag: inputs belong to groups in an order of their own
LOOKUP = True  # flag: rows are embeddings


class IntMatrix(nn.Module):
    """W [out, in], empty until `pack`. Inputs are padded to whole groups.

    [BITS == "4"] A byte holds two inputs of a group: j in its lower bits, j + width in its upper ones.

    On a GPU a row is an output:
    qweight: uint8 [out, groups · width]
    scales: float [out, groups]
    [ZERO_POINTS] zeros: uint8 [out, groups]
    On a CPU, as in `columns`:
    qweight: uint8 [tiles, groups · width, TILE + TAIL]
    scales: float [tiles, groups, TILE]
    [ZERO_POINTS] zeros: uint8 [tiles, groups, TILE]
    [ACT_ORDER] On both:
    [ACT_ORDER] order: int32 [in], which input of x each of the matrix's multiplies
    """

    def __init__(self, out_features: int, in_features: int, group_size: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.group_size = group_size if GROUPS else in_features
        self.groups = -(-in_features // self.group_size)
        self.width = -(-self.group_size // 2) if BITS == "4" else self.group_size  # bytes of a group
        self.qweight: Tensor
        self.scales: Tensor
        if ZERO_POINTS:
            self.zeros: Tensor
        if ACT_ORDER:
            self.order: Tensor

    def pack(self, matrix: Any, device: torch.device) -> None:
        """Fill it from a checkpoint's QuantizedMatrix, a few rows at a time."""
        inputs = self.groups * self.width
        scales = torch.from_numpy(matrix.scales())
        if ZERO_POINTS:
            zeros = torch.from_numpy(matrix.zeros())
        if use_triton(torch.empty(0, device=device)):
            qweight = torch.empty(self.out_features, inputs, dtype=torch.uint8, device=device)
            for row, values in matrix.pieces():
                qweight[row : row + len(values)] = self._bytes(torch.tensor(values, device=device))
        else:
            qweight = empty_columns(self.out_features, inputs, zero=8 + 16 * 8 if BITS == "4" else 128)
            for row, values in matrix.pieces():
                put_columns(qweight, row, self._bytes(torch.tensor(values)))
            scales = to_columns(scales)
            if ZERO_POINTS:
                zeros = to_columns(zeros)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales.to(device).contiguous())
        if ZERO_POINTS:
            self.register_buffer("zeros", zeros.to(device).contiguous())
        if ACT_ORDER:
            self.register_buffer("order", torch.tensor(matrix.order(), device=device))

    def _bytes(self, values: Tensor) -> Tensor:
        """[rows, in] -> [rows, groups · width]."""
        if BITS == "4":
            values = F.pad(values, (0, self.groups * self.group_size - self.in_features))
            values = F.pad(values.unflatten(1, (self.groups, -1)), (0, self.group_size % 2))
            lower, upper = values.chunk(2, dim=2)
            return (lower | upper << 4).flatten(1)
        else:
            return F.pad(values, (0, self.groups * self.width - self.in_features))

    if LOOKUP:

        def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
            """Rows of W, computed in float32 and rounded once: ids [n] -> [n, in]."""
            if use_triton(self.qweight):
                rows, scales = self.qweight[ids], self.scales[ids]
            else:
                rows, scales = from_columns(self.qweight, ids), from_columns(self.scales, ids)
            rows = rows.unflatten(1, (self.groups, -1))  # [n, groups, width]
            if BITS == "4":
                values = torch.cat([rows & 15, rows >> 4], dim=2)[:, :, : self.group_size].float() - 8
            else:
                values = rows.float() - 128
            weights = (values * scales.float().unsqueeze(2)).flatten(1)
            return weights[:, : self.in_features].to(dtype).contiguous()
