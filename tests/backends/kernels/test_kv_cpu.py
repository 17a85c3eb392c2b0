"""The PyTorch paths of quantised KV caches, and on a machine with a GPU the kernels, against the float64 oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import kv_checks as checks
import kv_oracle
import pytest
import torch
from kernel_checks import random_tree, runs_kernels
from kernel_variants import KV_FLAGS, combinations, folded, load_mistaken

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def test_cpu() -> None:
    assert not runs_kernels(CPU)
    checks.check_all(CPU)


def test_the_oracle_rounds_as_torch_does() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10
    x = torch.cat([x, x * 1e-4, kv_oracle.e4m3_values()[:127].float(), torch.tensor([1.0625, 1.1875])])
    torch_codes = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(kv_oracle.to_e4m3(x), torch_codes.view(torch.uint8))
    assert torch.equal(kv_oracle.from_e4m3(torch_codes.view(torch.uint8)), torch_codes.double())


def decode(kv: str, dtype: torch.dtype = F32) -> None:
    checks.check_decode(CPU, dtype, kv, 4, 2, 16, 4, (9, 6))


def prefill(kv: str, window: int | None = None) -> None:
    trees = [random_tree(1, 7), random_tree(2, 3)]
    checks.check_prefill(CPU, F32, kv, 4, 2, 16, 4, ((5, 7), (0, 3)), window, window is not None, trees)


MISTAKES: dict[str, tuple[str, str, Callable[[], None]]] = {
    "keys are not scaled": ("(scale * k_scale)", "scale", lambda: decode("int8")),
    "keys are not scaled, in a tree": ("(scale * k_scale)", "scale", lambda: prefill("fp8")),
    "values are not scaled": ("(scores.softmax(-1) * v_scale)", "scores.softmax(-1)", lambda: decode("fp8")),
    "a layer's scale is ignored": ("256 * k_scales, 256 * v_scales", "256, 256", lambda: decode("fp8_stored")),
    "values are scaled as keys": ("* v_scale)", "* k_scale)", lambda: decode("fp8_stored")),
    "the scales of the first tokens": (
        "k_scale[:, :, tokens], v_scale[:, :, tokens]",
        "k_scale[:, :, : len(k[0])], v_scale[:, :, : len(k[0])]",
        lambda: checks.check_prefill(CPU, F32, "int8", 2, 1, 16, 4, ((0, 70),), 10, sliding=True),
    ),
    "numbers are rounded to the model's dtype": (
        "return SequenceKv(k.float(), v.float(), k_scales, v_scales)",
        "return SequenceKv((k * k_scales.mT).bfloat16().float(), v.float(), 0 * k_scales + 1, v_scales)",
        lambda: decode("int8", BF16),
    ),
    "NaN is 480": ("(bits + 0x80) & 0x4000", "0", lambda: checks.check_nan(CPU, "fp8_stored")),
    "a scale for all heads": (
        "x.float().abs().amax(-1)",
        "x.float().abs().amax((1, 2)).unsqueeze(1).expand(-1, x.shape[1])",
        lambda: checks.check_cache(CPU, F32, "int8", 24),
    ),
    "half away from zero": (
        ".round()",
        ".add(unit.sign() / 2).trunc()",
        lambda: checks.check_cache(CPU, F32, "int8", 24),
    ),
    "a reciprocal in place of a division": (
        "x.float() / scale",
        "x.float() * (1 / scale)",
        lambda: checks.check_cache(CPU, F32, "fp8", 24),
    ),
    "scales of zero divide": (
        "torch.where(scale > 0, unit, 0.0)",
        "unit",
        lambda: checks.check_cache(CPU, F32, "fp8", 24),
    ),
    "values have the keys' scales": (
        "v_scales.flatten(0, 1).index_copy_(0, slots, v_scale)",
        "v_scales.flatten(0, 1).index_copy_(0, slots, k_scale)",
        lambda: checks.check_cache(CPU, F32, "int8", 24),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_checks_find(mistake: str) -> None:
    right, wrong, check = MISTAKES[mistake]
    check()

    def load_wrong(*names: str, **flags: bool) -> object:
        return load_mistaken(right, wrong, *names, **flags)

    with mock.patch.object(checks, "load", load_wrong), pytest.raises(AssertionError):
        check()


def test_variants_are_clean(tmp_path: Path) -> None:
    """Nothing is left of a flag, and no name is unused or undefined."""
    for kv in checks.KV:
        for file in ("qkv", "decode_attention", "prefill_attention"):
            for variant in (0, -1):
                text = folded(file, kv, **combinations(file)[variant])
                (tmp_path / f"{file}_{kv}_{variant}.py").write_text(text, encoding="utf-8")
        (tmp_path / f"quantized_kv_{kv}.py").write_text(folded("quantized_kv", kv), encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F,E9", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    left = [
        file.name for file in tmp_path.iterdir() for flag in KV_FLAGS[""] if flag in file.read_text(encoding="utf-8")
    ]
    assert not left


def test_without_triton() -> None:
    """Platforms that have no Triton import every variant."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from kernel_variants import combinations, load
files, kvs = ("qkv", "decode_attention", "prefill_attention"), ("int8", "fp8", "fp8_stored")
print(len([load(file, kv, **combinations(file)[-1]) for file in files for kv in kvs]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    assert runs_kernels(torch.device("cuda"))
    checks.check_all(torch.device("cuda"))
