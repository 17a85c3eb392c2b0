"""Validation errors -> diagnostics that point into the file that people wrote."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from pydantic import BaseModel, ValidationError

from qwenspec.diagnostics import Diagnostic, Location, listed, nearest
from qwenspec.spec.shape import Shape, discriminator, fields, literals, sentence, shape, tagged
from qwenspec.tree import Mapping, Node, Path_, Scalar, Sequence, at, place, written

MAX_ERRORS = 100  # explained of one validation; nobody reads more, and a file may hold thousands

# Keys of Hugging Face's config.json whose place here has another name.
_HF_KEYS = {
    "rms_norm_eps": "norm.eps",
    "layer_norm_epsilon": "norm.eps",
    "rope_theta": "rope.theta",
    "rotary_emb_base": "rope.theta",
    "rope_scaling": "rope.scaling",
    "rope_parameters": "rope",
    "hidden_act": "mlp.activation",
    "torch_dtype": "dtype",
    "attention_bias": "attention.bias",
    "use_sliding_window": "attention.sliding_window",
    "max_window_layers": "attention.sliding_window.layers",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake, and the path in the validated data that it is about."""

    path: Path_
    diagnostic: Diagnostic


def explain(model: type[BaseModel], root: Node, error: ValidationError) -> list[Finding]:
    """One finding per mistake; what several members of a union say about one value is said once."""
    found: dict[tuple[Path_, bool], Finding] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]:
        at = _resolve(model, root, item["loc"])
        if at is None:
            continue
        absent = item["type"] in ("missing", "union_tag_not_found", "extra_forbidden")
        found.setdefault((at.path, absent), Finding(at.path, _diagnose(item["type"], at, root)))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _At:
    """Where an error's `loc` leads: the value (None: absent), what may stand there, and the model around it."""

    path: Path_
    node: Node | None
    choices: Shape
    owner: type[BaseModel] | None


def _resolve(model: type[BaseModel], root: Node, loc: tuple[int | str, ...]) -> _At | None:
    """Follow `loc` through the data and the types. It names union members as if they were keys; an error in a
    member that the value was not meant to be leads nowhere (None)."""
    at = _At((), root, shape(model), None)
    for step in loc:
        tags = tagged(at.choices)
        if step in tags:
            at = _At(at.path, at.node, shape(tags[str(step)]), at.owner)
            continue
        if len([a for a in at.choices if a.type is not type(None)]) > 1:
            meant = _meant(at.choices, at.node)
            if not meant or not _labels(meant, step):
                return at if not meant else None
            at = _At(at.path, at.node, meant, at.owner)
            continue
        following = _descend(at, step)
        if following is None:
            return at
        at = following
    return at


def _meant(choices: Shape, node: Node | None) -> Shape:
    """The one member of a plain union that has the value's form; empty when the value is a scalar or fits none."""
    if isinstance(node, Mapping):
        return tuple(a for a in choices if a.model)[:1]
    if isinstance(node, Sequence):
        return tuple(a for a in choices if a.origin is tuple)[:1]
    return ()


def _labels(choices: Shape, step: int | str) -> bool:
    """Is `step` pydantic's name for this member?"""
    model = choices[0].model
    return step == model.__name__ if model else str(step).startswith("tuple[")


def _descend(at: _At, step: int | str) -> _At | None:
    choice = next((a for a in at.choices if a.type is not type(None)), None)
    path, node = (*at.path, step), at.node
    if choice and choice.model and isinstance(node, Mapping):
        known = fields(choice.model).get(str(step))
        return _At(path, node.get(str(step)), known[1] if known else (), choice.model)
    if choice and choice.origin is dict and isinstance(node, Mapping):
        return _At(path, node.get(str(step)), shape(typing.get_args(choice.type)[1]), None)
    items = node.items if isinstance(node, Sequence) else ()
    if choice and choice.origin is tuple and isinstance(step, int) and step < len(items):
        return _At(path, items[step], shape(typing.get_args(choice.type)[0]), None)
    return None


# --------------------------------------------------------------------------------------------------- wording


def _diagnose(kind: str, at: _At, root: Node) -> Diagnostic:
    key = str(at.path[-1]) if at.path else ""
    if kind == "extra_forbidden":
        assert at.owner is not None
        return unknown_key(key, at.path, fields(at.owner), root)
    if kind == "union_tag_not_found" and isinstance(at.node, Mapping):
        tag = discriminator(at.choices)
        assert tag is not None
        hint = f"`{tag}` is one of {listed(tagged(at.choices))}"
        return Diagnostic("missing-key", f"missing key `{tag}`", place(root, (*at.path, tag)), hint)
    if kind == "missing" and at.node is None:
        assert at.owner is not None
        hint = f"{fields(at.owner)[key][0].description or ''} It must be {sentence(at.choices)}.".strip()
        return Diagnostic("missing-key", f"missing key `{key}`", place(root, at.path), hint)
    if kind == "union_tag_invalid" and isinstance(at.node, Mapping):
        return _not_allowed(at, root)
    node = at.node
    if kind == "finite_number":
        return Diagnostic(
            "out-of-range", f"{_subject(at.path)} must be finite; found {found(node)}", place(root, at.path)
        )
    a_word = isinstance(node, Scalar) and isinstance(node.value, str)
    if kind == "literal_error" or (a_word and literals(at.choices)):
        code = "not-allowed"
    else:
        code = "wrong-type" if kind.endswith("_type") else "out-of-range"
    wanted = sentence(at.choices, limits=kind == "less_than_equal")
    message = f"{_subject(at.path)} must be {wanted}; found {found(node)}"
    return Diagnostic(code, message, place(root, at.path), _hint(at, node))


