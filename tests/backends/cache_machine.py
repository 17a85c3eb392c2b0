"""Random use of a paged KV cache, the same for every backend."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


def free_pages(sequences: Any) -> list[int]:
    return sorted([*sequences._given_back, *range(sequences._unused, sequences.num_pages)])


def bookkeeping(sequences: Any) -> object:
    """Everything that a failed call must leave alone."""
    apart = ("_given_back", "_unused", "_users")
    kept = {name: value for name, value in vars(sequences).items() if name not in apart}
    return copy.deepcopy((kept, free_pages(sequences), +sequences._users))


class CacheMachine(RuleBasedStateMachine):
    """What every backend's cache does, against sequences that are lists of tokens.

    Each token is cached as a number, and must be found again."""

    out_of_pages: type[Exception]
    cache: Any

    def new_cache(self, pages: int, page_size: int) -> Any:
        """For 4 sequences and 16 tokens a forward."""
        raise NotImplementedError

    def write(self, numbers: list[int]) -> None:
        """Cache the open forward's new tokens."""
        raise NotImplementedError

    def read(self, seq: int) -> list[float]:
        """The tokens that the cache holds for a sequence."""
        raise NotImplementedError

    def state(self) -> object:
        """Everything that a failed call must leave alone."""
        return bookkeeping(self.cache.sequences)

    @initialize(page_size=st.integers(1, 5), pages=st.integers(3, 9))
    def start(self, page_size: int, pages: int) -> None:
        self.cache, self.pages = self.new_cache(pages, page_size), pages
        self.tokens: dict[int, list[int]] = {}
        self.trees: dict[int, tuple[list[int], list[int]]] = {}  # tokens and parents of what waits for commit_tree
        self.next_token = 0

    def refused(self, error: type[Exception], match: str, call: Callable[..., None], *args: object) -> None:
        """The call raises, and has changed nothing."""
        before = self.state()
        with pytest.raises(error, match=match):
            call(*args)
        assert self.state() == before

    @rule(seq=st.integers(0, 5))
    def add(self, seq: int) -> None:
        if seq in self.tokens or len(self.tokens) == 4:
            self.refused(ValueError, r"exists already|max_batch_size", self.cache.add_sequence, seq)
        else:
            self.cache.add_sequence(seq)
            self.tokens[seq] = []

    def fill(self, order: list[int], lengths: list[int], tree_parents: list[int] | None) -> list[list[int]] | None:
        """A forward that caches new tokens, which it returns for each sequence; None when there is no room."""
        missing = self.pages_missing(order, lengths)
        if missing > self.cache.free_pages:
            message = f"^{missing} more of {self.pages} pages"
            self.refused(self.out_of_pages, message, self.cache.begin_forward, order, lengths, tree_parents)
            return None
        self.cache.begin_forward(order, lengths, tree_parents)
        new = list(range(self.next_token, self.next_token + sum(lengths)))
        self.next_token += len(new)
        self.write(new)
        self.cache.end_forward()
        return [new[end - n : end] for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)]

    def fail(self, order: list[int], lengths: list[int], tree_parents: list[int] | None, written: bool) -> None:
        """A forward that is begun, and cancelled where there is room for it: nothing is left of it."""
        if self.pages_missing(order, lengths) > self.cache.free_pages:
            return
        before = CacheMachine.state(self)  # what it has written may stay
        self.cache.begin_forward(order, lengths, tree_parents)
        if written:
            self.write([-1] * sum(lengths))
        self.refused(RuntimeError, "a forward is open already", self.cache.begin_forward, order, lengths, tree_parents)
        for seq in order:
            self.refused(RuntimeError, "part of the open forward", self.cache.remove_sequence, seq)
        self.cache.cancel_forward()
        assert CacheMachine.state(self) == before
        self.cache.cancel_forward()  # of none that is open

    def pages_missing(self, order: list[int], lengths: list[int]) -> int:
        size = self.cache.page_size
        before = [len(self.tokens[seq]) for seq in order]
        return sum(-(-(a + n) // size) - -(-a // size) for a, n in zip(before, lengths, strict=True))

    def some_sequences(self, data: st.DataObject) -> tuple[list[int], list[int]]:
        order = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True))
        return order, [data.draw(st.integers(1, 16 // len(order))) for _ in order]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        order, lengths = self.some_sequences(data)
        if self.trees:
            self.refused(RuntimeError, "call commit_tree first", self.cache.begin_forward, order, lengths)
            return
        if data.draw(st.booleans()):
            self.fail(order, lengths, None, written=data.draw(st.booleans()))
        for seq, new in zip(order, self.fill(order, lengths, None) or [], strict=False):
            self.tokens[seq] += new

    @precondition(lambda self: self.tokens and not self.trees)
    @rule(data=st.data())
    def forward_with_trees(self, data: st.DataObject) -> None:
        order, lengths = self.some_sequences(data)
        parents = [[data.draw(st.integers(-1, node - 1)) for node in range(n)] for n in lengths]
        flat = [p for own in parents for p in own]
        if data.draw(st.booleans()):
            self.fail(order, lengths, flat, written=data.draw(st.booleans()))
        written = self.fill(order, lengths, flat)
        if written is not None:
            self.trees = dict(zip(order, zip(written, parents, strict=True), strict=True))

    @precondition(lambda self: self.trees)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(sorted(self.trees)))
        leaves = [data.draw(st.integers(-1, len(self.trees[seq][1]) - 1)) for seq in order]
        self.refused(ValueError, "name each of them once", self.cache.commit_tree, [*order, 9], [*leaves, -1])
        self.cache.commit_tree(order, leaves)
        for seq, leaf in zip(order, leaves, strict=True):
            new, parents = self.trees[seq]
            path = []
            while leaf >= 0:
                path.append(new[leaf])
                leaf = parents[leaf]
            self.tokens[seq] += path[::-1]
        self.trees = {}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), child=st.integers(0, 5))
    def fork(self, data: st.DataObject, child: int) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        at = data.draw(st.integers(-1, len(self.tokens[parent])))
        tokens = self.tokens[parent][: at if at >= 0 else None]
        if parent in self.trees:
            self.refused(RuntimeError, "call commit_tree first", self.cache.fork_sequence, parent, child, at)
        elif child in self.tokens or len(self.tokens) == 4:
            refusal = r"exists already|max_batch_size"
            self.refused(ValueError, refusal, self.cache.fork_sequence, parent, child, at)
        elif len(tokens) % self.cache.page_size and not self.cache.free_pages:
            self.refused(self.out_of_pages, "^1 more", self.cache.fork_sequence, parent, child, at)
        else:
            self.cache.fork_sequence(parent, child, at)
            self.tokens[child] = tokens

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def popn(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        n = data.draw(st.integers(0, len(self.tokens[seq])))
        if seq in self.trees:
            self.refused(RuntimeError, "call commit_tree first", self.cache.popn, seq, n)
            return
        before = self.state()
        try:
            self.cache.popn(seq, n)
        except self.out_of_pages:  # a shared page, of which a part stays, and no page is free or becomes free
            assert self.state() == before
            own, size = self.cache.sequences._sequences[seq].pages, self.cache.page_size
            full, rest = divmod(len(self.tokens[seq]) - n, size)
            others = [s.pages for id, s in self.cache.sequences._sequences.items() if id != seq]
            assert rest
            assert not self.cache.free_pages
            assert all(any(page in pages for pages in others) for page in own[full:])
            return
        self.tokens[seq] = self.tokens[seq][: len(self.tokens[seq]) - n]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.remove_sequence(seq)
        del self.tokens[seq]
        self.trees.pop(seq, None)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every token is still where its sequence looks for it, and every page is either free or held."""
        if not hasattr(self, "cache"):
            return
        users: Counter[int] = Counter()
        for seq, tokens in self.tokens.items():
            sequence = self.cache.sequences._sequences[seq]
            users.update(sequence.pages)
            tokens = tokens + self.trees[seq][0] if seq in self.trees else tokens
            assert self.read(seq) == tokens
            assert self.cache.length(seq) == len(tokens)
            assert len(sequence.pages) == -(-len(tokens) // self.cache.page_size)
            assert not len(tokens) % self.cache.page_size or users[sequence.pages[-1]] == 1
        for seq, sequence in self.cache.sequences.waiting:
            if self.cache.sequences._sequences.get(seq) is not sequence:  # removed, and still in the batch
                users.update(sequence.pages)
        assert users == +self.cache.sequences._users
        assert users.keys().isdisjoint(free_pages(self.cache.sequences))
        assert len(users) + self.cache.free_pages == self.pages
