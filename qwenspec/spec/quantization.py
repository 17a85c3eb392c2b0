"""Quantised weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenspec.spec.base import Model, PositiveInt

_GROUP = "How many inputs share a scale."
_HEAD = "How the LM head is stored, and with it a tied embedding; none: in full precision."


class _Quantized(Model):
    skip: tuple[str, ...] = Field(
        default=(),
        description="Checkpoint module names left in full precision.",
    )


class Fp8Block(_Quantized):
    """float8 e4m3 weights with one scale a block (Qwen3-*-FP8)."""

    scheme: Literal["fp8_block"]
    block: tuple[PositiveInt, PositiveInt] = Field(default=(128, 128), description="Outputs and inputs of a block.")
    activations: Literal["dynamic", "none"] = Field(
        default="dynamic", description="dynamic: per token and group of block[1] inputs. none: weights only."
    )


class Fp8(_Quantized):
    """float8 e4m3 weights with one scale an output or a matrix (compressed-tensors, TensorRT Model Optimizer)."""

    scheme: Literal["fp8"]
    scales: Literal["channel", "tensor"] = Field(
        default="channel", description="channel: one for each output. tensor: one for all of a checkpoint's matrix."
    )
    activations: Literal["dynamic", "static", "none"] = Field(
        default="dynamic",
        description="dynamic: per token. static: with the checkpoint's `input_scale`. none: weights only.",
    )


class Awq(_Quantized):
    """AutoAWQ's gemm format: 4 bits, groups along the inputs, zero points."""

    scheme: Literal["awq"]
    bits: Literal[4] = 4
    group_size: PositiveInt = Field(default=128, description=_GROUP)
    zero_point: Literal[True] = True


class Gptq(_Quantized):
    """GPTQ: 4 or 8 bits, groups along the inputs, `g_idx` when desc_act."""

    scheme: Literal["gptq"]
    bits: Literal[4, 8]
    group_size: PositiveInt | Literal[-1] = Field(default=128, description=f"{_GROUP} -1: all of them.")
    sym: bool = Field(default=True, description="Symmetric: the zero points are the middle.")
    desc_act: bool = Field(default=False, description="Groups are of inputs in the order of their activations' size.")
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        default="gptq", description="gptq stores zero points minus one, gptq_v2 as they are."
    )


class PackQuantized(_Quantized):
    """compressed-tensors' pack-quantized: 4 or 8 bits, groups along the inputs or whole rows."""

    scheme: Literal["pack_quantized"]
    bits: Literal[4, 8]
    group_size: PositiveInt | Literal[-1] = Field(default=128, description=f"{_GROUP} -1: all of them.")
    sym: bool = Field(default=True, description="Symmetric: there are no zero points.")
    desc_act: bool = Field(default=False, description="Groups are of inputs in the order of `weight_g_idx`.")


class Int8(_Quantized):
    """Round to nearest, symmetric, one scale an output channel."""

    scheme: Literal["int8"]
    head: Literal["none", "int8"] = Field(default="int8", description=_HEAD)


class Int4(_Quantized):
    """Round to nearest, symmetric, one scale a group of inputs."""

    scheme: Literal["int4"]
    group_size: PositiveInt = Field(default=32, description=f"{_GROUP} 32, 64 and 128 are usual.")
    head: Literal["none", "int8", "int4"] = Field(default="int8", description=_HEAD)


Quantization = Annotated[Fp8Block | Fp8 | Awq | Gptq | PackQuantized | Int8 | Int4, Field(discriminator="scheme")]
