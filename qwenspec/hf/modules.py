"""sentence-transformers' modules.json: what becomes of the last hidden states of an embedding model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qwenspec import tree
from qwenspec.backend.runtime.stored import shown
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed
from qwenspec.hf import json_source
from qwenspec.hf.json_file import read_json

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
LAST = "lasttoken"
# Keys of a pooling's config.json that are flags, and what they are called in its `pooling_mode`.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": LAST,
}
WHY = "an embedding is the last token's state, divided by its norm or not"


def normalizes(folder: Path) -> tuple[bool | None, tuple[str, ...]]:
    """Whether embeddings are divided by their norm, None without a modules.json; and notes.

    Raises SpecError (`unsupported-module`, `unsupported-pooling`, `bad-modules`) for any other way to an embedding."""
    path = folder / MODULES
    if not path.exists():
        return None, ()
    modules = _read_modules(path)
    kinds = [kind for kind, _ in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise _fail(path, "unsupported-module", f"the module `{kind}` is not supported: {WHY}")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        message = (
            f"the modules are {listed(kinds, 'and')}: supported are a Transformer, a Pooling and perhaps a Normalize"
        )
        raise _fail(path, "unsupported-module", message)
    config = folder / modules[1][1] / "config.json"
    keys = read_json(config)
    if (pooling := _pooling(keys)) != LAST:
        raise _fail(config, "unsupported-pooling", f"the pooling is `{pooling}`, and only `{LAST}` is supported: {WHY}")
    notes = _prompts(read_json(folder / PROMPTS))
    if "pooling_mode" not in keys and "pooling_mode_mean_tokens" not in keys:
        notes.append(
            "The pooling is taken to be the last token's alone: its config.json does not say that "
            "`pooling_mode_mean_tokens` is false, and some versions of sentence-transformers append the mean then."
        )
    return "Normalize" in kinds, tuple(notes)


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """Each module's class, without the Python modules that it is in, and its folder below the checkpoint's."""
    modules = tree.plain(json_source.value(path))
    found = []
    for module in modules if isinstance(modules, tuple) else (None,):
        match module:
            case {"type": str(kind), "path": str(folder)} if _is_below(folder):
                found.append((kind.rpartition(".")[2], folder))
            case _:
                raise _fail(path, "bad-modules", "a module is a `type`, and a `path` below this folder")
    return found


def _is_below(folder: str) -> bool:
    path = PurePosixPath(folder)
    return folder.isprintable() and not path.is_absolute() and ".." not in path.parts


def _pooling(config: Mapping[str, Any]) -> str:
    """`pooling_mode`, else whichever flags are true; without any, sentence-transformers takes the mean."""
    if mode := config.get("pooling_mode"):
        return " and ".join(map(str, mode)) if isinstance(mode, tuple) else str(mode)
    chosen = [name for key, name in POOLINGS.items() if config.get(key)]
    return " and ".join(chosen) or ("nothing" if "pooling_mode_mean_tokens" in config else "mean")


def _prompts(config: Mapping[str, Any]) -> list[str]:
    """A note of prompts, which are text that a package does not add."""
    name, prompts = config.get("default_prompt_name"), config.get("prompts")
    if not any(prompts.values() if isinstance(prompts, Mapping) else ()):
        return []
    always = f", `{shown(str(name))}` by default" if name else ""
    return [f"{PROMPTS} has prompts, which sentence-transformers puts before texts{always}: a package does not."]


def _fail(path: Path, code: str, message: str) -> SpecError:
    return SpecError([Diagnostic(code, message, Location(str(path), 0, 0))])
