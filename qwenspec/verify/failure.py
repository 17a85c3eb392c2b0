"""A disagreement as a folder that anyone can run again."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.hf.writer import spec_text, with_layout
from qwenspec.spec.document import Spec
from qwenspec.verify.bisect import ModuleError, first_parting, module_errors
from qwenspec.verify.case import REFERENCE, Case
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Forward, Step, kind_of, to_data
from qwenspec.verify.stored_failure import Sequences, damaged, read_case, read_steps

CASE, WORKLOAD, VERDICT = "case.json", "workload.json", "verdict.json"
LIBRARIES = {  # name in versions.json -> distribution
    "qwenspec": "qwenspec",
    "numpy": "numpy",
    "torch": "torch",
    "triton": "triton",
    "tvm": "apache-tvm",
    "transformers": "transformers",
    "safetensors": "safetensors",
}


@dataclass(frozen=True)
class Parting:
    """Where a contender parts from the reference, in the forward at which a workload failed."""

    contender: str
    module: ModuleError | None  # None: taken module by module, nothing is off by more than the bound
    errors: tuple[ModuleError, ...]  # of every module, in the order of execution


# ------------------------------------------------------------------------------------------------------- writing


def write_failure(disagreement: Disagreement, folder: Path) -> Path:
    """Write everything that `replay` and a person need to `folder`, and return it. It is complete or absent.

    An older failure there is replaced. Raises SpecError (`file-exists`) when something else is there, and
    `cannot-write`."""
    if folder.exists() and not _is_failure(folder):
        message = f"{folder} exists already, and is not the folder of a failure"
        raise SpecError([Diagnostic("file-exists", message, hint="move it away, or name another folder")])
    case = _standalone(disagreement.case)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".failure-", dir=folder.parent) as beside:
            new = Path(beside) / "new"
            new.mkdir()
            _write_files(disagreement, case, new, folder)
            if folder.exists():
                folder.rename(Path(beside) / "old")
            new.rename(folder)
    except OSError as error:
        raise SpecError([Diagnostic("cannot-write", f"{folder}: {error.strerror or error}")]) from error
    return folder


def _is_failure(folder: Path) -> bool:
    return folder.is_dir() and ((folder / VERDICT).is_file() or not any(folder.iterdir()))


def _standalone(case: Case) -> Case:
    """The case without what its spec has beside it, and what is named from the folder that is the current one now."""
    return dataclasses.replace(case, spec=with_layout(case.spec), weights=case.weights and case.weights.absolute())


def spec_file(spec: Spec) -> str:
    """The text of a spec file that has this variant alone and needs no other file."""
    return spec_text(spec, ("A variant that contenders differed on, as small as it was made.",))


def _write_files(disagreement: Disagreement, case: Case, folder: Path, final: Path) -> None:
    verdict = _verdict(disagreement)
    (folder / "spec.yaml").write_text(spec_file(case.spec), encoding="utf-8")
    _write_json(folder / CASE, case.to_data())
    _write_json(folder / WORKLOAD, [to_data(step) for step in disagreement.steps])
    _write_json(folder / "versions.json", _versions())
    _write_json(folder / VERDICT, verdict)
    if disagreement.outputs:
        with (folder / "outputs.npz").open("wb") as file:
            outputs: dict[str, Any] = dict(disagreement.outputs)
            np.savez_compressed(file, **outputs)
    (folder / "README.txt").write_text(_readme(disagreement, case, verdict, final), encoding="utf-8")


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _verdict(disagreement: Disagreement) -> dict[str, Any]:
    again, parting = _examined(disagreement)
    module = parting.module if parting else None
    return {
        "pair": list(disagreement.pair),
        "step": len(disagreement.steps),
        "kind": kind_of(disagreement.steps[-1]),
        "reason": disagreement.reason,
        "again": again,
        "comparison": _plain(disagreement.comparison) if disagreement.comparison else None,
        "parts": parting.contender if parting else None,
        "module": _plain(module) if module else None,
        "modules": [_plain(error) for error in parting.errors] if parting else None,
    }


def _plain(record: Any) -> dict[str, Any]:
    """A dataclass of numbers and text for JSON, where what is not finite is null."""
    fields = dataclasses.asdict(record)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _versions() -> dict[str, str | None]:
    """None: not installed. Metadata alone is read: importing one of these libraries may be what fails."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in LIBRARIES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = None
    return found | {"platform": platform.platform(), "cpu": _cpu()}


