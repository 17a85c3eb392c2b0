"""How quantised weights are stored, and which rows of a fused matrix lie together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ir_specs import make_spec
from pydantic import TypeAdapter

from qwenspec.backend.package import linear_blocks, manifest
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Fp8Format, IntFormat, LmHead, Model, Source, WeightFormat
from qwenspec.ir.quantized import INT8_PER_ROW, block_bytes, blocks, head_format, stored_tensors, weight_format
from qwenspec.ir.shard import legal_degrees, obstacles
from qwenspec.spec.quantization import Quantization

FLOATS = ("F32", "F16", "BF16", "F64")
INT4 = IntFormat("int4", bits=4, group_size=32)


def scheme(**fields: Any) -> Any:
    return TypeAdapter(Quantization).validate_python(fields)


def quantized(folder: Path, architecture: dict[str, Any] | None = None, **fields: Any) -> Model:
    return lower(make_spec(folder, **architecture or {}).model_copy(update={"quantization": scheme(**fields)}))


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"scheme": "fp8_block"}, Fp8Format((128, 128), activations="dynamic")),
        ({"scheme": "fp8_block", "block": (64, 32), "activations": "none"}, Fp8Format((64, 32))),
        ({"scheme": "fp8"}, Fp8Format((1, 0), "channel", "dynamic")),
        ({"scheme": "fp8", "scales": "tensor", "activations": "static"}, Fp8Format((1, 0), "tensor", "static")),
        ({"scheme": "pack_quantized", "bits": 4}, IntFormat("pack_quantized", 4, 128)),
        (
            {"scheme": "pack_quantized", "bits": 8, "group_size": -1, "sym": False, "desc_act": True},
            IntFormat("pack_quantized", 8, None, zero_points=True, act_order=True),
        ),
        ({"scheme": "awq"}, IntFormat("awq", 4, 128, zero_points=True)),
        ({"scheme": "gptq", "bits": 4}, IntFormat("gptq", 4, 128)),
        (
            {"scheme": "gptq", "bits": 8, "group_size": -1, "sym": False, "desc_act": True},
            IntFormat("gptq", 8, None, zero_points=True, act_order=True),
        ),
        ({"scheme": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, IntFormat("gptq_v2", 4, 128)),
        ({"scheme": "int8"}, INT8_PER_ROW),
        ({"scheme": "int4"}, INT4),
    ],
)
def test_formats(fields: dict[str, Any], format: WeightFormat) -> None:
    assert weight_format(scheme(**fields)) == format


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"scheme": "int8"}, INT8_PER_ROW),
        ({"scheme": "int8", "head": "none"}, None),
        ({"scheme": "int4"}, INT8_PER_ROW),
        ({"scheme": "int4", "head": "int4"}, INT4),
        ({"scheme": "int4", "head": "none"}, None),
        ({"scheme": "awq"}, None),
        ({"scheme": "fp8_block"}, None),
    ],
)
def test_formats_of_the_head(fields: dict[str, Any], format: WeightFormat | None) -> None:
    assert head_format(scheme(**fields)) == format


def test_heads_and_embeddings(tmp_path: Path) -> None:
    """A tied embedding has the head's format, an untied one none; and what `skip` names stays as it is."""
    untied = quantized(tmp_path, scheme="int8")
    assert isinstance(untied.head, LmHead)
    assert untied.head.weight.sources[0].format == INT8_PER_ROW
    assert untied.embed_tokens.sources[0].format is None
    tied = quantized(tmp_path, {"tie_word_embeddings": True}, scheme="int4", head="int4")
    assert tied.embed_tokens.sources[0].format == INT4
    skipped = quantized(tmp_path, {"tie_word_embeddings": True}, scheme="int8", skip=("model.embed_tokens",))
    assert skipped.embed_tokens.sources[0].format is None
    embedding = quantized(tmp_path, {"lm_head": None, "embedding": {}}, scheme="int8")
    assert embedding.embed_tokens.sources[0].format is None


def test_norms_and_biases_are_never_quantised(tmp_path: Path) -> None:
    attention = {"qk_norm": "per_head", "bias": {"qkv": True, "output": True}}
    model = quantized(tmp_path, {"attention": attention, "mlp": {"bias": True}}, scheme="int8")
    for param in model.params():
        expected = INT8_PER_ROW if len(param.shape) == 2 and param.name != "embed_tokens.weight" else None
        assert {source.format for source in param.sources} == {expected}, param.name


