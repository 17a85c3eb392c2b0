"""`convert`: what `qwenspec.convert` does to a checkpoint, with a progress bar, and the errors as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qwenspec.commands import console
from qwenspec.commands.specs import pick
from qwenspec.diagnostics import Diagnostic, ExitCode, Location, SpecError, nearest
from qwenspec.hf.checkpoint import import_path
from qwenspec.hf.quantization import matching
from qwenspec.ir import weights
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Int4, Int8

if TYPE_CHECKING:
    from qwenspec.convert.report import Report

WORST = 10  # tensors in the table


@dataclass(frozen=True)
class Options:
    """How to quantise, as the command line says it; None is what it leaves out."""

    scheme: str
    group_size: int | None
    head: str | None
    skip: tuple[str, ...]


def run(checkpoint: Path, spec: str | None, options: Options, out: Path, shard_bytes: int, as_json: bool) -> None:
    """Convert into `out`, and print the table or the data."""
    if find_spec("numpy") is None:
        diagnostic = Diagnostic(
            "library-missing", "`qwenspec convert` needs NumPy", hint="pip install 'qwenspec[convert]'"
        )
        raise SpecError([diagnostic], ExitCode.BACKEND_MISSING)
    from qwenspec.convert.convert import Request, convert

    full = _spec(checkpoint, spec)
    request = Request(checkpoint, full, _quantization(full, options), out, shard_bytes)
    with _bar() as progress:
        report = convert(request, progress)
    if as_json:
        console.show_json(report.to_data())
    else:
        console.show(_table(report))
    for name in report.left_out:
        console.note(f"note: {name} links to a file outside the checkpoint, and is not copied")
    console.note(f"wrote {out}")


def _spec(checkpoint: Path, spec: str | None) -> Spec:
    """The spec in full precision: the given one, or what the folder's config.json says."""
    if not checkpoint.is_dir():
        message = "there is no such folder" if not checkpoint.exists() else "this is not a folder"
        hint = "DIR has the *.safetensors of a checkpoint and its config.json"
        raise SpecError([Diagnostic("not-a-checkpoint", message, Location(str(checkpoint), 0, 0), hint)])
    if spec is not None:
        return pick(spec, quantization="none")
    result = import_path(checkpoint)
    for remark in result.notes:
        console.note(f"note: {remark}")
    return result.spec


def _quantization(spec: Spec, options: Options) -> Int8 | Int4:
    skip = _skipped(spec, options.skip)
    if options.scheme == "int4":
        fields = {"group_size": options.group_size, "head": options.head}
        return Int4.model_validate(
            {"scheme": "int4", "skip": skip} | {key: value for key, value in fields.items() if value is not None}
        )
    if options.group_size is not None:
        raise _usage("int8 has one scale an output and no groups", "leave `--group-size` out, or convert to int4")
    if options.head == "int4":
        raise _usage("beside int8 the head is int8 or in full precision", "`--head` is int8 or none")
    return Int8.model_validate({"scheme": "int8", "skip": skip} | ({"head": options.head} if options.head else {}))


def _skipped(spec: Spec, entries: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that `--skip` names, in the order of the checkpoint."""
    modules = weights.linears(spec.layout, spec.architecture.num_hidden_layers)
    modules += [spec.layout.embedding, spec.layout.lm_head]
    chosen: set[str] = set()
    for entry in entries:
        if not (found := matching(entry, modules)):
            close = nearest(entry, [*modules, *(name.rpartition(".")[2] for name in modules)])
            hint = f"did you mean `{close}`?" if close else f"names are like `{modules[0]}`"
            raise SpecError([Diagnostic("unknown-module", f"the checkpoint has no linear module `{entry}`", hint=hint)])
        chosen.update(found)
    return tuple(name for name in modules if name in chosen)


def _usage(message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic("usage", message, hint=hint)])


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr of the checkpoint's bytes; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), name)
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not console.wipeable(sys.stderr)
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda tensor, done, total: bar.update(task, description=tensor, completed=done, total=total)


def _table(report: Report) -> str:
    """Bytes, the tensors that lost most, and the total."""
    worst = report.worst(WORST)
    rows = [(entry.tensor, entry.format, entry.error) for entry in worst]
    rows.append((f"all {len(report.tensors):,} rounded tensors", "", report.total))
    width = max(len(name) for name, _, _ in rows)
    before, after = console.shown_bytes(report.bytes_before), console.shown_bytes(report.bytes_after)
    lines = [f"{before} -> {after}", f"  {'largest errors':{width}}  format  relative RMS  largest"]
    lines += [f"  {name:{width}}  {form:6}  {told.relative:12.6f}  {told.largest:.3g}" for name, form, told in rows]
    return "\n".join(lines)
