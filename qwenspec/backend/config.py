"""The fields of a package's config.py: sizes and constants, and none that the variant's code does not read."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import NamedTuple

from qwenspec.backend.structure import structure
from qwenspec.ir.nodes import Fp8Format, IntFormat, Model


class Field(NamedTuple):
    name: str
    type: str
    value: str
    comment: str = ""


def config_fields(model: Model, windows: str) -> list[Field]:
    attention, mlp = model.layers[0].mixer, model.layers[0].feed_forward
    found = [
        _field("vocab_size", model.vocab_size),
        _field("hidden_size", model.hidden_size),
        _field("num_hidden_layers", len(model.layers)),
        _field("num_attention_heads", attention.num_heads),
        _field("num_key_value_heads", attention.num_kv_heads),
        _field("head_dim", attention.head_dim),
        _field("intermediate_size", mlp.intermediate_size, "of gate and of up, each"),
        _field("max_position_embeddings", model.max_position_embeddings),
        _field("dtype", model.dtype),
        _field("norm_eps", model.norm.eps),
        _field("attention_scale", attention.scale, "1 / sqrt(head_dim)" if _is_default_scale(model) else ""),
    ]
    if windows == "all":
        found.append(_field("sliding_window", attention.window, "keys a query sees, itself included"))
    elif windows == "mixed":
        spans = tuple(layer.mixer.window for layer in model.layers)
        comment = "keys a query sees, itself included; None: all"
        found.append(Field("layer_windows", "tuple[int | None, ...]", _tuple(spans), comment))
    if attention.logn is not None:
        found.append(_field("logn_train_length", attention.logn.train_length))
    return found + _rope_fields(model) + _quantization_fields(model)


def _rope_fields(model: Model) -> list[Field]:
    rope = model.rope
    found = [_field("rotary_dim", rope.rotary_dim), _field("rope_theta", rope.theta)]
    found += [_field(f"rope_{field.name}", getattr(rope.scaling, field.name)) for field in fields(rope.scaling)]
    if rope.attention_factor != 1.0:
        found.append(_field("rope_attention_factor", rope.attention_factor, "multiplies cos and sin"))
    return found


def _quantization_fields(model: Model) -> list[Field]:
    shape = structure(model)
    match shape.weights or shape.head_weights:
        case IntFormat(group_size=int() as size):
            return [_field("group_size", size, "inputs of a quantised matrix that share a scale")]
        case Fp8Format(block=block, scales="block"):
            comment = "outputs and inputs of a quantised matrix that share a scale"
            return [Field("weight_block", "tuple[int, int]", repr(block), comment)]
    return []


def _field(name: str, value: object, comment: str = "") -> Field:
    kind = "tuple[float, ...]" if isinstance(value, tuple) else type(value).__name__
    return Field(name, kind, repr(value).replace("'", '"'), comment)


def _tuple(values: tuple[int | None, ...]) -> str:
    """The shortest expression for the tuple: a pattern that repeats, runs, or every value in turn."""
    count = len(values)
    patterns = (values[:size] for size in range(1, count) if count % size == 0)
    repeats = [
        f"{pattern} * {count // len(pattern)}" for pattern in patterns if pattern * (count // len(pattern)) == values
    ]
    return min(repr(values), _runs(values), *repeats, key=len)


def _runs(values: tuple[int | None, ...]) -> str:
    """`(None,) * 28 + (4096,) * 4`; what differs from its neighbours stays in one tuple."""
    terms: list[str] = []
    apart: list[int | None] = []
    for value, group in itertools.groupby(values):
        length = len(list(group))
        if length == 1:
            apart.append(value)
            continue
        terms += [repr(tuple(apart))] if apart else []
        terms.append(f"({value},) * {length}")
        apart = []
    return " + ".join(terms + ([repr(tuple(apart))] if apart else []))


def _is_default_scale(model: Model) -> bool:
    attention = model.layers[0].mixer
    return bool(attention.scale == attention.head_dim**-0.5)
