"""Processes that qwenspec starts import nothing from the current folder, whatever lies there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import ROOT

from qwenspec.verify import rank_pool

SOURCES = [file for room in ("qwenspec", "backends") for file in sorted((ROOT / room).rglob("*.py"))]


def interpreters(tree: ast.AST) -> Iterator[ast.List]:
    """Lists that begin with this Python, and what else has it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
            yield node


def test_every_python_is_started_without_the_current_folder() -> None:
    found = 0
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        commands = list(interpreters(ast.parse(text)))
        assert len(commands) == text.count("sys.executable"), f"{file}: started otherwise than by a list"
        for command in commands:
            assert ast.unparse(command.elts[1]) == "'-P'", f"{file}: {ast.unparse(command)}"
        found += len(commands)
    assert found >= 3


def test_ranks_find_the_numpy_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "torch", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    pool = rank_pool.RankPool(1)
    try:
        assert pool.do(abs, -3) == 3
    finally:
        pool.close()
