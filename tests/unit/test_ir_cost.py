"""Costs against published totals, transformers' own counts and arithmetic written out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ir_specs import make_spec
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwenspec.ir.cost import count_parameters, flops_per_token, kv_bytes_per_token, memory, weight_bytes
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.ir.shard import plan
from qwenspec.spec.load import load_all

# In the order of KEYS below.
QWEN2 = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, False),
}
QWEN3 = {
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, False),
    "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, False),
}
KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


def qwen2(folder: Path, size: str) -> Model:
    sizes = dict(zip(KEYS, QWEN2[size], strict=True))
    return lower(make_spec(folder, **sizes, attention={"bias": {"qkv": True}}))


def qwen3(folder: Path, size: str) -> Model:
    sizes = dict(zip(KEYS, QWEN3[size], strict=True))
    return lower(make_spec(folder, **sizes, attention={"head_dim": 128, "qk_norm": "per_head"}))


@pytest.mark.parametrize("size", QWEN2)
def test_qwen2_parameters(tmp_path: Path, size: str) -> None:
    config = Qwen2Config(**dict(zip(KEYS, QWEN2[size], strict=True)))
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(config)
    assert count_parameters(qwen2(tmp_path, size)).total == theirs.num_parameters()


@pytest.mark.parametrize("size", QWEN3)
def test_qwen3_parameters(tmp_path: Path, size: str) -> None:
    config = Qwen3Config(**dict(zip(KEYS, QWEN3[size], strict=True)), head_dim=128)
    with torch.device("meta"):
        theirs = Qwen3ForCausalLM(config)
    assert count_parameters(qwen3(tmp_path, size)).total == theirs.num_parameters()


SPECS = Path(__file__).parents[2] / "specs"


@pytest.mark.parametrize("file", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_spec_has_the_size_in_its_name(file: Path) -> None:
    """Within what the published names round: 0.46 for `0.5b`, 7.72 for `7b`. A wrong width would show."""
    for spec in load_all(file):
        found = re.search(r"-([\d.]+)b\b", spec.variant)
        assert found, spec.variant
        billions = count_parameters(lower(spec)).total / 1e9
        assert billions == pytest.approx(float(found[1]), rel=0.11), spec.variant


def test_qwen3_06b_in_parts(tmp_path: Path) -> None:
    model = qwen3(tmp_path, "qwen3-0.6b")
    count = count_parameters(model)
    hidden, q, kv, width = 1024, 16 * 128, 8 * 128, 3072
    assert count.per_layer == (q + 2 * kv) * hidden + hidden * q + 3 * width * hidden + 2 * hidden + 2 * 128
    assert count.embedding == 151936 * hidden
    assert count.head == 0
    assert count.total == count.embedding + 28 * count.per_layer + hidden == 596_049_920
    assert weight_bytes(model) == 2 * 596_049_920
    assert kv_bytes_per_token(model) == 2 * 8 * 128 * 28 * 2 == 114_688


def test_an_untied_head_counts_in_its_own_dtype(tmp_path: Path) -> None:
    model = lower(make_spec(tmp_path, lm_head={"dtype": "float32"}))
    count = count_parameters(model)
    assert count.head == count.embedding == 96 * 48
    assert weight_bytes(model) == 2 * (count.total - count.head) + 4 * count.head


def flops_by_hand(context: int, windows: tuple[int, ...]) -> int:
    """Small spec: hidden 48, 4 query and 2 KV heads of 16, width 40, vocabulary 96."""
    qkv, o, gate_up, down = (4 + 2 + 2) * 16 * 48, 64 * 48, 2 * 40 * 48, 40 * 48
    layers = sum(2 * (qkv + o + gate_up + down) + 4 * 4 * 16 * min(context, w) for w in windows)
    return layers + 2 * 96 * 48


@pytest.mark.parametrize("tied", [False, True])
def test_flops(tmp_path: Path, tied: bool) -> None:
    attention = {"head_dim": 16, "sliding_window": {"window": 8, "layers": [1]}}
    model = lower(make_spec(tmp_path, attention=attention, tie_word_embeddings=tied))
    for context in (1, 8, 9, 100):
        assert flops_per_token(model, context) == flops_by_hand(context, (context, 8, context))


def test_flops_of_an_embedding_model_have_no_head(tmp_path: Path) -> None:
    model = lower(make_spec(tmp_path, attention={"head_dim": 16}, lm_head=None, embedding={}))
    assert flops_per_token(model, 5) == flops_by_hand(5, (5, 5, 5)) - 2 * 96 * 48


def test_memory_of_one_rank(tmp_path: Path) -> None:
    model = qwen3(tmp_path, "qwen3-8b")
    found = memory(model, plan(model, 1), context=1000, batch=3)
    assert found.weights == weight_bytes(model)
    assert found.kv_pages == 3 * 63  # 62.5 pages a sequence, rounded up
    assert found.kv_cache == 3 * 63 * 16 * (2 * 8 * 128 * 36 * 2)
    rows, states, mlp = 4, 6 * 4096, 3 * 12288  # three sequences are served as four
    assert found.logits == rows * 151936 * (2 + 4)
    tables, indices = 2 * 64, 2 * 2048 + 3 * (63 + 2) + 1
    assert found.activations == 2048 * 2 * (states + mlp + tables) + 8 * indices
    assert found.total == sum([found.weights, found.kv_cache, found.logits, found.activations, found.graphs])


def test_memory_of_captured_steps(tmp_path: Path) -> None:
    """Of 1, 2 or 4 sequences with 16, 32 or 64 pages: inputs and logits of each, and the memory of the largest."""
    model = qwen3(tmp_path, "qwen3-8b")
    found = memory(model, plan(model, 1), context=1000, batch=3)
    steps = [(rows, pages) for rows in (1, 2, 4) for pages in (16, 32, 64)]
    inputs = sum(rows * 4096 * 2 + 8 * (2 * rows + rows * (pages + 2) + 1) for rows, pages in steps)
    logits = sum(rows * 151936 * 4 for rows, _ in steps)
    assert found.graphs == inputs + logits + 4 * (4096 * 2 + 151936 * 2)


@pytest.mark.parametrize(
    ("change", "bytes_of_a_row"),
    [
        ({}, 96 * 6),
        ({"tie_word_embeddings": True}, 96 * 6),
        ({"dtype": "float32"}, 96 * 4),
        ({"lm_head": None, "embedding": {"normalize": False}}, 48 * 4),
        ({"lm_head": None, "embedding": {"normalize": True}}, 2 * 48 * 4),
        ({"lm_head": {"dtype": "float32"}}, 96 * 4 + 48 * 4),
    ],
)
def test_logits(tmp_path: Path, change: dict[str, Any], bytes_of_a_row: int) -> None:
    model = lower(make_spec(tmp_path, **change))
    assert memory(model, plan(model, 1), context=8, batch=2).logits == 2 * bytes_of_a_row


def test_logits_that_are_gathered(tmp_path: Path) -> None:
    """Of 97 rows each of two ranks has 49. What both have is gathered and copied side by side, then to float32."""
    model = lower(make_spec(tmp_path, vocab_size=97))
    assert memory(model, plan(model, 2), context=8, batch=2).logits == 2 * (49 * 2 + 2 * 49 * 2 + 97 * 4)


def test_a_tied_head_in_another_dtype_casts_the_whole_embedding(tmp_path: Path) -> None:
    model = lower(make_spec(tmp_path, tie_word_embeddings=True, lm_head={"dtype": "float32"}))
    assert memory(model, plan(model, 1), context=8, batch=2).logits == 2 * (96 + 48) * 4 + 96 * 48 * 4


def test_memory_is_shared_by_ranks(tmp_path: Path) -> None:
    """Eight ranks hold an eighth each of what is split; at sixteen the KV heads repeat."""
    model = qwen3(tmp_path, "qwen3-32b")
    one, eight, sixteen = (memory(model, plan(model, n), context=4096, batch=2) for n in (1, 8, 16))
    norms = 2 * (64 * (2 * 5120 + 2 * 128) + 5120)
    assert 8 * (eight.weights - norms) == one.weights - norms
    assert 8 * eight.kv_cache == one.kv_cache
    assert sixteen.kv_cache == eight.kv_cache
    assert kv_bytes_per_token(model, plan(model, 16)) * 8 == kv_bytes_per_token(model)


@pytest.mark.parametrize(
    ("serve", "tokens", "sequences", "pages"),
    [
        ({"context": 10, "batch": 2}, 20, 2, 1),
        ({"context": 5000, "batch": 2, "prefill_chunk": 512}, 512, 1, 313),
    ],
)
def test_activations_of_prefill(tmp_path: Path, serve: dict[str, Any], tokens: int, sequences: int, pages: int) -> None:
    """A chunk, or the prompts if they are shorter; on two ranks, of which each has half of heads and MLP."""
    model = lower(make_spec(tmp_path, attention={"head_dim": 16}))
    found = memory(model, plan(model, 2), **serve)
    qkv, queries, mlp = (2 + 2 * 1) * 16, 2 * 16, 3 * 20
    indices = 2 * tokens + sequences * (pages + 2) + 1
    assert found.activations == tokens * 2 * (6 * 48 + max(qkv + 2 * queries, mlp) + 16) + 8 * indices


def test_activations_of_decode(tmp_path: Path) -> None:
    """Nine sequences that prefill 4 tokens at a time: a step of 16, and each one's keys in four parts, in float32."""
    model = lower(make_spec(tmp_path, attention={"head_dim": 16}))
    found = memory(model, plan(model, 1), context=100, batch=9, prefill_chunk=4)
    given = 9 * 48 * 2 + 8 * (2 * 9 + 9 * (7 + 2) + 1)
    inputs = 16 * 48 * 2 + 8 * (2 * 16 + 16 * (16 + 2) + 1)
    states, qkv, queries, parts = 4 * 48 * 2, (4 + 2 * 2) * 16 * 2, 4 * 16 * 2, 4 * 4 * (16 + 1) * 4
    assert found.activations == given + inputs + 16 * (16 * 2 + states + qkv + 2 * queries + parts)
