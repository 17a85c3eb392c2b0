"""What commands write is there whole, or what was there before is; and nothing is left beside it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from cli_runs import TINY, call

from qwenspec import files
from qwenspec.commands import execute
from qwenspec.diagnostics import SpecError
from qwenspec.files import check_place, write_whole


def full(*given: object) -> None:
    raise OSError(28, "No space left on device")


def half(stream: BinaryIO) -> None:
    stream.write(b"half of it")
    full()


@pytest.mark.parametrize("content", ["täxt\n", "täxt\n".encode(), lambda stream: stream.write("täxt\n".encode())])
def test_text_bytes_and_what_a_function_writes(content: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "file.txt"
    for _ in range(2):
        write_whole(file, content)
        assert file.read_bytes() == "täxt\n".encode()
        assert list(file.parent.iterdir()) == [file]


def test_permissions_are_those_of_the_file_or_of_any_new_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", "")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        (tmp_path / "new").chmod(0o751)
        write_whole(tmp_path / "new", "again")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o751
    finally:
        os.umask(before)


@pytest.mark.parametrize("call_of_os", ["open", "fsync", "replace", "fchmod"])
def test_a_failing_call_leaves_what_was_there(call_of_os: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call_of_os, full)
        with pytest.raises(SpecError, match=rf"^{file}: No space left on device$"):
            write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop", [half, KeyboardInterrupt, MemoryError])
def test_so_does_a_writer_that_is_stopped(stop: object, tmp_path: Path) -> None:
    def write(stream: BinaryIO) -> None:
        stream.write(b"half of it")
        if isinstance(stop, type):
            raise stop
        full()

    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises((SpecError, KeyboardInterrupt, MemoryError)):
        write_whole(file, write)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_what_is_no_file_are_refused_before_the_work(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("important")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    refused = {"link": "symbolic link", "dangling": "symbolic link", "fifo": "no regular", "folder": "no regular"}
    for name, reason in {**refused, "victim/file": "is no folder", "a" * 300: "too long"}.items():
        for act in (check_place, lambda file: write_whole(file, "new")):
            with pytest.raises(SpecError, match=reason):
                act(tmp_path / name)
    assert victim.read_text() == "important"
    assert not (tmp_path / "nothing").exists()


def test_names_of_files_on_their_way_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one guessed, it would not be opened."""
    victim = tmp_path / "victim"
    victim.write_text("important")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0")
    (tmp_path / ".file.0.new").symlink_to(victim)
    with pytest.raises(SpecError, match="File exists"):
        write_whole(tmp_path / "file", "new")
    assert victim.read_text() == "important"


# ----------------------------------------------------------------------------------------------------- commands

LIMITED = """
import resource, sys
from qwenspec.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
main()
"""
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("command", [["import", "config.json", "--force", "-o", "keep"], ["schema", "-o", "keep"]])
def test_a_disk_that_is_full_keeps_the_old_file(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "keep").write_text("edited by hand\n")
    program = [sys.executable, "-P", "-c", LIMITED, *command]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error[cannot-write]: keep: File too large\n")
    assert (tmp_path / "keep").read_text() == "edited by hand\n"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "keep"}


def test_logits_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.npy"
    execute.save(file, np.ones((2, 3), np.float32))
    assert np.array_equal(np.load(file), np.ones((2, 3)))
    monkeypatch.setattr(np, "save", lambda stream, values: half(stream))
    with pytest.raises(SpecError, match="No space left"):
        execute.save(file, np.zeros((2, 3), np.float32))
    assert np.array_equal(np.load(file), np.ones((2, 3)))


@pytest.mark.parametrize("command", ["logits", "verify"])
def test_the_place_is_looked_at_before_the_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text(TINY)
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    arguments = {"logits": ["-w", tmp_path, "--ids", "1", "-o"], "verify": ["--examples", "1", "--report"]}[command]

    def work(*given: object, **named: object) -> None:
        pytest.fail("it has begun")

    monkeypatch.setattr(execute, "open_runner", work)
    monkeypatch.setattr("qwenspec.verify.verification.verify", work)
    told = call(command, tmp_path / "spec.yaml", *arguments, tmp_path / "link")
    assert told.exit_code == 2
    assert "symbolic link" in told.stderr


def test_sigterm_ends_a_command_as_an_interrupt_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders go."""
    made = []

    def work(*given: object) -> None:
        with tempfile.TemporaryDirectory(prefix="qwenspec-", dir=tmp_path) as folder:
            made.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("qwenspec.commands.specs.pick", work)
    result = call("show", "spec.yaml")
    assert (result.exit_code, result.output) == (143, "")
    assert made
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before
