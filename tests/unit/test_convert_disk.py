"""Converting on a file system that fails: at whichever call, another run goes on, and nothing half done looks whole."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from conversions import files, request

from qwenspec.convert import partial
from qwenspec.convert.convert import convert
from qwenspec.diagnostics import SpecError
from qwenspec.hf.checkpoint import import_path

CHANGES = ("replace", "rename", "mkdir", "unlink", "fsync", "ftruncate")  # of os


@contextmanager
def failing_at(call: int) -> Iterator[list[str]]:
    """Of all calls that open a file to write, or change something otherwise, one fails: yields those before it."""
    done: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            mode = options.get("mode", arguments[1] if len(arguments) > 1 else "r") if name == "open" else "w"
            if isinstance(mode, str) and set(mode) & set("wax+"):
                if len(done) == call:
                    done.append("failed")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done.append(name)
            return function(*arguments, **options)

        return count

    with (
        mock.patch.multiple(os, **{name: counted(name, getattr(os, name)) for name in CHANGES}),
        mock.patch.object(io, "open", counted("open", io.open)),
        mock.patch.object(builtins, "open", counted("open", builtins.open)),
    ):
        yield done


def test_names_do_not_reach_the_disk_before_what_they_name(source: Any, tmp_path: Path) -> None:
    kept: set[int] = set()
    missing: dict[str, list[str]] = {}
    fsync, replace = os.fsync, os.replace

    def keep(handle: int) -> None:
        kept.add(os.fstat(handle).st_ino)
        fsync(handle)

    def name(old: Path, new: Path) -> None:
        named = [file for file in (old, *old.rglob("*")) if file.is_file()]
        missing[new.name] = [str(file) for file in named if file.stat().st_ino not in kept]
        replace(old, new)

    asked = request(source(num_hidden_layers=1), tmp_path / "out", shard_bytes=8_000)
    (asked.folder / "templates").mkdir()
    (asked.folder / "templates" / "tool.jinja").write_text("x")
    with mock.patch.multiple(os, fsync=keep, replace=name):
        convert(asked)
    assert {"conversion.json", "config.json", "model.safetensors.index.json", "out"} <= missing.keys()
    assert not any(missing.values()), missing


def test_any_call_may_fail(source: Any, tmp_path: Path) -> None:
    made = source(num_hidden_layers=1)
    options = {"shard_bytes": 8_000}
    convert(request(made, tmp_path / "whole", **options))
    whole = files(tmp_path / "whole")
    with failing_at(-1) as calls:
        convert(request(made, tmp_path / "counted", **options))
    assert len(calls) > 30
    for call in range(len(calls)):
        parent = tmp_path / f"out-{call}"  # the spec that is written names its variant like OUT
        parent.mkdir()
        asked = request(made, parent / "whole", **options)
        with failing_at(call) as done, suppress(OSError, SpecError):
            convert(asked)
            assert done[call] == "failed"
            assert calls[call] == "mkdir"  # of a folder that is there
        for folder in list(parent.iterdir()):
            with suppress(SpecError):
                import_path(folder)  # it looks whole: so it is, with at most a file of the conversion's own beside
                left = files(folder)
                assert {name: left[name] for name in whole} == whole
                assert left.keys() - whole.keys() <= set(partial.OURS)
        if not asked.out.exists():
            convert(asked)
            assert files(asked.out) == whole, call
        assert not list(parent.glob("whole.*")), call
