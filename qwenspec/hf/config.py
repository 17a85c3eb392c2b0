"""Reading config.json: every key is asked for by name, and a key that nobody asked for is an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenspec import tree as source_tree
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed
from qwenspec.hf.harmless import HARMLESS

Path = tuple[str, ...]
MISSING: Any = object()
MAX_LAYERS = 10_000  # more is a mistake, and would take long to find out


class Report:
    """What is told about one config.json: mistakes with their places, and notes.

    `root` is the parsed file; without it the place is the file as a whole.
    """

    def __init__(self, file: str, root: source_tree.Mapping | None) -> None:
        self.file, self.root = file, root
        self.diagnostics: list[Diagnostic] = []
        self.notes: list[str] = []

    def error(self, code: str, message: str, path: Path = (), hint: str = "") -> None:
        """A mistake at the key `path`."""
        self.diagnostics.append(Diagnostic(code, message, self.location(path), hint))

    def location(self, path: Path) -> Location:
        """Where the key at `path` was written, or the nearest one above it."""
        node: source_tree.Node | None = self.root
        location = Location(self.file, 0, 0)
        for key in path:
            if not isinstance(node, source_tree.Mapping) or key not in node.entries:
                break
            location, node = node.entries[key].key, node.entries[key].value
        return location

    def find(self, key: str) -> Path:
        """The path of a key that is somewhere in the file, or the file's own."""
        found = [path for path, node in source_tree.walk(self.root) if key in path] if self.root else []
        return tuple(map(str, found[0])) if found else ()

    def check(self) -> None:
        """Raise SpecError if a mistake was found."""
        if self.diagnostics:
            raise SpecError(self.diagnostics)


class Config:
    """One object of config.json, at `path`; nested ones are read through `child`.

    Readers return None after reporting a mistake, so that one run finds them all.
    """

    def __init__(self, tree: Mapping[str, Any], report: Report, path: Path = ()) -> None:
        self.tree, self.report, self.path = tree, report, path
        self.unread = dict.fromkeys(tree)
        self.children: list[Config] = []

    def __contains__(self, key: str) -> bool:
        return key in self.tree

    def get(self, key: str) -> Any:
        """The value as it is, None when it is absent or null. The key counts as read."""
        self.unread.pop(key, None)
        return self.tree.get(key)

    def child(self, key: str) -> Config | None:
        """The object under `key`; None when it is absent, null or empty."""
        value = self.get(key)
        if not value:
            return None
        if not isinstance(value, Mapping):
            self.error("wrong-type", f"`{key}` is {shown(value)}, not an object", key)
            return None
        self.children.append(Config(value, self.report, (*self.path, key)))
        return self.children[-1]

    def error(self, code: str, message: str, key: str, hint: str = "") -> None:
        """Report a mistake at `key`, or at this object when the file lacks it."""
        self.report.error(code, message, (*self.path, key), hint)

    def note(self, text: str) -> None:
        """What a person should know although it is no mistake."""
        self.report.notes.append(text)

    # ------------------------------------------------------------------------------------------- readers

    def size(self, key: str, assumed: object = MISSING, limit: int = 1 << 40) -> int | None:
        """A whole number from 1 to `limit`. It must be there; Hugging Face would take `assumed` in its place."""
        wanted = f"a whole number from 1 to {limit:,}"
        value = self._read(key, lambda given: type(given) is int and 0 < given <= limit, wanted, assumed)
        return None if value is None else int(value)

    def number(self, key: str, assumed: object = MISSING) -> float | None:
        """A positive number that must be there."""
        value = self._read(key, _is_positive, "a positive number", assumed)
        return None if value is None else float(value)

    def flag(self, key: str, assumed: object = MISSING, default: bool | None = None) -> bool | None:
        """true or false. Where a default is given an absent key means that, and a note says so."""
        if default is not None and key not in self.tree:
            self.note(f"`{key}` is not given: {json.dumps(default)}, as Hugging Face assumes.")
            return default
        value = self._read(key, lambda given: isinstance(given, bool), "true or false", assumed)
        return None if value is None else bool(value)

    def choice(self, key: str, allowed: Sequence[str], assumed: object = MISSING) -> str | None:
        """One of `allowed`."""
        value = self._read(key, lambda given: given in allowed, listed(allowed), assumed)
        return None if value is None else str(value)

    def fixed(self, key: str, *allowed: object, why: str) -> None:
        """A key that may be absent and that changes inference, of which only these values are supported."""
        value = self.get(key)
        if key in self.tree and not any(_equal(value, want) for want in allowed):
            wanted = " or ".join(json.dumps(want) for want in allowed)
            message = f"`{key}` is {shown(value)}, and only {wanted} is supported: {why}"
            self.error("unsupported-value", message, key)

    def names(self, key: str) -> list[str]:
        """A list of names, or of lists of names; empty when it is absent or null."""
        value = self.get(key)
        groups = [] if value is None else value if _is_list(value) else [value]
        found = [name for group in groups for name in (group if _is_list(group) else [group])]
        if all(isinstance(name, str) for name in found):
            return found
        self.error("wrong-type", f"`{key}` is {shown(value)}, not a list of names", key)
        return []

    def _read(self, key: str, valid: Callable[[Any], bool], wanted: str, assumed: object) -> Any:
        value = self.get(key)
        if key not in self.tree:
            silently = "" if assumed is MISSING else f"; Hugging Face would silently assume {shown(assumed)}"
            self.error("missing-key", f"`{key}` is missing", key, f"add it{silently}")
        elif not valid(value):
            self.error("wrong-value", f"`{key}` is {shown(value)}, not {wanted}", key)
        else:
            return value
        return None

    def report_unread(self) -> None:
        """Every key that nobody read, and that may change inference, is a mistake; children's too."""
        for key in self.unread:
            if self.path or key not in HARMLESS:
                self.error(
                    "unread-key",
                    f"nothing reads `{key}`, and it may change what the model computes",
                    key,
                    "remove it if it does not; otherwise the model has a feature that qwenspec lacks",
                )
        for child in self.children:
            child.report_unread()


def shown(value: object) -> str:
    """A JSON value in a message, cut when it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _equal(value: object, want: object) -> bool:
    """JSON equality, in which 1 is 1.0 but not true; lists that were read are tuples."""
    if isinstance(value, list | tuple) and isinstance(want, list | tuple):
        return list(value) == list(want)
    return value == want and isinstance(value, bool) == isinstance(want, bool)
