"""The tensor-parallel plan: every rank together hold the model, and illegal degrees say why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_specs import make_spec

from qwenspec.diagnostics import SpecError
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model, Shard
from qwenspec.ir.shard import columns_of, legal_degrees, obstacles, plan, rows_of


def model_of(folder: Path, heads: int, kv_heads: int, width: int, vocab_size: int = 90, head_dim: int = 12) -> Model:
    spec = make_spec(
        folder,
        vocab_size=vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        attention={"head_dim": head_dim, "qk_norm": "per_head", "bias": {"qkv": True, "output": True}},
        mlp={"bias": True},
        num_hidden_layers=2,
    )
    return lower(spec)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_query_head_finds_its_key_value_head(tmp_path: Path, kv_heads: int, degree: int) -> None:
    """On each rank local query head j reads local KV head j // (heads / KV heads of the rank)."""
    found = plan(model_of(tmp_path, heads=8, kv_heads=kv_heads, width=40), degree)
    assert len(found.kv_head_indices) == degree
    assert {head for held in found.kv_head_indices for head in held} == set(range(kv_heads))
    group = found.num_heads // found.num_kv_heads
    for rank, held in enumerate(found.kv_head_indices):
        assert len(held) == found.num_kv_heads
        for local in range(found.num_heads):
            query_head = rank * found.num_heads + local
            assert held[local // group] == query_head // (8 // kv_heads)


def test_shapes(tmp_path: Path) -> None:
    """8 query heads and 2 KV heads of 12 on 4 ranks: 2 query heads and one of the KV heads each."""
    found = plan(model_of(tmp_path, heads=8, kv_heads=2, width=40), 4)
    shapes = {share.param.name.removeprefix("layers.1."): share.shape for share in found.params}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("layers")} == {
        "embed_tokens.weight": (23, 48),
        "input_norm.weight": (48,),
        "attention.qkv_proj.weight": (24 + 12 + 12, 48),
        "attention.qkv_proj.bias": (48,),
        "attention.q_norm.weight": (12,),
        "attention.k_norm.weight": (12,),
        "attention.o_proj.weight": (48, 24),
        "attention.o_proj.bias": (48,),
        "post_attention_norm.weight": (48,),
        "mlp.gate_up_proj.weight": (10 + 10, 48),
        "mlp.gate_up_proj.bias": (20,),
        "mlp.down_proj.weight": (48, 10),
        "mlp.down_proj.bias": (48,),
        "norm.weight": (48,),
        "lm_head.weight": (23, 48),
    }
    assert (found.vocab_size, found.intermediate_size) == (23, 10)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 50),
    st.integers(1, 99),
)
def test_the_ranks_hold_the_whole_model(
    tmp_path_factory: pytest.TempPathFactory, kv_heads: int, groups: int, width: int, vocab_size: int
) -> None:
    """Exactly, but for repeated KV heads, padded vocabulary and replicated parameters."""
    model = model_of(tmp_path_factory.getbasetemp(), kv_heads * groups, kv_heads, width, vocab_size)
    legal = legal_degrees(model)
    assert 1 in legal
    for degree in range(1, kv_heads * groups + 1):
        if degree not in legal:
            assert obstacles(model, degree)
            continue
        for share in plan(model, degree).params:
            whole, rows = share.param, degree * share.shape[0]
            assert sum(part.rows for part in share.parts) == share.shape[0]
            held = [rows_of(whole, degree, rank) for rank in range(degree)]
            assert {row for ranges in held for block in ranges for row in block} == set(range(whole.shape[0]))
            if whole.shard is not Shard.VOCAB:
                parts = [part.rows for part in share.parts]
                assert all([len(block) for block in ranges] == parts for ranges in held)
            if len(whole.shape) == 2:
                columns = [columns_of(whole, degree, rank) for rank in range(degree)]
                assert {column for block in columns for column in block} == set(range(whole.shape[1]))
                assert all(len(block) == share.shape[1] for block in columns)
            match whole.shard:
                case Shard.REPLICATE:
                    assert share.shape == whole.shape
                case Shard.ROW:
                    assert (share.shape[0], degree * share.shape[1]) == whole.shape
                case Shard.VOCAB:
                    assert whole.shape[0] <= rows < whole.shape[0] + degree
                case Shard.COLUMN:
                    repeated = sum(
                        degree * held.rows - part.rows
                        for held, part in zip(share.parts, whole.parts, strict=True)
                        if part.name in ("k", "v")
                    )
                    assert rows == whole.shape[0] + repeated
                    assert (repeated > 0) == (degree > kv_heads and whole.parts[0].name == "q")


