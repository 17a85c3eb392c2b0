"""The specs that come with qwenspec, and their names: `qwenspec:qwen3.yaml`, `qwenspec:qwen3-0.6b`, `qwen3-0.6b`.

A file among them is called `qwenspec:FILE` wherever it is named, in diagnostics and in generated code: where it lies
is another place on every machine.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from qwenspec import source
from qwenspec.diagnostics import Diagnostic, Location, SpecError, near
from qwenspec.tree import Mapping

PREFIX = "qwenspec:"
HUB = "qwen"  # whose repositories are named like variants
FOLDER = Path(__file__).parents[1] / "specs"  # in the repository a link to its specs/
SUFFIXES = (".yaml", ".yml")
ALL = "`qwenspec list` shows what comes with qwenspec"


@cache
def files() -> dict[str, Path]:
    """Their file names, and where they are."""
    return {path.name: path for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def variants() -> dict[str, str]:
    """Every variant's name, and its file's."""
    found: dict[str, str] = {}
    for file, path in files().items():
        names = source.parse_file(path).root.get("variants")
        assert isinstance(names, Mapping), f"{file} is a family"
        found |= dict.fromkeys(names.entries, file)
    return found


def path_of(name: str) -> str:
    """Where a spec file is: a name that does not begin with `qwenspec:` is its path."""
    path = files().get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return name if path is None else str(path)


def resolve(name: str, wanted_by: Location | None = None) -> str:
    """`file` or `file#variant`, as people may also name it by a variant that comes with qwenspec.

    `qwenspec:qwen3-0.6b`, `qwen3-0.6b` and `Qwen/Qwen3-0.6B` give `qwenspec:qwen3.yaml#qwen3-0.6b`; what exists on disk
    is never taken for a variant's name. `wanted_by` is the place in a spec that names it, for diagnostics. Raises
    SpecError for what is neither a path nor a variant.
    """
    if name.startswith(PREFIX):
        return _bundled(name.removeprefix(PREFIX), wanted_by)
    source.refuse_unprintable(name, wanted_by or Location(name, 0, 0))
    file, mark, variant = name.rpartition("#") if "#" in name else (name, "", "")
    if os.path.lexists(name) or os.path.lexists(file):
        return name
    owner, _, repository = name.rpartition("/")
    if owner.lower() in ("", HUB) and (found := _variant(repository)):
        return found
    base = os.path.basename(file)
    if base in files():
        known = f"{mark}{variant}" if variants().get(variant) == base else ""
        hint = f"`{PREFIX}{base}{known}` comes with qwenspec"
        raise SpecError([Diagnostic("file-not-found", f"there is no file `{file}`", Location(file, 0, 0), hint)])
    if owner.lower() not in ("", HUB) or "#" in name or name.endswith((*SUFFIXES, ".json")):
        return name  # a path, which whoever reads it will not find
    message = f"`{name}` is neither a file nor a folder, and no variant that comes with qwenspec"
    raise _unknown(message, repository)


def _bundled(name: str, wanted_by: Location | None) -> str:
    if name.partition("#")[0] in files():
        return PREFIX + name
    if found := _variant(name):
        return found
    raise _unknown(f"no spec `{name}` comes with qwenspec", name, wanted_by)


def _variant(name: str) -> str | None:
    spelled = {variant.lower(): variant for variant in variants()}
    found = spelled.get(name.lower())
    return found and f"{PREFIX}{variants()[found]}#{found}"


def _unknown(message: str, name: str, wanted_by: Location | None = None) -> SpecError:
    close = near(name, variants())
    hint = f"did you mean {close}? {ALL}" if close else ALL
    return SpecError([Diagnostic("unknown-spec", message, wanted_by, hint)])
