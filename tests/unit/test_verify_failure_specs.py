"""A failure's folder loads back: its spec, and where its checkpoint is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_runs import ROOT, TINY
from hypothesis import given, settings

from qwenspec.spec.document import Spec
from qwenspec.spec.load import load, load_all
from qwenspec.verify import session as session_module
from qwenspec.verify import stored_failure
from qwenspec.verify.case import Case
from qwenspec.verify.contenders import ReferenceContender
from qwenspec.verify.failure import replay, spec_file, write_failure
from qwenspec.verify.reduce import reduced
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Add, CacheSizes, Forward
from qwenspec.verify.strategies import specs
from qwenspec.verify.weights import random_weights


def assert_loads_back(spec: Spec, folder: Path) -> None:
    file = folder / "back.yaml"
    file.write_text(spec_file(spec))
    (again,) = load_all(file)
    assert again.sha256() == spec.sha256()
    assert again.description == spec.description


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spec=specs())
def test_a_drawn_spec_loads_back(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> None:
    assert_loads_back(spec, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("file", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda file: file.stem)
def test_specs_of_releases_load_back(file: Path, tmp_path: Path) -> None:
    for spec in load_all(file):
        assert_loads_back(spec, tmp_path)
        if not spec.quantization:
            assert_loads_back(reduced(spec), tmp_path)


def on_different_weights(case: Case) -> dict[str, ReferenceContender]:
    """The case's contenders, none of which agrees with another."""
    named = enumerate(case.contenders)
    return {name: ReferenceContender(case.spec, random_weights(case.spec, seed)) for seed, name in named}


def test_files_elsewhere_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout in a file of its own comes along; a checkpoint is named from the root."""
    monkeypatch.setattr(session_module, "open_contenders", on_different_weights)
    monkeypatch.setattr(stored_failure, "problem", lambda *given: None)
    monkeypatch.setattr(stored_failure, "check_fits", lambda *given: None)
    shutil.copy(ROOT / "qwenspec" / "spec" / "layouts" / "qwen2.yaml", tmp_path / "names.yaml")
    own = tmp_path / "own.yaml"
    own.write_text(TINY.replace("  dtype:", "  checkpoint: {layout: ./names.yaml}\n  dtype:"))
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    spec, sizes = load(own), CacheSizes(page_size=4, pages=8, max_batch_size=1, chunk=8)
    session = Session(Case(spec, 0, "float32", sizes, ("reference", "a"), Path("weights")))
    session.do(Add(0))
    with pytest.raises(Disagreement) as caught:
        session.do(Forward({0: (1, 2, 3)}))
    folder = write_failure(caught.value, tmp_path / "elsewhere" / "one")
    (tmp_path / "names.yaml").unlink()
    monkeypatch.chdir(folder)
    again = replay(Path())
    assert again is not None
    assert again.case.weights == tmp_path / "weights"
    assert load("spec.yaml").sha256() == again.case.spec.sha256()
    assert again.case.spec.architecture.checkpoint.layout == again.case.spec.layout == spec.layout
