"""The PyTorch paths against the float64 oracle."""

from __future__ import annotations

import torch
from kernel_checks import check_all, runs_kernels


def test_cpu_paths_compute_what_the_oracle_does() -> None:
    assert not runs_kernels(torch.device("cpu"))
    check_all(torch.device("cpu"))
