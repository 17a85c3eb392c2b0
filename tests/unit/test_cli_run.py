"""`run` and `logits`: generated packages behind the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_runs import TINY, call, data, write_checkpoint
from typer.testing import Result

import qwenspec
from qwenspec.commands import execute

BACKENDS = ("triton", "tvm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and a checkpoint of it in weights/."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    write_checkpoint(folder / "tiny.yaml", folder / "weights")
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`run` is the end of a process; in this one the next test must find nothing of it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    yield
    forget()


def forget() -> None:
    ours = [f"{variant}_{backend}" for variant in ("tiny", "wide") for backend in BACKENDS]
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]


def run(backend: str, folder: Path, *arguments: str) -> Result:
    forget()
    options = ["--backend", backend, "--weights", folder / "weights", "--device", "cpu"]
    return call("run", folder / "tiny.yaml", *options, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_prints_what_the_package_alone_prints(backend: str, folder: Path, tmp_path: Path) -> None:
    ours = run(backend, folder, "--prompt", "CAB", "--max-tokens", "6")
    assert ours.exit_code == 0
    assert len(ours.stdout) > 3
    package = qwenspec.emit(qwenspec.load(folder / "tiny.yaml"), backend, tmp_path)
    arguments = ["--weights", str(folder / "weights"), "--prompt", "CAB", "--max-tokens", "6", "--device", "cpu"]
    alone = subprocess.run(
        [sys.executable, "-m", package.name, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ours.stdout == alone.stdout
    assert alone.stderr == ""  # what had to be compiled has been


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_takes_several_prompts_and_sampling(backend: str, folder: Path) -> None:
    sampling = ["--temperature", "0.9", "--top-k", "5", "--top-p", "0.8", "--seed", "3", "--max-tokens", "5"]
    prompts = ["--prompt", "C", "--prompt", "--D", "--chat"]
    answers = data(run(backend, folder, *prompts, *sampling, "--json"))
    assert [entry["prompt"] for entry in answers] == ["C", "--D"]
    text = "".join(f"--- {entry['prompt']}\n{entry['text']}\n" for entry in answers)
    assert run(backend, folder, *prompts, *sampling).stdout == text


def test_backends_choose_the_same_tokens(folder: Path) -> None:
    options = ["--prompt", "CAB", "--prompt", "H", "--max-tokens", "20", "--json"]
    first, *others = (data(run(backend, folder, *options)) for backend in BACKENDS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_stops_at_a_text_of_several_tokens(backend: str, folder: Path) -> None:
    """One letter is a token here."""
    options = ["--prompt", "CAB", "--prompt", "H", "--max-tokens", "6", "--json"]
    free = data(run(backend, folder, *options))
    assert [(entry["tokens"], entry["finish_reason"]) for entry in free] == [(6, "length")] * 2
    text = free[0]["text"]
    assert text[2:4] not in free[1]["text"]
    first, second = data(run(backend, folder, *options, "--stop", text[2:4], "--stop", "no such"))
    assert (first["text"], first["finish_reason"]) == (text[: text.index(text[2:4])], "stop")
    assert first["tokens"] == len(first["text"]) + 2
    assert second == free[1]
    streamed = run(backend, folder, "--prompt", "CAB", "--max-tokens", "6", "--stop", text[2:4])
    assert streamed.stdout == first["text"] + "\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_that_does_not_fit(backend: str, folder: Path) -> None:
    """Said before anything is compiled."""
    wide = folder / "wide.yaml"
    wide.write_text(TINY.replace("tiny", "wide").replace("intermediate_size: 48", "intermediate_size: 64"))
    options = ["--backend", backend, "--weights", folder / "weights"]
    other = call("run", wide, *options, "--prompt", "C")
    assert (other.exit_code, other.stdout) == (2, "")
    assert "model.layers.0.mlp.down_proj.weight" in other.stderr
    assert "compiling" not in other.stderr
    assert other.stderr.endswith("\n  = help: `qwenspec import` makes the spec of a checkpoint\n")
    shown = call("logits", wide, *options, "--ids", "1")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "error[checkpoint]" in shown.stderr
    assert "model.layers.0.mlp.down_proj.weight" in shown.stderr


@pytest.mark.parametrize("tp", ["1", "2"])
def test_a_checkpoint_of_another_variant(tp: str, folder: Path) -> None:
    """The package says what does not fit, and the command what does."""
    forget()
    file = folder / "tiny.yaml"
    options = ["--backend", "triton", "--weights", folder / "weights", "--device", "cpu", "--tp", tp]
    other = call("run", file, *options, "--variant", "tiny-int8", "--prompt", "C")
    assert (other.exit_code, other.stdout) == (2, "")
    fits = f"`tiny` or `tiny-tied` in {file}"  # one may hold the head that the other does not need
    assert other.stderr.endswith(f"  = help: it is the checkpoint of {fits}: choose with --variant\n")
    none = call("run", file, *options, "--prompt", "")
    assert (none.exit_code, none.stdout) == (2, "")
    assert "help" not in none.stderr  # the checkpoint is not what is wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_that_is_not_there(backend: str, folder: Path) -> None:
    forget()
    options = ["--backend", backend, "--weights", folder / "nowhere", "--device", "cpu"]
    result = call("run", folder / "tiny.yaml", *options, "--prompt", "C")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere" in result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_the_runner(backend: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "logits.npy"
    arguments = ["logits", folder / "tiny.yaml", "--backend", backend, "--weights", folder / "weights"]
    arguments += ["--ids", "3, 1,4"]
    saved = call(*arguments, "-o", file)
    assert (saved.exit_code, saved.stdout) == (0, "")
    assert saved.stderr.endswith(f"wrote {file}: float32 [3, 40]\n")
    values = np.load(file)
    shown = data(call(*arguments, "--json"))
    assert [entry["id"] for entry in shown] == [3, 1, 4]
    for entry, row in zip(shown, values, strict=True):
        assert [token["id"] for token in entry["top"]] == list(np.argsort(-row)[:5])
        assert entry["top"][0]["logit"] == row.max()
    assert call(*arguments).stdout.splitlines()[3].split()[:2] == ["2", "4"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ids", "1,two"], "`1,two` is not a list of token ids"),
        (["--ids", "9" * 5000], "999…` is not a list of token ids"),
        (["--ids", ""], "is not a list of token ids"),
        (["--ids", "1,40"], "token id 40 is outside the vocabulary of 40\n  = help: ids are 0 to 39\n"),
        (["--ids", "1", "--device", "toaster"], "cannot use the device `toaster` here"),
    ],
)
def test_logits_names_what_is_wrong(backend: str, folder: Path, arguments: list[str], reason: str) -> None:
    options = ["--backend", backend, "--weights", folder / "weights"]
    result = call("logits", folder / "tiny.yaml", *options, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_cannot_run_here_exits_3(backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ["--backend", backend, "--weights", folder / "weights"]
    result = call("logits", folder / "tiny.yaml", *options, "--ids", "1")
    assert result.exit_code == 3
    assert "error[backend-missing]" in result.stderr
    assert f"pip install 'qwenspec[{backend}]'" in result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_library_that_only_text_needs_exits_3_too(
    backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    options = ["--backend", backend, "--weights", folder / "weights"]
    result = call("run", folder / "tiny.yaml", *options, "--prompt", "C")
    assert result.exit_code == 3
    assert "pip install 'qwenspec[run]'" in result.stderr


def test_options_become_arguments() -> None:
    options = {"prompt": ["a", "-b"], "top-k": 3, "seed": 0, "stop": None, "chat": True, "json": False}
    assert execute.arguments(options) == ["--prompt=a", "--prompt=-b", "--top-k=3", "--seed=0", "--chat"]
