"""A checkpoint folder as the reference reads it: one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from qwenspec.backend.runtime.checkpoint import CheckpointError, read_headers
from qwenspec.diagnostics import Diagnostic, SpecError


class StoredTensors(Mapping[str, "npt.NDArray[Any]"]):
    """Name -> array, read from the safetensors files whenever it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises SpecError (`checkpoint`) for a folder whose files cannot be read."""
        try:
            self._stored = read_headers(folder)
        except CheckpointError as error:
            raise SpecError([Diagnostic("checkpoint", str(error))]) from error

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        import ml_dtypes  # noqa: F401  gives NumPy its bfloat16
        from safetensors import safe_open

        with safe_open(self._stored[name].file, framework="np") as tensors:
            array: npt.NDArray[Any] = tensors.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
