"""Compiling packages ahead, in processes that have neither torch nor transformers in them."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import qwenspec
from qwenspec.spec.document import Spec

Key = tuple[str, str]  # case and dtype


class Ahead:
    """TVM packages on their way: emitted, and their libraries in the cache, in the order given."""

    def __init__(self, wanted: Mapping[Key, Spec], folder: Path) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._packages: dict[Key, Future[Path]] = {}
        if wanted:
            spawn = multiprocessing.get_context("spawn")  # a fork would take this process's threads' locks along
            self._pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), spawn, _leave_with_parent)
            for (case, dtype), spec in wanted.items():
                self._packages[case, dtype] = self._pool.submit(build, spec, folder / f"{case}-{dtype}", dtype)

    def package(self, case: str, dtype: str) -> Path:
        return self._packages[case, dtype].result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def build(spec: Spec, folder: Path, dtype: str) -> Path:
    """Emits the TVM package of a spec and compiles it for this CPU. In a process of its own."""
    from qwenspec.backend.load import import_package

    package = qwenspec.emit(spec, backend="tvm", out=folder)
    with contextlib.redirect_stderr(io.StringIO()):  # it says that it compiles
        engine = import_package(package).engine
        engine.find_library(engine.find_target("cpu"), dtype)
    return package


def _leave_with_parent() -> None:
    """A test run that is killed leaves no process behind."""

    def leave() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
