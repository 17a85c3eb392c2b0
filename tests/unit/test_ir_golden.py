"""The rendered IR of hand-made specs, compared with files that people have read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.ir.render import diff, render, spans
from qwenspec.spec.load import load

GOLDEN = Path(__file__).parents[1] / "golden" / "ir"
FEATURES = GOLDEN / "features.yaml"
VARIANTS = list(yaml.safe_load(FEATURES.read_text())["variants"])


def model(variant: str) -> Model:
    return lower(load(FEATURES, variant))


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; if the change is meant, run with UPDATE_GOLDEN=1"


@pytest.mark.parametrize("variant", VARIANTS)
def test_rendered_ir(variant: str) -> None:
    check(variant, render(model(variant)))


def test_rendered_difference() -> None:
    check("qwen2-gqa-to-qwen3-tied", diff(model("qwen2-gqa"), model("qwen3-tied")))


def test_no_stale_golden_files() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*VARIANTS, "qwen2-gqa-to-qwen3-tied"}


def test_no_difference() -> None:
    assert diff(model("yarn"), model("yarn")) == ""


def test_difference_in_some_layers_names_them() -> None:
    """Only the sliding layers differ, and they are shown together."""
    text = diff(lower(load(FEATURES, "mixed-windows")), model("dynamic"))
    modules = text.split("\nmodules\n")[1].split("\n\n")[0]
    assert modules.splitlines()[:2] == ["  layers 1, 3", "    attention"]
    assert modules.count("layers") == 1


def test_layer_index_is_abstracted_only_where_it_stands_alone() -> None:
    """Qwen-1's `transformer.h.1.mlp.w1` and `w2` keep their digits in layers 1 and 2."""
    assert "transformer.h.{i}.mlp.{w2,w1}.weight" in render(model("qwen1-ntk-logn"))
    assert render(model("qwen1-ntk-logn")).count("layers 0…3") == 2


@pytest.mark.parametrize(
    ("indices", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0…1"), ([0, 2, 3, 4, 9], "0, 2…4, 9")],
)
def test_spans(indices: list[int], text: str) -> None:
    assert spans(indices) == text
