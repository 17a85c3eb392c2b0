"""The generated package's paged KV cache, against a model that keeps every sequence as a plain list of tokens."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from backends.cache_machine import CacheMachine, bookkeeping
from hf_parity.oracle import tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

SLIDING = {"attention": {"sliding_window": {"window": 6}}}
DYNAMIC = {"rope": {"scaling": {"kind": "dynamic", "factor": 2.0}}}
FROZEN = {"rope": {"scaling": {"kind": "dynamic_qwen1", "train_length": 8}}}


def package(folder: Path, *changes: dict) -> ModuleType:
    return import_package(emit(tiny_spec(*changes), "triton", folder))


def new_cache(module: ModuleType, pages: int = 7, page_size: int = 4, **options: object):
    model = module.Model(module.Config(), torch.float32, torch.device("cpu"))
    return model.create_paged_kv_cache(4, pages * page_size, 16, page_size, **options)


def state(cache) -> object:
    """Everything that a failed call must leave alone."""
    return bookkeeping(cache.sequences), cache.pages.nan_to_num(-1).tolist()


class Machine(CacheMachine):
    """Written into the slots that a batch names, found through the pages of the sequence."""

    module: ModuleType

    def new_cache(self, pages: int, page_size: int) -> Any:
        cache = new_cache(self.module, pages, page_size)
        cache.pages.fill_(torch.nan)
        return cache

    def write(self, numbers: list[int]) -> None:
        new = torch.tensor(numbers, dtype=torch.float32)[:, None, None]
        self.cache.pages.flatten(2, 3)[:, :, self.cache.open_batch(len(numbers)).slots] = new

    def read(self, seq: int) -> list[float]:
        pages = self.cache.sequences._sequences[seq].pages
        return self.cache.pages[1, 1][pages].flatten(0, 1)[: self.cache.length(seq), -1, -1].tolist()

    def state(self) -> object:
        return state(self.cache)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return package(tmp_path_factory.mktemp("plain"))


def test_cache_behaves_as_lists_of_tokens(plain: ModuleType) -> None:
    Machine.module, Machine.out_of_pages = plain, plain.OutOfPages
    Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    Machine.TestCase("runTest").runTest()


def test_wrong_calls_say_what_is_wrong(plain: ModuleType) -> None:
    cache = new_cache(plain)
    cache.add_sequence(3)
    with pytest.raises(KeyError, match=r"no sequence 9; it has \[3\]"):
        cache.begin_forward([9], [1])
    with pytest.raises(ValueError, match="appears twice"):
        cache.begin_forward([3, 3], [1, 1])
    with pytest.raises(ValueError, match="popn 1"):
        cache.begin_forward([3], [0])
    with pytest.raises(ValueError, match="17 tokens in one forward, at most 16: prefill in chunks"):
        cache.begin_forward([3], [17])
    with pytest.raises(ValueError, match="cannot remove 1 tokens of sequence 3: it has 0"):
        cache.popn(3, 1)
    with pytest.raises(RuntimeError, match="call begin_forward"):
        cache.open_batch(1)
    cache.begin_forward([3], [2])
    with pytest.raises(ValueError, match="3 tokens are given, and begin_forward made room for 2"):
        cache.open_batch(3)
    with pytest.raises(RuntimeError, match="sequence 3 is part of the open forward: call end_forward first"):
        cache.fork_sequence(3, 4)
    cache.end_forward()
    with pytest.raises(ValueError, match="cannot fork sequence 3 at 5: it has 2"):
        cache.fork_sequence(3, 4, 5)


def test_a_tree_is_described_by_its_subtrees(plain: ModuleType) -> None:
    """0       4     and a chain of two
    1 2       5
      3
    """
    cache = new_cache(plain)
    for sequence in (0, 1):
        cache.add_sequence(sequence)
    cache.begin_forward([0, 1], [3, 1])
    assert cache.batch.tree is None
    cache.end_forward()
    cache.begin_forward([0, 1], [6, 2], [-1, 0, 0, 2, -1, 4, -1, 0])
    assert cache.batch.positions.tolist() == [3, 4, 4, 5, 3, 4, 1, 2]
    assert cache.batch.tree.tolist() == [
        [0, 0, 4], [1, 1, 2], [1, 2, 4], [2, 3, 4], [0, 4, 6], [1, 5, 6], [0, 0, 2], [1, 1, 2]
    ]  # fmt: skip
    cache.end_forward()
    cache.commit_tree([1, 0], [0, 3])
    assert (cache.length(0), cache.length(1)) == (6, 2)
    cache.begin_forward([0, 1], [2, 1], [-1, 0, -1])
    assert cache.batch.tree is None  # chains need no mask
    cache.end_forward()
    cache.commit_tree([0, 1], [-1, 0])
    assert (cache.length(0), cache.length(1)) == (6, 3)


def test_pages_behind_every_window_are_given_back(tmp_path: Path) -> None:
    cache = new_cache(package(tmp_path, SLIDING), pages=3, page_size=4, support_sliding_window=True)
    cache.add_sequence(0)
    for length in range(1, 40):  # three pages are enough for any length: 6 keys lie in at most 3 pages of 4
        cache.begin_forward([0], [1])
        visible = cache.batch.block_tables[0][max(0, length - 6) // 4 :].tolist()
        assert len(set(visible)) == len(visible)
        cache.end_forward()
    cache.popn(0, 1)  # the next query still sees what it needs
    with pytest.raises(ValueError, match="were given back"):
        cache.popn(0, 8)
    with pytest.raises(ValueError, match="were given back"):
        cache.fork_sequence(0, 1, 8)
    before = state(cache)
    cache.add_sequence(1)
    with pytest.raises(Exception, match="4 more of 3 pages of 4 tokens needed, 1 free"):
        cache.begin_forward([0, 1], [8, 8])
    cache.remove_sequence(1)
    assert state(cache) == before  # what it could have given back is still there
    cache.remove_sequence(0)
    assert cache.free_pages == 3


def test_sliding_support_is_refused_where_a_layer_sees_everything(plain: ModuleType) -> None:
    with pytest.raises(ValueError, match="every layer of this model sees the whole sequence"):
        new_cache(plain, support_sliding_window=True)


def rows(cache, seq: int, n: int, tree_parents: list[int] | None = None) -> torch.Tensor:
    cache.begin_forward([seq], [n], tree_parents)
    frequencies = cache.batch.inv_freq
    cache.end_forward()
    assert len(frequencies) == n
    return frequencies


def test_dynamic_frequencies_follow_the_length(tmp_path: Path) -> None:
    cache = new_cache(package(tmp_path, DYNAMIC, {"max_position_embeddings": 8}), pages=16)
    cache.add_sequence(0)
    cache.add_sequence(1, prompt_length=12)
    assert torch.equal(rows(cache, 0, 8)[0], rows(cache, 0, 8)[0]) is False  # 8 tokens, then 16
    assert torch.equal(rows(cache, 1, 4)[0], rows(cache, 1, 8)[3])  # a prompt of 12, in two chunks
    assert not torch.equal(rows(cache, 1, 1)[0], rows(cache, 1, 1)[0])  # 13, 14
    cache.add_sequence(2)
    rows(cache, 2, 10)
    tree = rows(cache, 2, 4, [-1, 0, 1, -1])
    cache.commit_tree([2], [-1])
    for n, row in enumerate([0, 1, 2]):  # as decoded one by one
        assert torch.equal(rows(cache, 2, 1)[0], tree[row]), n
    assert torch.equal(tree[3], tree[0])


def test_qwen1_frequencies_are_frozen_at_the_prompt(tmp_path: Path) -> None:
    cache = new_cache(package(tmp_path, FROZEN), pages=16)
    cache.add_sequence(0)
    first = rows(cache, 0, 8)[0]
    assert torch.equal(rows(cache, 0, 9)[8], first)  # past the training length, and still as the prompt chose
    cache.add_sequence(1)
    longer = rows(cache, 1, 9)[0]
    assert not torch.equal(longer, first)
    cache.fork_sequence(1, 2, 3)
    assert torch.equal(rows(cache, 2, 1)[0], longer)
    cache.popn(2, 4)
    assert torch.equal(rows(cache, 2, 4)[0], first)  # an empty sequence chooses anew
    cache.popn(2, 4)
    assert torch.equal(rows(cache, 2, 9, [*range(-1, 6), 6, 6])[0], first)  # by the longest path, of 8
