"""`validate`, `schema` and `import`: what people use while they write specs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenspec import source
from qwenspec.commands import console
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError
from qwenspec.files import check_place, write_whole
from qwenspec.spec.load import load_all

SCHEMA = Path("specs/schema/spec.v1.schema.json")


def validate(files: Sequence[str], as_json: bool) -> ExitCode:
    """Print every diagnostic of every file."""
    reports = [_validated(file) for file in console.progress(files, str)]
    found = [diagnostic for _, diagnostics in reports for diagnostic in diagnostics]
    if as_json:
        console.show_json(
            [
                {"file": file, "variants": variants, "diagnostics": [d.as_dict() for d in diagnostics]}
                for file, (variants, diagnostics) in zip(files, reports, strict=True)
            ]
        )
    else:
        for file, (variants, diagnostics) in zip(files, reports, strict=True):
            if not diagnostics:
                console.show(f"{file}: {console.counted(len(variants), 'variant')}")
        console.show_diagnostics(found)
    if found:
        console.note(
            f"{console.counted(len(found), 'error')} in {console.counted(sum(bool(d) for _, d in reports), 'file')}"
        )
    return ExitCode.USAGE if found else ExitCode.OK


def _validated(file: str) -> tuple[list[str], tuple[Diagnostic, ...]]:
    try:
        return [spec.variant for spec in load_all(file)], ()
    except SpecError as error:
        return [], error.diagnostics


def schema(out: Path | None, check: bool) -> ExitCode:
    """Print the JSON Schema, write it to `out`, or compare it with the file there."""
    from qwenspec.spec.schema import schema_text

    text = schema_text()
    file = out or SCHEMA
    if check:
        return _compare(file, text)
    if out is None:
        console.show_document(text)
    else:
        _write(out, text)
    return ExitCode.OK


def _compare(file: Path, text: str) -> ExitCode:
    present = source.read(file) if file.is_file() else ""
    if present == text:
        console.note(f"{file} is up to date")
        return ExitCode.OK
    lines = difflib.unified_diff(present.splitlines(True), text.splitlines(True), str(file), str(file))
    console.show_diff("".join(lines))
    console.note(f"{file} is out of date: `qwenspec schema -o {file}` writes it")
    return ExitCode.CHECK_FAILED


def import_spec(
    config: Path, name: str | None, ignore: Sequence[str], out: Path | None, force: bool, as_json: bool
) -> None:
    """Write the spec of a config.json or a checkpoint folder to `out`, or print it."""
    from qwenspec.hf.checkpoint import import_path
    from qwenspec.hf.writer import write_spec

    if out is not None:
        check_place(out)
        if out.exists() and not force:
            message = f"{out} exists already"
            raise SpecError([Diagnostic("file-exists", message, hint="`--force` overwrites it")])
    result = import_path(config, name, tuple(ignore))
    text = write_spec(result.tree, result.notes)
    if out is not None:
        _write(out, text)
    if as_json:
        shown: dict[str, Any] = {"spec": result.tree, "notes": result.notes}
        console.show_json(shown)
    elif out is None:
        console.show_document(text)
    for remark in result.notes:
        console.note(f"note: {remark}")


def _write(file: Path, text: str) -> None:
    write_whole(file, text)
    console.note(f"wrote {file}")
