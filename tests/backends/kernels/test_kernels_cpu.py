"""The PyTorch paths, and on a machine with a GPU the kernels, against the float64 oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import check_all, runs_kernels
from kernel_variants import FLAGS, combinations


def test_cpu() -> None:
    assert not runs_kernels(torch.device("cpu"))
    check_all(torch.device("cpu"))


def test_without_triton() -> None:
    """Platforms that have no Triton import every variant, and compute."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from kernel_variants import FLAGS, combinations, load
modules = [load(file, **flags) for file in FLAGS for flags in combinations(file)]
assert not load("dispatch").use_triton(torch.zeros(1))
assert load("activation", ACTIVATION="relu").act_and_mul(torch.tensor([[2.0, 3.0]])).tolist() == [[6.0]]
print(len(modules))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(len(combinations(file)) for file in FLAGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    assert runs_kernels(torch.device("cuda"))
    check_all(torch.device("cuda"))
