"""`gen`: packages from specs, one or all that the repository commits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenspec import source
from qwenspec.backend import folder
from qwenspec.backend.emit import check, package_name, render_package
from qwenspec.backend.registry import MANIFEST, find
from qwenspec.commands import console
from qwenspec.commands.specs import pick
from qwenspec.diagnostics import Diagnostic, ExitCode, Location, SpecError, printable
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import plan
from qwenspec.spec.base import Model
from qwenspec.spec.document import Spec

COMMITTED = "manifest.yaml"  # in the output folder: what `--all` is
SHOWN = 5  # files that a note names


class Entry(Model):
    """One package of the manifest."""

    spec: str
    variant: str
    backend: str
    quantization: str | None = None
    kv_cache: str | None = None


@dataclass(frozen=True)
class Job:
    """One package to write or to compare."""

    spec: Spec
    backend: str
    out: Path

    @property
    def package(self) -> Path:
        return self.out / package_name(self.spec, self.backend)


def committed(out: Path) -> list[Job]:
    """The jobs in the manifest of `out`, a list of {spec, variant, backend} with the options of `gen`; specs are
    relative to the folder that holds `out`, which has to be the current one: the specs' names are part of what is
    generated."""
    file = out / COMMITTED
    if not file.is_file():
        hint = "`--all` is for a repository that commits generated packages: run it at its root, or name a SPEC"
        raise SpecError([Diagnostic("no-manifest", f"there is no {file}", hint=hint)])
    return [
        Job(pick(entry.spec, entry.variant, entry.quantization, entry.kv_cache), entry.backend, out)
        for entry in _entries(file)
    ]


def _entries(file: Path) -> list[Entry]:
    import yaml
    from pydantic import TypeAdapter, ValidationError

    text, depth = source.read(file), 0
    try:
        for event in yaml.parse(text):  # which reads no further than it is asked to
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise ValueError("it is nested too deep")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
                raise ValueError(f"it has the tag {event.tag}, and plain YAML alone is read")
        return TypeAdapter(list[Entry]).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        hint = "it is a list of {spec: FILE, variant: NAME, backend: NAME}"
        problem = Diagnostic("bad-manifest", str(error).splitlines()[0], Location(str(file), 0, 0), hint)
        raise SpecError([problem]) from error


def stray(out: Path, jobs: list[Job]) -> list[Path]:
    """Generated packages in `out` that the manifest does not list."""
    found = {path.parent for path in out.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")}
    return sorted(found - {job.package for job in jobs})


def check_degree(job: Job, degree: int) -> None:
    """A package is the same for every number of ranks; raises SpecError where so many cannot share the model."""
    plan(lower(job.spec), degree)


def say_how(job: Job, degree: int) -> None:
    """How to run a package as so many ranks."""
    command = f"torchrun --nproc-per-node {degree} -m {job.package.name} --weights DIR --prompt TEXT"
    console.note(f"in {job.out}: {command}")


def write(jobs: list[Job]) -> list[dict[str, object]]:
    """Write every package; what was written, as data."""
    written: list[dict[str, object]] = []
    notes: list[str] = []  # after the line that shows the progress
    for job in console.progress(jobs, lambda job: str(job.package)):
        files = render_package(job.spec, find(job.backend))
        met = folder.write(job.package, files)
        lines = {name: len(text.splitlines()) for name, text in sorted(files.items())}
        package = str(job.package)
        written.append({"package": package, "variant": job.spec.variant, "backend": job.backend, "lines": lines})
        notes += _notes(package, met)
    for text in notes:
        console.note(text)
    return written


def _notes(package: str, met: folder.Written) -> Iterator[str]:
    if met.kept:
        yield f"{package}: kept what qwenspec did not write: {_shortened(met.kept)}"
    if met.replaced:
        yield f"{package}: replaced what had been edited: {_shortened(met.replaced)}"
    if met.removed:
        yield f"{package}: removed what this version does not have: {_shortened(met.removed)}"


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def written_text(written: list[dict[str, object]]) -> str:
    lines: list[str] = []
    for package in written:
        files = package["lines"]
        assert isinstance(files, dict)
        lines.append(f"{package['package']}  ({package['variant']}, {package['backend']})")
        lines.append(f"  {console.counted(len(files), 'file')}, {sum(files.values()):,} lines")
    return "\n".join(lines)


def compare(jobs: list[Job], strays: list[Path], as_json: bool) -> ExitCode:
    """Print how the packages on disk differ from what would be written; nothing is written."""
    checked = console.progress(jobs, lambda job: str(job.package))
    diffs = {str(job.package): check(job.spec, job.backend, job.out) for job in checked}
    stale = {package: diff for package, diff in diffs.items() if diff}
    if as_json:
        console.show_json({"checked": list(diffs), "stale": stale, "stray": list(map(str, strays))})
    else:
        console.show_diff("".join(stale.values()))
    for package in stale:
        console.note(f"{package} is out of date")
    warn(strays)
    if not stale and not strays:
        console.note(f"{console.counted(len(diffs), 'package')} up to date")
    return ExitCode.CHECK_FAILED if stale or strays else ExitCode.OK


def warn(strays: list[Path]) -> None:
    for package in strays:
        console.note(f"{package} is not in the manifest: list it there, or remove it")
