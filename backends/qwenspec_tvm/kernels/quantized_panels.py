"""Quantised weights as the kernels read them: which arrays there are, and how checkpoints' numbers get there.

[not FP8] W[n, k] = (q[n, k] - z[n, g]) · s[n, g], where g is the group of input k
[FP8] W[n, k] = q[n, k] · s[n, g], where q is float8 e4m3 and g is the block or row of input k

Inputs are cut into runs that share a scale, of RUN at most: a run's sum stays in registers and is scaled once. Where
groups are no whole runs, or runs no whole words, zeros fill them up: kernels count positions, as many as the inputs or
a few more.
"""

from typing import Any, NamedTuple

import numpy as np

from .panels import num_panels, pack_into

BITS = "4"  # flag: 4 or 8, of the linear layers' integers; empty where they are none
FP8 = True  # flag: weights are float8
ZERO_POINTS = True  # flag: groups have zero points
INT8_HEAD = True  # flag: the LM head is int8, unlike the linear layers
WIDE_SCALES = True  # flag: scales are float32

RUN = 128


class Layout(NamedTuple):
    """How a weight [out, in] of `bits` a value is stored."""

    outputs: int
    inputs: int
    bits: int
    group_size: int | None  # inputs that share a scale, of which the last group may have fewer; None: all
    width: int | None  # of a panel; None: rows as they are

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype. Each is [out, columns], or packed in panels, [panels, columns, width]."""
        scale_dtype = "float32" if WIDE_SCALES or self.groups == 1 else "float16"
        found = {
            "values": (self._shape(self.positions // self.per_word), self.word_dtype),
            "scales": (self._shape(self.groups), scale_dtype),
        }
        if ZERO_POINTS:
            found["zeros"] = (self._shape(self.groups), self.zero_dtype)
        return found

    @property
    def per_word(self) -> int:
        """Values in a word, the first in its lowest bits."""
        return 8 if self.bits == 4 else 1

    @property
    def word_dtype(self) -> str:
        return "int32" if self.bits == 4 else "int8"

    @property
    def zero_dtype(self) -> str:
        return "uint8" if self.bits == 4 else "int8"

    @property
    def zero(self) -> int:
        """The zero point of values as they are stored, of which all have the same."""
        return 8 if self.bits == 4 else 0

    @property
    def group(self) -> int:
        """Inputs in a group."""
        return min(self.group_size or self.inputs, self.inputs)

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group)

    @property
    def runs_in_group(self) -> int:
        return -(-self.group // RUN)

    @property
    def words_in_run(self) -> int:
        return -(-self.group // (self.runs_in_group * self.per_word))

    @property
    def run(self) -> int:
        """Positions in a run."""
        return self.words_in_run * self.per_word

    @property
    def filled_group(self) -> int:
        """Positions in a group."""
        return self.runs_in_group * self.run

    @property
    def runs(self) -> int:
        rest = self.inputs - (self.groups - 1) * self.group
        return (self.groups - 1) * self.runs_in_group + -(-rest // self.run)

    @property
    def positions(self) -> int:
        return self.runs * self.run

    def input_at(self, position: Any) -> tuple[Any, Any]:
        """Which input a position is of, and whether it is of any."""
        group, offset = position // self.filled_group, position % self.filled_group
        k = group * self.group + offset
        return k, (offset < self.group) & (k < self.inputs)

    def _shape(self, columns: int) -> tuple[int, ...]:
        if self.width is None:
            return self.outputs, columns
        return num_panels(self.outputs, self.width), columns, self.width


def store_values(array: np.ndarray, q: np.ndarray, start: int, layout: Layout) -> None:
    """Writes the outputs start, start + 1, ... of a weight's values.

    array: as layout.arrays says
    q: uint8 [n, in]; [not FP8] 0 … 2^bits - 1
    """
    _store(array, _words(_filled(q, layout), layout), start)


def store_scales(array: np.ndarray, scales: np.ndarray) -> None:
    """Writes all of a weight's scales.

    array: as layout.arrays says
    scales: [out, groups]
    """
    _store(array, scales.astype(array.dtype, copy=False), 0)


def store_zeros(array: np.ndarray, zeros: np.ndarray) -> None:
    """Writes all of a weight's zero points.

    array: as layout.arrays says
    zeros: uint8 [out, groups]
    """
    if BITS == "8":
        zeros = _signed(zeros)
    _store(array, zeros, 0)


def _words(q: np.ndarray, layout: Layout) -> np.ndarray:
    """uint8 [n, positions] -> layout's words [n, positions / per_word]."""
    if FP8:
        return q.view(np.int8)
    if BITS == "8":
        return _signed(q)
    if INT8_HEAD and layout.bits == 8:
        return _signed(q)
    pairs = q[:, ::2] | q[:, 1::2] << 4
    return pairs.view("<i4").astype(np.int32, copy=False)


def _signed(q: np.ndarray) -> np.ndarray:
    """Less 128, so that values and zero points lie around 0."""
    return (q ^ 128).view(np.int8)


def _filled(q: np.ndarray, layout: Layout) -> np.ndarray:
    """[n, in] -> [n, positions]."""
    n, groups, group = len(q), layout.groups, layout.group
    if layout.positions == layout.inputs:
        return q
    whole = np.zeros((n, groups * group), q.dtype)
    whole[:, : layout.inputs] = q
    filled = np.zeros((n, groups, layout.filled_group), q.dtype)
    filled[:, :, :group] = whole.reshape(n, groups, group)
    return np.ascontiguousarray(filled.reshape(n, -1)[:, : layout.positions])


def _store(array: np.ndarray, rows: np.ndarray, start: int) -> None:
    if array.ndim == 3:
        pack_into(array, rows, start)
    else:
        array[start : start + len(rows)] = rows
