"""Spec files on disk: variants, `extends`, checkpoint layouts, and the merged tree of one variant."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from qwenspec import source, tree
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed, nearest
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.checkpoint import Checkpoint, builtin_layouts
from qwenspec.spec.document import BESIDE, Document, Variant
from qwenspec.spec.explain import explain, found, unknown_key
from qwenspec.spec.merge import merge
from qwenspec.spec.shape import fields
from qwenspec.tree import Entry, Mapping, Node, Scalar, place, plain

MAX_EXTENDS = 32
VARIANT_NAME = "[A-Za-z](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_OWN_KEYS = tuple(Variant.model_fields)


@dataclass(slots=True)
class SpecFile:
    """A parsed spec file, with what is wrong with it before its variants are merged."""

    name: str  # as the user named it
    path: str  # absolute, for comparison
    root: Mapping
    problems: list[Diagnostic]

    def text(self, key: str) -> str | None:
        """A top-level value that should be text."""
        node = self.root.get(key)
        return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None

    def variants(self) -> dict[str, Entry]:
        """Name -> the variant's differences. A file without `variants` is its family's one variant."""
        node = self.root.get("variants")
        if node is None or (isinstance(node, Scalar) and node.value is None):
            nothing = Mapping({}, self.root.location)
            family = self.root.entries.get("family")
            return {self.text("family") or "": Entry(family.key if family else self.root.location, nothing)}
        return dict(node.entries) if isinstance(node, Mapping) else {}

    def default(self) -> str | None:
        """The variant that is meant when none is named; None when that cannot be said."""
        names = self.variants()
        chosen = self.text("default_variant")
        return chosen if chosen in names else next(iter(names)) if len(names) == 1 else None


@dataclass(frozen=True, slots=True)
class _Step:
    """A variant whose `extends` is being followed, and the value that led to it."""

    path: str
    variant: str
    named_at: Location | None


class Files:
    """The spec files of one run, each read once."""

    def __init__(self) -> None:
        self._files: dict[str, SpecFile] = {}
        self._merged: dict[tuple[str, str], tuple[Mapping, int]] = {}  # with the length of the chain behind it
        self._trail: list[_Step] = []

    def open(self, name: str, wanted_by: Location | None = None) -> SpecFile:
        """Raises SpecError when the file cannot be parsed; lesser mistakes are in its `problems`."""
        try:
            path = os.path.realpath(name)
        except ValueError:  # a character that no path has, of which reading it tells
            path = name
        if path not in self._files:
            document = source.parse_file(name, wanted_by)
            self._files[path] = SpecFile(name, path, document.root, _problems(document, name, path))
        return self._files[path]

    def merged(self, file: SpecFile, name: str, named_at: Location | None = None) -> Mapping:
        """`architecture` and what is beside it of a variant: its bases, the shared part and its own keys merged.

        A base in another file comes first, then this file's shared part, then the variant. A base in the same
        file already has the shared part. Raises SpecError when an `extends` leads nowhere.
        """
        step = _Step(file.path, name, named_at)
        self._refuse_endless(step)
        if (file.path, name) not in self._merged:
            self._trail.append(step)
            try:
                self._merged[file.path, name] = self._merge(file, file.variants()[name])
            finally:
                self._trail.pop()
        return self._merged[file.path, name][0]

    def shared(self, file: SpecFile) -> Mapping:
        """What all variants of a file start from, without a base."""
        return Mapping({k: e for k, e in file.root.entries.items() if k in _MERGED}, file.root.location)

    def _merge(self, file: SpecFile, variant: Entry) -> tuple[Mapping, int]:
        own = variant.value if isinstance(variant.value, Mapping) else Mapping({}, variant.key)
        start, length = self.shared(file), 1
        base = self._base(file, own) or self._base(file, file.root)
        if base is not None:
            other, name, named_at = base
            inherited = self.merged(other, name, named_at)
            start = inherited if other is file else _laid_over(inherited, start)
            length += self._merged[other.path, name][1]
        keys = {k: e for k, e in own.entries.items() if k not in _OWN_KEYS}
        overlay = {"architecture": Entry(variant.key, Mapping(keys, own.location))}
        overlay |= {key: own.entries[key] for key in BESIDE if key in own.entries}
        return _laid_over(start, Mapping(overlay, own.location)), length

    def _base(self, file: SpecFile, mapping: Mapping) -> tuple[SpecFile, str, Location] | None:
        """The variant that a variant or a file extends, and where it says so."""
        node = mapping.get("extends")
        if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
            return None  # absent, or reported as a wrong type
        path, _, name = node.value.partition("#")
        base = file
        if path:
            base = self.open(os.path.normpath(Path(node.location.file).parent / path), node.location)
            if base is not file and base.problems:
                raise SpecError(base.problems)
        return base, variant_named(base, name or None, node.location), node.location

    def _refuse_endless(self, step: _Step) -> None:
        places = [(s.path, s.variant) for s in self._trail]
        if (step.path, step.variant) in places:
            circle = [*self._trail[places.index((step.path, step.variant)) + 1 :], step]
            # However it was entered, a circle is told at its first place in the text.
            steps = sorted((s.named_at.file, s.named_at.line, s.variant, s.named_at) for s in circle if s.named_at)
            names = listed((variant for _, _, variant, _ in steps), "and")
            what = f"{names} extend one another" if len(steps) > 1 else f"{names} extends itself"
            _fail("extends-cycle", what, steps[0][3], "a chain of `extends` must end in a variant without one")
        length = self._merged[step.path, step.variant][1] if (step.path, step.variant) in self._merged else 1
        if len(self._trail) + length > MAX_EXTENDS and step.named_at:
            _fail("extends-too-long", f"a chain of more than {MAX_EXTENDS} `extends`", step.named_at)


_MERGED = ("architecture", *BESIDE)


def _laid_over(base: Mapping, overlay: Mapping) -> Mapping:
    merged = merge(base, overlay)
    assert isinstance(merged, Mapping), "neither side has a kind"
    return merged


def variant_named(file: SpecFile, name: str | None, wanted_by: Location | None = None) -> str:
    """The variant's name, the default one for None. Raises SpecError when there is none."""
    names = file.variants()
    where = wanted_by or place(file.root, ("variants",))
    if name is None:
        chosen = file.default()
        if chosen is None:
            hint = f"name one of {listed(names)}, or set `default_variant`" if names else ""
            _fail("no-default-variant", f"`{file.name}` has {len(names)} variants and no default", where, hint)
        return chosen
    if name not in names:
        _fail("unknown-variant", f"`{file.name}` has no variant `{name}`", where, _choices(name, names))
    return name


