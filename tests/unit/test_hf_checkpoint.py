"""Importing a checkpoint folder: its tensors are checked against its config.json."""

import json
import struct

import pytest

from qwenspec.diagnostics import SpecError
from qwenspec.hf.checkpoint import import_path, tensors_in, variant_name
from qwenspec.hf.exporter import export_config
from qwenspec.hf.tensors import expected
from qwenspec.ir.lower import lower
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


@pytest.fixture
def save(tmp_path):
    """Write config.json and safetensors files of one byte a tensor; a dict gives bytes, a set just names."""

    def write(config, tensors, shards=1, indexed=None, name="Tiny-Qwen3 0.1B"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        data = tensors if isinstance(tensors, dict) else dict.fromkeys(sorted(tensors), b"\0")
        names = list(data)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            header, body = {"__metadata__": {"format": "pt"}}, b""
            for tensor in names[shard::shards]:
                content = data[tensor]
                span = [len(body), len(body) + len(content)]
                header[tensor] = {"dtype": "U8", "shape": [len(content)], "data_offsets": span}
                weight_map[tensor], body = file, body + content
            text = json.dumps(header).encode()
            (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + body)
        if indexed or shards > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write


def mistakes(path):
    with pytest.raises(SpecError) as caught:
        import_path(path)
    return {diagnostic.code: diagnostic for diagnostic in caught.value.diagnostics}


@pytest.mark.parametrize("variant", ["language", "tied", "embedding", "prefixed-embedding", "qwen1", "gptq"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_the_spec(spec_of, save, variant, shards):
    spec = spec_of(variant)
    folder = save(export_config(spec), expected(spec)[0], shards)
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
    assert import_path(save(config, expected(spec)[0])).spec.architecture == spec.architecture


@pytest.mark.parametrize(
    ("modules", "normalize"),
    [
        (["Transformer", "Pooling", "Normalize"], True),
        (["Transformer", "Pooling"], False),
        (None, True),
    ],
)
def test_sentence_transformers_says_whether_to_normalize(spec_of, save, modules, normalize):
    spec = spec_of("embedding")
    folder = save(export_config(spec), expected(spec)[0])
    if modules:
        entries = [{"path": f"{i}_{m}", "type": f"sentence_transformers.models.{m}"} for i, m in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps(entries))
    assert import_path(folder).spec.architecture.embedding.normalize is normalize


def test_other_poolings_are_refused(spec_of, save):
    folder = save(export_config(spec_of("embedding")), expected(spec_of("embedding"))[0])
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (folder / "modules.json").write_text(json.dumps([pooling]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": false, "pooling_mode_mean_tokens": true}')
    assert "unsupported-pooling" in mistakes(folder)
    (folder / "modules.json").write_text('{"not": "a list"}')
    assert "bad-modules" in mistakes(folder)


# ------------------------------------------------------------------------------------------------------ tying


def test_untied_without_a_head_is_an_error_at_its_key(spec_of, save):
    spec = spec_of("language")
    found = mistakes(save(export_config(spec), expected(spec)[0] - {"lm_head.weight"}))
    assert set(found) == {"tying"}
    assert '"tie_word_embeddings": false' in found["tying"].location.text


def test_tied_with_a_copy_of_the_embedding_stays_tied(spec_of, save):
    spec = spec_of("tied")
    tensors = dict.fromkeys(expected(spec)[0], b"\0") | {"model.embed_tokens.weight": b"ab", "lm_head.weight": b"ab"}
    result = import_path(save(export_config(spec), tensors, shards=2))
    assert result.spec.architecture.tie_word_embeddings
    assert any("lm_head.weight" in note for note in result.notes)


@pytest.mark.parametrize("head", [b"ac", b"abc"])
def test_tied_with_another_head_is_untied_as_hugging_face_does(spec_of, save, head):
    spec = spec_of("tied")
    tensors = dict.fromkeys(expected(spec)[0], b"\0") | {"model.embed_tokens.weight": b"ab", "lm_head.weight": head}
    result = import_path(save(export_config(spec), tensors))
    assert not result.spec.architecture.tie_word_embeddings
    assert any("does not tie" in note for note in result.notes)


# ---------------------------------------------------------------------------------------------------- tensors


def test_missing_and_unknown_tensors_are_told(spec_of, save):
    spec = spec_of("language")
    tensors = expected(spec)[0] - {"model.norm.weight"} | {"model.layers.0.self_attn.sinks", "model.layers.1.x.bias"}
    found = mistakes(save(export_config(spec), tensors))
    assert "`model.norm.weight`" in found["missing-tensor"].message
    assert "`model.layers.0.self_attn.sinks` and `model.layers.1.x.bias`" in found["unknown-tensor"].message


def test_many_tensors_are_counted(spec_of, save):
    spec = spec_of("language")
    config = export_config(spec) | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1}
    assert "6 more" in mistakes(save(config, expected(spec)[0]))["unknown-tensor"].message


def test_a_config_of_another_generation_does_not_pass(spec_of, save):
    """Qwen3's tensors under a config.json that says qwen2: biases are missing and QK-norms are left over."""
    spec = spec_of("language")
    config = export_config(spec) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    del config["attention_bias"]
    found = mistakes(save(config, expected(spec)[0]))
    assert "q_proj.bias" in found["missing-tensor"].message
    assert "q_norm.weight" in found["unknown-tensor"].message


def test_buffers_that_nobody_needs_are_fine(spec_of, save):
    spec = spec_of("qwen1")
    extra = {"transformer.h.0.attn.masked_bias", "transformer.h.1.attn.rotary_emb.inv_freq"}
    assert import_path(save(export_config(spec), expected(spec)[0] | extra)).spec.variant


def test_quantized_tensors_are_expected_by_their_names(spec_of, save):
    spec = spec_of("gptq")
    must, may = expected(spec)
    assert "model.layers.0.mlp.up_proj.qzeros" in must
    assert "model.layers.0.mlp.up_proj.g_idx" in may  # it may be left out where inputs are in their own order
    assert "model.layers.0.mlp.up_proj.weight" not in must
    assert "*.bias" in may
    assert "model.layers.0.input_layernorm.weight" in must
    full = {source.tensor for param in lower(spec).params() for source in param.sources}
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
    must, _ = expected(spec)
    assert must_have in must
    assert may_not not in must
    returned = import_path(save(export_config(spec), must)).spec
    assert (returned.quantization, returned.architecture) == (own, spec.architecture)


# ----------------------------------------------------------------------------------------------- what is on disk


def test_a_config_alone_is_imported_without_its_neighbours(spec_of, save):
    spec = spec_of("language")
    folder = save(export_config(spec), {"nonsense"})
    assert import_path(folder / "config.json", name="alone").spec.variant == "alone"
    assert "unknown-tensor" in mistakes(folder)


def test_the_index_is_enough(spec_of, save):
    """A folder whose shards have not been downloaded yet."""
    spec = spec_of("language")
    folder = save(export_config(spec), expected(spec)[0], shards=2)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert import_path(folder).spec.architecture == spec.architecture


def test_folders_that_cannot_be_read(spec_of, save, tmp_path):
    assert "file-not-found" in mistakes(tmp_path / "absent")
    folder = save(export_config(spec_of("language")), {"a"})
    file = next(folder.glob("*.safetensors"))
    for content in (b"", b"12345678", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 9) + b'{"a": {}}'):
        file.write_bytes(content)
        assert "bad-safetensors" in mistakes(folder)
    file.unlink()
    assert "no-tensors" in mistakes(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3", "model_type": "qwen2"}')
    assert "duplicate-key" in mistakes(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "yaml-syntax" in mistakes(folder)


@pytest.mark.parametrize(
    ("text", "name"),
    [("qwen2.5-7b-instruct", "qwen2.5-7b-instruct"), ("Qwen-1_8B", "Qwen-1_8B"), ("7b (mine)", "imported-7b-mine")],
)
def test_names_of_variants(text, name):
    assert variant_name(text) == name


def test_a_broken_index_is_told_with_its_place(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{\n  "weight_map": oops\n}')
    with pytest.raises(SpecError) as caught:
        tensors_in(tmp_path)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.location.line) == ("json-syntax", 2)
