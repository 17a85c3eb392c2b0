"""Any config.json of Qwen2 and Qwen3, in the form of either version, means what Hugging Face's classes make of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenspec.hf.exporter import Form, export_config
from qwenspec.hf.harmless import HARMLESS
from qwenspec.hf.importer import import_config
from qwenspec.hf.rope import SCALINGS
from qwenspec.ir.lower import lower
from qwenspec.ir.rope import formula
from qwenspec.spec.document import Spec

Json = dict[str, Any]
ABSENT: Any = object()
FORMS: tuple[Form, ...] = ("v5", "v4")
KINDS = ("full_attention", "sliding_attention")
KINDS_OF_ROPE = (None, *SCALINGS)


def given_(keys: Json) -> Json:
    return {key: value for key, value in keys.items() if value is not ABSENT}


@st.composite
def ropes(draw: st.DrawFn, kind: str | None, length: int, pairs: int) -> Json | None:
    """What `rope_scaling` holds, by version 4's or version 5's name of the type."""
    if kind is None:
        return draw(st.sampled_from([None, {"rope_type": "default"}]))
    numbers = st.floats(1, 40)
    original = st.sampled_from([length // 2, length // 4])
    fields: Json = {"factor": draw(numbers)}
    if kind == "yarn":
        fields |= {"original_max_position_embeddings": draw(original | st.just(ABSENT))}
        fields |= {"beta_fast": draw(st.floats(5, 64) | st.just(ABSENT)), "beta_slow": draw(st.floats(0.5, 4))}
        fields |= {"attention_factor": draw(st.floats(0.5, 2) | st.just(ABSENT)), "truncate": draw(st.booleans())}
        fields |= draw(st.sampled_from([{}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale": None}]))
    elif kind == "longrope":
        factors = st.tuples(st.floats(1, 20), st.floats(0, 2)).map(lambda ab: [ab[0] + ab[1] * i for i in range(pairs)])
        fields |= {"original_max_position_embeddings": draw(original)}
        fields |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    elif kind == "llama3":
        fields |= {"original_max_position_embeddings": draw(original)}
        fields |= {"low_freq_factor": draw(st.floats(0.5, 2)), "high_freq_factor": draw(st.floats(3, 8))}
    return given_({draw(st.sampled_from(["rope_type", "type"])): kind, **fields})


@st.composite
def windows(draw: st.DrawFn, layers: int) -> Json:
    """Sliding windows as configs have them: mostly off with their lengths left in, by first layer, or by layer."""
    first, window = draw(st.integers(0, layers + 2)), draw(st.integers(1, 4096))
    lengths = {"sliding_window": window, "max_window_layers": first}
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=layers, max_size=layers))
    off = {"use_sliding_window": draw(st.sampled_from([False, ABSENT]))}
    forms: list[Json] = [
        {},
        lengths | off,
        {"sliding_window": None, "max_window_layers": first} | off,
        {"layer_types": [KINDS[0]] * layers, "sliding_window": None} | off,
        lengths | {"use_sliding_window": True},
        lengths | {"use_sliding_window": True, "layer_types": kinds},
        lengths | {"use_sliding_window": True, "sliding_window": None},
    ]
    return given_(draw(st.sampled_from(forms)))


@st.composite
def configs(draw: st.DrawFn, kind: str | None) -> Json:
    """A config.json with this type of RoPE, of which whatever may be absent sometimes is."""
    qwen3, newer = draw(st.booleans()), draw(st.booleans())
    kv_heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([8, 16, 64, 128]))
    own = draw(st.sampled_from([ABSENT, 8, 32, 128])) if qwen3 else draw(st.sampled_from([ABSENT, ABSENT, 24]))
    length, theta = draw(st.sampled_from([64, 32768])), draw(st.sampled_from([1e4, 1e6, 5e5, 1234.5]))
    wide = own if own is not ABSENT else 128 if qwen3 else head_dim
    rope = draw(ropes(kind, length, wide // 2))
    absent_or = st.just(ABSENT)
    keys = {
        "architectures": draw(st.sampled_from([["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"], ABSENT])),
        "model_type": "qwen3" if qwen3 else "qwen2",
        "vocab_size": draw(st.integers(1, 200_000)),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([kv_heads, kv_heads, None])),
        "intermediate_size": draw(st.integers(1, 9000)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu", "gelu_pytorch_tanh"])),
        "max_position_embeddings": length,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 2.5e-7, 0.001])),
        "head_dim": own,
        "attention_bias": draw(st.booleans() | absent_or) if qwen3 else ABSENT,
        "tie_word_embeddings": draw(st.booleans() | absent_or),
        "dtype" if newer else "torch_dtype": draw(st.sampled_from(["bfloat16", "float16", "float32", ABSENT])),
        "use_cache": draw(st.booleans() | absent_or),
        "eos_token_id": draw(st.integers(0, 9) | absent_or),
    }
    if newer:
        keys["rope_parameters"] = {"rope_theta": theta, **(rope or {"rope_type": "default"})}
    else:
        keys |= {"rope_theta": theta, "rope_scaling": rope if rope is not None else draw(st.none() | absent_or)}
    return given_(keys | draw(windows(layers)))


def hugging_face(config: Json) -> Any:
    """As its own class reads it."""
    from transformers import Qwen2Config, Qwen3Config

    return (Qwen3Config if config["model_type"] == "qwen3" else Qwen2Config)(**json.loads(json.dumps(config)))


def head_dim_of(theirs: Any) -> int:
    return getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads


def windows_of(theirs: Any) -> list[int | None]:
    """Of each layer."""
    return [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]


def frequencies_of(theirs: Any, length: int) -> tuple[list[float], float]:
    """Inverse frequencies of a sequence of that length, and the factor of cos and sin."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, width = theirs.rope_parameters["rope_type"], head_dim_of(theirs)
    if kind == "default":
        return [theirs.rope_parameters["rope_theta"] ** (-i / width) for i in range(0, width, 2)], 1.0
    theirs.head_dim = width
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    return frequencies.tolist(), factor


