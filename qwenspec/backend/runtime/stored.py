"""The safetensors files of a checkpoint folder: which tensors they hold, and which ones a model asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # dtypes that parameters are read from, and their bytes
PIECE = 8 << 20  # bytes read at once


class CheckpointError(ValueError):
    """The checkpoint does not fit the model; the message says why."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that a checkpoint must hold, or may if it is optional."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_text(file: Path) -> str:
    """The text of a regular file, which is UTF-8 wherever it is read. Raises CheckpointError, which names the file."""
    try:
        if not file.is_file():  # a fifo would never end
            raise CheckpointError(f"{file} is {'no regular file' if file.exists() else 'missing'}")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, which names the file."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}:{error.lineno}:{error.colno} is not valid JSON: {error.msg}") from error
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deep") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content


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
