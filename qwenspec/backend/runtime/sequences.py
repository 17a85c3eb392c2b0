"""Which page holds which tokens: the bookkeeping of a paged KV cache, in plain numbers on the host.

A page holds `page_size` consecutive tokens of one sequence, in every layer. Sequences share full pages only: what a
fork or a rollback needs of a page's beginning is copied at once, so that every page being filled has one owner.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .checks import check_integer

EVICTS = True  # flag: every layer slides, so pages behind the window can be given back
DYNAMIC_ROPE = True  # flag: the rotary frequencies depend on the sequence's length
FROZEN_ROPE = True  # flag: … and stay as the first forward chose them

MAX_TREE_SIZE = 256  # new tokens of one sequence in a token tree

PageCopy = tuple[int, int]  # a page, and the page that has to become its copy


class OutOfPages(RuntimeError):
    """The cache is full. It is left as it was: remove or shorten a sequence and call again."""


@dataclass
class Tree:
    """New tokens that continue a sequence in several ways at once: a node's ancestors are what precedes it."""

    parents: list[int]  # of each node an earlier one, or -1 where it follows the sequence itself
    depths: list[int] = field(init=False, default_factory=list)  # how many ancestors each node has

    def __post_init__(self) -> None:
        for parent in self.parents:
            self.depths.append(0 if parent < 0 else self.depths[parent] + 1)

    @property
    def branches(self) -> bool:
        """Whether some node does not follow the one before it."""
        return any(parent != node - 1 for node, parent in enumerate(self.parents))

    def path(self, node: int) -> list[int]:
        """The nodes from the root to this one; none of them for -1."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]


@dataclass
class CachedSequence:
    length: int = 0  # tokens, the new ones of an open forward included
    pages: list[int] = field(default_factory=list)
    tree: Tree | None = None  # its last tokens, until commit_tree says which of them stay
    if DYNAMIC_ROPE:
        prompt_length: int = 0  # as told to add, or 0
    if FROZEN_ROPE:
        rope_length: int = 0  # the length that chose the frequencies
    if EVICTS:
        evicted: int = 0  # leading pages given back, whose numbers are -1


@dataclass(frozen=True)
class Forward:
    """The sequences of a forward, in its order, and how many new tokens each has."""

    sequences: list[CachedSequence]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> list[int]:
        """Of each new token in its sequence. Tokens of a tree that have the same depth have the same position."""
        return [
            sequence.length - n + offset
            for sequence, n in zip(self.sequences, self.lengths, strict=True)
            for offset in (sequence.tree.depths if sequence.tree else range(n))
        ]

    if DYNAMIC_ROPE:

        def rope_lengths(self) -> list[int]:
            """The length of sequence that chooses each new token's rotary frequencies.

            [not FROZEN_ROPE] That with all new tokens; in a tree that of the token's own path, as if the path had been
            [not FROZEN_ROPE] decoded token by token. At least the prompt's.
            [FROZEN_ROPE] That of the sequence's first forward, or the prompt's if that is longer."""
            lengths: list[int] = []
            for sequence, n in zip(self.sequences, self.lengths, strict=True):
                if FROZEN_ROPE:
                    lengths += [sequence.rope_length] * n
                elif sequence.tree:
                    start = sequence.length - n
                    lengths += [max(sequence.prompt_length, start + depth + 1) for depth in sequence.tree.depths]
                else:
                    lengths += [max(sequence.prompt_length, sequence.length)] * n
            return lengths


class Sequences:
    """The sequences of one cache. A call that raises has changed nothing."""

    def __init__(
        self,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int,
        evict_window: int | None = None,
    ) -> None:
        """Room for max_batch_size sequences in ceil(max_total_seq_len / page_size) pages.

        A forward takes at most `prefill_chunk_size` tokens, or one token of each sequence.
        [EVICTS] evict_window: give pages back that no query of this window sees any more; None: keep them."""
        check_integer("max_batch_size", max_batch_size, least=1)
        check_integer("max_total_seq_len", max_total_seq_len, least=1)
        check_integer("prefill_chunk_size", prefill_chunk_size, least=1)
        check_integer("page_size", page_size, least=1)
        self.max_batch_size = max_batch_size
        self.max_tokens = max(prefill_chunk_size, max_batch_size)
        self.page_size = page_size
        self.num_pages = -(-max_total_seq_len // page_size)
        self.forward: Forward | None = None  # between begin_forward and end_forward or cancel_forward
        self.waiting: list[tuple[int, CachedSequence]] = []  # ids and sequences of the last forward, if it had trees
        self._sequences: dict[int, CachedSequence] = {}
        # Low pages go first, so that a lone sequence lies in one piece.
        self._given_back: list[int] = []  # a heap
        self._unused = 0  # this page and those after it were never taken
        self._users: Counter[int] = Counter()  # sequences that hold a page
        if EVICTS:
            self._evict_window = evict_window

    def add(self, seq_id: int, prompt_length: int | None = None) -> None:
        """Start an empty sequence."""
        check_integer("a sequence's id", seq_id)
        self._check_new(seq_id)
        if prompt_length is not None:
            check_integer("prompt_length", prompt_length, least=1)
        sequence = CachedSequence()
        if DYNAMIC_ROPE:
            sequence.prompt_length = prompt_length or 0
        self._sequences[seq_id] = sequence

    def remove(self, seq_id: int) -> None:
        """Forget a sequence and give its pages back. Those of a tree's sequence wait for the rest of its batch."""
        sequence = self._sequence(seq_id)
        self._check_closed(seq_id, sequence)
        del self._sequences[seq_id]
        if sequence.tree is None:
            self._give_back(sequence)
        elif not any(map(self._is_held, self.waiting)):
            self.commit([[] for _ in self.waiting])

    def fork(self, parent: int, child: int, at: int) -> PageCopy | None:
        """`child` starts with the first `at` tokens of `parent` (-1: all)."""
        source = self._settled(parent)
        check_integer("a sequence's id", child)
        self._check_new(child)
        check_integer("the number of tokens to fork at", at)
        at = source.length if at < 0 else at
        if at > source.length:
            raise ValueError(f"cannot fork sequence {parent} at {at}: it has {source.length} tokens")
        if EVICTS:
            self._check_window(source, at)
        full, rest = divmod(at, self.page_size)
        self._check_free(1 if rest else 0, self.free_pages)
        copy = CachedSequence(at, source.pages[:full])
        if DYNAMIC_ROPE:
            copy.prompt_length = source.prompt_length
        if FROZEN_ROPE:
            copy.rope_length = source.rope_length
        if EVICTS:
            copy.evicted = source.evicted
        self._users.update(copy.pages[copy.evicted :] if EVICTS else copy.pages)
        self._sequences[child] = copy
        if not rest:
            return None
        copy.pages.append(self._take_page())
        return source.pages[full], copy.pages[full]

    def popn(self, seq_id: int, n: int) -> PageCopy | None:
        """Forget the last n tokens."""
        sequence = self._settled(seq_id)
        check_integer("the number of tokens to remove", n)
        if not 0 <= n <= sequence.length:
            raise ValueError(f"cannot remove {n} tokens of sequence {seq_id}: it has {sequence.length}")
        if EVICTS:
            self._check_window(sequence, sequence.length - n)
        full, rest = divmod(sequence.length - n, self.page_size)
        shared = rest > 0 and self._users[sequence.pages[full]] > 1
        if shared:
            freed = sum(self._users[page] == 1 for page in sequence.pages[full + 1 :])
            self._check_free(1, self.free_pages + freed)
        sequence.length -= n
        self._give_back(sequence, full + 1 if rest else full)
        if not shared:
            return None
        old, new = sequence.pages[full], self._take_page()
        self._users[old] -= 1
        sequence.pages[full] = new
        return old, new

    def begin_forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], tree_parents: Sequence[int] | None = None
    ) -> Forward:
        """Make room for lengths[i] new tokens of sequence seq_ids[i]."""
        sequences = self._check_forward(seq_ids, lengths)
        trees = None if tree_parents is None else self._check_trees(seq_ids, lengths, tree_parents)
        growth = [-(-(s.length + n) // self.page_size) - len(s.pages) for s, n in zip(sequences, lengths, strict=True)]
        free = self.free_pages
        if EVICTS:
            free += self._evictable(sequences)
        self._check_free(sum(growth), free)
        if EVICTS:
            for sequence in sequences:
                self._evict(sequence)
        for i, (sequence, pages, n) in enumerate(zip(sequences, growth, lengths, strict=True)):
            sequence.pages += [self._take_page() for _ in range(pages)]
            if FROZEN_ROPE and sequence.length == 0:  # the first forward chooses for good
                longest = max(trees[i].depths) + 1 if trees else n
                sequence.rope_length = max(sequence.prompt_length, longest)
            sequence.length += n
            sequence.tree = trees[i] if trees else None
        self.waiting = list(zip(seq_ids, sequences, strict=True)) if trees else []
        self.forward = Forward(sequences, list(lengths))
        return self.forward

    def end_forward(self) -> None:
        """Close what begin_forward opened."""
        self.forward = None

    def cancel_forward(self) -> None:
        """Close what begin_forward opened, and take its new tokens back.

        [EVICTS] Pages that it gave back behind the window stay so: they are gone."""
        if self.forward is None:
            return
        for sequence, n in zip(self.forward.sequences, self.forward.lengths, strict=True):
            sequence.length -= n
            sequence.tree = None
            self._give_back(sequence, -(-sequence.length // self.page_size))
        self.waiting = []
        self.forward = None

    def check_open(self, tokens: int, sequences: int | None = None) -> None:
        """A forward must be open, with this many new tokens, and of this many sequences where that is said."""
        if self.forward is None:
            raise RuntimeError("no forward is open: call begin_forward(seq_ids, lengths) first")
        if self.forward.tokens != tokens:
            raise ValueError(f"{tokens} tokens are given, and begin_forward made room for {self.forward.tokens}")
        if sequences not in (None, len(self.forward.sequences)):
            raise ValueError(
                f"the open forward has {len(self.forward.sequences)} sequences, and this method takes {sequences}: "
                "batch_prefill takes any"
            )

    def accepted_paths(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> list[list[int]]:
        """The nodes that stay of each tree of `waiting`, in its order, for a leaf (-1: none stays) of each sequence."""
        if not self.waiting:
            raise ValueError("no token tree is to be committed: begin_forward had no tree_parents")
        if len(seq_ids) != len(leaves):
            raise ValueError(f"{len(seq_ids)} sequences with {len(leaves)} leaves")
        held = [seq_id for seq_id, sequence in filter(self._is_held, self.waiting)]
        if sorted(seq_ids) != sorted(held):
            raise ValueError(
                f"commit_tree is told of sequences {list(seq_ids)}, and the last forward had trees of {held}: "
                "name each of them once, with leaf -1 to keep none of its new tokens"
            )
        chosen = dict(zip(seq_ids, leaves, strict=True))
        paths = []
        for seq_id, sequence in self.waiting:
            self._check_closed(seq_id, sequence)
            leaf = chosen[seq_id] if self._is_held((seq_id, sequence)) else -1
            check_integer("a leaf", leaf)
            assert sequence.tree is not None
            size = len(sequence.tree.parents)
            if not -1 <= leaf < size:
                raise ValueError(f"leaf {leaf} of sequence {seq_id}: its tree has nodes 0 … {size - 1}, and -1 is none")
            paths.append(sequence.tree.path(leaf))
        return paths

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the first len(path) tokens of each tree of `waiting`, whose keys and values are by now the path's."""
        for (seq_id, sequence), path in zip(self.waiting, paths, strict=True):
            assert sequence.tree is not None
            sequence.length -= len(sequence.tree.parents) - len(path)
            sequence.tree = None
            held = self._is_held((seq_id, sequence))
            self._give_back(sequence, -(-sequence.length // self.page_size) if held else 0)
        self.waiting = []

    def length(self, seq_id: int) -> int:
        """Tokens in a sequence."""
        return self._sequence(seq_id).length

    @property
    def free_pages(self) -> int:
        return len(self._given_back) + self.num_pages - self._unused

    # ------------------------------------------------------------------------------------------------- checks

    def _sequence(self, seq_id: int) -> CachedSequence:
        if seq_id not in self._sequences:
            raise KeyError(f"the cache has no sequence {seq_id}; it has {sorted(self._sequences) or 'none'}")
        return self._sequences[seq_id]

    def _settled(self, seq_id: int) -> CachedSequence:
        """A sequence whose tokens are all there for good."""
        sequence = self._sequence(seq_id)
        if sequence.tree:
            raise RuntimeError(f"sequence {seq_id} ends in a token tree: call commit_tree first")
        self._check_closed(seq_id, sequence)
        return sequence

    def _check_closed(self, seq_id: int, sequence: CachedSequence) -> None:
        if self.forward and any(sequence is one for one in self.forward.sequences):
            raise RuntimeError(f"sequence {seq_id} is part of the open forward: call end_forward first")

    def _is_held(self, waiting: tuple[int, CachedSequence]) -> bool:
        """Whether a sequence that waits for commit_tree has not been removed."""
        return self._sequences.get(waiting[0]) is waiting[1]

    def _check_new(self, seq_id: int) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id} exists already")
        if len(self._sequences) == self.max_batch_size:
            raise ValueError(f"the cache holds its {self.max_batch_size} sequences: raise max_batch_size")

    def _check_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> list[CachedSequence]:
        if self.forward:
            raise RuntimeError(
                "a forward is open already: call end_forward when its logits are there, or cancel_forward if it failed"
            )
        if len(seq_ids) != len(lengths) or not seq_ids:
            raise ValueError(f"{len(seq_ids)} sequences with {len(lengths)} lengths")
        if len(set(seq_ids)) != len(seq_ids):
            raise ValueError(f"a sequence appears twice in {list(seq_ids)}")
        for length in lengths:
            check_integer("the number of a sequence's new tokens", length)
        if min(lengths) < 1:
            raise ValueError("a sequence of a forward needs a new token: to see a cached prompt's logits, popn 1")
        if sum(lengths) > self.max_tokens:
            raise ValueError(f"{sum(lengths)} tokens in one forward, at most {self.max_tokens}: prefill in chunks")
        if self.waiting:
            waiting = [seq_id for seq_id, _ in filter(self._is_held, self.waiting)]
            raise RuntimeError(f"sequences {waiting} end in token trees: call commit_tree first")
        return [self._sequence(seq_id) for seq_id in seq_ids]

    def _check_trees(self, seq_ids: Sequence[int], lengths: Sequence[int], parents: Sequence[int]) -> list[Tree]:
        if len(parents) != sum(lengths):
            raise ValueError(f"tree_parents has {len(parents)} entries for {sum(lengths)} tokens")
        trees, start = [], 0
        for seq_id, n in zip(seq_ids, lengths, strict=True):
            if n > MAX_TREE_SIZE:
                raise ValueError(f"a token tree of {n} tokens for sequence {seq_id}, at most {MAX_TREE_SIZE}")
            own = list(parents[start : start + n])
            start += n
            for node, parent in enumerate(own):
                check_integer("a parent in tree_parents", parent)
                if not -1 <= parent < node:
                    raise ValueError(
                        f"token {node} of sequence {seq_id} has the parent {parent}: a parent is an earlier token of "
                        "the same sequence's new ones, counted from 0, or -1"
                    )
            trees.append(Tree(own))
        return trees

    # -------------------------------------------------------------------------------------------------- pages

    def _check_free(self, needed: int, free: int) -> None:
        if needed > free:
            raise OutOfPages(
                f"{needed} more of {self.num_pages} pages of {self.page_size} tokens needed, {free} free: "
                "remove sequences, or raise max_total_seq_len"
            )

    def _take_page(self) -> int:
        if self._given_back:
            page = heapq.heappop(self._given_back)
        else:
            page = self._unused
            self._unused += 1
        self._users[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                heapq.heappush(self._given_back, page)

    def _give_back(self, sequence: CachedSequence, kept: int = 0) -> None:
        """All pages of a sequence but the first `kept`."""
        self._release(sequence.pages[max(kept, sequence.evicted) if EVICTS else kept :])
        del sequence.pages[kept:]

    if EVICTS:

        def _behind_window(self, sequence: CachedSequence) -> range:
            """Indices of the pages still held that no query from `length` on can see."""
            if self._evict_window is None:
                return range(0)
            first_visible = max(sequence.length - self._evict_window + 1, 0)
            return range(sequence.evicted, first_visible // self.page_size)

        def _evictable(self, sequences: Sequence[CachedSequence]) -> int:
            """How many pages these sequences would free."""
            dropped = Counter(s.pages[i] for s in sequences for i in self._behind_window(s))
            return sum(count == self._users[page] for page, count in dropped.items())

        def _evict(self, sequence: CachedSequence) -> None:
            for i in self._behind_window(sequence):
                self._release([sequence.pages[i]])
                sequence.pages[i] = -1
                sequence.evicted = i + 1

        def _check_window(self, sequence: CachedSequence, tokens: int) -> None:
            first = tokens - self._evict_window + 1 if self._evict_window else 0
            if sequence.evicted and first < sequence.evicted * self.page_size:
                raise ValueError(
                    f"{tokens} tokens: the pages before {sequence.evicted * self.page_size} were given back"
                )
