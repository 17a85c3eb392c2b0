"""The tensor-parallel plan: every rank together hold the model, and illegal degrees say why."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_specs import make_spec

from qwenspec.diagnostics import SpecError
from qwenspec.ir import shares
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model, Param, Shard
from qwenspec.ir.shard import Sharing, legal_degrees, obstacles, plan
from qwenspec.ir.shares import Part, Piece


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "held"),
    [
        (6, 3, 2, ((0, 0, 1), (1, 2, 2))),  # ranks cut a group of two: a head for each query head
        (12, 4, 2, ((0, 1), (2, 3))),
        (12, 4, 6, ((0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3))),
        (12, 2, 4, ((0,), (0,), (1,), (1,))),
        (28, 4, 7, ((0, 0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 2, 2), (2, 3, 3, 3), (3, 3, 3, 3))),
        (12, 2, 3, ((0, 0), (0, 1), (1, 1))),  # four query heads a rank, two for each of its heads
    ],
)
def test_any_degree_that_divides_the_query_heads(
    tmp_path: Path, heads: int, kv_heads: int, degree: int, held: tuple[tuple[int, ...], ...]
) -> None:
    found = plan(model_of(tmp_path, heads, kv_heads, width=40), degree)
    assert found.kv_head_indices == held
    assert found.num_kv_heads == len(held[0])
    readers = found.num_heads // found.num_kv_heads
    for rank, indices in enumerate(held):
        for local in range(found.num_heads):
            assert indices[local // readers] == (rank * found.num_heads + local) // (heads // kv_heads)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 50),
    st.integers(1, 99),
)
def test_the_ranks_hold_the_whole_model(
    tmp_path_factory: pytest.TempPathFactory, kv_heads: int, groups: int, width: int, vocab_size: int
) -> None:
    """Every row and column is on some rank, and on one alone but for repeated KV heads and replicated parameters."""
    heads = kv_heads * groups
    model = model_of(tmp_path_factory.getbasetemp(), heads, kv_heads, width, vocab_size)
    assert legal_degrees(model) == tuple(degree for degree in range(1, heads + 1) if heads % degree == 0)
    for degree in legal_degrees(model):
        for share in plan(model, degree).params:
            whole, held = share.param, Sharing(model).of(share.param)
            rows = [row for rank in range(degree) for row in rows_of(model, whole, degree, rank)]
            columns = [column for rank in range(degree) for column in columns_of(model, whole, degree, rank)]
            assert set(rows) == set(range(whole.shape[0]))
            assert set(columns) == set(range(whole.shape[1] if len(whole.shape) > 1 else 1))
            assert sum(part.rows for part in share.parts) == share.shape[0]
            for rank in range(degree):
                at = [(piece.at, piece.at + piece.stop - piece.start) for piece in held.row_pieces(degree, rank)]
                assert all(0 <= start < stop <= share.shape[0] for start, stop in at)
                assert all(before[1] <= after[0] for before, after in itertools.pairwise(at))
            match whole.shard:
                case Shard.REPLICATE:
                    assert share.shape == whole.shape
                    assert len(rows) == degree * whole.shape[0]
                case Shard.ROW:
                    assert share.shape[0] == whole.shape[0]
                    assert len(columns) == whole.shape[1] <= degree * share.shape[1]
                case Shard.VOCAB | Shard.FIRST:
                    assert len(rows) == whole.shape[0]
                case Shard.COLUMN:
                    repeated = [row for row in set(rows) if rows.count(row) > 1]
                    assert not repeated or whole.parts[0].name == "q"
                    assert all(row >= whole.parts[0].rows for row in repeated)  # keys and values alone


def test_rows_of_each_rank(tmp_path: Path) -> None:
    """8 query heads and 2 KV heads of 12, an MLP of 41 and 90 words, on 4 ranks."""
    model = model_of(tmp_path, heads=8, kv_heads=2, width=41)
    params = {param.name: Sharing(model).of(param) for param in model.params()}
    expected = {
        "layers.0.attention.qkv_proj.weight": [
            [Piece(0, 24, 0), Piece(96, 108, 24), Piece(120, 132, 36)],
            [Piece(24, 48, 0), Piece(96, 108, 24), Piece(120, 132, 36)],
            [Piece(48, 72, 0), Piece(108, 120, 24), Piece(132, 144, 36)],
            [Piece(72, 96, 0), Piece(108, 120, 24), Piece(132, 144, 36)],
        ],
        # 11 features a rank, and 8 on the last
        "layers.0.mlp.gate_up_proj.bias": [
            [Piece(0, 11, 0), Piece(41, 52, 11)],
            [Piece(11, 22, 0), Piece(52, 63, 11)],
            [Piece(22, 33, 0), Piece(63, 74, 11)],
            [Piece(33, 41, 0), Piece(74, 82, 11)],
        ],
        "layers.0.attention.o_proj.weight": [[Piece(0, 48, 0)]] * 4,
        "layers.0.attention.o_proj.bias": [[Piece(0, 48, 0)], [], [], []],
        "embed_tokens.weight": [[Piece(0, 23, 0)], [Piece(23, 46, 0)], [Piece(46, 69, 0)], [Piece(69, 90, 0)]],
    }
    for name, pieces in expected.items():
        assert [params[name].row_pieces(4, rank) for rank in range(4)] == pieces
    columns = {name: [params[name].column_piece(4, rank) for rank in range(4)] for name in params}
    inputs = [Piece(0, 24, 0), Piece(24, 48, 0), Piece(48, 72, 0), Piece(72, 96, 0)]
    assert columns["layers.0.attention.o_proj.weight"] == inputs
    assert columns["layers.0.mlp.down_proj.weight"][3] == Piece(33, 41, 0)
    assert columns["layers.0.attention.qkv_proj.weight"] == [Piece(0, 48, 0)] * 4


def test_a_vocabulary_smaller_than_the_ranks(tmp_path: Path) -> None:
    """5 words on 4 ranks, two a rank: the last rank has none."""
    model = model_of(tmp_path, heads=8, kv_heads=2, width=40, vocab_size=5)
    assert [rows_of(model, model.embed_tokens, 4, rank) for rank in range(4)] == [[0, 1], [2, 3], [4], []]


def test_units_are_not_cut() -> None:
    """A width of 100 in groups of 32, which are 32, 32, 32 and 4 wide."""
    part = Part(100, 32, 0)
    assert part.share(1) == 100
    assert [part.share(degree) for degree in (2, 3, 4, 8)] == [64, 64, 32, 32]
    assert [[list(held) for held in part.held(3, rank)] for rank in range(3)] == [
        [[*range(64)]],
        [[*range(64, 100)]],
        [[]],
    ]


def test_legal_degrees_of_real_sizes(tmp_path: Path) -> None:
    """Qwen2.5-0.5B (14 heads on 2, width 4864), Qwen2.5-7B (28 on 4, 18944), Qwen3-32B (64 on 8, 25600)."""
    assert legal_degrees(model_of(tmp_path, 14, 2, 4864)) == (1, 2, 7, 14)
    assert legal_degrees(model_of(tmp_path, 28, 4, 18944)) == (1, 2, 4, 7, 14, 28)
    assert legal_degrees(model_of(tmp_path, 64, 8, 25600)) == (1, 2, 4, 8, 16, 32, 64)


def test_absurdly_many_heads_are_no_work() -> None:
    """A package's manifest may say anything: divisors are found without counting to it."""
    heads = 2**40
    queries = shares.Shared("q", (heads, 1), rows=(shares.Part(heads, 1, 1),))
    assert shares.legal_degrees([queries]) == [2**power for power in range(41)]


def test_the_reason_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        plan(model_of(tmp_path, heads=8, kv_heads=4, width=40), 3)
    (problem,) = error.value.diagnostics
    assert problem.code == "tensor-parallel-degree"
    assert problem.message == "layers.*.attention.qkv_proj: 8 query heads cannot be shared evenly by 3 ranks"
    assert problem.hint == "degrees that work: 1, 2, 4, 8"


@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_counts_ranks(tmp_path: Path, degree: int) -> None:
    (problem,) = obstacles(model_of(tmp_path, heads=8, kv_heads=4, width=40), degree)
    assert f"found {degree}" in problem.message


def rows_of(model: Model, param: Param, degree: int, rank: int) -> list[int]:
    pieces = Sharing(model).of(param).row_pieces(degree, rank)
    return [row for piece in pieces for row in range(piece.start, piece.stop)]


def columns_of(model: Model, param: Param, degree: int, rank: int) -> range:
    piece = Sharing(model).of(param).column_piece(degree, rank)
    return range(piece.start, piece.stop)
