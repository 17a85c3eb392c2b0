"""The folder of a conversion that is under way: OUT.partial, which becomes OUT when all of it is there.

It holds no *.safetensors and no config.json until then. `conversion.json` says what is converted and how, and
`finished.jsonl` has a line for each tensor that is on disk, so that another run goes on where this one stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from qwenspec.backend.runtime.stored import INDEX
from qwenspec.convert.plan import Shard
from qwenspec.convert.rounding import Error
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed

STATE, FINISHED = "conversion.json", "finished.jsonl"
CONFIG = "config.json"

Identity = dict[str, Any]


class Partial:
    """An unfinished conversion into `out`. `finished`: what rounding did to each tensor that is done, None to copies.

    Raises SpecError where the folder is of another conversion."""

    def __init__(self, out: Path, identity: Identity, shards: list[Shard]) -> None:
        self.out, self.shards = out, shards
        self.folder = out.absolute().with_name(f"{out.absolute().name}.partial")
        self.names = _names(len(shards))
        self.finished: dict[str, Error | None] = {}
        if self.folder.is_dir() and {file.name for file in self.folder.iterdir()} - {f"{STATE}.writing"}:
            self._check(identity)
            self._go_on()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / STATE, json.dumps(identity))
        for number, shard in enumerate(shards):
            self._prepare(self._unfinished(number), shard)

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
        self.folder.replace(self.out)
        for name in (FINISHED, STATE):
            (self.out / name).unlink()

    # --------------------------------------------------------------------------------------- what was begun

    def _check(self, identity: Identity) -> None:
        try:
            begun = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._fail("the folder exists, and is no unfinished conversion", "choose another OUT") from None
        if other := [key for key in identity if begun.get(key) != identity[key]]:
            message = f"the folder has an unfinished conversion that differs in its {listed(other, 'and')}"
            raise self._fail(message, "remove the folder to begin anew")

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

    def _fail(self, message: str, hint: str) -> SpecError:
        return SpecError([Diagnostic("unfinished-conversion", message, Location(str(self.folder), 0, 0), hint)])


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
    begun = file.with_name(f"{file.name}.writing")
    begun.write_text(text, encoding="utf-8")
    begun.replace(file)
