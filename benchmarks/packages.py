"""Generated packages with random weights, and Hugging Face's model over the very same tensors.

Nothing is read but the package's own files, so that a full-size model needs neither a checkpoint nor a disk.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "generated"

OUTLIER_EVERY, OUTLIER_SCALE = 64, 4  # every 64th output channel of a matrix is 4 times as large

# Qwen-1's tensor names, as Hugging Face's Qwen2 class calls the same things. c_attn holds three of them.
QWEN1_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    ".ln_1": ".input_layernorm",
    ".ln_2": ".post_attention_layernorm",
    ".attn.c_attn": ".self_attn.{q,k,v}_proj",
    ".attn.c_proj": ".self_attn.o_proj",
    ".mlp.w2": ".mlp.gate_proj",
    ".mlp.w1": ".mlp.up_proj",
    ".mlp.c_proj": ".mlp.down_proj",
}


def open_package(folder: Path) -> ModuleType:
    """Import a generated package from its folder, under the folder's name."""
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    return importlib.import_module(folder.name)


def shrunk(config: Any) -> Any:
    """The same structure at toy sizes: the ratio of query to key heads stays, so that fused matrices split alike."""
    common = gcd(config.num_attention_heads, config.num_key_value_heads)
    head_dim = 16
    return replace(
        config,
        vocab_size=128,
        hidden_size=144,
        intermediate_size=200,
        num_hidden_layers=min(config.num_hidden_layers, 2),
        num_attention_heads=config.num_attention_heads // common,
        num_key_value_heads=config.num_key_value_heads // common,
        head_dim=head_dim,
        rotary_dim=head_dim,
        attention_scale=head_dim**-0.5,
    )


def random_model(package: ModuleType, config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """The package's Model with random weights, outlier channels among them, made on the device."""
    model = package.Model(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        value = _random(name, parameter.shape, generator).to(parameter.dtype)
        _set(model, name, value)
    return model.eval()


def recast(package: ModuleType, model: Any, dtype: torch.dtype) -> Any:
    """The same weights in another dtype."""
    copy = package.Model(model.config, dtype, model.device)
    for name, parameter in model.named_parameters():
        _set(copy, name, parameter.to(dtype))
    return copy.eval()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if "norm" in name:
        return noise.mul_(0.3).exp_()
    if name.endswith("bias"):
        return noise.mul_(0.3)
    if name == "embed_tokens.weight":
        noise[:, 5::OUTLIER_EVERY] *= OUTLIER_SCALE
        return noise
    noise /= shape[1] ** 0.5
    noise[5::OUTLIER_EVERY] *= OUTLIER_SCALE
    return noise


def hugging_face(package: ModuleType, model: Any, attention: str = "sdpa") -> Any:
    """Hugging Face's Qwen3 or Qwen2 causal LM whose parameters are views of this model's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    qwen3 = any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if qwen3 else (Qwen2Config, Qwen2ForCausalLM)
    config = config_class(**_settings(model), attn_implementation=attention)
    with torch.device("meta"):
        hf = model_class(config)
    hf.load_state_dict(state_dict(package, model), assign=True)
    hf.requires_grad_(False)
    # Its buffers are in no checkpoint, so they are still without values.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config).to(model.device)
    return hf.eval()


def _settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": not hasattr(model, "lm_head"),
    }


def state_dict(package: ModuleType, model: Any) -> dict[str, Tensor]:
    """Hugging Face's names for the rows of this model's parameters, as the package's MANIFEST.json has them."""
    manifest = json.loads((Path(package.__file__ or "").parent / "MANIFEST.json").read_text())
    manifest["num_layers"] = model.config.num_hidden_layers
    read_manifest = importlib.import_module(f"{package.__name__}.checkpoint").read_manifest
    state: dict[str, Tensor] = {}
    for entry in read_manifest(manifest):
        parameter = model.get_parameter(entry.name).data
        rows = [rows * parameter.shape[0] // entry.shape[0] for _, rows in entry.sources]  # of a shrunk model, fewer
        for (name, _), part in zip(entry.sources, parameter.split(rows), strict=True):
            state |= _hugging_face_names(name, part)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


def _hugging_face_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for theirs, ours in QWEN1_NAMES.items():
        name = name.replace(theirs, ours)
    if "{q,k,v}" not in name:
        return {name: tensor}
    return {name.replace("{q,k,v}", part): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}


def save_checkpoint(package: ModuleType, model: Any, folder: Path) -> None:
    """The model's parameters as a checkpoint that the packages of all backends read."""
    from safetensors.torch import save_file

    state = state_dict(package, model)
    if not hasattr(model, "lm_head"):
        del state["lm_head.weight"]
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def parameter_bytes_read(model: Any) -> int:
    """Bytes of weights that a decode step reads: all but the embedding table, and that too where it is the head."""
    tied = not hasattr(model, "lm_head")
    return sum(p.nbytes for name, p in model.named_parameters() if tied or name != "embed_tokens.weight")


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of keys and values of so many cached tokens."""
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * tokens * model.dtype.itemsize


def prefill_flops(model: Any, n: int) -> int:
    """Multiply-adds count two: every matrix of the layers for n tokens, causal attention, the head once."""
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * n * (n + 1)
    return 2 * matrices * n + attention + 2 * config.vocab_size * config.hidden_size
