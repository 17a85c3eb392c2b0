"""Every file here is wrong; beside it stands what a person is told.

QWENSPEC_UPDATE_EXPECTED=1 pytest tests/diagnostics rewrites the expectations; read the diff before committing it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwenspec
from qwenspec.diagnostics import SpecError, render
from qwenspec.spec.load import load, load_all

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.yaml"))
CODE = re.compile(r"error\[([a-z0-9-]+)\]")

# Wrong in a way that no file in this folder can be.
ELSEWHERE = {
    "not-a-file": "a directory",
    "unreadable-file": "a name that no file can have",
    "unprintable-path": "the same",
    "file-too-large": "two megabytes",
    "two-variants": "the same file with two variants",
    "too-many-errors": "more errors than anyone reads",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_mistake_is_told_as_expected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    with pytest.raises(SpecError) as caught:
        load_all(path.name)
    told = render(caught.value.diagnostics)
    expected = path.with_suffix(".expected")
    if os.environ.get("QWENSPEC_UPDATE_EXPECTED"):
        expected.write_text(told, encoding="utf-8")
    assert told == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_named_code_is_among_them(path: Path) -> None:
    """A file that is named like a code is an example of it."""
    told = CODE.findall(path.with_suffix(".expected").read_text(encoding="utf-8"))
    assert told
    if path.stem in codes_in_source():
        assert path.stem in told


def test_no_expectation_is_left_over() -> None:
    assert {p.stem for p in HERE.glob("*.expected")} == {p.stem for p in FILES}


def test_every_code_has_an_example() -> None:
    shown = {code for path in HERE.glob("*.expected") for code in CODE.findall(path.read_text(encoding="utf-8"))}
    assert codes_in_source() == shown | set(ELSEWHERE)
    assert not shown & set(ELSEWHERE)


def codes_in_source() -> set[str]:
    """The first argument of everything that makes a diagnostic in the rooms that read specs, and what is assigned
    to a variable named `code`."""
    return {text for tree in trees() for node in ast.walk(tree) for text in code_texts(node)}


def trees() -> Iterator[ast.Module]:
    package = Path(qwenspec.__file__).parent
    for path in [package / "source.py", *sorted((package / "spec").glob("*.py"))]:
        yield ast.parse(path.read_text(encoding="utf-8"))


def code_texts(node: ast.AST) -> Iterator[str]:
    holders: list[ast.expr] = []
    if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name):
        if node.func.id in ("Diagnostic", "_fail", "rule"):
            holders = node.args[:1]
    elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "code" for t in node.targets):
        holders = [node.value]
    for holder in holders:
        for part in ast.walk(holder):
            text = part.value if isinstance(part, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", text):
                yield text


@pytest.mark.parametrize("code", ELSEWHERE)
def test_what_no_file_here_can_show(code: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        provoke(code, tmp_path)
    *before, last = [diagnostic.code for diagnostic in caught.value.diagnostics]
    assert last == code
    assert len(before) == (100 if code == "too-many-errors" else 0)


def provoke(code: str, folder: Path) -> None:
    path = folder / "spec.yaml"
    path.write_text("schema_version: 1\nfamily: f\n")
    match code:
        case "not-a-file":
            load_all(folder)
        case "unreadable-file":
            load_all("a" * 5000 + ".yaml")
        case "unprintable-path":
            load_all(folder / "a\nb.yaml")
        case "file-too-large":
            path.write_bytes(b"#" * (2 << 20))
            load_all(path)
        case "two-variants":
            load(f"{path}#one", "two")
        case "too-many-errors":
            path.write_text("".join(f"key_{i}: 1\n" for i in range(200)))
            load_all(path)
