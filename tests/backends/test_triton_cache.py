"""The generated package's paged KV cache, against a model that keeps every sequence as a plain list of tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_parity.oracle import tiny_spec
from qwenspec.backend.emit import emit
from qwenspec_triton.runner import import_package

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
    return copy.deepcopy((cache._sequences, sorted(cache._free), +cache._users, cache.pages.nan_to_num(-1).tolist()))


class CacheMachine(RuleBasedStateMachine):
    """Each token is written into its slot as a number, and must be found again through the block tables."""

    module: ModuleType

    @initialize(page_size=st.integers(1, 5), pages=st.integers(3, 9))
    def start(self, page_size: int, pages: int) -> None:
        self.cache = new_cache(self.module, pages, page_size)
        self.cache.pages.fill_(torch.nan)
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 0

    @rule(seq=st.integers(0, 5))
    def add(self, seq: int) -> None:
        if seq in self.tokens or len(self.tokens) == 4:
            before = state(self.cache)
            with pytest.raises(ValueError, match=r"exists already|max_batch_size"):
                self.cache.add_sequence(seq)
            assert state(self.cache) == before
        else:
            self.cache.add_sequence(seq)
            self.tokens[seq] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        order = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True))
        lengths = [data.draw(st.integers(1, 16 // len(order))) for _ in order]
        before = state(self.cache)
        try:
            self.cache.begin_forward(order, lengths)
        except self.module.OutOfPages:
            assert state(self.cache) == before
            assert self.pages_needed(order, lengths) > len(self.cache._free)
            return
        batch = self.cache.batch
        new = list(range(self.next_token, self.next_token + sum(lengths)))
        self.next_token += len(new)
        self.cache.pages.flatten(2, 3)[:, :, batch.slots] = torch.tensor(new, dtype=torch.float32)[:, None, None]
        starts = batch.q_starts.tolist()
        for row, seq in enumerate(order):
            self.tokens[seq] += new[starts[row] : starts[row + 1]]
            assert batch.kv_lens[row] == len(self.tokens[seq])
            length = len(self.tokens[seq])
            assert batch.positions[starts[row] : starts[row + 1]].tolist() == list(range(length - lengths[row], length))
            table = batch.block_tables[row]
            found = self.cache.pages[0, 0, table].flatten(0, 1)[:length, 0, 0]
            assert found.tolist() == self.tokens[seq]
        self.cache.end_forward()

    def pages_needed(self, order: list[int], lengths: list[int]) -> int:
        """How many pages there would be more, from first principles: pages are shared until written to."""
        sequences, size = self.cache._sequences, self.cache.page_size
        holders: dict[int, int] = {}
        for sequence in sequences.values():
            for page in sequence.pages:
                holders[page] = holders.get(page, 0) + 1
        needed = 0
        for seq, n in zip(order, lengths, strict=True):
            sequence = sequences[seq]
            needed += -(-(sequence.length + n) // size) - len(sequence.pages)
            if sequence.length % size and holders[sequence.pages[-1]] > 1:
                holders[sequence.pages[-1]] -= 1
                needed += 1
        return needed

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), child=st.integers(0, 5))
    def fork(self, data: st.DataObject, child: int) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        at = data.draw(st.integers(-1, len(self.tokens[parent])))
        if child in self.tokens or len(self.tokens) == 4:
            with pytest.raises(ValueError, match=r"exists already|max_batch_size"):
                self.cache.fork_sequence(parent, child, at)
            return
        self.cache.fork_sequence(parent, child, at)
        self.tokens[child] = self.tokens[parent][: at if at >= 0 else None]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def popn(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        n = data.draw(st.integers(0, len(self.tokens[seq])))
        self.cache.popn(seq, n)
        self.tokens[seq] = self.tokens[seq][: len(self.tokens[seq]) - n]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.remove_sequence(seq)
        del self.tokens[seq]

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every token is still where its sequence looks for it, and every page is either free or held."""
        if not hasattr(self, "cache"):
            return
        held = set()
        for seq, tokens in self.tokens.items():
            sequence = self.cache._sequences[seq]
            held |= set(sequence.pages)
            rows = self.cache.pages[1, 1][sequence.pages].flatten(0, 1)[: len(tokens), -1, -1]
            assert rows.tolist() == tokens
            assert len(sequence.pages) == -(-len(tokens) // self.cache.page_size)
        assert held.isdisjoint(self.cache._free)
        assert len(held) + self.cache.free_pages == self.cache.pages.shape[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return package(tmp_path_factory.mktemp("plain"))


def test_cache_behaves_as_lists_of_tokens(plain: ModuleType) -> None:
    CacheMachine.module = plain
    CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    CacheMachine.TestCase("runTest").runTest()


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
    with pytest.raises(ValueError, match="cannot fork sequence 3 at 5: it has 2"):
        cache.fork_sequence(3, 4, 5)


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
    with pytest.raises(Exception, match="pages of 4 tokens are needed"):
        cache.begin_forward([0, 1], [8, 8])
    cache.remove_sequence(1)
    assert state(cache) == before  # what it could have given back is still there
    cache.remove_sequence(0)
    assert cache.free_pages == 3


def test_sliding_support_is_refused_where_a_layer_sees_everything(plain: ModuleType) -> None:
    with pytest.raises(ValueError, match="every layer of this model sees the whole sequence"):
        new_cache(plain, support_sliding_window=True)


def rows(cache, seq: int, n: int) -> torch.Tensor:
    cache.begin_forward([seq], [n])
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
