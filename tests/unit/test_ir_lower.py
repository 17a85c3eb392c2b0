"""Lowering: defaults, derived sizes, addresses, and which parameters exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ir_specs import make_spec

import qwenspec
from qwenspec.ir import nodes
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Shard


def model_of(folder: Path, **architecture: Any) -> nodes.Model:
    return lower(make_spec(folder, **architecture))


def test_defaults(tmp_path: Path) -> None:
    """48 / 4 = 12 values a head, 1/√12, as many KV heads as query heads, the model's dtype for the head."""
    model = model_of(tmp_path, num_key_value_heads=None)
    attention = model.layers[0].mixer
    assert (attention.num_kv_heads, attention.head_dim) == (4, 12)
    assert attention.scale == pytest.approx(0.28867513459481287, rel=1e-15)
    assert (attention.window, attention.logn, attention.q_norm, attention.k_norm) == (None, None, None, None)
    assert model.rope == nodes.Rope(12, 1e4, "activation", nodes.DefaultRope(), 1.0)
    assert isinstance(model.head, nodes.LmHead)
    assert (model.head.dtype, model.head.tied, model.head.weight.dtype) == ("bfloat16", False, "bfloat16")


def test_explicit_sizes_are_kept(tmp_path: Path) -> None:
    """head_dim · heads may differ from hidden_size, and the score scale from 1/√head_dim."""
    attention = model_of(tmp_path, attention={"head_dim": 20, "scale": 0.125}).layers[0].mixer
    assert attention.scale == 0.125
    assert attention.qkv_proj.weight.shape == (4 * 20 + 2 * 2 * 20, 48)
    assert [(part.name, part.rows, part.heads) for part in attention.qkv_proj.weight.parts] == [
        ("q", 80, 4),
        ("k", 40, 2),
        ("v", 40, 2),
    ]
    assert attention.o_proj.weight.shape == (48, 80)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations(tmp_path: Path, written: str, meant: str) -> None:
    model = model_of(tmp_path, mlp={"activation": written})
    assert {layer.feed_forward.activation for layer in model.layers} == {meant}


@pytest.mark.parametrize(
    ("layers", "windows"),
    [("all", [8, 8, 8]), ({"from": 1}, [None, 8, 8]), ({"from": 3}, [None] * 3), ([0, 2], [8, None, 8])],
)
def test_windows(tmp_path: Path, layers: Any, windows: list[int | None]) -> None:
    model = model_of(tmp_path, attention={"sliding_window": {"window": 8, "layers": layers}})
    assert [layer.mixer.window for layer in model.layers] == windows


@pytest.mark.parametrize(("qkv", "output", "mlp"), list(product([False, True], repeat=3)))
def test_biases_are_independent(tmp_path: Path, qkv: bool, output: bool, mlp: bool) -> None:
    """Column-parallel biases are split with their rows; row-parallel ones are the first rank's."""
    model = model_of(tmp_path, attention={"bias": {"qkv": qkv, "output": output}}, mlp={"bias": mlp})
    expected: dict[str, Shard] = {}
    for i in range(3):
        expected |= {f"layers.{i}.attention.qkv_proj.bias": Shard.COLUMN} if qkv else {}
        expected |= {f"layers.{i}.attention.o_proj.bias": Shard.FIRST} if output else {}
        expected |= {f"layers.{i}.mlp.gate_up_proj.bias": Shard.COLUMN} if mlp else {}
        expected |= {f"layers.{i}.mlp.down_proj.bias": Shard.FIRST} if mlp else {}
    assert {p.name: p.shard for p in model.params() if p.name.endswith(".bias")} == expected


def test_one_norm_style_for_all(tmp_path: Path) -> None:
    model = model_of(
        tmp_path, norm={"eps": 1e-5, "weight": "one_plus"}, attention={"head_dim": 16, "qk_norm": "per_head"}
    )
    norms = [node for node in walk(model) if isinstance(node, nodes.RMSNorm)]
    assert {(norm.eps, norm.style) for norm in norms} == {(1e-5, "one_plus")}
    sizes = {norm.name.split(".")[-1]: norm.size for norm in norms}
    assert sizes == {"input_norm": 48, "q_norm": 16, "k_norm": 16, "post_attention_norm": 48, "norm": 48}
    assert len(norms) == 3 * 4 + 1


