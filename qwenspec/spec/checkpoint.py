"""Where a checkpoint keeps each tensor. Layouts are data: a new naming is a new YAML file, not Python."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from qwenspec.spec.base import Model

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]


class AttentionNames(Model):
    """Module names inside a layer. `qkv`: three names (q, k, v), or one that is fused on disk in that order.

    `kv_scales`: the module that has the tensors `k_scale` and `v_scale` of a quantised KV cache."""

    qkv: Names
    o: Name
    q_norm: Name | None = None
    k_norm: Name | None = None
    kv_scales: Name | None = None


class MlpNames(Model):
    """`gate_up`: two names, the gate (the half that is activated) first, or one fused in that order."""

    gate_up: Names
    down: Name


class Layout(Model):
    """Module names of a checkpoint; `.weight` and `.bias` are appended. `{i}` in `layer` is the layer's index."""

    extends: Name | None = Field(
        default=None,
        exclude=True,  # of a loaded spec it is None: the other layout's names are among these
        description="Start from another layout: a built-in one's name, or a YAML file (relative to this one).",
    )
    embedding: Name
    layer: Name
    input_norm: Name
    attention: AttentionNames
    post_attention_norm: Name
    mlp: MlpNames
    norm: Name
    lm_head: Name
    ignore: tuple[str, ...] = Field(
        default=(), description="Patterns (fnmatch) of tensors that a checkpoint may hold and nobody reads."
    )


class Checkpoint(Model):
    """`layout` names a built-in layout, a YAML file beside the spec, or is the layout itself, which may extend one;
    `ignore` adds to its own."""

    layout: str | Layout = Field(
        description="A built-in layout's name (qwen1, qwen2, qwen3_embedding), a YAML file, or the names themselves."
    )
    ignore: tuple[Name, ...] = Field(
        default=(), description="Patterns (fnmatch) of further tensors that this checkpoint holds and nobody reads."
    )


@cache
def builtin_layouts() -> dict[str, Path]:
    """The layouts that come with qwenspec: name -> YAML file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "layouts").glob("*.yaml"))}
