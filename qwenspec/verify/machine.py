"""Random workloads: what a serving engine may do with a paged KV cache, drawn step by step by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from qwenspec.backend.runtime.machine import out_of_memory
from qwenspec.verify.case import Case
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Method, Poison, Popn, Remove, Restart, path

MAX_LENGTH = 72  # of a sequence, in tokens, where nothing else is asked for
MAX_TREE = 10
PREFILLS: tuple[Method, ...] = ("batch_verify", "batch_prefill", "prefill")
Tokens = dict[int, tuple[int, ...]]


class OutOfMemory(BaseException):
    """Ends a search at once: Hypothesis runs an Exception many times, to make it small."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextmanager
def unshrunk() -> Iterator[None]:
    """No memory is the machine's trouble."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(error) from error
        raise


class Workload(RuleBasedStateMachine):
    """One case, and steps on it. `workload` makes the class that Hypothesis runs."""

    cases: st.SearchStrategy[Case]
    sizes: st.SearchStrategy[CacheSizes]
    ledger: Ledger
    on_start: Callable[[Session], None]
    on_disagreement: Callable[[Disagreement], None]
    max_length: int  # of a sequence, in tokens

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.case = data.draw(self.cases, "case")
        self.disagreed = False
        with unshrunk():
            self.session = Session(self.case, self.ledger)
        self.on_start(self.session)
        self.begin(data, self.case.sizes)

    def begin(self, data: st.DataObject, sizes: CacheSizes) -> None:
        """A cache, every page of which holds NaN, and one sequence. There is always one, so that a rule always fits."""
        self.cache_sizes = sizes
        self.tokens: dict[int, list[int]] = {}  # of each sequence
        self.preempted: list[list[int]] = []  # tokens of sequences that had to make room
        self.drawn = self.clean_since = 0  # tokens, in all, and before pages were last poisoned
        self.do(Poison(self.case.seed))
        self.arrive(data)

    def do(self, step: Any) -> bool:
        try:
            with unshrunk():
                return self.session.do(step)
        except OutOfMemory:
            self.disagreed = True
            raise
        except Disagreement as disagreement:
            self.disagreed = True
            self.on_disagreement(disagreement)
            raise

    def teardown(self) -> None:
        """Ends with an empty cache, all of whose pages must be free again."""
        if hasattr(self, "session") and not self.disagreed:
            self.do(Restart(self.cache_sizes))

    # ------------------------------------------------------------------------------------------------ sequences

    @precondition(lambda self: self.has_room())
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """A new sequence, and the first chunk of its prompt."""
        seq = self.new_id()
        self.do(Add(seq, data.draw(st.none() | st.integers(1, self.max_length), "prompt length told")))
        self.tokens[seq] = []
        self.prefill_some(data, seq)

    @precondition(lambda self: self.has_room())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Both go on."""
        parent, child = data.draw(st.sampled_from(sorted(self.tokens)), "parent"), self.new_id()
        at = self.some_length(data, parent)
        if self.do(Fork(parent, child, at)):
            self.tokens[child] = self.tokens[parent][:at]
            self.decode_batch(data, [child, parent])

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """And the sequence goes on otherwise."""
        seq = data.draw(st.sampled_from(sorted(self.tokens)), "sequence")
        if self.forget(seq, len(self.tokens[seq]) - self.some_length(data, seq)):
            self.prefill_some(data, seq)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.remove_one(data)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.preempted.append(self.remove_one(data))

    @precondition(lambda self: self.preempted and self.has_room())
    @rule()
    def resume(self) -> None:
        """Its tokens are computed again, in one prefill or in several."""
        tokens, seq = self.preempted.pop(), self.new_id()
        self.do(Add(seq, len(tokens) or None))
        self.tokens[seq] = []
        chunk = self.cache_sizes.chunk
        for start in range(0, len(tokens), chunk):
            if not self.forward({seq: tuple(tokens[start : start + chunk])}):
                return

    # ------------------------------------------------------------------------------------------------- forwards

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        self.prefill_some(data, data.draw(st.sampled_from(sorted(self.tokens)), "sequence"))

    def prefill_some(self, data: st.DataObject, seq: int) -> None:
        """A chunk of one sequence; often up to where a page or a window ends, or a token to either side."""
        length = len(self.tokens[seq])
        most = min(self.cache_sizes.chunk, self.max_length - length)
        if most < 1:
            return
        ends = {edge + side for edge in self.edges() for side in (-1, 0, 1)}
        reachable = sorted(end - length for end in ends if 0 < end - length <= most)
        some = st.integers(1, most)
        n = data.draw(some | st.sampled_from(reachable) if reachable else some, "tokens")
        method = data.draw(st.sampled_from(PREFILLS), "method")
        self.forward({seq: self.new_tokens(n)}, method)

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        self.decode_batch(data, self.some_sequences(data))

    def decode_batch(self, data: st.DataObject, batch: list[int]) -> None:
        """A token of each sequence."""
        batch = [seq for seq in batch if len(self.tokens[seq]) < self.max_length]
        if batch:
            alone: tuple[Method, ...] = ("decode",) if len(batch) == 1 else ()
            method = data.draw(st.sampled_from(("batch_decode", "batch_verify", *alone)), "method")
            self.forward({seq: self.new_tokens(1) for seq in batch}, method)

    @rule(data=st.data())
    def mix(self, data: st.DataObject) -> None:
        """Chunks of different lengths and single tokens, in one batch."""
        batch = self.some_sequences(data)
        most = self.cache_sizes.chunk // len(batch)
        if most < 1:
            return
        lengths = [data.draw(st.integers(1, most), "tokens") for _ in batch]
        wanted = {seq: n for seq, n in zip(batch, lengths, strict=True) if len(self.tokens[seq]) + n <= self.max_length}
        if wanted:
            method = data.draw(st.sampled_from(PREFILLS[:2]), "method")
            self.forward({seq: self.new_tokens(n) for seq, n in wanted.items()}, method)

    @precondition(lambda self: self.cache_sizes.chunk > 1)
    @rule(data=st.data())
    def speculate(self, data: st.DataObject) -> None:
        """Draft tokens are verified, and those from the first wrong one on are forgotten."""
        seq = data.draw(st.sampled_from(sorted(self.tokens)), "sequence")
        most = min(self.cache_sizes.chunk, 6, self.max_length - len(self.tokens[seq]))
        if most < 1:
            return
        n = data.draw(st.integers(1, most), "drafts")
        if self.forward({seq: self.new_tokens(n)}):
            self.forget(seq, data.draw(st.integers(0, n), "wrong"))

    @precondition(lambda self: self.cache_sizes.chunk > 1)
    @rule(data=st.data())
    def grow_trees(self, data: st.DataObject) -> None:
        """Of each tree a path is kept, or none; some sequences go before that."""
        batch = self.some_sequences(data)
        most = min(self.cache_sizes.chunk // len(batch), MAX_TREE)
        batch = [seq for seq in batch if len(self.tokens[seq]) + most <= self.max_length]
        if most < 1 or not batch:
            return
        trees: Tokens = {}
        for seq in batch:
            size = data.draw(st.integers(1, most), "size")
            trees[seq] = tuple(data.draw(st.integers(-1, node - 1), "parent") for node in range(size))
        tokens = {seq: self.new_tokens(len(parents)) for seq, parents in trees.items()}
        if not self.do(Forward(tokens, "batch_verify", trees)):
            return
        for seq in data.draw(st.sets(st.sampled_from(batch), max_size=len(batch) - 1), "removed meanwhile"):
            self.do(Remove(seq))
            del self.tokens[seq], trees[seq]
        order = data.draw(st.permutations(sorted(trees)), "order")
        leaves = {seq: data.draw(st.integers(-1, len(trees[seq]) - 1), "leaf") for seq in order}
        self.do(Commit(leaves))
        for seq, leaf in leaves.items():
            self.tokens[seq] += [tokens[seq][node] for node in path(trees[seq], leaf)]

    # ---------------------------------------------------------------------------------------------------- cache

    @precondition(lambda self: self.drawn > self.clean_since + 20)
    @rule(seed=st.integers(0, 99))
    def poison(self, seed: int) -> None:
        self.clean_since = self.drawn
        self.do(Poison(seed))

    @precondition(lambda self: self.drawn > 100)
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        sizes = data.draw(self.sizes, "sizes")
        self.do(Restart(sizes))
        self.begin(data, sizes)

    # -------------------------------------------------------------------------------------------------- helpers

    def forward(self, tokens: Tokens, method: Method = "batch_verify") -> bool:
        if not self.do(Forward(tokens, method)):
            return False
        for seq, ids in tokens.items():
            self.tokens[seq] += ids
        return True

    def forget(self, seq: int, n: int) -> bool:
        """The last n tokens of a sequence. False when nobody can."""
        if not self.do(Popn(seq, n)):
            return False
        self.tokens[seq] = self.tokens[seq][: len(self.tokens[seq]) - n]
        return True

    def remove_one(self, data: st.DataObject) -> list[int]:
        """A sequence goes, and if it was the last, another comes. The tokens of the one that went."""
        seq = data.draw(st.sampled_from(sorted(self.tokens)), "sequence")
        self.do(Remove(seq))
        tokens = self.tokens.pop(seq)
        if not self.tokens:
            self.arrive(data)
        return tokens

    def has_room(self) -> bool:
        return len(self.tokens) < self.cache_sizes.max_batch_size

    def new_id(self) -> int:
        return next(seq for seq in range(len(self.tokens) + 1) if seq not in self.tokens)

    def new_tokens(self, n: int) -> tuple[int, ...]:
        """Any n tokens: which they are is not what is drawn."""
        vocabulary = self.case.spec.architecture.vocab_size
        first, self.drawn = self.drawn, self.drawn + n
        return tuple((7919 * i + 104729 * (i // 7) + self.case.seed) % vocabulary for i in range(first, self.drawn))

    def some_length(self, data: st.DataObject, seq: int) -> int:
        """Up to a sequence's; often where a page begins."""
        length, size = len(self.tokens[seq]), self.cache_sizes.page_size
        page_starts = st.integers(0, length // size).map(lambda page: page * size)
        return data.draw(page_starts | st.integers(0, length), "length")

    def some_sequences(self, data: st.DataObject) -> list[int]:
        """Some, in any order."""
        return data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True), "sequences")

    def edges(self) -> set[int]:
        """Lengths at which something changes: where a page, the window or a RoPE's training length is full."""
        arch = self.case.spec.architecture
        window, logn = arch.attention.sliding_window, arch.attention.logn
        edges = set(range(self.cache_sizes.page_size, self.max_length, self.cache_sizes.page_size))
        edges |= {window.window} if window else set()
        edges |= {logn.train_length} if logn else set()
        for name in ("train_length", "original_max_position_embeddings"):
            length = getattr(arch.rope.scaling, name, None)
            edges |= {length << i for i in range(4)} if length else set()
        return edges


def workload(
    cases: st.SearchStrategy[Case],
    sizes: st.SearchStrategy[CacheSizes],
    ledger: Ledger,
    on_start: Callable[[Session], None],
    on_disagreement: Callable[[Disagreement], None],
    max_length: int,
) -> type[Workload]:
    """The state machine of these cases, for hypothesis.stateful.run_state_machine_as_test.

    `on_start` is told of every example that begins, `on_disagreement` of every disagreement: of those that Hypothesis
    finds on its way to the smallest one too, which comes last."""
    members = {
        "cases": cases,
        "sizes": sizes,
        "ledger": ledger,
        "on_start": staticmethod(on_start),
        "on_disagreement": staticmethod(on_disagreement),
        "max_length": max_length,
    }
    return type("Workload", (Workload,), members)
