"""Keys that change nothing are accepted as tools write them today; those that change the maths are refused by name."""

import json

import pytest
import transformers
from released_configs import QWEN2_7B, QWEN3_8B, QWEN3_8B_FP8, QWEN25_7B_AWQ, QWEN25_7B_GPTQ

from qwenspec.diagnostics import SpecError
from qwenspec.hf.importer import import_config

CLASSES = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}


def imported(config):
    return import_config(config, name="model").spec


def refusals(config):
    with pytest.raises(SpecError) as caught:
        imported(config)
    return {(diagnostic.code, diagnostic.message.split("`")[1]) for diagnostic in caught.value.diagnostics}


def quantized(base, **keys):
    return base | {"quantization_config": base["quantization_config"] | keys}


@pytest.mark.parametrize("config", [QWEN2_7B, QWEN3_8B], ids=["qwen2", "qwen3"])
def test_a_full_dump_is_the_same_spec(config):
    """`to_json_string(use_diff=False)` writes every key of the class, also those that all models have."""
    dumped = json.loads(CLASSES[config["model_type"]](**config).to_json_string(use_diff=False))
    assert set(dumped) > set(config) - {"torch_dtype", "rope_theta", "rope_scaling"}
    assert imported(dumped).architecture == imported(config).architecture


@pytest.mark.parametrize(
    "keys",
    [
        {"is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}},
        {"mlp_bias": False, "is_causal": True, "num_experts": 0, "cross_attention_hidden_size": None},
        {"max_length": 20, "num_beams": 1, "typical_p": 1.0, "task_specific_params": None, "tf_legacy_loss": False},
        {"trust_remote_code": True, "use_bfloat16": False, "transformers_weights": None},
    ],
)
@pytest.mark.parametrize("base", [QWEN2_7B, QWEN3_8B])
def test_keys_that_change_nothing(base, keys):
    assert imported(base | keys).architecture == imported(base).architecture


@pytest.mark.parametrize(
    "keys",
    [
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"mlp_bias": True},
        {"is_causal": False},
        {"num_experts": 64},
        {"pruned_heads": {"0": [1]}},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_the_same_keys_where_they_change_something(keys):
    (name,) = keys
    assert refusals(QWEN3_8B | keys) == {("unsupported-value", name)}


@pytest.mark.parametrize("base", [QWEN2_7B, QWEN3_8B], ids=["qwen2", "qwen3"])
def test_an_absent_tying_is_that_of_hugging_face_s_class(base):
    config = {key: value for key, value in base.items() if key != "tie_word_embeddings"}
    theirs = CLASSES[base["model_type"]](**config).tie_word_embeddings
    assert imported(config).architecture.tie_word_embeddings is theirs is False


def test_the_bias_that_qwen2_has_anyway():
    assert imported(QWEN2_7B | {"attention_bias": True}).architecture == imported(QWEN2_7B).architecture
    assert refusals(QWEN2_7B | {"attention_bias": False}) == {("unsupported-value", "attention_bias")}


def test_yarn_that_was_finetuned():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain, marked = ({"rope_scaling": yarn | more} for more in ({}, {"finetuned": True}))
    assert imported(QWEN2_7B | plain).architecture == imported(QWEN2_7B | marked).architecture


# ------------------------------------------------------------------------------------------------- quantisation

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AUTO_ROUND = {"provider": "auto-round", "autoround_version": "0.5", "data_type": "int", "iters": 200, "seqlen": 2048}


def dumped(config):
    return json.loads(json.dumps(config.to_dict(), default=str))


@pytest.mark.parametrize(
    ("keys", "base"),
    [
        (dumped(transformers.FineGrainedFP8Config()), QWEN3_8B_FP8),
        (dumped(transformers.GPTQConfig(bits=4, dataset=None, group_size=128)), QWEN25_7B_GPTQ),
        (dumped(transformers.AwqConfig(bits=4, group_size=128)), QWEN25_7B_AWQ),
        (
            GPTQ | {"method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32"},
            QWEN25_7B_GPTQ,
        ),
        (GPTQ | {"act_group_aware": True, "backend": "auto", "meta": {}, "lm_head": False}, QWEN25_7B_GPTQ),
        (GPTQ | AUTO_ROUND, QWEN25_7B_GPTQ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "sym": False}
            | {"provider": "auto-round", "data_type": "int"},
            QWEN25_7B_AWQ,
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
            | {"ignored_layers": None},
            QWEN3_8B_FP8,
        ),
    ],
)
def test_quantization_as_tools_write_it(keys, base):
    own = {"sym": True, "desc_act": False} if keys["quant_method"] == "gptq" else {}
    assert imported(base | {"quantization_config": keys}).quantization == imported(quantized(base, **own)).quantization


def test_formats_of_gptq_by_either_name():
    second = imported(QWEN25_7B_GPTQ | {"quantization_config": GPTQ | {"format": "gptq_v2"}}).quantization
    assert second.checkpoint_format == "gptq_v2"
    both = {"format": "gptq", "checkpoint_format": "gptq_v2"}
    assert refusals(QWEN25_7B_GPTQ | {"quantization_config": GPTQ | both}) == {
        ("unsupported-value", "checkpoint_format")
    }


def test_modules_that_are_left_alone_by_either_name():
    entries = ["model.layers.0.mlp.down_proj"]
    named = imported(quantized(QWEN3_8B_FP8, modules_to_not_convert=entries)).quantization
    assert named.skip == tuple(entries)
    assert imported(quantized(QWEN3_8B_FP8, modules_to_not_convert=None, ignored_layers=entries)).quantization == named
    both = quantized(QWEN3_8B_FP8, modules_to_not_convert=entries, ignored_layers=["lm_head"])
    assert imported(both).quantization == named  # as transformers does


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (QWEN3_8B_FP8, "dequantize", True),
        (QWEN3_8B_FP8, "scale_fmt", "ue8m0"),
        (QWEN3_8B_FP8, "expert_dtype", "fp4"),
        (QWEN3_8B_FP8, "modules_to_convert", ["model.embed_tokens"]),
        (QWEN25_7B_AWQ, "format", "gemv"),
        (QWEN25_7B_AWQ, "desc_act", True),
        (QWEN25_7B_AWQ, "modules_in_block_to_quantize", [["q_proj"]]),
        (QWEN25_7B_GPTQ, "method", "qqq"),
        (QWEN25_7B_GPTQ, "data_type", "mx_fp"),
    ],
)
def test_keys_that_change_the_maths_are_refused_by_name(base, key, value):
    assert refusals(quantized(base, **{key: value})) == {("unsupported-value", key)}


@pytest.mark.parametrize("keys", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"_load_in_8bit": True}])
def test_other_methods_are_refused_with_the_way_out(keys):
    with pytest.raises(SpecError) as caught:
        imported(QWEN3_8B | {"quantization_config": keys})
    (told,) = caught.value.diagnostics
    assert told.code == "unsupported-quantization"
    assert told.message.startswith("bitsandbytes is not supported")
    assert "full precision" in told.hint
