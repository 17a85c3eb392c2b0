"""What is told to people: one diagnostic per mistake, each with a place, a reason and a way out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

LINE_LIMIT = 120  # characters of a source line that are shown; longer lines are cut around the caret
TAB = 4


class ExitCode(IntEnum):
    """Process exit codes, the same for every command."""

    OK = 0
    CHECK_FAILED = 1  # a check said no: generated files differ, backends disagree
    USAGE = 2  # bad usage, or a spec with errors
    BACKEND_MISSING = 3  # a backend or a library it needs is not installed
    INTERNAL = 70  # our own bug


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file; line and column count from 1, and line 0 is the file as a whole.

    `text` is the whole source line, for the caret, which spans `width` characters of it.
    """

    file: str
    line: int
    column: int
    text: str = ""
    width: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake. `code` is stable and greppable (`unknown-key`); `hint` says how to get out.

    `details` are further lines of the message."""

    code: str
    message: str
    location: Location | None = None
    hint: str = ""
    details: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, str | int]:
        """The JSON form; `file`, `line` and `column` are absent when there is no place."""
        told: dict[str, str | int] = {"code": self.code, "message": "\n".join((self.message, *self.details))}
        if self.location:
            told["file"] = self.location.file
            if self.location.line:
                told |= {"line": self.location.line, "column": self.location.column}
        return told | ({"hint": self.hint} if self.hint else {})


class SpecError(Exception):
    """Bad input, carrying every diagnostic that was found."""

    def __init__(self, diagnostics: Iterable[Diagnostic], exit_code: ExitCode = ExitCode.USAGE) -> None:
        self.diagnostics = tuple(diagnostics)
        self.exit_code = exit_code
        assert self.diagnostics, "a SpecError needs at least one diagnostic"
        super().__init__("\n".join(line for d in self.diagnostics for line in (d.message, *d.details)))


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed spelling that `word` was probably meant to be, or None when nothing is close."""
    import difflib

    folded = {name.lower(): name for name in islice(allowed, 500)}
    close = difflib.get_close_matches(word.lower()[:80], folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def near(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """`a`, `b` or `c`: the few allowed spellings that are closest to `word`, empty when nothing is close."""
    import difflib

    folded = {name.lower(): name for name in islice(allowed, 500)}
    close = difflib.get_close_matches(word.lower()[:80], folded, n=count, cutoff=0.6)
    return listed(folded[name] for name in close) if close else ""


def listed(words: Iterable[str], last: str = "or") -> str:
    """`a`, `b` or `c`."""
    *head, tail = [f"`{word}`" for word in words] or ["nothing"]
    return f"{', '.join(head)} {last} {tail}" if head else tail


# ------------------------------------------------------------------------------------------------- rendering


def render(diagnostics: Iterable[Diagnostic], color: bool = False) -> str:
    """Text for a terminal: place, reason, the source line with a caret, and the way out."""
    return "\n".join(_render(d, color) for d in diagnostics)


def _render(diagnostic: Diagnostic, color: bool) -> str:
    def paint(text: str, sgr: str) -> str:
        return f"\x1b[{sgr}m{text}\x1b[0m" if color else text

    location = diagnostic.location
    place = paint(f"{printable(str(location))}: ", "1") if location else ""
    lines = [f"{place}{paint(f'error[{diagnostic.code}]', '1;31')}{paint(': ' + printable(diagnostic.message), '1')}"]
    lines += [_on_screen(line) for line in diagnostic.details]
    margin = " "
    if location and location.line and location.text.strip():
        number = f"{location.line:>4}"
        margin = " " * len(number)
        text, caret = _pointed(location)
        lines += [paint(f"{number} | ", "34") + text, paint(f"{margin} | ", "34") + paint(caret, "1;31")]
    if diagnostic.hint:
        lines.append(paint(f"{margin} = ", "34") + paint("help: ", "1;36") + printable(diagnostic.hint))
    return "\n".join(lines) + "\n"


def _pointed(location: Location) -> tuple[str, str]:
    """The source line, cut when it is long, and the line of carets under it."""
    text, start = location.text, location.column - 1
    first = max(0, start - LINE_LIMIT // 2) if len(text) > LINE_LIMIT else 0
    before, rest = text[first:start], text[start : first + LINE_LIMIT]
    token = rest[: max(1, location.width)]
    left, right = "…" if first else "", "…" if first + LINE_LIMIT < len(text) else ""
    padding = " " * (len(left) + _columns(before))
    shown = left + _on_screen(before) + _on_screen(rest, _columns(before)) + right
    return shown.rstrip(), padding + "^" * max(1, _columns(token, _columns(before)))


def _on_screen(text: str, column: int = 0) -> str:
    """Tabs as spaces, so that the caret lines up; what a terminal would not show as a replacement character."""
    out = ""
    for char in text:
        if char == "\t":
            out += " " * (TAB - (column + _columns(out)) % TAB)
        else:
            out += char if char.isprintable() else "\ufffd"
    return out


def _columns(text: str, column: int = 0) -> int:
    """How many terminal columns the text takes when it starts at `column`: wide characters take two."""
    total = column
    for char in text:
        if char == "\t":
            total += TAB - total % TAB
        elif unicodedata.east_asian_width(char) in "WF":
            total += 2
        elif not unicodedata.combining(char):
            total += 1
    return total - column


def printable(text: str) -> str:
    """Characters that nobody sees, spaces excepted, as escapes: control characters, other ends of lines, marks that
    turn the direction of reading, bytes of a name that are not UTF-8."""
    return "".join(c if _visible(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _visible(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"
