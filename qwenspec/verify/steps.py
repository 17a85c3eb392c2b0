"""A workload as data: what is done, step by step, to the sequences of a paged KV cache.

Steps can be kept as JSON and done again, by any contender (`qwenspec.verify.contenders`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

MOST_TOKENS = 1 << 14  # that a cache or a forward may have
Method = Literal["prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"]


@dataclass(frozen=True)
class CacheSizes:
    """Of a paged KV cache: tokens a page, pages, sequences, and tokens a forward.

    `evicts`: pages behind every layer's window are given back."""

    page_size: int
    pages: int
    max_batch_size: int
    chunk: int
    evicts: bool = False


@dataclass(frozen=True)
class Restart:
    """An empty cache of other sizes."""

    sizes: CacheSizes


@dataclass(frozen=True)
class Add:
    """An empty sequence. `prompt_length` is told in advance, for RoPE that follows the length."""

    seq: int
    prompt_length: int | None = None


@dataclass(frozen=True)
class Forward:
    """New tokens of some sequences, in the batch's order, through one method of the contract.

    `trees`: the new tokens of each sequence are a token tree, with these parents; the method is batch_verify."""

    tokens: Mapping[int, tuple[int, ...]]
    method: Method = "batch_verify"
    trees: Mapping[int, tuple[int, ...]] | None = None

    @property
    def ids(self) -> list[int]:
        """All new tokens, in the order of the batch."""
        return [token for own in self.tokens.values() for token in own]

    @property
    def lengths(self) -> list[int]:
        """How many new tokens each sequence has."""
        return [len(own) for own in self.tokens.values()]

    @property
    def ends(self) -> list[int]:
        """The row of each sequence's last new token."""
        return [end - 1 for end in accumulate(self.lengths)]

    @property
    def rows(self) -> list[int]:
        """Which of the new tokens the method gives logits for."""
        return list(range(len(self.ids))) if self.method == "batch_verify" else self.ends


@dataclass(frozen=True)
class Commit:
    """After a forward with trees: the leaf that each sequence keeps, with its ancestors; -1 keeps none."""

    leaves: Mapping[int, int]


@dataclass(frozen=True)
class Fork:
    """`child` starts with the first `at` tokens of `parent`."""

    parent: int
    child: int
    at: int


@dataclass(frozen=True)
class Popn:
    """The last n tokens are forgotten."""

    seq: int
    n: int


@dataclass(frozen=True)
class Remove:
    """A sequence goes, and its pages are free."""

    seq: int


@dataclass(frozen=True)
class Poison:
    """Every free page is filled with NaN, and pages come in another order from here on."""

    seed: int = 0


Step = Restart | Add | Forward | Commit | Fork | Popn | Remove | Poison
KINDS: dict[str, type[Step]] = {
    kind.__name__.lower(): kind for kind in (Restart, Add, Forward, Commit, Fork, Popn, Remove, Poison)
}


def path(parents: Sequence[int], leaf: int) -> list[int]:
    """The nodes of a token tree from a root to this leaf, itself included; of -1, none."""
    nodes: list[int] = []
    while leaf >= 0:
        nodes.append(leaf)
        leaf = parents[leaf]
    return nodes[::-1]


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each node of a token tree has."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def kind_of(step: Step) -> str:
    """`fork`, `forward.batch_decode`, `forward.tree`, …"""
    name = type(step).__name__.lower()
    if isinstance(step, Forward):
        return f"{name}.tree" if step.trees else f"{name}.{step.method}"
    return name


def to_data(step: Step) -> dict[str, Any]:
    """For JSON, whose keys are text: a mapping by sequence becomes a list of pairs."""
    data = {"step": type(step).__name__.lower()}
    return data | {field.name: _plain(getattr(step, field.name)) for field in dataclasses.fields(step)}


def from_data(data: Any) -> Step:
    """The step that to_data wrote. Raises KeyError, TypeError or ValueError for what it did not write."""
    kind, fields = KINDS[data["step"]], {name: value for name, value in data.items() if name != "step"}
    if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{data['step']} has no {unknown[0]!r}")
    if kind is Restart:
        sizes = CacheSizes(**fields["sizes"])
        check_sizes(sizes)
        return Restart(sizes)
    if kind is Forward:
        if fields["method"] not in get_args(Method):
            raise ValueError(f"there is no method {fields['method']!r}")
        trees = fields["trees"]
        forward = Forward(
            _by_sequence(fields["tokens"]), fields["method"], None if trees is None else _by_sequence(trees)
        )
        if len(forward.ids) > MOST_TOKENS:
            raise ValueError(f"a forward of more than {MOST_TOKENS:,} tokens is not verified")
        return forward
    if kind is Commit:
        return Commit({_number(seq): _number(leaf) for seq, leaf in fields["leaves"]})
    if kind is Add and fields["prompt_length"] is None:
        return Add(_number(fields["seq"]))
    numbers: dict[str, Any] = {name: _number(value) for name, value in fields.items()}
    return kind(**numbers)


def check_sizes(sizes: CacheSizes) -> None:
    """Raises ValueError for a cache that is larger than any that is drawn, or is none."""
    least = min(map(_number, (sizes.page_size, sizes.pages, sizes.max_batch_size, sizes.chunk)))
    if least < 1 or not isinstance(sizes.evicts, bool):
        raise ValueError("sizes of a cache are numbers above 0")
    if max(sizes.pages * sizes.page_size, sizes.chunk, sizes.max_batch_size) > MOST_TOKENS:
        raise ValueError(f"a cache of more than {MOST_TOKENS:,} tokens is not verified")


def _number(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 32:
        raise ValueError(f"{str(value)[:40]!r} is not a number, or too large")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, CacheSizes):
        return dataclasses.asdict(value)
    return [list(pair) for pair in value.items()] if isinstance(value, Mapping) else value


def _by_sequence(pairs: list[tuple[int, list[int]]]) -> dict[int, tuple[int, ...]]:
    return {_number(seq): tuple(map(_number, values)) for seq, values in pairs}
