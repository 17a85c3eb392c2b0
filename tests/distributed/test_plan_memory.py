"""`plan` against what is measured: weights, KV cache, activations, logits and graphs of each rank."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from distributed.gpu_memory import LiveBytes, Measured, gpu_path, load, load_nothing, measure, one_of
from distributed.processes import PATIENCE, torchrun
from hf_parity.oracle import merge
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.ir import shard
from qwenspec.ir.cost import MemoryPlan, memory
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.spec import load as spec_files
from qwenspec.spec.document import Spec
from qwenspec.verify.weights import save_checkpoint, stored_weights

SPECS = Path(__file__).parents[2] / "specs"
RANK = Path(__file__).with_name("measured_rank.py")
BASE: dict[str, Any] = {
    "vocab_size": 5003,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 720,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 64},
    "rope": {"theta": 1e4},
}
QWEN2 = {"attention": {"bias": {"qkv": True}}}
QWEN3 = {"attention": {"qk_norm": "per_head"}}
BIASES = {"attention": {"bias": {"qkv": True, "output": True}}, "mlp": {"bias": True}}
TIED = {"tie_word_embeddings": True}
EMBEDDING = {"lm_head": None, "embedding": {"normalize": True}, "checkpoint": {"layout": "qwen3_embedding"}}
QWEN1 = {
    "num_key_value_heads": None,
    "attention": {"bias": {"qkv": True}, "logn": {"train_length": 256}},
    "rope": {"compute_dtype": "float32", "scaling": {"kind": "dynamic_qwen1", "train_length": 256}},
}
WIDE_HEADS = {
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "intermediate_size": 128,
    "attention": {"head_dim": 128},
}
RAGGED = {"hidden_size": 250, "attention": {"head_dim": 34}, "intermediate_size": 730}
GPTQ = {"scheme": "gptq", "bits": 4, "group_size": 16}
INT4 = {"scheme": "int4", "group_size": 48, "head": "int4"}
FP8_WEIGHTS = {"scheme": "fp8_block", "block": [16, 16], "activations": "none"}
SKIPPED = ["model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"]
WINDOWS = {"attention": {"sliding_window": {"window": 128, "layers": [1]}}}

# Of an architecture, and what stands beside it in a spec.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3, tied": (merge(QWEN3, TIED), {}),
    "qwen2, windows": (merge(QWEN2, WINDOWS), {}),
    "qwen2, every layer slides": (merge(QWEN2, {"attention": {"sliding_window": {"window": 40, "layers": "all"}}}), {}),
    "qwen1, logn, rope that follows lengths": (QWEN1, {}),
    "all biases, float32": (merge(BIASES, {"dtype": "float32"}), {}),
    "tied, head in float32": (merge(TIED, {"lm_head": {"dtype": "float32"}}), {}),
    "text embedding": (merge(QWEN3, EMBEDDING), {}),
    "one layer of attention that is wider than its MLP": (WIDE_HEADS, {}),
    "four query heads of three groups": (merge(QWEN2, {"num_attention_heads": 12, "attention": {"head_dim": 32}}), {}),
    "awq": (QWEN3, {"quantization": {"scheme": "awq", "group_size": 16}}),
    "gptq, act order": (merge(QWEN2, BIASES), {"quantization": GPTQ | {"sym": False, "desc_act": True}}),
    "int8 head, skipped modules": (TIED, {"quantization": {"scheme": "int8", "skip": SKIPPED}}),
    "int4, ragged groups": (
        merge(TIED, RAGGED),
        {"quantization": INT4},
    ),
    "fp8": (QWEN3, {"quantization": {"scheme": "fp8_block", "block": [16, 32]}}),
    "fp8 weights, fp8 keys": (QWEN3, {"quantization": FP8_WEIGHTS, "kv_cache": {"scheme": "fp8_e4m3"}}),
    "int8 keys": (merge(QWEN2, WINDOWS), {"kv_cache": {"scheme": "int8"}}),
}


def make_spec(folder: Path, case: str) -> Spec:
    architecture, beside = CASES[case]
    document = {
        "schema_version": 1,
        "family": "planned",
        "description": "A model for tests.",
        "default_variant": "planned",
        "architecture": merge(BASE, architecture),
        "variants": {"planned": {}},
        **beside,
    }
    file = folder / "planned.yaml"
    file.write_text(yaml.safe_dump(document))
    return spec_files.load(file)


# context, batch, page size, prefill chunk: a long prefill takes most, or many sequences do
SERVED = [(300, 3, 16, 256), (40, 20, 8, 16)]
TOGETHER = (150, 2, 16, 128)


def package_of(spec: Spec, folder: Path) -> tuple[Path, Path]:
    """A Triton package and a checkpoint."""
    save_checkpoint(spec, stored_weights(spec, seed=1), folder / "weights", "bfloat16")
    return emit(spec, "triton", folder), folder / "weights"


def check(planned: MemoryPlan, found: Measured) -> None:
    """Weights to the byte; 5 % of the others are promised, and they miss no tensor of note."""
    assert planned.weights == found.weights
    for name in ("kv_cache", "activations", "logits", "graphs"):
        assert getattr(planned, name) == pytest.approx(getattr(found, name), rel=0.01), name


def check_rank(package: ModuleType, model: Model, weights: Path, rank: int, degree: int) -> None:
    split = shard.plan(model, degree)
    with gpu_path(package), one_of(package, rank, degree) as ranks:
        loaded = load(package, ranks, weights)
        for served in SERVED:
            check(memory(model, split, *served), measure(package, loaded, *served))


def test_live_bytes() -> None:
    """Views are no memory, and what was there before does not count."""
    before = torch.zeros(100)
    with LiveBytes() as live:
        a = torch.tensor([1.0] * 50) + before[:50]
        view = a[10:]
        b = before + 1
        assert live.now == 200 + 400
        del a
        assert live.now == 200 + 400
        del view, b
        assert (live.now, live.peak) == (0, 600)
        assert live.restart() == live.peak == 0


@pytest.mark.parametrize("case", CASES)
def test_one_rank(case: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, case)
    package, weights = package_of(spec, tmp_path)
    check_rank(import_package(package), lower(spec), weights, 0, 1)


@pytest.mark.parametrize(
    ("case", "degree"),
    [
        ("qwen3, tied", 8),  # of 4 key/value heads
        ("four query heads of three groups", 3),
        ("all biases, float32", 4),
        ("tied, head in float32", 2),
        ("text embedding", 2),
        ("awq", 2),  # of 45 groups
        ("int8 head, skipped modules", 4),
        ("fp8", 2),
        ("fp8 weights, fp8 keys", 2),
    ],
)
def test_first_and_last_of_several_ranks(case: str, degree: int, tmp_path: Path) -> None:
    """Of 5003 rows of vocabulary, the last rank has fewer than it has room for."""
    spec = make_spec(tmp_path, case)
    package, weights = package_of(spec, tmp_path)
    for rank in (0, degree - 1):
        check_rank(import_package(package), lower(spec), weights, rank, degree)


@pytest.mark.parametrize(("case", "degree"), [("qwen3, tied", 4), ("awq", 2)])
def test_ranks_that_work_together(case: str, degree: int, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, case)
    package, weights = package_of(spec, tmp_path)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*map(str, [RANK, package, weights, tmp_path]), json.dumps(TOGETHER)]
    launcher = torchrun(degree, *command, PYTHONPATH=paths)
    try:
        _, errors = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, errors
    model = lower(spec)
    for rank in range(degree):
        found = Measured(**json.loads((tmp_path / f"{rank}.json").read_text()))
        check(memory(model, shard.plan(model, degree), *TOGETHER), found)


def test_a_large_model(tmp_path: Path) -> None:
    """Qwen2.5-72B on 8 ranks, quantised, in tensors without content; layers are alike, and 3 of 80 are enough."""
    file = tmp_path / "large.yaml"
    source = SPECS / "qwen2_5.yaml"
    own = "{num_hidden_layers: 3, quantization: {scheme: awq, group_size: 128}}"
    file.write_text(f'schema_version: 1\nfamily: x\nextends: "{source}#qwen2.5-72b"\nvariants: {{x: {own}}}\n')
    spec = spec_files.load(file)
    model, served = lower(spec), (4096, 4, 16, 2048)
    package = import_package(emit(spec, "triton", tmp_path))
    with gpu_path(package), one_of(package, 7, 8) as ranks, FakeTensorMode(allow_non_fake_inputs=True):
        found = measure(package, load_nothing(package, ranks), *served)
    planned = memory(model, shard.plan(model, 8), *served)
    check(planned, found)
    assert planned.activations > 100e6


@pytest.mark.parametrize(
    ("variant", "degrees"), [("qwen3-0.6b", (1, 8)), ("qwen3-8b-fp8", (1, 8)), ("qwen3-8b-awq", (1, 4))]
)
def test_weights_of_tvm(variant: str, degrees: tuple[int, ...], tmp_path: Path) -> None:
    """In panels, and with more scales: within 5 % for models as released."""
    spec = spec_files.load(SPECS / "qwen3.yaml", variant)
    package = import_package(emit(spec, "tvm", tmp_path))
    model, targets = (importlib.import_module(f"{package.__name__}.{name}") for name in ("model", "targets"))
    for degree in degrees:
        with targets.find_target("cpu"):
            decoder = model.Decoder(package.Config(), package.Config().dtype, degree)
        found = sum(math.prod(map(int, p.shape)) * size_of(p.dtype) for _, p in decoder.named_parameters())
        split = shard.plan(lower(spec), degree)
        assert memory(lower(spec), split, context=16, batch=1).weights == pytest.approx(found, rel=0.05)


def size_of(dtype: Any) -> int:
    """Bytes of a value of one of TVM's dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if str(dtype) == "bfloat16" else str(dtype)).itemsize
