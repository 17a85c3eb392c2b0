"""How commands end in ordinary trouble: no memory, no room, a terminal that lacks characters, Ctrl-C."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_runs import ROOT, TINY, call, on_terminal

import qwenspec
from qwenspec.backend.runtime import console as runtime_console
from qwenspec.backend.runtime.machine import machine_problem
from qwenspec.commands import console, interrupt
from qwenspec.commands import verify as verify_command
from qwenspec.diagnostics import ExitCode

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "61440001536 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 3.69 GiB is free"
)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def told(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    """The exit code of a command that raises, and what it says."""

    def command() -> None:
        raise error

    code = console.outcome(command)
    return code, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- memory


class InternalError(RuntimeError):
    """As TVM's."""


def too_much() -> BaseException:
    """NumPy's own error."""
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    return caught.value


def too_much_of_torch() -> BaseException:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (MemoryError, "there is not enough memory"),
        (too_much, "there is not enough memory: 1.00 EiB were asked for at once"),
        (too_much_of_torch, "there is not enough memory: 1,073,741,824.00 GiB were asked for at once"),
        (lambda: RuntimeError(CPU), "there is not enough memory: 57.22 GiB were asked for at once"),
        (lambda: RuntimeError(CUDA), "there is not enough memory on the GPU: 20.00 GiB were asked for at once"),
        (lambda: InternalError("std::bad_alloc"), "there is not enough memory"),
        (
            lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "there is not enough memory on the GPU",
        ),
        (
            lambda: RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
            "there is not enough memory",
        ),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
    ],
)
def test_no_memory(capsys: pytest.CaptureFixture[str], make: Callable[[], BaseException], sentence: str) -> None:
    error = make()
    assert machine_problem(error) == sentence
    code, said = told(capsys, error)
    assert (code, said.splitlines()[0]) == (2, f"error[out-of-memory]: {sentence}")
    assert "help: fewer tokens" in said


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), io.UnsupportedOperation("read")]
)
def test_other_errors_are_about_us(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert machine_problem(error) is None
    code, said = told(capsys, error)
    assert (code, "this is a bug in qwenspec" in said) == (70, True)


def test_a_contender_without_memory_does_not_disagree(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is run again to make it small."""
    from hypothesis import strategies as st

    from qwenspec.spec.load import load
    from qwenspec.verify.case import REFERENCE, Case
    from qwenspec.verify.contenders import ReferenceContender
    from qwenspec.verify.ledger import Ledger
    from qwenspec.verify.search import search
    from qwenspec.verify.steps import CacheSizes

    tries = []

    def full(*_: object) -> None:
        tries.append(True)
        raise RuntimeError(CPU)

    monkeypatch.setattr(ReferenceContender, "do", full)
    sizes = CacheSizes(page_size=4, pages=8, max_batch_size=2, chunk=8)
    cases = st.just(Case(load(spec), 0, "float32", sizes, (REFERENCE,)))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        search(cases, st.just(sizes), examples=3, steps=3, seed=0, ledger=Ledger())
    assert len(tries) == 1


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "a.yaml"), "a.yaml: Permission denied"),
        (OSError(errno.EACCES, "Permission denied", b"a.yaml"), "a.yaml: Permission denied"),
        (OSError(errno.EIO, "Input/output error", 7), "Input/output error"),
        (OSError("libcuda.so: cannot open"), "libcuda.so: cannot open"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_system_refuses(capsys: pytest.CaptureFixture[str], error: OSError, said: str) -> None:
    assert told(capsys, error) == (2, f"error[system]: {said}\n")


def test_the_traceback_of_trouble_is_there_for_who_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENSPEC_TRACEBACK", "1")
    for error, expected in ((OSError(errno.ENOSPC, "full"), 2), (MemoryError(), 2), (KeyError("x"), 70)):
        code, said = told(capsys, error)
        assert (code, "Traceback (most recent call last)" in said) == (expected, True)


def test_a_report_is_there_whatever_the_terminal_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Path
) -> None:
    """It took an hour, and the table cannot be printed."""
    from qwenspec.verify import report, verification

    def broken(text: str, paint: object = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verification, "verify", lambda *_: SimpleNamespace(verdict=None))
    monkeypatch.setattr(report, "page", lambda _: "<p>all of it")
    monkeypatch.setattr(report, "table", lambda _: "")
    monkeypatch.setattr(console, "show", broken)
    options = dict.fromkeys(("variant", "backend", "weights", "examples", "dtype", "device"))

    def command() -> ExitCode:
        return verify_command.run(
            str(spec), tmp_path / "report.html", False, **options, seed=0, failures=tmp_path / "failures"
        )

    assert console.outcome(command) == 2
    assert (tmp_path / "report.html").read_text() == "<p>all of it"
    assert "error[system]: No space left on device" in capsys.readouterr().err


def test_the_folder_of_temporary_files_is_named(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def command() -> None:
        qwenspec.emit(qwenspec.load(spec), "triton", tmp_path)

    monkeypatch.setattr(Path, "write_text", full)
    assert console.outcome(command) == 2
    said = capsys.readouterr().err
    assert f"error[cannot-write]: temporary files, in {tempfile.gettempdir()}: No space left on device" in said


# ---------------------------------------------------------------------------------------------------- terminals


def process(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`qwenspec` by that name in a shell; it obeys Ctrl-C, even where these tests run in the background."""
    program = f'qwenspec() {{ "{sys.executable}" -m qwenspec "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        env=os.environ | environment,
        cwd=ROOT,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_characters_that_a_terminal_lacks(spec: Path) -> None:
    done = process(f"qwenspec show {spec} --ir; qwenspec show {spec} --json; qwenspec diff {spec} {spec}")
    escaped = process(f"qwenspec show {spec} --ir", PYTHONIOENCODING="latin-1")
    assert escaped.returncode == 0, escaped.stderr
    assert re.search(rb"\\u2[0-9a-f]{3}", escaped.stdout)
    assert "·" in escaped.stdout.decode("latin-1") or "×" in escaped.stdout.decode("latin-1")
    assert escaped.stdout.decode("latin-1").encode().decode("utf-8")[:40] in done.stdout.decode()


def test_json_is_json_in_any_encoding(tmp_path: Path) -> None:
    folder = tmp_path / "schön 🙂"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    done = process(f"qwenspec show '{folder}/tiny.yaml' --json", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))["spec"] == f"{folder}/tiny.yaml"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["show SPEC", "show SPEC --json", "--help", "--version"])
