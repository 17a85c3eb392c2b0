"""What every command shares: where output goes, and how it ends.

Data goes to stdout, everything else to stderr, so that a pipe never carries a remark.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TextIO, TypeVar

import typer

from qwenspec.backend.runtime.machine import machine_problem, out_of_memory
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError, printable, render

P = ParamSpec("P")
T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
TERMINATED = 143  # 128 + SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE
PACKAGE = Path(__file__).parents[1]
PRINTING = {"click", "rich", "typer"}


def show(text: str, paint: Callable[[str], str] = str) -> None:
    """Data for people, painted at last. What a terminal would obey or hide is escaped: names come from files."""
    print(paint("\n".join(map(printable, text.split("\n")))))


def show_document(text: str) -> None:
    """The text of a file, as it is."""
    print(text.rstrip("\n"))


def show_json(data: object) -> None:
    """Data for programs, in characters that standard output can encode."""
    everything = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(data, indent=2, ensure_ascii=not everything))


def result(data: T, text: Callable[[T], str], as_json: bool) -> None:
    """Data, in the form that was asked for."""
    show_json(data) if as_json else show(text(data))


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown_bytes(count: int) -> str:
    """Bytes in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:,.2f} {unit}"


def note(text: str) -> None:
    """A remark. What a terminal would obey is escaped, as in `show`."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def show_diagnostics(diagnostics: Sequence[Diagnostic]) -> None:
    print(render(diagnostics, color=colored(sys.stderr)), file=sys.stderr, end="")


def show_diff(text: str) -> None:
    """A unified diff, in colour on a terminal. What that would obey is escaped, tabs excepted."""
    text = "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    if colored(sys.stdout):
        paint = {"+": "\x1b[32m", "-": "\x1b[31m", "@": "\x1b[36m"}
        lines = [f"{paint[line[0]]}{line}\x1b[0m" if line[:1] in paint else line for line in text.splitlines()]
        text = "\n".join(lines) + "\n"
    print(text, end="")


def colored(stream: TextIO) -> bool:
    """Whether to colour: a terminal that can, and nobody objects (https://no-color.org)."""
    return wipeable(stream) and not os.environ.get("NO_COLOR")


def wipeable(stream: TextIO) -> bool:
    """Whether a line can be overwritten: not in a file, nor on a terminal without a cursor that moves."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def progress(items: Sequence[T], label: Callable[[T], str]) -> Iterator[T]:
    """The items, with a line on stderr that says where we are; silent where that cannot be wiped out again."""
    if not wipeable(sys.stderr):
        yield from items
        return
    try:
        for number, item in enumerate(items, 1):
            print(f"\r\x1b[K[{number}/{len(items)}] {label(item)}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def prepare() -> None:
    """Make standard output and error such that printing cannot fail for what is printed: characters that the
    terminal's encoding lacks are escaped, and a closed stream is an error when it is written to, and not before."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it is open as long as the process is
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def guarded(command: Callable[P, ExitCode | None]) -> Callable[P, None]:
    """A command that ends with its exit code and never with a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(outcome(functools.partial(command, *args, **kwargs)))

    return run


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a process as Ctrl-C does, by an exception, so that temporary folders go."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not main or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def outcome(command: Callable[[], ExitCode | None]) -> int:
    """Run a command, say what stopped it if anything did, and return its exit code."""
    try:
        with _terminable():
            code = _ended(command)
        sys.stdout.flush()
        return code
    except SpecError as error:
        show_diagnostics(error.diagnostics)
        code = error.exit_code
    except Terminated:
        code = TERMINATED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except Exception as error:
        code = _explained(error)
    _discard_unwritten()
    return code


def _ended(command: Callable[[], ExitCode | None]) -> int:
    try:
        return command() or ExitCode.OK
    except SystemExit as end:  # a package's, which `run` runs in this process
        if end.code is None or isinstance(end.code, int):
            return end.code or ExitCode.OK
        note(str(end.code))  # as Python does
        return 1


def _discard_unwritten() -> None:
    """What standard output did not take must not fail again when Python exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: Exception) -> ExitCode:
    """An error that is about the machine is the user's to mend; any other is our bug."""
    problem = machine_problem(error)
    if os.environ.get("QWENSPEC_TRACEBACK") == "1":
        traceback.print_exception(error)
        return ExitCode.USAGE if problem else ExitCode.INTERNAL
    if problem is None:
        return _bug(error)
    if out_of_memory(error):
        hint = "fewer tokens, a smaller --dtype or a smaller model need less"
        show_diagnostics([Diagnostic("out-of-memory", problem, hint=hint)])
    else:
        where = "standard output: " if _printed(error) else ""
        show_diagnostics([Diagnostic("system", where + problem)])
    return ExitCode.USAGE


def _printed(error: Exception) -> bool:
    """Whether it comes out of a print, of this module's or of the libraries that print help: it names no file."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised == Path(__file__) or not PRINTING.isdisjoint(raised.parts[-3:-1])


def _bug(error: Exception) -> ExitCode:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE.parent)]
    frame = (ours or frames)[-1]
    report = Diagnostic(
        "internal",
        f"this is a bug in qwenspec: {type(error).__name__}: {error}, at {frame.filename}:{frame.lineno}",
        hint="please report it with the command, the spec and what it prints under QWENSPEC_TRACEBACK=1",
    )
    show_diagnostics([report])
    return ExitCode.INTERNAL
