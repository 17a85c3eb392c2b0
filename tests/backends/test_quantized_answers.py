"""A trained model still answers as it did: benchmarks/quantization.py on a few problems of each kind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quantization

PROBLEMS = 12  # of each of 8 tasks, in two formats of prompts: an answer is half a point
LOSS = 0.03

CASES = [
    ("triton", "int8"),
    ("triton", "int4, groups of 32"),
    ("triton", "awq"),
    ("triton", "gptq, 4 bits, desc_act"),
    ("triton", "fp8_block"),
    ("triton", "KV fp8_e4m3"),
    ("tvm", "int4, groups of 32"),
    ("tvm", "KV fp8_e4m3, stored scales"),
]


@pytest.fixture(scope="module")
def problems() -> list[Any]:
    found: list[Any] = quantization.tasks.held_out_problems(PROBLEMS)
    return found


@pytest.fixture(scope="module")
def in_full_precision(problems: list[Any]) -> float:
    share = quantization.measure(quantization.spec_of({}), "triton", problems, "float32")
    assert share > 0.95
    return share


@pytest.mark.parametrize(("backend", "scheme"), CASES)
def test_answers(backend: str, scheme: str, problems: list[Any], in_full_precision: float) -> None:
    spec = quantization.spec_of(quantization.SCHEMES[scheme])
    assert quantization.measure(spec, backend, problems, "float32") > in_full_precision - LOSS