def test_standard_output_that_is_full(spec: Path, arguments: str) -> None:
    done = process(f"qwenspec {arguments.replace('SPEC', str(spec))} > /dev/full")
    assert (done.returncode, done.stderr) == (2, b"error[system]: standard output: No space left on device\n")


def test_closed_streams(spec: Path) -> None:
    closed = process(f"qwenspec show {spec} >&-")
    assert (closed.returncode, closed.stderr) == (2, b"error[system]: standard output: Bad file descriptor\n")
    silent = process("qwenspec show nowhere.yaml 2>&-")
    assert (silent.returncode, silent.stdout) == (2, b"")


def test_a_name_gives_the_terminal_no_orders(tmp_path: Path) -> None:
    named = TINY.replace("family: tiny", 'family: "\\e]0;title\\a\\u009b31m"')
    (tmp_path / "tiny.yaml").write_text(named)
    for arguments in (["show"], ["show", "--ir"]):
        result = call(arguments[0], tmp_path / "tiny.yaml", *arguments[1:])
        assert result.exit_code == 0, result.stderr
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stdout)
    assert "\\x1b]0;title\\x07\\x9b31m" in call("show", tmp_path / "tiny.yaml").stdout


def test_progress_on_a_terminal_that_moves_no_cursor(spec: Path) -> None:
    plain = on_terminal("validate", str(spec), "nowhere.yaml", TERM="dumb")
    assert ("\x1b" in plain, "1 error in 1 file" in plain) == (False, True)
    assert "\r\x1b[K[1/2]" in on_terminal("validate", str(spec), str(spec), TERM="xterm", NO_COLOR="1")


