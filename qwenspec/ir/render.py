"""IR -> text, for people and golden tests, and the difference between two models in the same words.

A model is described as rows (address, text). Layers that read alike are shown once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from qwenspec.ir import nodes
from qwenspec.ir.cost import count_parameters
from qwenspec.ir.quantized import Block, blocks, format_title
from qwenspec.ir.rope import follows_length, frequencies

T = TypeVar("T")
Rows = dict[str, str]  # address -> what is there
IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def render(model: nodes.Model) -> str:
    """The whole model as text. Numbers have twelve digits, so that a changed formula shows."""
    lines = [f"{model.name} (family {model.family})"]
    for title, rows in describe(model).items():
        sections = list(_blocks(rows))
        width = max(len(address) for _, block in sections for address, _ in block)
        lines += ["", title]
        for heading, block in sections:
            lines += [f"  {heading}"] if heading else []
            lines += [f"  {address:{width}}  {text}" for address, text in block]
    return "\n".join(lines) + "\n"


def diff(a: nodes.Model, b: nodes.Model) -> str:
    """What changes from `a` to `b`, by address; layers that change alike are together. Empty if equal."""
    lines: list[str] = []
    before, after = describe(a), describe(b)
    shared = range(min(len(a.layers), len(b.layers)))
    for title in before:
        changes = _changes(before[title], after[title], shared)
        lines += ["", title] if changes else []
        for heading, block in _blocks(changes):
            lines += [f"  {heading}"] if heading else []
            for address, (old, new) in block:
                lines += [f"  {address}", f"      - {old}", f"      + {new}"]
    return "\n".join([f"{a.name} -> {b.name}", *lines]) + "\n" if lines else ""


def describe(model: nodes.Model) -> dict[str, Rows]:
    """Every fact of the model: title -> address -> text. The text never mentions the layer's own index."""
    return {
        "model": _overview(model),
        "rope": _rope(model.rope),
        "modules": _modules(model),
        "parameters": {param.name: _param(param, model.checkpoint_layer) for param in model.params()},
    }


def _overview(model: nodes.Model) -> Rows:
    count = count_parameters(model)
    return {
        "dtype": model.dtype,
        "vocab_size": str(model.vocab_size),
        "hidden_size": str(model.hidden_size),
        "num_layers": str(len(model.layers)),
        "max_position_embeddings": str(model.max_position_embeddings),
        "num_parameters": f"{count.total:,} ({count.per_layer:,} a layer, {count.embedding:,} embedding)",
        "ignored_tensors": ", ".join(model.ignored_tensors) or "none",
    }


def _rope(rope: nodes.Rope) -> Rows:
    rows = {
        "rotary_dim": str(rope.rotary_dim),
        "theta": _number(rope.theta),
        "compute_dtype": rope.compute_dtype,
        "scaling": repr(rope.scaling),
        "attention_factor": _number(rope.attention_factor),
    }
    if not follows_length(rope.scaling):
        return rows | {"inv_freq": _quartiles(frequencies(rope, 1))}
    for length in _telling_lengths(rope.scaling):
        rows[f"inv_freq for {length} tokens"] = _quartiles(frequencies(rope, length))
    return rows


def _telling_lengths(scaling: nodes.RopeScaling) -> tuple[int, ...]:
    """Sequence lengths on both sides of where the frequencies change."""
    match scaling:
        case nodes.DynamicRope(max_position=limit):
            return limit, limit + 1, 2 * limit
        case nodes.DynamicQwen1Rope(train_length=limit):
            return limit, limit + 1, 2 * limit + 1
        case nodes.LongRope(original_max_position=limit):
            return limit, limit + 1
        case _:
            raise AssertionError(f"{scaling} does not depend on the length")


def _modules(model: nodes.Model) -> Rows:
    rows = {"embed_tokens": f"lookup of {model.vocab_size} rows"}
    for layer in model.layers:
        attention, mlp = layer.mixer, layer.feed_forward
        rows[layer.input_norm.name] = _norm(layer.input_norm)
        rows[attention.name] = _attention(attention)
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                rows[norm.name] = _norm(norm)
        rows[layer.post_attention_norm.name] = _norm(layer.post_attention_norm)
        rows[mlp.name] = f"down({mlp.activation}(gate) · up), width {mlp.intermediate_size}"
    return rows | {"norm": _norm(model.norm), model.head.name: _head(model.head)}


