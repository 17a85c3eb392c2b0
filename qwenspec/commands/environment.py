"""`backends`: what is installed, what it can run on here, and why not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qwenspec.backend.registry import find, installed
from qwenspec.commands.describe import table
from qwenspec.diagnostics import SpecError


def backends() -> list[dict[str, Any]]:
    """Each installed backend: versions of its libraries, usable devices, or the reason why it cannot run."""
    return [_report(name) for name in installed()]


def _report(name: str) -> dict[str, Any]:
    try:
        backend = find(name)
    except SpecError as error:
        return {"name": name, "libraries": {}, "devices": [], "problem": error.diagnostics[0].as_dict()}
    problem = backend.unavailable()
    return {
        "name": name,
        "libraries": {library: _version(library) for library in backend.libraries},
        "devices": [] if problem else list(backend.devices()),
        "problem": problem.as_dict() if problem else None,
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def backends_text(reports: list[dict[str, Any]]) -> str:
    if not reports:
        return "no backend is installed"
    return "\n".join(line for report in reports for line in _lines(report))


def _lines(report: dict[str, Any]) -> list[str]:
    problem = report["problem"]
    libraries = ", ".join(f"{name} {found or '(not installed)'}" for name, found in report["libraries"].items())
    rows = {"libraries": libraries}
    if problem is None:
        rows["runs on"] = ", ".join(report["devices"])
    else:
        rows |= {"cannot run": problem["message"], "help": problem.get("hint", "")}
    return [report["name"], *table((name, text) for name, text in rows.items() if text)]
