"""Triton packages on several ranks, real processes over gloo: they compute what one does, and read their shares.

One package serves every number of ranks; what one computes is compared to a reference elsewhere.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from backends import triton_ranks
from backends.test_triton_quantized import random_checkpoint
from hf_parity.cases import ALL_BIASES, QWEN1_LONG, sliding
from hf_parity.oracle import QWEN1, QWEN2, QWEN3, TINY, merge
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load
from qwenspec.verify.rank_pool import pool
from qwenspec.verify.weights import save_checkpoint, stored_weights

TIED = {"tie_word_embeddings": True}
FLOAT32, BFLOAT16 = 1e-5, 0.03  # largest error, in terms of the largest value of a forward
ROUNDED = 0.03  # … where a sum that is one float32 step larger may be rounded to another byte
SKIPPED = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


def heads(queries: int, kv: int) -> dict[str, Any]:
    return {"num_attention_heads": queries, "num_key_value_heads": kv}


# Architecture, what stands beside it, numbers of ranks, largest error.
Case = tuple[dict[str, Any], dict[str, Any], tuple[int, ...], float]
FULL: dict[str, Case] = {
    "1 KV head, biases, norms, odd width": (
        merge(merge(QWEN3, ALL_BIASES), {"intermediate_size": 57} | heads(4, 1)),
        {},
        (2, 4),
        FLOAT32,
    ),
    "2 KV heads, biases, tied": (merge(ALL_BIASES, TIED | heads(4, 2)), {}, (2, 4), FLOAT32),
    "4 KV heads, biases, norms, tied, odd width": (
        merge(merge(QWEN3, ALL_BIASES), TIED | {"intermediate_size": 55} | heads(4, 4)),
        {},
        (2, 4),
        FLOAT32,
    ),
    "6 heads on 3 KV heads": (merge(QWEN2, heads(6, 3)), {}, (2,), FLOAT32),
    "less MLP than ranks have room for": (merge(QWEN3, {"intermediate_size": 5}), {}, (4,), FLOAT32),
    "qwen1, logn, rope that follows lengths": (merge(QWEN1, QWEN1_LONG), {}, (2,), FLOAT32),
    "windows, 1 + w": (merge(merge(QWEN3, sliding(6, [1])), {"norm": {"weight": "one_plus"}}), {}, (4,), FLOAT32),
    "text embedding": (merge(QWEN3, {"lm_head": None, "embedding": {"normalize": True}}), {}, (2,), FLOAT32),
    "bfloat16, head in float32": (
        merge(ALL_BIASES, {"dtype": "bfloat16", "lm_head": {"dtype": "float32"}}),
        {},
        (2,),
        BFLOAT16,
    ),
    "int8 KV cache": (merge(QWEN3, heads(4, 1)), {"kv_cache": {"scheme": "int8"}}, (2,), ROUNDED),
    "fp8 KV cache, scales of the checkpoint": (
        QWEN3,
        {"kv_cache": {"scheme": "fp8_e4m3", "scales": "checkpoint"}},
        (4,),
        ROUNDED,
    ),
}
QUANTIZED: dict[str, Case] = {
    name: (architecture, {"quantization": quantization}, (2,), error)
    for name, (architecture, quantization, error) in {
        "awq": (
            merge(QWEN3, {"intermediate_size": 48}),
            {"scheme": "awq", "group_size": 16},
            FLOAT32,
        ),
        "gptq, zero points": (
            QWEN1,
            {"scheme": "gptq", "bits": 4, "group_size": 16, "sym": False},
            FLOAT32,
        ),
        "gptq v2, 8 bits, one group, biases": (
            merge(QWEN2, ALL_BIASES),
            {"scheme": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
            FLOAT32,
        ),
        "fp8, biases": (merge(QWEN3, ALL_BIASES), {"scheme": "fp8_block", "block": [16, 16]}, ROUNDED),
        "fp8 weights, some in full": (
            merge(QWEN2, ALL_BIASES),
            {"scheme": "fp8_block", "block": [8, 16], "activations": "none", "skip": SKIPPED},
            FLOAT32,
        ),
        "int8, tied": (merge(QWEN3, TIED), {"scheme": "int8"}, FLOAT32),
        "int4, tied int8 head": (merge(QWEN3, TIED | heads(4, 1)), {"scheme": "int4", "group_size": 32}, FLOAT32),
        "int4, tied int4 head, some in full": (
            merge(merge(QWEN2, ALL_BIASES), TIED),
            {"scheme": "int4", "group_size": 32, "head": "int4", "skip": SKIPPED},
            FLOAT32,
        ),
        "int4, int8 head in float32, bfloat16": (
            merge(ALL_BIASES, {"dtype": "bfloat16", "lm_head": {"dtype": "float32"}}),
            {"scheme": "int4", "group_size": 32},
            BFLOAT16,
        ),
    }.items()
}
CASES = FULL | QUANTIZED

Build = Callable[[str], tuple[Path, Path]]


def spec_of(folder: Path, architecture: dict[str, Any], beside: dict[str, Any]) -> Spec:
    document = {
        "schema_version": 1,
        "family": "tiny",
        "description": "A model for tests.",
        "default_variant": "tiny",
        "architecture": merge(TINY, architecture),
        "variants": {"tiny": {}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(document | beside))
    return load(folder / "tiny.yaml", variant="tiny")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The package and the checkpoint of a case."""

    @functools.cache
    def build(case: str) -> tuple[Path, Path]:
        architecture, beside, _, _ = CASES[case]
        folder = tmp_path_factory.mktemp("case")
        spec = spec_of(folder, architecture, beside)
        save_checkpoint(spec, stored_weights(spec, seed=1), folder / "weights", spec.architecture.dtype, shards=2)
        return emit(spec, "triton", folder), folder / "weights"

    return build


