"""What shapes the code of a variant, decided once for every file of every backend's package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenspec.ir.nodes import DynamicQwen1Rope, DynamicRope, EmbeddingHead, LmHead, LongRope, Model


@dataclass(frozen=True)
class Structure:
    """What shapes the code of a variant, as opposed to its sizes."""

    qk_norm: bool
    one_plus: bool
    logn: bool
    windows: Literal["none", "all", "mixed"]
    partial_rotary: bool
    dynamic: bool  # rotary frequencies follow the sequence's length
    frozen: bool  # … as it was at the first forward
    round_tables: bool  # cos and sin are rounded to the activation dtype
    attention_factor: bool
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    head: Literal["linear", "tied", "embedding"]
    head_dtype: str | None  # when it is not the model's
    normalize: bool

    @property
    def flags(self) -> dict[str, bool | str]:
        """The structural flags that plain files may declare (`qwenspec.backend.fold`)."""
        return {
            "QK_NORM": self.qk_norm,
            "ONE_PLUS": self.one_plus,
            "LOGN": self.logn,
            "SLIDING": self.windows != "none",
            "PARTIAL_ROTARY": self.partial_rotary,
            "ACTIVATION": self.activation,
            "DYNAMIC_ROPE": self.dynamic,
            "FROZEN_ROPE": self.frozen,
            "ROUND_TABLES": self.round_tables,
            "ATTENTION_FACTOR": self.attention_factor,
            "EVERY_LAYER_SLIDES": self.windows == "all",
            "EVICTS": self.windows == "all",
        }


def structure(model: Model) -> Structure:
    """Every layer of a dense model has the same structure; only windows may differ."""
    attention, mlp = model.layers[0].mixer, model.layers[0].feed_forward
    windows = {layer.mixer.window for layer in model.layers}
    head = model.head
    return Structure(
        qk_norm=attention.q_norm is not None,
        one_plus=model.norm.style == "one_plus",
        logn=attention.logn is not None,
        windows="none" if windows == {None} else "all" if len(windows) == 1 else "mixed",
        partial_rotary=model.rope.rotary_dim < attention.head_dim,
        dynamic=isinstance(model.rope.scaling, DynamicRope | DynamicQwen1Rope | LongRope),
        frozen=isinstance(model.rope.scaling, DynamicQwen1Rope),
        round_tables=model.rope.compute_dtype == "activation",
        attention_factor=model.rope.attention_factor != 1.0,
        activation=mlp.activation,
        qkv_bias=attention.qkv_proj.bias is not None,
        o_bias=attention.o_proj.bias is not None,
        mlp_bias=mlp.down_proj.bias is not None,
        head="embedding" if isinstance(head, EmbeddingHead) else "tied" if head.tied else "linear",
        head_dtype=head.dtype if isinstance(head, LmHead) and head.dtype != model.dtype else None,
        normalize=isinstance(head, EmbeddingHead) and head.normalize,
    )
