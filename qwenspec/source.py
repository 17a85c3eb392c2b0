"""YAML text -> a tree of plain values in which every key and every value knows where it was written.

The YAML 1.2 core schema on pyyaml's parser, which by itself reads 1.1: `1e-6` is a number, `no` is text, there
are no dates and no sexagesimal numbers. A spec is data, so what YAML offers beyond data (tags, merge keys,
several documents) is refused, and a file can neither be large nor grow large through aliases.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed, nearest, printable
from qwenspec.tree import Document, Entry, Mapping, Node, Scalar, Sequence, written

MAX_BYTES = 1 << 20
MAX_NODES = 10_000  # keys and values, aliases counted as what they stand for
MAX_DEPTH = 32
MAX_DIGITS = 1000


def parse_file(path: str | Path, wanted_by: Location | None = None) -> Document:
    """Read and parse a file. `wanted_by` is the place that named it, where a missing file is reported.

    Raises SpecError with one diagnostic when there is nothing to work with.
    """
    return parse(read(path, wanted_by), str(path))


def read(path: str | Path, wanted_by: Location | None = None, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, without its byte order mark."""
    name = str(path)
    whole = wanted_by or Location(name, 0, 0)
    refuse_unprintable(name, whole)
    try:
        if wanted_by and not os.path.realpath(name).endswith((".yaml", ".yml")):
            # Diagnostics quote what they are about, and this may be anything that the user can read.
            hint = "a file that another one names is called .yaml or .yml, and no link to something else"
            _fail("not-a-yaml-file", f"`{name}` is not a YAML file by its name", whole, hint)
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        with os.fdopen(os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                _fail("not-a-file", f"`{name}` is not a regular file", whole, _files_in(Path(name)))
            data = file.read(limit + 1)
    except FileNotFoundError:
        _fail("file-not-found", f"there is no file `{name}`", whole, _similar_file(Path(name)))
    except IsADirectoryError:
        _fail("not-a-file", f"`{name}` is a directory", whole, _files_in(Path(name)))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _fail("unreadable-file", f"cannot read `{name}`: {reason}", whole)
    if len(data) > limit:
        what = " for a spec" if limit == MAX_BYTES else ""
        _fail("file-too-large", f"`{name}` is larger than {limit >> 20} MiB, the limit{what}", whole)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        hint = "save the file as UTF-8"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            hint += "; it looks like UTF-16"
        byte = f"byte 0x{data[error.start]:02x}"
        _fail("not-utf-8", f"{byte} is not valid UTF-8 here", Location(name, line, column), hint)


def refuse_unprintable(path: str, place: Location) -> None:
    """A spec's path becomes part of the packages: it has to be text that can be read there."""
    if printable(path) != path:
        message = f"the path `{path}` has characters that cannot be printed"
        _fail("unprintable-path", message, place, "rename the file or its folder")


def _similar_file(path: Path) -> str:
    try:
        names = {p.stem: p.name for p in sorted(path.parent.iterdir()) if p.suffix in (".yaml", ".yml")}
    except OSError:
        return f"there is no directory `{path.parent}` either"
    close = nearest(path.stem, names)
    return f"did you mean `{path.with_name(names[close])}`?" if close else ""


def _files_in(path: Path) -> str:
    names = sorted(str(p) for p in path.glob("*.yaml"))[:8] if path.is_dir() else []
    return f"name a file in it: {listed(names)}" if names else ""


def _fail(code: str, message: str, location: Location, hint: str = "") -> NoReturn:
    raise SpecError([Diagnostic(code, message, location, hint)])


# --------------------------------------------------------------------------------------------------- parsing

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_BREAK = re.compile("\r\n|\r|\n")
_DIRECTIVE = re.compile(r"(?<![^\r\n])%")
_PROPERTIES = re.compile(r"(?:[&!]\S*\s+)+")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([f"{sign}{inf}" for sign in ("", "+") for inf in (".inf", ".Inf", ".INF")], float("inf")),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], float("-inf")),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}


