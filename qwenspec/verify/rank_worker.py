"""A rank of a pool: a process that does what it is asked to do, and answers.

python -m qwenspec.verify.rank_worker FD, of a pipe to `qwenspec.verify.rank_pool`; torchrun's variables are set.
"""

from __future__ import annotations

import contextlib
import copyreg
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from qwenspec.diagnostics import SpecError


@dataclass(frozen=True)
class Handle:
    """An object that ranks keep: each has its own."""

    number: int


@dataclass(frozen=True)
class Request:
    """Call a function of a module; handles among its arguments stand for what the rank keeps.

    keep: the result is kept under this number, and the answer is None
    forget: what is kept no longer"""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keep: int | None = None
    forget: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failure:
    """An exception on its way to another process, where its class need not exist.

    builtin: the nearest of its classes that every process has
    pickled: the exception itself; empty if it cannot be"""

    name: str
    text: str
    builtin: type[BaseException]
    pickled: bytes


@dataclass(frozen=True)
class Answer:
    """What a function returned, or raised."""

    value: Any = None
    failure: Failure | None = None


def serve(connection: Connection) -> None:
    """Answer until the pool is gone."""
    kept: dict[int, Any] = {}
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(request, kept))


def _answer(request: Request, kept: dict[int, Any]) -> Answer:
    for number in request.forget:
        del kept[number]
    arguments = [kept[one.number] if isinstance(one, Handle) else one for one in request.arguments]
    try:
        value = request.function(*arguments)
    except Exception as error:
        return Answer(failure=_failure(error))
    if request.keep is None:
        return Answer(value)
    kept[request.keep] = value
    return Answer()


def _failure(error: Exception) -> Failure:
    builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    pickled = b""
    with contextlib.suppress(Exception):  # whatever its arguments are
        pickled = pickle.dumps(error)
    return Failure(type(error).__name__, str(error), builtin, pickled)


# An exception is pickled with its message as its argument, which is not how this one is made.
copyreg.pickle(SpecError, lambda error: (SpecError, (error.diagnostics, error.exit_code)))


if __name__ == "__main__":
    from qwenspec.verify import rank_worker  # classes of `__main__` would be unknown to the pool

    rank_worker.serve(Connection(int(sys.argv[1])))
