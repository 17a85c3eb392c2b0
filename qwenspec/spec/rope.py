"""Rotary position embedding and its scalings. The formulas are in `qwenspec.ir.rope`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenspec.spec.base import Model, PositiveFloat, PositiveInt

Factor = Annotated[float, Field(ge=1.0)]


class Linear(Model):
    """Positions are divided by `factor`."""

    kind: Literal["linear"]
    factor: Factor


class Ntk(Model):
    """NTK-aware, fixed: theta · factor^(d / (d - 2)) from position 0."""

    kind: Literal["ntk"]
    factor: Factor


class Dynamic(Model):
    """Hugging Face's dynamic NTK: theta grows with the length beyond max_position_embeddings."""

    kind: Literal["dynamic"]
    factor: Factor


class DynamicQwen1(Model):
    """Qwen-1's dynamic NTK: a power-of-two step chosen from the prompt's length and then kept."""

    kind: Literal["dynamic_qwen1"]
    train_length: PositiveInt = Field(
        description="The length trained on: seq_length in Qwen-1's config.json."
    )


class Yarn(Model):
    """YaRN (arXiv:2309.00071) as Hugging Face computes it."""

    kind: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = Field(
        default=None, description="Multiplies cos and sin. null: from mscale, else 0.1 · ln(factor) + 1."
    )
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool = Field(default=True, description="Round the ramp's ends to whole frequencies.")


class LongRope(Model):
    """LongRoPE (arXiv:2402.13753): one list of divisors up to the original length, another beyond."""

    kind: Literal["longrope"]
    short_factor: tuple[PositiveFloat, ...]
    long_factor: tuple[PositiveFloat, ...]
    original_max_position_embeddings: Annotated[int, Field(gt=1)]
    factor: Factor | None = Field(
        default=None, description="null: max_position_embeddings / original_max_position_embeddings."
    )
    attention_factor: PositiveFloat | None = Field(
        default=None, description="null: sqrt(1 + ln(factor) / ln(original_max_position_embeddings))."
    )


class Llama3(Model):
    """Llama 3.1's scaling by wavelength."""

    kind: Literal["llama3"]
    factor: Factor
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


RopeScaling = Annotated[
    Linear | Ntk | Dynamic | DynamicQwen1 | Yarn | LongRope | Llama3, Field(discriminator="kind")
]


class Rope(Model):
    """Rotate-half rotary embedding of the first partial_rotary_factor · head_dim values of each head."""

    theta: Annotated[float, Field(gt=1.0)] = Field(
        description="The base. There is no default: families differ."
    )
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    compute_dtype: Literal["activation", "float32"] = Field(
        default="activation",
        description="activation: cos and sin are rounded to the model's dtype (Qwen1.5 on). float32: Qwen-1.",
    )
    scaling: RopeScaling | None = None
