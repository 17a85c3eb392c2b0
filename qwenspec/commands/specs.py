"""Specs as the command line names them: `file.yaml` or `file.yaml#variant`."""

from __future__ import annotations

import os
from typing import Any

from qwenspec.diagnostics import Diagnostic, SpecError, listed, nearest
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

FULL_PRECISION = "none"


def pick(spec: str, variant: str | None = None, quantization: str | None = None) -> Spec:
    """The spec of one variant: `variant`, else the one after `#`, else the file's default."""
    if variant is not None and not os.path.exists(spec):
        spec = spec.partition("#")[0]
    found = load(spec, variant)
    return found if quantization is None else found.model_copy(update={"quantization": scheme(quantization)})


def scheme(name: str) -> Any:
    """The quantisation scheme of that name with its defaults; `none` is full precision."""
    if name == FULL_PRECISION:
        return None
    from pydantic import TypeAdapter, ValidationError

    from qwenspec.spec.quantization import Quantization

    adapter: TypeAdapter[Any] = TypeAdapter(Quantization)
    names = [*adapter.json_schema()["discriminator"]["mapping"], FULL_PRECISION]
    if name not in names:
        close = nearest(name, names)
        hint = f"did you mean `{close}`?" if close else f"there are {listed(names, 'and')}"
        raise SpecError([Diagnostic("unknown-quantization", f"there is no scheme `{name}`", hint=hint)])
    try:
        return adapter.validate_python({"scheme": name})
    except ValidationError as error:
        needed = listed([str(problem["loc"][-1]) for problem in error.errors()], "and")
        message = f"`{name}` has no default for {needed}"
        raise SpecError(
            [Diagnostic("incomplete-quantization", message, hint="write `quantization` in the spec")]
        ) from error
