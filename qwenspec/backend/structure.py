"""What shapes the code of a variant, decided once for every file of every backend's package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenspec.ir.nodes import (
    DynamicQwen1Rope,
    DynamicRope,
    EmbeddingHead,
    Fp8Format,
    IntFormat,
    KvFormat,
    LmHead,
    LongRope,
    Model,
    WeightFormat,
)
from qwenspec.ir.quantized import blocks


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
    weights: WeightFormat | None  # of the quantised linear layers, if there are any
    apart: bool  # … and some are in full precision, or in blocks of rows of their own
    head_weights: WeightFormat | None  # of the LM head, and of the embedding when tied
    kv_cache: KvFormat | None

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
            "LM_HEAD": self.head != "embedding",
            "TIED": self.head == "tied" and self.head_weights is None,
            "EVERY_LAYER_SLIDES": self.windows == "all",
            "EVICTS": self.windows == "all",
            **self._quantization_flags,
            "QUANTIZED_KV": self.kv_cache is not None,
            "KV_DTYPE": self.kv_cache.dtype if self.kv_cache else "",
            "TOKEN_SCALES": self.kv_cache is not None and self.kv_cache.token_scales,
            "STORED_KV_SCALES": self.kv_cache is not None and not self.kv_cache.token_scales,
        }

    @property
    def _quantization_flags(self) -> dict[str, bool | str]:
        weights, head = self.weights, self.head_weights
        integers = weights if isinstance(weights, IntFormat) else None
        floats = weights if isinstance(weights, Fp8Format) else None
        return {
            "QUANTIZED": weights is not None or head is not None,
            "PACKING": packing(weights or head),
            "GPTQ": packing(weights) == "gptq",
            "GPTQ_V1": integers is not None and integers.packing == "gptq",
            "BITS": str(integers.bits) if integers else "",
            "GROUPS": integers is not None and integers.group_size is not None,
            "ZERO_POINTS": integers is not None and integers.zero_points,
            "ACT_ORDER": integers is not None and integers.act_order,
            "APART": self.apart,
            "PACK_QUANTIZED": packing(weights) == "pack_quantized",
            "FP8": floats is not None,
            "FP8_SCALES": floats.scales if floats else "",
            "ROW_SCALES": floats is not None and floats.scales != "block",
            "ROUNDED_ACTIVATIONS": floats is not None and floats.activations != "none",
            "STATIC_ACTIVATIONS": floats is not None and floats.activations == "static",
            "WIDE_SCALES": packing(weights) in ("fp8", "pack_quantized"),
            "QUANTIZED_HEAD": head is not None,
            "INT8_HEAD": packing(head) == "int8" and packing(weights) != "int8",
        }


def structure(model: Model) -> Structure:
    """Every layer of a dense model has the same structure; only windows may differ."""
    attention, mlp = model.layers[0].mixer, model.layers[0].feed_forward
    windows = {layer.mixer.window for layer in model.layers}
    head = model.head
    matrices = [blocks(linear.weight) for layer in model.layers for linear in layer.linears()]
    formats = {block.format for pieces in matrices for block in pieces}
    weights = next(iter(formats - {None}), None)
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
        weights=weights,
        apart=weights is not None and any(len(pieces) > 1 or pieces[0].format is None for pieces in matrices),
        kv_cache=model.kv_cache,
        head_weights=head.weight.sources[0].format if isinstance(head, LmHead) else None,
    )


def packing(format: WeightFormat | None) -> str:
    """How a checkpoint packs it: awq, gptq, pack_quantized, fp8, int8 or int4; empty in full precision."""
    if isinstance(format, IntFormat):
        return "gptq" if format.packing == "gptq_v2" else format.packing
    return "fp8" if format else ""
