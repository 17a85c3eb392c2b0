"""Importing a config.json on disk, alone or with the checkpoint folder round it."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenspec import tree
from qwenspec.backend.runtime.stored import INDEX, CheckpointError, Stored, choose_files, read_headers, shown
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.hf import json_source, modelopt, modules
from qwenspec.hf.importer import ImportResult, import_config
from qwenspec.hf.json_file import read_json
from qwenspec.hf.tensors import Held

CHUNK = 1 << 24
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")
LONGEST_NAME = 100  # characters of a variant's name


def import_path(path: str | Path, name: str | None = None, ignore: tuple[str, ...] = ()) -> ImportResult:
    """The spec of a config.json or, checked against its tensors, of a checkpoint folder; modules.json and
    hf_quant_config.json beside it are read for both.

    `name` is the variant's; by default it is the folder's. `ignore` are patterns (fnmatch) of tensors that nobody
    needs. Raises SpecError for what `import_config` refuses, for a folder without config.json and for safetensors
    files that cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json" if path.is_dir() else path
    document = json_source.parse_file(file)
    if document.diagnostics:
        raise SpecError(document.diagnostics)
    config: dict[str, Any] = tree.plain(document.root)
    normalize, said = modules.normalizes(folder)
    if not config.get("quantization_config") and (quantized := modelopt.beside(folder)):
        config["quantization_config"] = quantized
    notes, held = list(said), None
    if path.is_dir():
        held = tensors_in(folder)
        notes = [*held.notes, *said, *_untie(config, held.stored)]
    result = import_config(
        config,
        name=variant_name(name or folder.resolve().name.lower()),
        source_file=str(file),
        root=document.root,
        held=held,
        normalize=normalize,
        ignore=ignore,
    )
    return ImportResult(result.tree, (*notes, *result.notes), result.spec)


def variant_name(text: str) -> str:
    """The text with what a variant's name cannot have replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if not name[:1].isalpha() or keyword.iskeyword(re.sub(r"[-.]", "_", name).lower()):
        name = f"imported-{name}"
    return name[:LONGEST_NAME].rstrip("-._")


def tensors_in(folder: Path, whole: bool = False) -> Held:
    """What the files hold that are the checkpoint.

    `whole`: all of them must be there. Else those that are not are known by the index alone.
    Raises SpecError (`checkpoint`, or `json-syntax` and its like for the index) where that cannot be said."""
    try:
        files = choose_files(folder)
        there = [file for file in files.files if whole or os.path.lexists(file)]
        stored = read_headers(there)
    except CheckpointError as error:
        if str(folder / INDEX) in str(error):
            read_json(folder / INDEX)  # tells more of mistakes in JSON
        raise SpecError([Diagnostic("checkpoint", str(error))]) from None
    notes = list(files.notes)
    unseen = {tensor for tensor, file in files.indexed.items() if file not in there and tensor not in stored}
    if absent := len(files.files) - len(there):
        count = len(files.files)
        notes.append(
            f"Files that are not there: {absent:,} of {count:,}. Of their tensors only the names were checked."
        )
    if lost := sorted(set(files.indexed) - unseen - set(stored)):
        notes.append(f"{INDEX} names what its files do not hold: {len(lost):,} tensors, such as {shown(lost[0])}.")
    return Held(stored, frozenset(unseen), tuple(notes))


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


def _untie(config: dict[str, Any], stored: Mapping[str, Stored]) -> list[str]:
    """A config.json that ties what the checkpoint holds twice with different values is wrong: untie, as
    Hugging Face does since version 5."""
    head = stored.get("lm_head.weight")
    embedding = next((stored[name] for name in EMBEDDINGS if name in stored), None)
    if not (config.get("tie_word_embeddings") and head and embedding) or same_bytes(head, embedding):
        return []
    config["tie_word_embeddings"] = False
    note = "config.json ties the embedding, but the checkpoint holds an lm_head.weight with other values: "
    return [note + "the spec does not tie, as Hugging Face does not."]
