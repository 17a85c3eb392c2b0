"""Processes that share models as ranks, and live as long as this one: a request is done by all, and they must agree.

Each rank finds the variables that torchrun sets, and joins the others by itself when a package is opened.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any, NoReturn, cast

import numpy as np

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.verify.rank_worker import Answer, Failure, Handle, Request

PATIENCE = 300.0  # seconds until the first rank has answered
OPENING = 1200.0  # the same where something is made, as models are, which may take compiling
GRACE = 120.0  # seconds that the others may take longer
FAREWELL = 3.0  # seconds in which ranks may end by themselves
TOLD = 2000  # characters of what a rank printed
REASON = 400  # of these, in a sentence


class RankFailure(AssertionError):
    """Ranks do not do what they must do together: one is gone, does not answer, or answers something else."""


class _Rank:
    """One process."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (for as long as the process lives)
        self.connection, theirs = Pipe()
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        others = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        others["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the modules of functions that it is sent
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qwenspec.verify.rank_worker", str(theirs.fileno())],
            env=os.environ | others | {name: str(value) for name, value in told.items()},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.printed,
            stderr=self.printed,
        )
        theirs.close()

    def end(self) -> None:
        """The process has ended; by itself, if it did so in time after its connection was closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(FAREWELL)
        self.process.kill()
        self.process.wait()
        self.printed.close()

    def last_words(self) -> str:
        size = self.printed.seek(0, os.SEEK_END)
        self.printed.seek(max(0, size - TOLD))
        return self.printed.read().decode(errors="replace").strip() or "nothing"


class RankPool:
    """`size` ranks. After a RankFailure of a rank that is gone or does not answer the pool is closed."""

    def __init__(self, size: int) -> None:
        self.size = size
        port = _free_port()
        self._ranks = [_Rank(rank, size, port) for rank in range(size)]
        self._numbers = itertools.count()
        self._forgotten: list[int] = []
        self.closed = False
        self.end = "these ranks have been told to end"  # why they are gone, once they are
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return not self.closed and all(rank.process.poll() is None for rank in self._ranks)

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns, on every rank alike; what it raises, if all of them raise it.

        Arrays are alike to the last bit. A class of errors that this process has not becomes one of the same name.
        Raises RankFailure."""
        return _agreed(self._answers(Request(function, arguments)))

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; raises what `do` raises."""
        answers = self._answers(Request(function, arguments))
        if any(answer.failure for answer in answers):
            _agreed(answers)
        return [answer.value for answer in answers]

    def make(self, function: Callable[..., Any], *arguments: Any) -> Handle:
        """What the function returns is kept by every rank, for as long as the handle is."""
        handle = Handle(next(self._numbers))
        _agreed(self._answers(Request(function, arguments, keep=handle.number), OPENING))
        weakref.finalize(handle, self._forgotten.append, handle.number)
        return handle

    def close(self) -> None:
        """No process is left."""
        if not self.closed:
            self.closed = True
            for rank in self._ranks:
                rank.connection.close()
            for rank in self._ranks:
                rank.end()

    # ------------------------------------------------------------------------------------------------ ranks

    def _answers(self, request: Request, patience: float = PATIENCE) -> list[Answer]:
        if self.closed:
            raise RankFailure(self.end)
        forget = tuple(self._forgotten)
        del self._forgotten[: len(forget)]
        request = Request(request.function, request.arguments, request.keep, forget)
        message = pickle.dumps(request)
        for number, rank in enumerate(self._ranks):
            try:
                rank.connection.send_bytes(message)
            except OSError as error:
                raise self._gone(number) from error
        return self._received(patience)

    def _received(self, patience: float) -> list[Answer]:
        waiting = {rank.connection: number for number, rank in enumerate(self._ranks)}
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + patience
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._silent(sorted(waiting.values()), answers)
            for connection in cast("list[Connection]", ready):
                number = waiting.pop(connection)
                try:
                    answers[number] = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._gone(number) from error
            deadline = min(deadline, time.monotonic() + GRACE)
        return [answers[number] for number in range(self.size)]

    def _gone(self, number: int) -> RankFailure:
        rank = self._ranks[number]
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(GRACE)
        return self._broken(f"rank {number} of {self.size} has ended with {rank.process.poll()}", [number])

    def _silent(self, numbers: Sequence[int], answers: Mapping[int, Answer]) -> RankFailure:
        told = [f"rank {n} says {_said(answer)}" for n, answer in sorted(answers.items())] or ["nor does any other"]
        return self._broken(f"rank {numbers[0]} of {self.size} does not answer; {', '.join(told)}", numbers)

    def _broken(self, reason: str, numbers: Sequence[int]) -> RankFailure:
        printed = "".join(f"\nrank {number} printed: {self._ranks[number].last_words()}" for number in numbers)
        self.close()
        self.end = reason + printed
        return RankFailure(self.end)


@functools.cache
def _pools() -> dict[int, RankPool]:
    return {}


@functools.cache
def _given_up() -> dict[int, str]:
    """Why so many ranks are not started again."""
    return {}


def pool(size: int) -> RankPool:
    """The ranks of this process, so many of them; started when first asked for, and anew once they are gone.

    Raises SpecError (`ranks-end`) when they did not even start, the same for ever after."""
    found = _pools().get(size)
    if size not in _given_up() and (found is None or not found.alive):
        if found:
            found.close()
        found = _pools()[size] = RankPool(size)
        try:
            found.do(len, ())
        except RankFailure:
            _given_up()[size] = found.end
    if size in _given_up():
        reason = " ".join(_given_up()[size].split())
        raise SpecError([Diagnostic("ranks-end", f"{size} ranks cannot be used: {reason[-REASON:]}")])
    assert found is not None
    return found


def give_up(ranks: RankPool) -> NoReturn:
    """They ended before they could do anything: others would too. Raises what `pool` raises from here on."""
    _given_up()[ranks.size] = ranks.end
    pool(ranks.size)
    raise AssertionError("pool raises")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _agreed(answers: Sequence[Answer]) -> Any:
    first = answers[0]
    for rank, answer in enumerate(answers):
        if not _alike(_told(answer), _told(first)):
            raise RankFailure(f"ranks 0 and {rank} differ: {_said(first)}, and {_said(answer)}")
    if first.failure is not None:
        raise _rebuilt(first.failure)
    return first.value


def _told(answer: Answer) -> Any:
    return (answer.failure.name, answer.failure.text) if answer.failure else ("returned", answer.value)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b)


def _said(answer: Answer) -> str:
    if answer.failure:
        return f"{answer.failure.name}: {answer.failure.text}"
    return f"an array {list(answer.value.shape)}" if isinstance(answer.value, np.ndarray) else repr(answer.value)[:200]


def _rebuilt(failure: Failure) -> BaseException:
    """The same exception, or one of the same name and text: a package's classes are its ranks' alone."""
    with contextlib.suppress(Exception):  # pickles of classes that are not here
        found: BaseException = pickle.loads(failure.pickled)
        return found
    return cast("BaseException", type(failure.name, (failure.builtin,), {})(failure.text))