@pytest.mark.parametrize(("degree", "case"), [(d, case) for d in (2, 4) for case in CASES if d in CASES[case][2]])
def test_ranks_compute_what_one_computes(degree: int, case: str, built: Build) -> None:
    architecture, _, _, allowed = CASES[case]
    dtype = architecture.get("dtype", "float32")
    package, weights = built(case)
    alone = triton_ranks.outputs(package, weights, dtype)
    first, *others = pool(degree).each(triton_ranks.outputs, package, weights, dtype)
    assert all(np.ptp(output) > 0.1 for output in alone)
    for forward, (want, got) in enumerate(zip(alone, first, strict=True)):
        assert got.shape == want.shape
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= allowed, f"forward {forward} is off by {error:.2g}"
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("case", ["2 KV heads, biases, tied", "text embedding"])
def test_no_more_than_two_all_reduces_a_layer(case: str, degree: int, built: Build) -> None:
    reduce, gather = "all_reduce", "all_gather"
    forward = 2 * TINY["num_hidden_layers"] * [reduce] + ([] if case == "text embedding" else [gather])
    expected = {"embed 5": [reduce], "prefill": forward, "embed 1": [reduce], "decode": forward}
    assert pool(degree).each(triton_ranks.collectives, *built(case)) == degree * [expected]


def test_every_rank_goes_on_with_the_tokens_of_the_first(built: Build) -> None:
    package, weights = built("2 KV heads, biases, tied")
    alone = triton_ranks.tokens(package, weights, 1.0)
    assert len(alone) == 12
    assert pool(2).each(triton_ranks.tokens, package, weights, 1.0) == [alone, alone]


def test_an_id_of_padding_is_outside_the_vocabulary(built: Build) -> None:
    told = pool(2).each(triton_ranks.outside, *built("2 KV heads, biases, tied"))
    assert told == 2 * ["ids: 101 is not in 0 … 100"]


def test_one_rank_asks_nothing_of_torch_distributed(built: Build) -> None:
    """… and imports it nowhere: torch does so by itself, and so it is made to fail when a package asks for it."""
    package, weights = built("2 KV heads, biases, tied")
    program = f"""
import builtins, sys
from pathlib import Path
import torch
original = builtins.__import__
def guarded(name, globals=None, *rest):
    mine = str((globals or {{}}).get("__name__", "")).startswith("{package.name}")
    assert not (mine and name.startswith("torch.distributed")), name
    return original(name, globals, *rest)
builtins.__import__ = guarded
sys.path.insert(0, {str(package.parent)!r})
module = __import__("{package.name}")
model = module.Model.load({str(weights)!r})
print(len(list(module.generate(model, [[1, 2]], module.Sampling(max_tokens=3)))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


# ------------------------------------------------------------------------------------------------- what is read

LARGE = {
    "vocab_size": 2003,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "attention": {"head_dim": 32, "qk_norm": "per_head", "bias": {"qkv": True, "output": True}},
    "mlp": {"bias": True},
}
READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "untied": (LARGE, {}),
    "tied": (merge(LARGE, TIED), {}),
    "2 KV heads": (merge(LARGE, {"num_key_value_heads": 2}), {}),
    "awq": (LARGE, {"quantization": {"scheme": "awq", "group_size": 32}}),
    "gptq": (LARGE, {"quantization": {"scheme": "gptq", "bits": 4, "group_size": 32}}),
    "gptq, zero points, 8 bits": (
        LARGE,
        {"quantization": {"scheme": "gptq", "bits": 8, "group_size": 64, "sym": False}},
    ),
    "int4": (LARGE, {"quantization": {"scheme": "int4", "group_size": 32}}),
    "int4, tied int4 head": (
        merge(LARGE, TIED),
        {"quantization": {"scheme": "int4", "group_size": 32, "head": "int4"}},
    ),
    "fp8_block": (LARGE, {"quantization": {"scheme": "fp8_block", "block": [32, 32]}}),
}


class Counted:
    """safetensors' safe_open, and what is taken from its files."""

    taken = 0

    def __init__(self, file: Path, framework: str) -> None:
        self.file = safe_open(file, framework=framework)

    def __enter__(self) -> Counted:
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str) -> Counted:
        self.slice = self.opened.get_slice(name)
        return self

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        found: torch.Tensor = self.slice[index]
        Counted.taken += found.nbytes
        return found


