"""The paged KV cache: pages, block tables, sharing after a fork with copy on write, rollback.

A page holds `page_size` consecutive tokens of one sequence, in every layer. Bookkeeping is plain Python on the
host; the pages are one tensor on the device.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EVICTS = True  # flag: every layer slides, so pages behind the window can be given back
DYNAMIC_ROPE = True  # flag: the rotary frequencies depend on the sequence's length
FROZEN_ROPE = True  # flag: … and stay as the first forward chose them


class OutOfPages(RuntimeError):
    """The cache is full. It is left as it was: remove or shorten a sequence and call again."""


@dataclass
class Batch:
    """What one forward knows of its sequences: b of them, n new tokens in all, one sequence after the other."""

    positions: Tensor  # [n] position of each new token in its sequence
    slots: Tensor  # [n] where its key and value go: page · page_size + offset, or -1 for nowhere
    block_tables: Tensor  # [b, pages of the longest sequence] page numbers, padded with 0
    kv_lens: Tensor  # [b] tokens in the sequence after this forward
    q_starts: Tensor  # [b + 1] first new token of each sequence
    max_q_len: int  # most new tokens in one sequence
    if DYNAMIC_ROPE:
        inv_freq: Tensor = field(init=False)  # [n, rotary_dim / 2] float32, each token's rotary frequencies


@dataclass
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)
    if DYNAMIC_ROPE:
        prompt_length: int = 0  # as told to add_sequence, or 0
    if FROZEN_ROPE:
        rope_length: int = 0  # the length that chose the frequencies
    if EVICTS:
        evicted: int = 0  # leading pages given back, whose numbers are -1


class PagedKVCache:
    """Keys and values of many sequences, in pages of [layers, 2, pages, page_size, num_kv_heads, head_dim]."""

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
        self.page_size = page_size
        self.max_batch_size = max_batch_size
        self.max_tokens = max(prefill_chunk_size, max_batch_size)
        num_pages = -(-max_total_seq_len // page_size)
        self.pages = torch.empty(
            num_layers, 2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        self.graphs = graphs  # captured decode steps over these pages
        self.batch: Batch | None = None
        self._sequences: dict[int, _Sequence] = {}
        # A heap: low pages go first, so that a lone sequence lies in one piece.
        self._free = list(range(num_pages))
        self._users: Counter[int] = Counter()  # sequences that hold a page
        if DYNAMIC_ROPE:
            self._inverse_frequencies = inverse_frequencies
        if EVICTS:
            self._evict_window = evict_window

    def add_sequence(self, seq_id: int, prompt_length: int | None = None) -> None:
        """Start an empty sequence.

        [DYNAMIC_ROPE] `prompt_length`: the whole prompt's length, when it will be prefilled in chunks; the rotary
        [DYNAMIC_ROPE] frequencies are then those of the prompt, however it is cut."""
        self._check_new(seq_id)
        if prompt_length is not None and prompt_length < 1:
            raise ValueError(f"prompt_length is {prompt_length}; a prompt has a token at least")
        sequence = _Sequence()
        if DYNAMIC_ROPE:
            sequence.prompt_length = prompt_length or 0
        self._sequences[seq_id] = sequence

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence and give its pages back."""
        sequence = self._sequence(seq_id)
        self._give_back(sequence.pages[sequence.evicted :] if EVICTS else sequence.pages)
        del self._sequences[seq_id]

    def fork_sequence(self, parent: int, child: int, at: int = -1) -> None:
        """`child` starts with the first `at` tokens of `parent` (-1: all), sharing its pages until one writes."""
        source = self._sequence(parent)
        self._check_new(child)
        at = source.length if at < 0 else at
        if at > source.length:
            raise ValueError(f"cannot fork sequence {parent} at {at}: it has {source.length} tokens")
        if EVICTS:
            self._check_window(source, at)
        pages = source.pages[: -(-at // self.page_size)]
        self._users.update(pages[source.evicted :] if EVICTS else pages)
        copy = _Sequence(at, pages)
        if DYNAMIC_ROPE:
            copy.prompt_length = source.prompt_length
        if FROZEN_ROPE:
            copy.rope_length = source.rope_length
        if EVICTS:
            copy.evicted = source.evicted
        self._sequences[child] = copy

    def popn(self, seq_id: int, n: int) -> None:
        """Forget the last n tokens."""
        sequence = self._sequence(seq_id)
        if not 0 <= n <= sequence.length:
            raise ValueError(f"cannot remove {n} tokens of sequence {seq_id}: it has {sequence.length}")
        if EVICTS:
            self._check_window(sequence, sequence.length - n)
        sequence.length -= n
        kept = -(-sequence.length // self.page_size)
        self._give_back(sequence.pages[kept:])
        del sequence.pages[kept:]

    def begin_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Make room for lengths[i] new tokens of sequence seq_ids[i].

        Raises OutOfPages, and then nothing has changed."""
        sequences = self._check_forward(seq_ids, lengths)
        copies = self._pages_to_copy(sequences)
        growth = [self._missing_pages(s, n) for s, n in zip(sequences, lengths, strict=True)]
        needed, free = len(copies) + sum(growth), len(self._free)
        if EVICTS:
            free += self._evictable(sequences)
        if needed > free:
            raise OutOfPages(
                f"{needed} pages of {self.page_size} tokens are needed and {free} of {self.pages.shape[2]} are free: "
                "remove sequences, or raise max_total_seq_len"
            )
        if EVICTS:
            for sequence in sequences:
                self._evict(sequence)
        for sequence in copies:
            self._copy_last_page(sequence)
        for sequence, pages, length in zip(sequences, growth, lengths, strict=True):
            sequence.pages += [self._take_page() for _ in range(pages)]
            sequence.length += length
        self.batch = self._describe(sequences, lengths)

    def end_forward(self) -> None:
        """Close what begin_forward opened."""
        self.batch = None

    def open_batch(self, tokens: int) -> Batch:
        """The batch that begin_forward described, which must have this many new tokens."""
        if self.batch is None:
            raise RuntimeError("no forward is open: call begin_forward(seq_ids, lengths) first")
        if len(self.batch.positions) != tokens:
            raise ValueError(f"{tokens} tokens are given, and begin_forward made room for {len(self.batch.positions)}")
        return self.batch

    def length(self, seq_id: int) -> int:
        """Tokens in a sequence."""
        return self._sequence(seq_id).length

    @property
    def free_pages(self) -> int:
        return len(self._free)

    # ------------------------------------------------------------------------------------------------- checks

    def _sequence(self, seq_id: int) -> _Sequence:
        if seq_id not in self._sequences:
            raise KeyError(f"the cache has no sequence {seq_id}; it has {sorted(self._sequences) or 'none'}")
        return self._sequences[seq_id]

    def _check_new(self, seq_id: int) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id} exists already")
        if len(self._sequences) == self.max_batch_size:
            raise ValueError(f"the cache holds its {self.max_batch_size} sequences: raise max_batch_size")

    def _check_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> list[_Sequence]:
        if len(seq_ids) != len(lengths) or not seq_ids:
            raise ValueError(f"{len(seq_ids)} sequences with {len(lengths)} lengths")
        if len(set(seq_ids)) != len(seq_ids):
            raise ValueError(f"a sequence appears twice in {list(seq_ids)}")
        if min(lengths) < 1:
            raise ValueError("a sequence of a forward needs a new token: to see a cached prompt's logits, popn 1")
        if sum(lengths) > self.max_tokens:
            raise ValueError(f"{sum(lengths)} tokens in one forward, at most {self.max_tokens}: prefill in chunks")
        return [self._sequence(seq_id) for seq_id in seq_ids]

    # -------------------------------------------------------------------------------------------------- pages

    def _take_page(self) -> int:
        page = heapq.heappop(self._free)
        self._users[page] = 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                heapq.heappush(self._free, page)

    def _missing_pages(self, sequence: _Sequence, length: int) -> int:
        return -(-(sequence.length + length) // self.page_size) - len(sequence.pages)

    def _pages_to_copy(self, sequences: Sequence[_Sequence]) -> list[_Sequence]:
        """The sequences whose half-filled last page someone else will still hold when they write to it."""
        copies: list[_Sequence] = []
        users = Counter(self._users)
        for sequence in sequences:
            if sequence.length % self.page_size and users[sequence.pages[-1]] > 1:
                users[sequence.pages[-1]] -= 1
                copies.append(sequence)
        return copies

    def _copy_last_page(self, sequence: _Sequence) -> None:
        old, new = sequence.pages[-1], self._take_page()
        self.pages[:, :, new] = self.pages[:, :, old]
        self._users[old] -= 1
        sequence.pages[-1] = new

    if EVICTS:

        def _behind_window(self, sequence: _Sequence) -> range:
            """Indices of the pages still held that no query from `length` on can see."""
            if self._evict_window is None:
                return range(0)
            first_visible = max(sequence.length - self._evict_window + 1, 0)
            return range(sequence.evicted, first_visible // self.page_size)

        def _evictable(self, sequences: Sequence[_Sequence]) -> int:
            """How many pages these sequences would free."""
            dropped = Counter(s.pages[i] for s in sequences for i in self._behind_window(s))
            return sum(count == self._users[page] for page, count in dropped.items())

        def _evict(self, sequence: _Sequence) -> None:
            for i in self._behind_window(sequence):
                self._give_back([sequence.pages[i]])
                sequence.pages[i] = -1
                sequence.evicted = i + 1

        def _check_window(self, sequence: _Sequence, length: int) -> None:
            first = length - self._evict_window + 1 if self._evict_window else 0
            if sequence.evicted and first < sequence.evicted * self.page_size:
                raise ValueError(
                    f"{length} tokens: the pages before {sequence.evicted * self.page_size} were given back"
                )

    # --------------------------------------------------------------------------------------------------- batch

    def _describe(self, sequences: Sequence[_Sequence], lengths: Sequence[int]) -> Batch:
        size = self.page_size
        positions = [p for s, n in zip(sequences, lengths, strict=True) for p in range(s.length - n, s.length)]
        slots = [
            s.pages[p // size] * size + p % size
            for s, n in zip(sequences, lengths, strict=True)
            for p in range(s.length - n, s.length)
        ]
        width = max(len(s.pages) for s in sequences)
        block_tables = [page for s in sequences for page in s.pages + [0] * (width - len(s.pages))]
        kv_lens = [s.length for s in sequences]
        q_starts = [0]
        for n in lengths:
            q_starts.append(q_starts[-1] + n)
        # One transfer for all of them.
        fields = (positions, slots, block_tables, kv_lens, q_starts)
        flat = torch.tensor([i for numbers in fields for i in numbers], dtype=torch.int64)
        if self.pages.is_cuda:
            flat = flat.pin_memory().to(self.pages.device, non_blocking=True)
        position, slot, table, kv_len, q_start = flat.split([len(numbers) for numbers in fields])
        batch = Batch(position, slot, table.view(len(sequences), width), kv_len, q_start, max(lengths))
        if DYNAMIC_ROPE:
            batch.inv_freq = self._frequencies(sequences, lengths)
        return batch

    if DYNAMIC_ROPE:

        def _frequencies(self, sequences: Sequence[_Sequence], lengths: Sequence[int]) -> Tensor:
            """[n, rotary_dim / 2] float32, one row a new token."""
            rows = []
            for sequence, n in zip(sequences, lengths, strict=True):
                rope_length = max(sequence.prompt_length, sequence.length)
                if FROZEN_ROPE:
                    if sequence.length == n:  # the first forward chooses for good
                        sequence.rope_length = rope_length
                    rope_length = sequence.rope_length
                rows.append(self._inverse_frequencies(rope_length))
            per_sequence = torch.tensor(rows, dtype=torch.float32, device=self.pages.device)
            repeats = torch.tensor(lengths, device=self.pages.device)
            return per_sequence.repeat_interleave(repeats, dim=0, output_size=sum(lengths))
