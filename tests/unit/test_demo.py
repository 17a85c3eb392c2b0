"""examples/demo.py shows that both backends and Hugging Face agree, and fails where they do not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from cli_runs import ROOT

DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_succeeds() -> None:
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  1 3 5 8 8 9\n") == 3
    pairs = re.findall(r"^(.+?) +differ by at most ([\d.e-]+)$", done.stdout, re.M)
    assert [pair for pair, _ in pairs] == ["Hugging Face and triton", "Hugging Face and tvm", "triton and tvm"]
    assert "The answers are right, the functions the same." in done.stdout


@pytest.mark.parametrize(("difference", "same"), [(0.9e-3, True), (1.1e-3, False), (float("nan"), False)])
def test_logits_that_differ_are_told(demo: ModuleType, difference: float, same: bool) -> None:
    """By more than 1e-4 of the largest, which is 10 here, in any pair."""
    reference = np.linspace(-3, 10, 12).reshape(3, 4)
    other = reference.copy()
    other[1, 2] += difference
    assert demo.compare({"a": reference, "b": reference.copy(), "c": other}) is same


@pytest.mark.parametrize("wrong", ["triton", "tvm", "Hugging Face"])
def test_a_wrong_answer_fails(demo: ModuleType, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = "1 3 5 8 8 9"
    ids, reference = np.arange(4), np.ones((4, 8))
    monkeypatch.setattr(demo, "generate", lambda spec: None)
    monkeypatch.setattr(demo, "answer_of_the_package", lambda package, _: "2" if package.endswith(wrong) else right)
    monkeypatch.setattr(demo, "hugging_face", lambda _: (ids, "2" if wrong == "Hugging Face" else right, reference))
    monkeypatch.setattr(demo, "logits", lambda *_: reference)
    assert demo.main() == 1
