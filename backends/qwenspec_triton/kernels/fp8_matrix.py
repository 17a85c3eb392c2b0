"""A matrix of float8 e4m3.

[not ROW_SCALES] With a scale for each block: W[n, k] = q[n, k] · s[n // height, k // width].
[ROW_SCALES] With a scale for each row: W[n, k] = q[n, k] · s[n].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROW_SCALES = True  # flag: weights have a scale a row
STATIC_ACTIVATIONS = True  # flag: activations are rounded with a scale that the checkpoint has


class Fp8Matrix(nn.Module):
    """W [out, in], empty until `pack`.

    qweight: uint8 [out, in], the bits of e4m3
    [not ROW_SCALES] scales: float32 [ceil(out / height), ceil(in / width)]
    [ROW_SCALES] scales: float32 [out, 1]
    [STATIC_ACTIVATIONS] input_scale: float32 [1]
    """

    def __init__(self, out_features: int, in_features: int, block: tuple[int, int]) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        if ROW_SCALES:
            self.height, self.width = 1, in_features
        else:
            self.height, self.width = block
        self.qweight: Tensor
        self.scales: Tensor
        if STATIC_ACTIVATIONS:
            self.input_scale: Tensor

    def pack(self, matrix: Any, device: torch.device) -> None:
        """Fill it from a checkpoint's QuantizedMatrix, a few rows at a time."""
        qweight = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        for row, values in matrix.pieces():
            qweight[row : row + len(values)] = torch.tensor(values, device=device)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", torch.from_numpy(matrix.scales()).to(device).contiguous())
        if STATIC_ACTIVATIONS:
            self.register_buffer("input_scale", torch.tensor(matrix.input_scale(), device=device))
