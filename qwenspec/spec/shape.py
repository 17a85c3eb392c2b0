"""What a field of a spec model may hold, for messages: its alternatives, and the sentence that lists them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwenspec.diagnostics import listed

DISCRIMINATORS = ("kind", "scheme")  # the keys that choose between models
_ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
USUAL_LIMIT = 1024  # from which on a largest size goes without saying
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True, slots=True)
class Alternative:
    """One type that a value may have: a builtin, a model, a Literal, a tuple or a dict, with its bounds."""

    type: Any
    bounds: tuple[Any, ...] = ()

    @property
    def model(self) -> type[BaseModel] | None:
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    @property
    def origin(self) -> Any:
        return typing.get_origin(self.type)


Shape = tuple[Alternative, ...]


def shape(annotation: Any, metadata: Iterable[Any] = ()) -> Shape:
    """The alternatives of an annotation, Annotated and unions unwrapped."""
    bounds = tuple(bound for item in metadata for bound in _bounds(item))
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        return shape(inner, (*bounds, *extra))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(a for arg in typing.get_args(annotation) for a in shape(arg, bounds))
    return (Alternative(annotation, bounds),)


def _bounds(item: Any) -> Iterator[Any]:
    yield from item.metadata if isinstance(item, FieldInfo) else (item,)


@cache
def fields(model: type[BaseModel]) -> dict[str, tuple[FieldInfo, Shape]]:
    """A model's fields by the key that people write."""
    return {
        info.alias or name: (info, shape(info.annotation, info.metadata)) for name, info in model.model_fields.items()
    }


def tagged(choices: Shape) -> dict[str, type[BaseModel]]:
    """The models of a discriminated union by their tag; empty for anything else."""
    models = [a.model for a in choices if a.model]
    key = discriminator(choices)
    if key is None:
        return {}
    return {tag: m for m in models for tag in typing.get_args(m.model_fields[key].annotation)}


def discriminator(choices: Shape) -> str | None:
    """The key that chooses between several models."""
    models = [a.model for a in choices if a.model]
    if len(models) < 2:
        return None
    return next(key for key in DISCRIMINATORS if all(key in m.model_fields for m in models))


def sentence(choices: Shape, limits: bool = False) -> str:
    """`bfloat16`, `float16` or `float32`; a number above 0 and up to 1, or null; …

    `limits`: with the largest sizes too, which are far from any that is meant."""
    literals = [str(_yaml(v)) for a in choices if a.origin is Literal for v in typing.get_args(a.type)]
    words = [listed(literals)] if literals else []
    if tagged(choices):
        words.append(f"a mapping with `{discriminator(choices)}`")
    else:
        words += [_words(a, limits) for a in choices if a.origin is not Literal and a.type is not type(None)]
    if any(a.type is type(None) for a in choices):
        words.append("null")
    return (", or " if len(words) > 2 or "," in words[0] else " or ").join(words)


def literals(choices: Shape) -> list[str]:
    """The words that may stand here."""
    return [v for a in choices if a.origin is Literal for v in typing.get_args(a.type) if isinstance(v, str)]


def _yaml(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _words(choice: Alternative, limits: bool) -> str:
    if choice.model or choice.origin is dict:
        needed = [key for key, (info, _) in fields(choice.model).items() if info.is_required()] if choice.model else []
        return f"a mapping with {listed(needed, 'and')}" if 0 < len(needed) <= 2 else "a mapping"
    if choice.origin is tuple:
        args = typing.get_args(choice.type)
        (each,) = shape(args[0])
        count = "" if Ellipsis in args else f"{len(args)} "
        least = ", at least one" if _never_empty(choice) else ""
        return f"a list of {count}{_MANY[each.type]}{_bounds_in_words(each, limits)}{least}"
    return _ONE[choice.type] + _bounds_in_words(choice, limits) + (", not empty" if _never_empty(choice) else "")


def _never_empty(choice: Alternative) -> bool:
    return any(getattr(bound, "min_length", None) for bound in choice.bounds)


def _bounds_in_words(choice: Alternative, limits: bool) -> str:
    words = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "up to {}"}
    told = [
        phrase.format(_number(value))
        for name, phrase in words.items()
        for bound in choice.bounds
        if (value := getattr(bound, name, None)) is not None and (limits or value < USUAL_LIMIT)
    ]
    return f" {' and '.join(told)}" if told else ""


def _number(value: float) -> str:
    return f"{value:,}" if value >= 10_000 else f"{value:g}"
