"""A Hugging Face checkpoint folder, read as MANIFEST.json says.

Each entry there names a parameter, its shape and the checkpoint tensors that lie in its rows, top row first; an
entry with `{i}` stands for one parameter a layer. Everything is checked from the files' headers before anything
is allocated, and tensors are read a piece at a time, so that memory peaks little above the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # dtypes that parameters are read from, and their bytes
PIECE = 8 << 20  # bytes read at once


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


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds every parameter of this package's model."""

    parameters: list[Parameter]
    stored: dict[str, Stored]

    def pieces(self, parameter: Parameter, framework: str) -> Iterator[tuple[int, Any]]:
        """A parameter's rows from the top, some at a time: the index of the first, and they as `framework`'s array."""
        row = 0
        for tensor, rows in parameter.sources:
            found = self.stored[tensor]
            step = max(1, PIECE // (FLOATS[found.dtype] * math.prod(found.shape[1:])))
            for start in range(0, rows, step):
                # Opened anew for each piece: closing the file drops its pages, which count as this process's memory.
                with safe_open(found.file, framework=framework) as tensors:
                    yield row + start, tensors.get_slice(tensor)[start : min(start + step, rows)]
            row += rows


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The folder's tensors for this package's parameters; raises CheckpointError where they do not fit."""
    manifest = json.loads((Path(__file__).parent / "MANIFEST.json").read_text())
    parameters = list(read_manifest(manifest))
    stored = read_headers(Path(folder))
    problems = check(parameters, stored, manifest["ignored_tensors"])
    if problems:
        raise CheckpointError(f"{folder} does not hold this model:\n" + "\n".join(f"  {p}" for p in problems))
    return Checkpoint(parameters, stored)


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
            with safe_open(file, framework="np") as tensors:  # of any framework: headers alone are read
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
