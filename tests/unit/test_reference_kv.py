"""The reference's quantised KV cache: hand values, and what it must not change."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qwenspec.spec.kv_cache import Fp8KvCache, Int8KvCache
from qwenspec.verify.reference_kv import cached

FP8, STORED, INT8 = (
    Fp8KvCache(scheme="fp8_e4m3"),
    Fp8KvCache(scheme="fp8_e4m3", scales="checkpoint"),
    Int8KvCache(scheme="int8"),
)


def test_int8_by_hand():
    """s = 12.7 / 127 = 0.1: halves go to the even number."""
    x = np.array([[[12.7, -12.7, 0.04, 0.06, 0.25, 0.0]]])
    np.testing.assert_allclose(cached(x, INT8, None), [[[12.7, -12.7, 0.0, 0.1, 0.2, 0.0]]], atol=1e-12)


def test_fp8_by_hand():
    """s = 1: 17 lies between 16 and 18, and 27 between 26 and 28; 448 is the largest."""
    x = np.array([[[448.0, 17.0, 27.0, -0.3, 2.0**-10]]])
    np.testing.assert_array_equal(cached(x, FP8, None), [[[448.0, 16.0, 28.0, -0.3125, 0.0]]])


def test_a_stored_scale_is_the_same_for_all_and_saturates():
    x = np.array([[[1.0, 1000.0], [-3000.0, 0.25]]])
    np.testing.assert_array_equal(cached(x, STORED, 2.0), [[[1.0, 896.0], [-896.0, 0.25]]])


@pytest.mark.parametrize(("kind", "largest"), [(FP8, 448), (INT8, 127)])
def test_each_token_and_head_has_its_own_scale(kind, largest):
    """As NumPy's own types round, whatever the magnitude of a head's neighbours."""
    x = np.random.default_rng(1).normal(size=(5, 3, 16)) * 10.0 ** np.arange(-3, 12).reshape(5, 3, 1)
    found = cached(x, kind, None)
    for token, head in np.ndindex(5, 3):
        row = x[token, head]
        scale = np.abs(row).max() / largest
        dtype = ml_dtypes.float8_e4m3fn if kind is FP8 else np.int8
        units = (row / scale) if kind is FP8 else np.rint(row / scale)
        np.testing.assert_allclose(found[token, head], units.astype(dtype).astype(np.float64) * scale, rtol=1e-12)


@pytest.mark.parametrize("kind", [FP8, INT8])
def test_zeros_stay_zeros_and_nan_stays(kind):
    x = np.zeros((2, 1, 4))
    x[1] = np.nan
    found = cached(x, kind, None)
    assert (found[0] == 0).all()
    assert np.isnan(found[1]).all()
