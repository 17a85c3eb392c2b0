"""Ranks on GPUs, all but NCCL itself: processes whose tensors are in host memory, where cpu_nccl.c adds them up."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from nccl_rank import IDS
from test_tvm_cuda import ARCH, compile_source, needs_nvcc, part

from hf_parity.oracle import QWEN3, Oracle, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

HERE = Path(__file__).parent
LAYERS = 2
CHANGES = {"num_hidden_layers": LAYERS, "mlp": {"bias": True}, "attention": {"bias": {"qkv": True, "output": True}}}
FORWARD = ["all_reduce"] * (1 + 2 * LAYERS) + ["all_gather"]  # the embedding, attention and MLP of each layer; logits


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3, CHANGES))


@pytest.fixture(scope="module")
def package(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(oracle.spec, "tvm", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def module(package: Path) -> ModuleType:
    return import_package(package)


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libnccl.so.2."""
    library = tmp_path_factory.mktemp("nccl") / "libnccl.so.2"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, HERE / "cpu_nccl.c"], check=True
    )
    return library


@dataclass(frozen=True)
class Ended:
    """A process that was a rank."""

    status: int
    said: str
    out: Path


@dataclass(frozen=True)
class Launcher:
    package: Path
    weights: Path
    nccl: Path
    folder: Path

    def run(self, *fates: str, **environment: str) -> list[Ended]:
        """A rank for each fate, when all have ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        outs = [self.folder / f"{rank}.npz" for rank in range(len(fates))]
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, fate in enumerate(fates):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(fates))}
                process = subprocess.Popen(
                    [sys.executable, HERE / "nccl_rank.py", self.package, self.weights, outs[rank], fate],
                    env={**os.environ, **self.environment(), **meeting, **place, **environment},
                    cwd=self.folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                processes.append(process)
            said = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [Ended(p.returncode, text, out) for p, text, out in zip(processes, said, outs, strict=True)]

    def environment(self) -> dict[str, str]:
        libraries = {"LD_LIBRARY_PATH": str(self.nccl.parent), "QWENSPEC_CACHE": str(self.nccl.parent / "libraries")}
        return {**libraries, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}


@pytest.fixture
def launcher(oracle: Oracle, package: Path, nccl: Path, tmp_path: Path) -> Launcher:
    return Launcher(package, oracle.save(tmp_path / "weights"), nccl, tmp_path)


def test_two_ranks_are_the_model(launcher: Launcher, oracle: Oracle) -> None:
    ended = launcher.run("", "")
    assert [rank.status for rank in ended] == [0, 0], [rank.said for rank in ended]
    first, second = (np.load(rank.out) for rank in ended)
    assert list(first["asked"]) == list(second["asked"]) == FORWARD * 2
    np.testing.assert_array_equal(first["logits"], second["logits"])
    np.testing.assert_allclose(first["logits"], oracle.logits(np.array(IDS)), atol=2e-5)


def test_a_rank_that_dies_ends_one_that_waits_inside_nccl(launcher: Launcher) -> None:
    waiting, dead = launcher.run("mourns", "dies")
    assert dead.status == 3
    assert waiting.status == 1
    assert "rank 1" in waiting.said


def test_a_rank_that_cannot_connect_says_so_and_ends_the_others(launcher: Launcher) -> None:
    ended = launcher.run("", "", NCCL_FAILS="1")
    assert all(rank.status for rank in ended)
    assert "NCCL: unhandled cuda error; Cuda failure 'a test's'" in "".join(rank.said for rank in ended)


def test_nccl_of_a_python_package(
    module: ModuleType, nccl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = part(module, "nccl")
    monkeypatch.setattr(bindings, "LIBRARY", "libnccl-of-a-test.so")
    with pytest.raises(bindings.RankError, match=r"no libnccl-of-a-test\.so: pip install"):
        bindings.find_nccl()
    folder = tmp_path / "nvidia" / "nccl" / "lib"
    folder.mkdir(parents=True)
    (folder / bindings.LIBRARY).symlink_to(nccl)
    monkeypatch.syspath_prepend(tmp_path)
    assert bindings.find_nccl().ncclGetUniqueId(bindings.UniqueId()) == 0


@needs_nvcc
def test_kernels_of_several_ranks_compile_for_gpus(module: ModuleType, tmp_path: Path) -> None:
    target = part(module, "targets").find_target(f"cuda:{ARCH}")
    compiler = part(module, "compiler")
    exported, _ = compiler.export("bfloat16", target, 2)
    executable = compiler.compile_module(exported, target, {})
    decode = re.search(r"^@batch_decode:$(.*?)^@\w+:$", executable.as_text(), re.MULTILINE | re.DOTALL)
    assert decode is not None
    asked = re.findall(r"call\s+runtime\.disco\.(\w+)", decode[1])
    assert asked == ["allreduce"] * 2 * LAYERS + ["allgather"]
    assert compile_source(part(module, "cuda").source(executable), tmp_path).cubin
