"""Planted mistakes in the bookkeeping of pages and sequences: what packages do between kernels."""

from __future__ import annotations

from mutant import RUNTIME, TRITON, TVM, Mutant

SEQUENCES = f"{RUNTIME}/sequences.py"
TRITON_CACHE = f"{TRITON}/runtime/cache.py"
TVM_CACHE = f"{TVM}/runtime/cache.py"

RUNTIME_FILES = (
    Mutant(
        "fork_shares_the_partial_page",
        SEQUENCES,
        "        copy.pages.append(self._take_page())\n        return source.pages[full], copy.pages[full]",
        "        copy.pages.append(source.pages[full])\n        self._users[source.pages[full]] += 1\n"
        "        return None",
        "prefix hits and misses in one batch (vllm#7018)",
    ),
    Mutant(
        "fork_forgets_prompt_length",
        SEQUENCES,
        "copy.prompt_length = source.prompt_length",
        "copy.prompt_length = 0",
        "a child goes on with its parent's frequencies",
    ),
    Mutant(
        "fork_forgets_frozen_rope",
        SEQUENCES,
        "copy.rope_length = source.rope_length",
        "copy.rope_length = at",
        "a child goes on with its parent's frequencies",
    ),
    Mutant(
        "popn_keeps_the_length",
        SEQUENCES,
        "        sequence.length -= n\n        self._give_back(sequence, full + 1",
        "        self._give_back(sequence, full + 1",
        "verify and roll back",
    ),
    Mutant(
        "popn_keeps_a_shared_page",
        SEQUENCES,
        "self._give_back(sequence, full + 1 if rest else full)",
        "self._give_back(sequence, full + 1)",
        "length = k × page, below a fork (nano-vllm#144, #211, #233)",
    ),
    Mutant(
        "shared_page_freed",
        SEQUENCES,
        "            if not self._users[page]:\n                heapq",
        "            if self._users[page] < 2:\n                heapq",
        "preempt and resume beside a fork (nano-vllm#144, vllm#7018)",
    ),
    Mutant(
        "pages_for_the_longest_only",
        SEQUENCES,
        "self._check_free(sum(growth), free)",
        "self._check_free(max(growth), free)",
        "a full cache refuses a batch as a whole (nano-vllm#144)",
    ),
    Mutant(
        "evicts_too_early",
        SEQUENCES,
        "first_visible = max(sequence.length - self._evict_window + 1, 0)",
        "first_visible = max(sequence.length - self._evict_window + 2, 0)",
        "window off by one: shows where a page ends (transformers#39408, vllm#9679)",
    ),
    Mutant(
        "chunk_positions_shifted",
        SEQUENCES,
        "            sequence.length - n + offset\n",
        "            sequence.length - n + offset - (sequence.length > n)\n",
        "prefill in chunks and decode agree (vllm#48271, #9567)",
    ),
    Mutant(
        "tree_positions_in_order",
        SEQUENCES,
        "for offset in (sequence.tree.depths if sequence.tree else range(n))",
        "for offset in range(n)",
        "a node's position is its depth",
    ),
    Mutant(
        "tree_rope_of_all_nodes",
        SEQUENCES,
        "lengths += [max(sequence.prompt_length, start + depth + 1) for depth in sequence.tree.depths]",
        "lengths += [max(sequence.prompt_length, sequence.length)] * n",
        "a node's frequencies are those of its own path",
    ),
    Mutant(
        "tree_path_reversed",
        SEQUENCES,
        "return path[::-1]",
        "return path",
        "what is accepted goes on in order",
    ),
    Mutant(
        "dynamic_rope_frozen",
        SEQUENCES,
        "lengths += [max(sequence.prompt_length, sequence.length)] * n",
        "lengths += [sequence.prompt_length or sequence.length] * n",
        "frequencies follow the sequence past its prompt",
    ),
    Mutant(
        "frozen_rope_follows",
        SEQUENCES,
        "lengths += [sequence.rope_length] * n",
        "lengths += [max(sequence.prompt_length, sequence.length)] * n",
        "Qwen-1 keeps to the prompt's frequencies",
    ),
    Mutant(
        "triton_fork_copies_keys_only",
        TRITON_CACHE,
        "self.pages[:, :, new] = self.pages[:, :, old]",
        "self.pages[:, 0, new] = self.pages[:, 0, old]",
        "a stale page (vllm#7018)",
    ),
    Mutant(
        "triton_commit_moves_keys_only",
        TRITON_CACHE,
        "slots[:, :, targets] = slots[:, :, sources]",
        "slots[:, 0, targets] = slots[:, 0, sources]",
        "the values of a rejected branch stay",
    ),
    Mutant(
        "triton_slot_of_the_first_page",
        TRITON_CACHE,
        "return sequence.pages[index // self.page_size] * self.page_size + index % self.page_size",
        "return sequence.pages[0] * self.page_size + index",
        "pages that do not follow one another (vllm#7018)",
    ),
    Mutant(
        "tvm_chain_keeps_a_token",
        TVM_CACHE,
        "len(sequence.tree.parents) - len(path))",
        "max(len(sequence.tree.parents) - len(path) - 1, 0))",
        "verify and roll back",
    ),
    Mutant(
        "tvm_accepted_not_moved",
        TVM_CACHE,
        "order = [*path, *range(len(path), n)]",
        "order = list(range(n))",
        "shows in a batch whose last tree is a chain and another branches",
    ),
)
