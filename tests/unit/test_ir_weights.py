"""Which checkpoint tensor fills which rows: against the tensors that transformers itself would save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ir_specs import make_spec
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from qwenspec.diagnostics import SpecError
from qwenspec.ir import nodes, weights
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Param, Part, Shard, Source
from qwenspec.spec.checkpoint import builtin_layouts
from qwenspec.spec.load import load

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}


def tensors(model: nodes.Model) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as the sources of the parameters say."""
    return {source.tensor: (source.rows, *param.shape[1:]) for param in model.params() for source in param.sources}


def saved(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    tied = getattr(model.config, "tie_word_embeddings", False)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_names(tmp_path: Path, tied: bool) -> None:
    spec = make_spec(tmp_path, attention={"bias": {"qkv": True}}, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    assert tensors(lower(spec)) == saved(theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_names(tmp_path: Path, bias: bool) -> None:
    """With head_dim · heads different from hidden_size."""
    attention = {"head_dim": 20, "qk_norm": "per_head", "bias": {"qkv": bias, "output": bias}}
    spec = make_spec(tmp_path, attention=attention)
    with torch.device("meta"):
        config = Qwen3Config(**SIZES, head_dim=20, attention_bias=bias, tie_word_embeddings=False)
        theirs = Qwen3ForCausalLM(config)
    assert tensors(lower(spec)) == saved(theirs)


def test_qwen3_embedding_names(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        attention={"head_dim": 20, "qk_norm": "per_head"},
        tie_word_embeddings=True,
        lm_head=None,
        embedding={"normalize": True},
        checkpoint={"layout": "qwen3_embedding"},
    )
    with torch.device("meta"):
        theirs = Qwen3Model(Qwen3Config(**SIZES, head_dim=20))
    assert tensors(lower(spec)) == saved(theirs)


def test_qwen1_names(tmp_path: Path) -> None:
    """c_attn is one tensor for q, k and v; the gate is w2 and goes above w1."""
    spec = make_spec(
        tmp_path,
        num_key_value_heads=4,
        attention={"bias": {"qkv": True}},
        checkpoint={"layout": "qwen1"},
    )
    model = lower(spec)
    layer = model.layers[1]
    qkv = layer.mixer.qkv_proj
    assert qkv.weight.sources == (Source("transformer.h.1.attn.c_attn.weight", 144),)
    assert qkv.bias is not None
    assert qkv.bias.sources == (Source("transformer.h.1.attn.c_attn.bias", 144),)
    assert [part.rows for part in qkv.weight.parts] == [48, 48, 48]
    assert layer.feed_forward.gate_up_proj.weight.sources == (
        Source("transformer.h.1.mlp.w2.weight", 40),
        Source("transformer.h.1.mlp.w1.weight", 40),
    )
    expected = {
        "transformer.wte.weight": (96, 48),
        "transformer.ln_f.weight": (48,),
        "lm_head.weight": (96, 48),
    }
    for i in range(3):
        expected |= {
            f"transformer.h.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": (48,),
                "attn.c_attn.weight": (144, 48),
                "attn.c_attn.bias": (144,),
                "attn.c_proj.weight": (48, 48),
                "ln_2.weight": (48,),
                "mlp.w1.weight": (40, 48),
                "mlp.w2.weight": (40, 48),
                "mlp.c_proj.weight": (48, 40),
            }.items()
        }
    assert tensors(model) == expected
    assert "*.attn.masked_bias" in model.ignored_tensors


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    """Names are data: everything fused on disk, the layer's index in the middle of a word."""
    layout: dict[str, Any] = {
        "embedding": "tok",
        "layer": "block{i}.x",
        "input_norm": "n1",
        "attention": {"qkv": ["qkv"], "o": "o"},
        "post_attention_norm": "n2",
        "mlp": {"gate_up": ["gu"], "down": "d"},
        "norm": "nf",
        "lm_head": "head.out",
    }
    found = tensors(lower(make_spec(tmp_path, checkpoint={"layout": layout})))
    assert found["block2.x.qkv.weight"] == (96, 48)
    assert found["block2.x.gu.weight"] == (80, 48)
    assert found["head.out.weight"] == (96, 48)
    assert len(found) == 3 * 6 + 3


def test_rows_add_up() -> None:
    """In every parameter of every golden variant, parts and sources fill the same rows."""
    golden = Path(__file__).parents[1] / "golden" / "ir" / "features.yaml"
    for variant in ("qwen1-ntk-logn", "all-biases", "embedding", "one-plus"):
        for param in lower(load(golden, variant)).params():
            assert sum(part.rows for part in param.parts) == param.shape[0]
            assert sum(source.rows for source in param.sources) == param.shape[0]


def test_a_tensor_read_twice() -> None:
    def param(name: str, *sources: str) -> Param:
        parts = tuple(Part(source, 4) for source in sources)
        shape = (4 * len(sources), 4)
        read = tuple(Source(source, 4) for source in sources)
        return Param(name, shape, "bfloat16", Shard.COLUMN, parts, read)

    weights.check_distinct([param("one", "a", "b"), param("two", "c")])
    with pytest.raises(SpecError) as error:
        weights.check_distinct([param("one", "a", "a"), param("two", "b"), param("three", "b")])
    assert [diagnostic.code for diagnostic in error.value.diagnostics] == ["tensor-read-twice"] * 2
    assert "gives b to both two and three" in error.value.diagnostics[1].message


def test_a_layout_that_names_a_tensor_of_a_layer_again(tmp_path: Path) -> None:
    """Only once the layer's index is filled in can it be seen."""
    layout = yaml.safe_load(builtin_layouts()["qwen2"].read_text())
    spec = make_spec(tmp_path, checkpoint={"layout": layout | {"norm": "model.layers.2.input_layernorm"}})
    with pytest.raises(SpecError, match=r"layers\.2\.input_norm\.weight and norm\.weight"):
        lower(spec)
