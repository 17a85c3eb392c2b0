"""Loading checkpoints into a TVM package: parameters as a library's metadata describe them, packed or plain."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm
from safetensors.torch import load_file, save_file

from hf_parity.oracle import QWEN1, QWEN2, QWEN3, Oracle, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

WIDTH = 16  # outputs in a panel


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3))


@pytest.fixture(scope="module")
def module(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return import_package(emit(oracle.spec, "tvm", tmp_path_factory.mktemp("package")))


def part(module: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{module.__name__}.{name}")


def described(module: ModuleType, dtype: str, packed: bool) -> list[dict[str, Any]]:
    """What a library would say of its parameters, in an order of its own: linear weights in panels, or as they are."""
    manifest = json.loads((Path(str(module.__file__)).parent / "MANIFEST.json").read_text())
    found = []
    for parameter in sorted(part(module, "checkpoint").read_manifest(manifest), key=lambda p: p.name):
        shape = list(parameter.shape)
        if packed and len(shape) == 2 and parameter.name != "embed_tokens.weight":
            shape = [-(-shape[0] // WIDTH), shape[1], WIDTH]
        found.append({"name": parameter.name, "shape": shape, "dtype": dtype})
    return found


def load(module: ModuleType, folder: Path, dtype: str = "float32", packed: bool = True) -> dict[str, np.ndarray]:
    """Parameters by name, unpacked again."""
    checkpoint = part(module, "checkpoint").open_checkpoint(folder)
    wanted = described(module, dtype, packed)
    tensors = part(module, "weights").load_parameters(checkpoint, wanted, tvm.cpu())
    shapes = {parameter.name: parameter.shape for parameter in checkpoint.parameters}
    found = {}
    for one, tensor in zip(wanted, tensors, strict=True):
        assert (list(tensor.shape), str(tensor.dtype)) == (one["shape"], dtype)
        array, shape = tensor.numpy(), shapes[one["name"]]
        if array.ndim > len(shape):
            rows = array.transpose(0, 2, 1).reshape(-1, shape[1])
            assert not rows[shape[0] :].astype(np.float32).any()  # the last panel is filled with zeros
            array = rows[: shape[0]]
        found[one["name"]] = array
    return found


def edited(oracle: Oracle, folder: Path, edit: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced, added or (None) taken away."""
    oracle.save(folder)
    tensors = load_file(folder / "model.safetensors") | edit
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("change", [QWEN1, QWEN2, QWEN3, {"mlp": {"bias": True}, "tie_word_embeddings": True}])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("piece", [100, 1 << 20])  # bytes: a row or two at a time, or all
def test_every_parameter_holds_its_tensors(
    change: dict[str, Any], shards: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(tiny_spec(change))
    module = import_package(emit(oracle.spec, "tvm", tmp_path))
    monkeypatch.setattr(part(module, "checkpoint"), "PIECE", piece)
    found = load(module, oracle.save(tmp_path / "weights", shards=shards))
    layout, layer = oracle.spec.layout, oracle.spec.layout.layer.format(i=1)
    state = {name: tensor.numpy() for name, tensor in oracle.state.items()}
    qkv = np.concatenate([state[f"{layer}.{name}.weight"] for name in layout.attention.qkv])
    gate_up = np.concatenate([state[f"{layer}.{name}.weight"] for name in layout.mlp.gate_up])
    assert np.array_equal(found["layers.1.attention.qkv_proj.weight"], qkv)
    assert np.array_equal(found["layers.1.mlp.gate_up_proj.weight"], gate_up)
    assert np.array_equal(found["layers.1.mlp.down_proj.weight"], state[f"{layer}.{layout.mlp.down}.weight"])
    assert sum(p.size for p in found.values()) == sum(t.size for t in state.values())  # nothing twice, nothing left


STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("packed", [True, False])
def test_any_float_becomes_the_librarys(
    module: ModuleType, oracle: Oracle, stored: str, dtype: str, packed: bool, tmp_path: Path
) -> None:
    """Rounded as PyTorch rounds."""
    name = "model.layers.0.mlp.down_proj.weight"
    values = torch.randn(oracle.state[name].shape, generator=torch.Generator().manual_seed(0)).to(STORED[stored])
    folder = edited(oracle, tmp_path, {name: values})
    found = load(module, folder, dtype, packed)["layers.0.mlp.down_proj.weight"]
    expected = values.to(getattr(torch, dtype)).double().numpy()
    assert np.array_equal(found.astype(np.float64), expected)


def test_parameters_are_aligned_and_not_copied(module: ModuleType, oracle: Oracle, tmp_path: Path) -> None:
    """Compiled code relies on 64 bytes; tensors of one piece of memory outlive what they were made of."""
    weights = part(module, "weights")
    checkpoint = part(module, "checkpoint").open_checkpoint(oracle.save(tmp_path))
    for dtype, view in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        wanted = described(module, dtype, packed=True)
        tensors = weights.load_parameters(checkpoint, wanted, tvm.cpu())
        addresses = [tensor.data_ptr() for tensor in tensors]
        assert all(address % 64 == 0 for address in addresses)
        assert addresses == sorted(addresses)
        size = math.prod(wanted[-1]["shape"]) * np.dtype(view).itemsize
        assert addresses[-1] + size - addresses[0] < sum(weights._size(one) + 64 for one in wanted)


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="Linux gives no huge pages")
def test_parameters_lie_on_huge_pages(module: ModuleType) -> None:
    def huge() -> int:
        return int(re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[0])

    before = huge()
    (buffer,) = part(module, "weights")._memory([32 << 20])
    buffer[:] = 1
    assert huge() - before > 24 << 10


