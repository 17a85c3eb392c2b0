"""Partial evaluation of Python source text by structural flags.

A file says which structures it knows with flags, constants at the top of the module:

    SLIDING = tl.constexpr(True)  # flag: some layer has a sliding window

`fold` gives them values and leaves only what those values need, as if the rest had never been written: no flag, no
branch on one, and no parameter, function, constant or import that served only a branch that went. The text that
stays keeps its comments and layout.

- `if`, `elif`, `a if FLAG else b`, `and` and `or` may depend on flags, their negation and comparisons with
  constants; a flag used in any other way is an assertion error.
- A comment inside a branch belongs to it, and so does one on the line of its `if` or `else`.
- A docstring line `[FLAG and not OTHER] text` loses the tag when it holds, and goes when it does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

Flag = bool | str | int
Edit = tuple[int, int, str]  # characters start … stop - 1 become this text
Function = ast.FunctionDef | ast.AsyncFunctionDef

_DECLARATION = re.compile(r"^([A-Z][A-Z0-9_]*)(?:: \w+)? = .*# flag\b.*\n", re.MULTILINE)
_STAR = re.compile(r"(?:,|^)[ \t]*(\*),", re.MULTILINE)  # between positional and keyword-only parameters
_TAG = re.compile(r"^(\s*)\[((?:not )?[A-Z][^\]]*)\] ?(.*)$")


def fold(source: str, flags: Mapping[str, Flag]) -> str:
    """The source with every flag settled. `flags` has a value for each flag it declares, and no other."""
    declared = declared_flags(source)
    assert declared == set(flags), f"the source declares the flags {sorted(declared)}, not {sorted(flags)}"
    original = _Text(source)
    source = _DECLARATION.sub("", source)
    source = _apply(source, list(_docstrings(_Text(source), flags)))
    while edits := list(_branches(text := _Text(source), flags)) or list(_unreachable(text)):
        source = _apply(source, edits)
    while edits := list(_unused(_Text(source), original)):
        source = _apply(source, edits)
    left = _names(ast.parse(source)) & declared
    assert not left, f"cannot fold this use of {sorted(left)}"
    return re.sub(r"\n{4,}", "\n\n\n", source)


def declared_flags(source: str) -> set[str]:
    """The names of the flags at the top of a source."""
    return set(_DECLARATION.findall(source))


def _apply(source: str, edits: Sequence[Edit]) -> str:
    for start, stop, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[stop:]
    return source


class _Text:
    """Source, its tree, and where a node lies in the source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree = ast.parse(source)
        self._lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def line(self, number: int) -> int:
        """Where line `number`, counted from 1, starts."""
        return self._starts[number - 1]

    def span(self, node: ast.AST) -> tuple[int, int]:
        ends = [(node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)]  # type: ignore[attr-defined]
        # ast counts columns in UTF-8 bytes.
        start, stop = (self.line(n) + len(self._lines[n - 1].encode()[:column].decode()) for n, column in ends)
        return start, stop

    def lines(self, first: ast.stmt, last: ast.stmt) -> tuple[int, int]:
        """The whole lines of these and the statements between them."""
        decorators = first.decorator_list if isinstance(first, Function | ast.ClassDef) else []
        start = min([first.lineno, *(d.lineno for d in decorators)])
        assert last.end_lineno is not None
        return self.line(start), self.line(last.end_lineno + 1)

    def comments(self, start: int, column: int) -> int:
        """The end of the comments on lines of their own that begin at `start` and right of a column."""
        found = re.compile(rf"(?: {{{column + 1},}}#.*\n)*").match(self.source, start)
        assert found is not None
        return found.end()

    def text(self, node: ast.AST) -> str:
        start, stop = self.span(node)
        return self.source[start:stop]


