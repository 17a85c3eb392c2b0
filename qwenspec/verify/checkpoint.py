"""A checkpoint folder as the reference reads it: one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.backend.runtime.stored import CheckpointError, read_headers
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
        import ml_dtypes  # gives NumPy its bfloat16
        from safetensors import safe_open

        stored = self._stored[name]
        if stored.dtype == "F8_E4M3":  # safetensors has none for NumPy
            raw = np.frombuffer(_read(stored.file, name), ml_dtypes.float8_e4m3fn)
            return raw.reshape(stored.shape)
        with safe_open(stored.file, framework="np") as tensors:
            array: npt.NDArray[Any] = tensors.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _read(file: Path, name: str) -> bytes:
    """A tensor's bytes: the file begins with its header's length in 8 bytes, and the header, in JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start, end = json.loads(opened.read(length))[name]["data_offsets"]
        opened.seek(8 + length + start)
        return opened.read(end - start)
