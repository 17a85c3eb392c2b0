"""JSON files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenspec.diagnostics import Diagnostic, Location, SpecError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = Location(str(path), error.lineno, error.colno, error.doc.splitlines()[error.lineno - 1])
        raise SpecError([Diagnostic("json-syntax", f"not valid JSON: {error.msg}", place)]) from None
    except UnicodeDecodeError:
        raise SpecError([Diagnostic("not-utf-8", "the file is not UTF-8", Location(str(path), 0, 0))]) from None
    if not isinstance(tree, dict):
        raise SpecError([Diagnostic("not-a-mapping", "the file holds no JSON object", Location(str(path), 0, 0))])
    return tree
