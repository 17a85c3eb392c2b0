"""config.json of model types qwen2 (Qwen1.5, Qwen2, Qwen2.5, QwQ) and qwen3, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from qwenspec.diagnostics import listed
from qwenspec.hf import rope
from qwenspec.hf.config import MAX_LAYERS, Config
from qwenspec.hf.qwen1 import head_dim_of
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.attention import LayersFrom
from qwenspec.spec.mlp import Activation

Tree = dict[str, Any]
QWEN3_HEAD_DIM = 128  # Qwen3Config's default, whatever hidden_size / num_attention_heads is


def read(config: Config, qwen3: bool) -> Tree:
    """The spec's `architecture`."""
    length = config.size("max_position_embeddings", 32768)
    layers = config.size("num_hidden_layers", 32, MAX_LAYERS)
    heads = config.size("num_attention_heads", 32)
    bias = config.flag("attention_bias", default=False) if qwen3 else True
    if not qwen3:
        config.fixed("attention_bias", True, why="Hugging Face's Qwen2 has these biases whatever its config says")
    config.fixed("pretraining_tp", 1, why="others split matrix products, which changes the rounding")
    config.fixed("use_mrope", False, why="multi-axis rotary embedding is not implemented")
    _note_dual_chunk_attention(config)
    return {
        "vocab_size": config.size("vocab_size", 151936),
        "hidden_size": config.size("hidden_size", 4096),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(config, heads),
        "intermediate_size": config.size("intermediate_size", 22016),
        "max_position_embeddings": length,
        "norm": {"eps": config.number("rms_norm_eps", 1e-6)},
        "attention": {
            "head_dim": _head_dim(config, qwen3),
            "bias": {"qkv": bias, "output": bias if qwen3 else False},
            "qk_norm": "per_head" if qwen3 else "none",
            "sliding_window": _sliding_window(config, layers),
        },
        "rope": rope.read(config, length),
        "mlp": {"activation": config.choice("hidden_act", get_args(Activation), "silu"), "bias": False},
    }


def write(arch: Architecture, form: str) -> Tree:
    """The keys that Qwen-1 does not have, for an architecture of which `lacks` says nothing."""
    attention = arch.attention
    qwen3 = attention.qk_norm != "none"
    keys: Tree = {
        "num_key_value_heads": arch.num_key_value_heads or arch.num_attention_heads,
        "intermediate_size": arch.intermediate_size,
        "hidden_act": arch.mlp.activation,
        "rms_norm_eps": arch.norm.eps,
    }
    if qwen3 or attention.head_dim:
        keys["head_dim"] = head_dim_of(arch)
    if qwen3:
        keys["attention_bias"] = attention.bias.qkv
    return keys | _write_sliding_window(arch, form) | rope.write(arch.rope, form)


def lacks(arch: Architecture) -> list[str]:
    """The features of an architecture that neither qwen2 nor qwen3 has, or not together with the others."""
    attention, bias = arch.attention, arch.attention.bias
    kind = arch.rope.scaling.kind if arch.rope.scaling else None
    qwen3 = attention.qk_norm != "none"
    features = {
        "attention.bias.qkv that differs from attention.bias.output": qwen3 and bias.qkv != bias.output,
        "attention.bias.qkv: false": not qwen3 and not bias.qkv,
        "attention.bias.output": not qwen3 and bias.output,
        "attention.logn": attention.logn is not None,
        "mlp.bias": arch.mlp.bias,
        "rope.partial_rotary_factor other than 1": arch.rope.partial_rotary_factor != 1,
        "rope.compute_dtype: float32": arch.rope.compute_dtype != "activation",
        f"rope.scaling.kind: {kind}": kind is not None and kind not in rope.SCALINGS,
    }
    return [name for name, there in features.items() if there]


