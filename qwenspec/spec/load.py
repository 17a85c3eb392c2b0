"""Read spec files: one variant, or all of them with every mistake of the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qwenspec.diagnostics import Diagnostic, Location, SpecError, listed
from qwenspec.spec.bundled import resolve
from qwenspec.spec.check import check
from qwenspec.spec.document import Spec
from qwenspec.spec.explain import Finding
from qwenspec.spec.files import Files, SpecFile, variant_named
from qwenspec.spec.rules import RULES
from qwenspec.tree import Entry, Mapping, Scalar, at, place

MAX_DIAGNOSTICS = 100
# A key that could not be read takes its value with it; what then seems to be missing may not be.
_LOSES_KEYS = ("merge-key", "key-not-text")
_AFTER_LOST_KEYS = ("missing-key", "no-variants", "unknown-variant", "no-default-variant")
_RULE_CODES = {rule.code for rule in RULES}


def load(path: str | Path, variant: str | None = None) -> Spec:
    """The spec of one variant; without a name, the one after `#` in `path`, else the file's default.

    `path` may also be the name of a variant that comes with qwenspec, `qwen3-0.6b`: see `qwenspec.spec.bundled`.
    Raises SpecError with every mistake of the variant and of what its file says for all.
    """
    name, chosen = _split(resolve(str(path)), variant)
    files = Files()
    file = files.open(name)
    variant = variant_named(file, chosen)
    return _specs(files, file, {variant: file.variants()[variant]})[0]


def load_all(path: str | Path) -> list[Spec]:
    """The specs of all variants in the file's order; where `path` names a variant, as it may for `load`, of that one.

    Raises SpecError with every mistake of the file."""
    name, chosen = _split(resolve(str(path)), None)
    files = Files()
    file = files.open(name)
    found = file.variants()
    return _specs(files, file, found if chosen is None else {v: found[v] for v in [variant_named(file, chosen)]})


def load_right(path: str | Path) -> list[Spec]:
    """The specs of those variants that have no mistake. Raises SpecError when the file cannot be parsed."""
    files = Files()
    file = files.open(str(path))
    specs: list[Spec] = []
    for name, entry in file.variants().items():
        with contextlib.suppress(SpecError):
            specs += _specs(files, file, {name: entry})
    return specs


def variants(path: str | Path) -> list[str]:
    """The names of a file's variants, in its order. Raises SpecError when the file cannot be parsed."""
    return list(Files().open(str(path)).variants())


def _split(path: str, variant: str | None) -> tuple[str, str | None]:
    name, mark, chosen = path.rpartition("#")
    if not mark or os.path.exists(path):
        return path, variant
    if variant is not None and variant != chosen:
        message = f"two variants are named: `{chosen}` in the path, and `{variant}`"
        raise SpecError([Diagnostic("two-variants", message, Location(name, 0, 0), "name one")])
    return name, chosen


def _specs(files: Files, file: SpecFile, chosen: dict[str, Entry]) -> list[Spec]:
    specs: list[Spec] = []
    findings: dict[str, list[Finding]] = {}
    for name, entry in chosen.items():
        if not _mergeable(file, entry) or sum(map(len, findings.values())) > MAX_DIAGNOSTICS:
            continue
        try:
            merged = files.merged(file, name)
        except SpecError as error:
            findings[name] = [Finding((), diagnostic) for diagnostic in error.diagnostics]
            continue
        own = at(entry.value, ("description",))
        described = own.value if isinstance(own, Scalar) and isinstance(own.value, str) else None
        text = file.text("description") or "" if described is None else described
        spec, findings[name] = check(merged, name, file.text("family") or "", text, file.name)
        specs += [spec] if spec else []
    problems = file.problems + _told_once(findings, file) + _in_shared_part(files, file)
    if any(problem.code in _LOSES_KEYS for problem in problems):
        problems = [problem for problem in problems if problem.code not in _AFTER_LOST_KEYS]
    if problems:
        raise SpecError(_sorted(problems, file.name))
    return specs


def _in_shared_part(files: Files, file: SpecFile) -> list[Diagnostic]:
    """Mistakes in values that every variant overrides. Alone, the shared part need not be complete or coherent."""
    if not isinstance(file.root.get("architecture"), Mapping):
        return []
    _, findings = check(files.shared(file), "", "", "", file.name)
    partial = ("missing-key", *_RULE_CODES)
    return [f.diagnostic for f in findings if f.diagnostic.code not in partial]


def _mergeable(file: SpecFile, entry: Entry) -> bool:
    """Are the things to be merged mappings? If not, that has been told, and what follows from it would be noise."""
    nodes = (entry.value, file.root.get("architecture"))
    return all(n is None or isinstance(n, Mapping) or (isinstance(n, Scalar) and n.value is None) for n in nodes)


def _told_once(findings: dict[str, list[Finding]], file: SpecFile) -> list[Diagnostic]:
    """A mistake that several variants share is told once; one between fields names the variants that have it."""
    groups: dict[object, list[tuple[str, Finding]]] = {}
    for variant, found in findings.items():
        for finding in found:
            diagnostic = finding.diagnostic
            what = finding.path if diagnostic.code == "missing-key" else diagnostic.location
            groups.setdefault((diagnostic.code, what), []).append((variant, finding))

    told: list[Diagnostic] = []
    for group in groups.values():
        first, *others = dict.fromkeys(finding.diagnostic for _, finding in group)
        same = list(dict.fromkeys(name for name, finding in group if finding.diagnostic == first))
        also = list(dict.fromkeys(name for name, _ in group if name not in same))
        if first.code == "missing-key":
            # What every variant lacks, the shared part lacks.
            shared = replace(first, location=place(file.root, group[0][1].path))
            told += [shared] if others and len(same + also) == len(findings) else [first, *others]
        elif first.code in _RULE_CODES and len(same) < len(findings):
            where = _named(same) + (f"; also wrong in {_named(also)}" if also else "")
            told.append(replace(first, message=f"{first.message} ({where})"))
        else:
            told.append(first)
    return told


def _named(variants: list[str]) -> str:
    if len(variants) > 3:
        return f"variant `{variants[0]}` and {len(variants) - 1} more"
    return f"variants {listed(variants, 'and')}" if variants[1:] else f"variant `{variants[0]}`"


def _sorted(diagnostics: Iterable[Diagnostic], first_file: str) -> list[Diagnostic]:
    """By position, this file before those that it extends, and no more than anyone would read."""

    def position(diagnostic: Diagnostic) -> tuple[bool, str, int, int]:
        at = diagnostic.location or Location(first_file, 0, 0)
        return at.file != first_file, at.file, at.line, at.column

    unique: dict[object, Diagnostic] = {}
    for d in diagnostics:
        unique.setdefault((d.code, d.location, d.message if d.code == "missing-key" else ""), d)
    ordered = sorted(unique.values(), key=position)
    if len(ordered) <= MAX_DIAGNOSTICS:
        return ordered
    message = f"only the first {MAX_DIAGNOSTICS} mistakes are told"
    return [*ordered[:MAX_DIAGNOSTICS], Diagnostic("too-many-errors", message, Location(first_file, 0, 0))]
