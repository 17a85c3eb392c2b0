"""Fill a model from a Hugging Face checkpoint folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointError, Parameter, open_checkpoint
from .ranks import Ranks

__all__ = ["CheckpointError", "load_weights"]

QUANTIZED = True  # flag: some matrices are quantised
STORED_KV_SCALES = True  # flag: attention has scales of the KV cache


def load_weights(model: nn.Module, folder: str | Path, device: torch.device, ranks: Ranks) -> None:
    """Give every parameter of `model`, built on the meta device in its final dtypes, what the rank has of its values.

    [QUANTIZED] Quantised matrices are packed as their kernels want them."""
    checkpoint = open_checkpoint(folder, ranks.rank, ranks.size)
    for parameter in checkpoint.parameters:
        module_name, _, attribute = parameter.name.rpartition(".")
        module = model.get_submodule(module_name)
        if STORED_KV_SCALES and attribute in ("k_scale", "v_scale"):
            tensor = read(checkpoint, parameter, torch.float32, device)  # in a model of any dtype
        else:
            tensor = read(checkpoint, parameter, getattr(module, attribute).dtype, device)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    if QUANTIZED:
        for matrix in checkpoint.matrices:
            packed: Any = model.get_submodule(matrix.name)
            packed.pack(matrix, device)


def read(checkpoint: Checkpoint, parameter: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the rank has of a parameter, its sources below one another, and zeros where that is less than its share."""
    new = torch.empty if parameter.degree == 1 else torch.zeros
    filled = new(parameter.shape, dtype=dtype, device=device)
    for row, piece in checkpoint.pieces(parameter, "pt"):
        rows = filled[row : row + len(piece)]
        rows[..., : piece.shape[-1]].copy_(piece)
        if not finite(rows):  # asked of the copy, which is in the processor's caches and not in a file's mapping
            raise checkpoint.not_finite(parameter, row)
    return filled


def finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite. A sum shows both, but may overflow by itself; the extremes take longer."""
    return math.isfinite(values.sum().item()) or all(math.isfinite(bound.item()) for bound in values.aminmax())
