"""Ctrl-C, also while a library is imported that catches every exception and goes on."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def obey() -> None:
    """Make Ctrl-C end what runs with KeyboardInterrupt, unless whoever started this process has it ignored.

    An import that swallows the exception gets to its end, and no further."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    if (importing := _outermost_import(frame)) and sys.gettrace() is None:
        _insist(importing)
    raise KeyboardInterrupt


def _outermost_import(frame: FrameType | None) -> FrameType | None:
    found = None
    while frame:
        if frame.f_code.co_filename == IMPORT_SYSTEM:
            found = frame
        frame = frame.f_back
    return found


def _insist(importing: FrameType) -> None:
    """Make an import end with KeyboardInterrupt, whatever became of that inside."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event != "return":
            return trace
        raise KeyboardInterrupt  # with which Python takes the trace function back

    importing.f_trace = trace
    sys.settrace(lambda *_: None)  # without one for calls, Python asks none of a frame
