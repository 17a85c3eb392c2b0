"""Folders with the text side of a checkpoint, made from examples/tiny-qwen3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cli_runs import ROOT

TINY = ROOT / "examples" / "tiny-qwen3"
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")


def text_folder(folder: Path, model_type: str = "qwen3", **files: object) -> Path:
    """A new folder. `files`: what one holds instead, `__` for the dot; None: no such file, bytes and str as they
    are, an object is written as JSON."""
    folder.mkdir(parents=True)
    for name in NAMES:
        shutil.copyfile(TINY / name, folder / name)
    change(folder / "config.json", model_type=model_type)
    for key, content in files.items():
        file = folder / key.replace("__", ".")
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def change(file: Path, **changes: object) -> None:
    """Keys of a JSON file; None removes one."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content), encoding="utf-8")


def split_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt instead of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
