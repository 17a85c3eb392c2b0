"""What every command shares: where output goes, and how it ends.

Data goes to stdout, everything else to stderr, so that a pipe never carries a remark.
"""

from __future__ import annotations

import contextlib
import functools
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

from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError, render

P = ParamSpec("P")
T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
TERMINATED = 143  # 128 + SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE
PACKAGE = Path(__file__).parents[1]


def show(text: str) -> None:
    """Data for people."""
    print(text)


def show_json(data: object) -> None:
    """Data for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


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
    """A remark."""
    print(text, file=sys.stderr)


def show_diagnostics(diagnostics: Sequence[Diagnostic]) -> None:
    print(render(diagnostics, color=colored(sys.stderr)), file=sys.stderr, end="")


def show_diff(text: str) -> None:
    """A unified diff, in colour on a terminal."""
    if colored(sys.stdout):
        paint = {"+": "\x1b[32m", "-": "\x1b[31m", "@": "\x1b[36m"}
        lines = [f"{paint[line[0]]}{line}\x1b[0m" if line[:1] in paint else line for line in text.splitlines()]
        text = "\n".join(lines) + "\n"
    print(text, end="")


def colored(stream: TextIO) -> bool:
    """Whether to colour: a terminal that can, and nobody objects (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def progress(items: Sequence[T], label: Callable[[T], str]) -> Iterator[T]:
    """The items, with a line on stderr that says where we are; silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        for number, item in enumerate(items, 1):
            print(f"\r\x1b[K[{number}/{len(items)}] {label(item)}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def guarded(command: Callable[P, ExitCode | None]) -> Callable[P, None]:
    """A command that ends with its exit code and never with a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(_outcome(functools.partial(command, *args, **kwargs)))

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


def _outcome(command: Callable[[], ExitCode | None]) -> int:
    try:
        with _terminable():
            code = command()
        sys.stdout.flush()
        return code or ExitCode.OK
    except SpecError as error:
        show_diagnostics(error.diagnostics)
        return error.exit_code
    except Terminated:
        return TERMINATED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            return _bug(error)
        show_diagnostics([Diagnostic("system", f"{error.filename}: {error.strerror}")])
        return ExitCode.USAGE
    except Exception as error:
        if "OutOfMemory" in type(error).__name__:  # torch's, which is not imported here
            show_diagnostics([Diagnostic("out-of-memory", str(error).splitlines()[0])])
            return ExitCode.USAGE
        return _bug(error)


def _discard_stdout() -> None:
    """Whoever read our output has gone: what is still buffered must not fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bug(error: Exception) -> ExitCode:
    if os.environ.get("QWENSPEC_TRACEBACK") == "1":
        traceback.print_exception(error)
        return ExitCode.INTERNAL
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
