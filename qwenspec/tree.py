"""A tree of plain values in which every key and every value knows where it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwenspec.diagnostics import Diagnostic, Location

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text, a number, true, false or null. `quoted` tells `"1"` from `1`."""

    value: str | int | float | bool | None
    location: Location
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class Entry:
    """A value under its key, and where the key was written."""

    key: Location
    value: Node


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys are text and unique."""

    entries: dict[str, Entry]
    location: Location

    def get(self, key: str) -> Node | None:
        """The value under `key`, or None."""
        return self.entries[key].value if key in self.entries else None


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file, and the mistakes that did not keep it from being parsed (duplicate keys, tags, …)."""

    root: Mapping
    diagnostics: tuple[Diagnostic, ...]


def plain(node: Node) -> Any:
    """The value without places; a list becomes a tuple."""
    match node:
        case Scalar(value=value):
            return value
        case Sequence(items=items):
            return tuple(plain(item) for item in items)
        case Mapping(entries=entries):
            return {key: plain(entry.value) for key, entry in entries.items()}


def walk(node: Node, path: Path_ = ()) -> Iterator[tuple[Path_, Node]]:
    """Every node below and including this one, with its path."""
    yield path, node
    if isinstance(node, Mapping):
        for key, entry in node.entries.items():
            yield from walk(entry.value, (*path, key))
    elif isinstance(node, Sequence):
        for index, item in enumerate(node.items):
            yield from walk(item, (*path, index))


def written(location: Location) -> str:
    """The source text that a location spans."""
    return location.text[location.column - 1 : location.column - 1 + location.width]


def at(node: Node | None, path: Path_) -> Node | None:
    """The value at `path`, or None."""
    for step in path:
        if isinstance(node, Mapping):
            node = node.get(str(step))
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            return None
    return node


def place(node: Node, path: Path_) -> Location:
    """Where the value at `path` was written; if absent, the key of the mapping that should have it."""
    location = node.location
    for step in path:
        if isinstance(node, Mapping) and step in node.entries:
            entry = node.entries[str(step)]
            node, location = entry.value, entry.key
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            location = node.location
        else:
            return location
    return node.location


# --------------------------------------------------------------------------------------------------- reading
