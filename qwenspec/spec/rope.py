"""Rotary position embedding and its scalings. The formulas are in `qwenspec.ir.rope`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenspec.spec.base import LARGEST, Model, PositiveFloat, PositiveInt

Factor = Annotated[float, Field(ge=1.0, description="How many times longer than the length trained on.")]
OriginalLength = Annotated[PositiveInt, Field(description="The length trained on, before scaling.")]


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
    train_length: PositiveInt = Field(description="The length trained on: seq_length in Qwen-1's config.json.")


class Yarn(Model):
    """YaRN (arXiv:2309.00071) as Hugging Face computes it."""

    kind: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: OriginalLength
    attention_factor: PositiveFloat | None = Field(
        default=None, description="Multiplies cos and sin. null: from mscale, else 0.1 · ln(factor) + 1."
    )
    beta_fast: PositiveFloat = Field(
        default=32.0, description="Frequencies that turn more often within the original length are kept."
    )
    beta_slow: PositiveFloat = Field(
        default=1.0, description="Frequencies that turn less often within the original length are divided by factor."
    )
    mscale: PositiveFloat | None = Field(
        default=None, description="With mscale_all_dim: their ratio gives attention_factor."
    )
    mscale_all_dim: PositiveFloat | None = Field(default=None, description="See mscale.")
    truncate: bool = Field(default=True, description="Round the ramp's ends to whole frequencies.")


class LongRope(Model):
    """LongRoPE (arXiv:2402.13753): one list of divisors up to the original length, another beyond."""

    kind: Literal["longrope"]
    short_factor: tuple[PositiveFloat, ...] = Field(
        description="A divisor for each rotating pair, for sequences up to the original length."
    )
    long_factor: tuple[PositiveFloat, ...] = Field(description="A divisor for each rotating pair, for longer ones.")
    original_max_position_embeddings: Annotated[int, Field(gt=1, le=LARGEST)] = Field(
        description="The length trained on, before scaling."
    )
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
    low_freq_factor: PositiveFloat = Field(
        description="Wavelengths above the original length over this are divided by factor."
    )
    high_freq_factor: PositiveFloat = Field(description="Wavelengths below the original length over this are kept.")
    original_max_position_embeddings: OriginalLength


RopeScaling = Annotated[Linear | Ntk | Dynamic | DynamicQwen1 | Yarn | LongRope | Llama3, Field(discriminator="kind")]


class Rope(Model):
    """Rotate-half rotary embedding of the first partial_rotary_factor · head_dim values of each head."""

    theta: Annotated[float, Field(gt=1.0)] = Field(description="The base. There is no default: families differ.")
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="The part of each head that rotates: its first values."
    )
    compute_dtype: Literal["activation", "float32"] = Field(
        default="activation",
        description="activation: cos and sin are rounded to the model's dtype (Qwen1.5 on). float32: Qwen-1.",
    )
    scaling: RopeScaling | None = Field(default=None, description="For contexts longer than those trained on.")