def _norm(norm: nodes.RMSNorm) -> str:
    return f"RMSNorm over {norm.size}, eps {_number(norm.eps)}, {norm.style} weight"


def _attention(attention: nodes.Attention) -> str:
    window = "full" if attention.window is None else f"window {attention.window}"
    logn = "" if attention.logn is None else f", LogN beyond {attention.logn.train_length}"
    return (
        f"{attention.num_heads} query heads on {attention.num_kv_heads} key/value heads of "
        f"{attention.head_dim}, scale {_number(attention.scale)}, {window}{logn}"
    )


def _head(head: nodes.Head) -> str:
    match head:
        case nodes.LmHead():
            tied = "tied to " if head.tied else ""
            return f"float32 logits, product in {head.dtype}, {tied}{head.weight.name}"
        case nodes.EmbeddingHead():
            return "last token's hidden state" + (", L2-normalised" if head.normalize else "")


def _param(param: nodes.Param, checkpoint_layer: str) -> str:
    parts = ", ".join(f"{part.name} {part.rows}" for part in param.parts)
    fused = f"  ({parts})" if len(param.parts) > 1 else ""
    tensors = [source.tensor for source in param.sources]
    if layer := IN_LAYER.fullmatch(param.name):
        own = checkpoint_layer.replace("{i}", layer[1])
        tensors = [checkpoint_layer + tensor.removeprefix(own) for tensor in tensors]
    stored = "".join(f"  [{_stored(piece, param.name)}]" for piece in blocks(param) if piece.format)
    return f"{list(param.shape)!s:15} {param.dtype} {param.shard.value:9} {_braces(tensors)}{fused}{stored}"


def _stored(piece: Block, name: str) -> str:
    """What is quantised, if not the whole parameter, and how."""
    assert piece.format is not None
    part = "" if piece.name == name else f"{piece.name.split('.')[-2]}: "
    return part + format_title(piece.format)


def _braces(names: list[str]) -> str:
    """`a.x.w` and `a.y.w` as `a.{x,y}.w`."""
    split = [name.split(".") for name in names]
    if len({len(words) for words in split}) > 1:
        return ", ".join(names)
    columns = [list(dict.fromkeys(words)) for words in zip(*split, strict=True)]
    return ".".join(words[0] if len(words) == 1 else "{" + ",".join(words) + "}" for words in columns)


def _changes(before: Rows, after: Rows, shared: Collection[int]) -> dict[str, tuple[str, str]]:
    """Address -> (old, new) where they differ. Layers that only one model has are left to `num_layers`."""
    changes = {}
    for address in before | after:
        old, new = before.get(address, "absent"), after.get(address, "absent")
        layer = IN_LAYER.fullmatch(address)
        if old != new and (layer is None or int(layer[1]) in shared):
            changes[address] = (old, new)
    return changes


def _blocks(rows: Mapping[str, T]) -> Iterator[tuple[str, list[tuple[str, T]]]]:
    """Heading and rows: layers that are alike once, under their indices; what is in no layer round them."""
    layers: defaultdict[int, list[tuple[str, T]]] = defaultdict(list)
    above: list[tuple[str, T]] = []
    below: list[tuple[str, T]] = []
    for address, text in rows.items():
        if layer := IN_LAYER.fullmatch(address):
            layers[int(layer[1])].append((f"  {layer[2]}", text))
        else:
            (below if layers else above).append((address, text))
    alike: defaultdict[tuple[tuple[str, T], ...], list[int]] = defaultdict(list)
    for index, block in layers.items():
        alike[tuple(block)].append(index)
    yield "", above
    for group, indices in alike.items():
        yield f"layers {spans(indices)}", list(group)
    yield "", below


def spans(indices: Sequence[int]) -> str:
    """Ascending integers, runs shortened: [0, 1, 2, 5] is `0…2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}" for run in runs)


def _number(value: float) -> str:
    return f"{value:.12g}"


def _quartiles(values: Sequence[float]) -> str:
    """Five values of a list with their indices, evenly spread from the first to the last."""
    last = len(values) - 1
    indices = dict.fromkeys(last * quarter // 4 for quarter in range(5))
    return ", ".join(f"[{i}] {_number(values[i])}" for i in indices)
