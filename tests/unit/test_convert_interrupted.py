"""Converting a checkpoint: what an interruption leaves, and how another run goes on with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conversions import files, refusal, request

from qwenspec.convert import convert as conversion
from qwenspec.convert import partial
from qwenspec.convert.convert import Request, convert
from qwenspec.diagnostics import SpecError
from qwenspec.hf.checkpoint import import_path
from qwenspec.spec.quantization import Int4
from qwenspec.verify.weights import random_weights, save_checkpoint


def interrupted(asked: Request, tensors: int) -> Path:
    """Run until so many tensors are done; returns the folder that is left."""

    def progress(tensor: str, done: int, total: int) -> None:
        nonlocal tensors
        tensors -= 1
        if tensors < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(asked, progress)
    assert not asked.out.exists()
    return asked.out.with_name(f"{asked.out.name}.partial")


def resumed(asked: Request, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run to the end; returns the tensors that it did itself."""
    did, do = [], conversion._do

    def counting(job: Any, *rest: Any) -> Any:
        did.append(job.tensor)
        return do(job, *rest)

    monkeypatch.setattr(conversion, "_do", counting)
    convert(asked)
    return did


@pytest.mark.parametrize("limit", [8_000, 10**9])
@pytest.mark.parametrize("tensors", [0, 9, 22])
def test_an_interrupted_run_is_gone_on_with(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, tensors: int
) -> None:
    made = source()
    asked = request(made, tmp_path / "out", shard_bytes=limit)
    left = interrupted(asked, tensors)
    assert not list(left.glob("*.safetensors*"))
    with pytest.raises(SpecError):
        import_path(left)
    assert len(resumed(asked, monkeypatch)) == 25 - tensors
    whole = request(made, tmp_path / "whole" / "out", shard_bytes=limit)
    convert(whole)
    assert files(asked.out) == files(whole.out)
    assert not left.exists()