# ------------------------------------------------------------------------------------------------- stored tensors


def stored(format: WeightFormat, rows: int, inputs: int) -> dict[str, tuple[Any, ...]]:
    found = stored_tensors(Source("a.b.weight", rows, format), inputs)
    assert all(tensor.name == f"a.b.{suffix}" for suffix, tensor in found.items())
    return {suffix: (tensor.shape, tensor.dtypes, tensor.optional) for suffix, tensor in found.items()}


def test_stored_tensors() -> None:
    """N = 48 outputs, K = 80 inputs, of which the last group of 32 has 16."""
    words = ("I32",)
    assert stored(IntFormat("awq", 4, 16, zero_points=True), 48, 80) == {
        "qweight": ((80, 6), words, False),
        "qzeros": ((5, 6), words, False),
        "scales": ((5, 48), FLOATS, False),
    }
    assert stored(IntFormat("gptq", 4, 32), 48, 80) == {
        "qweight": ((10, 48), words, False),
        "qzeros": ((3, 6), words, False),
        "scales": ((3, 48), FLOATS, False),
        "g_idx": ((80,), words, True),
    }
    assert stored(IntFormat("gptq_v2", 8, None, zero_points=True, act_order=True), 48, 80) == {
        "qweight": ((20, 48), words, False),
        "qzeros": ((1, 12), words, False),
        "scales": ((1, 48), FLOATS, False),
        "g_idx": ((80,), words, False),
    }
    assert stored(Fp8Format((32, 64), activations="dynamic"), 48, 80) == {
        "weight": ((48, 80), ("F8_E4M3",), False),
        "weight_scale_inv": ((2, 2), FLOATS, False),
    }
    assert stored(Fp8Format((1, 0), "channel", "dynamic"), 48, 80) == {
        "weight": ((48, 80), ("F8_E4M3",), False),
        "weight_scale": ((48, 1), FLOATS, False),
    }
    assert stored(Fp8Format((1, 0), "tensor", "static"), 48, 80) == {
        "weight": ((48, 80), ("F8_E4M3",), False),
        "weight_scale": ((1,), FLOATS, False),
        "input_scale": ((1,), FLOATS, False),
    }
    assert stored(IntFormat("pack_quantized", 4, 32, zero_points=True), 45, 81) == {
        "weight_packed": ((45, 11), words, False),
        "weight_scale": ((45, 3), FLOATS, False),
        "weight_shape": ((2,), ("I64",), False),
        "weight_zero_point": ((6, 3), words, False),
        "weight_g_idx": ((81,), words, True),
    }
    assert stored(INT8_PER_ROW, 48, 80) == {
        "qweight": ((48, 80), ("I8",), False),
        "scales": ((48,), FLOATS, False),
    }
    assert stored(INT4, 48, 81) == {
        "qweight": ((48, 41), ("U8",), False),
        "scales": ((48, 3), FLOATS, False),
    }


def test_what_is_not_quantised_has_no_stored_tensors() -> None:
    with pytest.raises(AssertionError, match="a is not quantised"):
        stored_tensors(Source("a", 4), 4)


@pytest.mark.parametrize(
    ("format", "rows", "inputs", "size"),
    [
        (INT8_PER_ROW, 3, 7, 3 * 7 + 3 * 4),
        (INT4, 3, 65, 3 * 3 * 16 + 3 * 3 * 2),
        (IntFormat("awq", 4, 32, zero_points=True), 8, 64, 8 * 32 + 8 * 2 * (2 + 1)),
        (IntFormat("gptq", 8, None), 8, 64, 8 * 64 + 8 * 2),
        (IntFormat("gptq", 4, 32, zero_points=True, act_order=True), 8, 64, 8 * 32 + 8 * 2 * 3 + 64 * 4),
        (Fp8Format((4, 8)), 5, 9, 5 * 9 + 4 * 2 * 2),
        (Fp8Format((1, 0), "tensor", "static"), 5, 9, 5 * 9 + 4 * 5 + 4),
        (IntFormat("pack_quantized", 4, 32), 8, 64, 8 * 32 + 8 * 2 * 4),
    ],
)
def test_block_bytes(format: WeightFormat, rows: int, inputs: int, size: int) -> None:
    assert block_bytes(format, rows, inputs) == size


