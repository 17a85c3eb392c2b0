"""What is told to people: one diagnostic per mistake, each with a place, a reason and a way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, the same for every command."""

    OK = 0
    CHECK_FAILED = 1  # a check said no: generated files differ, backends disagree
    USAGE = 2  # bad usage, or a spec with errors
    BACKEND_MISSING = 3  # a backend or a library it needs is not installed
    INTERNAL = 70  # our own bug


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file; line and column count from 1. `text` is the whole source line, for the caret."""

    file: str
    line: int
    column: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake. `code` is stable and greppable (`unknown-key`); `hint` says how to get out."""

    code: str
    message: str
    location: Location | None = None
    hint: str = ""


class SpecError(Exception):
    """Bad input, carrying every diagnostic that was found."""

    def __init__(self, diagnostics: Iterable[Diagnostic], exit_code: ExitCode = ExitCode.USAGE) -> None:
        self.diagnostics = tuple(diagnostics)
        self.exit_code = exit_code
        assert self.diagnostics, "a SpecError needs at least one diagnostic"
        super().__init__("\n".join(d.message for d in self.diagnostics))