def test_a_tensor_that_was_only_begun_is_done_again(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine stopped: a line is torn, and a file is gone."""
    made = source()
    asked = request(made, tmp_path / "out", shard_bytes=8_000)
    left = interrupted(asked, 12)
    lines = (left / partial.FINISHED).read_text()
    (left / partial.FINISHED).write_text(lines[:-20])
    in_first = len(
        [line for line in lines.splitlines()[:11] if json.loads(line)["tensor"] == "model.embed_tokens.weight"]
    )
    (left / "shard-00001").unlink()
    left = interrupted(asked, 0)  # now the file is there again, with nothing in it
    assert len(resumed(asked, monkeypatch)) == 25 - 11 + in_first
    whole = request(made, tmp_path / "whole" / "out", shard_bytes=8_000)
    convert(whole)
    assert files(asked.out) == files(whole.out)


_STOP = """
import os, sys
from pathlib import Path
from qwenspec.convert.convert import Request, convert
from qwenspec.spec.load import load
from qwenspec.spec.quantization import Int4

def progress(tensor, done, total):
    if tensor == "model.layers.1.mlp.up_proj.weight":
        os._exit(9)

folder, spec, out = sys.argv[1:]
convert(Request(Path(folder), load(spec), Int4(scheme="int4"), Path(out)), progress)
"""


def test_a_process_that_is_killed(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is finished is in the file."""
    made = request(source(), tmp_path / "out")
    command = [sys.executable, "-c", _STOP, str(made.folder), str(tmp_path / "spec.yaml"), str(made.out)]
    assert subprocess.run(command, check=False).returncode == 9
    assert resumed(made, monkeypatch)[0] == "model.layers.1.mlp.up_proj.weight"
    whole = request((made.spec, made.folder), tmp_path / "whole" / "out")
    convert(whole)
    assert files(made.out) == files(whole.out)


@pytest.mark.parametrize("write", [0, 1])
def test_an_interruption_at_the_very_end(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """While files get their names, and before config.json is there."""
    asked = request(source(), tmp_path / "out", shard_bytes=8_000)
    with monkeypatch.context() as patched:

        def interrupts(file: Path, text: str) -> None:
            if file.name in ("model.safetensors.index.json", "config.json")[write:]:
                raise KeyboardInterrupt
            file.write_text(text)

        patched.setattr(partial, "_write", interrupts)
        with pytest.raises(KeyboardInterrupt):
            convert(asked)
    assert not asked.out.exists()
    with pytest.raises(SpecError):
        import_path(tmp_path / "out.partial")
    assert resumed(asked, monkeypatch) == []
    assert import_path(asked.out).spec.quantization == asked.quantization


def test_what_another_conversion_began_is_left_alone(source: Any, tmp_path: Path) -> None:
    spec, folder = source()
    left = interrupted(request((spec, folder), tmp_path / "out"), 5)
    before = files(left)
    other = Int4(scheme="int4", group_size=64)
    assert "`spec or options`" in refusal(request((spec, folder), tmp_path / "out", other))[1]
    code, message = refusal(request((spec, folder), tmp_path / "out", shard_bytes=9_000))
    assert (code, "`size of shards`" in message) == ("unfinished-conversion", True)
    save_checkpoint(spec, random_weights(spec, 1), folder, "float32")
    assert "`checkpoint`" in refusal(request((spec, folder), tmp_path / "out"))[1]
    assert files(left) == before
    for name in before:
        (left / name).unlink()
    (left / "notes.txt").write_text("mine")
    assert "is no unfinished conversion" in refusal(request((spec, folder), tmp_path / "out"))[1]


# ------------------------------------------------------------------------------------------ stopped at any call


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def stopped(asked: Request, change: int) -> bool:
    """A process that is gone before its change number `change` to the file system; whether it came so far."""
    child = os.fork()
    if not child:
        count = lines = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count, lines
            if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            lines += str(arguments[0]).endswith(partial.FINISHED)
            if str(arguments[0]).endswith(partial.FINISHED) and 3 < lines < 12:
                return  # one tensor is like another
            if count == change:
                os._exit(9)
            count += 1

        sys.addaudithook(audit)
        try:
            convert(asked)
        finally:
            os._exit(0 if asked.out.is_dir() else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_process_that_is_stopped_anywhere(source: Any, tmp_path: Path) -> None:
    """Before any file is opened, renamed or removed: the same command goes on, and the result is the same."""
    made = source(num_hidden_layers=1)
    whole = request(made, tmp_path / "whole" / "out", shard_bytes=8_000)
    convert(whole)
    change = 0
    while True:
        asked = request(made, tmp_path / str(change) / "out", shard_bytes=8_000)
        if not stopped(asked, change):
            break
        if not change % 5:
            stopped(asked, change // 2)  # and once more
        convert(asked)
        assert files(asked.out) == files(whole.out), change
        assert sorted(path.name for path in asked.out.parent.iterdir()) == ["out"]
        change += 1
    assert change > 30


def test_a_second_process_waits_for_none(source: Any, tmp_path: Path) -> None:
    asked = request(source(), tmp_path / "out")
    said = []

    def another(tensor: str, done: int, total: int) -> None:
        if not said:
            said.append(refusal(asked))

    convert(asked, another)
    assert said == [("conversion-under-way", "another process converts into this folder")]
    assert not (tmp_path / "out.partial").exists()


def test_a_second_process_that_comes_late(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen no OUT, and there is one when it begins to write."""
    asked = request(source(), tmp_path / "out")
    identity = conversion._identity
    late = []

    def other(*arguments: Any) -> Any:
        if not late:
            late.append(True)
            convert(asked)
        return identity(*arguments)

    monkeypatch.setattr(conversion, "_identity", other)
    with pytest.raises(SpecError, match="the folder is not empty"):
        convert(asked)
    assert not (tmp_path / "out.partial").exists()
    assert import_path(asked.out).spec.quantization == asked.quantization


@pytest.mark.parametrize("state", ["", "[]", '{"version of'])
def test_a_state_that_is_none(source: Any, tmp_path: Path, state: str) -> None:
    asked = request(source(), tmp_path / "out")
    left = interrupted(asked, 3)
    (left / partial.STATE).write_text(state)
    assert refusal(asked) == ("unfinished-conversion", "the folder exists, and is no unfinished conversion")
