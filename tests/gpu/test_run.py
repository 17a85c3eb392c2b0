"""The GPU command itself, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu import ROOT, correctness
from gpu.report import Report


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_quick_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--device", "cpu", "--quick", "--sections", "packages,graphs,speed", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(out.read_text())
    titles = [section["title"] for section in data["sections"]]
    parity, skipped, _, times = data["sections"]
    assert len(parity["rows"]) == 9, titles  # three packages, three paths
    assert skipped["columns"] == ["skipped"]
    assert len(times["rows"]) == 9  # three packages: batches 1 and 3, prefill
    assert all(float(row[2]) > 0 for row in times["rows"])
    assert data["failures"] == []


@pytest.mark.parametrize(
    ("file", "right", "wrong", "failures"),
    [
        ("rope.py", "positions.float()", "positions.float().clamp(max=30)", 3),
        ("kernels/decode_attention.py", "scale=scale", "scale=2 * scale", 2),  # the last chunk has one token
    ],
    ids=["positions stop at 30", "decode's score scale"],
)
def test_a_wrong_package_is_found(tmp_path: Path, file: str, right: str, wrong: str, failures: int) -> None:
    package = tmp_path / f"broken_{Path(file).stem}"
    shutil.copytree(ROOT / "generated" / "qwen3_0_6b_triton", package)
    broken = package / file
    text = broken.read_text()
    assert right in text
    broken.write_text(text.replace(right, wrong))
    report = Report()
    correctness.packages(report, torch.device("cpu"), [package], quick=True)
    assert len(report.failures) == failures
    assert all(f"broken_{Path(file).stem}: " in failure for failure in report.failures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_says_when_there_is_no_gpu() -> None:
    done = run()
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_unknown_section() -> None:
    done = run("--sections", "kernel")
    assert done.returncode == 2
    assert "no section kernel; there are kernels" in done.stderr
