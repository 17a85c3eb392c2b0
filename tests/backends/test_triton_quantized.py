"""Whole Triton packages with quantised weights: what they compute, what they hold, and what loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors.torch import save_file

import qwenspec
from hf_parity.oracle import QWEN1, QWEN2, QWEN3, TINY, merge
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.reference import Reference
from qwenspec.verify.weights import save_checkpoint, stored_weights

TIED = {"tie_word_embeddings": True}
BIASES = {"attention": {"bias": {"qkv": True, "output": True}}, "mlp": {"bias": True}}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ALL_LINEARS = [f"model.layers.{i}.{name}" for i in range(TINY["num_hidden_layers"]) for name in LINEARS]
EVEN = {"intermediate_size": 64}  # awq has whole groups alone

# Schemes, and architectures whose sizes their groups and blocks do not divide where the format allows it.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "awq": ({"scheme": "awq", "group_size": 16}, merge(QWEN3, EVEN)),
    "gptq": ({"scheme": "gptq", "bits": 4, "group_size": 16}, QWEN1),
    "gptq, zero points, act order": (
        {"scheme": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
        QWEN2,
    ),
    "gptq v2, 8 bits, one group": (
        {"scheme": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        merge(QWEN2, BIASES),
    ),
    "gptq, 8 bits, biases, zero points, act order": (
        {"scheme": "gptq", "bits": 8, "group_size": 24, "sym": False, "desc_act": True},
        BIASES,
    ),
    "fp8": ({"scheme": "fp8_block", "block": [16, 24]}, QWEN3),
    "fp8, parts apart, biases": ({"scheme": "fp8_block", "block": [24, 20]}, merge(QWEN3, BIASES)),
    "fp8 weights": (
        {"scheme": "fp8_block", "block": [16, 16], "activations": "none", "skip": [ALL_LINEARS[1], ALL_LINEARS[-1]]},
        QWEN3,
    ),
    "int8": ({"scheme": "int8"}, QWEN3),
    "int8, tied head in full": ({"scheme": "int8", "head": "none"}, merge(QWEN3, TIED)),
    "int8 head alone": ({"scheme": "int8", "skip": ALL_LINEARS}, merge(QWEN3, TIED)),
    "int4, tied int8 head": ({"scheme": "int4", "group_size": 32}, merge(QWEN3, TIED)),
    "int4, int8 head in float32": (
        {"scheme": "int4", "group_size": 32},
        merge(QWEN3, merge(BIASES, {"lm_head": {"dtype": "float32"}, "dtype": "bfloat16"})),
    ),
    "int4, tied int4 head, some in full": (
        {"scheme": "int4", "group_size": 32, "head": "int4", "skip": [ALL_LINEARS[2], ALL_LINEARS[3]]},
        merge(QWEN2, merge(BIASES, TIED)),
    ),
}


def quantized_spec(folder: Path, quantization: dict[str, Any], *changes: dict[str, Any]) -> Spec:
    architecture = TINY
    for change in changes:
        architecture = merge(architecture, change)
    document = {
        "schema_version": 1,
        "family": "tiny",
        "description": "A model for tests.",
        "default_variant": "tiny",
        "architecture": architecture,
        "quantization": quantization,
        "variants": {"tiny": {}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
    return load(folder / "tiny.yaml", variant="tiny")


def logits(runner: Any, ids: npt.NDArray[np.int32], lengths: list[int]) -> npt.NDArray[np.float32]:
    """[n, vocab] of one sequence in forwards of these lengths; those of one token are decode steps."""
    cache = runner.create_paged_kv_cache(1, 64, 64, 16)
    cache.add_sequence(0)
    found = []
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        cache.begin_forward([0], [len(part)])
        step = runner.decode if len(part) == 1 else runner.batch_verify
        found.append(step(runner.embed(part), cache)[0])
        cache.end_forward()
    return np.concatenate(found)


@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case: str, tmp_path: Path) -> None:
    """Prefill in one piece and in pieces, decode, and taps."""
    quantization, architecture = CASES[case]
    spec = quantized_spec(tmp_path, quantization, architecture)
    stored = stored_weights(spec, seed=1)
    reference = Reference(spec, Dequantized(spec, stored))
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], 14).astype(np.int32)
    want = reference.logits(ids)
    save_checkpoint(spec, stored, tmp_path / "weights", "float32", shards=2)
    package = emit(spec, "triton", tmp_path)
    runner = qwenspec.open_runner(package, tmp_path / "weights", "cpu", "float32")
    for lengths in ([14], [7, 3, 2, 1, 1]):
        error = np.abs(logits(runner, ids, lengths) - want).max() / np.abs(want).max()
        assert error < 2e-5, f"{lengths}: {error:.2g}"
    cache = runner.create_paged_kv_cache(1, 64, 64, 16)
    cache.add_sequence(0)
    cache.begin_forward([0], [len(ids)])
    assert list(runner.taps(ids, cache)) == list(reference.taps(ids))


def test_activations_in_another_dtype(tmp_path: Path) -> None:
    """bfloat16's error is a few of its roundings; scales and quantised weights keep their own dtypes."""
    spec = quantized_spec(tmp_path, *CASES["int4, tied int4 head, some in full"])
    stored = stored_weights(spec, seed=1)
    save_checkpoint(spec, stored, tmp_path / "weights", "float32")
    package = emit(spec, "triton", tmp_path)
    ids = np.arange(9, dtype=np.int32)
    want = Reference(spec, Dequantized(spec, stored)).logits(ids)
    runner = qwenspec.open_runner(package, tmp_path / "weights", "cpu", "bfloat16")
    assert np.abs(logits(runner, ids, [9]) - want).max() < 0.03 * np.abs(want).max()
    model = import_package(package).Model.load(tmp_path / "weights", dtype="bfloat16")
    assert model.embed(torch.arange(3)).dtype == torch.bfloat16
    assert {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.named_buffers()} == {
        "qweight": torch.uint8,
        "scales": torch.float16,
    }


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("int8", {"columns", "int8_linear", "int8_matrix"}),
        ("int4, tied int8 head", {"columns", "int4_linear", "int4_matrix", "int8_linear", "int8_matrix"}),
        ("awq", {"columns", "int4_linear", "int4_matrix", "linear"}),
        ("fp8", {"e4m3", "fp8_linear", "fp8_matrix", "linear"}),
    ],
)
def test_a_package_has_the_kernels_that_it_needs(case: str, kernels: set[str], tmp_path: Path) -> None:
    package = emit(quantized_spec(tmp_path, *CASES[case]), "triton", tmp_path)
    others = {"__init__", "activation", "decode_attention", "dispatch", "norm", "paged", "prefill_attention", "qkv"}
    assert {file.stem for file in (package / "kernels").iterdir()} - others == kernels
    assert {"quantized.py", "stored.py"} <= {file.name for file in package.iterdir()}


