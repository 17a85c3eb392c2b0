"""Packages are emitted once a session and case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qwenspec
from hf_parity.cases import CASES, random_case
from hf_parity.oracle import Oracle, tiny_spec
from qwenspec.backend.api import Runner

Open = Callable[..., tuple[Oracle, Runner]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_case(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """open_case(name, dtype) -> the case's oracle, and a runner of its package that holds the same weights.

    A name is one of CASES, or `random-7` for the combination of that seed."""
    oracles: dict[str, Oracle] = {}
    packages: dict[str, Path] = {}
    runners: dict[tuple[str, str], Runner] = {}

    def open_case(case: str, dtype: str = "float32") -> tuple[Oracle, Runner]:
        if case not in packages:
            seed = int(case.removeprefix("random-")) if case.startswith("random-") else 0
            changes = random_case(seed) if case.startswith("random-") else CASES[case]
            oracles[case] = Oracle(tiny_spec(*changes), seed)
            folder = tmp_path_factory.mktemp(case)
            packages[case] = qwenspec.emit(oracles[case].spec, backend="triton", out=folder)
        if (case, dtype) not in runners:
            weights = packages[case].parent / f"weights-{dtype}"
            oracles[case].save(weights, getattr(torch, dtype), shards=3)
            runners[case, dtype] = qwenspec.open_runner(packages[case], weights=weights, device="cpu", dtype=dtype)
        return oracles[case], runners[case, dtype]

    return open_case
