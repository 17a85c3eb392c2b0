"""Quantised checkpoints of other tools: what of their config.json is read, how, and what is refused."""

import json

import pytest
from released_configs import QWEN3_8B, QWEN25_7B_GPTQ

from qwenspec import source
from qwenspec.diagnostics import SpecError
from qwenspec.hf.importer import import_config


def imported(config):
    return import_config(config, name="model").spec.quantization


def mistakes(config):
    """{code: diagnostic}, as read from a file so that places are known."""
    text = json.dumps(config, indent=1)
    with pytest.raises(SpecError) as caught:
        import_config(config, name="model", root=source.parse(text, "config.json").root)
    return {d.code: d for d in caught.value.diagnostics}


def gptq(**keys):
    return QWEN25_7B_GPTQ | {"quantization_config": QWEN25_7B_GPTQ["quantization_config"] | keys}


# ------------------------------------------------------------------------------------------------ GPTQ's `dynamic`


@pytest.mark.parametrize(
    ("rules", "skip"),
    [
        ({}, []),
        ({"-:lm_head": {}}, []),
        ({r"-:.*\.3\.mlp\.": {}}, [f"model.layers.3.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        # Expressions match from the beginning of a name, and no further than they say.
        ({r"-:mlp\.down_proj": {}}, []),
        (
            {r"-:model\.layers\.1\.self_attn\.o": {}},
            ["model.layers.1.self_attn.o_proj"],
        ),
        ({r"-:model\.layers\.1\.self_attn\.o$": {}}, []),
        # The first that matches decides.
        ({r".*\.0\.mlp": {"bits": 4}, r"-:.*\.[01]\.mlp\.up": {}}, ["model.layers.1.mlp.up_proj"]),
        ({r"+:.*\.0\.mlp": {"group_size": 128, "sym": True, "mse": 2.4}, r"-:.*\.0\.mlp\.up": {}}, []),
    ],
)
def test_gptq_rules_leave_modules_out(rules, skip):
    assert list(imported(gptq(dynamic=rules)).skip) == skip


def test_gptq_rules_and_modules_in_block_both_leave_out():
    found = imported(gptq(dynamic={r"-:.*\.0\.": {}}, modules_in_block_to_quantize=[["mlp.up_proj"]]))
    assert len(found.skip) == 28 * 7 - 27
    assert {f"model.layers.{i}.mlp.up_proj" for i in range(28)} - set(found.skip) == {
        f"model.layers.{i}.mlp.up_proj" for i in range(1, 28)
    }


@pytest.mark.parametrize(
    ("rules", "code", "said"),
    [
        ({r".*down": {"bits": 8}}, "unsupported-value", "gives model.layers.0.mlp.down_proj `bits` 8"),
        ({r"+:.*\.5\..*down": {"group_size": 64}}, "unsupported-value", "model.layers.5.mlp.down_proj `group_size` 64"),
        ({r".*down": {"sym": 1}}, "unsupported-value", "`sym` 1"),
        ({r".*down": {"adapter": {"rank": 8}}}, "unread-key", "adapter"),
        ({r".*down": 4}, "wrong-type", "not an object"),
        ({r"-:(": {}}, "wrong-value", "no regular expression"),
        ([1], "wrong-type", "dynamic"),
    ],
)
def test_gptq_rules_that_are_refused(rules, code, said):
    found = mistakes(gptq(dynamic=rules))[code]
    assert said in found.message
    assert found.location.line > 0


@pytest.mark.parametrize(
    "expression", ["(.*.*.*.*.*.*.*.*)x", "(a+)+x", "(a|aa)*x", "((?:.?){30})x", "(?=(.*.*.*.*.*))x", "(a|a)" * 30]
)
def test_expressions_that_may_not_end(expression):
    assert "take for ever" in mistakes(gptq(dynamic={f"-:{expression}": {}}))["unsupported-value"].message


@pytest.mark.parametrize(
    "expression",
    [r".*\.[0-9]+\.(self_attn|mlp)\..*_proj$", r"(.*\.)?layers\.\d+\..*", "|".join(f"a{i}b" for i in range(300))],
)
def test_expressions_as_people_write_them(expression):
    imported(gptq(dynamic={f"-:{expression}": {}}))


def test_a_rule_that_decides_nothing_may_say_anything():
    assert imported(gptq(dynamic={"+:visual": {"bits": 8}, ".*": {}, ".*up": {"bits": 2}})).skip == ()


# ------------------------------------------------------------------------------------------------ AWQ of GPTQModel


def awq(**keys):
    """As GPTQModel 5 writes it."""
    written = {
        "bits": 4,
        "checkpoint_format": "gemm",
        "desc_act": False,
        "format": "gemm",
        "group_size": 32,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:5.0"]},
        "method": "awq",
        "pack_dtype": "int32",
        "quant_method": "awq",
        "sym": True,
        "version": "gemm",
        "zero_point": True,
    }
    return QWEN25_7B_GPTQ | {"quantization_config": written | keys}


def test_awq_of_gptqmodel():
    found = imported(awq())
    assert (found.scheme, found.bits, found.group_size, found.skip) == ("awq", 4, 32, ())
    found = imported(awq(dynamic={r"-:.*\.3\.mlp\.up": {}}, modules_to_not_convert=["model.layers.2.mlp.up_proj"]))
    assert found.skip == ("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"checkpoint_format": "gemv"}, "`checkpoint_format` is"),
        ({"lm_head": True}, "`lm_head` is true"),
        ({"pack_dtype": "int8"}, "`pack_dtype` is"),
        ({"method": "gptq"}, "`method` is"),
        ({"dynamic": {".*down": {"group_size": 64}}}, "gives model.layers.0.mlp.down_proj `group_size` 64"),
    ],
)
def test_awq_of_gptqmodel_that_is_refused(keys, said):
    assert said in mistakes(awq(**keys))["unsupported-value"].message


# ------------------------------------------------------------------------------------------- compressed-tensors


def arguments(kind="float", bits=8, strategy="channel", dynamic=False, **more):
    """As compressed-tensors 0.9 writes them, with what it fills in."""
    others = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return others | {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": dynamic, "symmetric": True} | more


TOKENS = arguments(strategy="token", dynamic=True, observer=None)
STATIC = arguments(strategy="tensor")
INT4 = arguments("int", 4, "group", group_size=128)


def compressed(weights, inputs=None, storage=None, targets=("Linear",), ignore=("lm_head",), **more):
    group = {"weights": weights, "input_activations": inputs, "output_activations": None, "targets": list(targets)}
    return QWEN3_8B | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": storage or ("float-quantized" if weights["type"] == "float" else "pack-quantized"),
            "quantization_status": "compressed",
            "global_compression_ratio": 1.5,
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.12.2",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
        }
        | more
    }


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (compressed(arguments(), TOKENS), {"scheme": "fp8", "scales": "channel", "activations": "dynamic"}),
        (compressed(STATIC, STATIC), {"scheme": "fp8", "scales": "tensor", "activations": "static"}),
        (compressed(STATIC, TOKENS), {"scheme": "fp8", "scales": "tensor", "activations": "dynamic"}),
        (
            compressed(arguments(), storage="naive-quantized"),
            {"scheme": "fp8", "scales": "channel", "activations": "none"},
        ),
        (
            compressed(INT4),
            {"scheme": "pack_quantized", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        ),
        (
            compressed(INT4 | {"symmetric": False, "actorder": "weight", "zp_dtype": "torch.int8"}),
            {"scheme": "pack_quantized", "bits": 4, "group_size": 128, "sym": False, "desc_act": False},
        ),
        (
            compressed(INT4 | {"actorder": "group", "group_size": 64}),
            {"scheme": "pack_quantized", "bits": 4, "group_size": 64, "sym": True, "desc_act": True},
        ),
        (
            compressed(arguments("int", 8, "channel")),
            {"scheme": "pack_quantized", "bits": 8, "group_size": -1, "sym": True, "desc_act": False},
        ),
    ],
)
def test_compressed_tensors(config, found):
    assert imported(config).model_dump() == found | {"skip": ()}


