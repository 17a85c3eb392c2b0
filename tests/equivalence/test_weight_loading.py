"""Packages hold what the resolved program says of a checkpoint, bit for bit: in any layout, over any files.

Results cannot show this as sharply: where a value is rounded twice, they differ by less than their bounds.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sharded import assembled

from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import LmHead, Model, Param
from qwenspec.spec.document import Spec
from qwenspec.verify.strategies import spec_of, specs
from qwenspec.verify.weights import random_weights, save_checkpoint

EXAMPLES = settings().max_examples  # 100 in the `ci` profile
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

dtypes = st.sampled_from(["float32", "float16", "bfloat16"])


def write(spec: Spec, folder: Path, stored: str, shards: int) -> dict[str, torch.Tensor]:
    """A checkpoint with a tensor of each kind that the spec lets pass unread; -> what its files hold.

    Values have all the bits that `stored` has, so that it shows where they are rounded."""
    noise = np.random.default_rng(0)
    tensors = {name: value * noise.uniform(1, 2, value.shape) for name, value in random_weights(spec, 0).items()}
    unread = {pattern.replace("*", "layers.0") for pattern in spec.layout.ignore}
    if spec.architecture.tie_word_embeddings or spec.architecture.embedding is not None:
        unread.add(f"{spec.layout.lm_head}.weight")  # some files hold a copy of the tied embedding
    assert unread.isdisjoint(tensors)
    tensors |= {name: noise.normal(size=(3, 5)) for name in unread}
    save_checkpoint(spec, {name: tensors[name] for name in sorted(tensors)}, folder, stored, shards)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == min(shards, len(tensors))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expected(param: Param, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Rounded once, as PyTorch rounds. float32 has all values of the dtypes that checkpoints have."""
    exact = assembled(param, {source.tensor: tensors[source.tensor].float().numpy() for source in param.sources})
    return torch.from_numpy(exact).to(dtype)


def dtype_of(param: Param, model: Model, run: str) -> torch.dtype:
    """A model that runs in another dtype keeps its head's own."""
    own = isinstance(model.head, LmHead) and param is model.head.weight and param.dtype != model.dtype
    return getattr(torch, param.dtype if own else run)


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    bits = BITS[wanted.dtype]
    assert torch.equal(found.view(bits), wanted.view(bits)), name


@settings(max_examples=2 * EXAMPLES // 5)
@given(specs(max_layers=2), dtypes, st.none() | dtypes, st.integers(1, 4), st.sampled_from([8 << 20, 64, 1000]))
def test_triton(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, stored: str, dtype: str | None, shards: int, piece: int
) -> None:
    """`piece`: how many bytes are read at once."""
    folder, model = tmp_path_factory.mktemp("checkpoint"), lower(spec)
    tensors = write(spec, folder, stored, shards)
    module = import_package(emit(spec, "triton", folder))
    part(module, "checkpoint").PIECE = piece
    found = dict(module.Model.load(folder, dtype=dtype).named_parameters())
    event(f"{stored} in {dtype or spec.architecture.dtype}")
    assert found.keys() == {param.name for param in model.params()}
    for param in model.params():
        wanted = expected(param, tensors, dtype_of(param, model, dtype or model.dtype))
        assert_same_bits(found[param.name], wanted, param.name)


ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 12, "bias": {"qkv": True, "output": True}},
    "mlp": {"bias": True},
    "rope": {"theta": 1e4},
}
CASES: dict[str, dict[str, Any]] = {
    "fused, untied, a head of its own dtype": {
        "num_key_value_heads": None,
        "checkpoint": {"layout": "qwen1"},
        "lm_head": {"dtype": "float32"},
        "dtype": "float16",
    },
    "apart, tied": {"tie_word_embeddings": True, "checkpoint": {"layout": "qwen2"}, "dtype": "bfloat16"},
    "an embedding model": {
        "attention": {"head_dim": 12, "qk_norm": "per_head"},
        "checkpoint": {"layout": "qwen3_embedding"},
        "lm_head": None,
        "embedding": {"normalize": True},
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tvm(case: str, stored: str, tmp_path: Path) -> None:
    """A matrix that lies in panels is taken out of them."""
    spec = spec_of(ARCHITECTURE | CASES[case])
    model, tensors = lower(spec), write(spec, tmp_path, stored, 3)
    module = import_package(emit(spec, "tvm", tmp_path))
    target, cpu = part(module, "targets").find_target("cpu"), part(module, "targets").find_device("cpu")
    _, described = part(module, "compiler").export(model.dtype, target)  # what a library says of its parameters
    checkpoint = part(module, "checkpoint").open_checkpoint(tmp_path)
    loaded = part(module, "weights").load_parameters(checkpoint, described, cpu)
    held = {one["name"]: tensor.numpy() for one, tensor in zip(described, loaded, strict=True)}
    assert held.keys() == {param.name for param in model.params()}
    for param in model.params():
        array = held[param.name]
        if array.ndim > len(param.shape):
            array = part(module, "kernels.panels").unpack(array, param.shape[0])
        wanted = expected(param, tensors, dtype_of(param, model, model.dtype))
        assert str(array.dtype) == str(wanted.dtype).removeprefix("torch.")
        bits = torch.from_numpy(array.copy().view(f"int{8 * array.itemsize}"))  # numpy's bfloat16 is not torch's
        assert_same_bits(bits.view(wanted.dtype), wanted, param.name)


def part(module: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{module.__name__}.{name}")
