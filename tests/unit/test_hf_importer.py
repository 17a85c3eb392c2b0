"""config.json to a spec: released files, both forms of rope, and everything that must be refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released_configs import (
    QWEN1_7B,
    QWEN2_7B,
    QWEN3,
    QWEN3_8B,
    QWEN3_8B_FP8,
    QWEN3_8B_YARN,
    QWEN25_7B_AWQ,
    QWEN25_7B_GPTQ,
    QWEN25_INSTRUCT_1M,
    RELEASED,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from qwenspec import source
from qwenspec.diagnostics import SpecError
from qwenspec.hf.harmless import HARMLESS
from qwenspec.hf.importer import import_config
from qwenspec.hf.writer import write_spec
from qwenspec.ir.weights import linears
from qwenspec.spec.load import load

SPECS = Path(__file__).parents[2] / "specs"


def imported(config, **options):
    return import_config(config, name="model", **options).spec


def mistakes(config, **options):
    """{code: message}, as read from a file so that places are known."""
    text = json.dumps(config, indent=1)
    with pytest.raises(SpecError) as caught:
        import_config(config, name="model", root=source.parse(text, "config.json").root, **options)
    return {d.code: d for d in caught.value.diagnostics}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("variant", RELEASED)
def test_released_config_is_the_variant_in_specs(variant, tmp_path):
    file, _, name = variant.partition("#")
    expected = load(SPECS / file, name)
    result = import_config(RELEASED[variant], name=name)
    assert result.spec.architecture == expected.architecture
    assert result.spec.quantization == expected.quantization
    assert result.spec.layout == expected.layout
    written = tmp_path / "spec.yaml"
    written.write_text(write_spec(result.tree, result.notes), encoding="utf-8")
    assert load(written) == result.spec.model_copy(update={"file": str(written)})


# -------------------------------------------------------------------------------------------------- rope forms

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
BASE = without(QWEN3_8B_YARN, "rope_theta", "rope_scaling")


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1000000, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN}},
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4},
            "original_max_position_embeddings": 32768,
        },
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": None, **without(YARN, "factor")}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN, "beta_fast": None}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "yarn", **YARN}}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "yarn", **YARN},
                "sliding_attention": {"rope_theta": 1e6, "rope_type": "yarn", **YARN},
            }
        },
    ],
)
def test_every_form_of_rope_is_the_same_spec(form):
    assert imported(BASE | form).architecture == imported(QWEN3_8B_YARN).architecture


@pytest.mark.parametrize(
    ("form", "code", "said"),
    [
        ({}, "missing-key", "rope_theta"),
        ({"rope_theta": None}, "wrong-value", "rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}}, "missing-key", "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "conflict", "rope_theta"),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "conflict",
            "type",
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            "unsupported-rope-type",
            "mrope",
        ),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "ntk", "factor": 2.0}}, "unsupported-rope-type", "ntk"),
        ({"rope_theta": 1e6, "rope_scaling": {"factor": 2.0}}, "unread-key", "factor"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear"}}, "missing-key", "factor"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": "2"}}, "wrong-type", "factor"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 0.5}}, "wrong-value", "factor"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "unread-key", "alpha"),
        ({"rope_theta": 1e6, "rope_scaling": "yarn"}, "wrong-type", "rope_scaling"),
        ({"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "unsupported-value", "partial_rotary_factor"),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "x"}},
            "conflict",
            "rope_parameters",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            "rope-per-layer",
            "one for all layers",
        ),
    ],
)
def test_rope_that_cannot_be_meant(form, code, said):
    found = mistakes(BASE | form)
    assert said in found[code].message


def test_a_missing_base_says_what_hugging_face_would_do():
    found = mistakes(without(QWEN2_7B, "rope_theta"))
    assert "10000" in found["missing-key"].hint


def test_yarn_is_warned_about_and_its_missing_length_too():
    result = import_config(QWEN3_8B_YARN, name="model")
    assert any("YaRN is on" in note for note in result.notes)
    scaling = {"rope_type": "yarn", "factor": 4.0}
    result = import_config(QWEN3_8B | {"rope_scaling": scaling}, name="model")
    assert result.spec.architecture.rope.scaling.original_max_position_embeddings == 40960
    assert any("original_max_position_embeddings" in note for note in result.notes)


# ---------------------------------------------------------------------------------------------- sliding window


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 26}, (64, [26, 27])),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, (64, list(range(28)))),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 14,
            },
            (64, list(range(0, 28, 2))),
        ),
        ({"layer_types": ["full_attention"] * 28}, None),
    ],
)
def test_sliding_layers_are_those_of_hugging_face(keys, expected):
    from transformers import Qwen3Config

    from qwenspec.ir.lower import lower

    config = QWEN3 | keys
    windows = [layer.mixer.window for layer in lower(imported(config)).layers]
    theirs = Qwen3Config(**config)
    slides = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert windows == [theirs.sliding_window if slide else None for slide in slides]
    found = [i for i, window in enumerate(windows) if window]
    assert (found == expected[1] and windows[found[0]] == expected[0]) if expected else not found


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, "wrong-value", "sliding_window"),
        ({"use_sliding_window": "yes"}, "wrong-value", "use_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 28}, "conflict", "layer_types"),
        ({"layer_types": ["full_attention"] * 27}, "wrong-value", "27 entries for 28 layers"),
        ({"layer_types": ["linear_attention"] * 28}, "wrong-value", "layer_types"),
        ({"layer_types": "full_attention"}, "wrong-value", "layer_types"),
    ],
)
def test_windows_that_cannot_be_meant(keys, code, said):
    config = QWEN3 | {"sliding_window": 0} | keys
    assert said in mistakes(config)[code].message


def test_a_window_without_its_keys_is_an_error():
    config = without(QWEN3, "max_window_layers", "sliding_window") | {"use_sliding_window": True}
    assert "max_window_layers" in mistakes(config)["missing-key"].message
    config = without(QWEN3, "sliding_window") | {"use_sliding_window": True, "max_window_layers": 0}
    assert "sliding_window" in mistakes(config)["missing-key"].message


# -------------------------------------------------------------------------------- what is read, and what is not


def test_a_key_that_nobody_reads_is_an_error_with_its_place():
    config = {"model_type": "qwen3", "use_attention_sinks": True} | QWEN3
    found = mistakes(config)["unread-key"]
    assert "use_attention_sinks" in found.message
    assert (found.location.file, found.location.line, found.location.column) == ("config.json", 3, 2)
    assert found.location.text == ' "use_attention_sinks": true,'


def test_all_mistakes_are_told_at_once():
    config = without(QWEN3, "rope_theta", "vocab_size") | {"x": 1, "hidden_act": "tanh", "num_hidden_layers": 0}
    text = json.dumps(config)
    with pytest.raises(SpecError) as caught:
        import_config(config, name="model", root=source.parse(text, "config.json").root)
    assert sorted(d.code for d in caught.value.diagnostics) == [
        "missing-key",
        "missing-key",
        "unread-key",
        "wrong-value",
        "wrong-value",
    ]


@pytest.mark.parametrize("base", [QWEN3, QWEN2_7B, QWEN1_7B], ids=["qwen3", "qwen2", "qwen1"])
def test_every_key_is_read_or_known_to_be_harmless(base):
    """Changing any key that is not on the list changes the spec or is refused: nothing is dropped in silence."""
    before = imported(base)
    for key in base:
        changed = dict(base)
        value = base[key]
        changed[key] = (
            (not value) if isinstance(value, bool) else 3 * value + 1 if isinstance(value, int | float) else "x"
        )
        if key in HARMLESS:
            assert imported(changed) == before
            continue
        try:
            after = imported(changed)
        except SpecError:
            continue
        # The window is off in all three, and bf16 says what torch_dtype says.
        same = {"max_window_layers", "sliding_window", "use_sliding_window", "bf16"}
        assert after != before or key in same, key


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NESTED = {
    "rope_scaling": ["type", "rope_type", "factor", "original_max_position_embeddings", "mscale", "truncate"],
    "rope_parameters": ["rope_type", "rope_theta", "factor", "full_attention", "sliding_attention", "beta_fast"],
    "quantization_config": ["quant_method", "bits", "group_size", "weight_block_size", "modules_to_not_convert"],
}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_value_is_anything_but_a_spec_or_a_diagnostic(data):
    """Any JSON value at any key, also in the objects inside, and never another exception."""
    base = dict(data.draw(st.sampled_from([QWEN3_8B_YARN, QWEN3_8B_FP8, QWEN25_7B_GPTQ, QWEN25_7B_AWQ, QWEN1_7B])))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(
            st.sampled_from([*base, *NESTED, "layer_types", "head_dim", "original_max_position_embeddings"])
        )
        value = data.draw(JSON | st.integers(-1, 3) | st.sampled_from([10**9, 10**400]))
        if key in NESTED and data.draw(st.booleans()):
            inside = base.get(key) if isinstance(base.get(key), dict) else {}
            value = inside | {data.draw(st.sampled_from(NESTED[key])): value}
        base[key] = value
    try:
        result = import_config(base, name="model")
    except SpecError:
        return
    assert result.spec.variant == "model"


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "rms_norm_eps", "hidden_act", "model_type"])
def test_a_missing_key_is_an_error(key):
    assert key in mistakes(without(QWEN3, key))["missing-key"].message


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ({"model_type": "qwen3_moe"}, "wrong-value", "`qwen`, `qwen2` or `qwen3`"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "unsupported-architecture", "SequenceClassification"),
        ({"architectures": [7]}, "wrong-type", "architectures"),
        ({"hidden_size": 1024.0}, "wrong-value", "hidden_size"),
        ({"hidden_size": True}, "wrong-value", "hidden_size"),
        ({"num_key_value_heads": 5}, "kv-heads-do-not-divide", "5 key/value heads"),
        ({"head_dim": None}, "wrong-value", "head_dim"),
        ({"torch_dtype": "float64"}, "wrong-value", "torch_dtype"),
        ({"dtype": "float16"}, "conflict", "float16"),
        ({"pretraining_tp": 2}, "unsupported-value", "pretraining_tp"),
        ({"pretraining_tp": True}, "unsupported-value", "pretraining_tp"),
        ({"rms_norm_eps": 0}, "wrong-value", "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "wrong-value", "tie_word_embeddings"),
        ({"is_causal": False}, "unsupported-value", "is_causal"),
        ({"is_encoder_decoder": True}, "unsupported-value", "is_encoder_decoder"),
        ({"mlp_bias": True}, "unsupported-value", "mlp_bias"),
        ({"num_experts": 64}, "unsupported-value", "num_experts"),
    ],
)
def test_values_that_are_refused(keys, code, said):
    assert said in mistakes(QWEN3 | keys)[code].message


def test_a_rule_between_keys_points_into_config_json():
    found = mistakes(QWEN3 | {"num_key_value_heads": 5})["kv-heads-do-not-divide"]
    assert found.location.text == ' "num_key_value_heads": 5,'


def test_the_default_head_dim_is_hugging_faces():
    result = import_config(without(QWEN3, "head_dim"), name="model")
    assert result.spec.architecture.attention.head_dim == 128  # and not 1024 / 16
    assert any("head_dim" in note for note in result.notes)
    assert imported(QWEN2_7B).architecture.attention.head_dim is None
    assert imported(QWEN2_7B | {"head_dim": 64}).architecture.attention.head_dim == 64


def test_attention_bias_is_qkv_and_output():
    bias = imported(QWEN3 | {"attention_bias": True}).architecture.attention.bias
    assert (bias.qkv, bias.output) == (True, True)


def test_dual_chunk_attention_is_told():
    notes = import_config(QWEN25_INSTRUCT_1M, name="model").notes
    assert any("dual_chunk_attention_config" in note for note in notes)


# ------------------------------------------------------------------------------------------------------ Qwen-1


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ({"kv_channels": 64}, "conflict", "kv_channels"),
        ({"intermediate_size": 22017}, "wrong-value", "even"),
        ({"n_embd": 2048}, "conflict", "n_embd"),
        ({"scale_attn_weights": False}, "unsupported-value", "scale_attn_weights"),
        ({"use_cache_quantization": True}, "unsupported-value", "use_cache_quantization"),
        ({"rope_theta": 1e6}, "unsupported-value", "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "unsupported-value", "rope_scaling"),
        ({"activation": "gelu"}, "unsupported-value", "activation"),
        ({"fp16": True}, "conflict", "float16"),
        ({"num_key_value_heads": 8}, "unread-key", "num_key_value_heads"),
        ({"architectures": ["QWenModel"]}, "unsupported-architecture", "embedding"),
    ],
)
def test_qwen1_values_that_are_refused(keys, code, said):
    assert said in mistakes(QWEN1_7B | keys)[code].message


@pytest.mark.parametrize("key", ["rotary_emb_base", "seq_length", "use_dynamic_ntk", "use_logn_attn", "no_bias"])
def test_qwen1_keys_that_must_be_there(key):
    assert key in mistakes(without(QWEN1_7B, key))["missing-key"].message


def test_qwen1_features_are_read_one_by_one():
    arch = imported(QWEN1_7B | {"use_dynamic_ntk": False}).architecture
    assert (arch.rope.scaling, arch.attention.logn.train_length) == (None, 8192)
    arch = imported(QWEN1_7B | {"use_logn_attn": False}).architecture
    assert (arch.rope.scaling.train_length, arch.attention.logn) == (8192, None)
    arch = imported(QWEN1_7B | {"no_bias": False, "rotary_pct": 0.5}).architecture
    assert (arch.attention.bias.output, arch.mlp.bias, arch.rope.partial_rotary_factor) == (True, True, 0.5)
    assert imported(without(QWEN1_7B, "torch_dtype") | {"fp16": True}).architecture.dtype == "float16"
    assert imported(without(QWEN1_7B, "torch_dtype")).architecture.dtype == "bfloat16"


# ------------------------------------------------------------------------------------------------ quantisation


def quantized(base, **keys):
    return base | {"quantization_config": base["quantization_config"] | keys}


def ours(**keys):
    """What `qwenspec convert` writes."""
    keys = {"quant_method": "qwenspec", "scheme": "int4", "group_size": 64, "head": "none"} | keys
    if keys["scheme"] == "int8" and keys["group_size"] == 64:
        del keys["group_size"]
    return QWEN3_8B | {"quantization_config": keys}


def test_ours():
    assert imported(ours()).quantization.model_dump() == {
        "scheme": "int4",
        "group_size": 64,
        "head": "none",
        "skip": (),
    }
    left = imported(ours(scheme="int8", modules_to_not_convert=["lm_head", "model.layers.1.mlp.up_proj"])).quantization
    assert (left.scheme, left.skip) == ("int8", ("model.layers.1.mlp.up_proj", "lm_head"))


def test_quantization_details():
    fp8 = imported(quantized(without(QWEN3_8B_FP8, "fmt"), modules_to_not_convert=["model.layers.3.mlp", "o_proj"]))
    skip = fp8.quantization.skip
    assert skip[:2] == ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    assert [name for name in skip if ".mlp." in name] == [
        f"model.layers.3.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    without_format = dict(QWEN3_8B_FP8["quantization_config"])
    del without_format["fmt"]
    assert imported(QWEN3_8B | {"quantization_config": without_format}).quantization.scheme == "fp8_block"
    gptq = imported(
        quantized(QWEN25_7B_GPTQ, bits=8, group_size=-1, desc_act=True, sym=False, checkpoint_format="gptq_v2")
    ).quantization
    assert (gptq.bits, gptq.group_size, gptq.desc_act, gptq.sym) == (8, -1, True, False)
    assert gptq.checkpoint_format == "gptq_v2"
    inside = [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]
    gptq = imported(quantized(QWEN25_7B_GPTQ, modules_in_block_to_quantize=inside)).quantization
    assert len(gptq.skip) == 28 * 4
    assert not any("mlp" in name for name in gptq.skip)


@pytest.mark.parametrize(
    "entry",
    [
        "model.layers.0",
        "model.layers.1.",
        "model.layers.0.*",
        "model.layers.(0|1)",
        "model.layers.2|model.layers.3.mlp",
        ".*down_proj",
        ".*down",
        "down_proj",
        "oj",
        "mlp.gate",
        r"model\.layers\.\d\.self_attn",
        "layers.1",
        "lm_head",
        "",
    ],
)
def test_modules_are_left_out_as_in_transformers(entry):
    spec = imported(quantized(QWEN3_8B_FP8, modules_to_not_convert=[entry]))
    modules = linears(spec.layout, spec.architecture.num_hidden_layers)
    assert list(spec.quantization.skip) == [name for name in modules if not should_convert_module(name, [entry])]


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names"])
def test_blocks_that_are_quantized_are_all(key):
    for blocks in (None, [], "model.layers", ["model.layers"], [[f"model.layers.{i}" for i in range(28)]]):
        assert imported(quantized(QWEN25_7B_GPTQ, **{key: blocks})).quantization.skip == ()
    for blocks in ("model.layer", "model.layers.0,model.layers.1", ["visual.blocks"]):
        message = mistakes(quantized(QWEN25_7B_GPTQ, **{key: blocks}))["unsupported-value"].message
        assert key in message
        assert "leaves out model.layers." in message


def test_an_empty_list_is_one_as_json_files_are_read():
    assert imported(quantized(QWEN3_8B_FP8, modules_to_convert=())).quantization.scheme == "fp8_block"
    assert imported(quantized(QWEN3_8B_FP8, is_checkpoint_fp8_serialized=True)).quantization.scheme == "fp8_block"


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (quantized(QWEN3_8B_FP8, modules_to_convert=["lm_head"]), "unsupported-value", "modules_to_convert"),
        (quantized(QWEN3_8B_FP8, is_checkpoint_fp8_serialized=False), "unsupported-value", "fp8_serialized"),
        (quantized(QWEN3_8B_FP8, modules_to_not_convert=["*.mlp"]), "wrong-value", "no regular expression"),
        (quantized(QWEN3_8B_FP8, fmt="e5m2"), "unsupported-value", "fmt"),
        (quantized(QWEN3_8B_FP8, activation_scheme="static"), "wrong-value", "activation_scheme"),
        (quantized(QWEN3_8B_FP8, weight_block_size=None), "unsupported-value", "weight_block_size"),
        (quantized(QWEN3_8B_FP8, weight_block_size=[128]), "wrong-value", "weight_block_size"),
        (quantized(QWEN3_8B_FP8, scale_fmt="ue8m0"), "unsupported-value", "scale_fmt"),
        (quantized(QWEN3_8B_FP8, modules_to_not_convert=[3]), "wrong-type", "modules_to_not_convert"),
        (quantized(QWEN25_7B_AWQ, version="gemv"), "unsupported-value", "version"),
        (quantized(QWEN25_7B_AWQ, zero_point=False), "unsupported-value", "zero_point"),
        (quantized(QWEN25_7B_AWQ, version="gemv_fast"), "unsupported-value", "version"),
        (quantized(QWEN25_7B_AWQ, group_size=-1), "wrong-value", "group_size"),
        (quantized(QWEN25_7B_AWQ, group_size=96), "group-does-not-divide", "groups of 96"),
        (quantized(QWEN25_7B_AWQ, bits=8), "wrong-value", "bits"),
        (quantized(QWEN25_7B_AWQ, surprise=1), "unread-key", "surprise"),
        (quantized(QWEN25_7B_GPTQ, bits=3), "wrong-value", "bits"),
        (quantized(QWEN25_7B_GPTQ, bits=2), "wrong-value", "bits"),
        (quantized(QWEN25_7B_GPTQ, group_size=0), "wrong-value", "group_size"),
        (quantized(QWEN25_7B_GPTQ, checkpoint_format="marlin"), "wrong-value", "checkpoint_format"),
        (quantized(QWEN25_7B_GPTQ, is_marlin_format=True), "unsupported-value", "is_marlin_format"),
        (quantized(QWEN25_7B_GPTQ, lm_head=True), "unsupported-value", "lm_head"),
        (quantized(QWEN25_7B_GPTQ, pack_dtype="int8"), "unsupported-value", "pack_dtype"),
        (ours(quant_method="bitsandbytes"), "unsupported-quantization", "bitsandbytes"),
        (ours(scheme="int3"), "wrong-value", "scheme"),
        (ours(head="fp8"), "wrong-value", "head"),
        (ours(scheme="int8", group_size=32), "unread-key", "group_size"),
        (ours(scheme="int8", head="int4"), "wrong-value", "head"),
        (ours(group_size=None), "wrong-value", "group_size"),
        (ours(bits=4), "unread-key", "bits"),
    ],
)
def test_quantization_that_is_refused(config, code, said):
    assert said in mistakes(config)[code].message
