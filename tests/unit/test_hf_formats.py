"""Quantised checkpoints of other tools: what of their config.json is read, how, and what is refused."""

import json

import pytest
from released_configs import QWEN25_7B_GPTQ

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


def test_a_rule_that_decides_nothing_may_say_anything():
    assert imported(gptq(dynamic={"+:visual": {"bits": 8}, ".*": {}, ".*up": {"bits": 2}})).skip == ()
