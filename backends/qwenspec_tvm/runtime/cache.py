"""The paged KV cache: TVM's cache object, behind bookkeeping of our own.

TVM's object holds the pages and runs the attention. Its checks come late, in the middle of a change, and are told in
terms of its own source. So every call is accounted for in `Sequences` first, which counts pages exactly as TVM does;
what TVM is then asked for cannot fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm_ffi import Shape

from .config import Config
from .kernels.kv_layout import entry_size, query_entries
from .sequences import CachedSequence, Forward, Sequences

SLIDING = True  # flag: some layer has a sliding window
EVERY_LAYER_SLIDES = True  # flag: and they all have the same
DYNAMIC_ROPE = True  # flag: the rotary frequencies depend on the sequence's length
QUANTIZED_KV = False  # flag: keys and values are cached quantised

GPU_PAGE_SIZE = 16  # of TVM's own attention kernels, which run on GPUs


class PagedKVCache:
    """Keys and values of many sequences, in pages.

    A call that cannot be done raises and leaves the cache as it was."""

    def __init__(
        self,
        config: Config,
        create: Callable[..., Any],
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int,
        dtype: str,
        device: tvm.runtime.Device,
        inverse_frequencies: Callable[[int], list[float]],
    ) -> None:
        """Room for max_batch_size sequences in ceil(max_total_seq_len / page_size) pages.

        config: the sizes of a rank
        One forward takes at most `prefill_chunk_size` tokens, or one token of each sequence.
        `create` is the library's create_paged_kv_cache."""
        if device.type != "cpu" and page_size != GPU_PAGE_SIZE:
            raise ValueError(f"page_size is {page_size}, and TVM's attention for GPUs has pages of {GPU_PAGE_SIZE}")
        self.sequences = Sequences(max_batch_size, max_total_seq_len, prefill_chunk_size, page_size)
        self.page_size = page_size
        sizes = (max_batch_size, max_total_seq_len, self.sequences.max_tokens, page_size, 0)
        self.state = create(*(Shape((size,)) for size in sizes))  # what the model's methods take
        self._config = config
        self._dtype = dtype
        self._device = device
        # TVM's ids are not the caller's: it needs 0 and more, and keeps removed sequences until trees are committed.
        self._ids: dict[int, int] = {}
        self._new_id = itertools.count()
        self._open_ids: list[int] = []  # of the open forward's sequences
        self._tree_ids: list[int] = []  # of the sequences that wait for commit_tree, in their order
        if DYNAMIC_ROPE:
            self.inv_freq: Any = None  # [n, rotary_dim / 2] float32, the rotary frequencies of each new token
            self._inverse_frequencies = inverse_frequencies

    def add_sequence(self, seq_id: int, prompt_length: int | None = None) -> None:
        """Start an empty sequence.

        [DYNAMIC_ROPE] `prompt_length`: the whole prompt's length, when it will be prefilled in chunks; the rotary
        [DYNAMIC_ROPE] frequencies are then those of the prompt, however it is cut."""
        self.sequences.add(seq_id, prompt_length)
        self._ids[seq_id] = next(self._new_id)
        _call("kv_state_add_sequence", self.state, self._ids[seq_id])

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence and give its pages back, after a forward with trees when the others are committed."""
        self.sequences.remove(seq_id)
        removed = self._ids.pop(seq_id)
        if removed not in self._tree_ids:
            _call("kv_state_remove_sequence", self.state, removed)
        elif not self.sequences.waiting:
            self._remove_forgotten()

    def fork_sequence(self, parent: int, child: int, at: int = -1) -> None:
        """`child` starts with the first `at` tokens of `parent` (-1: all).

        They share full pages. What the child needs of a page's beginning is copied; raises OutOfPages."""
        if SLIDING:
            self._check_gpu("a fork", refused=True)
        self.sequences.fork(parent, child, at)
        self._ids[child] = next(self._new_id)
        at = self.sequences.length(child)
        _call("kv_state_fork_sequence", self.state, self._ids[parent], self._ids[child], at)

    def popn(self, seq_id: int, n: int) -> None:
        """Forget the last n tokens.

        The beginning of a page that another sequence shares is copied; raises OutOfPages."""
        self.sequences.popn(seq_id, n)
        _call("kv_state_popn", self.state, self._ids[seq_id], n)

    def begin_forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], tree_parents: Sequence[int] | None = None
    ) -> None:
        """Make room for lengths[i] new tokens of sequence seq_ids[i]; raises OutOfPages.

        `tree_parents`: the new tokens are trees. For each of them the number of its parent among its own sequence's
        new tokens, which is smaller than its own, or -1 if it follows the sequence. It then sees its ancestors, at its
        depth's position. commit_tree must follow before the next forward."""
        if SLIDING and self._device.type != "cpu":
            self._check_gpu("a token tree", refused=tree_parents is not None)
            longest = max(lengths, default=0)
            self._check_gpu(f"a chunk of {longest} tokens, longer than the window", longest > self._window())
        forward = self.sequences.begin_forward(seq_ids, lengths, tree_parents)
        began = False
        try:
            self._open_ids = [self._ids[seq_id] for seq_id in seq_ids]
            self._tree_ids = self._open_ids if self.sequences.waiting else []
            batch = [Shape(tuple(self._open_ids)), Shape(tuple(map(int, lengths)))]
            if _branch(forward.sequences):
                batch.append(Shape(tuple(map(int, tree_parents or ()))))
            _call("kv_state_begin_forward", self.state, *batch)
            began = True
            if len(batch) == 3:
                # A commit reads what is otherwise prepared in the forward, which may never come.
                _call("attention_kv_cache_get_query_positions", self.state)
            if DYNAMIC_ROPE:
                self.inv_freq = self._frequencies(forward)
        except BaseException:  # no memory on the device, or Ctrl-C
            if began:
                self.cancel_forward()
            else:
                self.sequences.cancel_forward()
                self._tree_ids = []
            raise

    def end_forward(self) -> None:
        """Close what begin_forward opened."""
        if self.sequences.forward:
            _call("kv_state_end_forward", self.state)
        self.sequences.end_forward()
        if DYNAMIC_ROPE:
            self.inv_freq = None

    def cancel_forward(self) -> None:
        """Close what begin_forward opened as if it had not been, after a forward that failed: its new tokens go."""
        forward = self.sequences.forward
        if forward is None:
            return
        _call("kv_state_end_forward", self.state)
        if _branch(forward.sequences):
            none = Shape((-1,) * len(self._open_ids))
            _call("attention_kv_cache_commit_accepted_token_tree_nodes", self.state, Shape(tuple(self._open_ids)), none)
        else:
            for tvm_id, n in zip(self._open_ids, forward.lengths, strict=True):
                _call("kv_state_popn", self.state, tvm_id, n)
        self.sequences.cancel_forward()
        self._tree_ids = []
        if DYNAMIC_ROPE:
            self.inv_freq = None

    def commit_tree(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        """After a forward with trees: of sequence seq_ids[i], keep new token leaves[i] and its ancestors (-1: none).

        Names every sequence of that forward that has not been removed, in any order."""
        paths = self.sequences.accepted_paths(seq_ids, leaves)
        sequences = [sequence for _, sequence in self.sequences.waiting]
        if _branch(sequences):
            if not _branch(sequences[-1:]):
                self._move_accepted(sequences, paths)
            ids, ends = Shape(tuple(self._tree_ids)), Shape(tuple(path[-1] if path else -1 for path in paths))
            _call("attention_kv_cache_commit_accepted_token_tree_nodes", self.state, ids, ends)
        else:  # chains, which TVM was not told of
            for tvm_id, sequence, path in zip(self._tree_ids, sequences, paths, strict=True):
                assert sequence.tree is not None
                _call("kv_state_popn", self.state, tvm_id, len(sequence.tree.parents) - len(path))
        self.sequences.commit(paths)
        self._remove_forgotten()

    def check_open(self, tokens: int, sequences: int | None = None) -> None:
        """A forward must be open, with this many new tokens, and of this many sequences where that is said."""
        self.sequences.check_open(tokens, sequences)

    def length(self, seq_id: int) -> int:
        """Tokens in a sequence."""
        return self.sequences.length(seq_id)

    @property
    def free_pages(self) -> int:
        return self.sequences.free_pages

    def _remove_forgotten(self) -> None:
        """Nothing waits for commit_tree any more: drop the sequences that were removed meanwhile."""
        for forgotten in set(self._tree_ids) - set(self._ids.values()):
            _call("kv_state_remove_sequence", self.state, forgotten)
        self._tree_ids = []

    def _move_accepted(self, sequences: Sequence[CachedSequence], paths: Sequence[Sequence[int]]) -> None:
        """Put the keys and values of accepted nodes where the sequences go on.

        TVM's commit does this itself, unless the last tree of the batch is a chain: it takes all for chains then. So
        they are read back, and cached once more by an attention whose result is dropped, each in its new place."""
        config = self._config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if QUANTIZED_KV:
            heads, head_dim = query_entries(heads, head_dim), entry_size(head_dim)
        parts = []
        for tvm_id, sequence, path in zip(self._tree_ids, sequences, paths, strict=True):
            assert sequence.tree is not None
            n = len(sequence.tree.parents)
            shape = (config.num_hidden_layers, n, kv_heads, head_dim)
            keys, values = (tvm.runtime.empty(shape, self._dtype, self._device) for _ in "kv")
            span = sequence.length - n, sequence.length
            _call("attention_kv_cache_debug_get_kv", self.state, tvm_id, *span, keys, values)
            order = [*path, *range(len(path), n)]
            parts.append(np.concatenate([keys.numpy()[:, order], values.numpy()[:, order]], axis=2))
        cached = np.concatenate(parts, axis=1)  # [layers, n, 2 · kv_heads, head_dim]
        queries = np.zeros((cached.shape[1], heads, head_dim), cached.dtype)
        out = tvm.runtime.empty(queries.shape, self._dtype, self._device)
        for layer, kv in enumerate(cached):
            qkv = tvm.runtime.tensor(np.concatenate([queries, kv], axis=1), self._device)
            _call("attention_kv_cache_attention_with_fused_qkv", self.state, layer, 1.0, qkv, out)

    if SLIDING:

        def _window(self) -> int:
            if EVERY_LAYER_SLIDES:
                return self._config.sliding_window
            return min(window for window in self._config.layer_windows if window is not None)

        def _check_gpu(self, what: str, refused: bool) -> None:
            if refused and self._device.type != "cpu":
                raise ValueError(f"{what}: TVM's attention for GPUs does not apply this model's window there")

    if DYNAMIC_ROPE:

        def _frequencies(self, forward: Forward) -> Any:
            """[n, rotary_dim / 2] float32, one row a new token."""
            lengths = forward.rope_lengths()
            rows = {n: row for row, n in enumerate(dict.fromkeys(lengths))}
            table = np.array([self._inverse_frequencies(n) for n in rows], dtype=np.float32)
            return tvm.runtime.tensor(table[[rows[n] for n in lengths]], self._device)


def _branch(sequences: Sequence[CachedSequence]) -> bool:
    """Whether one of them ends in a tree that is not a chain."""
    return any(sequence.tree is not None and sequence.tree.branches for sequence in sequences)


def _call(name: str, *arguments: Any) -> None:
    """One of the runtime's functions for caches."""
    tvm.get_global_func(f"vm.builtin.{name}")(*arguments)
