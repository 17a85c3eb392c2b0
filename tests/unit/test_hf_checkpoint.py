"""Importing a checkpoint folder: its tensors are checked against its config.json."""

import json
import keyword
import math
import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenspec.backend.fitting import wanted
from qwenspec.backend.runtime.stored import BITS
from qwenspec.commands.specs import pick
from qwenspec.diagnostics import SpecError
from qwenspec.hf.checkpoint import import_path, tensors_in, variant_name
from qwenspec.hf.exporter import export_config
from qwenspec.hf.tensors import expected
from qwenspec.ir.lower import lower
from qwenspec.spec.document import VARIANT_NAME
from qwenspec.spec.load import load
from qwenspec.spec.quantization import Int4

SPEC = """
schema_version: 1
family: tiny
architecture:
  vocab_size: 16
  hidden_size: 8
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  intermediate_size: 12
  max_position_embeddings: 32
  norm: {eps: 1.0e-6}
  attention: {head_dim: 8, qk_norm: per_head}
  rope: {theta: 1.0e4}
variants:
  language: {}
  tied: {tie_word_embeddings: true}
  embedding: {lm_head: null, embedding: {}, checkpoint: {layout: qwen3_embedding}}
  prefixed-embedding: {lm_head: null, embedding: {}}
  qwen1:
    num_key_value_heads: null
    attention: {head_dim: 4, qk_norm: none, bias: {qkv: true}}
    rope: {compute_dtype: float32}
    checkpoint: {layout: qwen1}
  gptq:
    hidden_size: 64
    intermediate_size: 128
    attention: {head_dim: 32}
    quantization: {scheme: gptq, bits: 4, group_size: 64}
"""


