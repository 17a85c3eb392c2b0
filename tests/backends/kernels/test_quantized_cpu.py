"""Products with quantised matrices on the CPU, and on a machine with a GPU their kernels, against float64."""

from __future__ import annotations

from unittest import mock

import pytest
import quantized_checks as checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import TOLERANCE, runs_kernels
from kernel_variants import load

CPU = torch.device("cpu")
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
sizes = st.integers(1, 70)
rows = st.sampled_from([1, 2, 9, 30])
fp8 = st.tuples(st.tuples(sizes, sizes), st.sampled_from(["none", "dynamic"])) | st.tuples(
    st.none(), st.sampled_from(["none", "dynamic", "static"])
)
group_sizes = st.none() | st.sampled_from([1, 2, 7, 16, 32, 50])


def test_fixed_cases() -> None:
    assert not runs_kernels(CPU)
    checks.check_all(CPU)


@many
@given(dtypes, rows, st.integers(1, 600), sizes, st.sampled_from([4, 8]), group_sizes, st.data())
def test_int_linear(
    dtype: torch.dtype, n: int, out: int, inputs: int, bits: int, group_size: int | None, data: st.DataObject
) -> None:
    flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    checks.check_int_linear(CPU, dtype, n, out, inputs, bits, group_size, *flags)


@many
@given(dtypes, rows, st.integers(1, 300), sizes, fp8, st.booleans())
def test_fp8_linear(
    dtype: torch.dtype, n: int, out: int, inputs: int, how: tuple[tuple[int, int] | None, str], biased: bool
) -> None:
    checks.check_fp8_linear(CPU, dtype, n, out, inputs, *how, biased)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str))
def test_scale_activations(dtype: torch.dtype) -> None:
    checks.check_scale_activations(CPU, dtype, 3, 70)


@pytest.mark.parametrize("n", [1, 3])
def test_lower_bits_are_unpacked_some_tiles_at_a_time(n: int) -> None:
    flags = {"BITS": "4", "GROUPS": True, "ZERO_POINTS": True, "ACT_ORDER": False, "BIAS": False}
    with mock.patch.object(load("int_linear", **flags), "BUFFER", 2 * 256 * 48):  # two tiles
        checks.check_int_linear(CPU, torch.float32, n, 3 * 256 + 9, 96, 4, 32, zero_points=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    assert runs_kernels(torch.device("cuda"))
    checks.check_all(torch.device("cuda"))
