"""Finding backends: any installed distribution may bring some, by entry points in `qwenspec.backends`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from qwenspec.backend.api import Backend, Runner
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError, listed, nearest

GROUP = "qwenspec.backends"
MANIFEST = "MANIFEST.json"


def installed() -> dict[str, EntryPoint]:
    """Backends by name, in alphabetical order; none has been imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(name: str) -> Backend:
    """The backend called `name`. It can write packages; `unavailable()` says whether it can run them here.

    Raises SpecError: `unknown-backend` for what looks like a slip of the pen, `backend-missing` (exit code 3)
    for a backend that is not installed or whose import fails.
    """
    backends = installed()
    if point := backends.get(name):
        return _import(point)
    have = f"installed: {listed(backends, 'and')}" if backends else "no backend is installed"
    if meant := nearest(name, backends):
        hint = f"did you mean `{meant}`? {have}"
        raise SpecError([Diagnostic("unknown-backend", f"there is no backend `{name}`", hint=hint)])
    raise _missing(f"the backend `{name}` is not installed", hint=f"{have}; see `qwenspec backends`")


def no_device(backend: Backend, device: str) -> Diagnostic | None:
    """Why a backend whose libraries are there cannot use a device of this machine, or None."""
    usable = [name.split()[0] for name in backend.devices()]
    if device in usable or f"{device}:0" in usable:
        return None
    message = f"the {backend.name} backend cannot use the device `{device}` here"
    return Diagnostic("no-device", message, hint=f"use {listed(usable)}")


def open_runner(package: str | Path, weights: str | Path, device: str = "cpu", dtype: str | None = None) -> Runner:
    """Open a generated package on a checkpoint folder, with the backend that wrote it.

    `device` as torch spells it (`cpu`, `cuda:0`); `dtype` of weights and activations (None: the spec's own).
    Raises SpecError: `not-a-package` for a folder that qwenspec did not write, and what `find` raises.
    """
    package, weights = Path(package), Path(weights)
    backend = find(_backend_of(package))
    if reason := backend.unavailable():
        raise SpecError([reason], ExitCode.BACKEND_MISSING)
    if not weights.is_dir():
        hint = "give the folder of a Hugging Face checkpoint: config.json and *.safetensors"
        raise SpecError([Diagnostic("no-weights", f"{weights} is not a folder", hint=hint)])
    return backend.open(package, weights, device, dtype)


def _import(point: EntryPoint) -> Backend:
    try:
        backend: Backend = point.load()
    except ImportError as error:
        message = f"the backend `{point.name}` cannot be imported: {error}"
        raise _missing(message, hint="reinstall the distribution that brings it") from error
    return backend


def _backend_of(package: Path) -> str:
    manifest = package / MANIFEST
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        problem = Diagnostic(
            "not-a-package",
            f"{package} is not a package that qwenspec wrote: {manifest} {reason}",
            hint="`qwenspec gen SPEC` writes one",
        )
        raise SpecError([problem]) from error


def _missing(message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic("backend-missing", message, hint=hint)], ExitCode.BACKEND_MISSING)
