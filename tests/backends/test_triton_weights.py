"""Loading checkpoints into a generated package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_parity.oracle import QWEN1, QWEN2, QWEN3, Oracle, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3))


@pytest.fixture(scope="module")
def package(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(oracle.spec, "triton", tmp_path_factory.mktemp("package"))


def edited(oracle: Oracle, folder: Path, edit: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced, added or (None) taken away."""
    oracle.save(folder)
    tensors = load_file(folder / "model.safetensors") | edit
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("change", [QWEN1, QWEN2, QWEN3, {"mlp": {"bias": True}, "tie_word_embeddings": True}])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_parameter_holds_its_tensors(change: dict, shards: int, tmp_path: Path) -> None:
    oracle = Oracle(tiny_spec(change))
    module = import_package(emit(oracle.spec, "triton", tmp_path))
    model = module.Model.load(oracle.save(tmp_path / "weights", shards=shards))
    layout, layer = oracle.spec.layout, oracle.spec.layout.layer.format(i=1)
    found = dict(model.named_parameters())
    qkv = torch.cat([oracle.state[f"{layer}.{name}.weight"] for name in layout.attention.qkv])
    gate_up = torch.cat([oracle.state[f"{layer}.{name}.weight"] for name in layout.mlp.gate_up])
    assert torch.equal(found["layers.1.attention.qkv_proj.weight"], qkv)
    assert torch.equal(found["layers.1.mlp.gate_up_proj.weight"], gate_up)
    assert torch.equal(found["layers.1.mlp.down_proj.weight"], oracle.state[f"{layer}.{layout.mlp.down}.weight"])
    total = sum(p.numel() for p in found.values())
    assert total == sum(t.numel() for t in oracle.state.values())  # nothing is held twice, nothing is left
    assert not any(p.is_meta or p.requires_grad for p in found.values())


def test_one_error_lists_everything_before_anything_is_allocated(
    oracle: Oracle, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_package(package)
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
    monkeypatch.setattr(module.weights, "read", lambda *_: pytest.fail("something was read"))
    with pytest.raises(module.CheckpointError) as caught:
        module.Model.load(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.0.self_attn.k_proj.weight [32, 48], for layers.0.attention.qkv_proj.weight",
        "  shape: model.layers.1.mlp.up_proj.weight is [55, 48], and layers.1.mlp.gate_up_proj.weight needs [56, 48]",
        "  dtype: model.norm.weight is I32, and norm.weight needs one of F32, F16, BF16, F64",
        "  left over: model.layers.0.self_attn.q_proj.bias [64] is read by no parameter",
        "  left over: model.layers.2.input_layernorm.weight [48] is read by no parameter",
    ]


def test_what_the_layout_ignores_may_stay(oracle: Oracle, package: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    import_package(package).Model.load(edited(oracle, tmp_path, {name: torch.zeros(8)}))


def test_a_folder_that_is_no_checkpoint(oracle: Oracle, package: Path, tmp_path: Path) -> None:
    module = import_package(package)
    with pytest.raises(module.CheckpointError, match=r"has no \*.safetensors file"):
        module.Model.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(module.CheckpointError, match="cannot be read"):
        module.Model.load(tmp_path)
    oracle.save(tmp_path / "sharded", shards=3)
    (tmp_path / "sharded" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(module.CheckpointError, match=r"model-00002-of-00003.safetensors cannot be read"):
        module.Model.load(tmp_path / "sharded")


def test_dtypes(oracle: Oracle, package: Path, tmp_path: Path) -> None:
    """A checkpoint in one dtype runs in another; bfloat16 values survive a float32 model exactly."""
    module = import_package(package)
    folder = oracle.save(tmp_path, dtype=torch.bfloat16)
    wide, narrow = module.Model.load(folder, dtype="float32"), module.Model.load(folder, dtype="bfloat16")
    assert wide.norm.weight.dtype == torch.float32
    assert narrow.norm.weight.dtype == torch.bfloat16
    assert torch.equal(wide.lm_head.weight, narrow.lm_head.weight.float())


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
model_bytes = sum(p.nbytes for p in model.parameters())
print(model_bytes, peak() - before)
"""


def test_peak_memory_is_little_more_than_the_model(tmp_path: Path) -> None:
    """A checkpoint of five files, untied, embedding and head a third of it each: at most 1.2 times its bytes."""
    wide = {"hidden_size": 768, "intermediate_size": 2304, "vocab_size": 40_000, "num_hidden_layers": 6}
    spec = tiny_spec(QWEN3, wide, {"dtype": "bfloat16", "attention": {"head_dim": 128}})
    package = emit(spec, "triton", tmp_path)
    oracle = Oracle(spec)
    folder = oracle.save(tmp_path / "weights", dtype=torch.bfloat16, shards=5)
    command = [sys.executable, "-c", MEASURE, str(package.parent), package.name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model_bytes, peak = map(int, done.stdout.split())
    assert model_bytes == sum(t.numel() * 2 for t in oracle.state.values()) > 150e6
    assert 0.9 * model_bytes < peak <= 1.2 * model_bytes, f"{peak / model_bytes:.2f} times the model"


def test_manifest_names_every_tensor_of_the_checkpoint(oracle: Oracle, package: Path) -> None:
    module = import_package(package)
    manifest = json.loads((package / "MANIFEST.json").read_text())
    named = [tensor for p in module.checkpoint.read_manifest(manifest) for tensor, _ in p.sources]
    assert sorted(named) == sorted(oracle.state)
