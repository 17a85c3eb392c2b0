"""A checkpoint folder as the reference reads it: one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.backend.runtime.stored import CheckpointError, choose_files, either_name, read_headers
from qwenspec.diagnostics import Diagnostic, SpecError


class StoredTensors(Mapping[str, "npt.NDArray[Any]"]):
    """Name -> array, read from the safetensors files whenever it is asked for."""

    def __init__(self, folder: Path, tied: Sequence[str] = ()) -> None:
        """tied: names of one tensor, the second of which is used where the first is not there.

        Raises SpecError (`checkpoint`) for a folder whose files cannot be read."""
        try:
            self._stored = either_name(read_headers(choose_files(folder).files), tied)
        except CheckpointError as error:
            raise SpecError([Diagnostic("checkpoint", str(error))]) from error

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        import ml_dtypes  # gives NumPy its bfloat16
        from safetensors import safe_open

        stored = self._stored[name]
        if stored.dtype == "F8_E4M3":  # safetensors has none for NumPy
            return np.fromfile(
                stored.file, ml_dtypes.float8_e4m3fn, math.prod(stored.shape), offset=stored.start
            ).reshape(stored.shape)
        with safe_open(stored.file, framework="np") as tensors:
            array: npt.NDArray[Any] = tensors.get_tensor(stored.name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
