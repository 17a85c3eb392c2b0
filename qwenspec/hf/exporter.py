"""A spec to the config.json that Hugging Face loads with the same meaning."""

from __future__ import annotations

from typing import Any, Literal

from qwenspec.diagnostics import Diagnostic, Location, SpecError
from qwenspec.hf import quantization, qwen1, qwen2
from qwenspec.hf.importer import BACKBONES, LANGUAGE_MODELS
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.document import Spec

Form = Literal["v5", "v4"]


def export_config(spec: Spec, form: Form = "v5") -> dict[str, Any]:
    """config.json as transformers 5 writes it or, with form `v4`, as version 4 did.

    The model type follows from the features: qwen for Qwen-1's tensor names, qwen3 with QK-norm, else qwen2.
    Raises SpecError (`not-in-hugging-face`) with a diagnostic for each feature that this model type lacks.
    """
    arch = spec.architecture
    first_generation = arch.checkpoint.layout == "qwen1"
    model_type = "qwen" if first_generation else "qwen3" if arch.attention.qk_norm != "none" else "qwen2"
    lacks = _lacks(arch) + (qwen1.lacks(arch) if first_generation else qwen2.lacks(arch))
    lacks += quantization.lacks(spec.quantization) + ["kv_cache"] * (spec.kv_cache is not None)
    if lacks:
        place = Location(spec.file, 0, 0) if spec.file else None
        raise SpecError(
            Diagnostic("not-in-hugging-face", f"{spec.variant}: {model_type} has no {feature}", place)
            for feature in lacks
        )
    classes = BACKBONES if arch.embedding else LANGUAGE_MODELS
    return {
        "architectures": [classes[model_type]],
        "model_type": model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_attention_heads": arch.num_attention_heads,
        "max_position_embeddings": arch.max_position_embeddings,
        **(qwen1.write(arch) if first_generation else qwen2.write(arch, form)),
        "tie_word_embeddings": arch.tie_word_embeddings,
        ("dtype" if form == "v5" else "torch_dtype"): arch.dtype,
        **quantization.write(spec.quantization),
    }


def _lacks(arch: Architecture) -> list[str]:
    """The features that no model type has."""
    scale, layout, head = arch.attention.scale, arch.checkpoint.layout, arch.lm_head
    features = {
        f"norm.weight: {arch.norm.weight}": arch.norm.weight != "plain",
        "attention.scale other than 1 / sqrt(head_dim)": scale not in (None, qwen1.head_dim_of(arch) ** -0.5),
        "lm_head.dtype other than the model's": head is not None and head.dtype not in (None, arch.dtype),
        "embedding.normalize: false": arch.embedding is not None and not arch.embedding.normalize,
        "checkpoint.layout of its own": layout not in ("qwen1", "qwen2", "qwen3_embedding"),
        "lm_head with checkpoint.layout qwen3_embedding": head is not None and layout == "qwen3_embedding",
    }
    return [name for name, there in features.items() if there]
