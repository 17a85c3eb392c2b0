"""A spec document as commented YAML, for people who will go on editing it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

WIDTH = 110
COLUMN = 44  # where comments begin

_COMMENTS = {
    "vocab_size": "rows of the embedding, padding included",
    "intermediate_size": "width of gate and of up, each",
    "compute_dtype": "activation: cos and sin are rounded to the model's dtype",
    "checkpoint": "the tensors' names",
}
_COMMENTS_ON_NULL = {
    "num_key_value_heads": "as many as attention heads",
    "head_dim": "hidden_size / num_attention_heads",
    "sliding_window": "off: attention sees all that came before",
    "logn": "off: queries are not scaled with the position",
    "scaling": "off: the frequencies are theta's alone",
    "lm_head": "none: this is a text-embedding model",
}


def write_spec(tree: dict[str, Any], notes: tuple[str, ...] = ()) -> str:
    """The text of a spec file. It loads back to the same document; notes become comments at its top."""
    lines = [line for note in notes for line in _comment(note)]
    for key in ("schema_version", "family", "description", "default_variant"):
        lines.append(f"{key}: {_scalar(tree[key])}")
    lines.append("")
    for key in ("architecture", "quantization", "kv_cache", "variants"):
        if tree.get(key) is not None:
            lines += [*_block(key, tree[key], ""), ""]
    return "\n".join(lines).rstrip() + "\n"


def _block(key: str, value: Any, indent: str) -> Iterator[str]:
    """`key: value` on one line where it fits and is easy to read, else one line an entry."""
    name = f"{indent}{_scalar(key)}:"
    flow = f"{name} {_flow(value)}"
    if not isinstance(value, dict | list | tuple) or not value:
        yield _commented(flow, key, value)
    elif isinstance(value, dict) and (len(flow) > 70 or not indent or _has_comments(value)):
        yield name
        for inner, item in value.items():
            yield from _block(inner, item, indent + "  ")
    elif len(flow) <= WIDTH:
        yield _commented(flow, key, value)
    else:
        yield f"{name} ["
        yield from _filled([*map(_flow, value)], indent + "  ")
        yield f"{indent}]"


def _filled(items: list[str], indent: str) -> Iterator[str]:
    """As many items on a line as fit: none is broken, not even at a space."""
    line = ""
    for item in [*(f"{item}," for item in items[:-1]), items[-1]]:
        if line and len(line) + 1 + len(item) > WIDTH:
            yield line
            line = ""
        line = f"{line} {item}" if line else indent + item
    yield line


def _has_comments(value: dict[str, Any]) -> bool:
    return any(_about(key, item) or (isinstance(item, dict) and _has_comments(item)) for key, item in value.items())


def _commented(line: str, key: str, value: Any) -> str:
    about = _about(key, value)
    return f"{line:<{COLUMN}} # {about}" if about else line


def _about(key: str, value: Any) -> str | None:
    return _COMMENTS_ON_NULL.get(key) if value is None else _COMMENTS.get(key)


def _comment(note: str) -> list[str]:
    printable = "".join(char if char.isprintable() else "?" for char in note)
    return textwrap.wrap(printable, WIDTH, initial_indent="# - ", subsequent_indent="#   ")


def _flow(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_flow, value)) + "]"
        case _:
            return _scalar(value)


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./()-]+)*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return number(value)
        case str() if not _PLAIN.fullmatch(value) or value.lower() in _WORDS:
            return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))).rstrip("\n")
        case _:
            return str(value)


def number(value: float) -> str:
    """A float that YAML 1.1 readers take for one too: with a point, and a sign before the exponent."""
    mantissa, exponent, power = repr(value).partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(power):+d}"
