"""The paged KV cache: pages on the device, block tables, sharing after a fork, rollback, token trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sequences import CachedSequence, Forward, PageCopy, Sequences, Tree

EVICTS = True  # flag: every layer slides, so pages behind the window can be given back
DYNAMIC_ROPE = True  # flag: the rotary frequencies depend on the sequence's length
TOKEN_SCALES = True  # flag: what is cached is quantised, with a scale for each token and head


@dataclass
class Batch:
    """What one forward knows of its sequences: b of them, n new tokens in all, one sequence after the other."""

    positions: Tensor  # [n] position of each new token in its sequence
    slots: Tensor  # [n] where its key and value go: page · page_size + offset, or -1 for nowhere
    block_tables: Tensor  # [b, pages of the longest sequence] page numbers, padded with 0
    kv_lens: Tensor  # [b] tokens in the sequence after this forward
    q_starts: Tensor  # [b + 1] first new token of each sequence
    max_q_len: int  # most new tokens in one sequence
    tree: Tensor | None = None  # [n, 3] where new tokens branch, as prefill_attention takes it
    if DYNAMIC_ROPE:
        inv_freq: Tensor = field(init=False)  # [n, rotary_dim / 2] float32, each token's rotary frequencies


class PagedKVCache:
    """Keys and values of many sequences, in pages of [layers, 2, pages, page_size, num_kv_heads, head_dim].

    [TOKEN_SCALES] Each token's and head's are bytes, to be multiplied with its number in `scales`.

    A call that cannot be done raises and leaves the cache as it was."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        graphs: Any,
        inverse_frequencies: Callable[[int], list[float]],
        evict_window: int | None,
    ) -> None:
        """Room for max_batch_size sequences in ceil(max_total_seq_len / page_size) pages.

        One forward takes at most `prefill_chunk_size` tokens, or one token of each sequence."""
        if EVICTS:
            self.sequences = Sequences(max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, evict_window)
        else:
            self.sequences = Sequences(max_batch_size, max_total_seq_len, prefill_chunk_size, page_size)
        self.page_size = page_size
        self.pages = torch.empty(
            num_layers, 2, self.sequences.num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        if TOKEN_SCALES:
            self.scales = torch.empty(self.pages.shape[:-1], dtype=torch.float32, device=device)
        self.graphs = graphs  # captured decode steps over these pages
        self.batch: Batch | None = None
        if DYNAMIC_ROPE:
            self._inverse_frequencies = inverse_frequencies

    def add_sequence(self, seq_id: int, prompt_length: int | None = None) -> None:
        """Start an empty sequence.

        [DYNAMIC_ROPE] `prompt_length`: the whole prompt's length, when it will be prefilled in chunks; the rotary
        [DYNAMIC_ROPE] frequencies are then those of the prompt, however it is cut."""
        self.sequences.add(seq_id, prompt_length)

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence and give its pages back, after a forward with trees when the others are committed."""
        self.sequences.remove(seq_id)

    def fork_sequence(self, parent: int, child: int, at: int = -1) -> None:
        """`child` starts with the first `at` tokens of `parent` (-1: all).

        They share full pages. What the child needs of a page's beginning is copied; raises OutOfPages."""
        self._copy_page(self.sequences.fork(parent, child, at))

    def popn(self, seq_id: int, n: int) -> None:
        """Forget the last n tokens.

        The beginning of a page that another sequence shares is copied; raises OutOfPages."""
        self._copy_page(self.sequences.popn(seq_id, n))

    def begin_forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], tree_parents: Sequence[int] | None = None
    ) -> None:
        """Make room for lengths[i] new tokens of sequence seq_ids[i]; raises OutOfPages.

        `tree_parents`: the new tokens are trees. For each of them the number of its parent among its own sequence's
        new tokens, which is smaller than its own, or -1 if it follows the sequence. It then sees its ancestors, at its
        depth's position. commit_tree must follow before the next forward."""
        forward = self.sequences.begin_forward(seq_ids, lengths, tree_parents)
        try:
            self.batch = self._describe(forward)
        except BaseException:  # no memory on the device, or Ctrl-C
            self.sequences.cancel_forward()
            raise

    def end_forward(self) -> None:
        """Close what begin_forward opened."""
        self.sequences.end_forward()
        self.batch = None

    def cancel_forward(self) -> None:
        """Close what begin_forward opened as if it had not been, after a forward that failed: its new tokens go.

        [EVICTS] Pages that it gave back behind the window stay so."""
        self.sequences.cancel_forward()
        self.batch = None

    def commit_tree(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        """After a forward with trees: of sequence seq_ids[i], keep new token leaves[i] and its ancestors (-1: none).

        Names every sequence of that forward that has not been removed, in any order."""
        paths = self.sequences.accepted_paths(seq_ids, leaves)
        sources, targets = [], []
        for (_, sequence), path in zip(self.sequences.waiting, paths, strict=True):
            assert sequence.tree is not None
            start = sequence.length - len(sequence.tree.parents)
            moved = [(node, place) for place, node in enumerate(path) if node != place]
            sources += [self._slot(sequence, start + node) for node, _ in moved]
            targets += [self._slot(sequence, start + place) for _, place in moved]
        if targets:
            slots = self.pages.flatten(2, 3)
            slots[:, :, targets] = slots[:, :, sources]
            if TOKEN_SCALES:
                scales = self.scales.flatten(2, 3)
                scales[:, :, targets] = scales[:, :, sources]
        self.sequences.commit(paths)

    def open_batch(self, tokens: int, sequences: int | None = None) -> Batch:
        """What begin_forward described: this many new tokens, of this many sequences where that is said."""
        self.sequences.check_open(tokens, sequences)
        assert self.batch is not None
        return self.batch

    def length(self, seq_id: int) -> int:
        """Tokens in a sequence."""
        return self.sequences.length(seq_id)

    @property
    def free_pages(self) -> int:
        return self.sequences.free_pages

    # -------------------------------------------------------------------------------------------------- pages

    def _copy_page(self, copy: PageCopy | None) -> None:
        if copy is not None:
            old, new = copy
            self.pages[:, :, new] = self.pages[:, :, old]
            if TOKEN_SCALES:
                self.scales[:, :, new] = self.scales[:, :, old]

    def _slot(self, sequence: CachedSequence, index: int) -> int:
        return sequence.pages[index // self.page_size] * self.page_size + index % self.page_size

    # --------------------------------------------------------------------------------------------------- batch

    def _describe(self, forward: Forward) -> Batch:
        sequences, lengths = forward.sequences, forward.lengths
        slots = [
            self._slot(s, i) for s, n in zip(sequences, lengths, strict=True) for i in range(s.length - n, s.length)
        ]
        width = max(len(s.pages) for s in sequences)
        block_tables = [page for s in sequences for page in s.pages + [0] * (width - len(s.pages))]
        kv_lens = [s.length for s in sequences]
        q_starts = [0]
        for n in lengths:
            q_starts.append(q_starts[-1] + n)
        trees = [s.tree for s in sequences if s.tree]
        tree = [i for t in trees for i in _subtrees(t)] if any(t.branches for t in trees) else []
        # One transfer for all of them.
        parts = (forward.positions(), slots, block_tables, kv_lens, q_starts, tree)
        flat = torch.tensor([i for numbers in parts for i in numbers], dtype=torch.int64)
        if self.pages.is_cuda:
            flat = flat.pin_memory().to(self.pages.device, non_blocking=True)
        position, slot, table, kv_len, q_start, tree_rows = flat.split([len(numbers) for numbers in parts])
        batch = Batch(position, slot, table.view(len(sequences), width), kv_len, q_start, max(lengths))
        if tree:
            batch.tree = tree_rows.view(-1, 3)
        if DYNAMIC_ROPE:
            batch.inv_freq = self._frequencies(forward)
        return batch

    if DYNAMIC_ROPE:

        def _frequencies(self, forward: Forward) -> Tensor:
            """[n, rotary_dim / 2] float32, one row a new token."""
            lengths = forward.rope_lengths()
            rows = {n: row for row, n in enumerate(dict.fromkeys(lengths))}
            table = [self._inverse_frequencies(n) for n in rows]
            device = self.pages.device
            per_length = torch.tensor(table, dtype=torch.float32, device=device)
            return per_length[torch.tensor([rows[n] for n in lengths], device=device)]


def _subtrees(tree: Tree) -> list[int]:
    """Of each node: its depth, and its subtree's first node and the one after its last, in depth-first order."""
    sizes = [1] * len(tree.parents)
    for node in reversed(range(len(sizes))):
        if tree.parents[node] >= 0:
            sizes[tree.parents[node]] += sizes[node]
    rows: list[int] = []
    free = {-1: 0}  # where the next child of a node comes
    for node, (parent, size, depth) in enumerate(zip(tree.parents, sizes, tree.depths, strict=True)):
        first = free[parent]
        free[parent] += size
        free[node] = first + 1
        rows += [depth, first, first + size]
    return rows
