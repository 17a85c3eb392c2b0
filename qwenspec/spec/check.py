"""The merged tree of one variant -> a Spec, and everything that is wrong with it."""

from __future__ import annotations

from itertools import islice
from typing import Any

from pydantic import ValidationError

from qwenspec.diagnostics import Diagnostic, Location, SpecError
from qwenspec.spec.document import Spec, names_a_variant
from qwenspec.spec.explain import Finding, explain
from qwenspec.spec.layout import builtin, layout_node
from qwenspec.spec.rules import RULES
from qwenspec.tree import Entry, Mapping, Node, Path_, Scalar, at, place, plain

MAX_MISTAKES = 100  # told of one rule
LAYOUT = ("architecture", "checkpoint", "layout")

# What stands in for a value in error while the rules that do not read it are applied.
_STAND_INS: dict[tuple[str, ...], Any] = {
    ("architecture", "vocab_size"): 1,
    ("architecture", "hidden_size"): 2,
    ("architecture", "num_hidden_layers"): 1,
    ("architecture", "num_attention_heads"): 1,
    ("architecture", "intermediate_size"): 1,
    ("architecture", "max_position_embeddings"): 1,
    ("architecture", "norm"): {"eps": 1.0},
    ("architecture", "norm", "eps"): 1.0,
    ("architecture", "rope"): {"theta": 2.0},
    ("architecture", "rope", "theta"): 2.0,
    LAYOUT: "qwen2",
}


def check(merged: Mapping, variant: str, family: str, description: str, file: str) -> tuple[Spec | None, list[Finding]]:
    """The spec, or None and the findings. Cross-field rules are applied to whatever part of it is valid."""
    root, findings, broken = _with_layout(merged)
    name = variant if names_a_variant(variant) else "unnamed"  # what is wrong with a name is told by its file
    data = plain(root) | {"variant": name, "family": family, "description": description, "file": file}
    data.setdefault("layout", plain(builtin("qwen2")))
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        findings += explain(Spec, root, error)
        repaired = _repaired(data, [finding.path for finding in findings])
        if repaired is None:
            return None, findings
        spec = repaired
    broken += [finding.path for finding in findings]
    for rule in RULES:
        if not any(_overlap(path, read) for path in broken for read in rule.reads):
            for mistake in islice(rule.check(spec), MAX_MISTAKES):
                diagnostic = Diagnostic(rule.code, mistake.message, place(root, mistake.path), mistake.hint)
                findings.append(Finding(mistake.path, diagnostic))
    return (None if findings else spec), findings


def _with_layout(merged: Mapping) -> tuple[Mapping, list[Finding], list[Path_]]:
    """The tree with the checkpoint layout that it names, or why there is none and the path that is then broken."""
    findings: list[Finding] = []
    try:
        layout = layout_node(merged.get("architecture"))
    except SpecError as error:
        layout = None
        findings += [Finding(("layout",), diagnostic) for diagnostic in error.diagnostics]
    written = at(merged, LAYOUT)
    if layout is None:
        if isinstance(written, Mapping):  # without those that it extends it would seem to lack names
            merged = _replaced(merged, LAYOUT, Scalar(_STAND_INS[LAYOUT], written.location))
        return merged, findings, [("layout",)]
    key = layout.location
    if isinstance(written, Mapping):
        merged, key = _replaced(merged, LAYOUT, layout), _key(merged, LAYOUT)
    return Mapping(merged.entries | {"layout": Entry(key, layout)}, merged.location), findings, []


def _key(node: Node, path: tuple[str, ...]) -> Location:
    """Where the last key of `path` was written."""
    parent = at(node, path[:-1])
    assert isinstance(parent, Mapping)
    return parent.entries[path[-1]].key


def _replaced(node: Node, path: tuple[str, ...], value: Node) -> Mapping:
    """The tree with another value at `path`, where it has one."""
    assert isinstance(node, Mapping)
    entry = node.entries[path[0]]
    inner = _replaced(entry.value, path[1:], value) if path[1:] else value
    return Mapping(node.entries | {path[0]: Entry(entry.key, inner)}, node.location)


def _overlap(path: Path_, read: Path_) -> bool:
    shorter = min(len(path), len(read))
    return path[:shorter] == read[:shorter]


def _repaired(data: dict[str, Any], broken: list[Path_]) -> Spec | None:
    """A valid spec without the broken parts, for the rules that do not read them."""
    for path in (tuple(map(str, steps)) for steps in broken):
        if path[0] == "layout":
            data["layout"] = plain(builtin("qwen2"))
            continue
        path = path[:3] if path[0] == "architecture" else path[:1]
        parent = data
        for step in path[:-1]:
            parent = parent[step]
        if path in _STAND_INS:
            parent[path[-1]] = _STAND_INS[path]
        else:
            parent.pop(path[-1], None)
    try:
        return Spec.model_validate(data)
    except ValidationError:
        return None  # more was wrong than one validation tells: the rest comes after the next correction
