"""Who computes: the reference, a generated package and Hugging Face, behind one protocol.

A contender keeps its own sequences and does one step after the other. Each sees only the steps.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwenspec.backend.api import Cache, Runner
from qwenspec.spec.document import Spec
from qwenspec.spec.rope import DynamicQwen1
from qwenspec.verify.parallel import ParallelCache
from qwenspec.verify.reference import Reference, TokenSequence
from qwenspec.verify.reference_rope import Array
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step, depths

Rows = Array | npt.NDArray[np.float32]
HOSTAGES = 3  # sequences full of NaN, which take pages between those of the others


class Contender(Protocol):
    """A contender that is out of pages raises an exception called OutOfPages and is as it was."""

    name: str

    def do(self, step: Step) -> Rows | None:
        """Logits [rows, vocab] of a Forward, those that its method returns; None of other steps."""

    def taps(self, step: Forward) -> Mapping[str, Rows]:
        """Instead of `do`: every module's output for all of the forward's tokens [n, …], and `logits` [n, vocab]."""


class ReferenceContender:
    """The float64 reference. It has neither pages nor methods: a forward computes every row."""

    name = "reference"

    def __init__(self, spec: Spec, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        self._model = Reference(spec, weights)
        self._freezes = isinstance(spec.architecture.rope.scaling, DynamicQwen1)
        self._sequences: dict[int, TokenSequence] = {}
        self._nodes: dict[int, list[TokenSequence]] = {}  # of the sequences that wait for a commit

    def do(self, step: Step) -> Rows | None:
        match step:
            case Forward():
                return self.taps(step)["logits"][step.rows]
            case Restart():
                self._sequences, self._nodes = {}, {}
            case Add(seq, prompt_length):
                self._sequences[seq] = self._model.sequence(prompt_length)
            case Commit(leaves):
                kept = {seq: self._nodes[seq][leaf] for seq, leaf in leaves.items() if leaf >= 0}
                self._sequences |= kept
                self._nodes = {}
            case Fork(parent, child, at):
                self._sequences[child] = self._sequences[parent].fork(at)
            case Popn(seq, n):
                self._sequences[seq].popn(n)
            case Remove(seq):
                del self._sequences[seq]
        return None

    def taps(self, step: Forward) -> Mapping[str, Rows]:
        parts: list[dict[str, Array]] = []
        for seq, ids in step.tokens.items():
            sequence = self._sequences[seq]
            if step.trees is None:
                sequence.forward(ids)
                parts.append(sequence.taps)
            else:
                self._nodes[seq] = self._grow(sequence, ids, step.trees[seq])
                parts += [node.taps for node in self._nodes[seq]]
        return {address: np.concatenate([part[address] for part in parts]) for address in parts[0]}

    def _grow(self, sequence: TokenSequence, ids: tuple[int, ...], parents: tuple[int, ...]) -> list[TokenSequence]:
        """The sequence as it is after each node, had its path been decoded token by token."""
        root = sequence.fork()
        if self._freezes and root.length == 0:  # for good, by what the whole forward has
            root.prompt_length = max(root.prompt_length, 1 + max(depths(parents)))
        nodes: list[TokenSequence] = []
        for token, parent in zip(ids, parents, strict=True):
            nodes.append((root if parent < 0 else nodes[parent]).fork())
            nodes[-1].forward([token])
        return nodes


class PackageContender:
    """A generated package, through the methods and the cache that its users call."""

    def __init__(self, name: str, runner: Runner, sizes: CacheSizes, kernels: Counter[str] | None = None) -> None:
        """kernels: how often each has run, which whoever opened the runner keeps up to date."""
        self.name = name
        self.kernels = Counter() if kernels is None else kernels
        self._runner = runner
        self._cache = self._new_cache(sizes)

    def do(self, step: Step) -> Rows | None:
        match step:
            case Forward():
                return self._forward(step)
            case Restart(sizes):
                self._empty()
                self._cache = self._new_cache(sizes)
            case Add(seq, prompt_length):
                self._cache.add_sequence(seq, prompt_length)
                self._ids.append(seq)
            case Commit(leaves):
                self._cache.commit_tree(list(leaves), list(leaves.values()))
            case Fork(parent, child, at):
                self._cache.fork_sequence(parent, child, at)
                self._ids.append(child)
            case Popn(seq, n):
                self._cache.popn(seq, n)
            case Remove(seq):
                self._cache.remove_sequence(seq)
                self._ids.remove(seq)
            case Poison(seed):
                self._poison(random.Random(seed))
        return None

    def taps(self, step: Forward) -> Mapping[str, Rows]:
        self._begin(step)
        try:
            return self._runner.taps(np.array(step.ids, np.int32), self._cache)
        finally:
            self._cache.end_forward()

    def _forward(self, step: Forward) -> Rows:
        runner, cache = self._runner, self._cache
        rows: Rows
        self._begin(step)
        try:
            embeds = runner.embed(np.array(step.ids, np.int32))
            match step.method:
                case "prefill":
                    rows = runner.prefill(embeds, cache)[0]
                case "decode":
                    rows = runner.decode(embeds, cache)[0]
                case "batch_prefill":
                    rows = runner.batch_prefill(embeds, np.array(step.ends, np.int32), cache)[0]
                case "batch_decode":
                    rows = runner.batch_decode(np.swapaxes(embeds, 0, 1), cache)[:, 0]
                case "batch_verify":
                    rows = runner.batch_verify(embeds, cache)[0]
        finally:
            cache.end_forward()
        return rows

    def _begin(self, step: Forward) -> None:
        parents = None if step.trees is None else [p for own in step.trees.values() for p in own]
        self._cache.begin_forward(list(step.tokens), step.lengths, parents)

    def _new_cache(self, sizes: CacheSizes) -> Cache:
        self._sizes = sizes
        self._ids: list[int] = []
        self._hostages: list[int] = []
        # Hostages come on top of what the workload may use.
        return self._runner.create_paged_kv_cache(
            max_batch_size=sizes.max_batch_size + HOSTAGES,
            max_total_seq_len=(sizes.pages + HOSTAGES) * sizes.page_size,
            prefill_chunk_size=max(sizes.chunk, HOSTAGES * sizes.page_size),
            page_size=sizes.page_size,
            support_sliding_window=sizes.evicts,
        )

    def _empty(self) -> None:
        """When every sequence is gone, every page is free. Raises RuntimeError when one is not."""
        for seq in (*self._ids, *self._hostages):
            self._cache.remove_sequence(seq)
        pages = self._sizes.pages + HOSTAGES
        if self._cache.free_pages != pages:
            raise RuntimeError(f"{self._cache.free_pages} of {pages} pages are free, and there is no sequence")

    def _poison(self, draw: random.Random) -> None:
        """Sequences of NaN grow in turns until no page is free; then they shrink to a page each, in any order.

        TVM's cache hands out the pages in an order that follows from theirs."""
        cache, size = self._cache, self._sizes.page_size
        _shuffle_pages(cache, draw.getrandbits(32))
        for seq in self._hostages:
            cache.remove_sequence(seq)
        self._hostages = [-1 - i for i in range(min(HOSTAGES, cache.free_pages))]
        pages = dict.fromkeys(self._hostages, 0)
        for seq in self._hostages:
            cache.add_sequence(seq)
        for _ in range(cache.free_pages):
            growing = draw.sample(self._hostages, min(len(pages), cache.free_pages))
            if not growing:
                break
            self._grow_by_a_page(growing)
            pages |= {seq: pages[seq] + 1 for seq in growing}
        for seq in draw.sample(self._hostages, len(self._hostages)):
            if self._sizes.evicts:  # its first pages are gone
                cache.remove_sequence(seq)
            else:
                cache.popn(seq, (pages[seq] - 1) * size)
        if self._sizes.evicts:
            self._hostages = []

    def _grow_by_a_page(self, seqs: list[int]) -> None:
        """Of keys and values that are NaN."""
        size = self._sizes.page_size
        embeds = self._runner.embed(np.zeros(size * len(seqs), np.int32))
        self._cache.begin_forward(seqs, [size] * len(seqs))
        self._runner.batch_verify(np.full_like(embeds, np.nan), self._cache)
        self._cache.end_forward()


def _shuffle_pages(cache: Cache, seed: int) -> None:
    """A cache whose pages Python numbers takes the lowest free one: now it takes any, on all ranks the same."""
    if isinstance(cache, ParallelCache):
        cache.on_ranks(_shuffle_pages, seed)
        return
    sequences: Any = cache.sequences  # type: ignore[attr-defined]
    draw = random.Random(seed)

    free = sequences._given_back
    free += range(sequences._unused, sequences.num_pages)
    sequences._unused = sequences.num_pages

    def take_page() -> int:
        page = int(free.pop(draw.randrange(len(free))))
        heapq.heapify(free)
        sequences._users[page] = 1
        return page

    sequences._take_page = take_page
