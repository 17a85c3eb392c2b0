"""Rounding to int8 and int4, by hand and by its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwenspec.convert.rounding import Error, RoundingError, round_rows
from qwenspec.ir.nodes import IntFormat

INT8 = IntFormat("int8", bits=8, group_size=None)


def int4(group_size: int) -> IntFormat:
    return IntFormat("int4", bits=4, group_size=group_size)


def test_int8_by_hand() -> None:
    values = np.array([[-254, 1, 3, 127], [0, 0, 0, 0], [0.5, -0.25, 0.125, 0.0]], np.float32)
    error = Error()
    stored = round_rows(values, INT8, error)
    assert stored["scales"].tolist() == pytest.approx([2, 0, 0.5 / 127], rel=1e-7)
    assert stored["scales"].dtype == np.float32
    # 0.5, 1.5 and 63.5 are half way, and go to the even number.
    assert stored["qweight"].tolist() == [[-127, 0, 2, 64], [0, 0, 0, 0], [127, -64, 32, 0]]
    assert error.largest == 1
    assert error.squared_error == pytest.approx(3, abs=1e-4)
    assert error.squares == pytest.approx(254**2 + 1 + 9 + 127**2 + 0.25 + 0.0625 + 0.015625)


def test_int4_by_hand() -> None:
    """Groups of 3 and one of 2; the low nibble is the even input, and a row of zeros is 8 throughout."""
    values = np.array([[7, -7, 1, 0, 0, 0, 3.5, 1.25], [0] * 8], np.float32)
    stored = round_rows(values, int4(3), Error())
    assert stored["scales"].tolist() == [[1, 0, 0.5], [0, 0, 0]]
    assert stored["scales"].dtype == np.float16
    q = [15, 1, 9, 8, 8, 8, 15, 10]  # 1.25 / 0.5 is half way between 2 and 3
    assert stored["qweight"].tolist() == [
        [low | high << 4 for low, high in zip(q[::2], q[1::2], strict=True)],
        [0x88] * 4,
    ]


def test_an_odd_number_of_inputs_leaves_half_a_byte() -> None:
    stored = round_rows(np.array([[1, -1, 0.5]], np.float32), int4(2), Error())
    assert stored["qweight"].tolist() == [[15 | 1 << 4, 15 | 8 << 4]]
    assert stored["scales"].shape == (1, 2)


def test_a_scale_that_float16_rounds_down_does_not_overflow() -> None:
    """w / s is beyond 7 there; and where s itself is lost, so are the weights."""
    largest = np.float32(7 * (1 + 2**-11))  # its scale is half way between two float16, and goes down
    stored = round_rows(np.array([[largest, -largest]], np.float32), int4(2), Error())
    assert stored["qweight"].tolist() == [[15 | 1 << 4]]
    step = np.float32(2) ** -24  # the least that a scale can be; a seventh of the largest is 1.4 of it
    small = round_rows(np.array([[9.8 * step, -9.8 * step]], np.float32), int4(2), Error())
    assert (small["qweight"].tolist(), small["scales"].tolist()) == ([[15 | 1 << 4]], [[step]])
    tiny = round_rows(np.array([[4e-8, -9e-8]], np.float32), int4(2), Error())
    assert (tiny["qweight"].tolist(), tiny["scales"].tolist()) == ([[0x88]], [[0]])
    least = np.float32(2) ** -149
    smallest = round_rows(np.array([[190 * least, -190 * least]], np.float32), INT8, Error())
    assert smallest["qweight"].tolist() == [[127, -127]]


@pytest.mark.parametrize("format", [INT8, int4(2)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(format: IntFormat, value: float) -> None:
    with pytest.raises(RoundingError) as caught:
        round_rows(np.array([[1, 2, value, 3]], np.float32), format, Error())
    assert caught.value.code == "not-finite"


def test_the_largest_scale() -> None:
    assert round_rows(np.full((1, 2), 7 * 65504, np.float32), int4(2), Error())["scales"].tolist() == [[65504]]
    with pytest.raises(RoundingError, match="±458640"):
        round_rows(np.full((1, 2), -7 * 65520, np.float32), int4(2), Error())


@given(
    values=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 20)),
        elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-2),
    ),
    size=st.integers(1, 24),
)
def test_nothing_is_further_off_than_half_a_step(values: np.ndarray, size: int) -> None:
    rows, inputs = values.shape
    error = Error()
    stored = round_rows(values, INT8, error)
    restored = stored["qweight"] * stored["scales"].astype(np.float64)[:, None]
    difference = np.abs(restored - values)
    assert (difference <= stored["scales"][:, None] * 0.5001).all()
    assert error.largest == pytest.approx(difference.max(), rel=1e-3, abs=2e-3)  # float32 of up to 10,000

    stored = round_rows(values, int4(size), Error())
    nibbles = np.stack([stored["qweight"] & 15, stored["qweight"] >> 4], axis=-1).reshape(rows, -1)[:, :inputs]
    scales = stored["scales"].astype(np.float64)[:, np.arange(inputs) // size]
    # float16 rounds a scale by up to 1 in 2048, which 7 steps feel seven times.
    assert (np.abs((nibbles - 8.0) * scales - values) <= scales * (0.5 + 7 / 2048 + 1e-4)).all()
    assert nibbles.min() >= 1


def test_errors_join() -> None:
    first, second = Error(squares=9, squared_error=1, largest=0.5), Error(squares=7, squared_error=3, largest=0.25)
    first.join(second)
    assert (first.relative, first.largest) == (0.5, 0.5)
    assert Error().relative == 0
