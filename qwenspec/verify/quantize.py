"""Quantised tensors of given weights, as the official tools lay them out: rounded to nearest, and with whatever their
formats allow and those tools seldom write (any zero point, any order of groups, scales too small for normal float16).

Nothing here is shared with `qwenspec.ir` or with what the packages load by; `qwenspec.verify.dequantize` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Awq, Fp8, Fp8Block, Gptq, Int4, Int8, PackQuantized
from qwenspec.verify.dequantize import QuantizedMatrix, quantized_matrices

Tensor = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of 8 columns goes in its word
_ODD_ZERO_POINTS = 1 / 16  # the share that is anything that the format can say, not only near the middle


def quantized(spec: Spec, weights: Mapping[str, Float32], seed: int) -> dict[str, Tensor]:
    """The checkpoint tensors of a spec with these weights: of its quantised modules what their format stores, in its
    dtypes, and the others as they are. A module's draws follow from the seed and its name alone."""
    matrices = quantized_matrices(spec)
    found: dict[str, Tensor] = {}
    for name, values in weights.items():
        module = name.removesuffix(".weight")
        if module not in matrices or module == name:
            found[name] = values
            continue
        draw = np.random.default_rng([seed, crc32(f"{module} quantized".encode())])
        found |= {f"{module}.{suffix}": tensor for suffix, tensor in _stored(matrices[module], values, draw).items()}
        # GPTQ's files may have a bias of zeros where the model has none.
        if isinstance(matrices[module].scheme, Gptq) and f"{module}.bias" not in weights and draw.random() < 0.5:
            found[f"{module}.bias"] = np.zeros(len(values), np.float16)
    return found


def _stored(matrix: QuantizedMatrix, w: Float32, draw: np.random.Generator) -> dict[str, Tensor]:
    """The tensors of a weight [N, K], by suffix."""
    match matrix.scheme:
        case Fp8Block(block=block):
            return _fp8(w, block, draw)
        case Fp8():
            return _fp8_rows(matrix.scheme, w, draw)
        case Awq():
            return _awq(matrix, w, draw)
        case Gptq():
            return _gptq(matrix, matrix.scheme, w, draw)
        case PackQuantized():
            return _pack_quantized(matrix, matrix.scheme, w, draw)
        case Int8():
            scales = (np.abs(w).max(axis=1) / np.float32(127)).astype(np.float32)
            return {"qweight": np.rint(_quotient(w, scales[:, None])).astype(np.int8), "scales": scales}
        case Int4():
            return _int4(matrix, w, draw)


def _fp8(w: Float32, block: tuple[int, int], draw: np.random.Generator) -> dict[str, Tensor]:
    height, width = block
    rows, columns = np.arange(len(w)) // height, np.arange(w.shape[1]) // width
    scales = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(scales, (rows[:, None], columns[None, :]), np.abs(w) / np.float32(448))
    # Published files have either.
    stored: Tensor = scales if draw.random() < 0.5 else scales.astype(ml_dtypes.bfloat16)
    q = np.clip(_quotient(w, stored.astype(np.float32)[rows][:, columns]), -448, 448)
    return {"weight": q.astype(ml_dtypes.float8_e4m3fn), "weight_scale_inv": stored}


def _fp8_rows(scheme: Fp8, w: Float32, draw: np.random.Generator) -> dict[str, Tensor]:
    largest = np.abs(w).max(axis=1, keepdims=True) if scheme.scales == "channel" else np.abs(w).max(keepdims=True)[0]
    stored = _scale(largest / np.float32(448), draw)
    q = np.clip(_quotient(w, stored.astype(np.float32)), -448, 448)
    found: dict[str, Tensor] = {"weight": q.astype(ml_dtypes.float8_e4m3fn), "weight_scale": stored}
    if scheme.activations == "static":  # for inputs of which some are beyond the largest number
        found["input_scale"] = _scale(np.exp2(draw.uniform(-8, -5, 1)).astype(np.float32), draw)
    return found


def _scale(values: Float32, draw: np.random.Generator) -> Tensor:
    """Scales as published files have them: in either dtype, and a single one as [1] or []."""
    stored: Tensor = values if draw.random() < 0.5 else values.astype(ml_dtypes.bfloat16)
    return stored.reshape(()) if stored.shape == (1,) and draw.random() < 0.5 else stored


def _pack_quantized(
    matrix: QuantizedMatrix, scheme: PackQuantized, w: Float32, draw: np.random.Generator
) -> dict[str, Tensor]:
    bits, word = scheme.bits, 32 // scheme.bits
    group = np.arange(matrix.columns) // matrix.group_size
    if scheme.desc_act:
        group = draw.permutation(group)
    shape = (group.max() + 1, matrix.rows)
    zeros = (
        np.full(shape, 1 << (bits - 1)) if scheme.sym else np.minimum(_zero_points(draw, shape, bits, 0), 2**bits - 1)
    )
    q, scales = _rounded(w, group, zeros, bits)
    # Published files have the model's dtype: also numbers that float16 has not.
    dtypes: tuple[type, ...] = (np.float16, ml_dtypes.bfloat16, np.float32)
    stored: Tensor = (scales * np.float32(1.0003)).astype(dtypes[draw.integers(3)])
    found: dict[str, Tensor] = {
        "weight_packed": packed(_filled(q, word, draw, bits).T, bits, axis=1),
        "weight_scale": np.ascontiguousarray(stored.T),
        "weight_shape": np.array([matrix.rows, matrix.columns]),
    }
    if not scheme.sym:
        found["weight_zero_point"] = packed(_filled(zeros.T, word, draw, bits), bits, axis=0)
    if scheme.desc_act or draw.random() < 0.25:
        found["weight_g_idx"] = group.astype(np.int32)
    return found