def _cpu() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _readme(disagreement: Disagreement, case: Case, verdict: Mapping[str, Any], folder: Path) -> str:
    weights = f"random weights from seed {case.seed}" if case.weights is None else f"the weights in {case.weights}"
    steps = [f"  {number:>3}. {step}" for number, step in enumerate(disagreement.steps, 1)]
    outputs = "  outputs.npz    logits [rows, vocab] of every contender at the last step\n"
    return f"""\
{disagreement}

{_where(verdict)}
Run again after it was found: {verdict["again"]}.

Run it again, here or wherever this folder is:

  qwenspec verify --replay {shlex.quote(str(folder))}

What was run: {case.spec.variant} in {case.dtype} on {case.device}, {weights},
by {", ".join(case.contenders)}; {case.sizes}.

Steps, of which the last failed:

{chr(10).join(steps)}

Files:

  spec.yaml      the variant, for `qwenspec validate` and other commands
  case.json      the spec, the weights' seed, the dtype, the cache and the contenders, as they are run again
  workload.json  the steps
{outputs if disagreement.outputs else ""}\
  verdict.json   who differed, at which step, by how much, and every module's error
  versions.json  what it was run with
"""


def _where(verdict: Mapping[str, Any]) -> str:
    name, module = verdict["parts"], verdict["module"]
    if module is not None:
        error = "infinite" if module["error"] is None else f"{module['error']:.3g}"
        return f"Where: {module['address']} of {name} is the first module that parts from the reference; error {error}."
    if name is not None:
        return f"Where: module by module, {name} agrees with the reference; what only {verdict['kind']} does is wrong."
    return "Where: not known module by module."


# ----------------------------------------------------------------------------------------------- running it again


def replay(folder: Path) -> Disagreement | None:
    """Run the failure in a folder that write_failure wrote; None when everything agrees now.

    Raises SpecError for a file that is missing or damaged, weights that are gone, and what opening a contender
    raises."""
    case, file = read_case(folder / CASE), folder / WORKLOAD
    steps = read_steps(file)
    session, sequences = Session(case), Sequences(case)
    for number, step in enumerate(steps, 1):
        try:
            sequences.check(step)
        except ValueError as error:
            damaged(file, ValueError(f"step {number}, {kind_of(step)}: {error}"))
        try:
            if session.do(step):
                sequences.done(step)
        except Disagreement as disagreement:
            return disagreement
    return None


def locate(disagreement: Disagreement) -> Parting | None:
    """Which contender of the pair parts from the reference, and which of its modules.

    None when there are no modules to look at: the last step is not a forward, a contender raised an exception, or
    an earlier step fails now."""
    step, comparison = disagreement.steps[-1], disagreement.comparison
    if not isinstance(step, Forward) or comparison is None:
        return None
    session = Session(disagreement.case)
    try:
        for earlier in disagreement.steps[:-1]:
            session.do(earlier)
    except Disagreement:
        return None
    expected = session.contenders[REFERENCE].taps(step)
    # Where two others are farther apart than the bound, one of them is off by half of it.
    bound = comparison.bound if REFERENCE in disagreement.pair else comparison.bound / 2
    partings: list[Parting] = []
    for name in disagreement.pair:
        if name != REFERENCE:
            taps = session.contenders[name].taps(step)
            module = first_parting(taps, expected, bound, disagreement.case.dtype)
            partings.append(Parting(name, module, tuple(module_errors(taps, expected))))
    return max(partings, key=lambda parting: parting.errors[-1].error)  # the last are the logits


def _run(case: Case, steps: list[Step]) -> Disagreement | None:
    session = Session(case)
    try:
        for step in steps:
            session.do(step)
    except Disagreement as disagreement:
        return disagreement
    return None


def _examined(disagreement: Disagreement) -> tuple[str, Parting | None]:
    """What another run found, in words, and where the two part. A failure is written down whatever this meets."""
    try:
        again = _run(disagreement.case, disagreement.steps)
        if again is None:
            return "everything agreed, so it does not fail every time", None
        if (again.pair, len(again.steps)) != (disagreement.pair, len(disagreement.steps)):
            return f"it failed otherwise: {again}", None
        return "it failed in the same way", locate(disagreement)
    except Exception as error:
        return f"it could not be examined: {type(error).__name__}: {error}", None