def _names(*nodes: ast.AST) -> set[str]:
    """Every name that is read in them."""
    inside = (child for node in nodes for child in ast.walk(node))
    return {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


# --------------------------------------------------------------------------------------------------- branches


def _evaluate(node: ast.expr, flags: Mapping[str, Flag]) -> Flag | None:
    """The value of an expression of flags and constants, or None if it has anything else in it."""
    match node:
        case ast.Name(id=name):
            return flags.get(name)
        case ast.Constant(value=bool() | str() | int() as constant):
            return constant
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _evaluate(operand, flags)
            return None if value is None else not value
        case ast.BoolOp(op=op, values=operands):
            values = [_evaluate(operand, flags) for operand in operands]
            settling = isinstance(op, ast.Or)  # what one operand decides alone
            if any(value is not None and bool(value) == settling for value in values):
                return settling
            return None if None in values else not settling
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[right]):
            a, b = _evaluate(left, flags), _evaluate(right, flags)
            return None if a is None or b is None else (a == b) == isinstance(op, ast.Eq)
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[ast.Tuple(elts=elements)]):
            a, values = _evaluate(left, flags), [_evaluate(element, flags) for element in elements]
            return None if a is None or None in values else (a in values) == isinstance(op, ast.In)
    return None


def _branches(text: _Text, flags: Mapping[str, Flag]) -> Iterator[Edit]:
    """What takes the place of each branch on a flag; branches within one wait for the next round."""

    def value(test: ast.expr) -> Flag | None:
        return _evaluate(test, flags) if _names(test) & set(flags) else None

    waiting: list[ast.AST] = [text.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and (test := value(node.test)) is not None:
            yield _settle(text, node, bool(test))
        elif isinstance(node, ast.IfExp) and (test := value(node.test)) is not None:
            yield *text.span(node), text.text(node.body if test else node.orelse)
        elif isinstance(node, ast.BoolOp) and any(value(operand) is not None for operand in node.values):
            word = " and " if isinstance(node.op, ast.And) else " or "
            left = word.join(_operand(text, operand) for operand in node.values if value(operand) is None)
            yield *text.span(node), left if value(node) is None else str(value(node))
        else:
            waiting += ast.iter_child_nodes(node)


def _unreachable(text: _Text) -> Iterator[Edit]:
    """What follows a `return` or `raise` that a branch ended with."""
    for node in ast.walk(text.tree):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list):
                ends = [i for i, child in enumerate(block) if isinstance(child, ast.Return | ast.Raise)]
                if ends and block[ends[0] + 1 :]:
                    yield *text.lines(block[ends[0] + 1], block[-1]), ""


def _operand(text: _Text, node: ast.expr) -> str:
    return f"({text.text(node)})" if isinstance(node, ast.BoolOp | ast.IfExp | ast.NamedExpr) else text.text(node)


def _settle(text: _Text, node: ast.If, test: bool) -> Edit:
    start, stop = text.lines(node, node)
    stop = text.comments(stop, node.col_offset)
    indent = " " * node.col_offset
    is_elif = text.source.startswith("elif", text.span(node)[0])
    if test:
        header = re.compile(r"[\s)]*:.*\n")
        end = text.comments(text.lines(node.body[0], node.body[-1])[1], node.col_offset)
        block = _after(header, text, text.span(node.test)[1], end)
    elif not node.orelse:
        return start, stop, ""
    elif text.source.startswith("elif", text.span(node.orelse[0])[0]):
        rest = text.source[text.lines(node.orelse[0], node.orelse[0])[0] : stop]
        return start, stop, rest if is_elif else rest.replace("elif", "if", 1)
    else:
        header = re.compile(r"(?:\s*#.*\n)*\s*else:.*\n")
        block = _after(header, text, text.lines(node.body[0], node.body[-1])[1], stop)
    if is_elif:
        return start, stop, f"{indent}else:\n{block}"
    deeper = " " * (node.body[0].col_offset - node.col_offset)
    return start, stop, re.sub(rf"^{indent}{deeper}", indent, block, flags=re.MULTILINE)


def _after(header: re.Pattern[str], text: _Text, start: int, stop: int) -> str:
    found = header.match(text.source, start)
    assert found, f"no block on lines of its own after {text.source[start : start + 40]!r}"
    return text.source[found.end() : stop]


# ------------------------------------------------------------------------------------------------- docstrings


def _docstrings(text: _Text, flags: Mapping[str, Flag]) -> Iterator[Edit]:
    for node in ast.walk(text.tree):
        if not isinstance(node, ast.Module | ast.ClassDef | Function) or ast.get_docstring(node) is None:
            continue
        start, stop = text.span(node.body[0])
        lines = text.source[start + 3 : stop - 3].split("\n")
        kept = [line for line in (_untag(line, flags) for line in lines) if line is not None]
        body = re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", "\n".join(kept))
        if len(kept) < len(lines):
            body = body.rstrip()
            if "\n" in body and not lines[-1].strip():  # the closing quotes keep their own line
                body += "\n" + lines[-1]
        yield start + 3, stop - 3, body