@pytest.mark.parametrize("head_dtype", [None, "float32"])
def test_tied_head(tmp_path: Path, head_dtype: str | None) -> None:
    """The embedding's own parameter, in its own dtype; the head's dtype says how the product is taken."""
    model = model_of(tmp_path, tie_word_embeddings=True, lm_head={"dtype": head_dtype})
    assert isinstance(model.head, nodes.LmHead)
    assert model.head.weight is model.embed_tokens
    assert model.head.tied
    assert model.head.dtype == (head_dtype or "bfloat16")
    assert [p.name for p in model.params() if p.shard is Shard.VOCAB] == ["embed_tokens.weight"]
    assert model.embed_tokens.dtype == "bfloat16"
    assert "lm_head.weight" in model.ignored_tensors


def test_untied_head_has_its_own_dtype(tmp_path: Path) -> None:
    model = model_of(tmp_path, lm_head={"dtype": "float32"})
    assert {p.name: p.dtype for p in model.params() if p.dtype != "bfloat16"} == {"lm_head.weight": "float32"}
    assert model.params()[-1].shard is Shard.VOCAB
    assert "lm_head.weight" not in model.ignored_tensors


def test_embedding_head(tmp_path: Path) -> None:
    model = model_of(tmp_path, lm_head=None, embedding={"normalize": False})
    assert model.head == nodes.EmbeddingHead("embedding", False)
    assert not any(p.name.startswith("lm_head") for p in model.params())


def test_partial_rotary(tmp_path: Path) -> None:
    model = model_of(
        tmp_path,
        attention={"head_dim": 16, "logn": {"train_length": 99}},
        rope={"theta": 1e4, "partial_rotary_factor": 0.25, "compute_dtype": "float32"},
    )
    assert (model.rope.rotary_dim, model.rope.compute_dtype) == (4, "float32")
    assert {layer.mixer.logn for layer in model.layers} == {nodes.LogN(99)}


def test_ntk(tmp_path: Path) -> None:
    """The one scaling, beside Qwen-1's, that no other library checks for us."""
    for scaling, node in [
        ({"kind": "ntk", "factor": 3.0}, nodes.NtkRope(3.0)),
        ({"kind": "dynamic_qwen1", "train_length": 77}, nodes.DynamicQwen1Rope(77)),
    ]:
        rope = model_of(tmp_path, rope={"theta": 1e4, "scaling": scaling}).rope
        assert (rope.scaling, rope.attention_factor) == (node, 1.0)


def test_a_name_is_an_address(tmp_path: Path) -> None:
    """Every node's name is its layer's, then the module's, then the parameter's; none occurs twice."""
    model = model_of(
        tmp_path,
        attention={"head_dim": 16, "qk_norm": "per_head", "bias": {"qkv": True, "output": True}},
        mlp={"bias": True},
    )
    in_layer = [
        "input_norm.weight",
        "attention.qkv_proj.weight",
        "attention.qkv_proj.bias",
        "attention.q_norm.weight",
        "attention.k_norm.weight",
        "attention.o_proj.weight",
        "attention.o_proj.bias",
        "post_attention_norm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.gate_up_proj.bias",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
    ]
    assert [p.name for p in model.params()] == [
        "embed_tokens.weight",
        *(f"layers.{i}.{name}" for i in range(3) for name in in_layer),
        "norm.weight",
        "lm_head.weight",
    ]
    for node in walk(model):
        if isinstance(node, nodes.Linear | nodes.RMSNorm):
            assert node.weight.name == f"{node.name}.weight"
        if isinstance(node, nodes.Linear):
            assert node.bias is not None
            assert node.bias.name == f"{node.name}.bias"
            assert node.weight.shape == (node.out_features, node.in_features)
            assert node.bias.shape == (node.out_features,)
        if isinstance(node, nodes.Layer):
            assert node.name == f"layers.{node.index}"
            assert (node.mixer.name, node.feed_forward.name) == (f"{node.name}.attention", f"{node.name}.mlp")


def walk(node: object) -> Iterator[object]:
    """The node and every node inside it."""
    if isinstance(node, tuple):
        for item in node:
            yield from walk(item)
    elif is_dataclass(node):
        yield node
        for field in fields(node):
            yield from walk(getattr(node, field.name))


def test_python_api(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    assert qwenspec.load(spec.file).architecture == spec.architecture
    assert qwenspec.lower(spec) == lower(spec)
    assert {"load", "lower", "emit", "open_runner"} <= set(dir(qwenspec))
    with pytest.raises(AttributeError, match="no attribute 'lowr'"):
        _ = qwenspec.lowr


def test_the_ir_imports_no_tensor_library() -> None:
    modules = "qwenspec.ir." + ", qwenspec.ir.".join(["lower", "weights", "rope", "shard", "cost", "render"])
    code = f"import sys, {modules}; print(sorted({{'torch', 'numpy', 'triton', 'tvm'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
