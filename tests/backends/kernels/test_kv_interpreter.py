"""The kernels of quantised KV caches in Triton's interpreter: fixed cases, random ones, and planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import kv_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import TOLERANCE
from kernel_variants import load_mistaken

import triton_interpreter  # noqa: F401  (repairs it)

pytestmark = [
    pytest.mark.interpreter,
    # Heads and rows of nothing but zeros divide 0 by 0, and what comes of it is not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
kvs = st.sampled_from(checks.KV)
dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
groups = st.sampled_from([(1, 1), (4, 2), (7, 1)])  # query heads, KV heads
head_dims = st.sampled_from([8, 24, 64])


def test_fixed_cases() -> None:
    checks.check_all(CPU)


@few
@given(dtypes, kvs, st.integers(1, 5), groups, head_dims, st.data())
def test_rotate(
    dtype: torch.dtype, kv: str, n: int, heads: tuple[int, int], head_dim: int, data: st.DataObject
) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    checks.check_rotate(CPU, dtype, kv, n, *heads, head_dim, rotary_dim, *flags)


@few
@given(dtypes, kvs, groups, head_dims, st.data())
def test_decode(dtype: torch.dtype, kv: str, heads: tuple[int, int], head_dim: int, data: st.DataObject) -> None:
    page_size, window = data.draw(st.sampled_from([1, 4, 48])), data.draw(st.none() | st.integers(1, 80))
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=2).filter(any))
    processors = data.draw(st.integers(1, 40))
    checks.check_decode(CPU, dtype, kv, *heads, head_dim, page_size, lengths, window, window is not None, processors)


@few
@given(dtypes, kvs, groups, head_dims, st.data())
def test_prefill(dtype: torch.dtype, kv: str, heads: tuple[int, int], head_dim: int, data: st.DataObject) -> None:
    page_size, window = data.draw(st.sampled_from([1, 4, 48])), data.draw(st.none() | st.integers(1, 80))
    sequences = data.draw(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), min_size=1, max_size=2))
    trees = None
    if data.draw(st.booleans()):
        trees = [[data.draw(st.integers(-1, node - 1)) for node in range(n)] for _, n in sequences]
    checks.check_prefill(CPU, dtype, kv, *heads, head_dim, page_size, sequences, window, window is not None, trees)


def decode(kv: str) -> None:
    checks.check_decode(CPU, F32, kv, 2, 1, 16, 4, (9,), processors=1)


def prefill(kv: str) -> None:
    checks.check_prefill(CPU, F32, kv, 2, 1, 16, 4, ((3, 5),))


def cache(kv: str) -> None:
    checks.check_cache(CPU, F32, kv, 24)


MISTAKES: dict[str, tuple[str, str, Callable[[], None]]] = {
    "decode: keys are not scaled": ("scores *= tl.load(", "scores *= 0.1 + 0 * tl.load(", lambda: decode("fp8")),
    "decode: values are not scaled": ("weights *= tl.load(", "weights *= 0.1 + 0 * tl.load(", lambda: decode("int8")),
    "decode: keys are scaled as values": (
        "scores *= tl.load(k_scales_ptr",
        "scores *= tl.load(v_scales_ptr",
        lambda: decode("int8"),
    ),
    "decode: the layer's key scale": ("scale *= tl.load(k_scales_ptr) * UNIT", "pass", lambda: decode("fp8_stored")),
    "decode: the layer's value scale": ("acc *= tl.load(v_scales_ptr) * UNIT", "pass", lambda: decode("fp8_stored")),
    "prefill: keys are not scaled": ("scores *= tl.load(", "scores *= 0.1 + 0 * tl.load(", lambda: prefill("int8")),
    "prefill: values are not scaled": ("weights *= tl.load(", "weights *= 0.1 + 0 * tl.load(", lambda: prefill("fp8")),
    "prefill: the layer's key scale": ("scale *= tl.load(k_scales_ptr) * UNIT", "pass", lambda: prefill("fp8_stored")),
    "prefill: the layer's value scale": ("acc *= tl.load(v_scales_ptr) * UNIT", "pass", lambda: prefill("fp8_stored")),
    "prefill: scales that nobody may see": (
        "weights *= tl.load(v_scales_ptr + token_head, mask=seen, other=0.0)",
        "weights *= tl.load(v_scales_ptr + token_head)",
        lambda: prefill("fp8"),
    ),
    "float16 holds no probability times a scale": (
        "UNIT = tl.constexpr(64.0)",
        "UNIT = tl.constexpr(1.0)",
        lambda: checks.check_decode(CPU, torch.float16, "int8", 2, 1, 16, 4, (9,)),
    ),
    "bytes are unsigned": ("codes.to(tl.int32)", "codes.to(tl.uint8).to(tl.int32)", lambda: decode("int8")),
    "NaN is 480": ("tl.abs(x) > 1.75", "tl.abs(x) > 1.9", lambda: checks.check_nan(CPU, "fp8_stored")),
    "half a head has the scale": (
        "tl.maximum(magnitude(turned_first), magnitude(turned_second))",
        "magnitude(turned_second)",
        lambda: cache("int8"),
    ),
    "keys are not rounded first": (
        "turned_first = turned_first.to(rounded).to(tl.float32)",
        "pass",
        lambda: checks.check_rotate(CPU, BF16, "fp8", 3, 2, 1, 64, 64, False, False, False),
    ),
    "a division that is not IEEE's": ("tl.div_rn(x, scale)", "x * (1.0 / scale)", lambda: cache("int8")),
    "scales of zero divide": ("tl.where(scale > 0, unit, 0.0)", "unit", lambda: cache("fp8")),
    "e4m3 is cut off": ("size + 0x7FFFF + (size >> 20 & 1)", "size", lambda: cache("fp8")),
    "ties are rounded up": ("size + 0x7FFFF + (size >> 20 & 1)", "size + 0x80000", lambda: cache("fp8")),
    "e4m3 beyond 448 is NaN": ("tl.minimum(normal, 0x7E)", "normal", lambda: cache("fp8_stored")),
    "scales go where no token is cached": (
        "tl.store(k_scales_ptr + token_head, k_scale, mask=cached)",
        "tl.store(k_scales_ptr + token_head, k_scale, mask=head >= HEADS)",
        lambda: cache("int8"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_checks_find(mistake: str) -> None:
    right, wrong, check = MISTAKES[mistake]
    check()

    def load_wrong(*names: str, **flags: bool) -> object:
        return load_mistaken(right, wrong, *names, **flags)

    with mock.patch.object(checks, "load", load_wrong), pytest.raises(AssertionError):
        check()