def _not_allowed(at: _At, root: Node) -> Diagnostic:
    tag = discriminator(at.choices)
    assert tag is not None
    assert isinstance(at.node, Mapping)
    node = at.node.get(tag)
    message = f"`{tag}` must be {listed(tagged(at.choices))}; found {found(node)}"
    word = node.value if isinstance(node, Scalar) and isinstance(node.value, str) else ""
    close = nearest(word, tagged(at.choices))
    hint = f"did you mean `{close}`?" if close else ""
    return Diagnostic("not-allowed", message, place(root, (*at.path, tag)), hint)


def unknown_key(key: str, path: Path_, known: Iterable[str], root: Node) -> Diagnostic:
    """An unknown key in a mapping: where it belongs instead, or the nearest spelling, and all that are allowed."""
    allowed = list(known)
    start = "architecture." if len(path) == 1 else ""
    elsewhere = [start + p for p in _elsewhere(key) if p != ".".join(map(str, path[1:]))]
    if elsewhere:
        advice = f"that is {listed(elsewhere)}; "
    else:
        close = nearest(key, allowed)
        advice = f"did you mean `{close}`? " if close else ""
    return Diagnostic(
        "unknown-key",
        f"unknown key `{key}`",
        key_place(root, path),
        f"{advice}allowed here: {', '.join(allowed)}",
    )


def key_place(root: Node, path: Path_) -> Location:
    """Where the last key of `path` was written (not its value)."""
    parent = at(root, path[:-1])
    assert isinstance(parent, Mapping)
    return parent.entries[str(path[-1])].key


@cache
def _keys_by_name() -> dict[str, tuple[str, ...]]:
    """Every key of an architecture, and the paths at which it stands."""
    from qwenspec.spec.architecture import Architecture

    def search(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
        for name, (_, choices) in fields(model).items():
            yield name, prefix + name
            if len(choices) <= 2 and not tagged(choices) and choices[0].model:
                yield from search(choices[0].model, f"{prefix}{name}.")

    found: dict[str, tuple[str, ...]] = {}
    for name, path in search(Architecture, ""):
        found[name] = (*found.get(name, ()), path)
    return found


def _elsewhere(key: str) -> tuple[str, ...]:
    return (_HF_KEYS[key],) if key in _HF_KEYS else _keys_by_name().get(key, ())


def _subject(path: Path_) -> str:
    keys = [step for step in path if isinstance(step, str)]
    indices = "".join(f"[{step}]" for step in path[len(path) - 1 :] if isinstance(step, int))
    return f"`{keys[-1]}{indices}`" if keys else "the file"


def found(node: Node | None) -> str:
    """What stands there, in words."""
    match node:
        case None:
            return "nothing"
        case Mapping():
            return "a mapping"
        case Sequence(items=items):
            return f"a list of {len(items)}" if items else "an empty list"
        case Scalar(value=None):
            return "null"
        case Scalar(value=bool(value)):
            return str(value).lower()
        case Scalar(value=""):
            return "an empty text"
        case Scalar(value=str(value)):
            return f'the text "{value if len(value) <= 60 else value[:60] + "…"}"'
        case Scalar(location=location):
            text = written(location)
            return text if len(text) <= 40 else f"a number of {len(text)} characters"


_YES, _NO = ("yes", "on", "y", "true"), ("no", "off", "n", "false")


def _hint(at: _At, node: Node | None) -> str:
    """What was probably meant."""
    choices = at.choices
    wanted = {a.type for a in choices}
    numbers = bool(wanted & {int, float})
    match node:
        case Scalar(value=str(text)):
            if bool in wanted and text.lower() in _YES + _NO:
                why = "in quotes it is text" if node.quoted else f"`{text}` is text in YAML 1.2"
                return f"write `{'true' if text.lower() in _YES else 'false'}`: {why}"
            if type(None) in wanted and text.lower() in ("none", "null", ""):
                return "write `null`" + (" without quotes" if text == "null" else "")
            if numbers and node.quoted and _number(text) is not None:
                return "remove the quotes"
            if numbers and _number(text) is not None:
                return f"write `{_number(text)}`: `{text}` is text in YAML 1.2"
            close = nearest(text, literals(choices))
            return f"did you mean `{close}`?" if close else ""
        case Scalar(value=float(value)) if int in wanted and value.is_integer():
            return f"write `{int(value)}`: this must be a whole number, without point or exponent"
        case Scalar(value=None):
            known = fields(at.owner).get(str(at.path[-1])) if at.owner else None
            return "remove the key to get its default" if known and not known[0].is_required() else ""
    return ""


def _number(text: str) -> str | None:
    digits = text.replace("_", "").replace(",", "")
    try:
        number = float(digits)
    except ValueError:
        return None
    return digits if number == number and abs(number) != float("inf") else None