def downs(*layers):
    return [f"model.layers.{i}.mlp.down_proj" for i in layers]


@pytest.mark.parametrize(
    ("named", "skip"),
    [
        ({"ignore": ["lm_head", *downs(1)]}, downs(1)),
        ({"ignore": ["lm_head", r"re:.*\.[12]\.mlp\.down"]}, downs(1, 2)),
        # A name is whole, and an expression matches from the beginning.
        ({"ignore": ["lm_head", "down_proj", "model.layers.1", "re:down_proj"]}, []),
        ({"ignore": [r"re:.*lm_head", "model.embed_tokens"]}, []),
        ({"targets": [r"re:.*(_proj)$"], "ignore": []}, []),
        ({"targets": [r"re:.*(self_attn|gate_proj|up_proj)"], "ignore": []}, downs(*range(36))),
    ],
)
def test_modules_that_compressed_tensors_leaves_out(named, skip):
    assert list(imported(compressed(INT4, **named)).skip) == skip


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (compressed(INT4, ignore=[]), "unsupported-value", "`lm_head` is quantised"),
        (compressed(INT4, storage="marlin-24"), "wrong-value", "marlin-24"),
        (compressed(arguments("int", 8), TOKENS | {"type": "int"}, "int-quantized"), "wrong-value", "int-quantized"),
        (compressed(INT4, TOKENS), "unsupported-value", "activations"),
        (compressed(INT4 | {"num_bits": 2}), "wrong-value", "num_bits"),
        (compressed(INT4 | {"strategy": "tensor"}), "wrong-value", "strategy"),
        (compressed(INT4 | {"actorder": "random"}), "wrong-value", "actorder"),
        (compressed(INT4 | {"surprise": 1}), "unread-key", "surprise"),
        (compressed(arguments("int", 8, "channel", group_size=64)), "conflict", "group_size"),
        (compressed(arguments(strategy="block", block_structure=[128, 128])), "wrong-value", "strategy"),
        (compressed(arguments(bits=4)), "unsupported-value", "num_bits"),
        (compressed(arguments(), TOKENS | {"strategy": "tensor"}), "wrong-value", "strategy"),
        (compressed(arguments(), STATIC | {"symmetric": False}), "unsupported-value", "symmetric"),
        (compressed(INT4, kv_cache_scheme=STATIC), "unsupported-value", "kv_cache_scheme"),
        (compressed(INT4, transform_config={"R1": {}}), "unsupported-value", "transform_config"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "unsupported-value", "sparsity_config"),
        (compressed(INT4, config_groups={}), "missing-key", "config_groups"),
        (compressed(INT4, config_groups={"W4A16": ["Linear"]}), "wrong-type", "W4A16"),
        (
            compressed(INT4, config_groups={"a": {"weights": INT4, "targets": ["re:.*up"]}, "b": {"weights": STATIC}}),
            "unsupported-value",
            "different schemes",
        ),
        (
            compressed(
                INT4,
                config_groups={
                    "a": {"weights": INT4, "targets": [r"re:.*up_proj"]},
                    "b": {"weights": INT4 | {"group_size": 64}, "targets": [r"re:.*down_proj"]},
                },
            ),
            "unsupported-value",
            "different schemes",
        ),
        (compressed(INT4, ignore=["lm_head", "re:["]), "wrong-value", "no regular expression"),
    ],
)
def test_compressed_tensors_that_is_refused(config, code, said):
    assert said in mistakes(config)[code].message