@pytest.fixture
def spec_of(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    return lambda variant: load(file, variant)


def contents(spec):
    """Name -> (dtype, shape, what each byte is) of every tensor that the checkpoint must hold."""
    tensors = (tensor for _, tensor in wanted(lower(spec)) if not tensor.optional)
    return {tensor.name: (tensor.dtypes[0], tensor.shape, 0) for tensor in tensors}


def safetensors(tensors):
    """The bytes of a file."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, byte) in tensors.items():
        data = bytes([byte]) * (math.prod(shape) * BITS[dtype] // 8)
        span = [len(body), len(body) + len(data)]
        header[name], body = {"dtype": dtype, "shape": list(shape), "data_offsets": span}, body + data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def save(tmp_path):
    """Write config.json and safetensors files."""

    def write(config, tensors, shards=1, name="Tiny-Qwen3 0.1B"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        if shards == 1:
            (folder / "model.safetensors").write_bytes(safetensors(tensors))
            return folder
        names, weight_map = list(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            inside = {tensor: tensors[tensor] for tensor in names[shard::shards]}
            (folder / file).write_bytes(safetensors(inside))
            weight_map |= dict.fromkeys(inside, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def mistakes(path):
    with pytest.raises(SpecError) as caught:
        import_path(path)
    return {diagnostic.code: diagnostic for diagnostic in caught.value.diagnostics}


@pytest.mark.parametrize("variant", ["language", "tied", "embedding", "prefixed-embedding", "qwen1", "gptq"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_the_spec(spec_of, save, variant, shards):
    spec = spec_of(variant)
    folder = save(export_config(spec), contents(spec), shards)
    result = import_path(folder)
    assert result.spec.architecture == spec.architecture
    assert result.spec.quantization == spec.quantization
    assert result.spec.variant == "tiny-qwen3-0.1b"
    assert result.spec.file == str(folder / "config.json")


def test_the_expected_tensors_are_those_of_transformers(spec_of):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for variant in ("language", "tied"):
        spec = spec_of(variant)
        theirs = Qwen3ForCausalLM(Qwen3Config(**export_config(spec))).state_dict()
        must, may = expected(spec)
        assert set(theirs) - must == {name for name in may if name in theirs}


def test_released_embedding_models_are_known_by_their_tensors(spec_of, save):
    """Their config.json says CausalLM and tied; no tensor has the prefix, and there is no LM head."""
    spec = spec_of("embedding")
    config = export_config(spec) | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    assert import_path(save(config, contents(spec))).spec.architecture == spec.architecture


@pytest.mark.parametrize("variant", ["language", "tied", "embedding", "prefixed-embedding"])
@pytest.mark.parametrize("normalize", [False, True])
def test_modules_json_makes_an_embedding_model(spec_of, save, variant, normalize):
    """Whatever config.json says, with the prefix or without it, with an LM head or without one."""
    spec = spec_of(variant)
    folder = save(export_config(spec), contents(spec))
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [{"path": path, "type": f"models.{kind}"} for path, kind in zip(paths, kinds, strict=False)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "lasttoken"}')
    found = import_path(folder).spec.architecture
    assert (found.lm_head, found.embedding.normalize) == (None, normalize)
    assert found.checkpoint.layout == ("qwen3_embedding" if variant == "embedding" else "qwen2")
    assert pick(str(folder / "config.json")).architecture == pick(str(folder)).architecture == found


# ------------------------------------------------------------------------------------------------------ tying


def test_untied_without_a_head_is_an_error_at_its_key(spec_of, save):
    spec = spec_of("language")
    found = mistakes(save(export_config(spec), without(contents(spec), "lm_head.weight")))
    assert set(found) == {"tying"}
    assert '"tie_word_embeddings": false' in found["tying"].location.text


def test_tied_with_a_copy_of_the_embedding_stays_tied(spec_of, save):
    spec = spec_of("tied")
    tensors = contents(spec)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    result = import_path(save(export_config(spec), tensors, shards=2))
    assert result.spec.architecture.tie_word_embeddings
    assert any("lm_head.weight" in note for note in result.notes)


@pytest.mark.parametrize("head", [("F32", (16, 8), 1), ("BF16", (16, 8), 0)])
def test_tied_with_another_head_is_untied_as_hugging_face_does(spec_of, save, head):
    spec = spec_of("tied")
    result = import_path(save(export_config(spec), contents(spec) | {"lm_head.weight": head}))
    assert not result.spec.architecture.tie_word_embeddings
    assert any("does not tie" in note for note in result.notes)


def test_a_tied_pair_may_be_there_under_either_name(spec_of, save):
    """`save_model` of safetensors keeps the head's name and drops the embedding's."""
    spec = spec_of("tied")
    tensors = contents(spec)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    result = import_path(save(export_config(spec), tensors))
    assert result.spec.architecture == spec.architecture
    assert any("read from `lm_head.weight`" in note for note in result.notes)
    untied = spec_of("language")
    assert "missing-tensor" in mistakes(save(export_config(untied), tensors))


# ---------------------------------------------------------------------------------------------------- tensors


def test_missing_and_unknown_tensors_are_told(spec_of, save):
    spec = spec_of("language")
    extra = dict.fromkeys(("model.layers.0.self_attn.sinks", "model.layers.1.x.bias"), ("F32", (2,), 0))
    found = mistakes(save(export_config(spec), without(contents(spec), "model.norm.weight") | extra))
    assert found["missing-tensor"].message == "missing: model.norm.weight [8], for norm.weight"
    assert (
        "left over: model.layers.0.self_attn.sinks [2] is read by no parameter; model"
        in found["unknown-tensor"].message
    )


def test_many_tensors_are_counted(spec_of, save):
    spec = spec_of("language")
    config = export_config(spec) | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1}
    assert "6 more" in mistakes(save(config, contents(spec)))["unknown-tensor"].message


def test_a_config_of_another_generation_does_not_pass(spec_of, save):
    """Qwen3's tensors under a config.json that says qwen2: biases are missing and QK-norms are left over."""
    spec = spec_of("language")
    config = export_config(spec) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    del config["attention_bias"]
    found = mistakes(save(config, contents(spec)))
    assert "q_proj.bias" in found["missing-tensor"].message
    assert "q_norm.weight" in found["unknown-tensor"].message


def test_buffers_that_nobody_needs_are_fine(spec_of, save):
    spec = spec_of("qwen1")
    names = ("transformer.h.0.attn.masked_bias", "transformer.h.1.attn.rotary_emb.inv_freq")
    extra = dict.fromkeys(names, ("F32", (2,), 0))
    assert import_path(save(export_config(spec), contents(spec) | extra)).spec.variant


def test_quantized_tensors_are_expected_by_their_names(spec_of, save):
    spec = spec_of("gptq")
    must, may = expected(spec)
    assert "model.layers.0.mlp.up_proj.qzeros" in must
    assert "model.layers.0.mlp.up_proj.g_idx" in may  # it may be left out where inputs are in their own order
    assert "model.layers.0.mlp.up_proj.weight" not in must
    assert "*.bias" in may
    assert "model.layers.0.input_layernorm.weight" in must
    full = contents(spec.model_copy(update={"quantization": None}))
    assert "missing-tensor" in mistakes(save(export_config(spec), full))
    ordered = spec.model_copy(update={"quantization": spec.quantization.model_copy(update={"desc_act": True})})
    assert "model.layers.0.mlp.up_proj.g_idx" in expected(ordered)[0]


@pytest.mark.parametrize(
    ("variant", "head", "must_have", "may_not"),
    [
        ("tied", "int8", "model.embed_tokens.qweight", "model.embed_tokens.weight"),
        ("tied", "none", "model.embed_tokens.weight", "model.embed_tokens.qweight"),
        ("language", "int4", "lm_head.scales", "lm_head.weight"),
        ("embedding", "int4", "embed_tokens.weight", "embed_tokens.qweight"),
    ],
)
def test_our_own_formats_may_have_the_head(spec_of, save, variant, head, must_have, may_not):
    own = Int4(scheme="int4", head=head)
    spec = spec_of(variant).model_copy(update={"quantization": own})
    must = contents(spec)
    assert must_have in must
    assert may_not not in must
    returned = import_path(save(export_config(spec), must)).spec
    assert (returned.quantization, returned.architecture) == (own, spec.architecture)


# ----------------------------------------------------------------------------------------------- what is on disk


def test_a_config_alone_is_imported_without_its_neighbours(spec_of, save):
    spec = spec_of("language")
    folder = save(export_config(spec), {"nonsense": ("F32", (2,), 0)})
    assert import_path(folder / "config.json", name="alone").spec.variant == "alone"
    assert "unknown-tensor" in mistakes(folder)


def test_what_lies_beside_a_config_is_read(spec_of, save):
    """As what the command line calls SPEC, with its tensors where there are some; without any, alone."""
    spec = spec_of("language")
    folder = save(export_config(spec), {"nonsense": ("F32", (2,), 0)})
    said = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    (folder / "modules.json").write_text('[{"path": "", "type": "Transformer"}, {"path": "1", "type": "Dense"}]')
    assert "unsupported-module" in mistakes(folder / "config.json")
    (folder / "modules.json").unlink()
    assert import_path(folder / "config.json").spec.quantization.scheme == "fp8"
    with pytest.raises(SpecError, match="nonsense"):
        pick(str(folder / "config.json"))
    (folder / "model.safetensors").unlink()
    assert pick(str(folder / "config.json")).quantization.scheme == "fp8"


def test_the_index_is_enough(spec_of, save):
    """A folder whose shards have not been downloaded yet."""
    spec = spec_of("language")
    folder = save(export_config(spec), contents(spec), shards=2)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert import_path(folder).spec.architecture == spec.architecture


def test_folders_that_cannot_be_read(spec_of, save, tmp_path):
    assert "file-not-found" in mistakes(tmp_path / "absent")
    folder = save(export_config(spec_of("language")), {"a": ("F32", (2,), 0)})
    file = folder / "model.safetensors"
    for content in (b"", b"12345678", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 9) + b'{"a": {}}'):
        file.write_bytes(content)
        assert "checkpoint" in mistakes(folder)
    file.unlink()
    assert "has no *.safetensors file" in mistakes(folder)["checkpoint"].message
    (folder / "config.json").write_text('{"model_type": "qwen3", "model_type": "qwen2"}')
    assert "duplicate-key" in mistakes(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "json-syntax" in mistakes(folder)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("qwen2.5-7b-instruct", "qwen2.5-7b-instruct"),
        ("Qwen-1_8B", "Qwen-1_8B"),
        ("7b (mine)", "imported-7b-mine"),
        ("class", "imported-class"),
        ("Lambda.", "imported-Lambda"),
        ("...", "imported"),
        ("q" * 99 + "--x", "q" * 99),
    ],
)
def test_names_of_variants(text, name):
    assert variant_name(text) == name


@settings(deadline=None)
@given(st.text() | st.sampled_from(sorted(keyword.kwlist)) | st.text("a-._", min_size=99, max_size=103))
def test_every_name_of_a_folder_gives_one_of_a_variant(text):
    name = variant_name(text)
    assert re.fullmatch(VARIANT_NAME, name)
    assert len(name) <= 100
    assert not keyword.iskeyword(re.sub("[-.]", "_", name).lower())


def test_a_broken_index_is_told_with_its_place(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{\n  "weight_map": oops\n}')
    with pytest.raises(SpecError) as caught:
        tensors_in(tmp_path)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.location.line) == ("json-syntax", 2)