def _kv_heads(config: Config, heads: int | None) -> int | None:
    """null, in the file as in the spec, is as many as attention heads."""
    if "num_key_value_heads" in config and config.get("num_key_value_heads") is None:
        return None
    kv_heads = config.size("num_key_value_heads", 32)
    return None if kv_heads == heads else kv_heads


def _head_dim(config: Config, qwen3: bool) -> int | None:
    """For qwen2, absent and null are hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None or (qwen3 and "head_dim" in config):
        return config.size("head_dim")
    if not qwen3:
        return None
    config.note(f"`head_dim` is not given: {QWEN3_HEAD_DIM}, as Hugging Face assumes for qwen3.")
    return QWEN3_HEAD_DIM


def _note_dual_chunk_attention(config: Config) -> None:
    if chunks := config.child("dual_chunk_attention_config"):
        chunks.unread.clear()
        config.note(
            "dual_chunk_attention_config is not implemented, nor is it in Hugging Face's class: the spec is "
            "exact up to its original_max_position_embeddings, and beyond that it is the plain model."
        )


# --------------------------------------------------------------------------------------------- sliding window


def _sliding_window(config: Config, num_layers: int | None) -> Tree | None:
    """Layer i slides if `layer_types` says so or, without it, if i >= max_window_layers."""
    used = config.flag("use_sliding_window") if "use_sliding_window" in config else False
    first, given = config.get("max_window_layers"), config.get("sliding_window")
    kinds = _layer_types(config, num_layers)
    if not used:
        if kinds and "sliding_attention" in kinds:
            message = "`layer_types` has sliding layers, and `use_sliding_window` is not true"
            hint = "Hugging Face fails on it too: set use_sliding_window and sliding_window"
            config.error("conflict", message, "layer_types", hint)
        return None
    if kinds is None:
        first = config.size("max_window_layers", 28) if first != 0 else 0
        if first is None or num_layers is None:
            return None
        kinds = [rope.LAYER_TYPES[i >= first] for i in range(num_layers)]
    slides = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not slides or (given is None and "sliding_window" in config):
        config.note("`use_sliding_window` is true, but no layer slides.")
        return None
    return {"window": config.size("sliding_window", 4096), "layers": _layer_rule(slides, len(kinds))}


def _layer_types(config: Config, num_layers: int | None) -> Sequence[str] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list | tuple) or not set(map(str, kinds)) <= set(rope.LAYER_TYPES):
        config.error("wrong-value", f"`layer_types` is not a list of {listed(rope.LAYER_TYPES)}", "layer_types")
        return ()
    if num_layers is not None and len(kinds) != num_layers:
        message = f"`layer_types` has {len(kinds)} entries for {num_layers} layers"
        config.error("wrong-value", message, "layer_types")
    return kinds


def _layer_rule(slides: list[int], num_layers: int) -> str | Tree | list[int]:
    """The shortest way of saying which layers slide."""
    if slides != list(range(slides[0], num_layers)):
        return slides
    return {"from": slides[0]} if slides[0] else "all"


def _write_sliding_window(arch: Architecture, form: str) -> Tree:
    """Version 4 has a first sliding layer, and layer types only where that does not say it all."""
    slides, count = _sliding_layers(arch), arch.num_hidden_layers
    first = slides[0] if slides else count
    window = arch.attention.sliding_window
    keys: Tree = {
        "use_sliding_window": bool(slides),
        "sliding_window": window.window if window and slides else None,
        "max_window_layers": first,
    }
    if form == "v5" or slides != list(range(first, count)):
        keys["layer_types"] = [rope.LAYER_TYPES[i in slides] for i in range(count)]
    return keys


def _sliding_layers(arch: Architecture) -> list[int]:
    window, count = arch.attention.sliding_window, arch.num_hidden_layers
    if window is None:
        return []
    match window.layers:
        case "all":
            return list(range(count))
        case LayersFrom(from_=first):
            return list(range(first, count))
        case indices:
            return sorted(set(indices))
