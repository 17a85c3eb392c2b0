"""The kernels of products with quantised matrices in Triton's interpreter: fixed cases, random ones, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import quantized_checks as checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import TOLERANCE
from kernel_variants import load, load_mistaken

import triton_interpreter  # noqa: F401  (repairs it)

pytestmark = pytest.mark.interpreter

CPU, F32 = torch.device("cpu"), torch.float32
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
rows = st.sampled_from([1, 2, 17])
sizes = st.integers(1, 70)
fp8 = st.tuples(st.tuples(sizes, sizes), st.sampled_from(["none", "dynamic"])) | st.tuples(
    st.none(), st.sampled_from(["none", "dynamic", "static"])
)
group_sizes = st.none() | st.sampled_from([1, 2, 7, 16, 32, 50])


def test_fixed_cases() -> None:
    checks.check_all(CPU)


@few
@given(dtypes, rows, st.integers(1, 50), sizes, st.sampled_from([4, 8]), group_sizes, st.data())
def test_int_linear(
    dtype: torch.dtype, n: int, out: int, inputs: int, bits: int, group_size: int | None, data: st.DataObject
) -> None:
    flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    checks.check_int_linear(CPU, dtype, n, out, inputs, bits, group_size, *flags)


@few
@given(dtypes, rows, st.integers(1, 50), sizes, fp8, st.booleans())
def test_fp8_linear(
    dtype: torch.dtype, n: int, out: int, inputs: int, how: tuple[tuple[int, int] | None, str], biased: bool
) -> None:
    checks.check_fp8_linear(CPU, dtype, n, out, inputs, *how, biased)


@few
@given(dtypes, st.integers(1, 4), sizes, sizes)
def test_quantize_activations(dtype: torch.dtype, n: int, inputs: int, width: int) -> None:
    checks.check_quantize_activations(CPU, dtype, n, inputs, width)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str))
def test_scale_activations(dtype: torch.dtype) -> None:
    checks.check_scale_activations(CPU, dtype, 3, 1100)


MISTAKES: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "matvec: the halves of a byte swapped": (
        "int_linear",
        "_above(qweight >> 4, zero) * upper_x",
        "_above(qweight >> 4, zero) * x",
        lambda: checks.check_int_linear(CPU, F32, 1, 8, 64, 4, 32),
    ),
    "matvec: the scale of the next output": (
        "int_linear",
        "scale = tl.load(scales_ptr + of_group, mask",
        "scale = tl.load(scales_ptr + of_group + groups, mask",
        lambda: checks.check_int_linear(CPU, F32, 1, 9, 64, 4, 32),
    ),
    "matvec: inputs beyond the last": (
        "int_linear",
        "inside = (j < WIDTH)[None, :] & (k < in_features)",
        "inside = (j < WIDTH)[None, :] & (k >= 0)",
        lambda: checks.check_int_linear(CPU, F32, 1, 8, 50, 8, 32),
    ),
    "matmul: the zero point off by one": (
        "int_linear",
        "(8388608.0 + zero)",
        "(8388609.0 + zero)",
        lambda: checks.check_int_linear(CPU, F32, 2, 8, 64, 4, 32, zero_points=True),
    ),
    "matmul: the first group's scales": (
        "int_linear",
        "acc += sums * tl.load(scales_ptr + first_group + g)",
        "acc += sums * tl.load(scales_ptr + first_group)",
        lambda: checks.check_int_linear(CPU, F32, 2, 8, 64, 4, 32),
    ),
    "matmul: the upper half's padding": (
        "int_linear",
        "inside = (WIDTH + j < GROUP_SIZE) & (WIDTH + k < in_features)",
        "inside = (j < WIDTH) & (WIDTH + k < in_features)",
        lambda: checks.check_int_linear(CPU, F32, 2, 8, 50, 4, 7),
    ),
    "g_idx ignored": (
        "int_linear",
        "x = x[:, weight.order]",
        "x = x + 0",
        lambda: checks.check_int_linear(CPU, F32, 2, 8, 64, 4, 32, act_order=True),
    ),
    "fp8: one scale for all rows of blocks": (
        "fp8_linear",
        "(row // HEIGHT)[:, None] * groups",
        "(row * 0)[:, None] * groups",
        lambda: checks.check_fp8_linear(CPU, F32, 1, 40, 80, (16, 32)),
    ),
    "fp8: activations' scales of the first token": (
        "fp8_linear",
        "x_scales_ptr + row_m * groups + g",
        "x_scales_ptr + row_m * 0 + g",
        lambda: checks.check_fp8_linear(CPU, F32, 3, 40, 80, (16, 32), "dynamic"),
    ),
    "fp8: a group of zeros divides by zero": (
        "fp8_linear",
        "tl.where(scale == 0.0, 0.0, tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)))",
        "tl.div_rn(x, scale)",
        lambda: checks.check_quantize_activations(CPU, F32, 2, 70, 32),
    ),
    "fp8: NaN is lost with a stored scale": (
        "fp8_linear",
        "tl.where(tl.min(numbers, 0) == 1, scale",
        "tl.where(tl.min(numbers, 0) < 2, scale",
        lambda: checks.check_scale_activations(CPU, F32, 2, 70),
    ),
    "fp8: NaN is lost": (
        "fp8_linear",
        "tl.where(finite == 1, scale,",
        "tl.where(finite < 2, scale,",
        lambda: checks.check_quantize_activations(CPU, F32, 2, 70, 32),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_checks_find(mistake: str) -> None:
    file, right, wrong, check = MISTAKES[mistake]
    check()

    def load_wrong(name: str, **flags: bool | str) -> object:
        return load_mistaken(right, wrong, name, **flags) if name == file else load(name, **flags)

    with mock.patch.object(checks, "load", load_wrong), pytest.raises(AssertionError):
        check()
