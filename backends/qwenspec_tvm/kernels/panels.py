"""Packed weights: [out, in] stored as panels of `width` outputs, [ceil(out / width), in, width].

A panel keeps the `width` outputs' weights of one input side by side. A product then reads a panel from front to back,
a vector at a time, and its sums stay in registers. The last panel is filled with zeros.
"""

import numpy as np

_BLOCK = 16  # panels transposed at a time: source and result stay in the cache


def num_panels(out_features: int, width: int) -> int:
    """Number of panels that hold `out_features` outputs."""
    return -(-out_features // width)


def pack(rows: np.ndarray, width: int) -> np.ndarray:
    """A weight, packed.

    rows: [out, in]
    -> [ceil(out / width), in, width], rows' dtype
    """
    packed = np.zeros((num_panels(len(rows), width), rows.shape[1], width), rows.dtype)
    pack_into(packed, rows, 0)
    return packed


def pack_into(packed: np.ndarray, rows: np.ndarray, start: int) -> None:
    """Writes the outputs start, start + 1, ... of a packed weight and leaves the others.

    packed: [panels, in, width]
    rows: [n, in], packed's dtype
    """
    width = packed.shape[2]
    stop = start + len(rows)
    assert rows.shape[1] == packed.shape[1]
    assert stop <= packed.shape[0] * width
    while start < stop:
        panel, lane = divmod(start, width)
        if lane or stop - start < width:
            count = min(width - lane, stop - start)
            packed[panel, :, lane : lane + count] = rows[:count].T
        else:
            whole = min((stop - start) // width, _BLOCK)
            count = whole * width
            packed[panel : panel + whole] = rows[:count].reshape(whole, width, -1).transpose(0, 2, 1)
        rows = rows[count:]
        start += count


def unpack(packed: np.ndarray, out_features: int) -> np.ndarray:
    """The inverse of pack.

    packed: [panels, in, width]
    -> [out, in]
    """
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:out_features]
