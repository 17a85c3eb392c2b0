"""Timing, and what the machine can do at best: memory bandwidth and matrix rate, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, rounds: int = 5, warmup: int = 2) -> float:
    """Median wall-clock seconds of a call, from an idle device to an idle device."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s: the best of reading `size` bytes and copying half as many."""
    if device.type == "cpu":
        # A matrix-vector product streams a matrix once, as decoding does.
        matrix = torch.ones(size // 4 // 4096, 4096)
        vector = torch.ones(4096)
        return matrix.nbytes / seconds(lambda: torch.mv(matrix, vector), device)
    source = torch.ones(size // 4, device=device)
    half = source[: len(source) // 2]
    target = torch.empty_like(half)
    read = source.nbytes / seconds(lambda: repeat(10, source.sum), device) * 10
    copy = 2 * half.nbytes / seconds(lambda: repeat(10, lambda: target.copy_(half)), device) * 10
    return max(read, copy)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a size × size × size product."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 * 5 / seconds(lambda: repeat(5, lambda: a @ b), device, rounds=3, warmup=1)


def repeat(times: int, run: Callable[[], Any]) -> None:
    for _ in range(times):
        run()
