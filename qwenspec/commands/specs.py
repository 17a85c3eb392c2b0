"""Specs as the command line names them: a file's variant, one that comes with qwenspec, or a checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwenspec import source
from qwenspec.backend.runtime.stored import INDEX
from qwenspec.commands import console
from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed, nearest
from qwenspec.spec.bundled import resolve
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

FULL_PRECISION = "none"
CONFIG = "config.json"


def pick(spec: str, variant: str | None = None, quantization: str | None = None, kv_cache: str | None = None) -> Spec:
    """The spec of one variant: `variant`, else the one after `#`, else the file's default.

    A checkpoint folder, or its config.json, is imported, and what `import` would note is said; a variant's name is then
    the name it gets. `quantization` and `kv_cache` are names of what takes the place of the spec's own, `none` for
    nothing."""
    file, chosen = _parts(spec)
    variant = chosen if variant is None else variant
    found = _imported(file, variant) if _of_checkpoint(file) else load(file, variant)
    for key, name in (("quantization", quantization), ("kv_cache", kv_cache)):
        if name is not None:
            found = found.model_copy(update={key: named(key, name), "options": (*found.options, (key, name))})
    return found


def weights_of(spec: str, weights: Path | None) -> Path:
    """The checkpoint folder to load: the one that is given, else the one that is the spec itself."""
    file = Path(_parts(spec)[0])
    if weights is None:
        if not _of_checkpoint(str(file)):
            message = f"`{spec}` says what the model is, and its weights are needed too: --weights DIR"
            hint = "DIR is a checkpoint's folder (qwenspec downloads none); alone, in place of SPEC, it is enough"
            raise SpecError([Diagnostic("no-weights", message, hint=hint)])
        return file if file.is_dir() else file.parent
    return folder(weights)


def folder(weights: Path) -> Path:
    """The folder that `--weights` names. Raises SpecError unless it is one."""
    if weights.is_dir():
        return weights
    if weights.exists():
        problem, hint = "is a file, and not a checkpoint's folder", f"name the folder that it is in: {weights.parent}"
    else:
        problem, hint = "does not exist", "name the folder of a Hugging Face checkpoint"
    raise SpecError([Diagnostic("no-weights", f"{weights} {problem}", hint=hint)])


def _parts(spec: str) -> tuple[str, str | None]:
    """The file or folder, and the variant after `#`; names of what comes with qwenspec are resolved."""
    path = resolve(spec)
    if "#" not in path or os.path.lexists(path):
        return path, None
    file, _, variant = path.rpartition("#")
    return file, variant


def _of_checkpoint(file: str) -> bool:
    return os.path.isdir(file) or os.path.basename(file) == CONFIG


def _imported(file: str, name: str | None) -> Spec:
    """The spec that `import` would write, called `name`, else like the folder."""
    from qwenspec.hf.checkpoint import import_path

    path = Path(file)
    source.refuse_unprintable(file, Location(file, 0, 0))
    if path.is_dir() and not (path / CONFIG).is_file():
        specs = sorted(str(found) for found in path.glob("*.yaml"))[:8]
        hint = f"name a spec in it: {listed(specs)}" if specs else f"a checkpoint's folder has a {CONFIG}"
        message = f"this folder has no {CONFIG}, so it is no checkpoint"
        raise SpecError([Diagnostic("not-a-checkpoint", message, Location(file, 0, 0), hint)])
    result = import_path(path.parent if path.name == CONFIG and _has_weights(path.parent) else path, name)
    for remark in result.notes:
        console.note(f"note: {remark}")
    return result.spec.model_copy(update={"file": str(path)})


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def named(key: str, name: str) -> Any:
    """The `quantization` or `kv_cache` of that name with its defaults, None for `none`."""
    if name == FULL_PRECISION:
        return None
    from pydantic import TypeAdapter, ValidationError

    kind: Any = Spec.model_fields[key].annotation
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    alternatives = adapter.json_schema()["anyOf"][0]["discriminator"]
    names = [*alternatives["mapping"], FULL_PRECISION]
    if name not in names:
        close = nearest(name, names)
        hint = f"did you mean `{close}`?" if close else f"there are {listed(names, 'and')}"
        raise SpecError([Diagnostic("unknown-quantization", f"there is no {key} `{name}`", hint=hint)])
    try:
        return adapter.validate_python({alternatives["propertyName"]: name})
    except ValidationError as error:
        needed = listed([str(problem["loc"][-1]) for problem in error.errors()], "and")
        message = f"`{name}` has no default for {needed}"
        raise SpecError([Diagnostic("incomplete-quantization", message, hint=f"write `{key}` in the spec")]) from error
