"""One process among the ranks that share a model: what they tell one another beside their work, and how they end.

It goes through the launcher's store of keys and values. Every rank has a guard, a thread that ends the process when
the launcher or another rank is gone, or has failed; the first cause is printed once a machine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from traceback import format_exception
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

JOIN_SECONDS = 60.0  # for all ranks to come: they start together, and import torch before
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0  # without a beat, until a rank is given up
TELL_SECONDS = 3.0  # for another rank to say what went wrong
POLL_SECONDS = 0.02
SHOWN = 60  # characters of a fact in a message
GUARD = "guard of the ranks"  # its thread's name


class RankError(RuntimeError):
    """Ranks cannot work together; the message says why, and is the same on all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model, and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its machine


class StoreGone(RankError):
    """Nobody keeps the store any more, or nobody did."""


class Store:
    """A connection to the store, for one thread: a call that waits keeps others out. Raises StoreGone."""

    def __init__(self, host: bool) -> None:
        """`host`: this process opens it; else the launcher has, or rank 0 does."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch re-exports them

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        me = f"rank {os.environ['RANK']} on {socket.gethostname()}"
        patience = timedelta(seconds=JOIN_SECONDS)
        try:
            line = None if host else _call(address, port)
            store = TCPStore(address, port, None, host, patience, wait_for_workers=False, multi_tenant=True)
            self.line = line or _call(address, port)  # nothing is ever said on it: it ends when the store does
            self.line.setblocking(False)
        except (OSError, RuntimeError) as error:
            whose = "its own store" if host else "rank 0, or its launcher,"
            said = f"{me} cannot reach {whose} at {address}:{port}"
            raise StoreGone(f"{said}: {str(error).splitlines()[0]}") from error
        self._gone = f"{me} lost rank 0, or its launcher, at {address}:{port}"
        # Each attempt of a launcher to run the ranks has its own keys.
        attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
        self.torch = PrefixStore("/".join(["qwenspec", *attempt]), store)

    def has(self, *keys: str) -> bool:
        return bool(self._do("check", list(keys)))

    def get(self, key: str) -> str:
        return str(self._do("get", key).decode())

    def set(self, key: str, value: str) -> None:
        self._do("set", key, value)

    def first(self, key: str, value: str) -> str:
        """The value, or what was set before."""
        return str(self._do("compare_set", key, "", value).decode())

    def count(self, key: str, more: int = 1) -> int:
        return int(self._do("add", key, more))

    def wait(self, *keys: str, seconds: float) -> None:
        """Until the keys are there, or time is up."""
        until = time.monotonic() + seconds
        while not self.has(*keys) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _do(self, method: str, *arguments: object) -> Any:
        """By torch's client, as long as somebody listens: else it has pages to say."""
        try:
            if not self._ended():
                return getattr(self.torch, method)(*arguments)
        except RuntimeError as error:
            raise StoreGone(self._gone) from error
        raise StoreGone(self._gone)

    def _ended(self) -> bool:
        try:
            return self.line.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def _call(address: str, port: int) -> socket.socket:
    """A connection to whoever opens the port within the time to join."""
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((address, port), timeout=JOIN_SECONDS)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(10 * POLL_SECONDS)