def _untag(line: str, flags: Mapping[str, Flag]) -> str | None:
    tag = _TAG.match(line)
    if tag is None or not _names(condition := ast.parse(tag[2], mode="eval").body) & set(flags):
        return line
    value = _evaluate(condition, flags)
    assert value is not None, f"a docstring's tag has more than flags in it: {line.strip()}"
    return tag[1] + tag[3] if value else None


# ----------------------------------------------------------------------------------------------------- unused


def _unused(text: _Text, original: _Text) -> Iterator[Edit]:
    """What the original uses and this no longer does: parameters and their arguments, definitions, imports."""
    before = dict(_functions(original.tree))
    for name, function in _functions(text.tree):
        unused = _names(*before[name].body) - _names(*function.body)
        if unused := unused & {arg.arg for arg in _parameters(function)}:
            yield from _drop_parameters(text, name, function, unused)
    gone = _names(original.tree) - _names(text.tree)
    for body in [text.tree.body, *(node.body for node in text.tree.body if isinstance(node, ast.ClassDef))]:
        for statement in body:
            match statement:
                case ast.FunctionDef(name=name) if name in gone and body is text.tree.body:
                    yield *text.lines(statement, statement), ""
                case ast.Assign(targets=[ast.Name(id=name)]) if name in gone:
                    yield *text.lines(statement, statement), ""
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    kept = [alias for alias in aliases if (alias.asname or alias.name).split(".")[0] not in gone]
                    if len(kept) < len(aliases):
                        statement.names = kept
                        yield *text.lines(statement, statement), f"{ast.unparse(statement)}\n" if kept else ""


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions and methods with their names, `function` or `Class.method`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for child in _statements(node.body):
                if isinstance(child, Function):
                    yield prefix + child.name, child


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's or a class's statements, those under an `if` among them."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements([*statement.body, *statement.orelse])


def _parameters(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _drop_parameters(text: _Text, name: str, function: Function, unused: set[str]) -> Iterator[Edit]:
    """The parameters, and what the module's own calls of the function pass for them."""
    parameters = _parameters(function)
    defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
    defaults |= dict(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))  # type: ignore[arg-type]
    spans = [(text.span(arg)[0], text.span(defaults.get(arg) or arg)[1]) for arg in parameters]
    yield from _drop_items(text, spans, [arg.arg in unused for arg in parameters])
    names = [arg.arg for arg in parameters][1 if "." in name else 0 :]  # self is not passed
    for call in ast.walk(text.tree):
        if isinstance(call, ast.Call) and _calls(call.func, name):
            passed = [*names[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
            spans = [text.span(item) for item in [*call.args, *call.keywords]]
            yield from _drop_items(text, spans, [item in unused for item in passed])


def _calls(called: ast.expr, name: str) -> bool:
    owner, _, method = name.rpartition(".")
    match called:
        case ast.Name(id=used):
            return used == (owner if method == "__init__" else name)
        case ast.Subscript(value=ast.Name(id=used)):  # kernel[grid](…)
            return used == name
        case ast.Attribute(value=ast.Name(id="self"), attr=used):
            return bool(owner) and used == method
    return False


def _drop_items(text: _Text, spans: Sequence[tuple[int, int]], dropped: Sequence[bool]) -> Iterator[Edit]:
    """Items of a comma-separated list and their commas; one on a line of its own with its comment."""
    kept = [i for i, drop in enumerate(dropped) if not drop]
    last = kept[-1] if kept else -1
    for i in range(last):
        if dropped[i]:
            star = _STAR.search(text.source, spans[i][1], spans[i + 1][0])
            yield spans[i][0], star.start(1) if star else spans[i + 1][0], ""
    for start, stop in spans[last + 1 :]:
        line = text.source.rfind("\n", 0, start) + 1
        if not text.source[line:start].strip():
            yield line, text.source.index("\n", stop) + 1, ""
        else:
            yield spans[last][1] if kept else start, spans[-1][1], ""
            return
