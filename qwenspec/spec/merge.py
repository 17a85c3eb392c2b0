"""Laying one mapping over another: what `extends` and variants mean."""

from __future__ import annotations

from qwenspec.spec.shape import DISCRIMINATORS
from qwenspec.tree import Entry, Mapping, Node, Scalar


def merge(base: Node | None, overlay: Node) -> Node:
    """Mappings are merged key by key; anything else, null and lists included, replaces what was there.

    A mapping of another kind (`kind: yarn` over `kind: linear`) replaces the base's whole: its keys mean something
    else. Every value keeps the place where it was written.
    """
    if not isinstance(base, Mapping) or not isinstance(overlay, Mapping) or _kinds_differ(base, overlay):
        return overlay
    entries = dict(base.entries)
    for key, entry in overlay.entries.items():
        entries[key] = Entry(entry.key, merge(base.get(key), entry.value))
    return Mapping(entries, overlay.location)


def _kinds_differ(base: Mapping, overlay: Mapping) -> bool:
    pairs = ((base.get(key), overlay.get(key)) for key in DISCRIMINATORS)
    return any(isinstance(a, Scalar) and isinstance(b, Scalar) and a.value != b.value for a, b in pairs)
