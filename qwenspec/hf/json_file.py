"""JSON files of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenspec import tree
from qwenspec.diagnostics import SpecError
from qwenspec.hf import json_source


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with tuples for lists; {} when there is no such file. Raises SpecError."""
    if not path.exists():
        return {}
    document = json_source.parse_file(path)
    if document.diagnostics:
        raise SpecError(document.diagnostics)
    content: dict[str, Any] = tree.plain(document.root)
    return content
