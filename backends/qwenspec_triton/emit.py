"""IR -> the files of a PyTorch/Triton package.

The structure of the variant is decided here once (`Structure`), and then shapes every file in one of two ways:
templates for code that is all structure, folding for plain Python files whose branches on structural flags are
resolved and removed.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qwenspec.backend.emit import environment
from qwenspec.ir import rope as formulas
from qwenspec.ir.nodes import (
    DynamicQwen1Rope,
    DynamicRope,
    EmbeddingHead,
    LmHead,
    LongRope,
    Model,
    Param,
)
from qwenspec_triton.config import config_fields
from qwenspec_triton.fold import declared_flags, fold

HERE = Path(__file__).parent


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
        """The structural flags of kernels/ and runtime/."""
        return {
            "QK_NORM": self.qk_norm,
            "ONE_PLUS": self.one_plus,
            "LOGN": self.logn,
            "SLIDING": self.windows != "none",
            "PARTIAL_ROTARY": self.partial_rotary,
            "ACTIVATION": self.activation,
            "DYNAMIC_ROPE": self.dynamic,
            "FROZEN_ROPE": self.frozen,
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


def emit(model: Model) -> dict[str, str]:
    """Path inside the package -> text."""
    shape = structure(model)
    generates = shape.head != "embedding"
    templates = environment(HERE / "templates")
    context = {name: getattr(shape, name) for name in (f.name for f in fields(shape))} | {
        "model": model,
        "fields": config_fields(model, shape.windows),
        "attention_title": attention_title(model),
        **rope_context(model),
    }
    names = ["__init__", "__main__", "config", "layers", "model", "rope"]
    files = {f"{name}.py": templates.get_template(f"{name}.py.jinja").render(context) for name in names}
    runtime = ["cache", "graphs", "text", "weights"] + (["generate"] if generates else [])
    for name in runtime:
        files[f"{name}.py"] = _folded(HERE / "runtime" / f"{name}.py", shape)
    for file in sorted((HERE / "kernels").glob("*.py")):
        files[f"kernels/{file.name}"] = _folded(file, shape)
    files["MANIFEST.json"] = json.dumps(manifest(model))
    return files


def _folded(file: Path, shape: Structure) -> str:
    """A plain file with the structural flags that it declares resolved."""
    source = file.read_text(encoding="utf-8")
    return fold(source, {name: value for name, value in shape.flags.items() if name in declared_flags(source)})


def attention_title(model: Model) -> str:
    """The attention's docstring, in a line."""
    attention = model.layers[0].mixer
    kinds = {attention.num_heads: "Multi-head", 1: "Multi-query"}
    kind = kinds.get(attention.num_kv_heads, "Grouped-query")
    features = ["per-head QK-norm"] if attention.q_norm else []
    features += ["LogN scaling"] if attention.logn else []
    features += ["a sliding window"] if any(layer.mixer.window for layer in model.layers) else []
    return f"{kind} attention over a paged cache" + (f", with {' and '.join(features)}" if features else "")


def rope_context(model: Model) -> dict[str, Any]:
    """The formula that a variant needs, as source text, and the call that gives it the variant's numbers."""
    scaling = model.rope.scaling
    formula = formulas.formula(scaling)
    arguments = {"dim": "config.rotary_dim", "theta": "config.rope_theta", "length": "length"}
    arguments |= {field.name: f"config.rope_{field.name}" for field in fields(scaling)}
    call = ", ".join(arguments[name] for name in inspect.signature(formula).parameters)
    name = formula.__name__
    return {
        "formula": inspect.getsource(formula).strip(),
        "call": f"{name}({call})",
        "scaling_title": "" if name == "default" else f", {name} scaling",
    }


def manifest(model: Model) -> dict[str, Any]:
    """What weights.py reads: each parameter's shape and sources, one entry for the same parameter of all layers."""
    params = [p for p in model.params() if not p.name.startswith("layers.") or p.name.startswith("layers.0.")]
    return {
        "num_layers": len(model.layers),
        "ignored_tensors": list(model.ignored_tensors),
        "parameters": [_entry(param, model.checkpoint_layer) for param in params],
    }


def _entry(param: Param, checkpoint_layer: str) -> dict[str, Any]:
    """Layer 0's parameter stands for all: `{i}` takes the place of its index in every name."""
    sources = [(source.tensor, source.rows) for source in param.sources]
    if param.name.startswith("layers.0."):
        first = checkpoint_layer.replace("{i}", "0")
        sources = [(checkpoint_layer + tensor.removeprefix(first), rows) for tensor, rows in sources]
    name = param.name.replace("layers.0.", "layers.{i}.")
    return {"name": name, "shape": list(param.shape), "sources": sources}
