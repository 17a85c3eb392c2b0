"""`gen --tp` and `run --tp` as far as no rank is started; tests/distributed starts them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cli_runs import QWEN3, TINY, call

from qwenspec.backend.registry import find
from qwenspec.commands import execute
from qwenspec.commands.launch import environment, told


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture(autouse=True)
def nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `run`, and so nothing can start."""

    def package(*arguments: object) -> None:
        raise AssertionError(f"a package of {arguments}")

    monkeypatch.setattr(execute, "_package", package)


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for backend in ("triton", "tvm"):
        monkeypatch.setattr(type(find(backend)), "devices", lambda self: ["cpu", *names])


def run(spec: Path, *arguments: str) -> tuple[int, str]:
    result = call("run", spec, "--weights", spec.parent, "--prompt", "C", *arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.parametrize("degree", ["3", "0", "-2", "8"])
def test_a_degree_that_cannot_work_is_refused_as_plan_refuses_it(degree: str, spec: Path, tmp_path: Path) -> None:
    planned = call("plan", spec, "--tp", degree)
    assert planned.exit_code == 2
    assert "error[tensor-parallel-degree]" in planned.stderr
    written = call("gen", spec, "--tp", degree, "--out", tmp_path / "out")
    assert (written.exit_code, written.stdout, written.stderr) == (2, "", planned.stderr)
    assert not (tmp_path / "out").exists()
    assert run(spec, "--tp", degree) == (2, planned.stderr)


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_a_package_is_the_same_for_every_degree(backend: str, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = call("gen", spec, "--tp", "4", "--backend", backend, "--out", out)
    assert written.exit_code == 0
    command = f"torchrun --nproc-per-node 4 -m tiny_{backend} --weights DIR --prompt TEXT"
    assert written.stderr == f"in {out}: {command}\n"
    assert call("gen", spec, "--backend", backend, "--out", out, "--check").exit_code == 0


def test_gen_all_takes_no_degree(tmp_path: Path) -> None:
    result = call("gen", "--all", "--tp", "2", "--out", tmp_path)
    assert result.exit_code == 2
    assert "error[usage]" in result.stderr
    assert call("gen", QWEN3, "--tp", "2", "--all").exit_code == 2


@pytest.mark.parametrize(
    ("found", "device", "reason", "hint"),
    [
        (["cuda:0 A"], None, "4 ranks take a GPU each, and there are 1 here", "--tp 1 at most, or --device cpu"),
        (["cuda:0 A", "cuda:1 A"], "cuda", "4 ranks take a GPU each, and there are 2 here", "--tp 2 at most"),
        ([], "cuda", "4 ranks take a GPU each, and there are 0 here", "help: --device cpu"),
        (["cuda:0 A", "cuda:1 A"], "cuda:1", "each rank takes a GPU of its own, and not `cuda:1`", "use `cuda`"),
    ],
)
def test_more_gpus_than_there_are(
    found: list[str], device: str | None, reason: str, hint: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *found)
    code, said = run(spec, "--tp", "4", *(["--device", device] if device else []))
    assert code == 2
    assert "error[no-device]" in said
    assert reason in said
    assert hint in said


@pytest.mark.parametrize(("module", "extra"), [("torch", "triton"), ("tokenizers", "run")])
def test_what_ranks_need_and_is_not_installed(
    module: str, extra: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TVM backend needs torch for them alone."""
    there = execute.importlib.util.find_spec
    monkeypatch.setattr(execute.importlib.util, "find_spec", lambda name: None if name == module else there(name))
    code, said = run(spec, "--tp", "2", "--backend", "tvm")
    assert code == 3
    assert f"error[backend-missing]: 2 ranks need {module}, which is not installed" in said
    assert f"pip install 'qwenspec[{extra}]'" in said


def test_ranks_share_the_cores_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TVM_NUM_THREADS", "5")
    monkeypatch.setenv("PYTHONPATH", "mine")
    told = environment(4, Path("/tmp/x/package"))
    assert (told["OMP_NUM_THREADS"], told["TVM_NUM_THREADS"]) == ("3", "5")
    assert told["PYTHONPATH"].split(":") == ["/tmp/x", "mine"]
    assert environment(16, Path("package"))["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: 2, 1: 2}, 2, ""),
        ({0: -signal.SIGTERM, 1: 3}, 3, ""),
        ({0: -signal.SIGTERM, 1: -signal.SIGKILL}, 137, "error: rank 1 was ended by SIGKILL\n"),
        ({0: -signal.SIGTERM, 1: -signal.SIGTERM}, 143, "error: rank 0 was ended by SIGTERM\n"),
    ],
)
def test_the_rank_that_failed_first_decides(
    codes: dict[int, int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(codes) == code
    assert capsys.readouterr().err == said
