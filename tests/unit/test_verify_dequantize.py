"""What quantised tensors mean: values worked out by hand from each format's description, and Hugging Face's own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Fp8Block, Gptq, Int4, Int8
from qwenspec.verify.dequantize import (
    E4M3_VALUES,
    Dequantized,
    QuantizedMatrix,
    awq_weight,
    fp8_weight,
    gptq_weight,
    int4_weight,
    quantized_matrices,
    rounded_activations,
    rounded_to_e4m3,
)
from qwenspec.verify.reference import Reference
from qwenspec.verify.strategies import spec_of
from qwenspec.verify.weights import random_weights
from unit.test_verify_drawing import SMALLEST

Array = npt.NDArray[Any]
NOISE = np.random.default_rng(0)


def words(*rows: list[int]) -> npt.NDArray[np.int32]:
    return np.array(rows, np.uint32).view(np.int32)


def half(*rows: list[float]) -> npt.NDArray[np.float16]:
    return np.array(rows, np.float16)


def same(found: Array, expected: Any) -> None:
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.array(expected, np.float64))


# ------------------------------------------------------------------------------------------------- by hand


def test_awq() -> None:
    """4 inputs in groups of 2, 8 outputs. Outputs 0 … 7 of a word are its nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    qweight = words([0x86427531], [0x00000000], [0xFFFFFFFF], [0x0000000F])
    qzeros = words([0x00000010], [0x88888888])  # output 2 has 1, the others 0; then all have 8
    scales = half([1, 2, 1, 1, 1, 1, 1, 0.5], [1, 1, 1, 1, 1, 1, 1, 4])
    weight = awq_weight(qweight, qzeros, scales, group_size=2)
    same(weight[:, 0], [1, 2 * 2, 3 - 1, 4, 5, 6, 7, 8 / 2])
    same(weight[:, 1], [0, 0, -1, 0, 0, 0, 0, 0])
    same(weight[:, 2], [7, 7, 7, 7, 7, 7, 7, 4 * 7])
    same(weight[:, 3], [7, -8, -8, -8, -8, -8, -8, -32])


def gptq(stored: dict[str, Array], **options: Any) -> Array:
    scheme = Gptq(scheme="gptq", **{"bits": 4, "group_size": 4, **options})
    rows, columns = stored["scales"].shape[1], len(stored["qweight"]) * 32 // scheme.bits
    return QuantizedMatrix(scheme, rows, columns).dequantized(stored)


# 8 outputs, 8 inputs in groups of 4: output 0 has 1 … 8, output 1 has 15 and then zeros, others zeros.
GPTQ = {
    "qweight": words([0x87654321, 0x0000000F, 0, 0, 0, 0, 0, 0]),
    "qzeros": words([0x77777702], [0x777777F7]),
    "scales": half([1, 2, 1, 1, 1, 1, 1, 1], [0.5, 4, 1, 1, 1, 1, 1, 1]),
}


def test_gptq_stores_zero_points_minus_one() -> None:
    weight = gptq(GPTQ, sym=False)  # 3 and 1, then 8 and 16
    same(weight[0], [-2, -1, 0, 1, -1.5, -1, -0.5, 0])
    same(weight[1], [28, -2, -2, -2, -64, -64, -64, -64])
    same(weight[2], [-8] * 8)


def test_gptq_v2_stores_zero_points_as_they_are() -> None:
    weight = gptq(GPTQ, sym=False, checkpoint_format="gptq_v2")  # 2 and 0, then 7 and 15
    same(weight[0], [-1, 0, 1, 2, -1, -0.5, 0, 0.5])
    same(weight[1], [30, 0, 0, 0, -60, -60, -60, -60])
    same(weight[2], [-7] * 8)


def test_gptq_s_groups_are_those_of_g_idx() -> None:
    group = np.array([1, 0, 0, 1, 1, 0, 1, 0], np.int32)
    weight = gptq({**GPTQ, "g_idx": group}, desc_act=True)
    same(weight[0], [-3.5, -1, 0, -2, -1.5, 3, -0.5, 5])
    # whatever the file says is honoured, even where the spec says nothing of it
    same(gptq({**GPTQ, "g_idx": group}), weight)
    same(gptq({**GPTQ, "g_idx": np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)}), gptq(GPTQ))


