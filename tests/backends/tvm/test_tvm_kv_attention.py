"""Attention over quantised keys and values on a CPU against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from kv_cache import FORMATS, LARGEST, STORED_SCALES, QuantizedCache

pytestmark = pytest.mark.filterwarnings("error")

TREES = ([-1, 0, 0, 1, 2], [-1, -1, 1, 0, 0, 2, 5], [-1, 0, 1, 2])


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check_content(cache: QuantizedCache, sequence: int) -> None:
    """What is cached, bit for bit."""
    expected = np.array(cache.tokens[sequence]).transpose(2, 0, 1, 3, 4)
    np.testing.assert_array_equal(cache.debug(sequence), expected)


@pytest.mark.parametrize("page_size", [4, 5])
def test_prefill_in_chunks_and_decode(kind: str, page_size: int) -> None:
    cache = QuantizedCache(kind, page_size=page_size)
    cache.add(0)
    for length in (1, 9, 1, 30, 4, 16, 1):
        cache.forward({0: length})
    check_content(cache, 0)


def test_mixed_batches_and_forks(kind: str) -> None:
    cache = QuantizedCache(kind, page_size=5)
    for sequence in range(3):
        cache.add(sequence)
    cache.forward({0: 3, 1: 40, 2: 1})
    cache.forward({2: 1, 0: 1, 1: 1})
    cache.fork(1, 3, 33)
    cache.fork(1, 4)
    cache.forward({3: 7, 1: 1, 0: 12, 4: 2})
    cache.popn(1, 12)
    cache.forward(dict.fromkeys(range(5), 1))
    cache.remove(1)
    cache.forward({4: 70, 3: 1})
    for sequence in cache.tokens:
        check_content(cache, sequence)


def test_many_children_of_one_prompt(kind: str) -> None:
    """So many that the cache joins their queries over the shared pages into one."""
    cache = QuantizedCache(kind)
    cache.add(0)
    cache.forward({0: 40})
    for child in range(1, 40):
        cache.fork(0, child, 32)
    cache.forward(dict.fromkeys(range(40), 1))


@pytest.mark.parametrize("tree", TREES)
def test_token_trees(kind: str, tree: list[int]) -> None:
    cache = QuantizedCache(kind)
    cache.add(0)
    for leaf in (len(tree) - 1, 2, -1):
        cache.forward({0: 7})
        cache.forward({0: len(tree)}, {0: tree})
        cache.commit({0: leaf}, {0: tree})
        cache.forward({0: 1})
        check_content(cache, 0)


@pytest.mark.parametrize(
    ("kind", "sizes", "windows", "dtype"),
    [
        # One KV head, a group that no vector divides; queries that 31 entries of 26 bytes would hold.
        ("fp8", (9, 1, 22), (None, None), "bfloat16"),
        ("int8", (3, 3, 18), (11, 11), "float16"),
        ("fp8 stored", (5, 5, 6), (None, 3), "float16"),
        ("fp8 stored", (6, 3, 128), (11, None), "bfloat16"),
    ],
)
def test_shapes_and_dtypes(kind: str, sizes: tuple[int, int, int], windows: tuple[int | None, ...], dtype: str) -> None:
    cache = QuantizedCache(kind, *sizes, dtype=dtype, windows=windows)
    for sequence in (0, 1):
        cache.add(sequence)
    cache.forward({0: 37, 1: 2})
    cache.forward({0: 1, 1: 1})
    cache.forward({0: 5, 1: 20})
    cache.fork(0, 2, 33)
    cache.forward({0: 1, 1: 1, 2: 1})
    cache.forward({2: 5}, {2: TREES[0]})
    cache.commit({2: 3}, {2: TREES[0]})
    cache.forward({0: 1, 2: 1})
    for sequence in cache.tokens:
        check_content(cache, sequence)


def test_long_sequences(kind: str) -> None:
    """More than one block of keys, split of a decode step and tile of queries."""
    cache = QuantizedCache(kind, capacity=1024)
    cache.add(0)
    cache.add(1)
    cache.forward({0: 150, 1: 33})
    cache.forward({0: 130, 1: 1})
    for _ in range(2):
        cache.forward({0: 1, 1: 1})


@pytest.mark.parametrize("page_size", [4, 5])
def test_nan_in_freed_pages(kind: str, page_size: int) -> None:
    cache = QuantizedCache(kind, page_size=page_size, capacity=64, chunk=64)
    cache.add(9)
    cache.forward({9: 64}, poison=True)
    assert np.isnan(cache.debug(9)).all()
    cache.remove(9)
    cache.add(0)
    cache.add(1)
    cache.forward({0: 7, 1: 2})
    cache.forward({0: 1, 1: 1})
    cache.forward({0: 2, 1: 9})
    cache.fork(0, 2, 6)
    cache.forward({2: 1, 0: 1, 1: 1})


class Exact(QuantizedCache):
    """One head of one token, given."""

    numbers: np.ndarray

    def draw(self, n: int) -> np.ndarray:
        qkv = np.zeros((n, self.sizes.heads + 2 * self.sizes.kv_heads, self.sizes.head_dim))
        qkv[:, self.sizes.heads :] = self.numbers[: self.sizes.head_dim]
        return qkv


def test_rounding(kind: str) -> None:
    """Halves between numbers, the smallest of e4m3, what is beyond the largest, minus zero."""
    if kind == "int8":
        numbers = np.arange(254) / 2  # in units of the scale
    else:
        exact = np.concatenate(
            [np.arange(16) * 2.0**-9, np.outer(2.0 ** np.arange(-5, 9), 1 + np.arange(8) / 8).ravel()]
        )
        exact = exact[exact <= 448]
        numbers = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2])
    numbers = np.concatenate([numbers, -numbers])
    if kind == "fp8 stored":
        numbers = np.concatenate([numbers, [449, 460, 470, 1e5, -500, -1e30]]) * STORED_SCALES[0, 0]
    numbers = numbers.astype(np.float32)
    largest = [] if kind == "fp8 stored" else [LARGEST[kind]]
    cache = Exact(kind)
    step = 16 - len(largest)
    for start in range(0, len(numbers), step):
        found = np.zeros(16, np.float32)
        some = [*largest, *numbers[start : start + step]]
        found[: len(some)] = some
        cache.numbers = found
        cache.add(start)
        cache.forward({start: 1})
        check_content(cache, start)
        cache.remove(start)