def bytes_read(module: ModuleType, weights: Path, rank: int, degree: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a rank takes of the checkpoint's tensors, headers apart."""
    Counted.taken = 0
    monkeypatch.setattr(sys.modules[f"{module.__name__}.checkpoint"], "safe_open", Counted)
    if quantized := sys.modules.get(f"{module.__name__}.quantized"):
        original = quantized.read_raw

        def counted(*arguments: Any) -> Any:
            found = original(*arguments)
            Counted.taken += found.nbytes
            return found

        monkeypatch.setattr(quantized, "read_raw", counted)
    cpu, ranks = torch.device("cpu"), module.Ranks(rank, degree)
    model = module.Model(module.Config(), torch.float32, cpu, ranks)
    sys.modules[f"{module.__name__}.weights"].load_weights(model, weights, cpu, ranks)
    monkeypatch.undo()
    return Counted.taken


def sizes(weights: Path, degree: int, kv_heads: int) -> tuple[float, int]:
    """Bytes of a rank's share of what ranks share, and of what every rank or the first alone has all of."""
    shared, whole = 0.0, 0
    with safe_open(weights / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            nbytes = tensors.get_tensor(name).nbytes
            if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias", "g_idx")):
                whole += nbytes
            else:
                shared += nbytes / (min(degree, kv_heads) if ".k_proj" in name or ".v_proj" in name else degree)
    return shared, whole


@pytest.mark.parametrize("case", READ)
def test_a_rank_reads_its_share(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.1 times what each has of what is shared, and what is not shared once."""
    architecture, beside = READ[case]
    spec = spec_of(tmp_path, architecture, beside)
    save_checkpoint(spec, stored_weights(spec, seed=1), tmp_path / "weights", "bfloat16")
    module = import_package(emit(spec, "triton", tmp_path))
    kv_heads = spec.architecture.num_key_value_heads or 0
    for degree in (1, 2, 4):
        share, whole = sizes(tmp_path / "weights", degree, kv_heads)
        read = [bytes_read(module, tmp_path / "weights", rank, degree, monkeypatch) for rank in range(degree)]
        assert max(read) <= 1.1 * share + whole, f"{degree} ranks: {max(read) / (share + whole):.3f} times its share"
        assert sum(read) >= degree * share + whole  # together they have everything


MEASURE = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
module = __import__(sys.argv[2])
torch.ones(8, 8) @ torch.ones(8, 8)
def peak():  # not getrusage: its maximum starts at what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
ranks, cpu = module.Ranks(1, 2), torch.device("cpu")
model = module.Model(module.Config(), torch.bfloat16, cpu, ranks)
before = peak()
sys.modules[f"{module.__name__}.weights"].load_weights(model, sys.argv[3], cpu, ranks)
print(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), peak() - before)
"""


@pytest.mark.parametrize("beside", [{}, {"quantization": {"scheme": "awq"}}], ids=["full", "awq"])
def test_peak_memory_is_little_more_than_the_share(beside: dict[str, Any], tmp_path: Path) -> None:
    layers = 11 if beside else 3  # large enough that the pieces which are read at once, of 8 MB, hardly count
    wide = {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 4_001, "num_hidden_layers": layers}
    spec = spec_of(tmp_path, merge(QWEN3, wide | {"dtype": "bfloat16", "attention": {"head_dim": 256}}), beside)
    package = emit(spec, "triton", tmp_path)
    save_file(random_checkpoint(package), tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(package.parent), package.name, str(tmp_path)]
    # On one thread: what several of torch's hold for themselves does not grow with the model.
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    share, peak = map(int, done.stdout.split())
    whole = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert 250e6 < share < 0.52 * whole
    assert 0.9 * share < peak <= 1.2 * share, f"{peak / share:.2f} times the share"
