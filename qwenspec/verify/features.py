"""What a spec can say of a dense architecture and of its quantisation, and which of it one says: features, by which
examples are counted.

Both are walks over the models of `qwenspec.spec`, so that whatever is added there is a feature from then on:
`mlp.activation=gelu`, `attention.bias.qkv=true`, `attention.logn=set`, `rope.scaling.kind=yarn`,
`quantization.gptq.sym=true`. What every spec says (a size, a constant) is none.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.checkpoint import builtin_layouts
from qwenspec.spec.document import BESIDE, Spec
from qwenspec.spec.shape import Alternative, Shape, discriminator, fields, tagged
from qwenspec.verify.dequantize import quantized_matrices

# Fields whose values the types do not tell apart: the words for them, and the word for one of them.
_WORDS: dict[str, tuple[tuple[str, ...], Callable[[Any], str]]] = {
    "rope.partial_rotary_factor": (("1", "<1"), lambda factor: "1" if factor == 1 else "<1"),
    "checkpoint.layout": (
        (*builtin_layouts(), "inline"),
        lambda layout: layout if layout in builtin_layouts() else "inline",
    ),
}
_SHAPES = frozenset(
    (
        *(f"shape.heads*head_dim{sign}hidden" for sign in "<=>"),
        *(f"shape.kv_heads={kind}" for kind in ("mha", "gqa", "mqa")),
        *(f"shape.{part}={how}" for part in ("qkv", "gate_up") for how in ("fused", "split")),
        *(f"shape.quantized={which}" for which in ("all", "some", "parts")),
        *(f"shape.last_group={size}" for size in ("whole", "smaller")),
    )
)


def schema_features(model: type[BaseModel] = Architecture) -> frozenset[str]:
    """Everything that a spec can say, and the relations that matter (`shape.…`): between
    sizes, and of what is quantised to what is not (parts: some of a matrix that packages fuse)."""
    beside = (feature for key in BESIDE for feature in _possible_of(key, fields(Spec)[key][1]))
    return frozenset((*_possible(model, ""), *beside, *_SHAPES))


def features(spec: Spec) -> frozenset[str]:
    """Those of schema_features that a spec has."""
    beside = (feature for key in BESIDE for feature in _said_of(key, getattr(spec, key), fields(Spec)[key][1]))
    return frozenset((*_said(spec.architecture, ""), *beside, *_shapes(spec)))


def _possible(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, (_, choices) in fields(model).items():
        yield from _possible_of(prefix + key, choices)


def _possible_of(path: str, choices: Shape) -> Iterator[str]:
    if path in _WORDS:
        yield from (f"{path}={word}" for word in _WORDS[path][0])
        return
    words = [(word, choice) for choice in choices for word in _words(choice, choices)]
    for word, choice in words:
        if len(words) > 1:
            yield _feature(path, word, choices)
        if choice.model:
            yield from _possible(choice.model, _inside(path, word, choices))


def _said(value: BaseModel, prefix: str) -> Iterator[str]:
    model = type(value)
    for name, (key, (_, choices)) in zip(model.model_fields, fields(model).items(), strict=True):
        yield from _said_of(prefix + key, getattr(value, name), choices)


def _said_of(path: str, value: Any, choices: Shape) -> Iterator[str]:
    if path in _WORDS:
        yield f"{path}={_WORDS[path][1](value)}"
        return
    word = _word(value, choices)
    if sum(len(_words(choice, choices)) for choice in choices) > 1:
        yield _feature(path, word, choices)
    if isinstance(value, BaseModel):
        yield from _said(value, _inside(path, word, choices))


def _feature(path: str, word: str, choices: Shape) -> str:
    return f"{path}.{discriminator(choices)}={word}" if word in tagged(choices) else f"{path}={word}"


def _inside(path: str, word: str, choices: Shape) -> str:
    """What the features of a model in a field begin with; of several models, with its word."""
    return f"{path}." if sum(choice.model is not None for choice in choices) == 1 else f"{path}.{word}."


def _words(choice: Alternative, choices: Shape) -> tuple[str, ...]:
    """What a field can say with one of the alternatives of its type."""
    if choice.origin is Literal:
        return tuple(map(str, typing.get_args(choice.type)))
    if choice.type is bool:
        return ("true", "false")
    if choice.type is type(None):
        return ("null",)
    if tags := [tag for tag, model in tagged(choices).items() if model is choice.model]:
        return tuple(tags)
    if len([other for other in choices if other.type is not type(None)]) == 1:
        return ("set",)
    if choice.model:
        return (next(iter(fields(choice.model))),)
    return ("list",) if choice.origin is tuple else ("number",)


def _word(value: Any, choices: Shape) -> str:
    """What a field says with a value; a number that is named has a word of its own."""
    named = [choice for choice in choices if choice.origin is Literal]
    choice = next(choice for choice in (*named, *choices) if _holds(choice, value))
    words = _words(choice, choices)
    return words[0] if len(words) == 1 else next(word for word in words if word.lower() == str(value).lower())


def _holds(choice: Alternative, value: Any) -> bool:
    if choice.origin is Literal:
        return any(type(value) is type(word) and value == word for word in typing.get_args(choice.type))
    if choice.model is None and choice.origin is None and choice.type in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, choice.origin or choice.type)


def _shapes(spec: Spec) -> Iterator[str]:
    arch, layout = spec.architecture, spec.layout
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads or arch.num_attention_heads
    width, hidden = heads * (arch.attention.head_dim or arch.hidden_size // heads), arch.hidden_size
    yield f"shape.heads*head_dim{'<=>'[(width > hidden) - (width < hidden) + 1]}hidden"
    yield f"shape.kv_heads={'mha' if kv_heads == heads else 'mqa' if kv_heads == 1 else 'gqa'}"
    yield f"shape.qkv={'fused' if len(layout.attention.qkv) == 1 else 'split'}"
    yield f"shape.gate_up={'fused' if len(layout.mlp.gate_up) == 1 else 'split'}"
    if spec.quantization is not None:
        yield from _quantized_shapes(spec, bool(spec.quantization.skip))


def _quantized_shapes(spec: Spec, skips: bool) -> Iterator[str]:
    layout, found = spec.layout, quantized_matrices(spec)
    layers = [layout.layer.format(i=i) for i in range(spec.architecture.num_hidden_layers)]
    fused = [
        [f"{layer}.{name}" in found for name in names]
        for layer in layers
        for names in (layout.attention.qkv, layout.mlp.gate_up)
    ]
    parts = any(any(matrix) and not all(matrix) for matrix in fused)
    yield f"shape.quantized={'parts' if parts else 'some' if skips else 'all'}"
    smaller = any(matrix.columns % matrix.group_size for matrix in found.values())
    yield f"shape.last_group={'smaller' if smaller else 'whole'}"
