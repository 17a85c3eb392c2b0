"""config.json of model type qwen (Qwen-1, whose classes are remote code), both ways."""

from __future__ import annotations

from typing import Any

from qwenspec.hf.config import MAX_LAYERS, Config
from qwenspec.spec.architecture import Architecture

Tree = dict[str, Any]


def read(config: Config) -> Tree:
    """The spec's `architecture`. Keys have the final release's names or those of August 2023."""
    hidden_size = config.size(_either(config, "hidden_size", "n_embd"))
    heads = config.size(_either(config, "num_attention_heads", "n_head"))
    head_dim = config.size("kv_channels", 128)
    if hidden_size and heads and head_dim and hidden_size != heads * head_dim:
        message = f"{heads} heads of `kv_channels` {head_dim} are not the hidden size {hidden_size}"
        config.error("conflict", message, "kv_channels")
    config.get("vocab_size")  # beside padded_vocab_size it is the tokenizer's, without the padding
    length = _either(config, "max_position_embeddings", "n_positions")
    biased = config.flag("no_bias", True) is False  # but c_attn, which always has one
    scaling, logn = _beyond_training_length(config)
    _check_constants(config)
    return {
        "vocab_size": config.size("padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"),
        "hidden_size": hidden_size,
        "num_hidden_layers": config.size(_either(config, "num_hidden_layers", "n_layer"), 32, MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": _half_of_width(config),
        "max_position_embeddings": config.size(length),
        "norm": {"eps": config.number("layer_norm_epsilon", 1e-6)},
        "attention": {
            "head_dim": head_dim,
            "bias": {"qkv": True, "output": biased},
            "qk_norm": "none",
            "logn": logn,
        },
        "rope": {
            "theta": config.number("rotary_emb_base", 10000),
            "partial_rotary_factor": config.number("rotary_pct") if "rotary_pct" in config else 1.0,
            "compute_dtype": "float32",
            "scaling": scaling,
        },
        "mlp": {"activation": "silu", "bias": biased},
    }


def write(arch: Architecture) -> Tree:
    """The keys that only Qwen-1 has, for an architecture of which `lacks` says nothing."""
    scaling, logn = arch.rope.scaling, arch.attention.logn
    return {
        "kv_channels": head_dim_of(arch),
        "intermediate_size": 2 * arch.intermediate_size,
        "layer_norm_epsilon": arch.norm.eps,
        "rotary_emb_base": arch.rope.theta,
        "rotary_pct": arch.rope.partial_rotary_factor,
        "seq_length": getattr(scaling or logn, "train_length", arch.max_position_embeddings),
        "use_dynamic_ntk": scaling is not None,
        "use_logn_attn": logn is not None,
        "no_bias": not arch.mlp.bias,
        "scale_attn_weights": True,
    }


def lacks(arch: Architecture) -> list[str]:
    """The features of an architecture that model type qwen does not have."""
    attention, scaling = arch.attention, arch.rope.scaling
    heads, width = arch.num_attention_heads, arch.num_attention_heads * head_dim_of(arch)
    kind = scaling.kind if scaling else None
    lengths = {getattr(feature, "train_length", None) for feature in (scaling, attention.logn) if feature}
    features = {
        "num_key_value_heads other than num_attention_heads": arch.num_key_value_heads not in (None, heads),
        "attention.head_dim other than hidden_size / num_attention_heads": width != arch.hidden_size,
        "attention.qk_norm": attention.qk_norm != "none",
        "attention.bias.qkv: false": not attention.bias.qkv,
        "attention.bias.output that differs from mlp.bias": attention.bias.output != arch.mlp.bias,
        "attention.sliding_window": attention.sliding_window is not None,
        f"mlp.activation: {arch.mlp.activation}": arch.mlp.activation not in ("silu", "swish"),
        "rope.compute_dtype: activation": arch.rope.compute_dtype != "float32",
        f"rope.scaling.kind: {kind}": kind not in (None, "dynamic_qwen1"),
        "train_length for rope.scaling that differs from attention.logn's": len(lengths) > 1,
        "embedding": arch.embedding is not None,
    }
    return [name for name, there in features.items() if there]


def head_dim_of(arch: Architecture) -> int:
    """Width of a head, with the spec's null resolved."""
    return arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads


def _either(config: Config, name: str, first_name: str) -> str:
    """The key in use. Where a file has both they must agree."""
    new, old = config.get(name), config.get(first_name)
    if None not in (new, old) and new != old:
        config.error("conflict", f"`{name}` is {new} and `{first_name}` is {old}", first_name)
    return first_name if name not in config and first_name in config else name


def _half_of_width(config: Config) -> int | None:
    """config.json has the width of gate and up together; the spec has the width of each."""
    key = _either(config, "intermediate_size", "ffn_hidden_size")
    width = config.size(key)
    if width and width % 2:
        config.error("wrong-value", f"`{key}` is gate and up together and must be even, not {width}", key)
    return width and width // 2


def _beyond_training_length(config: Config) -> tuple[Tree | None, Tree | None]:
    """The spec's rope.scaling and attention.logn."""
    ntk, logn = config.flag("use_dynamic_ntk", True), config.flag("use_logn_attn", True)
    if not (ntk or logn):
        config.get("seq_length")
        return None, None
    trained = {"train_length": config.size("seq_length", 8192)}
    return {"kind": "dynamic_qwen1", **trained} if ntk else None, trained if logn else None


def _check_constants(config: Config) -> None:
    config.fixed("activation", "swiglu", why="Qwen-1 has no other")
    config.fixed("pos_emb", "rotary", why="Qwen-1 has no other")
    config.fixed("apply_residual_connection_post_layernorm", False, why="Qwen-1 has no other")
    config.fixed("scale_attn_weights", True, why="scores are always divided by sqrt(head_dim)")
    config.fixed(
        "use_cache_quantization", False, why="its scales follow how a prompt is cut; a spec's `kv_cache` do not"
    )
    config.fixed("rope_scaling", None, why="Qwen-1 does not read it")
    config.fixed("rope_theta", config.get("rotary_emb_base"), why="Qwen-1 reads rotary_emb_base")
