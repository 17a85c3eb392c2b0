"""What quantised weights weigh, and which tensor-parallel degrees their groups and blocks allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qwenspec
from qwenspec.diagnostics import SpecError
from qwenspec.ir import cost
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.ir.shard import legal_degrees, mlp_unit, plan, refused_by_format

SPECS = Path(__file__).parents[2] / "specs"


def quantized(folder: Path, variant: str, quantization: str, **architecture: Any) -> Model:
    """A released variant with another quantisation."""
    file = SPECS / ("qwen3.yaml" if variant.startswith("qwen3") else "qwen2_5.yaml")
    own = "".join(f", {key}: {value}" for key, value in architecture.items())
    text = f'schema_version: 1\nfamily: x\nextends: "{file}#{variant}"\nvariants:\n'
    (folder / "x.yaml").write_text(f"{text}  x: {{quantization: {quantization}{own}}}\n")
    return lower(qwenspec.load(folder / "x.yaml"))


# Qwen3-0.6B's layer: [4096, 1024] qkv, [1024, 2048] o, [6144, 1024] gate and up, [1024, 3072] down.
MATRICES = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
VALUES = sum(rows * columns for rows, columns in MATRICES)  # 15,728,640
ROWS = sum(rows for rows, _ in MATRICES)  # 12,288
NORMS = 28 * (2 * 1024 + 2 * 128) + 1024
HEAD = 151936 * 1024


@pytest.mark.parametrize(
    ("quantization", "layer", "head"),
    [
        ("{scheme: int8}", VALUES + 4 * ROWS, HEAD + 4 * 151936),
        ("{scheme: int8, head: none}", VALUES + 4 * ROWS, 2 * HEAD),
        ("{scheme: int4}", VALUES // 2 + 2 * VALUES // 32, HEAD + 4 * 151936),
        ("{scheme: int4, group_size: 64, head: int4}", VALUES // 2 + 2 * VALUES // 64, HEAD // 2 + 2 * HEAD // 64),
        ("{scheme: awq}", VALUES // 2 + 3 * VALUES // 128, 2 * HEAD),
        ("{scheme: gptq, bits: 8}", VALUES + 2 * VALUES // 128, 2 * HEAD),
        ("{scheme: gptq, bits: 4, sym: false, group_size: -1}", VALUES // 2 + 3 * ROWS, 2 * HEAD),
        # each of q, k, v and of gate, up has an order of its own
        (
            "{scheme: gptq, bits: 4, desc_act: true}",
            VALUES // 2 + 2 * VALUES // 128 + 4 * (5 * 1024 + 2048 + 3072),
            2 * HEAD,
        ),
        ("{scheme: fp8_block}", VALUES + 4 * VALUES // 128**2, 2 * HEAD),
        # a matrix's scale is each of its rows' in memory; q, k, v, o, gate, up and down have an input scale each
        ("{scheme: fp8, activations: none}", VALUES + 4 * ROWS, 2 * HEAD),
        ("{scheme: fp8, scales: channel}", VALUES + 4 * ROWS, 2 * HEAD),
        ("{scheme: fp8, scales: tensor}", VALUES + 4 * ROWS, 2 * HEAD),
        ("{scheme: fp8, scales: channel, activations: static}", VALUES + 4 * ROWS + 4 * 7, 2 * HEAD),
        ("{scheme: fp8, scales: tensor, activations: static}", VALUES + 4 * ROWS + 4 * 7, 2 * HEAD),
        # scales may be bfloat16, and are float32 in memory
        ("{scheme: pack_quantized, bits: 4}", VALUES // 2 + 4 * VALUES // 128, 2 * HEAD),
        ("{scheme: pack_quantized, bits: 4, sym: false}", VALUES // 2 + 5 * VALUES // 128, 2 * HEAD),
        ("{scheme: pack_quantized, bits: 8, group_size: -1}", VALUES + 4 * ROWS, 2 * HEAD),
        (
            "{scheme: pack_quantized, bits: 4, desc_act: true}",
            VALUES // 2 + 4 * VALUES // 128 + 4 * (5 * 1024 + 2048 + 3072),
            2 * HEAD,
        ),
    ],
)
def test_weight_bytes(tmp_path: Path, quantization: str, layer: int, head: int) -> None:
    model = quantized(tmp_path, "qwen3-0.6b", quantization)
    assert cost.weight_bytes(model) == 28 * layer + head + 2 * NORMS


def test_a_skipped_module_has_the_bytes_of_full_precision(tmp_path: Path) -> None:
    skip = "skip: [model.layers.3.self_attn.k_proj, model.layers.3.mlp.down_proj]"
    whole = cost.weight_bytes(quantized(tmp_path, "qwen3-0.6b", "{scheme: int8}"))
    partly = cost.weight_bytes(quantized(tmp_path, "qwen3-0.6b", f"{{scheme: int8, {skip}}}"))
    values, rows = 1024 * 1024 + 1024 * 3072, 2 * 1024
    assert partly - whole == values - 4 * rows


def test_ranks_share_what_is_quantised(tmp_path: Path) -> None:
    """Two ranks: half of every matrix and of its scales; the norms are whole."""
    model = quantized(tmp_path, "qwen3-0.6b", "{scheme: int4, group_size: 32, head: int4}")
    one, two = (cost.memory(model, plan(model, degree), context=16, batch=1).weights for degree in (1, 2))
    assert 2 * (two - 2 * NORMS) == one - 2 * NORMS


def test_ranks_share_rows_and_their_scales(tmp_path: Path) -> None:
    """Two ranks of fp8: of o and down, whose inputs are shared, each has all rows, and so all of their scales."""
    model = quantized(tmp_path, "qwen3-0.6b", "{scheme: fp8, scales: tensor, activations: static}")
    scales = (4096 + 6144) // 2 + 1024 + 1024 + 7
    held = 28 * (VALUES // 2 + 4 * scales) + HEAD + 2 * NORMS
    assert cost.memory(model, plan(model, 2), context=16, batch=1).weights == held


@pytest.mark.parametrize(
    ("variant", "quantization", "legal", "refused"),
    [
        # 29568 inputs of down_proj are 231 groups of 128; o_proj has 64 heads of 128 inputs
        ("qwen2.5-72b", "{scheme: awq}", (1, 2, 4, 8, 16, 32, 64), {}),
        ("qwen2.5-72b", "{scheme: gptq, bits: 8}", (1, 2, 4, 8, 16, 32, 64), {}),
        ("qwen2.5-72b", "{scheme: gptq, bits: 4, group_size: -1}", (1, 2, 4, 8, 16, 32, 64), {}),
        ("qwen2.5-72b", "{scheme: fp8_block}", (1, 2, 4, 8, 16, 32, 64), {}),
        ("qwen3-0.6b", "{scheme: fp8_block}", (1, 2, 4, 8, 16), {}),
        ("qwen3-0.6b", "{scheme: awq, group_size: 256}", (1, 2, 4, 8), {16: "o_proj: 128 inputs on each of 16 ranks"}),
        ("qwen3-0.6b", "{scheme: gptq, bits: 4, desc_act: true}", (1,), {2: "o_proj: desc_act"}),
        ("qwen3-0.6b", "{scheme: pack_quantized, bits: 4, desc_act: true}", (1,), {2: "o_proj: desc_act"}),
        ("qwen3-0.6b", "{scheme: fp8, activations: static}", (1, 2, 4, 8, 16), {}),
        ("qwen3-0.6b", "{scheme: fp8, scales: tensor}", (1,), {2: "o_proj: a token's inputs share a scale"}),
        # 14 heads of 64
        ("qwen2.5-0.5b", "{scheme: int8}", (1, 2, 7, 14), {}),
        ("qwen2.5-0.5b", "{scheme: int4, group_size: 64}", (1, 2, 7, 14), {}),
        ("qwen2.5-0.5b", "{scheme: int4, group_size: 128}", (1, 7), {2: "o_proj: 448 inputs", 14: "o_proj: 64 inputs"}),
    ],
)
def test_degrees(
    tmp_path: Path, variant: str, quantization: str, legal: tuple[int, ...], refused: dict[int, str]
) -> None:
    model = quantized(tmp_path, variant, quantization)
    found = refused_by_format(model)
    assert legal_degrees(model) == legal
    assert not set(found) & set(legal)
    for degree, said in refused.items():
        assert any(said in reason for reason in found[degree]), found[degree]
        with pytest.raises(SpecError, match=r"multiple|cut|desc_act|share a scale"):
            plan(model, degree)
    if not refused:
        assert not found


def test_the_mlp_is_cut_between_groups(tmp_path: Path) -> None:
    """Of 231 groups of 128 each of two ranks has room for 116, of 8 ranks for 29."""
    model = quantized(tmp_path, "qwen2.5-72b", "{scheme: awq}")
    assert mlp_unit(model) == 128
    assert [plan(model, degree).intermediate_size for degree in (1, 2, 8)] == [29568, 116 * 128, 29 * 128]


def test_a_part_that_ranks_would_cut(tmp_path: Path) -> None:
    """Heads of 64 values: a rank with one key head would have half a block of rows."""
    model = quantized(tmp_path, "qwen2.5-0.5b", "{scheme: fp8_block, block: [64, 64]}")
    assert legal_degrees(model) == (1, 2, 7, 14)
    model = quantized(tmp_path, "qwen2.5-0.5b", "{scheme: fp8_block, block: [128, 64]}")
    assert "qkv_proj: 2 ranks would cut its blocks of 128 rows" in " ".join(refused_by_format(model)[2])


@pytest.mark.parametrize(
    ("kv_cache", "of_a_head"),
    [
        ("null", 256),
        ("{scheme: fp8_e4m3}", 132),
        ("{scheme: int8}", 132),
        ("{scheme: fp8_e4m3, scales: checkpoint}", 128),
    ],
)
def test_bytes_of_a_cached_token(tmp_path: Path, kv_cache: str, of_a_head: int) -> None:
    """28 layers, keys and values of 8 heads of 128: about half of bfloat16's bytes."""
    text = f'schema_version: 1\nfamily: x\nextends: "{SPECS}/qwen3.yaml#qwen3-0.6b"\n'
    (tmp_path / "x.yaml").write_text(f"{text}kv_cache: {kv_cache}\nvariants: {{x: {{}}}}\n")
    model = lower(qwenspec.load(tmp_path / "x.yaml"))
    assert cost.kv_bytes_per_token(model) == 28 * 2 * 8 * of_a_head
    assert cost.kv_bytes_per_token(model, plan(model, 2)) == 28 * 2 * 4 * of_a_head
    stored = [param.name for param in model.params() if param.name.endswith("_scale")]
    assert len(stored) == (56 if "checkpoint" in kv_cache else 0)
