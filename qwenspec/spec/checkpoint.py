"""Where a checkpoint keeps each tensor. Layouts are data: a new naming is a new YAML file, not Python."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwenspec.spec.base import Model

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class AttentionNames(Model):
    """Module names inside a layer. `qkv`: three names (q, k, v), or one that is fused on disk in that order."""

    qkv: Names
    o: str
    q_norm: str | None = None
    k_norm: str | None = None


class MlpNames(Model):
    """`gate_up`: two names, the gate (the half that is activated) first, or one fused in that order."""

    gate_up: Names
    down: str


class Layout(Model):
    """Module names of a checkpoint; `.weight` and `.bias` are appended. `{i}` in `layer` is the layer's index."""

    embedding: str
    layer: str
    input_norm: str
    attention: AttentionNames
    post_attention_norm: str
    mlp: MlpNames
    norm: str
    lm_head: str
    ignore: tuple[str, ...] = Field(
        default=(), description="Patterns (fnmatch) of tensors that a checkpoint may hold and nobody reads."
    )


class Checkpoint(Model):
    """`layout` names a built-in layout, a YAML file beside the spec, or is the layout itself."""

    layout: str | Layout
