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
    source = torch.ones(size // 4, device=device)
    half = source[: len(source) // 2]
    target = torch.empty_like(half)
    calls = 10 if device.type == "cuda" else 1
    read = source.nbytes / seconds(lambda: repeat(calls, source.sum), device) * calls
    copy = 2 * half.nbytes / seconds(lambda: repeat(calls, lambda: target.copy_(half)), device) * calls
    return max(read, copy)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a size × size × size product; on CPU, in float32, the better one of MKL's and oneDNN's."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    products: list[Callable[[], Any]] = [lambda: a @ b]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    calls = 5 if device.type == "cuda" else 1
    fastest = min(seconds(lambda p=p: repeat(calls, p), device, rounds=3, warmup=1) for p in products)
    return 2 * size**3 * calls / fastest


def repeat(times: int, run: Callable[[], Any]) -> None:
    for _ in range(times):
        run()