def layout_node(architecture: Node | None) -> Node | None:
    """The tree of the checkpoint layout that an architecture names, or None when that is in error elsewhere.

    A name with a slash or a .yaml ending is a file, relative to the file in which it was written.
    """
    node = tree.at(architecture, ("checkpoint", "layout"))
    if isinstance(node, Mapping):
        return node
    if node is None:
        default = Architecture.model_fields["checkpoint"].default
        assert isinstance(default, Checkpoint)
        return _builtin_layout(str(default.layout))
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return None
    if node.value in builtin_layouts():
        return _builtin_layout(node.value)
    if "/" not in node.value and not node.value.endswith((".yaml", ".yml")):
        hint = f"{_choices(node.value, builtin_layouts())}, a YAML file such as `./names.yaml`, or the names themselves"
        _fail("unknown-layout", f"there is no layout `{node.value}`", node.location, hint)
    document = source.parse_file(
        os.path.normpath(Path(node.location.file).parent / node.value), wanted_by=node.location
    )
    if document.diagnostics:
        raise SpecError(document.diagnostics)
    return document.root


@cache
def _builtin_layout(name: str) -> Mapping:
    return source.parse_file(builtin_layouts()[name]).root


def _choices(word: str, allowed: dict[str, Entry] | dict[str, Path]) -> str:
    close = nearest(word, allowed)
    return (f"did you mean `{close}`? " if close else "") + f"there is {listed(allowed, 'and')}"


def _fail(code: str, message: str, location: Location, hint: str = "") -> NoReturn:
    raise SpecError([Diagnostic(code, message, location, hint)])


# ------------------------------------------------------------------------------------- a file's own mistakes


def _problems(document: tree.Document, name: str, path: str) -> list[Diagnostic]:
    """What is wrong with a file beside its architectures."""
    file = SpecFile(name, path, document.root, list(document.diagnostics))
    version = file.root.get("schema_version")
    if isinstance(version, Scalar) and isinstance(version.value, bool | float):
        message = f"`schema_version` must be `1`; found {found(version)}"
        file.problems.append(Diagnostic("not-allowed", message, version.location))
    elif isinstance(version, Scalar) and isinstance(version.value, int) and version.value != 1:
        message = f"this is a spec of version {version.value}; this qwenspec reads version 1"
        _fail("schema-version", message, version.location, "install the qwenspec that the spec was written for")
    try:
        Document.model_validate(plain(file.root))
    except ValidationError as error:
        file.problems += [finding.diagnostic for finding in explain(Document, file.root, error)]
    file.problems += [*_unknown_keys(file), *_bad_names(file), *_bad_default(file)]
    return file.problems


def _unknown_keys(file: SpecFile) -> Iterator[Diagnostic]:
    """Keys of a variant that neither an architecture nor a variant has."""
    allowed = [*fields(Architecture), *_OWN_KEYS]
    for name, entry in file.variants().items():
        if isinstance(entry.value, Mapping):
            for key in entry.value.entries:
                if key not in allowed:
                    yield unknown_key(key, ("variants", name, key), allowed, file.root)


def _bad_names(file: SpecFile) -> Iterator[Diagnostic]:
    """A variant's name becomes a file's and a Python package's."""
    taken: dict[str, str] = {}
    for name, entry in file.variants().items():
        module = re.sub(r"[-.]", "_", name).lower()
        if not name:
            continue  # a missing family, reported as such
        if not re.fullmatch(VARIANT_NAME, name) or len(name) > 100 or keyword.iskeyword(module):
            message = f"`{name[:100]}` cannot name a variant: it becomes a folder's and a Python package's name"
            hint = "begin with a letter and use letters, digits, `-`, `_` and `.`"
            yield Diagnostic("variant-name", message, entry.key, hint)
        elif module in taken:
            message = f"`{name}` and `{taken[module]}` would both be the Python package `{module}`"
            yield Diagnostic("variant-clash", message, entry.key, "rename one of them")
        taken.setdefault(module, name)


def _bad_default(file: SpecFile) -> Iterator[Diagnostic]:
    names, chosen = file.variants(), file.root.get("default_variant")
    if file.root.get("variants") is not None and isinstance(file.root.get("variants"), Mapping) and not names:
        hint = "remove the key: a file without `variants` is one variant, named like the family"
        yield Diagnostic("no-variants", "`variants` is empty", place(file.root, ("variants",)), hint)
    elif isinstance(chosen, Scalar) and isinstance(chosen.value, str) and chosen.value not in names:
        message = f"there is no variant `{chosen.value}`"
        yield Diagnostic("unknown-variant", message, chosen.location, _choices(chosen.value, names))
