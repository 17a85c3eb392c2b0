"""Fill a model from a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointError, Parameter, open_checkpoint

__all__ = ["CheckpointError", "load_weights"]


def load_weights(model: nn.Module, folder: str | Path, device: torch.device) -> None:
    """Give every parameter of `model`, built on the meta device in its final dtypes, its values."""
    checkpoint = open_checkpoint(folder)
    for parameter in checkpoint.parameters:
        module_name, _, attribute = parameter.name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = read(checkpoint, parameter, getattr(module, attribute).dtype, device)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))


def read(checkpoint: Checkpoint, parameter: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One parameter, its sources below one another."""
    filled = torch.empty(parameter.shape, dtype=dtype, device=device)
    for row, piece in checkpoint.pieces(parameter, "pt"):
        filled[row : row + len(piece)].copy_(piece)
    return filled
