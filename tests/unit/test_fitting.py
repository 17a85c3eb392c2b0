"""Whether a folder's tensors are a variant's, told by `import` and by a package in the same words."""

import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, Qwen3Config

import qwenspec
from qwenspec.backend.fitting import fitting_variants, way_out
from qwenspec.backend.load import import_package
from qwenspec.diagnostics import SpecError, render
from qwenspec.hf.checkpoint import import_path
from qwenspec.hf.writer import write_spec
from qwenspec.verify.checkpoint import StoredTensors

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
CONFIG = SIZES | {"num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32}
UP = "model.layers.1.mlp.up_proj.weight"
TINY = """
schema_version: 1
family: tiny
default_variant: {default}
architecture:
  vocab_size: 16
  hidden_size: 8
  num_attention_heads: 2
  num_key_value_heads: 1
  max_position_embeddings: 32
  norm: {{eps: 1.0e-6}}
  attention: {{head_dim: 8, qk_norm: per_head}}
  rope: {{theta: 1.0e4}}
variants:
  short: {{num_hidden_layers: 2, intermediate_size: 12}}
  long: {{num_hidden_layers: 3, intermediate_size: 12}}
  wide: {{num_hidden_layers: 2, intermediate_size: 16}}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders as transformers saves them: a tied model, and one that is not."""

    def save(tied):
        torch.manual_seed(0)
        config = Qwen3Config(**CONFIG, tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        model.save_pretrained(folder)
        return folder

    return {tied: save(tied) for tied in (False, True)}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to change: config.json and the tensors."""

    def copy(tied=False, **changed):
        source = saved[tied]
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors") | changed
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors"
        )
        return tmp_path

    return copy


@pytest.fixture(scope="module")
def packages(saved, tmp_path_factory):
    """The checkpoint.py of a package of each of the two."""

    def package(tied):
        out = tmp_path_factory.mktemp("package")
        result = import_path(saved[tied], name="m")
        (out / "spec.yaml").write_text(write_spec(result.tree, result.notes))
        module = import_package(qwenspec.emit(qwenspec.load(str(out / "spec.yaml")), backend="triton", out=out))
        return importlib.import_module(f"{module.__name__}.checkpoint")

    return {tied: package(tied) for tied in (False, True)}


def read(checkpoint, name):
    """A parameter as the package reads it."""
    (parameter,) = [p for p in checkpoint.parameters if p.name == name]
    return np.concatenate([rows for _, rows in checkpoint.pieces(parameter, "np")])


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.model.embed_tokens.weight.detach().numpy(), model.lm_head.weight.detach().numpy()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {UP: np.zeros((11, 8), np.float32)},
            "shape: {UP} is [11, 8], and layers.1.mlp.gate_up_proj.weight needs [12, 8]",
        ),
        ({UP: np.zeros(0, np.float32)}, "shape: {UP} is [0], and layers.1.mlp.gate_up_proj.weight needs [12, 8]"),
        (
            {UP: np.zeros((12, 8), np.int8)},
            "dtype: {UP} is I8, and layers.1.mlp.gate_up_proj.weight needs one of F32, F16,",
        ),
        ({UP: None}, "missing: {UP} [12, 8], for layers.1.mlp.gate_up_proj.weight"),
        ({"x": np.zeros(1, np.int8)}, "left over: x [1] is read by no parameter"),
        ({"_": b"cut"}, "it ends before its tensors do. Was it downloaded to the end?"),
    ],
)
def test_import_says_what_the_package_says(folder, packages, changed, said):
    cut = changed.pop("_", None)
    path = folder(**changed)
    if cut:
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])
    said = said.replace("{UP}", UP)
    with pytest.raises(packages[False].CheckpointError) as loading:
        packages[False].open_checkpoint(path)
    assert said in str(loading.value)
    with pytest.raises(SpecError) as importing:
        import_path(path)
    assert said in str(importing.value)


def test_a_resized_vocabulary_is_seen(folder, tmp_path):
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 24}))
    with pytest.raises(SpecError, match=r"lm_head.weight is \[16, 8\], and lm_head.weight needs \[24, 8\]"):
        import_path(path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_silent_config_has_the_files_dtype(folder, dtype):
    path = folder()
    tensors = load_file(path / "model.safetensors")
    few = {name for name in tensors if any(part in name for part in ("norm", "k_proj", "v_proj"))}
    assert len(few) > len(tensors) / 2  # most tensors, and few of the numbers
    save_file(
        {name: tensor.astype(np.float32 if name in few else dtype) for name, tensor in tensors.items()},
        path / "model.safetensors",
    )
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    result = import_path(path)
    assert result.spec.architecture.dtype == dtype
    assert any(dtype in note for note in result.notes)
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert import_path(path).spec.architecture.dtype == "bfloat16"


def test_a_stale_index_is_not_read(folder, packages):
    path = folder()
    stale = {name: tensor + 1 for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(stale, path / "zz.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(stale, "zz.safetensors")})
    )
    embedding, head = theirs(path)
    checkpoint = packages[False].open_checkpoint(path)
    assert (read(checkpoint, "embed_tokens.weight") == embedding).all()
    assert (read(checkpoint, "lm_head.weight") == head).all()
    assert (StoredTensors(path)["lm_head.weight"] == head).all()


def test_a_tied_pair_under_the_head_s_name(saved, packages, tmp_path):
    """As `save_model` writes it, which keeps one name of what is shared."""
    model = AutoModelForCausalLM.from_pretrained(saved[True])
    save_model(model, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_bytes((saved[True] / "config.json").read_bytes())
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    embedding, head = theirs(tmp_path)
    assert (embedding == head).all()
    assert import_path(tmp_path).spec.architecture.tie_word_embeddings
    assert (read(packages[True].open_checkpoint(tmp_path), "embed_tokens.weight") == embedding).all()
    assert (
        StoredTensors(tmp_path, ("model.embed_tokens.weight", "lm_head.weight"))["model.embed_tokens.weight"] == head
    ).all()


def test_tensors_that_nobody_needs(folder):
    path = folder(**{"model.layers.0.extra": np.zeros(1, np.float32)})
    with pytest.raises(SpecError, match=r"left over: model\.layers\.0\.extra"):
        import_path(path)
    result = import_path(path, ignore=("*.extra",))
    assert result.tree["architecture"]["checkpoint"] == {"layout": "qwen2", "ignore": ["*.extra"]}
    assert result.spec.architecture.checkpoint.ignore == ("*.extra",)
    with pytest.raises(SpecError, match=r"missing: model\.norm\.weight"):
        import_path(folder(**{"model.norm.weight": None}), ignore=("*",))


def test_another_variant_s_checkpoint_is_known(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("spec") / "tiny.yaml"
    file.write_text(TINY.format(default="long"))
    path = folder()
    assert fitting_variants(file, path) == ["short"]
    assert fitting_variants(file, path / "absent") == []
    assert fitting_variants(path / "absent.yaml", path) == []
    bad = file.with_name("bad.yaml")
    bad.write_text(file.read_text().replace("num_hidden_layers: 3", "num_hidden_layers: -3"))
    assert fitting_variants(bad, path) == ["short"]
    package = qwenspec.emit(qwenspec.load(str(file)), backend="triton", out=file.parent)
    with pytest.raises(SpecError) as caught:
        qwenspec.open_runner(package, weights=path)
    (told,) = caught.value.diagnostics
    assert told.hint == way_out(file, path) == f"it is the checkpoint of `short` in {file}: choose with --variant"
    assert told.details[0] == "  missing: model.layers.2.input_layernorm.weight [8], for layers.2.input_norm.weight"
    assert f"\n{told.details[0]}\n" in render([told])
    file.unlink()
    with pytest.raises(SpecError) as caught:
        qwenspec.open_runner(package, weights=path)
    assert "`qwenspec import`" in caught.value.diagnostics[0].hint