MEASURE = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
module = __import__(sys.argv[2])
torch.ones(8, 8) @ torch.ones(8, 8)
def peak():  # not getrusage: its maximum starts at what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
module.Model(module.Config(), torch.bfloat16, torch.device("cpu"))  # empty: what torch imports for it is no tensor
before = peak()
model = module.Model.load(sys.argv[3])
print(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), peak() - before)
"""
SMALLEST = {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int4", "group_size": 32},
        {"scheme": "awq"},
        {"scheme": "gptq", "bits": 8, "sym": False, "desc_act": False},
        {"scheme": "fp8_block"},
    ],
    ids=lambda quantization: quantization["scheme"],
)
def test_peak_memory_is_little_more_than_the_model(quantization: dict[str, Any], tmp_path: Path) -> None:
    """No matrix is ever expanded: at most 1.2 times the model's bytes, of which more than half are quantised."""
    wide = {"hidden_size": 1536, "intermediate_size": 6144, "vocab_size": 8_000, "num_hidden_layers": 12}
    spec = quantized_spec(tmp_path, quantization, QWEN3, wide, {"dtype": "bfloat16", "attention": {"head_dim": 128}})
    package = emit(spec, "triton", tmp_path)
    save_file(random_checkpoint(package), tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(package.parent), package.name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model_bytes, peak = map(int, done.stdout.split())
    assert model_bytes > 150e6
    assert 0.9 * model_bytes < peak <= 1.2 * model_bytes, f"{peak / model_bytes:.2f} times the model"


def random_checkpoint(package: Path) -> dict[str, torch.Tensor]:
    """Tensors of the manifest's names and shapes."""
    manifest = json.loads((package / "MANIFEST.json").read_text())
    tensors = {}
    for entry in manifest["parameters"]:
        for i in entry.get("layers", range(manifest["num_layers"]) if "{i}" in entry["name"] else [0]):
            for source in entry["sources"]:
                if "format" not in entry:
                    name, rows = source
                    tensors[name.replace("{i}", str(i))] = torch.ones(rows, *entry["shape"][1:], dtype=torch.bfloat16)
                    continue
                for name, shape, dtypes, optional in source["tensors"].values():
                    if not optional:
                        dtype = SMALLEST.get(dtypes[0], torch.float16)
                        tensors[name.replace("{i}", str(i))] = torch.ones(shape).to(dtype)
    return tensors
