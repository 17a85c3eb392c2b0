"""Attention over TVM's KV cache on a CPU, with our functions in its slots, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cache import Cache, export

pytestmark = pytest.mark.filterwarnings("error")

# Parents of nodes; the third is a chain.
TREES = ([-1, 0, 0, 1, 2], [-1, -1, 1, 0, 0, 2, 5], [-1, 0, 1, 2], [-1, 0, 1, 1, 0, 4, 5, 6, 7, 8, 9])


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")


def test_every_function_is_ours() -> None:
    module = export(4, 2, 16, (6, None), "float32")
    functions = {variable.name_hint for variable, f in module.functions.items() if not hasattr(f, "body_as_relax")}
    assert functions >= {"paged_prefill_attention", "ragged_prefill_attention", "tree_attention", "decode_attention"}
    assert not any(name.startswith(("tir_", "kv_cache_")) for name in functions)


@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_prefill_in_chunks_and_decode(page_size: int) -> None:
    cache = Cache(page_size=page_size)
    cache.add(0)
    for length in (1, 9, 1, 1, 30, 4, 1, 16, 1):
        cache.forward({0: length})


def test_mixed_batches() -> None:
    cache = Cache(page_size=5)
    for sequence in range(5):
        cache.add(sequence)
    cache.forward({0: 3, 1: 40, 2: 1})
    cache.forward({2: 1, 0: 1, 1: 1})
    cache.forward({3: 7, 1: 1, 0: 12, 4: 2})
    cache.forward(dict.fromkeys(range(5), 1))
    cache.forward({4: 70, 2: 3})
    cache.remove(1)
    cache.forward({0: 1, 4: 1})


@pytest.mark.parametrize(
    ("sizes", "windows", "dtype"),
    [
        ((7, 1, 24), (None, None), "float32"),  # one KV head, a group and a head that no vector divides, no window
        ((2, 2, 80), (11, 11), "float16"),  # every head its own, all layers slide
        ((6, 3, 128), (11, None), "bfloat16"),
    ],
)
def test_shapes_and_dtypes(sizes: tuple[int, int, int], windows: tuple[int | None, ...], dtype: str) -> None:
    cache = Cache(*sizes, dtype=dtype, windows=windows)
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


def test_long_sequences() -> None:
    """More than one block of keys, split of a decode step and tile of queries."""
    cache = Cache(capacity=1024)
    cache.add(0)
    cache.add(1)
    cache.forward({0: 150, 1: 33})
    cache.forward({0: 130, 1: 1})
    for _ in range(2):
        cache.forward({0: 1, 1: 1})


@pytest.mark.parametrize("length", [5, 6, 7])
def test_window_edges(length: int) -> None:
    cache = Cache()
    cache.add(0)
    cache.forward({0: length})
    for _ in range(3):
        cache.forward({0: 1})
    cache.forward({0: length})


@pytest.mark.parametrize("at", [-1, 8, 12, 10, 3, 0, 19])
def test_forks(at: int) -> None:
    """At the end, on the edge of a page, inside one, inside the first, before everything."""
    cache = Cache()
    cache.add(0)
    cache.forward({0: 20})
    cache.fork(0, 1, at)
    cache.forward({0: 1, 1: 1})
    cache.forward({0: 5, 1: 3})
    cache.forward({1: 1, 0: 1})


def test_chains_of_forks() -> None:
    """More shared blocks than the two that the cache walks one by one."""
    cache = Cache()
    cache.add(0)
    cache.forward({0: 9})
    for child, at in ((1, 8), (2, 16), (3, 24), (4, 30)):
        cache.fork(child - 1, child, at if at <= len(cache.tokens[child - 1][0]) else -1)
        cache.forward({child: 12})
        cache.forward(dict.fromkeys(range(child + 1), 1))
    cache.forward({0: 2, 3: 1, 4: 7, 1: 1, 2: 1})
    cache.remove(2)
    cache.forward({4: 1, 0: 1, 3: 1, 1: 1})


def test_many_children_of_one_prompt() -> None:
    """So many that the cache joins their queries over the shared pages into one."""
    cache = Cache()
    cache.add(0)
    cache.forward({0: 40})
    for child in range(1, 40):
        cache.fork(0, child, 32)
        if child % 3 == 0:
            cache.forward({child: child % 5 + 1})
    for _ in range(2):
        cache.forward(dict.fromkeys(range(40), 1))
    cache.forward({child: child % 4 + 1 for child in range(20)})


@pytest.mark.parametrize("count", [1, 4, 7, 12, 17])
def test_popn_into_shared_pages(count: int) -> None:
    cache = Cache()
    cache.add(0)
    cache.forward({0: 16})
    cache.fork(0, 1)
    cache.forward({1: 3, 0: 1})
    cache.popn(1, count)
    cache.forward({0: 1, 1: 1})
    cache.forward({0: 4, 1: 6})


def test_popn_of_everything() -> None:
    cache = Cache()
    cache.add(0)
    cache.forward({0: 9})
    cache.popn(0, 9)
    cache.forward({0: 1})
    cache.forward({0: 9})


@pytest.mark.parametrize("tree", TREES)
def test_token_trees(tree: list[int]) -> None:
    cache = Cache()
    cache.add(0)
    for leaf in (len(tree) - 1, 2, -1, 0):
        cache.forward({0: 7})
        cache.forward({0: len(tree)}, {0: tree})
        cache.commit({0: leaf}, {0: tree})
        cache.forward({0: 1})
        np.testing.assert_array_equal(cache.debug(0), np.array(cache.tokens[0]).transpose(2, 0, 1, 3, 4))


def test_trees_in_a_batch() -> None:
    cache = Cache(page_size=5)
    for sequence in (0, 1):
        cache.add(sequence)
    cache.forward({0: 13, 1: 1})
    cache.fork(0, 2, 10)
    # A tree with branches is last: the cache moves tokens at a commit only where the last tree has some.
    trees = {2: TREES[0], 1: [-1], 0: TREES[3]}
    cache.forward({sequence: len(tree) for sequence, tree in trees.items()}, trees)
    cache.commit({2: 3, 1: 0, 0: 5}, trees)
    cache.forward(dict.fromkeys((1, 0, 2), 1))


@pytest.mark.parametrize("page_size", [4, 5])
def test_nan_in_freed_pages(page_size: int) -> None:
    cache = Cache(page_size=page_size, capacity=64, chunk=64)
    cache.add(9)
    cache.forward({9: 64}, poison=True)
    cache.remove(9)
    cache.add(0)
    cache.add(1)
    cache.forward({0: 7, 1: 2})
    cache.forward({0: 1, 1: 1})
    cache.forward({0: 2, 1: 9})
    cache.fork(0, 2, 6)
    cache.forward({2: 1, 0: 1, 1: 1})


def test_random_walk() -> None:
    rng = np.random.default_rng(1)
    cache = Cache(capacity=4096)
    cache.add(0)
    cache.forward({0: 5})
    for step in range(1, 60):
        known = list(cache.tokens)
        action, one = rng.integers(5), int(rng.choice(known))
        length = len(cache.tokens[one][0])
        if action == 0:
            cache.add(step)
            cache.forward({step: int(rng.integers(1, 30))})
        elif action == 1:
            cache.fork(one, step, int(rng.integers(1, length + 1)))
        elif action == 2 and length > 1:
            cache.popn(one, int(rng.integers(1, length)))
        elif action == 3 and len(known) > 3:
            cache.remove(one)
        known = [int(s) for s in rng.permutation(list(cache.tokens))]
        cache.forward({s: 1 if step % 2 else int(rng.integers(1, 9)) for s in known})
