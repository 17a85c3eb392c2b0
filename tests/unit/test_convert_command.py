"""`qwenspec convert` as people call it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import TINY, call, data, on_terminal, write_checkpoint

from qwenspec.commands import convert as command
from qwenspec.convert import convert as conversion
from qwenspec.hf.checkpoint import import_path
from qwenspec.hf.exporter import export_config
from qwenspec.spec.load import load

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def checkpoint(spec: Path, tmp_path: Path) -> Path:
    write_checkpoint(spec, tmp_path / "full")
    (tmp_path / "full/config.json").write_text(json.dumps(export_config(load(spec))))
    return tmp_path / "full"


def test_a_table_of_the_worst_and_the_total(checkpoint: Path, tmp_path: Path) -> None:
    done = call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"wrote {tmp_path / 'out'}\n"
    first, header, *rows = done.stdout.splitlines()
    assert first.split() == ["94.88", "KiB", "->", "19.16", "KiB"]
    assert header.split() == ["largest", "errors", "format", "relative", "RMS", "largest"]
    assert len(rows) == command.WORST + 1
    relative = [float(row.split()[2]) for row in rows[:-1]]
    assert relative == sorted(relative, reverse=True)
    assert rows[-1].startswith("  all 15 rounded tensors ")


def test_json_is_the_report(checkpoint: Path, tmp_path: Path) -> None:
    done = call("convert", checkpoint, "-q", "int8", "-o", tmp_path / "out", "--json")
    assert data(done) == json.loads((tmp_path / "out/quantization_report.json").read_text())


def test_options_are_in_the_new_config(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--group-size", 16, "--head", "none", "--skip", "o_proj", "--skip", "model.layers.0", "--skip", DOWN]
    done = call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out", *options, "--shard-size", 2e-5)
    assert done.exit_code == 0, done.stderr
    found = import_path(tmp_path / "out").spec.quantization
    assert found is not None
    assert found.model_dump(exclude={"skip"}) == {"scheme": "int4", "group_size": 16, "head": "none"}
    in_layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    skipped = [f"model.layers.0.{name}" for name in in_layer] + ["model.layers.1.self_attn.o_proj", DOWN]
    assert list(found.skip) == skipped
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"


def test_a_spec_of_ones_own(spec: Path, checkpoint: Path, tmp_path: Path) -> None:
    """For what config.json cannot say, or where there is none."""
    (checkpoint / "config.json").unlink()
    assert "error[file-not-found]" in call("convert", checkpoint, "-q", "int8", "-o", tmp_path / "out").stderr
    done = call("convert", checkpoint, "-q", "int8", "-o", tmp_path / "out", "--spec", f"{spec}#tiny-int8")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "out/config.json").exists()
    tied = call("convert", checkpoint, "-q", "int8", "-o", tmp_path / "tied", "--spec", f"{spec}#tiny-tied")
    assert (tied.exit_code, (tmp_path / "tied/model.safetensors").exists()) == (0, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-q", "int8", "--group-size", "32"], "error[usage]: int8 has one scale an output"),
        (["-q", "int8", "--head", "int4"], "error[usage]: beside int8 the head is"),
        (["-q", "int4", "--skip", "o_porj"], "did you mean `o_proj`?"),
        (["-q", "int4", "--skip", "model.norm"], "error[unknown-module]"),
        (["-q", "int5"], "'int5' is not one of"),
        (["-q", "int4", "--shard-size", "0"], "Invalid value for '--shard-size'"),
        (["-q", "int4", "--shard-size", "inf"], "Invalid value for '--shard-size'"),
        (["-q", "int4", "--group-size", "0"], "Invalid value for '--group-size'"),
        ([], "Missing option '--quantization'"),
    ],
)
def test_bad_usage(checkpoint: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = call("convert", checkpoint, "-o", tmp_path / "out", *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("out*"))


def test_folders_that_are_no_checkpoint(spec: Path, checkpoint: Path, tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "absent", "there is no such folder"), (spec, "this is not a folder")):
        done = call("convert", folder, "-q", "int4", "-o", tmp_path / "out")
        assert (done.exit_code, "error[not-a-checkpoint]" in done.stderr, said in done.stderr) == (2, True, True)
    (checkpoint / "model.safetensors").unlink()
    for options in ([], ["--spec", spec]):
        done = call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out", *options)
        assert (done.exit_code, "error[checkpoint]" in done.stderr) == (2, True)


def test_a_quantised_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out").exit_code == 0
    again = call("convert", tmp_path / "out", "-q", "int8", "-o", tmp_path / "again")
    assert (again.exit_code, "error[already-quantized]" in again.stderr) == (2, True)
    assert not list(tmp_path.glob("again*"))


def test_control_c_and_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    round_rows = conversion.round_rows

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return round_rows(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "round_rows", interrupted)
        done = call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "")
    assert not (tmp_path / "out").exists()
    assert call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out").exit_code == 0
    assert import_path(tmp_path / "out").spec.quantization is not None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_on_terminals_alone(checkpoint: Path, tmp_path: Path) -> None:
    for number, (terminal, shown) in enumerate((("xterm", True), ("dumb", False))):
        out = str(tmp_path / str(number))
        seen = on_terminal("convert", str(checkpoint), "-q", "int4", "-o", out, TERM=terminal)
        assert ("97.2/97.2 kB" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)) is shown, seen
        assert seen.endswith(f"wrote {out}\r\n")


def test_numpy_is_asked_for(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = call("convert", checkpoint, "-q", "int4", "-o", tmp_path / "out")
    assert (done.exit_code, "pip install 'qwenspec[convert]'" in done.stderr) == (3, True)


def test_notes_of_the_import_are_told(spec: Path, tmp_path: Path) -> None:
    write_checkpoint(spec, tmp_path / "full")
    config = export_config(load(spec))
    del config["dtype"]
    (tmp_path / "full/config.json").write_text(json.dumps(config))
    done = call("convert", tmp_path / "full", "-q", "int4", "-o", tmp_path / "out")
    assert "note: The dtype is not given" in done.stderr


def test_nothing_but_numpy_is_needed(checkpoint: Path, tmp_path: Path) -> None:
    """No library of tensors is imported, in a process of its own."""
    arguments = ["qwenspec", "convert", str(checkpoint), "-q", "int4", "-o", str(tmp_path / "out")]
    code = (
        "import sys\n"
        "for name in ('torch', 'tvm', 'triton', 'safetensors', 'ml_dtypes', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = {arguments!r}\n"
        "from qwenspec.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, f"wrote {tmp_path / 'out'}\n")
