"""Fill a model from a Hugging Face checkpoint folder, as MANIFEST.json says.

Each entry there names a parameter, its shape and the checkpoint tensors that lie in its rows, top row first; an
entry with `{i}` stands for one parameter a layer. Everything is checked from the files' headers before anything
is allocated, and tensors are read a piece at a time, so that memory peaks little above the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FLOATS = ("F32", "F16", "BF16", "F64")
CHUNK = 16 << 20  # bytes read at once


class CheckpointError(ValueError):
    """The checkpoint does not fit the model; the message lists every reason."""


@dataclass(frozen=True)
class Parameter:
    """A parameter and the (checkpoint tensor, rows) that fill it."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_weights(model: nn.Module, folder: str | Path, device: torch.device) -> None:
    """Give every parameter of `model`, built on the meta device in its final dtypes, its values."""
    manifest = json.loads((Path(__file__).parent / "MANIFEST.json").read_text())
    parameters = list(read_manifest(manifest))
    stored = read_headers(Path(folder))
    problems = check(parameters, stored, manifest["ignored_tensors"])
    if problems:
        raise CheckpointError(f"{folder} does not hold this model:\n" + "\n".join(f"  {p}" for p in problems))
    for parameter in parameters:
        module_name, _, attribute = parameter.name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = read(parameter, stored, getattr(module, attribute).dtype, device)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))


def read_manifest(manifest: dict[str, Any]) -> Iterator[Parameter]:
    """Its parameters, an entry with `{i}` once for each layer."""
    for entry in manifest["parameters"]:
        layers = range(manifest["num_layers"]) if "{i}" in entry["name"] else (0,)
        for i in layers:
            sources = tuple((tensor.replace("{i}", str(i)), rows) for tensor, rows in entry["sources"])
            yield Parameter(entry["name"].replace("{i}", str(i)), tuple(entry["shape"]), sources)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Tensor name -> where it is, over all *.safetensors files of a folder (those of its index, when it has one)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file: --weights is a Hugging Face checkpoint folder")
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()  # a list; safe_open is no mapping
                for name in names:
                    view = tensors.get_slice(name)
                    stored[name] = Stored(file, view.get_dtype(), tuple(view.get_shape()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return stored


def check(parameters: list[Parameter], stored: dict[str, Stored], ignored: list[str]) -> list[str]:
    """Every reason why the checkpoint does not fit: missing, mis-shaped, not a float, or left over."""
    problems = []
    wanted = set()
    for parameter in parameters:
        for tensor, rows in parameter.sources:
            wanted.add(tensor)
            shape = (rows, *parameter.shape[1:])
            found = stored.get(tensor)
            if found is None:
                problems.append(f"missing: {tensor} {list(shape)}, for {parameter.name}")
            elif found.shape != shape:
                problems.append(f"shape: {tensor} is {list(found.shape)}, and {parameter.name} needs {list(shape)}")
            elif found.dtype not in FLOATS:
                problems.append(
                    f"dtype: {tensor} is {found.dtype}, and {parameter.name} needs one of {', '.join(FLOATS)}"
                )
    for tensor in sorted(set(stored) - wanted):
        if not any(fnmatch(tensor, pattern) for pattern in ignored):
            problems.append(f"left over: {tensor} {list(stored[tensor].shape)} is read by no parameter")
    return problems


def read(parameter: Parameter, stored: dict[str, Stored], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One parameter, its sources below one another."""
    filled = torch.empty(parameter.shape, dtype=dtype, device=device)
    step = max(1, CHUNK // filled[:1].nbytes)
    row = 0
    for tensor, rows in parameter.sources:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            # Opened anew for each chunk: closing the file drops its pages, which count as this process's memory.
            with safe_open(stored[tensor].file, framework="pt") as tensors:
                filled[row + start : row + stop].copy_(tensors.get_slice(tensor)[start:stop])
        row += rows
    return filled
