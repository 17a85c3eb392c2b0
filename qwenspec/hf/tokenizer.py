"""Where a checkpoint folder keeps what turns text into ids and back. Nothing is tokenised here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenspec.diagnostics import Diagnostic, Location, SpecError


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """tokenizer.json, the Jinja chat template, and the ids that end a text. Each may be missing."""

    tokenizer_json: Path | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...]


def find(folder: str | Path) -> TokenizerFiles:
    """Look a checkpoint folder up. Raises SpecError (`json-syntax`) when one of its files is not JSON."""
    folder = Path(folder)
    tokenizer = folder / "tokenizer.json"
    return TokenizerFiles(tokenizer if tokenizer.is_file() else None, _chat_template(folder), _eos_token_ids(folder))


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


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: one text, or named ones, of them `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    """generation_config.json's, which chat models extend, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
