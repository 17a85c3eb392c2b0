"""Hugging Face transformers as the oracle of a spec: config, random weights, checkpoint folder, logits.

Everything here follows from the spec directly, without `qwenspec.ir` and `qwenspec.hf`. The class is Qwen3's
where queries and keys are normalised, else Qwen2's. What they lack is added from outside, where it follows
exactly from what they have: any bias, the score scale, 1 + w norms (w plus one is stored), fixed and Qwen-1
NTK (a larger theta), LogN (RoPE is linear, so the query may be scaled before it).
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "dtype": "float32",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 16},  # 4 heads of 16 are not 48
    "rope": {"theta": 10000.0},
}
QWEN2: dict[str, Any] = {"attention": {"bias": {"qkv": True}}}
QWEN3: dict[str, Any] = {"attention": {"qk_norm": "per_head"}}
QWEN1: dict[str, Any] = {
    "hidden_size": 64,
    "num_key_value_heads": None,
    "attention": {"bias": {"qkv": True}, "head_dim": None},
    "rope": {"compute_dtype": "float32"},
    "checkpoint": {"layout": "qwen1"},
}


def tiny_spec(*changes: dict[str, Any]) -> Spec:
    """TINY with changes merged into it, one after the other, read by qwenspec's own loader."""
    architecture = TINY
    for change in changes:
        architecture = merge(architecture, change)
    document = {
        "schema_version": 1,
        "family": "tiny",
        "description": "A model for tests.",
        "default_variant": "tiny",
        "architecture": architecture,
        "variants": {"tiny": {}},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(yaml.safe_dump(document))
        return load(path, variant="tiny")


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def some_ids(spec: Spec, n: int, seed: int = 0) -> np.ndarray:
    """n random tokens: int32 [n]."""
    return np.random.default_rng(seed).integers(0, spec.architecture.vocab_size, n, dtype=np.int32)


class Oracle:
    """A Hugging Face model of a spec with random weights that bfloat16 holds exactly.

    `state` is the checkpoint: name, as the spec's layout gives it, to float32 tensor."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        self.spec = spec
        self.config = hf_config(spec)
        qwen3 = isinstance(self.config, Qwen3Config)
        self.model = (Qwen3ForCausalLM if qwen3 else Qwen2ForCausalLM)(self.config).eval()
        _fit_biases(spec, self.model)
        _randomise(self.model, torch.Generator().manual_seed(seed))
        self.state = checkpoint(spec, self.model)
        if spec.architecture.norm.weight == "one_plus":
            for name, parameter in self.model.named_parameters():
                if "norm" in name:
                    parameter.data += 1
        scale = spec.architecture.attention.scale
        for layer in self.model.model.layers:
            layer.self_attn.scaling = scale or layer.self_attn.scaling
            if spec.architecture.attention.logn is not None:
                _scale_queries(layer.self_attn, spec.architecture.attention.logn.train_length)

    def logits(self, ids: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
        """Logits of every token of one sequence in one forward: [n, vocab]; embeddings: [n, hidden]."""
        model = copy.deepcopy(self.model).to(dtype)
        # A fresh rotary module: dynamic RoPE remembers earlier calls, and .to(dtype) rounded its frequencies.
        config = copy.deepcopy(self.config)
        config.rope_parameters = rope_parameters(self.spec, len(ids))
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        with torch.no_grad():
            tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
            embedding = self.spec.architecture.embedding
            if embedding is None:
                out = model(tokens).logits[0]
            else:
                out = model.model(tokens).last_hidden_state[0]
                out = nn.functional.normalize(out, dim=-1) if embedding.normalize else out
        assert torch.isfinite(out).all()
        return out.double().numpy()

    def weights(self) -> dict[str, np.ndarray]:
        """The checkpoint as numpy arrays, float32."""
        return {name: tensor.numpy() for name, tensor in self.state.items()}

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
        """Write a checkpoint folder of `shards` safetensors files, with config.json unless it is Qwen-1's."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in self.state.items()}
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        if shards == 1:
            files = ["model.safetensors"]
        where = {name: files[i % shards] for i, name in enumerate(tensors)}
        for file in files:
            held = {name: tensor for name, tensor in tensors.items() if where[name] == file}
            save_file(held, folder / file, metadata={"format": "pt"})
        if shards > 1:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if "model.embed_tokens.weight" in tensors:
            self.config.save_pretrained(folder)
        return folder


def hf_config(spec: Spec) -> PreTrainedConfig:
    """The config of the Hugging Face class that is nearest to a spec."""
    arch, attention = spec.architecture, spec.architecture.attention
    heads = arch.num_attention_heads
    settings: dict[str, Any] = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": arch.num_key_value_heads or heads,
        "head_dim": attention.head_dim or arch.hidden_size // heads,
        "hidden_act": arch.mlp.activation,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm.eps,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "rope_parameters": rope_parameters(spec, 1),
        "attn_implementation": "eager",
    }
    if attention.sliding_window is not None:
        layers = attention.sliding_window.layers
        if layers == "all":
            slides = [True] * arch.num_hidden_layers
        elif isinstance(layers, tuple):
            slides = [i in layers for i in range(arch.num_hidden_layers)]
        else:
            slides = [i >= layers.from_ for i in range(arch.num_hidden_layers)]
        settings["use_sliding_window"] = True
        settings["sliding_window"] = attention.sliding_window.window
        settings["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    if attention.qk_norm == "per_head":
        settings["attention_bias"] = attention.bias.qkv and attention.bias.output
        return Qwen3Config(**settings)
    return Qwen2Config(**settings)


def rope_parameters(spec: Spec, length: int) -> dict[str, Any]:
    """Hugging Face's rope_parameters; `length`, the prompt's, matters to dynamic_qwen1 alone."""
    arch = spec.architecture
    rope = arch.rope
    assert rope.partial_rotary_factor == 1, "the Qwen2 and Qwen3 classes ignore partial_rotary_factor"
    scaling = {} if rope.scaling is None else rope.scaling.model_dump(exclude_none=True)
    kind = scaling.pop("kind", "default")
    dim = arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads
    alpha = 1.0
    if kind == "ntk":
        kind, alpha = "default", scaling.pop("factor")
    elif kind == "dynamic_qwen1":
        kind, stretch = "default", length / scaling.pop("train_length")
        alpha = max(2 ** math.ceil(math.log2(stretch) + 1) - 1, 1)
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in scaling.items()}
    return {"rope_type": kind, "rope_theta": rope.theta * alpha ** (dim / (dim - 2)), **listed}