def _filled(values: Integers, word: int, draw: np.random.Generator, bits: int) -> Integers:
    """More rows, up to a whole word of them: what is in the rest of a word is nobody's business."""
    rest = -len(values) % word
    return np.concatenate([values, draw.integers(0, 1 << bits, (rest, values.shape[1]))])


def _awq(matrix: QuantizedMatrix, w: Float32, draw: np.random.Generator) -> dict[str, Tensor]:
    group = np.arange(matrix.columns) // matrix.group_size
    zeros = _zero_points(draw, (group[-1] + 1, matrix.rows), bits=4, least=0)
    q, scales = _rounded(w, group, zeros, bits=4)
    return {
        "qweight": packed(q, 4, axis=1, places=AWQ_NIBBLES),
        "qzeros": packed(zeros, 4, axis=1, places=AWQ_NIBBLES),
        "scales": scales,
    }


def _gptq(matrix: QuantizedMatrix, scheme: Gptq, w: Float32, draw: np.random.Generator) -> dict[str, Tensor]:
    bits, one_less = scheme.bits, int(scheme.checkpoint_format == "gptq")
    group = np.arange(matrix.columns) // matrix.group_size
    if scheme.desc_act:
        group = draw.permutation(group)
    shape = (group.max() + 1, matrix.rows)
    zeros = np.full(shape, 1 << (bits - 1)) if scheme.sym else _zero_points(draw, shape, bits, least=one_less)
    q, scales = _rounded(w, group, zeros, bits)
    found: dict[str, Tensor] = {
        "qweight": packed(q, bits, axis=0),
        "qzeros": packed(zeros - one_less, bits, axis=1),
        "scales": scales,
    }
    if scheme.desc_act or draw.random() < 0.5:
        found["g_idx"] = group.astype(np.int32)
    return found


def _int4(matrix: QuantizedMatrix, w: Float32, draw: np.random.Generator) -> dict[str, Tensor]:
    group = np.arange(matrix.columns) // matrix.group_size
    scales = _largest(np.abs(w), group).T / 7
    scales = scales.astype(np.float16)
    q = np.clip(np.rint(_quotient(w, scales.astype(np.float32)[:, group])), -7, 7).astype(np.int64) + 8
    if q.shape[1] % 2:  # what is in the last nibble is nobody's business
        q = np.concatenate([q, draw.integers(0, 16, (len(q), 1))], axis=1)
    return {"qweight": (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8), "scales": scales}


def _zero_points(draw: np.random.Generator, shape: tuple[int, int], bits: int, least: int) -> Integers:
    """Most are in the middle half; some are any of the 2^bits numbers from `least` on, but for 256."""
    usual = draw.integers(1 << (bits - 2), 3 << (bits - 2), shape)
    odd = draw.integers(least, min(least + (1 << bits), 256), shape)
    return np.where(draw.random(shape) < _ODD_ZERO_POINTS, odd, usual)


def _rounded(w: Float32, group: Integers, zeros: Integers, bits: int) -> tuple[Integers, npt.NDArray[np.float16]]:
    """Numbers [K, N] and scales [groups, N] of a weight [N, K] with zero points [groups, N]: scales are as large as
    both ends of a group need, or the one end that its zero point can reach."""
    below, above = zeros, (1 << bits) - 1 - zeros
    low, high = _largest(-w, group), _largest(w, group)
    scales = np.maximum(_quotient(low, np.maximum(below, 0)), _quotient(high, np.maximum(above, 0))).astype(np.float16)
    q = np.rint(_quotient(w.T, scales.astype(np.float32)[group])).astype(np.int64) + zeros[group]
    return np.clip(q, 0, (1 << bits) - 1), scales


def _largest(w: Float32, group: Integers) -> Float32:
    """Of each group's columns the largest, or 0: [groups, N]."""
    found = np.zeros((group.max() + 1, len(w)), np.float32)
    np.maximum.at(found, group, w.T)
    return found


def _quotient(a: Tensor, b: Tensor) -> Float32:
    """a / b, and 0 where b is."""
    a, b = np.broadcast_arrays(a.astype(np.float32), b.astype(np.float32))
    quotient: Float32 = np.divide(a, b, out=np.zeros(a.shape, np.float32), where=b != 0)
    return quotient


def packed(values: Integers, bits: int, axis: int, places: tuple[int, ...] | None = None) -> npt.NDArray[np.int32]:
    """int32 words of 32 / bits neighbours along an axis: the first in the lowest bits, or each in its place."""
    count = 32 // bits
    neighbours = np.moveaxis(values, axis, -1)
    words = np.zeros((*neighbours.shape[:-1], neighbours.shape[-1] // count), np.int64)
    for number, place in enumerate(places or range(count)):
        words |= neighbours[..., number::count] << (bits * place)
    return np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32)
