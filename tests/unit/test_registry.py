"""Backends by name, and packages opened by the backend that wrote them."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from cli_runs import QWEN3, TINY, write_checkpoint

import qwenspec
from qwenspec.backend import registry
from qwenspec.diagnostics import ExitCode, SpecError


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch):
    """Replaces what is installed by entry points with the given names and values."""

    def install(**values: str) -> None:
        points = [EntryPoint(name, value, registry.GROUP) for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])

    return install


@pytest.mark.parametrize("name", ["triton", "tvm"])
def test_our_backends_are_installed(name: str) -> None:
    assert name in registry.installed()
    assert registry.find(name).name == name


def test_a_slip_of_the_pen_is_bad_usage() -> None:
    with pytest.raises(SpecError) as caught:
        registry.find("tritn")
    (problem,) = caught.value.diagnostics
    assert (caught.value.exit_code, problem.code) == (ExitCode.USAGE, "unknown-backend")
    assert "did you mean `triton`?" in problem.hint


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({}, "the backend `tvm` is not installed"),
        ({"triton": "qwenspec_triton:BACKEND"}, "the backend `tvm` is not installed"),
        ({"tvm": "qwenspec_no_such_module:BACKEND"}, "the backend `tvm` cannot be imported: No module named"),
    ],
)
def test_what_is_not_installed_has_its_own_exit_code(entry_points, installed: dict[str, str], reason: str) -> None:
    entry_points(**installed)
    with pytest.raises(SpecError) as caught:
        registry.find("tvm")
    (problem,) = caught.value.diagnostics
    assert (caught.value.exit_code, problem.code) == (ExitCode.BACKEND_MISSING, "backend-missing")
    assert problem.message.startswith(reason)


def test_backends_are_listed_by_name(entry_points) -> None:
    entry_points(zeta="z:Z", alpha="a:A")
    assert list(registry.installed()) == ["alpha", "zeta"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [(None, "is missing"), ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read")],
)
def test_a_folder_that_is_no_package(tmp_path: Path, manifest: str | None, reason: str) -> None:
    if manifest is not None:
        (tmp_path / registry.MANIFEST).write_text(manifest)
    with pytest.raises(SpecError) as caught:
        registry.open_runner(tmp_path, tmp_path)
    (told,) = caught.value.diagnostics
    assert told.message == f"{tmp_path} is not a package that qwenspec wrote: {tmp_path / registry.MANIFEST} {reason}"


def test_weights_have_to_be_a_folder(tmp_path: Path) -> None:
    package = qwenspec.emit(qwenspec.load(QWEN3), "triton", tmp_path)
    with pytest.raises(SpecError, match="nowhere is not a folder"):
        qwenspec.open_runner(package, tmp_path / "nowhere")


def test_a_package_is_opened_by_the_backend_that_wrote_it(tmp_path: Path) -> None:
    spec = tmp_path / "tiny.yaml"
    spec.write_text(TINY)
    write_checkpoint(spec, tmp_path / "weights")
    package = qwenspec.emit(qwenspec.load(spec), "triton", tmp_path)
    runner = qwenspec.open_runner(package, tmp_path / "weights", dtype="float32")
    embeds = runner.embed(np.array([3, 1], np.int32))
    assert (embeds.shape, embeds.dtype) == ((1, 2, 32), np.float32)


def test_a_backend_whose_library_fails_to_import_is_told_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM without a home to keep its files in; the others are shown."""

    def fail(name: str) -> None:
        raise RuntimeError("Could not determine home directory.")

    backend = registry.find("tvm")
    monkeypatch.setattr("qwenspec.backend.adapter.importlib.import_module", fail)
    problem = backend.unavailable()
    assert problem is not None
    assert problem.message == (
        "the tvm backend cannot run here: `import tvm` fails: Could not determine home directory."
    )


def test_a_device_that_is_not_there_is_told_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.find("triton")
    monkeypatch.setattr(type(backend), "devices", lambda self: ["cpu", "cuda:0 A GPU"])
    assert [registry.no_device(backend, device) for device in ("cpu", "cuda", "cuda:0")] == [None] * 3
    told = registry.no_device(backend, "cuda:1")
    assert told is not None
    assert (told.code, told.message) == ("no-device", "the triton backend cannot use the device `cuda:1` here")
    assert told.hint == "use `cpu` or `cuda:0`"
