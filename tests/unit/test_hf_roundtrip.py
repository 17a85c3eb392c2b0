"""A spec to config.json and back is the spec, and transformers reads the same out of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenspec import source, tree
from qwenspec.diagnostics import SpecError
from qwenspec.hf import tensors
from qwenspec.hf.exporter import export_config
from qwenspec.hf.importer import import_config
from qwenspec.hf.writer import write_spec
from qwenspec.ir.lower import lower
from qwenspec.spec.check import check
from qwenspec.spec.load import load

FORMS = ("v5", "v4")


def spec_of(architecture, quantization=None, variant="drawn"):
    """A spec by the loader's own rules; None where they refuse it."""
    document = {
        "schema_version": 1,
        "family": "drawn",
        "description": "",
        "default_variant": variant,
        "architecture": architecture,
        "quantization": quantization,
        "variants": {variant: {}},
    }
    root = source.parse(write_spec(document), "drawn.yaml").root
    merged = {key: entry for key, entry in root.entries.items() if key in ("architecture", "quantization")}
    spec, _ = check(tree.Mapping(merged, root.location), variant, "drawn", "", "drawn.yaml")
    return spec


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


@st.composite
def scalings(draw, pairs, length):
    original = st.integers(2, length)
    kind = draw(st.sampled_from(["none", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    if kind == "none":
        return None
    fields = {"kind": kind, "factor": draw(numbers(1, 64))}
    if kind in ("yarn", "longrope", "llama3"):
        fields["original_max_position_embeddings"] = draw(original)
    if kind == "yarn":
        fields["beta_slow"] = draw(numbers(0.5, 4))
        fields["beta_fast"] = draw(numbers(5, 64))
        fields["truncate"] = draw(st.booleans())
        if draw(st.booleans()):
            fields |= {"mscale": draw(numbers(0.1, 2)), "mscale_all_dim": draw(numbers(0.1, 2))}
    if kind in ("yarn", "longrope") and draw(st.booleans()):
        fields["attention_factor"] = draw(numbers(0.5, 2))
    if kind == "longrope":
        lists = st.lists(numbers(0.5, 80), min_size=pairs, max_size=pairs)
        fields |= {"short_factor": draw(lists), "long_factor": draw(lists)}
        if draw(st.booleans()):
            del fields["factor"]
    if kind == "llama3":
        fields |= {"low_freq_factor": draw(numbers(0.5, 2)), "high_freq_factor": draw(numbers(3, 8))}
    return fields


@st.composite
def windows(draw, layers):
    """None, or a window in the shortest form there is for its layers."""
    if not draw(st.booleans()):
        return None
    slides = draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True).map(sorted))
    rule = slides
    if slides == list(range(slides[0], layers)):
        rule = {"from": slides[0]} if slides[0] else "all"
    return {"window": draw(st.integers(1, 5000)), "layers": rule}


@st.composite
def sizes(draw):
    heads = draw(st.integers(1, 8))
    length = draw(st.integers(2, 1 << 20))
    return {
        "vocab_size": draw(st.integers(1, 200_000)),
        "num_hidden_layers": draw(st.integers(1, 6)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 64)) * 64,
        "max_position_embeddings": length,
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "norm": {"eps": draw(numbers(1e-8, 1e-3))},
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def quantizations(draw):
    return draw(
        st.sampled_from(
            [
                None,
                {"scheme": "fp8_block", "block": [64, 64]},
                {"scheme": "fp8"},
                {"scheme": "fp8", "scales": "tensor", "activations": "static"},
                {"scheme": "fp8", "activations": "none"},
                {"scheme": "pack_quantized", "bits": 4, "group_size": 64, "sym": False, "desc_act": True},
                {"scheme": "pack_quantized", "bits": 8, "group_size": -1},
                {"scheme": "awq", "group_size": 64},
                {"scheme": "gptq", "bits": 4, "group_size": -1, "desc_act": True},
                {"scheme": "gptq", "bits": 8, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
                {"scheme": "int8"},
                {"scheme": "int8", "head": "none"},
                {"scheme": "int4", "group_size": 128, "head": "int4"},
            ]
        )
    )


@st.composite
def qwen2_or_3(draw):
    """Specs in their plainest spelling: what config.json says explicitly is explicit, the rest is null."""
    arch = draw(sizes())
    heads = arch["num_attention_heads"]
    qwen3 = draw(st.booleans())
    head_dim = draw(st.sampled_from([4, 64, 128]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    explicit = qwen3 or draw(st.booleans())
    bias = draw(st.booleans())
    scaling = draw(scalings(head_dim // 2, arch["max_position_embeddings"]))
    arch |= {
        "hidden_size": draw(st.integers(1, 8)) * 64 if explicit else heads * head_dim,
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "attention": {
            "head_dim": head_dim if explicit else None,
            "bias": {"qkv": bias, "output": bias} if qwen3 else {"qkv": True, "output": False},
            "qk_norm": "per_head" if qwen3 else "none",
            "sliding_window": draw(windows(arch["num_hidden_layers"])),
        },
        "rope": {"theta": draw(numbers(1.5, 1e8)), "scaling": scaling},
        "mlp": {
            "activation": draw(st.sampled_from(["silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"]))
        },
    }
    if draw(st.integers(0, 3)) == 0:
        layout = draw(st.sampled_from(["qwen2", "qwen3_embedding"]))
        arch |= {"tie_word_embeddings": False, "lm_head": None, "embedding": {}, "checkpoint": {"layout": layout}}
    return spec_of(arch, draw(quantizations()))


@st.composite
def qwen1(draw):
    arch = draw(sizes())
    head_dim = draw(st.sampled_from([4, 64, 128]))
    trained = {"train_length": draw(st.integers(2, 40_000))}
    biased = draw(st.booleans())
    arch |= {
        "hidden_size": arch["num_attention_heads"] * head_dim,
        "attention": {
            "head_dim": head_dim,
            "bias": {"qkv": True, "output": biased},
            "logn": draw(st.sampled_from([None, trained])),
        },
        "rope": {
            "theta": draw(numbers(1.5, 1e8)),
            "partial_rotary_factor": draw(st.sampled_from([1.0, 0.5])),
            "compute_dtype": "float32",
            "scaling": draw(st.sampled_from([None, {"kind": "dynamic_qwen1", **trained}])),
        },
        "mlp": {"bias": biased},
        "checkpoint": {"layout": "qwen1"},
    }
    quantization = draw(quantizations().filter(lambda q: q is None or q["scheme"] in ("gptq", "int8", "int4")))
    return spec_of(arch, quantization)


def drawn(strategy):
    return strategy.filter(lambda spec: spec is not None)


def back(spec, form):
    """export and import, through JSON text."""
    config = json.loads(json.dumps(export_config(spec, form)))
    return import_config(config, name=spec.variant, held=tensors.Held({}, frozenset(tensors.expected(spec)[0])))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_import_of_export_is_the_spec(form, data):
    spec = data.draw(drawn(st.one_of(qwen2_or_3(), qwen1())))
    returned = back(spec, form).spec
    assert returned.architecture == spec.architecture
    assert returned.quantization == spec.quantization
    assert returned.layout == spec.layout


@settings(max_examples=60, deadline=None)
@given(spec=drawn(st.one_of(qwen2_or_3(), qwen1())))
def test_the_written_spec_loads_back(tmp_path_factory, spec):
    result = back(spec, "v5")
    file = tmp_path_factory.mktemp("spec") / "spec.yaml"
    file.write_text(write_spec(result.tree, result.notes), encoding="utf-8")
    assert load(file) == result.spec.model_copy(update={"file": str(file)})
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 110


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(spec=drawn(qwen2_or_3()))
def test_transformers_reads_the_same(form, spec):
    """The values that Hugging Face's classes compute with, against the lowered program."""
    from transformers import AutoConfig, Qwen2Config, Qwen3Config

    config = export_config(spec, form)
    theirs = (Qwen3Config if config["model_type"] == "qwen3" else Qwen2Config)(**json.loads(json.dumps(config)))
    assert type(AutoConfig.for_model(**config)) is type(theirs)
    arch, model = spec.architecture, lower(spec)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(theirs, key) == getattr(arch, key)
    mixer = model.layers[0].mixer
    assert getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads == mixer.head_dim
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (mixer.num_heads, mixer.num_kv_heads)
    assert theirs.rms_norm_eps == arch.norm.eps
    assert theirs.hidden_act == arch.mlp.activation
    assert str(theirs.dtype).removeprefix("torch.") == arch.dtype
    assert [layer.mixer.window for layer in model.layers] == [
        theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types
    ]
    if config["model_type"] == "qwen3":
        assert theirs.attention_bias == (mixer.o_proj.bias is not None) == (mixer.qkv_proj.bias is not None)
    other_form = export_config(spec, "v4" if form == "v5" else "v5")
    assert theirs.rope_parameters == type(theirs)(**other_form).rope_parameters


@settings(max_examples=40, deadline=None)
@given(spec=drawn(qwen2_or_3()))
def test_transformers_computes_the_same_frequencies(spec):
    """Its own rope functions on the exported config, against the formulas that backends get."""
    import torch
    from transformers import Qwen2Config, Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from qwenspec.ir.rope import formula

    config = export_config(spec, "v4")
    theirs = (Qwen3Config if config["model_type"] == "qwen3" else Qwen2Config)(**config)
    rope = lower(spec).rope
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        assert (config["rope_scaling"], rope.attention_factor) == (None, 1.0)
        return
    if not hasattr(theirs, "head_dim"):
        theirs.head_dim = rope.rotary_dim
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=1)
    function = formula(rope.scaling)
    given = {name: getattr(rope.scaling, name) for name in rope.scaling.__slots__}
    if "length" in function.__annotations__:
        given["length"] = 1
    ours = function(dim=rope.rotary_dim, theta=rope.theta, **given)
    assert factor == pytest.approx(rope.attention_factor, rel=1e-12)
    assert frequencies.tolist() == pytest.approx(ours, rel=1e-4)


# Spellings that mean what a plainer one means.
SAME = [
    {"attention": {"scale": 0.125}},
    {"num_key_value_heads": 4},
    {"lm_head": {"dtype": "bfloat16"}},
    {"attention": {"sliding_window": {"window": 8, "layers": {"from": 0}}}},
    {"attention": {"sliding_window": {"window": 8, "layers": [0, 1, 2]}}},
    {"attention": {"sliding_window": {"window": 8, "layers": {"from": 3}}}},
]
PLAIN = {
    "vocab_size": 100,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 64, "bias": {"qkv": True}},
    "rope": {"theta": 1e4},
}


def varied(change):
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in PLAIN.items()}
    for key, value in change.items():
        tree[key] = tree[key] | value if isinstance(tree.get(key), dict) else value
    return spec_of(tree)


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("form", FORMS)
def test_other_spellings_keep_their_meaning(form, change):
    spec = varied(change)
    ours, returned = lower(spec), lower(back(spec, form).spec)
    nameless = {"name": "", "family": "", "spec_file": "", "spec_sha256": ""}
    assert replace(returned, **nameless) == replace(ours, **nameless)


# What Hugging Face has no words for: each feature is named.
LACKING = [
    ({"norm": {"weight": "one_plus"}}, ["norm.weight: one_plus"]),
    ({"attention": {"scale": 1.0}}, ["attention.scale"]),
    ({"attention": {"logn": {"train_length": 64}}}, ["attention.logn"]),
    ({"attention": {"bias": {"qkv": True, "output": True}}}, ["attention.bias.output"]),
    ({"attention": {"bias": {"qkv": False}}}, ["attention.bias.qkv: false"]),
    ({"attention": {"qk_norm": "per_head"}}, ["attention.bias.qkv that differs"]),
    ({"mlp": {"bias": True}}, ["mlp.bias"]),
    ({"lm_head": {"dtype": "float32"}}, ["lm_head.dtype"]),
    ({"rope": {"partial_rotary_factor": 0.5}}, ["rope.partial_rotary_factor"]),
    ({"rope": {"compute_dtype": "float32"}}, ["rope.compute_dtype: float32"]),
    ({"rope": {"scaling": {"kind": "ntk", "factor": 2.0}}}, ["rope.scaling.kind: ntk"]),
    ({"rope": {"scaling": {"kind": "dynamic_qwen1", "train_length": 8}}}, ["rope.scaling.kind: dynamic_qwen1"]),
    ({"lm_head": None, "embedding": {"normalize": False}}, ["embedding.normalize: false"]),
    ({"checkpoint": {"layout": "qwen3_embedding"}}, ["checkpoint.layout qwen3_embedding"]),
    ({"checkpoint": {"layout": "qwen1"}}, ["rope.compute_dtype: activation"]),
    (
        {"checkpoint": {"layout": "qwen1"}, "rope": {"compute_dtype": "float32"}, "num_key_value_heads": 2},
        ["num_key_value"],
    ),
    (
        {
            "checkpoint": {"layout": "qwen1"},
            "rope": {"compute_dtype": "float32", "scaling": {"kind": "dynamic_qwen1", "train_length": 8}},
            "attention": {"logn": {"train_length": 9}, "sliding_window": {"window": 4}},
            "mlp": {"activation": "relu", "bias": True},
        },
        ["attention.bias.output that differs", "attention.sliding_window", "mlp.activation: relu", "train_length"],
    ),
]


@pytest.mark.parametrize(("change", "named"), LACKING)
@pytest.mark.parametrize("form", FORMS)
def test_what_hugging_face_cannot_say_is_named(form, change, named):
    with pytest.raises(SpecError) as caught:
        export_config(varied(change), form)
    told = [diagnostic.message for diagnostic in caught.value.diagnostics]
    assert {diagnostic.code for diagnostic in caught.value.diagnostics} == {"not-in-hugging-face"}
    assert len(told) == len(named)
    assert all(feature in message for feature, message in zip(named, told, strict=True))


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"scheme": "fp8_block", "block": [64, 64], "activations": "none"}, "quantization.activations: none"),
    ],
)
def test_quantization_that_hugging_face_cannot_say(quantization, named):
    with pytest.raises(SpecError) as caught:
        export_config(spec_of(PLAIN, quantization))
    assert [named in diagnostic.message for diagnostic in caught.value.diagnostics] == [True]


