"""Importing a config.json on disk, alone or with the checkpoint folder round it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenspec import source, tree
from qwenspec.diagnostics import Diagnostic, Location, SpecError
from qwenspec.hf.importer import ImportResult, import_config
from qwenspec.hf.json_file import read_json

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # bytes; safetensors' own limit
CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: its dtype, in safetensors' names, its shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def import_path(path: str | Path, name: str | None = None) -> ImportResult:
    """The spec of a config.json or, checked against its tensors, of a checkpoint folder.

    `name` is the variant's; by default it is the folder's. Raises SpecError for what `import_config` refuses,
    for a folder without config.json and for safetensors files that cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json" if path.is_dir() else path
    document = source.parse_file(file)  # JSON is YAML too, and this one keeps places
    if document.diagnostics:
        raise SpecError(document.diagnostics)
    config: dict[str, Any] = tree.plain(document.root)
    notes: list[str] = []
    names: Collection[str] | None = None
    if path.is_dir():
        names, stored = tensors_in(folder)
        notes += _untie(config, stored)
    result = import_config(
        config,
        name=variant_name(name or folder.resolve().name.lower()),
        source_file=str(file),
        root=document.root,
        tensor_names=names,
        normalize=_normalizes(folder),
    )
    return ImportResult(result.tree, (*notes, *result.notes), result.spec)


def variant_name(text: str) -> str:
    """The text with what a variant's name cannot have replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return name if name[:1].isalpha() else f"imported-{name}".rstrip("-")


def tensors_in(folder: Path) -> tuple[set[str], dict[str, Stored]]:
    """Names of all tensors by the index, or by the one file's header; and where those on disk are."""
    index = read_json(folder / INDEX).get("weight_map")
    files = sorted({folder / str(name) for name in index.values()} if index else folder.glob("*.safetensors"))
    if not files:
        raise _fail(folder, "no-tensors", "the folder has no *.safetensors", "import its config.json by name instead")
    stored = {name: where for file in files if file.is_file() for name, where in header(file).items()}
    return set(index or stored), stored


def header(file: Path) -> dict[str, Stored]:
    """A safetensors file's tensors: 8 bytes of length, that much JSON, then the data it has offsets into."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
        text = stream.read(length) if length <= MAX_HEADER else b""
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        stored = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            stored[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
        return stored
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _fail(file, "bad-safetensors", "the header of this safetensors file cannot be read") from None


def same_bytes(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same bytes."""
    if a.end - a.start != b.end - b.start:
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        for start in range(a.start, a.end, CHUNK):
            count = min(CHUNK, a.end - start)
            if left.read(count) != right.read(count):
                return False
    return True


def _untie(config: dict[str, Any], stored: dict[str, Stored]) -> list[str]:
    """A config.json that ties what the checkpoint holds twice with different values is wrong: untie, as
    Hugging Face does since version 5."""
    head = stored.get("lm_head.weight")
    embedding = stored.get("model.embed_tokens.weight") or stored.get("transformer.wte.weight")
    if not (config.get("tie_word_embeddings") and head and embedding) or same_bytes(head, embedding):
        return []
    config["tie_word_embeddings"] = False
    note = "config.json ties the embedding, but the checkpoint holds an lm_head.weight with other values: "
    return [note + "the spec does not tie, as Hugging Face does not."]


def _normalizes(folder: Path) -> bool:
    """Whether embeddings are divided by their norm, by sentence-transformers' modules.json; else true."""
    path = folder / "modules.json"
    if not path.is_file():
        return True
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        pooling = [
            read_json(folder / module["path"] / "config.json") for module in modules if "Pooling" in module["type"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _fail(path, "bad-modules", "modules.json is not sentence-transformers' list of modules") from None
    for how in pooling:
        if how.get("pooling_mode_lasttoken") is False:
            raise _fail(path, "unsupported-pooling", "only the last token's state is supported as an embedding")
    return "Normalize" in kinds


def _fail(path: Path, code: str, message: str, hint: str = "") -> SpecError:
    return SpecError([Diagnostic(code, message, Location(str(path), 0, 0), hint)])
