"""Packages are emitted once a session, backend and case; those of TVM are compiled while other tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import qwenspec
from hf_parity.ahead import Ahead
from hf_parity.cases import changes
from hf_parity.oracle import Oracle, tiny_spec
from qwenspec.backend.api import Runner

Open = Callable[..., tuple[Oracle, Runner]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["triton", "tvm"])
def backend(request: pytest.FixtureRequest) -> str:
    """All tests with the one come before those with the other."""
    return request.param


@pytest.fixture(scope="session")
def ahead(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    """What the tests of this session will open, in their order."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    named = [p for p in parameters if p.get("backend") == "tvm" and "case" in p]
    wanted = {(p["case"], p.get("dtype", "float32")): tiny_spec(*changes(p["case"])) for p in named}
    ahead = Ahead(wanted, tmp_path_factory.mktemp("tvm"))
    yield ahead
    ahead.close()


@pytest.fixture(scope="session")
def open_case(backend: str, ahead: Ahead, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """open_case(name, dtype) -> the case's oracle, and a runner of its package that holds the same weights.

    Of partial rotary, which Hugging Face's classes lack, the oracle is a full one that lends its weights."""
    oracles: dict[str, Oracle] = {}
    runners: dict[tuple[str, str], Runner] = {}

    def package(case: str, dtype: str) -> Path:
        if backend == "tvm":
            return ahead.package(case, dtype)
        return qwenspec.emit(tiny_spec(*changes(case)), backend=backend, out=tmp_path_factory.mktemp(case))

    def open_case(case: str, dtype: str = "float32") -> tuple[Oracle, Runner]:
        if case not in oracles:
            seed = int(case.removeprefix("random-")) if case.startswith("random-") else 0
            full = {"rope": {"partial_rotary_factor": 1.0}}
            oracles[case] = Oracle(tiny_spec(*changes(case), full), seed)
        if (case, dtype) not in runners:
            weights = tmp_path_factory.mktemp("weights")
            oracles[case].save(weights, getattr(torch, dtype), shards=3)
            runners[case, dtype] = qwenspec.open_runner(package(case, dtype), weights, device="cpu", dtype=dtype)
        return oracles[case], runners[case, dtype]

    return open_case
