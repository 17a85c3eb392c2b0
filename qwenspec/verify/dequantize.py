"""What a quantised checkpoint means, in float64: written from the formats' descriptions, slow and plain. It reads the
spec, not the IR, and shares nothing with what the packages load by.

K inputs, N outputs; a weight is [N, K]. Formats: AutoAWQ's gemm (arXiv:2306.00978), AutoGPTQ's (arXiv:2210.17323), the
block-wise e4m3 of Qwen3-*-FP8, compressed-tensors' float-quantized and pack-quantized, TensorRT Model Optimizer's FP8,
and `qwenspec convert`'s int8 and int4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Awq, Fp8, Fp8Block, Gptq, Int4, Int8, PackQuantized, Quantization
from qwenspec.verify.reference_rope import Array

Tensor = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that nibble 0, 1, … of a word of 8 columns holds
E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class QuantizedMatrix:
    """How the weight [rows, columns] of a module is stored."""

    scheme: Quantization
    rows: int
    columns: int

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Suffix of each stored tensor's name -> its shape."""
        rows, columns = self.rows, self.columns
        match self.scheme:
            case Fp8Block(block=(height, width)):
                return {"weight": (rows, columns), "weight_scale_inv": (-(-rows // height), -(-columns // width))}
            case Fp8(scales=scales, activations=activations):
                static: dict[str, tuple[int, ...]] = {"input_scale": (1,)} if activations == "static" else {}
                one_each = (rows, 1) if scales == "channel" else (1,)
                return {"weight": (rows, columns), "weight_scale": one_each, **static}
            case Awq(group_size=size):
                groups = columns // size
                return {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
            case Gptq(bits=bits):
                groups, word = -(-columns // self.group_size), 32 // bits
                return {
                    "qweight": (columns // word, rows),
                    "qzeros": (groups, rows // word),
                    "scales": (groups, rows),
                    "g_idx": (columns,),
                }
            case PackQuantized(bits=bits, sym=sym):
                groups, word = -(-columns // self.group_size), 32 // bits
                zeros: dict[str, tuple[int, ...]] = {} if sym else {"weight_zero_point": (-(-rows // word), groups)}
                return {
                    "weight_packed": (rows, -(-columns // word)),
                    "weight_scale": (rows, groups),
                    "weight_shape": (2,),
                    "weight_g_idx": (columns,),
                    **zeros,
                }
            case Int8():
                return {"qweight": (rows, columns), "scales": (rows,)}
            case Int4():
                return {"qweight": (rows, -(-columns // 2)), "scales": (rows, -(-columns // self.group_size))}

    @property
    def optional(self) -> frozenset[str]:
        """Suffixes of tensors that a file need not have."""
        match self.scheme:
            case Gptq(desc_act=False):
                return frozenset(("g_idx",))
            case PackQuantized(desc_act=False):
                return frozenset(("weight_g_idx",))
            case _:
                return frozenset()

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        match self.scheme:
            case (
                Awq(group_size=size) | Gptq(group_size=size) | PackQuantized(group_size=size) | Int4(group_size=size)
            ) if size > 0:
                return size
            case Fp8Block(block=(_, size)):
                return size
            case _:
                return self.columns

    def dequantized(self, stored: Mapping[str, Tensor]) -> Array:
        """The weight [rows, columns] of the stored tensors, which go by their suffixes."""
        match self.scheme:
            case Fp8Block(block=block):
                return fp8_weight(stored["weight"], stored["weight_scale_inv"], block)
            case Fp8():
                return fp8_rows(stored["weight"], stored["weight_scale"])
            case Awq(group_size=size):
                return awq_weight(stored["qweight"], stored["qzeros"], stored["scales"], size)
            case Gptq(bits=bits, checkpoint_format=version):
                group = stored["g_idx"] if "g_idx" in stored else np.arange(self.columns) // self.group_size
                one_less = version == "gptq"
                return gptq_weight(stored["qweight"], stored["qzeros"], stored["scales"], group, bits, one_less)
            case PackQuantized(bits=bits, sym=sym):
                if stored["weight_shape"].tolist() != [self.rows, self.columns]:
                    raise ValueError(f"weight_shape is {stored['weight_shape'].tolist()}")
                group = stored.get("weight_g_idx", np.arange(self.columns) // self.group_size)
                zeros = None if sym else stored["weight_zero_point"]
                return packed_weight(stored["weight_packed"], zeros, stored["weight_scale"], group, bits)
            case Int8():
                return stored["qweight"].astype(np.float64) * stored["scales"].astype(np.float64)[:, None]
            case Int4():
                return int4_weight(stored["qweight"], stored["scales"], self.columns, self.group_size)


class Dequantized(Mapping[str, Tensor]):
    """A quantised checkpoint as the reference reads it: `X.weight` of a quantised module X in float64, computed anew
    whenever it is asked for, and whatever else is stored as it is."""

    def __init__(self, spec: Spec, stored: Mapping[str, Tensor]) -> None:
        self._matrices = {f"{module}.weight": matrix for module, matrix in quantized_matrices(spec).items()}
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError for a missing tensor and ValueError for a mis-shaped one."""
        if name not in self._matrices:
            return self._stored[name]
        matrix, module = self._matrices[name], name.removesuffix(".weight")
        found: dict[str, Tensor] = {}
        for suffix, shape in matrix.stored_shapes().items():
            tensor = f"{module}.{suffix}"
            if suffix in matrix.optional and tensor not in self._stored:
                continue
            found[suffix] = self._stored[tensor]
            if shape == (1,) and found[suffix].shape == ():  # one number, either way
                continue
            if found[suffix].shape != shape:
                raise ValueError(f"{tensor} has shape {found[suffix].shape}, the spec says {shape}")
        return matrix.dequantized(found)

    def __iter__(self) -> Iterator[str]:
        quantized = {
            f"{name.removesuffix('.weight')}.{suffix}"
            for name, matrix in self._matrices.items()
            for suffix in matrix.stored_shapes()
            if suffix != "input_scale"  # says nothing of the weight
        }
        yield from self._matrices
        yield from (name for name in self._stored if name not in quantized)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def quantized_matrices(spec: Spec) -> dict[str, QuantizedMatrix]:
    """Checkpoint module -> how its weight is stored, of the modules that the spec does not skip."""
    quantization, arch, layout = spec.quantization, spec.architecture, spec.layout
    if quantization is None:
        return {}
    found: dict[str, QuantizedMatrix] = {}
    for i in range(arch.num_hidden_layers):
        for module, (rows, columns) in _linear_shapes(spec).items():
            found[f"{layout.layer.format(i=i)}.{module}"] = QuantizedMatrix(quantization, rows, columns)
    if isinstance(quantization, Int8 | Int4) and quantization.head != "none" and arch.lm_head is not None:
        scheme = Int8(scheme="int8") if quantization.head == "int8" else quantization
        head = layout.embedding if arch.tie_word_embeddings else layout.lm_head
        found[head] = QuantizedMatrix(scheme, arch.vocab_size, arch.hidden_size)
    return {module: matrix for module, matrix in found.items() if module not in quantization.skip}


def _linear_shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """Modules of a layer: (rows, columns)."""
    arch, attention, mlp = spec.architecture, spec.layout.attention, spec.layout.mlp
    head_dim = arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads
    q = arch.num_attention_heads * head_dim
    kv = (arch.num_key_value_heads or arch.num_attention_heads) * head_dim
    fused = {
        attention.qkv: ((q, kv, kv), arch.hidden_size),
        (attention.o,): ((arch.hidden_size,), q),
        mlp.gate_up: ((arch.intermediate_size,) * 2, arch.hidden_size),
        (mlp.down,): ((arch.hidden_size,), arch.intermediate_size),
    }
    shapes: dict[str, tuple[int, int]] = {}
    for modules, (parts, columns) in fused.items():
        rows = parts if len(modules) == len(parts) else (sum(parts),)
        shapes |= {module: (n, columns) for module, n in zip(modules, rows, strict=True)}
    return shapes


# ------------------------------------------------------------------------------------------------------ formats


def fp8_weight(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Array:
    """[N, K] of e4m3 [N, K] and scales [ceil(N / block[0]), ceil(K / block[1])], which multiply for all their name."""
    values, scales = E4M3_VALUES[weight.view(np.uint8)], scale_inv.astype(np.float64)
    rows, columns = np.arange(weight.shape[0]) // block[0], np.arange(weight.shape[1]) // block[1]
    scaled: Array = values * scales[rows][:, columns]
    return scaled


def fp8_rows(weight: Tensor, scale: Tensor) -> Array:
    """[N, K] of e4m3 [N, K] and a scale for each row, [N, 1], or for all, [1] or []."""
    scaled: Array = E4M3_VALUES[weight.view(np.uint8)] * scale.astype(np.float64).reshape(-1, 1)
    return scaled


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Array:
    """[N, K] of int32 [K, N / 8] and [K / g, N / 8], packed along N in AWQ's order, and scales [K / g, N]."""
    q, zeros = (unpacked(words, 4, axis=1, order=AWQ_ORDER) for words in (qweight, qzeros))
    group = np.arange(len(q)) // group_size
    weight: Array = (q - zeros[group]) * scales.astype(np.float64)[group]
    return weight.T


def gptq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, one_less: bool) -> Array:
    """[N, K] of int32 [K · bits / 32, N], packed along K, int32 [groups, N · bits / 32], packed along N, and scales
    [groups, N]. Input k is of group g_idx[k]. `one_less`: zero points are stored minus one (the first version)."""
    q, zeros = unpacked(qweight, bits, axis=0), unpacked(qzeros, bits, axis=1) + one_less
    weight: Array = (q - zeros[g_idx]) * scales.astype(np.float64)[g_idx]
    return weight.T


def packed_weight(words: Tensor, zeros: Tensor | None, scales: Tensor, group: Tensor, bits: int) -> Array:
    """[N, K] of int32 [N, K · bits / 32], packed along K, and scales [N, groups]. Input k is of the group group[k].
    Signed numbers are stored with 2^(bits - 1) added to them. So are zero points, int32 [N · bits / 32, groups], packed
    along N; without them they are 0."""
    middle, rows = 1 << (bits - 1), len(words)
    q = unpacked(words, bits, axis=1)[:, : len(group)] - middle
    z = np.zeros(scales.shape) if zeros is None else unpacked(zeros, bits, axis=0)[:rows] - middle
    weight: Array = (q - z[:, group]) * scales.astype(np.float64)[:, group]
    return weight


def int4_weight(qweight: Tensor, scales: Tensor, columns: int, group_size: int) -> Array:
    """[N, K] of uint8 [N, ceil(K / 2)], the even input in the low nibble, and scales [N, ceil(K / g)]. Zero is 8."""
    q = np.empty((len(qweight), 2 * qweight.shape[1]))
    q[:, 0::2], q[:, 1::2] = qweight & 15, qweight >> 4
    weight: Array = (q[:, :columns] - 8) * scales.astype(np.float64)[:, np.arange(columns) // group_size]
    return weight


def unpacked(words: Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Integers:
    """Unsigned numbers of `bits` out of int32 words along an axis, the lowest first; `order`: the place of each."""
    count = 32 // bits
    unsigned = np.moveaxis(words, axis, -1).astype(np.int64) & 0xFFFFFFFF
    values = np.empty((*unsigned.shape[:-1], count * unsigned.shape[-1]), np.int64)
    for number, place in enumerate(order or range(count)):
        values[..., place::count] = (unsigned >> bits * number) & ((1 << bits) - 1)
    return np.moveaxis(values, -1, axis)


# --------------------------------------------------------------------------------------------------------- e4m3


def _e4m3_value(byte: int) -> float:
    """A sign, 4 bits of exponent with a bias of 7, and 3 of mantissa; no infinities, and all ones are NaN."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3_VALUES: Array = np.array([_e4m3_value(byte) for byte in range(256)])


def rounded_to_e4m3(x: Array) -> Array:
    """The nearest values of e4m3, ties to the even mantissa; beyond the largest it is that. NaN stays NaN."""
    _, exponent = np.frexp(x)  # |x| = f · 2^exponent, f in [1/2, 1)
    step = 2.0 ** (np.maximum(exponent, -5) - 4)  # 2^-9 below the normal numbers, which begin at 2^-6
    rounded: Array = np.clip(np.rint(x / step) * step, -E4M3_LARGEST, E4M3_LARGEST)
    return rounded


def rounded_activations(x: Array, group_size: int) -> Array:
    """[…, K] rounded to e4m3, in groups of so many channels (the last may have fewer), each of which has a scale that
    makes its largest |x| the largest number: q = e4m3(x / s), s = max|x| / 448, and the result is q · s."""
    parts = np.split(x, range(group_size, x.shape[-1], group_size), axis=-1)
    return np.concatenate([_rounded_group(part) for part in parts], axis=-1)


def rounded_by(x: Array, scale: Array) -> Array:
    """x rounded to e4m3 with a given scale s [1]: q = e4m3(x / s), at most the largest number; the result is q · s."""
    return rounded_to_e4m3(x / scale) * scale


def _rounded_group(x: Array) -> Array:
    scale: Array = np.abs(x).max(axis=-1, keepdims=True) / E4M3_LARGEST
    return rounded_to_e4m3(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)) * scale