def ours(spec: Spec, length: int) -> tuple[list[float], float]:
    rope = lower(spec).rope
    function = formula(rope.scaling)
    told = {name: getattr(rope.scaling, name) for name in getattr(rope.scaling, "__slots__", ())}
    if "length" in function.__annotations__:
        told["length"] = length
    return list(function(dim=rope.rotary_dim, theta=rope.theta, **told)), rope.attention_factor


@pytest.mark.parametrize("kind", KINDS_OF_ROPE)
@settings(max_examples=30)
@given(data=st.data())
def test_an_import_is_what_hugging_face_reads(kind: str | None, data: st.DataObject) -> None:
    config = data.draw(configs(kind))
    spec, theirs = import_config(config, name="model").spec, hugging_face(config)
    arch, model = spec.architecture, lower(spec)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "num_hidden_layers"):
        assert getattr(arch, key) == getattr(theirs, key)
    assert arch.tie_word_embeddings == theirs.tie_word_embeddings
    assert (arch.norm.eps, arch.mlp.activation) == (theirs.rms_norm_eps, theirs.hidden_act)
    assert theirs.dtype is None or str(theirs.dtype).removeprefix("torch.") == arch.dtype
    kv_heads = theirs.num_key_value_heads or theirs.num_attention_heads
    for layer in model.layers:
        mixer = layer.mixer
        assert (mixer.num_heads, mixer.num_kv_heads) == (theirs.num_attention_heads, kv_heads)
        assert mixer.head_dim == head_dim_of(theirs)
        biased = (True, False) if config["model_type"] == "qwen2" else (theirs.attention_bias,) * 2
        assert (mixer.qkv_proj.bias is not None, mixer.o_proj.bias is not None) == biased
        assert (mixer.q_norm is not None) == (config["model_type"] == "qwen3")
    assert [layer.mixer.window for layer in model.layers] == windows_of(theirs)
    for length in (1, 2 * arch.max_position_embeddings):
        frequencies, factor = frequencies_of(theirs, length)
        found, own_factor = ours(spec, length)
        assert found == pytest.approx(frequencies, rel=1e-4)
        assert own_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS_OF_ROPE)
@settings(max_examples=15)
@given(data=st.data())
def test_an_export_is_the_config_that_was_imported(kind: str | None, data: st.DataObject) -> None:
    """By Hugging Face's classes, in both forms; and its own file of the same config is the same spec."""
    config = data.draw(configs(kind))
    spec, theirs = import_config(config, name="model").spec, hugging_face(config)
    written = json.loads(theirs.to_json_string())
    said = spec.architecture if theirs.dtype is not None else spec.architecture.model_copy(update={"dtype": "bfloat16"})
    assert import_config(written, name="model").spec.architecture == said
    for form in FORMS:
        again = hugging_face(export_config(spec, form))
        for key in set(written) - set(HARMLESS) - {"architectures", "dtype", "rope_parameters", *WINDOW_KEYS}:
            if key not in ("num_key_value_heads", "head_dim"):
                assert getattr(again, key) == getattr(theirs, key), key
        assert again.num_key_value_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
        assert head_dim_of(again) == head_dim_of(theirs)
        assert theirs.dtype in (None, again.dtype)
        assert windows_of(again) == windows_of(theirs)
        for length in (1, 2 * theirs.max_position_embeddings):
            assert frequencies_of(again, length) == frequencies_of(theirs, length)


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


@pytest.mark.parametrize("kind", KINDS_OF_ROPE)
@settings(max_examples=6)
@given(data=st.data())
def test_an_export_has_the_keys_of_its_version(kind: str | None, data: st.DataObject) -> None:
    """Version 5's are those that its classes write, with the value that they read."""
    spec = import_config(data.draw(configs(kind)), name="model").spec
    newer, older = export_config(spec, "v5"), export_config(spec, "v4")
    written = json.loads(hugging_face(newer).to_json_string(use_diff=False))
    assert set(newer) <= {*written, "head_dim"}
    assert {key: written.get(key, newer[key]) for key in newer if key != "rope_parameters"} == {
        key: value for key, value in newer.items() if key != "rope_parameters"
    }
    assert written["rope_parameters"].items() >= newer["rope_parameters"].items()
    assert {"torch_dtype", "rope_theta", "rope_scaling"} <= set(older)
    assert not {"dtype", "rope_parameters"} & set(older)
