"""The checkpoint layout that an architecture names, as a tree: built in, a file's or its own, and what it extends."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NoReturn

from qwenspec import source, tree
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed, nearest
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.checkpoint import Checkpoint, builtin_layouts
from qwenspec.spec.explain import found
from qwenspec.spec.merge import merge
from qwenspec.tree import Mapping, Node, Scalar

MAX_EXTENDS = 8  # a layout, the one it extends, …
FILES = (".yaml", ".yml")


def layout_node(architecture: Node | None) -> Node | None:
    """The tree of the checkpoint layout that an architecture names, or None when that is in error elsewhere.

    Raises SpecError when it, or what it extends, leads nowhere.
    """
    node = tree.at(architecture, ("checkpoint", "layout"))
    if node is None:
        default = Architecture.model_fields["checkpoint"].default
        assert isinstance(default, Checkpoint)
        return builtin(str(default.layout))
    if isinstance(node, Mapping):
        return _extended(node, ())
    return _named(node, ()) if isinstance(node, Scalar) and isinstance(node.value, str) else None


def _named(node: Scalar, trail: tuple[str, ...]) -> Node:
    """The layout of that name. With a slash or a .yaml ending it is a file, relative to the one that names it.

    `trail`: the files on the way here.
    """
    name = str(node.value)
    if name in builtin_layouts():
        return builtin(name)
    if "/" not in name and not name.endswith(FILES):
        close = nearest(name, builtin_layouts())
        meant = f"did you mean `{close}`? " if close else ""
        hint = f"{meant}there is {listed(builtin_layouts(), 'and')}, a YAML file such as `./names.yaml`, or the names "
        _fail("unknown-layout", f"there is no layout `{name}`", node.location, hint + "themselves")
    path = os.path.normpath(Path(node.location.file).parent / name)
    source.refuse_unprintable(path, node.location)
    document = source.parse_file(path, wanted_by=node.location)
    real = os.path.realpath(path)
    if real in trail:
        hint = "a chain of `extends` must end in a layout without one"
        _fail("extends-cycle", f"the layout `{path}` extends itself", node.location, hint)
    if len(trail) == MAX_EXTENDS:
        _fail("extends-too-long", f"a chain of more than {MAX_EXTENDS} layouts", node.location)
    if document.diagnostics:
        raise SpecError(document.diagnostics)
    return _extended(document.root, (*trail, real))


def _extended(layout: Mapping, trail: tuple[str, ...]) -> Mapping:
    """The layout laid over the one that it extends."""
    base = layout.get("extends")
    if base is None or (isinstance(base, Scalar) and base.value is None):
        return layout
    if not isinstance(base, Scalar) or not isinstance(base.value, str) or not base.value:
        _fail("wrong-type", f"`extends` must be text, not empty; found {found(base)}", base.location)
    own = Mapping({k: e for k, e in layout.entries.items() if k != "extends"}, layout.location)
    merged = merge(_named(base, trail), own)
    assert isinstance(merged, Mapping)
    return merged


@cache
def builtin(name: str) -> Mapping:
    """The tree of a layout that comes with qwenspec."""
    return source.parse_file(builtin_layouts()[name]).root


def _fail(code: str, message: str, location: Location, hint: str = "") -> NoReturn:
    raise SpecError([Diagnostic(code, message, location, hint)])
