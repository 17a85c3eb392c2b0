"""Laying one mapping over another: what `extends` and variants mean."""

from __future__ import annotations

from qwenspec.spec.shape import DISCRIMINATORS
from qwenspec.tree import Entry, Mapping, Node, Scalar


def merge(base: Node | None, overlay: Node, key: str = "") -> Node:
    """Mappings are merged key by key; anything else, null and lists included, replaces what was there.

    A mapping of another kind (`kind: yarn` over `kind: linear`) replaces the base's whole: its keys mean something
    else. Every value keeps the place where it was written. `key`: what they are the values of.
    """
    if not isinstance(base, Mapping) or not isinstance(overlay, Mapping) or _kinds_differ(base, overlay, key):
        return overlay
    entries = dict(base.entries)
    for name, entry in overlay.entries.items():
        entries[name] = Entry(entry.key, merge(base.get(name), entry.value, name))
    return Mapping(entries, overlay.location)


def _kinds_differ(base: Mapping, overlay: Mapping, key: str) -> bool:
    kinds = (name for name in DISCRIMINATORS if name != "dtype" or key == "kv_cache")  # elsewhere it is a plain value
    pairs = ((base.get(name), overlay.get(name)) for name in kinds)
    return any(isinstance(a, Scalar) and isinstance(b, Scalar) and a.value != b.value for a, b in pairs)