def checkpoint(spec: Spec, model: nn.Module) -> dict[str, Tensor]:
    """A Hugging Face model's parameters under the names of the spec's layout."""
    layout = spec.layout
    modules = {layout.embedding: ["model.embed_tokens"], layout.norm: ["model.norm"]}
    if not spec.architecture.tie_word_embeddings and spec.architecture.embedding is None:
        modules[layout.lm_head] = ["lm_head"]
    for i in range(spec.architecture.num_hidden_layers):
        ours, theirs = layout.layer.format(i=i), f"model.layers.{i}"
        qkv = [f"{theirs}.self_attn.{p}_proj" for p in "qkv"]
        gate_up = [f"{theirs}.mlp.{p}_proj" for p in ("gate", "up")]
        for names, parts in ((layout.attention.qkv, qkv), (layout.mlp.gate_up, gate_up)):
            groups = [parts] if len(names) == 1 else [[part] for part in parts]
            modules |= {f"{ours}.{name}": group for name, group in zip(names, groups, strict=True)}
        modules[f"{ours}.{layout.attention.o}"] = [f"{theirs}.self_attn.o_proj"]
        modules[f"{ours}.{layout.mlp.down}"] = [f"{theirs}.mlp.down_proj"]
        modules[f"{ours}.{layout.input_norm}"] = [f"{theirs}.input_layernorm"]
        modules[f"{ours}.{layout.post_attention_norm}"] = [f"{theirs}.post_attention_layernorm"]
        if spec.architecture.attention.qk_norm == "per_head":
            modules[f"{ours}.{layout.attention.q_norm}"] = [f"{theirs}.self_attn.q_norm"]
            modules[f"{ours}.{layout.attention.k_norm}"] = [f"{theirs}.self_attn.k_norm"]
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        f"{name}.{kind}": torch.cat([state[f"{part}.{kind}"] for part in parts])
        for name, parts in modules.items()
        for kind in ("weight", "bias")
        if f"{parts[0]}.{kind}" in state
    }


def _fit_biases(spec: Spec, model: nn.Module) -> None:
    """Add the biases that the spec has and the class lacks; take away those that it has too many."""
    attention, mlp = spec.architecture.attention, spec.architecture.mlp
    wanted = dict.fromkeys(("q_proj", "k_proj", "v_proj"), attention.bias.qkv)
    wanted |= {"o_proj": attention.bias.output}
    wanted |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), mlp.bias)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            bias = wanted[name.rsplit(".", 1)[-1]]
            module.bias = nn.Parameter(torch.zeros(module.out_features)) if bias else None


# Distinct magnitudes, so that parts of a fused matrix that are swapped or share a scale show.
_GAIN = {"q_proj": 1.2, "k_proj": 1.8, "v_proj": 0.5, "o_proj": 0.8}
_GAIN |= {"gate_proj": 1.5, "up_proj": 0.6, "down_proj": 0.9, "lm_head": 1.0, "embed_tokens": 1.0}
_OUTLIER = 10.0


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Every weight, bias and norm, with one outlier channel in most matrices; rounded to bfloat16."""
    for name, parameter in model.named_parameters():
        module, kind = name.split(".")[-2:]
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in module:
            value = torch.exp(0.4 * noise)
        elif kind == "bias":
            value = 0.4 * _GAIN[module] * noise
        else:
            value = _GAIN[module] * noise
            if module != "embed_tokens":
                value /= math.sqrt(parameter.shape[1])
        if module in ("embed_tokens", "down_proj"):
            value.view(-1, parameter.shape[-1])[:, 3] *= _OUTLIER
        elif module in ("v_proj", "up_proj"):
            value[5] *= _OUTLIER
        parameter.data.copy_(value.bfloat16())


def _scale_queries(attention: nn.Module, train_length: int) -> None:
    def scale(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        positions = torch.arange(out.shape[1], dtype=torch.float64)
        factor = torch.clamp(torch.log(positions + 1) / math.log(train_length), min=1).to(out.dtype)
        return out * factor.view(-1, *[1] * (out.dim() - 2))

    getattr(attention, "q_norm", attention.q_proj).register_forward_hook(scale)