def test_rows_of_each_rank(tmp_path: Path) -> None:
    """8 query heads and 2 KV heads of 12, an MLP of 40 and 90 words, on 4 ranks."""
    params = {param.name: param for param in model_of(tmp_path, heads=8, kv_heads=2, width=40).params()}
    expected = {
        "layers.0.attention.qkv_proj.weight": [
            (range(24), range(96, 108), range(120, 132)),
            (range(24, 48), range(96, 108), range(120, 132)),
            (range(48, 72), range(108, 120), range(132, 144)),
            (range(72, 96), range(108, 120), range(132, 144)),
        ],
        "layers.0.mlp.gate_up_proj.bias": [
            (range(10 * r, 10 * r + 10), range(40 + 10 * r, 50 + 10 * r)) for r in range(4)
        ],
        "layers.0.attention.o_proj.weight": [(range(48),)] * 4,
        "layers.0.attention.o_proj.bias": [(range(48),)] * 4,
        "embed_tokens.weight": [(range(23),), (range(23, 46),), (range(46, 69),), (range(69, 90),)],
    }
    for name, rows in expected.items():
        assert [rows_of(params[name], 4, rank) for rank in range(4)] == rows
    columns = [columns_of(params["layers.0.attention.o_proj.weight"], 4, rank) for rank in range(4)]
    assert columns == [range(24), range(24, 48), range(48, 72), range(72, 96)]
    assert columns_of(params["layers.0.attention.qkv_proj.weight"], 4, 3) == range(48)


def test_a_vocabulary_smaller_than_the_ranks(tmp_path: Path) -> None:
    """5 words on 4 ranks, two a rank: the last rank has none."""
    embedding = model_of(tmp_path, heads=8, kv_heads=2, width=40, vocab_size=5).embed_tokens
    assert [list(rows_of(embedding, 4, rank)[0]) for rank in range(4)] == [[0, 1], [2, 3], [4], []]


def test_legal_degrees_of_real_sizes(tmp_path: Path) -> None:
    """Qwen2.5-0.5B (14 heads on 2, width 4864), Qwen2.5-7B (28 on 4, 18944), Qwen3-32B (64 on 8, 25600)."""
    assert legal_degrees(model_of(tmp_path, 14, 2, 4864)) == (1, 2)
    assert legal_degrees(model_of(tmp_path, 28, 4, 18944)) == (1, 2, 4)
    assert legal_degrees(model_of(tmp_path, 64, 8, 25600)) == (1, 2, 4, 8, 16, 32, 64)


def test_every_reason_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        plan(model_of(tmp_path, heads=8, kv_heads=4, width=40), 3)
    diagnostics = error.value.diagnostics
    assert {diagnostic.code for diagnostic in diagnostics} == {"tensor-parallel-degree"}
    assert [diagnostic.message.split(":")[0] for diagnostic in diagnostics] == [
        "layers.*.attention.qkv_proj",
        "layers.*.attention.qkv_proj",
        "layers.*.mlp.gate_up_proj and down_proj",
    ]
    for diagnostic, size in zip(diagnostics, ("8 query heads", "4 key/value heads", "width 40"), strict=True):
        assert size in diagnostic.message
        assert "3 ranks" in diagnostic.message
        assert diagnostic.hint == "degrees that work: 1, 2, 4, 8"


def test_only_the_broken_rule_is_named(tmp_path: Path) -> None:
    (problem,) = obstacles(model_of(tmp_path, heads=12, kv_heads=4, width=48), 6)
    assert "4 key/value heads" in problem.message
    (problem,) = obstacles(model_of(tmp_path, heads=12, kv_heads=4, width=42), 4)
    assert "width 42" in problem.message


@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_counts_ranks(tmp_path: Path, degree: int) -> None:
    (problem,) = obstacles(model_of(tmp_path, heads=8, kv_heads=4, width=40), degree)
    assert f"found {degree}" in problem.message
