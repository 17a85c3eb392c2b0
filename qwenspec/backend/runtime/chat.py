"""Chat templates, rendered as transformers renders them, and stopped where they would not end."""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .stored import read_json, read_text
from .text import TextError

SECONDS = 10.0  # that a template may take
SIZE = 1 << 26  # characters, items or bits that one value in it may have, and characters of the whole text
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what a message's author thought
PADDING = ("batch", "center", "indent", "slice", "tojson")  # filters whose numbers are widths


@dataclass(frozen=True)
class Template:
    """A template and where it is, for messages."""

    source: str
    place: str


def read_templates(folder: Path) -> dict[str, Template]:
    """By name: chat_template.jinja is `default`, additional_chat_templates/ has more; else those in
    tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: Template(read_text(file), str(file)) for name, file in files.items() if file.exists()}
    if found:
        return found
    file = folder / "tokenizer_config.json"
    said = read_json(file).get("chat_template") if file.exists() else None
    if said is None:
        raise TextError(f"{folder} has no chat template (chat_template.jinja or tokenizer_config.json)")
    if isinstance(said, list) and all(isinstance(entry, dict) for entry in said):
        said = {entry.get("name"): entry.get("template") for entry in said}
    sources = said if isinstance(said, dict) else {"default": said}
    if not all(isinstance(text, str) for entry in sources.items() for text in entry):
        raise TextError(f"{file}: chat_template is neither a text nor several with names")
    return {name: Template(text, f"{file}: chat_template") for name, text in sources.items()}


def render(template: Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a chat. Raises TextError with the template's place and line, whatever goes wrong in it."""
    environment = _Environment()
    try:
        compiled = environment.from_string(template.source)
        environment.deadline = time.monotonic() + SECONDS
        pieces: list[str] = []
        size = 0
        for piece in compiled.generate({**variables, "messages": [_plain(message) for message in messages]}):
            size = _bounded(size + len(piece))
            pieces.append(piece)
        return "".join(pieces)
    except Exception as error:  # a template is a program, and may raise anything
        raise TextError(f"{template.place}, line {_line(error)}: {_reason(error)}") from error


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is None, its reasoning under each name that a template may read."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def _line(error: Exception) -> int:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] or 1 if lines else 1


def _reason(error: Exception) -> str:
    """In one line that a terminal may print."""
    reasons = {RecursionError: "it is nested too deep, or calls itself without end", MemoryError: "out of memory"}
    message = reasons.get(type(error)) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def _bounded(size: int) -> int:
    if size > SIZE:
        raise jinja2.TemplateRuntimeError(f"it makes a text or value of more than {SIZE:,} characters, items or bits")
    return size


def _bounded_numbers(values: Iterable[object]) -> None:
    _bounded(max((value for value in values if isinstance(value, int)), default=0))


def _padding(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are widths."""

    @functools.wraps(function)
    def bounded(value: object, *args: object, **kwargs: object) -> Any:
        _bounded_numbers((*args, *kwargs.values()))
        return function(value, *args, **kwargs)

    return bounded


def _raise(message: str) -> None:
    raise jinja2.TemplateError(f"the template says: {message}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON of which nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(Namespace):
    """Without the names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as its parent's, so that a template may set any name
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """{% generation %} marks what an assistant said, for training; here it is text like any other."""

    tags = Extension.tags | {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, in which loops and macros look at the clock and values stay below a size."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.deadline = 0.0
        self.filters["tojson"] = _tojson
        self.filters |= {
            name: _padding(self.filters[name]) for name in ("batch", "center", "indent", "slice", "tojson")
        }
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.globals["namespace"] = _Namespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        return tree

    def tick(self) -> None:
        """Called in each round of a loop and each call of a macro."""
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"it does not end within {SECONDS:g} seconds")

    def joined(self, *parts: object) -> str:
        """a ~ b ~ c"""
        texts = [str(part) for part in parts]
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _bounded(_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):  # as "x".center(width)
            _bounded_numbers(args)
        return super().call(context, function, *args, **kwargs)


class _Bounds(NodeTransformer):
    """Puts the calls of `tick` and `joined` into a template's tree."""

    def _ticking(self, node: Any) -> nodes.Node:
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None).set_lineno(node.lineno)


def _size(operator: str, left: Any, right: Any) -> int:
    """At most so many characters, items or bits has the result."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        return left.bit_length() * max(right, 0) if operator == "**" else sum(bits)
    if operator == "+":
        return sum(len(value) if hasattr(value, "__len__") else 0 for value in (left, right))
    if operator == "*" and isinstance(right, int) and hasattr(left, "__len__"):
        return len(left) * max(right, 0)
    if operator == "*" and isinstance(left, int) and hasattr(right, "__len__"):
        return len(right) * max(left, 0)
    return 0
