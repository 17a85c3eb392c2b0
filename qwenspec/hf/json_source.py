"""JSON text -> a tree of plain values in which every key and every value knows where it was written.

As `qwenspec.source` does for YAML, which reads most JSON but not all: half of a surrogate pair as an escape, U+2028
and U+007F are fine in JSON. What readers of JSON do not agree on is refused: a key that is there twice, NaN.
"""

from __future__ import annotations

import bisect
import re
from json import JSONDecodeError, decoder
from pathlib import Path
from typing import Any

from qwenspec import source
from qwenspec.diagnostics import Diagnostic, Location, SpecError
from qwenspec.tree import Document, Entry, Mapping, Node, Scalar, Sequence

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_DIGITS = 1000

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z_]\w*|.", re.DOTALL)
_scan_string: Any = vars(decoder)["scanstring"]  # of the standard library's own decoder; stubs lack it
_WORDS = {"true": True, "false": False, "null": None}


def parse_file(path: str | Path) -> Document:
    """Read and parse a file whose root is an object. Raises SpecError when there is nothing to work with."""
    return parse(source.read(path, limit=MAX_BYTES), str(path))


def parse(text: str, file: str) -> Document:
    """Parse JSON whose root is an object; `file` is the name that diagnostics show.

    Keys that are there twice are in the document's diagnostics. Raises SpecError with one diagnostic (`not-a-mapping`,
    and those of `value`) for whatever else is wrong."""
    parser = _Parser(text, file)
    root = parser.whole()
    if not isinstance(root, Mapping):
        found = "a list" if isinstance(root, Sequence) else "a single value"
        raise SpecError([Diagnostic("not-a-mapping", f"the file holds {found}, and no JSON object", root.location)])
    return Document(root, tuple(parser.diagnostics))


def value(path: str | Path) -> Node:
    """What a file holds, object or not.

    Raises SpecError with one diagnostic: `json-syntax`, `empty-file`, `too-deep`, `number-too-long`,
    `invalid-character`, `duplicate-key`, or that the file cannot be read."""
    parser = _Parser(source.read(path, limit=MAX_BYTES), str(path))
    root = parser.whole()
    if parser.diagnostics:
        raise SpecError(parser.diagnostics)
    return root


class _Parser:
    """One text, from its beginning: `at` is the character that comes next."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, 0
        self.lines = text.split("\n")
        self.starts = [0]
        for line in self.lines[:-1]:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.diagnostics: list[Diagnostic] = []

    def whole(self) -> Node:
        self.space()
        if self.at == len(self.text):
            raise SpecError([Diagnostic("empty-file", "the file is empty", Location(self.file, 0, 0))])
        root = self.value(0)
        self.space()
        if self.at < len(self.text):
            raise self.mistake("json-syntax", "not valid JSON: the file goes on after its value", self.at)
        return root

    def value(self, depth: int) -> Node:
        start = self.at
        if depth > MAX_DEPTH:
            raise self.mistake("too-deep", f"nested more than {MAX_DEPTH} levels deep", start)
        first = self.text[start : start + 1]
        if first == "{":
            return Mapping(self.entries(depth), self.location(start))
        if first == "[":
            return Sequence(tuple(self.items(depth)), self.location(start))
        if first == '"':
            text = self.string()
            return Scalar(text, self.location(start), quoted=True)
        if number := _NUMBER.match(self.text, start):
            return self.number(number)
        word = _WORD.match(self.text, start)
        if word and word[0] in _WORDS:
            self.at = word.end()
            return Scalar(_WORDS[word[0]], self.location(start))
        raise self.mistake(
            "json-syntax", f"not valid JSON: {'a value' if word else 'the file ends where a value'} is expected", start
        )

    def entries(self, depth: int) -> dict[str, Entry]:
        """An object's, from its brace to its brace."""
        entries: dict[str, Entry] = {}
        self.at += 1
        if self.found("}"):
            return entries
        while True:
            self.space()
            start = self.at
            if self.text[start : start + 1] != '"':
                raise self.mistake("json-syntax", "not valid JSON: a key in double quotes is expected", start)
            name, here = self.string(), self.location(start)
            if not self.found(":"):
                raise self.mistake("json-syntax", "not valid JSON: `:` is expected after a key", self.at)
            self.space()
            value = self.value(depth + 1)
            if name in entries:
                first = entries[name].key
                message = f"the key `{name}` is already set on line {first.line}, column {first.column}"
                self.diagnostics.append(Diagnostic("duplicate-key", message, here, "keep one of the two"))
            entries.setdefault(name, Entry(here, value))
            if self.found("}"):
                return entries
            if not self.found(","):
                raise self.mistake("json-syntax", "not valid JSON: `,` or `}` is expected", self.at)

    def items(self, depth: int) -> list[Node]:
        """A list's, from its bracket to its bracket."""
        items: list[Node] = []
        self.at += 1
        if self.found("]"):
            return items
        while True:
            self.space()
            items.append(self.value(depth + 1))
            if self.found("]"):
                return items
            if not self.found(","):
                raise self.mistake("json-syntax", "not valid JSON: `,` or `]` is expected", self.at)

    def string(self) -> str:
        start = self.at
        try:
            text, self.at = _scan_string(self.text, start + 1, True)
            str(text).encode()
        except JSONDecodeError as error:
            raise self.mistake(
                "json-syntax", f"not valid JSON: {error.msg}", min(error.pos, len(self.text) - 1)
            ) from None
        except UnicodeEncodeError:
            raise self.mistake("invalid-character", "this text has half of a surrogate pair", start) from None
        return str(text)

    def number(self, found: re.Match[str]) -> Scalar:
        start, self.at = self.at, found.end()
        if len(found[0]) > MAX_DIGITS:
            raise self.mistake("number-too-long", f"a number of {len(found[0]):,} characters", start)
        whole = found[2] is None and found[3] is None
        return Scalar(int(found[0]) if whole else float(found[0]), self.location(start))

    def space(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def found(self, mark: str) -> bool:
        """Whether the mark comes next, after space; then it has been read."""
        self.space()
        there = self.text.startswith(mark, self.at)
        self.at += there
        return there

    def location(self, start: int) -> Location:
        """What has been read since `start`, as far as it is on one line."""
        line = bisect.bisect_right(self.starts, start) - 1
        end = min(self.at, self.starts[line] + len(self.lines[line]))
        return Location(self.file, line + 1, start - self.starts[line] + 1, self.lines[line], max(1, end - start))

    def mistake(self, code: str, message: str, start: int) -> SpecError:
        self.at = start + 1
        return SpecError([Diagnostic(code, message, self.location(start))])