# ------------------------------------------------------------------------------------------------------- Ctrl-C

GREEDY = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException as error:
    {then}
"""


@pytest.mark.parametrize(
    "module",
    [
        "import signal\nsignal.raise_signal(signal.SIGINT)\n",
        GREEDY.format(then="pass"),
        GREEDY.format(then="raise ImportError('greedy') from error"),
        "import signal\ntry:\n    import inner\nexcept BaseException:\n    pass\n",
    ],
    ids=["raised", "swallowed", "translated", "nested"],
)
@pytest.mark.parametrize("last", [False, True])
def test_ctrl_c_while_a_library_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, last: bool
) -> None:
    """`last`: the import is the last that its function does."""
    (tmp_path / "greedy.py").write_text(module)
    (tmp_path / "inner.py").write_text(GREEDY.format(then="pass"))
    monkeypatch.syspath_prepend(tmp_path)
    steps: list[str] = []

    def importing() -> Any:
        try:
            if last:
                return __import__("greedy")
            __import__("greedy")
            steps.append("went on")
        finally:
            steps.append("cleaned up")
            steps.append("all of it")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.obey()
        code = console.outcome(importing)
    finally:
        signal.signal(signal.SIGINT, before)
        for name in ("greedy", "inner"):
            sys.modules.pop(name, None)
    assert (code, steps) == (130, ["cleaned up", "all of it"])
    assert sys.gettrace() is None


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.obey()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_is_interrupted_in_a_greedy_torch(tmp_path: Path, spec: Path) -> None:
    (tmp_path / "torch.py").write_text(GREEDY.format(then="print('swallowed', flush=True)") + "import time\n")
    done = process(f"qwenspec run {spec} -w {tmp_path} -p A", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"swallowed\n", b"")


def test_the_command_is_interrupted_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = process("qwenspec backends", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(("backend", "library"), [("triton", "torch"), ("tvm", "tvm")])
@pytest.mark.parametrize("then", ["pass", "raise ImportError('greedy') from error"], ids=["swallowed", "translated"])
def test_a_package_is_interrupted_while_it_is_imported(
    tmp_path: Path, spec: Path, backend: str, library: str, then: str
) -> None:
    package = qwenspec.emit(qwenspec.load(spec), backend, tmp_path)
    (tmp_path / f"{library}.py").write_text(GREEDY.format(then=then) + "print('went on', flush=True)\n")
    modules = [package.name] if backend == "triton" else [package.name, f"{package.name}.build"]
    for module in (f"-m {modules[0]}", *(f"-m{module}" for module in modules)):
        done = process(f"exec {sys.executable} {module} --weights x", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
    done = process(f"{sys.executable} -c 'import {package.name}'", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, "by an exception: whoever imports the package may catch it"


def test_an_interrupt_that_a_package_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "package"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runtime_console.die_of_ctrl_c("package")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_package_that_runs_is_interrupted_by_an_exception() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert runtime_console.ended(lambda: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_remarks_and_diffs_are_printed_without_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("a\x1b[2Jb\nc")
    console.show_diff("-\ta\x1b[2Jb\r\n+c\n")
    assert capsys.readouterr() == ("-\ta\\x1b[2Jb\\r\n+c\n", "a\\x1b[2Jb\nc\n")


@pytest.mark.parametrize(("ended", "code"), [(None, 0), (0, 0), (3, 3), ("no room", 1)])
def test_a_package_ends_a_command_as_it_would_a_process(
    ended: str | int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise SystemExit(ended)

    assert console.outcome(command) == code
    assert capsys.readouterr().err == (f"{ended}\n" if isinstance(ended, str) else "")
