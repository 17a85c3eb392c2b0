"""Specs as the command line names them: `file.yaml` or `file.yaml#variant`."""

from __future__ import annotations

import os
from typing import Any

from qwenspec.diagnostics import Diagnostic, SpecError, listed, nearest
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

FULL_PRECISION = "none"


def pick(spec: str, variant: str | None = None, quantization: str | None = None, kv_cache: str | None = None) -> Spec:
    """The spec of one variant: `variant`, else the one after `#`, else the file's default.

    `quantization` and `kv_cache` are names of what takes the place of the spec's own, `none` for nothing."""
    if variant is not None and not os.path.exists(spec):
        spec = spec.partition("#")[0]
    found = load(spec, variant)
    for key, name in (("quantization", quantization), ("kv_cache", kv_cache)):
        if name is not None:
            found = found.model_copy(update={key: named(key, name), "options": (*found.options, (key, name))})
    return found


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
