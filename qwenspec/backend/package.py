"""IR -> the files of a package, as far as backends agree on them.

The structure of a variant shapes every file in one of two ways: templates for code that is all structure, folding for
plain Python files whose branches on structural flags are resolved and removed.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

from qwenspec.backend.config import config_fields
from qwenspec.backend.emit import environment
from qwenspec.backend.fold import declared_flags, fold
from qwenspec.backend.quoting import inside_quotes
from qwenspec.backend.registry import MANIFEST
from qwenspec.backend.structure import Structure, packing, structure
from qwenspec.ir import rope as formulas
from qwenspec.ir import shares
from qwenspec.ir.nodes import Model, WeightFormat
from qwenspec.ir.quantized import Block, blocks, stored_tensors
from qwenspec.ir.shard import Sharing, mlp_unit
from qwenspec.ir.shares import Shared

HERE = Path(__file__).parent  # its templates/ and runtime/ are what packages of all backends share


def render(model: Model, templates: Path, names: Iterable[str], **context: Any) -> dict[str, str]:
    """`name.py` from `name.py.jinja` of the backend's templates or else of the common ones.

    `context`: names that only the backend's own templates read."""
    found = environment(templates, HERE / "templates")
    context |= template_context(model)
    return {f"{name}.py": found.get_template(f"{name}.py.jinja").render(context) for name in names}


def vendor(files: Iterable[Path], shape: Structure, folder: str = "", **flags: bool | str) -> dict[str, str]:
    """Plain files, with the structural flags that they declare resolved, under `folder` in the package.

    `flags`: what the backend decides otherwise than the structure does."""
    values = {**shape.flags, **flags}
    return {str(Path(folder, file.name)): _folded(file, values) for file in files}


def common(shape: Structure, *names: str, **flags: bool) -> dict[str, str]:
    """Plain files that packages of every backend share: `text` gives text.py."""
    files = [*(HERE / "runtime" / f"{name}.py" for name in (*names, "meeting")), Path(shares.__file__)]
    return vendor(files, shape, "", **flags)


def manifest(model: Model) -> dict[str, str]:
    """What checkpoint.py reads: each parameter's shape and sources, one entry for the same parameter of all layers."""
    content: dict[str, Any] = {"num_layers": len(model.layers), "ignored_tensors": list(model.ignored_tensors)}
    shape = structure(model)
    if shape.weights or shape.head_weights:
        content["zero_tensors"] = list(model.zero_tensors)
    if model.tied_names:
        content["tied"] = list(model.tied_names)
    return {MANIFEST: json.dumps(content | {"parameters": _entries(model)})}


def template_context(model: Model) -> dict[str, Any]:
    """The names that templates read. None is a text of the spec's that could end a literal or a comment."""
    shape = structure(model)
    return {field.name: getattr(shape, field.name) for field in fields(shape)} | {
        "variant": inside_quotes(model.name),
        "dtype": model.dtype,
        "fields": config_fields(model, shape.windows),
        "attention_title": attention_title(model),
        "linear_blocks": linear_blocks(model),
        "mlp_unit": mlp_unit(model),
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
    *first, last = features or [""]
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{kind} attention over a paged cache" + (f", with {listed}" if listed else "")


def linear_blocks(model: Model) -> dict[str, list[tuple[str, bool]]]:
    """The linear layers that are not quantised in one piece, by address: of each block of rows, from the top, its part
    (empty for a whole matrix), and whether it is quantised."""
    found = {}
    for linear in (linear for layer in model.layers for linear in layer.linears()):
        pieces = blocks(linear.weight)
        if len(pieces) > 1 or pieces[0].format is None:
            parts = [piece.name.removeprefix(linear.name).removesuffix("weight").strip(".") for piece in pieces]
            found[linear.name] = [(part, piece.format is not None) for part, piece in zip(parts, pieces, strict=True)]
    return found


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


def _entries(model: Model) -> list[dict[str, Any]]:
    """Of parameters that layers have in common one, with `{i}` in place of the layer; `layers` when not all have it."""
    layers: dict[str, list[int]] = {}
    entries: dict[str, dict[str, Any]] = {}
    sharing = Sharing(model)
    for param in model.params():
        layer = re.match(r"layers\.(\d+)\.", param.name)
        for block, shared in sharing.blocks(param):
            in_any_layer = _in_any_layer(model.checkpoint_layer, int(layer[1])) if layer else str
            entry = _entry(block, shared, in_any_layer)
            key = json.dumps(entry)
            entries[key] = entry
            layers.setdefault(key, []).append(int(layer[1]) if layer else 0)
    for key, entry in entries.items():
        if "{i}" in entry["name"] and len(layers[key]) < len(model.layers):
            entry["layers"] = layers[key]
    return list(entries.values())


def _entry(block: Block, shared: Shared, named: Callable[[str], str]) -> dict[str, Any]:
    """As `qwenspec.ir.shares.read_entry` and checkpoint.py read it. `named`: how names are written there."""
    entry: dict[str, Any] = {"name": named(block.name), "shape": list(shared.shape)}
    if shared.rows:
        entry["rows"] = [astuple(part) for part in shared.rows]
    if shared.columns:
        entry["columns"] = astuple(shared.columns)
    if shared.first:
        entry["rank"] = 0
    if block.format is None:
        return entry | {"sources": [(named(source.tensor), source.rows) for source in block.sources]}
    tensors = [stored_tensors(source, *shared.shape[1:]) for source in block.sources]
    return entry | {
        "format": _format(block.format),
        "sources": [
            {
                "rows": source.rows,
                "tensors": {
                    suffix: astuple(replace(tensor, name=named(tensor.name))) for suffix, tensor in stored.items()
                },
            }
            for source, stored in zip(block.sources, tensors, strict=True)
        ],
    }


def _format(format: WeightFormat) -> dict[str, Any]:
    return {"packing": packing(format), **asdict(format)}


def _in_any_layer(checkpoint_layer: str, layer: int) -> Callable[[str], str]:
    """`{i}` takes the place of the layer's index at the beginning of a name, of the package's or the checkpoint's."""
    prefixes = {f"layers.{layer}.": "layers.{i}.", checkpoint_layer.replace("{i}", str(layer)): checkpoint_layer}

    def named(name: str) -> str:
        for prefix, general in prefixes.items():
            if name.startswith(prefix):
                return general + name.removeprefix(prefix)
        return name

    return named
