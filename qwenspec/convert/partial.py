"""The folder of a conversion that is under way: OUT.partial, which becomes OUT when all of it is there.

It holds no *.safetensors and no config.json until then. `conversion.json` says what is converted and how, and
`finished.jsonl` has a line for each tensor that is on disk, so that another run goes on where this one stopped, at
whatever call that was. `conversion.lock` is locked by the process that is at work.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from qwenspec.backend.runtime.stored import INDEX
from qwenspec.convert.plan import Shard
from qwenspec.convert.rounding import Error
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed

STATE, FINISHED, LOCK = "conversion.json", "finished.jsonl", "conversion.lock"
OURS = (FINISHED, LOCK, STATE)  # removed at the end, in this order: while there is a STATE, they are no one else's
CONFIG = "config.json"
WRITING = ".writing"

Identity = dict[str, Any]


class Partial:
    """An unfinished conversion into `out`. `finished`: what rounding did to each tensor that is done, None to copies.

    It is this process's alone until it is closed. Raises SpecError where the folder is of another conversion
    (`unfinished-conversion`), where another process is at work in it (`conversion-under-way`), and where `out` holds
    anything else (`file-exists`)."""

    def __init__(self, out: Path, identity: Identity, shards: list[Shard]) -> None:
        self.out, self.shards = out, shards
        self.folder = out.absolute().with_name(f"{out.absolute().name}.partial")
        self.names = _names(len(shards))
        self.finished: dict[str, Error | None] = {}
        self._lock: BinaryIO | None = None
        try:
            self._open(identity)
            for number, shard in enumerate(shards):
                self._prepare(self._unfinished(number), shard)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others go on with it."""
        if self._lock:
            self._lock.close()

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return sum(job.bytes for shard in self.shards for job in shard.jobs if job.tensor not in self.finished)

    @contextmanager
    def open(self, number: int) -> Iterator[BinaryIO]:
        """A shard's file, to write in."""
        with self._unfinished(number).open("r+b") as file:
            yield file

    def finish(self, tensor: str, error: Error | None, file: BinaryIO) -> None:
        """Its bytes are all in the file: make sure of it, and remember."""
        file.flush()
        os.fsync(file.fileno())
        with (self.folder / FINISHED).open("a", encoding="utf-8") as lines:
            lines.write(_line(tensor, error))
        self.finished[tensor] = error

    def complete(self, config: dict[str, Any] | None) -> None:
        """Everything is there: give it the form of a checkpoint, and the folder its name."""
        for number, name in enumerate(self.names):
            self._unfinished(number).replace(self.folder / name)
        if len(self.shards) > 1:
            _write(self.folder / INDEX, json.dumps(self._index(), indent=2))
        if config is not None:
            _write(self.folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for file in self.folder.rglob("*"):
            _keep(file)
        self.folder.replace(self.out)
        for name in OURS:
            (self.out / name).unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------- what was begun

    def _open(self, identity: Identity) -> None:
        complete = not self.folder.exists() and (self.out / STATE).is_file()
        here = self.out if complete else self.folder  # complete: it was stopped after its folder got the name
        here.mkdir(parents=True, exist_ok=True)
        self._begun(here, identity)  # a folder of somebody else's is refused before there is a lock in it
        self._lock = self._locked(here)
        begun = self._begun(here, identity)
        if complete:
            self.out.replace(self.folder)
        elif self.out.is_dir() and any(self.out.iterdir()):  # another process was quicker
            if not begun:
                shutil.rmtree(self.folder)
            raise _fail(self.out, "file-exists", "the folder is not empty", "choose another OUT")
        if begun:
            self._go_on()
        else:
            _write(self.folder / STATE, json.dumps(identity))

    def _locked(self, folder: Path) -> BinaryIO:
        lock = (folder / LOCK).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat()):
                raise BlockingIOError  # it has got its name meanwhile
        except (BlockingIOError, FileNotFoundError):
            lock.close()
            message = "another process converts into this folder"
            raise _fail(folder, "conversion-under-way", message, "wait for it, or choose another OUT") from None
        except OSError:
            pass  # a file system without locks
        return lock

    def _begun(self, folder: Path, identity: Identity) -> bool:
        """Whether something of this conversion is there; raises SpecError for anything else."""
        if {file.name for file in folder.iterdir()} <= {LOCK, STATE + WRITING}:
            return False
        try:
            begun = json.loads((folder / STATE).read_text(encoding="utf-8"))
            other = [key for key in identity if begun.get(key) != identity[key]]
        except (OSError, ValueError, AttributeError):
            message = "the folder exists, and is no unfinished conversion"
            raise _fail(folder, "unfinished-conversion", message, "choose another OUT") from None
        if other:
            message = f"the folder has an unfinished conversion that differs in its {listed(other, 'and')}"
            raise _fail(folder, "unfinished-conversion", message, "remove the folder to begin anew")
        return True

    def _go_on(self) -> None:
        (self.folder / CONFIG).unlink(missing_ok=True)
        for number, name in enumerate(self.names):
            if (self.folder / name).exists():
                (self.folder / name).replace(self._unfinished(number))
        whole = {
            job.tensor
            for number, shard in enumerate(self.shards)
            if _size(self._unfinished(number)) == shard.size
            for job in shard.jobs
        }
        for tensor, error in _finished(self.folder / FINISHED):
            if tensor in whole:
                self.finished[tensor] = error
        _write(self.folder / FINISHED, "".join(_line(tensor, error) for tensor, error in self.finished.items()))

    def _prepare(self, file: Path, shard: Shard) -> None:
        if _size(file) != shard.size:
            with file.open("wb") as opened:
                opened.write(shard.header)
                opened.truncate(shard.size)

    # ----------------------------------------------------------------------------------------------- parts

    def _unfinished(self, number: int) -> Path:
        return self.folder / f"shard-{number + 1:05}"

    def _index(self) -> dict[str, Any]:
        files = {tensor: name for name, shard in zip(self.names, self.shards, strict=True) for tensor in shard.offsets}
        size = sum(job.bytes for shard in self.shards for job in shard.jobs)
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}


def holds_others(out: Path) -> bool:
    """Whether a folder holds anything, and not what a conversion that was stopped at its very end left there."""
    return out.is_dir() and any(out.iterdir()) and not (out / STATE).is_file()


def _fail(folder: Path, code: str, message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic(code, message, Location(str(folder), 0, 0), hint)])


def _names(count: int) -> list[str]:
    """Of the files, as Hugging Face numbers them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _line(tensor: str, error: Error | None) -> str:
    return json.dumps({"tensor": tensor, "error": error and asdict(error)}) + "\n"


def _finished(file: Path) -> Iterator[tuple[str, Error | None]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last one, if the machine stopped
            continue
        yield entry["tensor"], entry["error"] and Error(**entry["error"])


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _write(file: Path, text: str) -> None:
    """All of it or nothing."""
    begun = file.with_name(file.name + WRITING)
    begun.write_text(text, encoding="utf-8")
    _keep(begun)
    begun.replace(file)


def _keep(file: Path) -> None:
    """What is in it is on the disk, which a name that it gets must not reach before."""
    if file.is_file():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
