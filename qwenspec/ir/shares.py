"""How the ranks of tensor parallelism share a model's parameters, in plain numbers.

Query heads are shared evenly. Key/value heads go with the query heads that read them: a rank has one for every run of
query heads that share it, so that a head may be on several ranks. The MLP's width and the vocabulary need not divide:
every rank has as much room, and what the last ones do not fill is zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Rows or columns that ranks share, in units which are not cut.

    readers: of units that are heads, the query heads that read each of them: 1 for query heads themselves
        0: of other units, whose number need not divide by that of the ranks
    """

    size: int
    unit: int
    readers: int

    def share(self, degree: int) -> int:
        """Rows or columns on each of `degree` ranks."""
        if self.readers:
            return self._heads(degree)[0] * self.unit
        units = -(-self.size // self.unit)
        return -(-units // degree) * self.unit if degree > 1 else self.size

    def held(self, degree: int, rank: int) -> Iterator[range]:
        """Those that a rank holds, in their order; together no more than its share."""
        if self.readers:
            slots, readers = self._heads(degree)
            for slot in range(slots):
                head = (rank * slots + slot) * readers // self.readers
                yield range(head * self.unit, (head + 1) * self.unit)
        else:
            share = self.share(degree)
            yield range(min(rank * share, self.size), min((rank + 1) * share, self.size))

    def _heads(self, degree: int) -> tuple[int, int]:
        """Heads on each rank, and how many of its query heads read each."""
        queries = self.size // self.unit * self.readers // degree
        readers = math.gcd(queries, self.readers)
        return queries // readers, readers


@dataclass(frozen=True)
class Piece:
    """Consecutive rows or columns of a parameter, and where in a rank's share they begin."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Shared:
    """A parameter [rows] or [rows, columns] and how ranks share it.

    rows: from the top, each part shared on its own; none: every rank has all
    columns: every rank has all if None
    first: rank 0 has all rows, and the others have zeros
    block: rows and columns that share a scale, if the parameter is quantised; 0 columns: whole rows
    ordered: its columns belong to groups in an order of their own
    token_scales: what it multiplies is rounded with one scale for all inputs of a token
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Part, ...] = ()
    columns: Part | None = None
    first: bool = False
    block: tuple[int, int] | None = None
    ordered: bool = False
    token_scales: bool = False

    def share(self, degree: int) -> tuple[int, ...]:
        """The shape on each of `degree` ranks."""
        rows = sum(part.share(degree) for part in self.rows) if self.rows else self.shape[0]
        return (rows, self.columns.share(degree)) if self.columns else (rows, *self.shape[1:])

    def row_pieces(self, degree: int, rank: int) -> list[Piece]:
        """The rows that a rank holds."""
        if not self.rows:
            return [Piece(0, self.shape[0], 0)] if rank == 0 or not self.first else []
        pieces: list[Piece] = []
        start = at = 0
        for part in self.rows:
            filled = at
            for held in part.held(degree, rank):
                pieces += [Piece(start + held.start, start + held.stop, filled)] if held else []
                filled += len(held)
            start, at = start + part.size, at + part.share(degree)
        return _joined(pieces)

    def column_piece(self, degree: int, rank: int) -> Piece:
        """The columns that a rank holds."""
        if self.columns is None:
            return Piece(0, math.prod(self.shape[1:]), 0)
        held = list(self.columns.held(degree, rank))  # of query heads, which are next to one another, or one range
        return Piece(held[0].start, held[-1].stop, 0)


def read_shared(entries: Iterable[Mapping[str, Any]]) -> list[Shared]:
    """The parameters of MANIFEST.json."""
    return [read_entry(entry) for entry in entries]


def read_entry(entry: Mapping[str, Any]) -> Shared:
    """One of them: it says `rows`, `columns` or `rank: 0`, or none of these if every rank has all of it."""
    format: Mapping[str, Any] = entry.get("format", {})
    block = format.get("block") or (1, format.get("group_size") or 0)
    return Shared(
        name=entry["name"],
        shape=tuple(entry["shape"]),
        rows=tuple(Part(*part) for part in entry.get("rows", ())),
        columns=Part(*entry["columns"]) if "columns" in entry else None,
        first="rank" in entry,
        block=tuple(block) if format else None,
        ordered=format.get("act_order", False),
        token_scales=format.get("activations") == "dynamic" and not block[1],
    )


def legal_degrees(parameters: Sequence[Shared]) -> list[int]:
    """Every number of ranks that can share the parameters, ascending; 1 is always among them."""
    queries = [part.size // part.unit for shared in parameters for part in shared.rows if part.readers == 1]
    return [degree for degree in _divisors(math.gcd(*queries)) if not obstacles(parameters, degree)]


def obstacles(parameters: Iterable[Shared], degree: int) -> list[str]:
    """Every reason why so many ranks cannot share the parameters."""
    if degree < 1:
        return [f"a tensor-parallel degree counts ranks, from 1 on; found {degree}"]
    if degree == 1:
        return []
    parameters = list(parameters)
    reasons = [reason for shared in parameters for reason in _uneven(shared, degree)]
    reasons = reasons or [reason for shared in parameters for reason in _cuts(shared, degree)]
    return list(dict.fromkeys(reasons))  # what holds of every layer is said once


def explanation(parameters: Sequence[Shared]) -> str:
    """Which numbers of ranks can share the parameters, for people."""
    return "degrees that work: " + ", ".join(map(str, legal_degrees(parameters)))


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def cut(pieces: Iterable[Piece], sizes: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    """Pieces of rows that lie in sources of these sizes, one below the other: the source, and the piece in it."""
    for piece in pieces:
        top = 0
        for source, size in enumerate(sizes):
            start, stop = max(piece.start, top), min(piece.stop, top + size)
            if start < stop:
                yield source, Piece(start - top, stop - top, piece.at + start - piece.start)
            top += size


def title(shared: Shared) -> str:
    """Its module, in any layer."""
    return re.sub(r"layers\.(\d+|\{i\})\.", "layers.*.", shared.name).removesuffix(".weight")


def _uneven(shared: Shared, degree: int) -> Iterator[str]:
    """Query heads that are left over; a bias goes with its matrix."""
    for part in shared.rows if len(shared.shape) > 1 else ():
        if part.readers == 1 and part.size // part.unit % degree:
            heads = part.size // part.unit
            yield f"{title(shared)}: {heads} query heads cannot be shared evenly by {degree} ranks"


def _cuts(shared: Shared, degree: int) -> Iterator[str]:
    """What ranks would cut that shares a scale: blocks of rows, groups and blocks of columns."""
    if shared.block is None:
        return
    height, width = shared.block
    pieces = [piece for rank in range(degree) for piece in shared.row_pieces(degree, rank)]
    ends = {piece.stop for piece in pieces} - {shared.shape[0]}
    if shared.rows and any(row % height for row in ends.union(*((piece.start, piece.at) for piece in pieces))):
        yield f"{title(shared)}: {degree} ranks would cut its blocks of {height} rows"
    if shared.columns is None:
        return
    inputs = shared.columns.share(degree)
    if shared.token_scales:
        yield f"{title(shared)}: a token's inputs share a scale, and {degree} ranks would each have some of them"
    elif shared.ordered:
        yield f"{title(shared)}: desc_act puts inputs of all {degree} ranks into one group"
    elif width and inputs % width:
        yield f"{title(shared)}: {inputs} inputs on each of {degree} ranks are not a multiple of its groups of {width}"


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours that go on where the one before ends, as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and piece.start == last.stop and piece.at == last.at + last.stop - last.start:
            joined[-1] = Piece(last.start, piece.stop, last.at)
        else:
            joined.append(piece)
    return joined
