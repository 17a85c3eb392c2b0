"""Whether a checkpoint's tensors are those of a model, told as its package tells it when it loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwenspec.backend.runtime.stored import (
    FLOATS,
    CheckpointError,
    Stored,
    Tensor,
    check,
    choose_files,
    either_name,
    explained,
    read_headers,
)
from qwenspec.diagnostics import Diagnostic, SpecError, listed
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.ir.quantized import blocks, stored_tensors
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load_right

MOST = 200  # variants that are tried


def wanted(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that the checkpoint must or may hold, after the parameter that is read from it."""
    for param in model.params():
        for block in blocks(param):
            for source in block.sources:
                if source.format is None:
                    yield block.name, Tensor(source.tensor, (source.rows, *param.shape[1:]), tuple(FLOATS))
                    continue
                for tensor in stored_tensors(source, param.shape[1]).values():
                    yield block.name, Tensor(tensor.name, tensor.shape, tensor.dtypes, tensor.optional)


def allowed(model: Model) -> tuple[str, ...]:
    """Patterns (fnmatch) of tensors that a checkpoint may hold beside them."""
    return (*model.ignored_tensors, *model.zero_tensors)


def fitting_variants(file: str | Path, folder: Path) -> list[str]:
    """The variants of a spec file whose tensors are those in a checkpoint folder; none where either cannot be read."""
    try:
        stored = read_headers(choose_files(folder).files)
        specs = load_right(file)[:MOST]
    except (CheckpointError, SpecError):
        return []
    names = []
    for spec in specs:
        with contextlib.suppress(SpecError):  # it cannot be lowered
            names += [spec.variant] if not problems(lower(spec), stored) else []
    return names


def way_out(file: str | Path, folder: Path) -> str:
    """A hint for someone whose checkpoint is not that of the variant of a spec file."""
    if names := fitting_variants(file, folder):
        return f"it is the checkpoint of {listed(names)} in {file}: choose with --variant"
    return "`qwenspec import` makes the spec of a checkpoint"


def way_out_if_unfit(spec: Spec, folder: Path) -> str:
    """The same, for a checkpoint that can be read and is not that of `spec`; empty for any other."""
    try:
        stored = read_headers(choose_files(folder).files)
    except CheckpointError:
        return ""
    return way_out(spec.file, folder) if problems(lower(spec), stored) else ""


def check_fits(spec: Spec, folder: Path) -> None:
    """Raises SpecError (`checkpoint`) for a checkpoint that is not that of `spec`, or cannot be read."""
    try:
        stored = read_headers(choose_files(folder).files)
    except CheckpointError as error:
        raise SpecError([Diagnostic("checkpoint", str(error))]) from error
    if found := problems(lower(spec), stored):
        details = tuple(f"  {line}" for line in explained(found, stored))
        message = f"{folder} does not hold {spec.variant}:"
        raise SpecError([Diagnostic("checkpoint", message, hint=way_out(spec.file, folder), details=details)])


def problems(model: Model, stored: Mapping[str, Stored]) -> list[str]:
    """Every reason why the tensors are not the model's."""
    return check(list(wanted(model)), either_name(stored, model.tied_names), allowed(model))
