"""The PyTorch paths, and on a machine with a GPU the kernels, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_all, runs_kernels


def test_cpu() -> None:
    assert not runs_kernels(torch.device("cpu"))
    check_all(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    assert runs_kernels(torch.device("cuda"))
    check_all(torch.device("cuda"))
