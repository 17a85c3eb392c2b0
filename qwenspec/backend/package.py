"""IR -> the files of a package, as far as backends agree on them.

The structure of a variant shapes every file in one of two ways: templates for code that is all structure, folding for
plain Python files whose branches on structural flags are resolved and removed.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qwenspec.backend.config import config_fields
from qwenspec.backend.emit import environment
from qwenspec.backend.fold import declared_flags, fold
from qwenspec.backend.registry import MANIFEST
from qwenspec.backend.structure import Structure, structure
from qwenspec.ir import rope as formulas
from qwenspec.ir.nodes import Model, Param

HERE = Path(__file__).parent  # its templates/ and runtime/ are what packages of all backends share


def render(model: Model, templates: Path, names: Iterable[str]) -> dict[str, str]:
    """`name.py` from `name.py.jinja` of the backend's templates or else of the common ones."""
    found = environment(templates, HERE / "templates")
    context = template_context(model)
    return {f"{name}.py": found.get_template(f"{name}.py.jinja").render(context) for name in names}


def vendor(files: Iterable[Path], shape: Structure, folder: str = "", **flags: bool) -> dict[str, str]:
    """Plain files, with the structural flags that they declare resolved, under `folder` in the package.

    `flags`: what the backend decides otherwise than the structure does."""
    values = {**shape.flags, **flags}
    return {str(Path(folder, file.name)): _folded(file, values) for file in files}


def common(shape: Structure, *names: str, **flags: bool) -> dict[str, str]:
    """Plain files that packages of every backend share: `text` gives text.py."""
    return vendor((HERE / "runtime" / f"{name}.py" for name in names), shape, "", **flags)


def manifest(model: Model) -> dict[str, str]:
    """What weights.py reads: each parameter's shape and sources, one entry for the same parameter of all layers."""
    params = [p for p in model.params() if not p.name.startswith("layers.") or p.name.startswith("layers.0.")]
    content = {
        "num_layers": len(model.layers),
        "ignored_tensors": list(model.ignored_tensors),
        "parameters": [_entry(param, model.checkpoint_layer) for param in params],
    }
    return {MANIFEST: json.dumps(content)}


def template_context(model: Model) -> dict[str, Any]:
    """The names that templates read."""
    shape = structure(model)
    return {field.name: getattr(shape, field.name) for field in fields(shape)} | {
        "model": model,
        "fields": config_fields(model, shape.windows),
        "attention_title": attention_title(model),
        **rope_context(model),
    }


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


def _folded(file: Path, flags: Mapping[str, bool | str]) -> str:
    source = file.read_text(encoding="utf-8")
    declared = declared_flags(source)
    return _fold(source, tuple((name, value) for name, value in flags.items() if name in declared))


@functools.lru_cache(maxsize=1024)
def _fold(source: str, flags: tuple[tuple[str, bool | str], ...]) -> str:
    """Many variants share most files."""
    return fold(source, dict(flags))


def _entry(param: Param, checkpoint_layer: str) -> dict[str, Any]:
    """Layer 0's parameter stands for all: `{i}` takes the place of its index in every name."""
    sources = [(source.tensor, source.rows) for source in param.sources]
    if param.name.startswith("layers.0."):
        first = checkpoint_layer.replace("{i}", "0")
        sources = [(checkpoint_layer + tensor.removeprefix(first), rows) for tensor, rows in sources]
    name = param.name.replace("layers.0.", "layers.{i}.")
    return {"name": name, "shape": list(param.shape), "sources": sources}
