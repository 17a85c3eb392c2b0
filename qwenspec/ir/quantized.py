"""Quantised weights: which format a spec's scheme is, how a checkpoint stores it, and what lies in one piece.

Formats as in the checkpoints of AutoAWQ, AutoGPTQ, compressed-tensors, TensorRT Model Optimizer, Qwen3-*-FP8, and of
`qwenspec convert` (docs/quantization.md).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from qwenspec.ir.nodes import Fp8Format, IntFormat, Param, Source, WeightFormat
from qwenspec.spec.quantization import Awq, Fp8, Fp8Block, Gptq, Int4, Int8, PackQuantized, Quantization

INT8_PER_ROW = IntFormat("int8", bits=8, group_size=None)
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that a checkpoint must hold, or may if it is `optional`; dtypes in safetensors' names."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a parameter, one below the other, that are stored in one piece.

    `name` is the parameter's own, or of a part of it: `layers.0.attention.qkv_proj.k.weight`."""

    name: str
    rows: int
    format: WeightFormat | None
    sources: tuple[Source, ...]


def weight_format(quantization: Quantization) -> WeightFormat:
    """The format of linear layers."""
    match quantization:
        case Fp8Block(block=block, activations=activations):
            return Fp8Format(block, activations=activations)
        case Fp8(scales=scales, activations=activations):
            return Fp8Format((1, 0), scales, activations)
        case Awq(bits=bits, group_size=group_size):
            return IntFormat("awq", bits, group_size, zero_points=True)
        case Gptq():
            return IntFormat(
                quantization.checkpoint_format,
                quantization.bits,
                None if quantization.group_size == -1 else quantization.group_size,
                zero_points=not quantization.sym,
                act_order=quantization.desc_act,
            )
        case PackQuantized():
            return IntFormat(
                "pack_quantized",
                quantization.bits,
                None if quantization.group_size == -1 else quantization.group_size,
                zero_points=not quantization.sym,
                act_order=quantization.desc_act,
            )
        case Int8():
            return INT8_PER_ROW
        case Int4(group_size=group_size):
            return IntFormat("int4", bits=4, group_size=group_size)


def head_format(quantization: Quantization) -> WeightFormat | None:
    """The format of the LM head, None in full precision."""
    if not isinstance(quantization, Int8 | Int4) or quantization.head == "none":
        return None
    return INT8_PER_ROW if quantization.head == "int8" else weight_format(quantization)


def stored_tensors(source: Source, inputs: int) -> dict[str, StoredTensor]:
    """The tensors of a quantised source [rows, inputs], by suffix."""
    module, rows = source.tensor.removesuffix(".weight"), source.rows
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    match source.format:
        case Fp8Format(scales="block") as blocked:
            scales = (-(-rows // blocked.block[0]), blocked.groups(inputs))
            shapes = {"weight": ((rows, inputs), ("F8_E4M3",)), "weight_scale_inv": (scales, _FLOATS)}
        case Fp8Format(scales=per, activations=activations):
            shapes = {
                "weight": ((rows, inputs), ("F8_E4M3",)),
                "weight_scale": ((1,) if per == "tensor" else (rows, 1), _FLOATS),
            }
            if activations == "static":
                shapes["input_scale"] = ((1,), _FLOATS)
        case IntFormat(packing="int8"):
            shapes = {"qweight": ((rows, inputs), ("I8",)), "scales": ((rows,), _FLOATS)}
        case IntFormat(packing="int4") as own:
            scales = (rows, own.groups(inputs))
            shapes = {"qweight": ((rows, -(-inputs // 2)), ("U8",)), "scales": (scales, _FLOATS)}
        case IntFormat(packing="pack_quantized") as own:
            per_word, groups = 32 // own.bits, own.groups(inputs)
            shapes = {
                "weight_packed": ((rows, -(-inputs // per_word)), ("I32",)),
                "weight_scale": ((rows, groups), _FLOATS),
                "weight_shape": ((2,), ("I64",)),
                "weight_g_idx": ((inputs,), ("I32",)),
            }
            if own.zero_points:
                shapes["weight_zero_point"] = ((-(-rows // per_word), groups), ("I32",))
        case IntFormat() as packed:
            per_word, groups = 32 // packed.bits, packed.groups(inputs)
            words = (inputs, rows // per_word) if packed.packing == "awq" else (inputs // per_word, rows)
            shapes = {
                "qweight": (words, ("I32",)),
                "qzeros": ((groups, rows // per_word), ("I32",)),
                "scales": ((groups, rows), _FLOATS),
            }
            if packed.packing != "awq":
                shapes["g_idx"] = ((inputs,), ("I32",))
        case None:
            raise AssertionError(f"{source.tensor} is not quantised")
    optional = isinstance(source.format, IntFormat) and not source.format.act_order
    return {
        suffix: StoredTensor(f"{module}.{suffix}", shape, dtypes, optional=optional and suffix.endswith("g_idx"))
        for suffix, (shape, dtypes) in shapes.items()
    }


def blocks(param: Param) -> tuple[Block, ...]:
    """A parameter's rows by how they are stored: one block, or one a part if the parts do not lie together."""
    first = param.sources[0].format
    if all(source.format == first for source in param.sources) and _lie_together(param.sources):
        return (Block(param.name, param.shape[0], first, param.sources),)
    module, _, suffix = param.name.rpartition(".")
    return tuple(
        Block(f"{module}.{part.name}.{suffix}", source.rows, source.format, (source,))
        for part, source in zip(param.parts, param.sources, strict=True)
    )


def block_bytes(format: WeightFormat, rows: int, inputs: int) -> int:
    """Bytes in memory of a quantised matrix: values, in whole groups, scales, zero points, and its inputs' order."""
    groups = format.groups(inputs)
    if isinstance(format, Fp8Format):
        return rows * inputs + 4 * -(-rows // format.block[0]) * groups + 4 * (format.activations == "static")
    scale = 4 if format.packing in ("int8", "pack_quantized") else 2
    values = rows * groups * math.ceil((format.group_size or inputs) * format.bits / 8)
    return values + rows * groups * (scale + format.zero_points) + 4 * inputs * format.act_order


def format_title(format: WeightFormat) -> str:
    """For people: `awq, 4 bits in groups of 128`."""
    if isinstance(format, Fp8Format):
        shared = {"channel": "whole rows", "tensor": "whole matrices"}
        pieces = shared.get(format.scales, f"blocks of {format.block[0]} × {format.block[1]}")
        rounded = {"dynamic": ", and activations", "static": ", and activations with stored scales"}
        return f"fp8 in {pieces}{rounded.get(format.activations, '')}"
    groups = "whole rows" if format.group_size is None else f"groups of {format.group_size}"
    order = " in an order of their own" * format.act_order
    return f"{format.packing}, {format.bits} bits in {groups}{order}"


def _lie_together(sources: tuple[Source, ...]) -> bool:
    """Whether sources of one format can be one matrix: each with its own order of inputs, or scale of them, or cut
    blocks, cannot."""
    if len(sources) == 1:
        return True
    match sources[0].format:
        case IntFormat(act_order=True) | Fp8Format(activations="static"):
            return False
        case Fp8Format(block=(height, _)):
            return all(source.rows % height == 0 for source in itertools.islice(sources, len(sources) - 1))
        case _:
            return True