def test_gptq_in_one_group_and_in_ragged_ones() -> None:
    one = {name: tensor[:1] for name, tensor in GPTQ.items()}
    same(gptq(one, group_size=-1)[0], [-2, -1, 0, 1, 2, 3, 4, 5])
    same(gptq(GPTQ, group_size=5)[0], [-2, -1, 0, 1, 2, -1, -0.5, 0])


def test_gptq_of_8_bits() -> None:
    stored = {
        "qweight": words([0xFF028001, 0, 0x7F, 0]),  # output 0: 1, 128, 2, 255
        "qzeros": words([0xFF007F7F]),  # 128, 128, 1, 256
        "scales": half([0.5, 1, 1, 1]),
    }
    weight = gptq(stored, bits=8, group_size=-1)
    same(weight[0], [-63.5, 0, -63, 63.5])
    same(weight[1], [-128] * 4)
    same(weight[2], [126, -1, -1, -1])
    same(weight[3], [-256] * 4)


def test_int8() -> None:
    stored = {"qweight": np.array([[1, -127], [3, 0]], np.int8), "scales": np.array([0.5, 2], np.float32)}
    same(QuantizedMatrix(Int8(scheme="int8"), 2, 2).dequantized(stored), [[0.5, -63.5], [6, 0]])


def test_int4() -> None:
    """The low nibble is the even input; three inputs in groups of 2, and the last nibble is nobody's."""
    stored = {"qweight": np.array([[0x1F, 0xF9], [0x88, 0x08]], np.uint8), "scales": half([1, 0.5], [2, 4])}
    matrix = QuantizedMatrix(Int4(scheme="int4", group_size=2), 2, 3)
    same(matrix.dequantized(stored), [[7, -7, 0.5], [0, 0, 0]])
    same(int4_weight(stored["qweight"], stored["scales"], 4, 2), [[7, -7, 0.5, 3.5], [0, 0, 0, -32]])


def test_fp8() -> None:
    """3 outputs, 3 inputs in blocks of 2 × 2: scales multiply, and those at the edges count too."""
    weight = np.array([[0x38, 0xC0, 0x38], [0x01, 0x7E, 0xB8], [0x30, 0x00, 0x08]], np.uint8)
    scales = np.array([[2, 4], [8, 16]], np.float32)
    expected = [[2, -4, 4], [2 * 2**-9, 896, -4], [4, 0, 2**-2]]
    same(fp8_weight(weight.view(ml_dtypes.float8_e4m3fn), scales, (2, 2)), expected)
    same(fp8_weight(weight, scales.astype(ml_dtypes.bfloat16), (2, 2)), expected)


# --------------------------------------------------------------------------------------------------- e4m3


def test_the_values_of_e4m3() -> None:
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.isnan(E4M3_VALUES).sum() == 2
    np.testing.assert_array_equal(E4M3_VALUES, expected)
    assert np.signbit(E4M3_VALUES[0x80])


def test_rounding_to_e4m3() -> None:
    """Every value, every middle between two, and the float32 numbers next to each; and all that float16 has."""
    finite = np.unique(E4M3_VALUES[np.isfinite(E4M3_VALUES)])
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    sides = [np.nextafter(points, np.float32(towards)) for towards in (-np.inf, np.inf)]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    tiny = np.float32(2.0) ** np.arange(-149, 0, dtype=np.float32)
    x = np.concatenate([points, *sides, halves[np.isfinite(halves)], tiny, -tiny])
    saturated = np.clip(x, -448, 448)  # ml_dtypes makes NaN of what is far beyond
    expected = saturated.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    found = rounded_to_e4m3(x.astype(np.float64))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_rounding_beyond_the_largest_and_of_nan() -> None:
    same(rounded_to_e4m3(np.array([463.9, 464, 1e30, np.inf, -np.inf])), [448, 448, 448, 448, -448])
    assert np.isnan(rounded_to_e4m3(np.array([np.nan]))).all()


def test_activations_are_rounded_with_a_scale_a_group() -> None:
    x = np.array([[448.0, 17, -3.2, 0, 0, 0.0625], [7.0, 0.3, 7 * 17 / 448, 0, 0, 0]])
    same(rounded_activations(x, 3)[0], [448, 16, -3.25, 0, 0, 0.0625])  # 0.0625 is the largest of its group
    found = rounded_activations(x, 4)
    same(found[0], [448, 16, -3.25, 0, 0, 0.0625])
    np.testing.assert_allclose(
        found[1], [7, 20 * 7 / 448 * 0.9375 + 0.3 * 0 + 7 / 448 * 0.45, 0.25, 0, 0, 0], atol=0.03
    )
    assert found[1][0] == 7
    assert found[1][2] == 16 * (7 / 448)