class Meeting:
    """This process among the ranks, from the first time that it joins them until it ends."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.host = socket.gethostname()
        self.name = f"rank {ranks.rank} on {self.host}"
        self.process = os.getpid()
        self.parent = os.getppid()
        self.hosts_store = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = Store(self.hosts_store)
        self.failed = False  # this process knows that it has to end
        self.leaving = threading.Event()
        self.told = threading.Lock()  # taken for good by the thread that prints
        if not guarded():
            atexit.register(self.leave)
            sys.excepthook = self.last_words
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for the end of a collective

    # ------------------------------------------------------------------------------------------------- meeting

    def compare(self, facts: Mapping[str, object], problem: str) -> None:
        """Rank 0 reads what everybody says, and everybody what it makes of that.

        problem: why this rank cannot go on; empty when it can"""
        me = f"process {os.getpid()} on {self.host}"
        other = self.store.first(f"process/{self.ranks.rank}", me)
        if other != me:
            raise RankError(self.fail(f"two processes say that they are rank {self.ranks.rank}: {other}, and {me}"))
        turn = self.store.count(f"turns/{self.ranks.rank}")
        facts = {"WORLD_SIZE": self.ranks.size, **facts}
        said = json.dumps({"name": self.name, "facts": facts, "problem": problem}, default=str)
        self.store.set(f"facts/{turn}/{self.ranks.rank}", said)
        first = not guarded()
        patience = JOIN_SECONDS if first else math.inf  # the guard knows who is gone
        if self.ranks.rank == 0:
            self.store.set(f"verdict/{turn}", self.verdict(turn, patience))
        self.store.wait(f"verdict/{turn}", seconds=patience + TELL_SECONDS)
        if not self.store.has(f"verdict/{turn}"):
            raise RankError(self.fail(f"{self.name} waited {patience:g} s for rank 0, which did not come"))
        if verdict := self.store.get(f"verdict/{turn}"):
            self.failed = first
            raise RankError(verdict)
        if first:
            threading.Thread(target=self.guard, name=GUARD, daemon=True).start()

    def verdict(self, turn: int, patience: float) -> str:
        """What is wrong, as soon as it is known; empty when nothing is."""
        until = time.monotonic() + patience
        ours = json.loads(self.store.get(f"facts/{turn}/0"))
        missing = list(range(self.ranks.size))
        while missing and time.monotonic() < until:
            for rank in [rank for rank in missing if self.store.has(f"facts/{turn}/{rank}")]:
                missing.remove(rank)
                theirs = json.loads(self.store.get(f"facts/{turn}/{rank}"))
                if wrong := difference(ours, theirs) or theirs["problem"]:
                    return str(wrong)
            if self.store.has("cause"):
                return self.store.get("cause")
            time.sleep(POLL_SECONDS)
        names = ", ".join(map(str, missing))
        return f"{self.name} waited {patience:g} s for {self.ranks.size} ranks; not there: {names}" if missing else ""

    def together(self, step: Callable[[], T]) -> T:
        """See ranks.together."""
        turn = self.store.count(f"steps/{self.ranks.rank}")
        outcomes = [f"outcome/{turn}/{rank}" for rank in range(self.ranks.size)]
        try:
            result = step()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            first = self.store.first(f"error/{turn}", f"{self.name}: {said}")
            self.store.set(outcomes[self.ranks.rank], said)
            self.store.wait(*outcomes, seconds=TELL_SECONDS)
            if self.store.has(*outcomes) and {self.store.get(key) for key in outcomes} == {said}:
                raise
            raise RankError(self.fail(first)) from error
        self.store.set(outcomes[self.ranks.rank], "")
        while not self.store.has(*outcomes) and not self.store.has(f"error/{turn}"):
            time.sleep(POLL_SECONDS)  # for as long as they need: the guard knows who is gone
        if self.store.has(f"error/{turn}"):
            raise RankError(self.fail(self.store.get(f"error/{turn}")))
        return result

    # -------------------------------------------------------------------------------------------------- ending

    def fail(self, cause: str) -> str:
        """Make it known to all ranks; returns the cause that was known first."""
        self.failed = True
        return self.store.first("cause", cause)

    def tell(self, message: str, store: Store, first: bool = False) -> None:
        """See ranks.tell. `first`: this rank knows more than the others."""
        self.failed = True
        key, me = f"told/{self.host}", f"process {self.process}"
        with contextlib.suppress(StoreGone):  # then nobody else can be relied on
            if self.ranks.local_rank and not first:
                store.wait(key, seconds=TELL_SECONDS)
            if store.first(f"tells/{self.host}", me) != me:
                store.wait(key, seconds=TELL_SECONDS)  # a launcher ends all when the first has ended
                return
        if self.told.acquire(blocking=False):
            print(f"{message}\n", end="", file=sys.__stderr__, flush=True)  # in one piece: others may print too
        with contextlib.suppress(StoreGone):
            store.set(key, "")

    def guard(self) -> None:
        """A thread that beats, listens to the beats of the next rank, and ends the process when ranks have to end."""
        store = Store(host=False)
        neighbour = (self.ranks.rank + 1) % self.ranks.size
        beats, since = 0, time.monotonic()
        while not self.leaving.wait(BEAT_SECONDS):
            try:
                if os.getppid() != self.parent:
                    raise StoreGone(f"{self.name} ends with its launcher")
                store.count(f"beats/{self.ranks.rank}")
                heard = store.count(f"beats/{neighbour}", 0)
                if heard != beats or store.has(f"left/{neighbour}"):
                    beats, since = heard, time.monotonic()
                if time.monotonic() - since > SILENCE_SECONDS:
                    store.first("cause", f"rank {neighbour} was not heard of for {SILENCE_SECONDS:g} s")
                if store.has("cause"):
                    self.end(store.get("cause"), store)
            except StoreGone as error:
                self.end(str(error), store)

    def end(self, cause: str, store: Store) -> None:
        """The main thread may wait for a rank that is gone; if it knows, it has a while to end by itself."""
        if not self.leaving.wait(BEAT_SECONDS) and not (self.failed and self.leaving.wait(2 * TELL_SECONDS)):
            self.tell(f"error: {cause}", store)
            if self.hosts_store:
                time.sleep(BEAT_SECONDS)  # the others read the cause
            os._exit(1)

    def last_words(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """As sys.excepthook: a traceback is printed by the rank that failed first, and by no other."""
        said, first = f"{self.name}: {kind.__name__}: {error}", False
        with contextlib.suppress(StoreGone):
            if isinstance(error, RankError):
                said = str(error)
            elif from_collective(trace):
                said = self.lost(error)
            elif first := self.fail(said) == said:
                said = f"{self.name} failed:\n{''.join(format_exception(error)).rstrip()}"
        self.tell(f"error: {said}", self.store, first)

    def lost(self, error: BaseException) -> str:
        """What to say of an error that came out of a collective: another rank is gone, and may have said why."""
        self.failed = True
        time.sleep(BEAT_SECONDS / 2)  # if it kept the store, that goes a little after it
        said = f"{self.name} lost another rank ({str(error).split('. ')[0]:.200})"
        with contextlib.suppress(StoreGone):
            self.store.wait("cause", seconds=TELL_SECONDS)
            return self.fail(said)
        return said

    def agree(self, word: str) -> None:
        """Say that this rank has come so far; the one that hosts the store waits until all have."""
        self.store.set(f"{word}/{self.ranks.rank}", "")
        if self.hosts_store:
            self.store.wait(*(f"{word}/{rank}" for rank in range(self.ranks.size)), seconds=math.inf)

    def leave(self) -> None:
        """At the end of the process. Where rank 0 hosts the store it is the last to go."""
        import torch.distributed as dist

        if os.getpid() != self.process:  # a fork of a rank
            return
        with contextlib.suppress(StoreGone):  # rank 0 has gone: nobody needs anything
            if not self.failed:
                self.agree("done")
                if dist.is_initialized():
                    dist.destroy_process_group()
                if not self.hosts_store:
                    self.leaving.set()  # from here on the store may be gone
                self.agree("left")
            elif self.hosts_store:
                time.sleep(BEAT_SECONDS)  # the others read the cause
        self.leaving.set()
        for thread in threading.enumerate():
            if thread.name == GUARD:
                thread.join()


def guarded() -> bool:
    """Whether this process has a guard: one is enough for all packages that are loaded in it."""
    return any(thread.name == GUARD for thread in threading.enumerate())


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first fact in which another rank differs from rank 0; empty when there is none."""
    for name in ours["facts"] | theirs["facts"]:
        a, b = (json.dumps(said["facts"].get(name)) for said in (ours, theirs))
        if a != b:
            a, b = (value if len(value) <= SHOWN else f"{value[:SHOWN]}…" for value in (a, b))
            return f"{name} is {a} on {ours['name']} and {b} on {theirs['name']}: it has to be the same on all ranks"
    return ""


def from_collective(trace: TracebackType | None) -> bool:
    """Whether an exception came out of torch.distributed."""
    while trace:
        if "/torch/distributed/" in trace.tb_frame.f_code.co_filename.replace(os.sep, "/"):
            return True
        trace = trace.tb_next
    return False
