"""Rounding weights to nearest, symmetrically: int8 with a scale a row, int4 with a scale a group of inputs.

    int8  s = max|w| / 127, q = clip(round(w / s), -127, 127)         W = q · s
    int4  s = float16(max|w| / 7), q = clip(round(w / s), -7, 7) + 8  W = (q - 8) · s

Maxima are of a row or a group; where s is 0 so are the weights. Everything is computed in float32, half to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.ir.nodes import IntFormat

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class RoundingError(ValueError):
    """Weights that a format cannot hold; the message says why, and has no name of the tensor."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.hint = code, hint


@dataclass
class Error:
    """What rounding did to the weights of a tensor: sums of squares, and the largest difference."""

    squares: float = 0.0
    squared_error: float = 0.0
    largest: float = 0.0

    def add(self, values: Floats, rounded: Floats) -> None:
        """Some rows of it. Overwrites `rounded`."""
        difference = np.subtract(rounded, values, out=rounded)
        self.squares += _squares(values)
        self.squared_error += _squares(difference)
        self.largest = max(self.largest, float(difference.max()), -float(difference.min()))

    def join(self, other: Error) -> None:
        """As if the other's rows were of this tensor too."""
        self.squares += other.squares
        self.squared_error += other.squared_error
        self.largest = max(self.largest, other.largest)

    @property
    def relative(self) -> float:
        """Root of the mean squared error by that of the mean square of the weights; 0 for weights of zero."""
        return float(np.sqrt(self.squared_error / self.squares)) if self.squares else 0.0


def round_rows(values: Floats, format: IntFormat, error: Error) -> dict[str, Array]:
    """The stored rows, by suffix, of some rows [n, inputs] of a matrix; `error` is told what they lose.

    Raises RoundingError for weights that are not finite numbers, or whose scales float16 cannot hold.
    """
    return _int8(values, error) if format.packing == "int8" else _int4(values, format, error)


def _int8(values: Floats, error: Error) -> dict[str, Array]:
    """`qweight` int8 [n, inputs], `scales` float32 [n]."""
    scales = _largest(values) / np.float32(127)
    q = np.rint(values / _divisors(scales)[:, None])
    np.clip(q, -127, 127, out=q)  # the scales of the smallest numbers are far from exact
    error.add(values, q * scales[:, None])
    return {"qweight": q.astype(np.int8), "scales": scales}


def _int4(values: Floats, format: IntFormat, error: Error) -> dict[str, Array]:
    """`qweight` uint8 [n, ceil(inputs / 2)], the low nibble first; `scales` float16 [n, groups]."""
    rows, inputs = values.shape
    groups, size = format.groups(inputs), format.group_size or inputs
    padded = np.pad(values, ((0, 0), (0, groups * size - inputs))) if inputs % size else values
    grouped = padded.reshape(rows, groups, size)
    largest = _largest(grouped)
    with np.errstate(over="ignore"):
        stored = (largest / np.float32(7)).astype(np.float16)
    if not np.isfinite(stored).all():
        message = f"float16 cannot hold the scale of a group with a weight of ±{largest.max():g}"
        raise RoundingError("scale-too-large", message, "leave the module out with --skip, or convert to int8")
    scales = stored.astype(np.float32)[:, :, None]
    q = np.rint(grouped / _divisors(scales))
    np.clip(q, -7, 7, out=q)
    nibbles = np.full((rows, inputs + inputs % 2), 8, np.uint8)
    nibbles[:, :inputs] = (q + np.float32(8)).astype(np.uint8).reshape(rows, -1)[:, :inputs]
    error.add(values, (q * scales).reshape(rows, -1)[:, :inputs])
    pairs = nibbles.view("<u2")
    return {"qweight": (pairs | pairs >> 4).astype(np.uint8), "scales": stored}


def _largest(values: Floats) -> Floats:
    """Largest magnitudes along the last axis."""
    largest: Floats = np.maximum(values.max(axis=-1), -values.min(axis=-1))
    if not np.isfinite(largest).all():
        raise RoundingError("not-finite", "a weight is not a finite number in float32", "is the checkpoint whole?")
    return largest


def _divisors(scales: Floats) -> Floats:
    return np.where(scales == 0, np.float32(np.inf), scales)


def _squares(values: Floats) -> float:
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))