def parse(text: str, file: str) -> Document:
    """Parse one YAML document whose root is a mapping; `file` is the name that diagnostics show.

    Raises SpecError with one diagnostic when the text is not YAML, not a mapping or too much.
    """
    lines = _BREAK.split(text)
    if bad := _UNPRINTABLE.search(text):
        here = _place_in(text, bad.start(), lines, file)
        hint = "in a double-quoted text it can be written as an escape"
        _fail("invalid-character", f"the character U+{ord(bad[0]):04X} is not allowed", here, hint)
    if directive := _DIRECTIVE.search(text):
        here = _place_in(text, directive.start(), lines, file)
        _fail(
            "yaml-directive",
            "a spec has no `%` directives",
            here,
            "remove the line: specs are read as YAML 1.2",
        )
    return _Composer(text, file, lines).document()


def _place_in(text: str, offset: int, lines: list[str], file: str) -> Location:
    before = _BREAK.split(text[:offset])
    return Location(file, len(before), len(before[-1]) + 1, lines[len(before) - 1])


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read yet."""

    event: yaml.CollectionStartEvent
    first_node: int  # how many nodes came before it
    anchor: str | None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    key: tuple[str | None, Location] | None = None  # read, and waiting for its value; None: a key in error
    height: int = 1


class _Composer:
    """Builds the tree from parser events with a stack of its own: no input can exhaust Python's."""

    def __init__(self, text: str, file: str, lines: list[str]) -> None:
        self.file, self.lines = file, lines
        self.events = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int, int]] = {}  # node, how many nodes it is, height
        self.nodes = 0
        self.root: Node | None = None
        self.diagnostics: list[Diagnostic] = []

    def document(self) -> Document:
        whole = Location(self.file, 0, 0)
        try:
            while self.events.check_event():
                self.read(self.events.get_event())
        except yaml.YAMLError as error:
            self.syntax_error(error)
        finally:
            self.events.dispose()
        if self.root is None or (isinstance(self.root, Scalar) and self.root.value is None):
            _fail("empty-file", "the file is empty", whole, "a spec starts with `schema_version: 1`")
        if not isinstance(self.root, Mapping):
            found = "a list" if isinstance(self.root, Sequence) else "a single value"
            here = self.root.location
            _fail("not-a-mapping", f"the file holds {found}, not a mapping of keys to values", here)
        return Document(self.root, tuple(self.diagnostics))

    def syntax_error(self, error: yaml.YAMLError) -> NoReturn:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        here = self.location(mark, mark) if mark else Location(self.file, 0, 0)
        hint = ""
        if here.text[here.column - 1 : here.column] == "\t" or here.text.lstrip(" ").startswith("\t"):
            hint = "YAML does not indent with tabs: use spaces"
        elif here.text[here.column - 1 : here.column] in ("`", "@", "%"):
            hint = "put the text in quotes"
        elif problem and "mapping values" in problem:
            hint = "text that holds `: ` needs quotes; otherwise check the indentation of this line"
        _fail("yaml-syntax", f"not valid YAML: {problem or error}", here, hint)

    def location(self, start: Any, end: Any) -> Location:
        """The source between two marks of the parser, as far as it is on one line."""
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        column = start.column
        if properties := _PROPERTIES.match(line, column):
            column = properties.end()
        width = (end.column if end.line == start.line else len(line)) - column
        return Location(self.file, start.line + 1, column + 1, line, max(1, width))

    def read(self, event: yaml.Event) -> None:
        match event:
            case yaml.ScalarEvent():
                self.count(event)
                self.tagless(event)
                scalar = Scalar(*self.scalar(event))
                if event.anchor:
                    self.anchors[event.anchor] = (scalar, 1, 1)
                self.add(scalar, 1)
            case yaml.AliasEvent():
                self.alias(event)
            case yaml.CollectionStartEvent():
                self.count(event)
                self.tagless(event)
                if len(self.stack) == MAX_DEPTH:
                    self.too_deep(event)
                self.stack.append(_Open(event, self.nodes - 1, event.anchor))
            case yaml.CollectionEndEvent():
                self.close(event)
            case yaml.DocumentStartEvent() if self.root is not None:
                here = self.location(event.start_mark, event.end_mark)
                _fail(
                    "several-documents",
                    "a second document starts here; a spec is one",
                    here,
                    "remove the `---`",
                )

    def close(self, end: yaml.CollectionEndEvent) -> None:
        done = self.stack.pop()
        mapping, flow = isinstance(end, yaml.MappingEndEvent), done.event.flow_style
        start = done.event.start_mark
        here = self.location(start, end.end_mark if flow else start)
        node = Mapping(done.entries, here) if mapping else Sequence(tuple(done.items), here)
        if done.anchor:
            self.anchors[done.anchor] = (node, self.nodes - done.first_node, done.height)
        self.add(node, done.height)

    def alias(self, event: yaml.AliasEvent) -> None:
        name = str(event.anchor)
        here = self.location(event.start_mark, event.end_mark)
        if any(name == above.anchor for above in self.stack):
            _fail("recursive-alias", f"`*{name}` stands inside the value that it names", here)
        if name not in self.anchors:
            close = nearest(name, self.anchors)
            hint = f"did you mean `*{close}`?" if close else f"name a value with `&{name}` first"
            _fail("undefined-alias", f"nothing above is named `&{name}`", here, hint)
        node, nodes, height = self.anchors[name]
        self.count(event, nodes)
        if len(self.stack) + height > MAX_DEPTH:
            self.too_deep(event)
        self.add(node, height)

    def count(self, event: yaml.NodeEvent, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            here = self.location(event.start_mark, event.end_mark)
            what = f"more than {MAX_NODES:,} keys and values"
            hint = "aliases count as what they stand for" if isinstance(event, yaml.AliasEvent) else ""
            _fail("too-many-values", f"{what} up to here, the limit for a spec", here, hint)

    def too_deep(self, event: yaml.NodeEvent) -> NoReturn:
        here = self.location(event.start_mark, event.start_mark)
        _fail("too-deep", f"nested more than {MAX_DEPTH} levels deep", here)

    def tagless(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag is not None:
            mark: Any = event.start_mark
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            here = Location(self.file, mark.line + 1, mark.column + 1, self.lines[mark.line], len(tag))
            message = f"the tag `{tag}` is not allowed: a spec is plain data"
            self.diagnostics.append(Diagnostic("yaml-tag", message, here, "remove the tag"))

    def scalar(self, event: yaml.ScalarEvent) -> tuple[str | int | float | bool | None, Location, bool]:
        start: Any = event.start_mark
        end: Any = event.end_mark
        here, text = self.location(start, end), event.value
        quoted = bool(event.style)
        if start.index == end.index and self.stack and self.stack[-1].key:
            here = self.stack[-1].key[1]  # nothing was written: show the key
        if quoted:
            return text, here, True
        if text in _WORDS:
            return _WORDS[text], here, False
        if len(text) > MAX_DIGITS and (_FLOAT.fullmatch(text) or _INT.fullmatch(text)):
            _fail("number-too-long", f"a number of {len(text):,} characters", here)
        if _INT.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), here, False
        return (float(text) if _FLOAT.fullmatch(text) else text), here, False

    def add(self, node: Node, height: int) -> None:
        """Put a finished node where it belongs."""
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        top.height = max(top.height, height + 1)
        if isinstance(top.event, yaml.SequenceStartEvent):
            top.items.append(node)
        elif top.key is None:
            top.key = self.key(node, top.entries)
        else:
            name, here = top.key
            if name is not None:
                top.entries[name] = Entry(here, node)
            top.key = None

    def key(self, node: Node, seen: dict[str, Entry]) -> tuple[str | None, Location]:
        """The key's name, or None when it is in error and its value is to be dropped."""
        here = node.location
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            hint = f'put it in quotes: "{written(here)}"' if isinstance(node, Scalar) else ""
            self.diagnostics.append(Diagnostic("key-not-text", "a key must be text", here, hint))
        elif node.value == "<<" and not node.quoted:
            hint = "to start from another variant, write `extends: '#variant'` or `extends: other.yaml#variant`"
            self.diagnostics.append(Diagnostic("merge-key", "merge keys (`<<`) are not YAML 1.2", here, hint))
        elif node.value in seen:
            first = seen[node.value].key
            message = f"the key `{node.value}` is already set on line {first.line}, column {first.column}"
            self.diagnostics.append(Diagnostic("duplicate-key", message, here, "keep one of the two"))
        else:
            return node.value, here
        return None, here
