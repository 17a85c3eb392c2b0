"""What the proof suite draws: specs over every feature of the schema, and sizes of caches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import pytest
from hypothesis import Phase, find, given, seed, settings
from pydantic import Field

from qwenspec.diagnostics import SpecError
from qwenspec.hf.exporter import export_config
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.base import Model
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load_all
from qwenspec.verify.dequantize import quantized_matrices
from qwenspec.verify.features import features, schema_features
from qwenspec.verify.steps import CacheSizes
from qwenspec.verify.strategies import DTYPES, SCALINGS, cache_sizes, spec_of, specs
from qwenspec.verify.strategies_quantized import KV_CACHES, QUANTIZATIONS

ROOT = Path(__file__).resolve().parents[2]
SMALLEST: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 4,
    "max_position_embeddings": 64,
    "dtype": "float32",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 4},
    "rope": {"theta": 1e4},
}


QUANTIZED = (
    "quantization.",
    "shape.quantized=",
    "shape.last_group=",
    "kv_cache.",
)  # how features of quantised specs begin


def draw_run(scaling: str | None, dtype: str) -> list[Spec]:
    """Of one scaling and dtype."""
    return draw(12, number=crc32(f"{scaling} {dtype}".encode()), scalings=(scaling,), dtypes=(dtype,))


def draw(count: int, number: int = 0, **options: Any) -> list[Spec]:
    """The same specs every time; other ones for another number."""
    drawn: list[Spec] = []

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    @given(specs(**options))
    def collect(spec: Spec) -> None:
        drawn.append(spec)

    collect()
    return drawn


# ------------------------------------------------------------------------------------------------------ features


def test_specs_say_everything_that_the_schema_can_say() -> None:
    drawn = [spec for kind in (None, *SCALINGS) for dtype in DTYPES for spec in draw_run(kind, dtype)]
    drawn += [spec for scheme in QUANTIZATIONS for n in range(4) for spec in draw(8, n, quantizations=(scheme,))]
    drawn += [spec for kind in KV_CACHES for spec in draw(6, kv_caches=(kind,))]
    seen = Counter(feature for spec in drawn for feature in features(spec))
    assert set(seen) == schema_features()
    assert min(seen.values()) >= 3, seen.most_common()[-5:]


def test_many_short_runs_draw_many_specs() -> None:
    drawn = [spec for kind in SCALINGS for spec in draw_run(kind, "float32")]
    assert len({features(spec) for spec in drawn}) > 0.8 * len(drawn)


def test_a_feature_that_no_spec_had_would_be_missed() -> None:
    drawn = draw(200, scalings=(None, "yarn"))  # and nothing that is quantised
    missed = schema_features() - {feature for spec in drawn for feature in features(spec)}
    assert missed >= {"rope.scaling.kind=linear", "rope.scaling.longrope.factor=null"}
    assert all(feature.startswith(("rope.scaling.", *QUANTIZED)) for feature in missed), missed


def test_every_feature_of_the_shipped_specs_is_the_schema_s() -> None:
    for file in sorted((ROOT / "specs").glob("*.yaml")):
        for spec in load_all(file):
            assert features(spec) <= schema_features(), spec.variant


def test_features_of_a_spec() -> None:
    changes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention": {"head_dim": 4, "sliding_window": {"window": 3, "layers": {"from": 0}}},
        "rope": {
            "theta": 1e4,
            "partial_rotary_factor": 0.5,
            "scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 2.0},
        },
        "checkpoint": {"layout": "qwen1"},
    }
    said = features(spec_of(SMALLEST | changes))
    assert said >= {
        "num_key_value_heads=set",
        "attention.bias.qkv=false",
        "attention.qk_norm=none",
        "attention.logn=null",
        "attention.sliding_window=set",
        "attention.sliding_window.layers=from",
        "rope.partial_rotary_factor=<1",
        "rope.scaling.kind=yarn",
        "rope.scaling.yarn.attention_factor=set",
        "rope.scaling.yarn.mscale=null",
        "lm_head.dtype=null",
        "embedding=null",
        "checkpoint.layout=qwen1",
        "shape.heads*head_dim>hidden",
        "shape.kv_heads=gqa",
        "shape.qkv=fused",
        "shape.gate_up=split",
    }
    keys = [feature.split("=")[0] for feature in said]
    assert len(keys) == len(set(keys))  # one word a field


def test_features_of_a_quantised_spec() -> None:
    def said(scheme: dict[str, Any], *skip: str, **changes: Any) -> set[str]:
        found = features(spec_of(SMALLEST | changes, {**scheme, "skip": list(skip)}))
        return {feature for feature in found if feature.startswith(QUANTIZED)}

    gptq = {"scheme": "gptq", "bits": 8, "group_size": -1, "desc_act": True}
    assert said(gptq) == {
        "quantization.scheme=gptq",
        "quantization.gptq.bits=8",
        "quantization.gptq.group_size=-1",
        "quantization.gptq.sym=true",
        "quantization.gptq.desc_act=true",
        "quantization.gptq.checkpoint_format=gptq",
        "shape.quantized=all",
        "shape.last_group=whole",
    }
    assert "quantization.gptq.group_size=number" in said(gptq | {"group_size": 4})
    int4 = {"scheme": "int4", "group_size": 3, "head": "int8"}
    common = {"quantization.scheme=int4", "quantization.int4.head=int8", "shape.last_group=smaller"}
    assert said(int4, "model.layers.0.self_attn.o_proj") == common | {"shape.quantized=some"}
    assert said(int4, "model.layers.0.self_attn.k_proj") == common | {"shape.quantized=parts"}
    every_part = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert said(int4, *every_part) == common | {"shape.quantized=some"}
    assert features(spec_of(SMALLEST)) >= {"quantization=null"}
    assert not any(feature.startswith(QUANTIZED) for feature in features(spec_of(SMALLEST)))


class _Gate(Model):
    kind: Literal["sigmoid"] = "sigmoid"
    per_head: bool = False
    ranks: tuple[int, ...] | Literal["auto"] = "auto"


class _Extended(Architecture):
    router: Literal["top_k", "sinkhorn"] = "top_k"
    softcap: float | None = None
    experts: int = Field(default=1, gt=0)
    gate: _Gate | None = None


def test_what_is_added_to_the_schema_is_a_feature() -> None:
    assert schema_features(_Extended) - schema_features() == {
        "router=top_k",
        "router=sinkhorn",
        "softcap=set",
        "softcap=null",
        "gate=set",
        "gate=null",
        "gate.per_head=true",
        "gate.per_head=false",
        "gate.ranks=list",
        "gate.ranks=auto",
    }
    spec = spec_of(SMALLEST)
    told = dict(spec.architecture)
    extended = spec.model_copy(update={"architecture": _Extended(**told, softcap=2.0, gate=_Gate(ranks=(1, 2)))})
    assert features(extended) - features(spec) == {
        "router=top_k",
        "softcap=set",
        "gate=set",
        "gate.per_head=false",
        "gate.ranks=list",
    }


# ---------------------------------------------------------------------------------------------------- strategies


def test_specs_of_the_options() -> None:
    drawn = draw(60, max_layers=1, dtypes=("float16",))
    assert {(spec.architecture.num_hidden_layers, spec.architecture.dtype) for spec in drawn} == {(1, "float16")}


def test_hugging_face_can_say_the_specs_drawn_for_it() -> None:
    drawn = [spec for number in range(4) for spec in draw(40, number, hugging_face=True)]
    assert {export_config(spec)["model_type"] for spec in drawn} == {"qwen2", "qwen3"}
    said = {feature for spec in drawn for feature in features(spec)}
    kinds = ("linear", "dynamic", "yarn", "longrope", "llama3")
    assert said >= {f"rope.scaling.kind={kind}" for kind in kinds} | {"attention.sliding_window=set", "embedding=set"}


def test_specs_shrink_to_the_simplest_of_a_scheme() -> None:
    rules = settings(max_examples=500, derandomize=True, database=None, deadline=None)
    schemes = (None, "int8", "gptq")
    found = find(specs(quantizations=schemes), lambda spec: spec.quantization is not None, settings=rules)
    assert found == spec_of(SMALLEST, {"scheme": "int8", "head": "none"})


def test_quantised_specs_are_of_the_schemes_asked_for() -> None:
    for scheme in QUANTIZATIONS:
        drawn = [spec.quantization for spec in draw(20, quantizations=(None, scheme))]
        assert {None if q is None else q.scheme for q in drawn} == {None, scheme}


def test_groups_and_blocks_are_smaller_than_matrices() -> None:
    for scheme in set(QUANTIZATIONS) - {"int8", "fp8"}:  # which have rows or matrices, and no groups
        drawn = [spec for n in range(4) for spec in draw(8, n, quantizations=(scheme,))]
        matrices = [matrix for spec in drawn for matrix in quantized_matrices(spec).values()]
        assert np.mean([matrix.columns > matrix.group_size for matrix in matrices]) > 0.5, scheme
        ragged = np.mean([matrix.columns % matrix.group_size > 0 for matrix in matrices])
        assert ragged == 0 if scheme == "awq" else ragged > 0.2, scheme


def test_short_sequences_pass_the_lengths_at_which_something_begins() -> None:
    for spec in draw(200):
        attention, scaling = spec.architecture.attention, spec.architecture.rope.scaling
        begins = [attention.logn.train_length] if attention.logn else []
        begins += [attention.sliding_window.window] if attention.sliding_window else []
        if scaling is not None:
            lengths = ("train_length", "original_max_position_embeddings")
            begins += [getattr(scaling, length) for length in lengths if hasattr(scaling, length)]
            begins += [spec.architecture.max_position_embeddings] if scaling.kind == "dynamic" else []
        assert max(begins, default=1) < 64


@pytest.mark.parametrize(
    ("feature", "rest"),
    [
        ("shape.kv_heads=mha", {}),
        ("attention.logn=set", {"attention": {"head_dim": 4, "logn": {"train_length": 4}}}),
        ("mlp.bias=true", {"mlp": {"bias": True}}),
        ("embedding=set", {"lm_head": None, "embedding": {}}),
        ("shape.kv_heads=gqa", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
)
def test_specs_shrink_to_one_layer_one_head_and_nothing_else_switched_on(feature: str, rest: dict[str, Any]) -> None:
    rules = settings(max_examples=2000, derandomize=True, database=None, deadline=None)
    assert find(specs(), lambda spec: feature in features(spec), settings=rules) == spec_of(SMALLEST | rest)


def test_spec_of_tells_mistakes_as_a_file_s() -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(SMALLEST | {"num_key_value_heads": 3})
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["kv-heads-do-not-divide"]


@settings(max_examples=100, derandomize=True, database=None)
@given(cache_sizes())
def test_cache_sizes(sizes: CacheSizes) -> None:
    assert 1 <= sizes.page_size <= 16
    assert 2 <= sizes.max_batch_size <= 5
    assert 1 <= sizes.chunk <= 64
    assert sizes.pages >= 2
    assert 16 < sizes.page_size * sizes.pages <= 160
