"""A Hugging Face checkpoint folder, read as MANIFEST.json says.

Each entry there names a parameter, its shape, how ranks share it, and the checkpoint tensors that lie in its rows, top
row first; an entry with `{i}` stands for one parameter a layer. Everything is checked from the files' headers before
anything is allocated, and a rank reads its own share, a piece at a time, so that memory peaks little above the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .console import note
from .quantized import QuantizedMatrix, check_groups, check_zeros, read_quantized
from .shares import Piece, Shared, cut, read_entry
from .stored import (
    FLOATS,
    PIECE,
    CheckpointError,
    Stored,
    Tensor,
    check,
    choose_files,
    either_name,
    explained,
    read_headers,
    read_json,
)

__all__ = ["Checkpoint", "CheckpointError", "Parameter", "open_checkpoint"]

QUANTIZED = True  # flag: some matrices are quantised
GPTQ = True  # flag: … by GPTQ
PACK_QUANTIZED = True  # flag: … by compressed-tensors, in words
TIED = True  # flag: the embedding is the LM head too, in full precision
STORED_KV_SCALES = True  # flag: the checkpoint has scales of the KV cache, [] or [1] each

MARKS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")  # of quantised weights


@dataclass(frozen=True)
class Parameter:
    """What a rank has of a parameter, and the (checkpoint tensor, rows) that fill the whole of it."""

    shared: Shared
    sources: tuple[tuple[str, int], ...]
    degree: int
    rank: int

    @property
    def name(self) -> str:
        return self.shared.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The same on every rank."""
        return self.shared.share(self.degree)

    @property
    def tensors(self) -> list[Tensor]:
        """What the checkpoint must hold of it."""
        return [Tensor(tensor, (rows, *self.shared.shape[1:]), tuple(FLOATS)) for tensor, rows in self.sources]

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """The tensors' rows that the rank has."""
        held = self.shared.row_pieces(self.degree, self.rank)
        for source, piece in cut(held, [rows for _, rows in self.sources]):
            yield self.sources[source][0], piece


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds every parameter of this package's model."""

    parameters: list[Parameter]
    stored: dict[str, Stored]
    if QUANTIZED:
        matrices: list[QuantizedMatrix] = field(default_factory=list)  # the quantised ones

    def pieces(self, parameter: Parameter, framework: str) -> Iterator[tuple[int, Any]]:
        """A parameter's rows from the top, some at a time: the index of the first, and they as `framework`'s array.

        Of several ranks, one may have fewer rows or columns than the parameter has room for: the rest is zeros."""
        columns = parameter.shared.column_piece(parameter.degree, parameter.rank)
        if columns.start == columns.stop:
            return
        for tensor, piece in parameter.pieces():
            found = self.stored[tensor]
            index = (slice(columns.start, columns.stop),) if len(found.shape) > 1 else ()
            step = max(1, PIECE // (FLOATS[found.dtype] * max(columns.stop - columns.start, 1)))
            for start in range(piece.start, piece.stop, step):
                # Opened anew for each piece: closing the file drops its pages, which count as this process's memory.
                with safe_open(found.file, framework=framework) as tensors:
                    if STORED_KV_SCALES and parameter.shape == (1,):
                        scale = tensors.get_tensor(found.name).reshape(1)
                        if not 0 < scale.item() < math.inf:
                            raise CheckpointError(f"{tensor} is {scale.item():g}, and a scale is above 0")
                        yield 0, scale
                    else:
                        rows = slice(start, min(start + step, piece.stop))
                        yield piece.at + start - piece.start, tensors.get_slice(found.name)[(rows, *index)]

    def not_finite(self, parameter: Parameter, row: int) -> CheckpointError:
        """What to raise where the piece that begins with this row has NaN or infinite numbers."""
        held = ((tensor, piece, row - piece.at + piece.start) for tensor, piece in parameter.pieces())
        tensor, start = next((tensor, start) for tensor, piece, start in held if piece.start <= start < piece.stop)
        found = self.stored[tensor]
        what = "holds numbers that are NaN, infinite or too large for the model's dtype"
        return CheckpointError(f"{found.name} {what} ({found.file.name}, from row {start} on)")


def open_checkpoint(folder: str | Path, rank: int = 0, degree: int = 1) -> Checkpoint:
    """The folder's tensors for what one of `degree` ranks has of this package's parameters.

    Raises CheckpointError where they do not fit."""
    manifest = read_json(Path(__file__).parent / "MANIFEST.json")
    parameters = list(read_manifest(manifest, rank, degree))
    chosen = choose_files(Path(folder))
    for said in chosen.notes if rank == 0 else ():
        note(said)
    stored = read_headers(chosen.files)
    if TIED:
        stored = either_name(stored, manifest["tied"])
    wanted = [(parameter.name, tensor) for parameter in parameters for tensor in parameter.tensors]
    allowed = manifest["ignored_tensors"]
    if QUANTIZED:
        quantized = ((entry, i) for entry, i in _entries(manifest) if "format" in entry)
        matrices = [read_quantized(entry, i, stored, rank, degree) for entry, i in quantized]
        wanted += [(matrix.name, tensor) for matrix in matrices for tensor in matrix.tensors]
        allowed += manifest["zero_tensors"]
    problems = check(wanted, stored, allowed)
    if PACK_QUANTIZED and not problems:
        problems = check_groups(matrices)
    if GPTQ and not problems:
        read = {tensor.name for _, tensor in wanted}
        problems = check_groups(matrices) + check_zeros(stored, read, manifest["zero_tensors"])
    if problems:
        told = _other_quantization(stored) + explained(problems, stored)
        raise CheckpointError(f"{folder} does not hold this model:\n" + "\n".join(f"  {line}" for line in told))
    return Checkpoint(parameters, stored, matrices) if QUANTIZED else Checkpoint(parameters, stored)


def _other_quantization(stored: dict[str, Stored]) -> list[str]:
    """What explains most of what is wrong, where it is."""
    quantized = next((name for name in sorted(stored) if name.endswith(MARKS)), None)
    if QUANTIZED:
        return [] if quantized else ["its weights are in full precision, and this package's are quantised"]
    return [f"its weights are quantised ({quantized}), and this package's are not"] if quantized else []


def read_manifest(manifest: dict[str, Any], rank: int = 0, degree: int = 1) -> Iterator[Parameter]:
    """Its parameters, an entry with `{i}` once for each layer.

    [QUANTIZED] Those that are not quantised."""
    for entry, i in _entries(manifest):
        if QUANTIZED and "format" in entry:
            continue
        sources = tuple((tensor.replace("{i}", str(i)), rows) for tensor, rows in entry["sources"])
        shared = read_entry(entry)
        yield Parameter(replace(shared, name=shared.name.replace("{i}", str(i))), sources, degree, rank)


def _entries(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each entry, with each layer that it stands for."""
    for entry in manifest["parameters"]:
        if QUANTIZED:
            layers = entry.get("layers") or (range(manifest["num_layers"]) if "{i}" in entry["name"] else (0,))
        else:
            layers = range(manifest["num_layers"]) if "{i}" in entry["name"] else (0,)
        yield from ((entry, i) for i in layers)
