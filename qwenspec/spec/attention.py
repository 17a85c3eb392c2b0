"""Attention: heads' width, biases, QK-norm, LogN and sliding windows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenspec.spec.base import LARGEST, WIDEST, Model, PositiveFloat, PositiveInt


class AttentionBias(Model):
    """Which projections have a bias. Each is its own fact: Qwen2 has qkv only, Qwen3 none."""

    qkv: bool = Field(default=False, description="A bias on the query, key and value projections.")
    output: bool = Field(default=False, description="A bias on the output projection.")


class LogN(Model):
    """The query at position p is multiplied by max(1, ln(p + 1) / ln(train_length)), after RoPE (Qwen-1)."""

    train_length: Annotated[int, Field(gt=1, le=LARGEST)] = Field(
        description="The length trained on: seq_length in Qwen-1's config.json."
    )


class LayersFrom(Model):
    """Every layer from this index on (the checkpoints' max_window_layers)."""

    from_: int = Field(alias="from", ge=0, description="The first layer that slides; the number of layers: none does.")


class SlidingWindow(Model):
    """A query at position p sees keys p - window + 1 … p: the window counts the query itself."""

    window: PositiveInt = Field(description="How many keys a query sees, its own included.")
    layers: Literal["all"] | LayersFrom | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default="all", description="Which layers slide: all, {from: N}, or a list of layer indices."
    )


class Attention(Model):
    """Softmax attention with grouped key/value heads."""

    head_dim: Annotated[int, Field(gt=0, le=WIDEST)] | None = Field(
        default=None, description="Width of a head. null: hidden_size / num_attention_heads."
    )
    scale: PositiveFloat | None = Field(default=None, description="Score scale. null: 1 / sqrt(head_dim).")
    bias: AttentionBias = Field(default=AttentionBias(), description="Which projections have a bias.")
    qk_norm: Literal["none", "per_head"] = Field(
        default="none",
        description="per_head: RMSNorm over head_dim on queries and keys, one weight for all heads, before RoPE.",
    )
    logn: LogN | None = Field(default=None, description="Qwen-1's scaling of queries beyond the length trained on.")
    sliding_window: SlidingWindow | None = Field(default=None, description="null: every layer sees every key.")
