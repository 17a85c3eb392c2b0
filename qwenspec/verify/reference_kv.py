"""What is left of keys and values in a quantised cache, in float64."""

from __future__ import annotations

import numpy as np

from qwenspec.spec.kv_cache import Fp8KvCache, KvCache
from qwenspec.verify.dequantize import E4M3_LARGEST, rounded_to_e4m3
from qwenspec.verify.reference_rope import Array

INT8_LARGEST = 127.0


def cached(x: Array, kv_cache: KvCache, scale: float | None) -> Array:
    """x [n, heads, head_dim] as it is read again: q · s.

    `scale`: the checkpoint's s, None where each token and head has its own, which makes its largest |x| the largest
    number that the dtype holds."""
    floating = isinstance(kv_cache, Fp8KvCache)
    if scale is None:
        scales = np.abs(x).max(axis=-1, keepdims=True) / (E4M3_LARGEST if floating else INT8_LARGEST)
    else:
        scales = np.full((*x.shape[:-1], 1), scale)
    units = np.divide(x, scales, out=np.zeros_like(x), where=scales != 0)
    rounded: Array = scales * (rounded_to_e4m3(units) if floating else np.rint(units))
    return rounded