def test_one_error_lists_everything_before_anything_is_compiled_or_read(
    module: ModuleType, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(
        oracle,
        tmp_path,
        {
            "model.layers.0.self_attn.k_proj.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(55, 48),
            "model.norm.weight": torch.zeros(48, dtype=torch.int32),
            "model.layers.2.input_layernorm.weight": torch.zeros(48),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
        },
    )
    engine = part(module, "engine")
    monkeypatch.setattr(engine, "find_library", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.setattr(engine, "load_parameters", lambda *_: pytest.fail("something was read"))
    with pytest.raises(module.CheckpointError) as caught:
        module.Model.load(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.0.self_attn.k_proj.weight [32, 48], for layers.0.attention.qkv_proj.weight",
        "  shape: model.layers.1.mlp.up_proj.weight is [55, 48], and layers.1.mlp.gate_up_proj.weight needs [56, 48]",
        "  dtype: model.norm.weight is I32, and norm.weight needs one of F32, F16, BF16, F64",
        "  left over: model.layers.0.self_attn.q_proj.bias [64] is read by no parameter",
        "  left over: model.layers.2.input_layernorm.weight [48] is read by no parameter",
    ]


def test_what_the_layout_ignores_may_stay(module: ModuleType, oracle: Oracle, tmp_path: Path) -> None:
    load(module, edited(oracle, tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))


def test_a_folder_that_is_no_checkpoint(module: ModuleType, oracle: Oracle, tmp_path: Path) -> None:
    with pytest.raises(module.CheckpointError, match=r"has no \*.safetensors file"):
        module.Model.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(module.CheckpointError, match="cannot be read"):
        module.Model.load(tmp_path)
    oracle.save(tmp_path / "sharded", shards=3)
    (tmp_path / "sharded" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(module.CheckpointError, match=r"model-00002-of-00003.safetensors cannot be read"):
        module.Model.load(tmp_path / "sharded")


MEASURE = """
import importlib, json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import tvm
module = __import__(sys.argv[2])
checkpoint, weights = (importlib.import_module(f"{sys.argv[2]}.{name}") for name in ("checkpoint", "weights"))
tvm.runtime.tensor(np.ones(16, np.float32))
def peak():  # not getrusage: its maximum starts at what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
opened = checkpoint.open_checkpoint(sys.argv[3])
tensors = weights.load_parameters(opened, json.loads(sys.argv[4]), tvm.cpu())
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
def test_peak_memory_is_little_more_than_the_model(tmp_path: Path) -> None:
    """A checkpoint of five files, untied, embedding and head a third of it each: at most 1.2 times its bytes."""
    wide = {"hidden_size": 768, "intermediate_size": 2304, "vocab_size": 40_000, "num_hidden_layers": 6}
    spec = tiny_spec(QWEN3, wide, {"dtype": "bfloat16", "attention": {"head_dim": 128}})
    package = emit(spec, "tvm", tmp_path)
    oracle = Oracle(spec)
    folder = oracle.save(tmp_path / "weights", dtype=torch.bfloat16, shards=5)
    wanted = described(import_package(package), "bfloat16", packed=True)
    command = [sys.executable, "-c", MEASURE, str(package.parent), package.name, str(folder), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    model_bytes = sum(math.prod(one["shape"]) * 2 for one in wanted)
    assert model_bytes == sum(t.numel() * 2 for t in oracle.state.values()) > 150e6
    assert 0.9 * model_bytes < peak <= 1.2 * model_bytes, f"{peak / model_bytes:.2f} times the model"


def test_manifest_names_every_tensor_of_the_checkpoint(module: ModuleType, oracle: Oracle) -> None:
    manifest = json.loads((Path(str(module.__file__)).parent / "MANIFEST.json").read_text())
    named = [tensor for p in part(module, "checkpoint").read_manifest(manifest) for tensor, _ in p.sources]
    assert sorted(named) == sorted(oracle.state)