def test_activations_that_are_multiples_of_their_scale_stay() -> None:
    grid = E4M3_VALUES[np.isfinite(E4M3_VALUES)]
    x = np.stack([NOISE.permutation(grid) for _ in range(4)]) * 2.0 ** np.array([[0], [3], [-5], [-20]])
    x[:, ::16] = 448 * 2.0 ** np.array([[0], [3], [-5], [-20]])
    same(rounded_activations(x, 16), x)


# ---------------------------------------------------------------------------------------------- hugging face


@pytest.mark.parametrize("block", [(128, 128), (16, 32), (32, 8)])
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (5, 7), (16, 33), (129, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_hugging_face_s_bit_for_bit(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks at the edges too. A product of e4m3 and bfloat16 fits float32, and of any float32 it is rounded once."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).mul(100).to(torch.float8_e4m3fn)
    grid = [-(-size // side) for size, side in zip(shape, block, strict=True)]
    scales = (torch.rand(grid, generator=generator) * 0.01).to(dtype)
    theirs = _dequantize_fp8_weight(weight, scales, list(block), torch.float32).numpy()
    raw = scales.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else scales.numpy()
    ours = fp8_weight(weight.view(torch.uint8).numpy(), raw, block)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs)
    if dtype == torch.bfloat16:
        same(ours, theirs)


# --------------------------------------------------------------------------------------- which modules, and how


def small(quantization: dict[str, Any] | None, **changes: Any) -> Spec:
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "attention": {"head_dim": 8}}
    return spec_of(SMALLEST | sizes | changes, quantization)


def test_what_a_spec_quantises() -> None:
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    linears = [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in (*(f"self_attn.{part}" for part in attention), *(f"mlp.{part}" for part in mlp))
    ]
    assert quantized_matrices(small(None)) == {}
    for scheme in ({"scheme": "fp8_block"}, {"scheme": "int8", "head": "none"}, {"scheme": "int4", "head": "none"}):
        assert list(quantized_matrices(small(scheme))) == linears
    found = quantized_matrices(small({"scheme": "int4", "group_size": 8, "head": "int8"}))
    assert list(found) == [*linears, "lm_head"]
    assert (found["lm_head"].rows, found["lm_head"].columns, found["lm_head"].scheme.scheme) == (11, 24, "int8")
    assert (found["model.layers.1.mlp.down_proj"].rows, found["model.layers.1.mlp.down_proj"].columns) == (24, 16)
    assert (found["model.layers.0.self_attn.o_proj"].rows, found["model.layers.0.self_attn.o_proj"].columns) == (24, 8)
    tied = quantized_matrices(small({"scheme": "int4", "group_size": 8, "head": "int4"}, tie_word_embeddings=True))
    assert tied["model.embed_tokens"].scheme.scheme == "int4"
    assert "lm_head" not in tied
    embedding = small({"scheme": "int8"}, lm_head=None, embedding={}, tie_word_embeddings=True)
    assert list(quantized_matrices(embedding)) == linears
    fused = small({"scheme": "fp8_block"}, checkpoint={"layout": "qwen1"})
    assert quantized_matrices(fused)["transformer.h.0.attn.c_attn"].rows == 24
    skip = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    assert list(quantized_matrices(small({"scheme": "fp8_block", "skip": skip}))) == [
        name for name in linears if name not in skip
    ]


DOWN = "model.layers.0.mlp.down_proj"


def test_a_quantised_checkpoint_is_read_a_tensor_at_a_time() -> None:
    spec = small({"scheme": "int8", "head": "none"})
    weights: dict[str, Array] = dict(random_weights(spec, 0))
    for module, matrix in quantized_matrices(spec).items():
        del weights[f"{module}.weight"]
        weights[f"{module}.qweight"] = NOISE.integers(-127, 128, (matrix.rows, matrix.columns)).astype(np.int8)
        weights[f"{module}.scales"] = np.full(matrix.rows, 0.01, np.float32)
    read = Dequantized(spec, weights)
    assert set(read) == set(random_weights(spec, 0))
    assert len(read) == len(list(read))
    same(read[f"{DOWN}.weight"], weights[f"{DOWN}.qweight"] * np.float64(np.float32(0.01)))
    assert read["model.norm.weight"] is weights["model.norm.weight"]
    assert np.isfinite(Reference(spec, read).logits([1, 2, 3])).all()


def test_a_tensor_that_is_missing_or_mis_shaped_is_named() -> None:
    spec = small({"scheme": "gptq", "bits": 4, "group_size": 8})
    with pytest.raises(KeyError, match=f"{DOWN}.qweight"):
        Dequantized(spec, {})[f"{DOWN}.weight"]
    stored: dict[str, Array] = {
        f"{DOWN}.qweight": np.zeros((2, 24), np.int32),
        f"{DOWN}.qzeros": np.zeros((2, 3), np.int32),
        f"{DOWN}.scales": np.ones((3, 24), np.float16),
    }
    with pytest.raises(ValueError, match=rf"{DOWN}.scales has shape \(3, 24\), the spec says \(2, 24\)"):
        Dequantized(spec, stored)[f"{DOWN}.weight"]
    stored[f"{DOWN}.scales"] = np.ones((2, 24), np.float16)
    same(Dequantized(spec, stored)[f"{DOWN}.weight"], np.full((24, 16), -1))
    in_order = small({"scheme": "gptq", "bits": 4, "group_size": 8, "desc_act": True})
    with pytest.raises(KeyError, match=f"{DOWN}.g_idx"):
        Dequantized(in_order, stored)[f"{DOWN}.weight"]


def test_the_reference_rounds_the_inputs_of_quantised_modules_alone() -> None:
    weights = random_weights(small(None), 0)

    def taps(activations: str, *skip: str) -> dict[str, Array]:
        scheme = {"scheme": "fp8_block", "block": [8, 8], "activations": activations, "skip": list(skip)}
        return Reference(small(scheme), weights).taps([1, 2, 3])

    plain, everywhere = taps("none"), taps("dynamic")
    x = plain["layers.0.input_norm"]
    same(everywhere["layers.0.input_norm"], x)
    parts = [weights[f"model.layers.0.self_attn.{part}_proj.weight"].astype(np.float64) for part in "qkv"]
    rounded = rounded_activations(x, 8)
    assert not np.array_equal(rounded, x)
    same(everywhere["layers.0.attention.qkv_proj"], np.concatenate([rounded @ part.T for part in parts], axis=-1))
    without_k = taps("dynamic", "model.layers.0.self_attn.k_proj")
    inputs = (rounded, x, rounded)
    expected = np.concatenate([x @ part.T for x, part in zip(inputs, parts, strict=True)], axis=-1)
    same(without_k["layers.0.attention.qkv_proj"], expected)


def test_a_fused_module_rounds_for_all_its_parts() -> None:
    weights = random_weights(small(None, checkpoint={"layout": "qwen1"}), 0)
    scheme = {"scheme": "fp8_block", "block": [8, 5]}
    found = Reference(small(scheme, checkpoint={"layout": "qwen1"}), weights).taps([1, 2])
    fused = weights["transformer.h.0.attn.c_attn.weight"].astype(np.float64)
    expected = rounded_activations(found["layers.0.input_norm"], 5) @ fused.T
    np.testing.assert_allclose(found["layers.0.attention.qkv_proj"], expected, rtol=1e-13)


def test_group_sizes() -> None:
    assert QuantizedMatrix(Gptq(scheme="gptq", bits=4, group_size=-1), 8, 40).group_size == 40
    assert QuantizedMatrix(Fp8Block(scheme="fp8_block", block=(16, 32)), 8, 40).group_size == 32
    assert QuantizedMatrix(Int8(scheme="int8"), 8, 40).group_size == 40


def test_gptq_weight_has_any_group_numbers() -> None:
    """A g_idx that gives groups other numbers of inputs than others is honoured too."""
    group = np.array([1, 1, 1, 1, 1, 0, 1, 1], np.int32)
    weight = gptq_weight(GPTQ["qweight"], GPTQ["qzeros"], GPTQ["scales"], group, bits=4, one_less=True)
    same(weight[0], [-3.5, -3, -2.5, -2, -1.5, 3, -0.5, 0])
