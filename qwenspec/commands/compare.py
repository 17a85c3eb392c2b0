"""`diff`: what changes from one model to another, as data and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import (
    Attention,
    EmbeddingHead,
    GatedMlp,
    Layer,
    Linear,
    LmHead,
    Param,
    RMSNorm,
)
from qwenspec.ir.render import diff
from qwenspec.spec.document import BESIDE, Spec

Data = dict[str, Any]
ADDRESSED = (Layer, Attention, GatedMlp, Linear, RMSNorm, Param, LmHead, EmbeddingHead)  # whose name is their address
NO_FACTS = ("name", "index", "family", "spec_file", "spec_sha256", *BESIDE)  # told elsewhere, or not what it computes


def differences(a: Spec, b: Spec) -> Data:
    """Every fact that differs: its path in the program, such as `layers.0.attention.window`, and what is there in `a`
    and in `b`. A side that has no such fact lacks the key."""
    before, after = _facts(a), _facts(b)
    absent = object()
    changed = [path for path in before | after if before.get(path, absent) != after.get(path, absent)]
    return {
        "a": a.variant,
        "b": b.variant,
        "differences": [
            {"path": path} | {side: facts[path] for side, facts in (("a", before), ("b", after)) if path in facts}
            for path in changed
        ],
    }


def differences_text(a: Spec, b: Spec) -> str:
    changes = diff(lower(a), lower(b)).rstrip()
    for key in BESIDE:
        before, after = (getattr(spec, key) for spec in (a, b))
        if before != after:
            old, new = (value.model_dump_json() if value else "none" for value in (before, after))
            changes += "\n" * bool(changes) + f"{key}\n      - {old}\n      + {new}"
    return changes or f"{a.variant} and {b.variant} compute the same function"


def _facts(spec: Spec) -> Data:
    """Path -> value, of the program and of what is beside the architecture."""
    model = lower(spec)
    beside = {key: value.model_dump(mode="json") if (value := getattr(spec, key)) else None for key in BESIDE}
    return {"num_layers": len(model.layers)} | dict(_of_node(model, "")) | beside


def _of_node(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        value, name = getattr(node, field.name), f"{path}.{field.name}".lstrip(".")
        if field.name in NO_FACTS:
            continue
        if field.name == "layers":
            for layer in value:
                yield from _of_node(layer, layer.name)
        elif isinstance(value, ADDRESSED):
            yield from _of_node(value, value.name)
        elif field.name == "rope":
            yield from _of_node(value, name)
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON has it; a dataclass says its kind."""
    if is_dataclass(value):
        return {"kind": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