# --------------------------------------------------------------------------------------------------------- blocks

QKV = "layers.0.attention.qkv_proj"
SKIP_K = ("model.layers.0.self_attn.k_proj",)


def of(model: Model) -> list[tuple[str, int, bool]]:
    """Of the first layer's q, k and v (48, 24 and 24 rows): each block's name, rows, and whether it is quantised."""
    param = model.layers[0].mixer.qkv_proj.weight
    found = blocks(param)
    assert tuple(source for block in found for source in block.sources) == param.sources
    return [(block.name.removeprefix(QKV), block.rows, block.format is not None) for block in found]


PARTS = [(".q.weight", 48), (".k.weight", 24), (".v.weight", 24)]


@pytest.mark.parametrize(
    ("fields", "together"),
    [
        ({"scheme": "int8"}, True),
        ({"scheme": "int4"}, True),
        ({"scheme": "awq", "group_size": 8}, True),
        ({"scheme": "gptq", "bits": 4}, True),
        ({"scheme": "gptq", "bits": 4, "desc_act": True}, False),
        ({"scheme": "pack_quantized", "bits": 4, "sym": False}, True),
        ({"scheme": "pack_quantized", "bits": 4, "desc_act": True}, False),
        ({"scheme": "fp8", "scales": "tensor"}, True),
        ({"scheme": "fp8", "activations": "static"}, False),
        ({"scheme": "fp8_block", "block": (24, 32)}, True),
        ({"scheme": "fp8_block", "block": (48, 32)}, False),  # k's 24 rows are half a block
        ({"scheme": "fp8_block", "block": (7, 32)}, False),
    ],
)
def test_parts_lie_together_where_their_format_allows(tmp_path: Path, fields: dict[str, Any], together: bool) -> None:
    whole = [(".weight", 96, True)]
    assert of(quantized(tmp_path, **fields)) == (whole if together else [(*part, True) for part in PARTS])


def test_the_last_part_may_end_within_a_block(tmp_path: Path) -> None:
    """gate and up of 40 rows each, in blocks of 40, 20 or 16."""
    for height, count in ((40, 1), (20, 1), (16, 2)):
        model = quantized(tmp_path, scheme="fp8_block", block=(height, 32))
        assert len(blocks(model.layers[0].feed_forward.gate_up_proj.weight)) == count
        assert len(blocks(model.layers[0].mixer.o_proj.weight)) == 1


def test_a_part_that_is_skipped_lies_apart(tmp_path: Path) -> None:
    model = quantized(tmp_path, scheme="int8", skip=SKIP_K)
    assert of(model) == [(".q.weight", 48, True), (".k.weight", 24, False), (".v.weight", 24, True)]
    every = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    assert of(quantized(tmp_path, scheme="int8", skip=every)) == [(".weight", 96, False)]


def test_what_is_fused_on_disk_is_one_block(tmp_path: Path) -> None:
    """Qwen-1's c_attn: its blocks and its order of inputs are the whole tensor's."""
    architecture = {
        "num_key_value_heads": 4,
        "attention": {"bias": {"qkv": True}},
        "checkpoint": {"layout": "qwen1"},
    }
    for fields in ({"scheme": "fp8_block", "block": (32, 32)}, {"scheme": "gptq", "bits": 4, "desc_act": True}):
        assert of(quantized(tmp_path, architecture, **fields)) == [(".weight", 144, True)]


# ------------------------------------------------------------------------------------------------------- manifest


def entries(model: Model) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    content = json.loads(manifest(model)["MANIFEST.json"])
    assert content["num_layers"] == 3
    for entry in content["parameters"]:
        found.setdefault(entry["name"], []).append(entry)
    return found


def test_manifest_in_full_precision(tmp_path: Path) -> None:
    model = lower(make_spec(tmp_path))
    assert "zero_tensors" not in json.loads(manifest(model)["MANIFEST.json"])
    (qkv,) = entries(model)["layers.{i}.attention.qkv_proj.weight"]
    prefix = "model.layers.{i}.self_attn"
    assert qkv == {
        "name": "layers.{i}.attention.qkv_proj.weight",
        "shape": [96, 48],
        "rows": [[48, 12, 1], [24, 12, 2], [24, 12, 2]],  # heads of 12, and the query heads that read each
        "sources": [[f"{prefix}.q_proj.weight", 48], [f"{prefix}.k_proj.weight", 24], [f"{prefix}.v_proj.weight", 24]],
    }