@pytest.mark.parametrize(
    "scheme",
    [
        {"scheme": "fp8_block", "block": [64, 64]},
        {"scheme": "awq", "group_size": 64},
        {"scheme": "gptq", "bits": 4},
        {"scheme": "fp8"},
        {"scheme": "pack_quantized", "bits": 4},
        {"scheme": "int8"},
        {"scheme": "int4", "head": "none"},
    ],
)
def test_modules_left_in_full_precision_come_back(scheme):
    spec = spec_of(PLAIN, scheme | {"skip": ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"]})
    assert back(spec, "v5").spec.quantization == spec.quantization


def test_a_head_that_is_named_comes_back_where_heads_are_quantised():
    """Other schemes never quantise it: there it says nothing."""
    skip = ["model.embed_tokens", "lm_head"]
    assert back(spec_of(PLAIN, {"scheme": "int8", "skip": skip}), "v5").spec.quantization.skip == tuple(skip)
    assert back(spec_of(PLAIN, {"scheme": "awq", "group_size": 64, "skip": skip}), "v5").spec.quantization.skip == ()


def test_the_released_specs_can_be_exported():
    from pathlib import Path

    from qwenspec.spec.load import load_all

    for file in (Path(__file__).parents[2] / "specs").glob("*.yaml"):
        for spec in load_all(file):
            assert export_config(spec)["model_type"] in ("qwen", "qwen2", "qwen3")
