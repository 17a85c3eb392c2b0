"""The kernels in Triton's interpreter against the float64 oracle: fixed cases, random ones, and planted mistakes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import kernel_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import folded, load
from triton import jit
from triton import language as tl

import triton_interpreter  # noqa: F401  (repairs it)

pytestmark = [
    pytest.mark.interpreter,
    # Rows of padding divide 0 by 0, and what comes of it is not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(sorted(checks.TOLERANCE, key=str))
groups = st.sampled_from([(1, 1), (4, 4), (4, 2), (7, 1), (14, 2), (20, 1)])  # query heads, KV heads
head_dims = st.sampled_from([8, 16, 24, 40, 64, 80])
indices = st.sampled_from([torch.int32, torch.int64])


def test_fixed_cases() -> None:
    checks.check_all(CPU)


@few
@given(dtypes, st.integers(1, 4), st.integers(1, 300), st.booleans())
def test_norm(dtype: torch.dtype, n: int, size: int, one_plus: bool) -> None:
    checks.check_norm(CPU, dtype, n, size, one_plus)


@few
@given(dtypes, st.integers(1, 4), st.integers(1, 1500), st.sampled_from(["silu", "relu", "gelu", "gelu_tanh"]))
def test_activation(dtype: torch.dtype, n: int, size: int, activation: str) -> None:
    checks.check_activation(CPU, dtype, n, size, activation)


@few
@given(dtypes, st.integers(1, 5), groups, head_dims, st.data())
def test_rotate(dtype: torch.dtype, n: int, heads: tuple[int, int], head_dim: int, data: st.DataObject) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    tables = data.draw(st.sampled_from([dtype, torch.float32]))
    flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    checks.check_rotate(CPU, dtype, n, *heads, head_dim, rotary_dim, tables, *flags)


@few
@given(dtypes, groups, head_dims, indices, st.data())
def test_decode(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, index: torch.dtype, data: st.DataObject
) -> None:
    page_size = data.draw(st.sampled_from([1, 4, 16, 48]))
    window = data.draw(st.none() | st.integers(1, 100))
    edges = [length for w in (window or 64, page_size) for length in (w - 1, w, w + 1, 2 * w)]
    length = st.sampled_from(edges) | st.integers(0, 200)
    lengths = data.draw(st.lists(length, min_size=1, max_size=3).filter(any))
    sliding = window is not None or data.draw(st.booleans())
    processors, shuffle = data.draw(st.integers(1, 40)), data.draw(st.booleans())
    checks.check_decode(CPU, dtype, *heads, head_dim, page_size, lengths, window, sliding, processors, index, shuffle)


@few
@given(dtypes, groups, head_dims, indices, st.data())
def test_prefill(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, index: torch.dtype, data: st.DataObject
) -> None:
    page_size = data.draw(st.sampled_from([1, 4, 16, 48]))
    window = data.draw(st.none() | st.integers(1, 100))
    edges = [length for w in (window or 64, page_size) for length in (w - 1, w, w + 1) if length > 0]
    prefix = st.just(0) | st.sampled_from(edges) | st.integers(0, 150)
    new = st.just(1) | st.sampled_from(edges) | st.integers(1, 70)
    sequences = data.draw(st.lists(st.tuples(prefix, new), min_size=1, max_size=2))
    sliding = window is not None or data.draw(st.booleans())
    shuffle = data.draw(st.booleans())
    trees = None
    if data.draw(st.booleans()):
        trees = [[data.draw(st.integers(-1, node - 1)) for node in range(n)] for _, n in sequences]
    checks.check_prefill(CPU, dtype, *heads, head_dim, page_size, sequences, window, sliding, index, shuffle, trees)


# --------------------------------------------------------------------------------- the tests and the interpreter

F32 = torch.float32
MISTAKES: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "decode: window off by one": (
        "decode_attention",
        "position >= kv_len - window",
        "position > kv_len - window",
        lambda: checks.check_decode(CPU, F32, 2, 1, 16, 4, (9, 10, 11), 10, sliding=True),
    ),
    "decode: loads what is not visible": (
        "decode_attention",
        "kv_mask = visible[:, None] &",
        "kv_mask = (n >= 0)[:, None] &",
        lambda: checks.check_decode(CPU, F32, 2, 1, 16, 4, (9,)),
    ),
    "decode: padding is 0 / 0": (
        "decode_attention",
        "0) / tl.where(total > 0, total, 1.0)",
        "0) / total",
        lambda: checks.check_decode(CPU, F32, 2, 1, 16, 4, (200, 0)),
    ),
    "prefill: a token does not see itself": (
        "prefill_attention",
        "key[None, :] <= query[:, None]",
        "key[None, :] < query[:, None]",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((3, 5),)),
    ),
    "prefill: window off by one": (
        "prefill_attention",
        "> query[:, None] - window",
        ">= query[:, None] - window",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((3, 20),), 10, sliding=True),
    ),
    "prefill: loads pages that were given back": (
        "prefill_attention",
        "seen = seen & (key >= oldest)",
        "seen = seen & (key >= 0)",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((60, 5),), 10, sliding=True),
    ),
    "prefill: the prefix is forgotten": (
        "prefill_attention",
        "query = kv_len - q_len + m",
        "query = m",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((3, 5),)),
    ),
    "tree: a token sees its cousins": (
        "prefill_attention",
        "last - first, 0)",
        "1 << 30, 0)",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((3, 4),), trees=[[-1, 0, 0, 1]]),
    ),
    "tree: of the next sequence's numbers": (
        "prefill_attention",
        "key_ptr = tree_ptr + (q_start + key",
        "key_ptr = tree_ptr + (key",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((3, 2), (5, 4)), trees=[[-1, 0], [-1, -1, 1, 0]]),
    ),
    "tree: a window by place and not by depth": (
        "prefill_attention",
        "if TREE:\n                position =",
        "if False:\n                position =",
        lambda: checks.check_prefill(
            CPU, F32, 2, 1, 16, 4, ((20, 9),), 4, sliding=True, trees=[[-1, 0, 1, -1, 3, 4, 2, 6, 5]]
        ),
    ),
    "tree: the oldest key is the first block's": (
        "prefill_attention",
        "(0 if TREE else block_m * BLOCK_M)",
        "block_m * BLOCK_M",
        lambda: checks.check_prefill(CPU, F32, 2, 1, 16, 4, ((60, 40),), 10, sliding=True, trees=[[-1] * 40]),
    ),
    "rotate: writes what is not cached": (
        "qkv",
        "slot >= 0",
        "slot >= -1",
        lambda: checks.check_rotate(CPU, F32, 3, 2, 1, 16, 16, F32, False, False, False),
    ),
    "rotate: LogN scales keys": (
        "qkv",
        "tl.where(is_q, tl.load(query_scale_ptr + token), 1.0)[:, None]",
        "tl.load(query_scale_ptr + token)",
        lambda: checks.check_rotate(CPU, F32, 3, 2, 1, 16, 16, F32, False, False, True),
    ),
    "norm: the mean over the padded row": (
        "norm",
        "0) / size",
        "0) / x.shape[0]",
        lambda: checks.check_norm(CPU, F32, 2, 96, False),
    ),
    "norm: writes past the row": (
        "norm",
        "eps), mask=inside)",
        "eps), mask=column >= 0)",
        lambda: checks.check_norm(CPU, F32, 2, 96, False),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_checks_find(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, check = MISTAKES[mistake]
    check()
    package = Path(sys.modules["folded"].__path__[0])

    def load_wrong(name: str, **flags: bool | str) -> object:
        if name != file:
            return load(name, **flags)
        text = folded(name, **flags)
        assert right in text
        copy = f"{name}_mistaken_{list(MISTAKES).index(mistake)}"
        (package / f"{copy}.py").write_text(text.replace(right, wrong), encoding="utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(f"folded.{copy}")

    with mock.patch.object(checks, "load", load_wrong), pytest.raises(AssertionError):
        check()


@jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j))
    tl.store(out_ptr + i * N + j, product.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreter_multiplies_and_rounds_as_torch_does(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, exact = torch.empty(16, 16, dtype=dtype), torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, exact, N=16)
    torch.testing.assert_close(exact, a.float() @ b.float())
    _dot_kernel[(1,)](a, b, out, N=16)
    assert torch.equal(out, exact.to(dtype))
