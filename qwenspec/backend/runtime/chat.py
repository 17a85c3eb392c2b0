"""Chat templates, rendered as transformers renders them, and stopped where they would not end."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
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

from .stored import read_optional_json, read_text
from .text import TextError

SECONDS = 10.0  # that a template may take
SIZE = 1 << 26  # characters, items or bits that one value in it may have, and characters of the whole text
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what a message's author thought
BITS = 1 << 16  # that an integer may have
GROWTH = 12  # characters that one may become where it is quoted: \ud83d\ude00
LIST = 64  # bytes of an empty one
LEVELS = 1000  # of what is nested, at most: Python's own limit


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
    said = read_optional_json(file).get("chat_template")
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
        environment.deadline = time.monotonic() + SECONDS
        compiled = environment.from_string(template.source)
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


def _bounded_bits(bits: int) -> None:
    if bits > BITS:
        raise jinja2.TemplateRuntimeError(f"it makes an integer of more than {BITS:,} bits")


def _length(value: object) -> int:
    """About as many characters as its text has, counted without making it."""
    known: dict[int, int] = {}  # by id, for a value may be in a list a thousand times, and that one in another

    def count(value: object) -> int:
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict, set)):
            return 32
        if id(value) not in known:
            _bounded(2 * len(value))
            inside = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
            known[id(value)] = 2 + sum(2 + count(one) for one in inside)
        return known[id(value)]

    return count(value)


def _width(value: object) -> int:
    """Of a padding, which is so many spaces or a text."""
    return max(value, 0) if isinstance(value, int) else _length(value)


def _padded(value: object, *args: object, **kwargs: object) -> int:
    """What "x".center(80) and other methods and filters with numbers make."""
    return GROWTH * _length(value) + max(map(_width, (*args, *kwargs.values())), default=0)


def _listed(value: object, *args: object, **kwargs: object) -> int:
    return LIST * max(map(_width, (*args, *kwargs.values())), default=0)


def _joined(between: object, items: Iterable[object]) -> int:
    items = list(items)
    return _length(items) + len(items) * _length(between)


def _replaced(text: object, old: Any, new: object, count: int | None = None) -> int:
    found = text.count(old) if isinstance(text, bytes) else str(text).count(str(old))
    return _length(text) + _length(new) * (found if count is None or count < 0 else min(found, count))


def _indented(text: object, width: object = 4, *_: object, **__: object) -> int:
    return _length(text) + (1 + str(text).count("\n")) * _width(width)


def _expanded(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * max(tabsize, 0)


def _translated(text: str, table: Mapping[int, object]) -> int:
    return len(text) * max(map(_length, table.values()), default=1)


def _wrapped(text: object, *args: object, **kwargs: object) -> int:
    """Every word may be followed by what is given, and every address by more."""
    return _length(text) * GROWTH + len(str(text).split()) * sum(map(_length, (*args, *kwargs.values())))


def _formatted(text: object, *args: object, **kwargs: object) -> int:
    """Of "%5s" % x, or "{:5}".format(x): every field may show the longest value, and be padded."""
    form = str(text)
    values = (*args, *kwargs.values())
    fields = form.count("%") + form.count("{")
    stars = ("%" in form and "*" in form) or re.search(r":[^{}]*{", form)  # some values are widths
    longest = max(map(_length, values), default=0) + (_widest(values) if stars else 0)
    return len(form) + sum(map(int, re.findall("[0-9]+", form))) + fields * longest


def _widest(values: Iterable[object]) -> int:
    """The largest number in them."""
    inside = [_widest(one.values() if isinstance(one, dict) else one) for one in values if isinstance(one, NESTED)]
    return max([*inside, *(abs(one) for one in values if isinstance(one, int))], default=0)


def _lorem(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> int:
    """n paragraphs of less than `max` words, each of which takes a while to choose."""
    return LIST * n * max


NESTED = (list, tuple, dict)
METHODS: dict[str, Callable[..., int]] = {  # of texts and bytes: at most how much they make
    "expandtabs": _expanded,
    "format": _formatted,
    "format_map": _formatted,
    "join": _joined,
    "replace": _replaced,
    "translate": _translated,
}
FILTERS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "capitalize", "e", "escape", "forceescape", "lower", "pprint", "string"), _padded),
    **dict.fromkeys(("striptags", "title", "trim", "truncate", "upper", "urlencode", "xmlattr"), _padded),
    **dict.fromkeys(("batch", "slice"), _listed),
    **dict.fromkeys(("urlize", "wordwrap"), _wrapped),
    "format": _formatted,
    "indent": _indented,
    "replace": _replaced,
}


def _limited(function: Any, size: Callable[..., int]) -> Callable[..., Any]:
    """A filter that is asked first how much it will make."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # what Jinja itself gives first

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _bounded(size(*args[skipped:], **kwargs))
        return function(*args, **kwargs)

    return limited


def _rounded(value: Any, precision: int = 0, method: str = "common") -> float:
    _bounded_bits(4 * abs(precision))  # of 10 ** precision
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[object], d: object = "", attribute: Any = None) -> str:
    chosen = map(jinja2.filters.make_attrgetter(environment, attribute), value) if attribute is not None else value
    items = list(chosen)
    _bounded(_joined(d, items))
    return str(d).join(map(str, items))


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    chosen = (
        map(jinja2.filters.make_attrgetter(environment, attribute), iterable) if attribute is not None else iterable
    )
    for value in chosen:
        start = environment.call_binop(None, "+", start, value)  # type: ignore[attr-defined]
    return start


def _shown(value: object) -> object:
    """What {{ value }} prints."""
    _bounded(_length(value))
    return value


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
    _bounded(LEVELS * _width(indent or 0))
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces: list[str] = []
    size = 0
    for piece in encoder.iterencode(value):
        size = _bounded(size + len(piece))
        pieces.append(piece)
    return "".join(pieces)


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

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        extensions = [_Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_shown)
        self.deadline = 0.0
        self.filters["tojson"] = _tojson
        self.filters |= {name: _limited(self.filters[name], size) for name, size in FILTERS.items()}
        self.filters |= {"join": _join, "round": _rounded, "sum": _sum}
        self.globals["lipsum"] = _limited(self.globals["lipsum"], _lorem)
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
        _bounded(sum(map(_length, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _bounded_bits(_bits(operator, left, right))
        else:
            _bounded(_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = inspect.unwrap(function) if callable(function) else function  # the sandbox wraps "{}".format
        text = getattr(method, "__self__", None)
        if isinstance(text, (str, bytes, int)):  # as "x".center(width)
            _bounded(METHODS.get(method.__name__, _padded)(text, *args, **kwargs))
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


def _bits(operator: str, left: int, right: int) -> int:
    """At most so many has the result."""
    bits = left.bit_length(), right.bit_length()
    return bits[0] * max(right, 0) if operator == "**" else sum(bits)


def _size(operator: str, left: Any, right: Any) -> int:
    """At most so many characters or items has the result."""
    if operator == "%" and isinstance(left, (str, bytes)):
        return _formatted(left, right)
    if operator == "+":
        return sum(len(value) if hasattr(value, "__len__") else 0 for value in (left, right))
    if operator == "*" and isinstance(right, int) and hasattr(left, "__len__"):
        return len(left) * max(right, 0)
    if operator == "*" and isinstance(left, int) and hasattr(right, "__len__"):
        return len(right) * max(left, 0)
    return 0