@pytest.mark.parametrize(
    "sparsity",
    [
        {"format": "dense"},
        {
            "format": "dense",
            "global_sparsity": 0.14,
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
        },
    ],
)
def test_zeros_that_are_stored_like_any_other_weight(sparsity):
    assert imported(compressed(INT4, sparsity_config=sparsity)) == imported(compressed(INT4))


def test_a_tied_head_and_the_head_of_an_embedding_model_are_never_quantised():
    tied = compressed(INT4, ignore=[]) | {"tie_word_embeddings": True}
    assert imported(tied).skip == ()
    backbone = compressed(INT4, ignore=[]) | {"architectures": ["Qwen3Model"]}
    assert imported(backbone).skip == ()


# ------------------------------------------------------------------------------------- TensorRT Model Optimizer


def modelopt(**keys):
    group = {"weights": {"num_bits": 8, "type": "float", "dynamic": False}, "targets": ["Linear"]}
    return QWEN3_8B | {
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        | keys
    }


@pytest.mark.parametrize(
    ("ignore", "skip"),
    [
        (["lm_head"], []),
        (["lm_head", *downs(3)], downs(3)),
        (["lm*", "model.layers.3*"], [f"model.layers.3{rest}" for rest in ("",)]),
        (["lm_head", "*.down_proj"], downs(*range(36))),
    ],
)
def test_model_optimizer(ignore, skip):
    found = imported(modelopt(ignore=ignore))
    assert (found.scheme, found.scales, found.activations) == ("fp8", "tensor", "static")
    if "model.layers.3*" in ignore:  # and the thirties
        assert len(found.skip) == 7 * 7
    else:
        assert list(found.skip) == skip


def test_model_optimizer_may_say_what_fp8_has_not():
    assert imported(modelopt(pre_quant_scale=False, has_zero_point=False, group_size=None)).scheme == "fp8"


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ({"quant_algo": "NVFP4"}, "wrong-value", "NVFP4"),
        ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "wrong-value", "FP8_PER_CHANNEL"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "unsupported-value", "kv_cache_scheme"),
        ({"kv_cache_quant_algo": "FP8"}, "unsupported-value", "cached unrounded"),
        ({"pre_quant_scale": True}, "unsupported-value", "pre_quant_scale"),
        ({"has_zero_point": True}, "unsupported-value", "has_zero_point"),
        ({"group_size": 128}, "unsupported-value", "group_size"),
        ({"ignore": []}, "unsupported-value", "`lm_head` is quantised"),
        ({"quantized_layers": {}}, "unread-key", "quantized_layers"),
    ],
)
def test_model_optimizer_that_is_refused(keys, code, said):
    assert said in mistakes(modelopt(**keys))[code].message
