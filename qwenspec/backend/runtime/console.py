"""How the command ends, and what it says beside its answers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from .machine import machine_problem
from .ranks import tell

INTERRUPTED = 130  # as a shell says it of SIGINT
BROKEN_PIPE = 141  # of SIGPIPE


def die_of_ctrl_c(package: str) -> None:
    """While `python -m package` imports libraries, Ctrl-C ends the process at once: there is nothing that they could
    catch, or Python print. `ended` takes this back."""
    running = sys.argv[0] == "-m" and any(
        f"{word.removeprefix('-m')}.".startswith(f"{package}.") for word in sys.orig_argv
    )
    if running and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(run: Callable[[], None], *errors: type[Exception]) -> int:
    """Run, and return the exit code: 2 after trouble that is told in a sentence, such as one of `errors`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is None:  # closed by whoever started the command
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed, and answers go there")
        run()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has gone: nothing more may be written, at the interpreter's end neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if problem := machine_problem(error):
            tell(f"error: {problem}")
        elif isinstance(error, (*errors, ValueError)):
            tell(f"error: {error}")
        else:
            raise
    return 2


def warn(tokens: int, limit: int) -> None:
    if tokens > limit:
        note(f"up to {tokens} tokens, and the model was made for {limit}")


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr, flush=True)
