"""What a dense architecture can say, and which of it a spec says: features, by which examples are counted.

Both are walks over the models of `qwenspec.spec`, so that whatever is added there is a feature from then on:
`mlp.activation=gelu`, `attention.bias.qkv=true`, `attention.logn=set`, `rope.scaling.kind=yarn`. What every spec says
(a size, a constant) is none. Quantisation is left out: no backend has it yet.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.checkpoint import builtin_layouts
from qwenspec.spec.document import Spec
from qwenspec.spec.shape import Alternative, Shape, discriminator, fields, tagged

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
    )
)


def schema_features(model: type[BaseModel] = Architecture) -> frozenset[str]:
    """Everything that an architecture can say, and the relations between sizes that matter (`shape.…`)."""
    return frozenset(_possible(model, "")) | _SHAPES


def features(spec: Spec) -> frozenset[str]:
    """Those of schema_features that a spec has."""
    return frozenset(_said(spec.architecture, "")) | frozenset(_shapes(spec))


def _possible(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, (_, choices) in fields(model).items():
        path = prefix + key
        if path in _WORDS:
            yield from (f"{path}={word}" for word in _WORDS[path][0])
            continue
        words = [(word, choice) for choice in choices for word in _words(choice, choices)]
        for word, choice in words:
            if len(words) > 1:
                yield _feature(path, word, choices)
            if choice.model:
                yield from _possible(choice.model, _inside(path, word, choices))


def _said(value: BaseModel, prefix: str) -> Iterator[str]:
    model = type(value)
    for name, (key, (_, choices)) in zip(model.model_fields, fields(model).items(), strict=True):
        path, inner = prefix + key, getattr(value, name)
        if path in _WORDS:
            yield f"{path}={_WORDS[path][1](inner)}"
            continue
        word = _word(inner, choices)
        if sum(len(_words(choice, choices)) for choice in choices) > 1:
            yield _feature(path, word, choices)
        if isinstance(inner, BaseModel):
            yield from _said(inner, _inside(path, word, choices))


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
    """What a field says with a value."""
    choice = next(choice for choice in choices if _holds(choice, value))
    words = _words(choice, choices)
    return words[0] if len(words) == 1 else next(word for word in words if word.lower() == str(value).lower())


def _holds(choice: Alternative, value: Any) -> bool:
    if choice.origin is Literal:
        return isinstance(value, str) and value in typing.get_args(choice.type)
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