def test_manifest_of_a_quantised_model(tmp_path: Path) -> None:
    """One entry for all layers; a fused matrix has the tensors of each part."""
    model = quantized(tmp_path, scheme="int4", group_size=32, head="int8")
    found = entries(model)
    (down,) = found["layers.{i}.mlp.down_proj.weight"]
    module = "model.layers.{i}.mlp.down_proj"
    assert down == {
        "name": "layers.{i}.mlp.down_proj.weight",
        "shape": [48, 40],
        "columns": [40, 32, 0],  # in groups of 32
        "format": {
            "packing": "int4",
            "bits": 4,
            "group_size": 32,
            "zero_points": False,
            "act_order": False,
        },
        "sources": [
            {
                "rows": 48,
                "tensors": {
                    "qweight": [f"{module}.qweight", [48, 20], ["U8"], False],
                    "scales": [f"{module}.scales", [48, 2], list(FLOATS), False],
                },
            }
        ],
    }
    (qkv,) = found["layers.{i}.attention.qkv_proj.weight"]
    assert [source["rows"] for source in qkv["sources"]] == [48, 24, 24]
    (head,) = found["lm_head.weight"]
    assert (head["format"]["packing"], head["shape"]) == ("int8", [96, 48])
    assert "format" not in found["embed_tokens.weight"][0]
    assert "format" not in found["layers.{i}.input_norm.weight"][0]
    assert all("layers" not in entry for same in found.values() for entry in same)


def test_manifest_of_a_partly_quantised_model(tmp_path: Path) -> None:
    """Layer 0 has q, k and v apart; layers 1 and 2 have them in one."""
    found = entries(quantized(tmp_path, scheme="int8", skip=(*SKIP_K, "model.layers.1.mlp.down_proj")))
    qkv = "layers.{i}.attention.qkv_proj"
    (whole,) = found[f"{qkv}.weight"]
    assert whole["layers"] == [1, 2]
    q, k, v = (found[f"{qkv}.{part}.weight"][0] for part in "qkv")
    assert (q["layers"], k["layers"], v["layers"]) == ([0], [0], [0])
    assert k["sources"] == [["model.layers.{i}.self_attn.k_proj.weight", 24]]
    assert q["sources"][0]["tensors"]["qweight"][0] == "model.layers.{i}.self_attn.q_proj.qweight"
    down = found["layers.{i}.mlp.down_proj.weight"]
    assert sorted(("format" in entry, entry["layers"]) for entry in down) == [(False, [1]), (True, [0, 2])]


def test_manifest_of_gptq_allows_zero_biases(tmp_path: Path) -> None:
    content = json.loads(
        manifest(quantized(tmp_path, scheme="gptq", bits=4, checkpoint_format="gptq_v2"))["MANIFEST.json"]
    )
    assert content["zero_tensors"] == ["*.bias"]
    (down,) = (entry for entry in content["parameters"] if "down_proj" in entry["name"])
    assert down["format"]["packing"] == "gptq_v2"
    assert down["sources"][0]["tensors"]["g_idx"][-1] is True


def test_linear_blocks_are_of_what_lies_apart(tmp_path: Path) -> None:
    assert linear_blocks(quantized(tmp_path, scheme="int8")) == {}
    skip = (*SKIP_K, "model.layers.2.mlp.down_proj")
    assert linear_blocks(quantized(tmp_path, scheme="int8", skip=skip)) == {
        QKV: [("q", True), ("k", False), ("v", True)],
        "layers.2.mlp.down_proj": [("", False)],
    }


def test_ranks_do_not_share_inputs_that_are_rounded_with_one_scale(tmp_path: Path) -> None:
    tokens, stored = quantized(tmp_path, scheme="fp8"), quantized(tmp_path, scheme="fp8", activations="static")
    assert legal_degrees(tokens) == (1,)
    assert legal_degrees(stored) == legal_degrees(quantized(tmp_path, scheme="fp8", activations="none")) != (1,)
    assert any("a token's inputs share a scale" in told.message for told in obstacles(tokens, 2))
