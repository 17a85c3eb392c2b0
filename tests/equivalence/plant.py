"""Plant mistakes, one at a time, in a copy of the sources, and see which test of the suite notices.

python tests/equivalence/plant.py [NAME ...] [--only suite|files] [--jobs 2] [--docs docs/mutants.md]

Without names: control runs without any mistake, which must pass, and every mistake. Exit status 1 when a control
fails or a mistake survives. What was found is kept in build/mutants.json, from which --docs writes its table: mistakes
can be planted in several runs. NAME may have wildcards: 'tvm_*'.

Most mistakes in what a model computes are for the equivalence suite, hours for all of them. The others name the files
of tests that must notice them, and take seconds each: --only files.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from mutant import QUANTIZED as QUANTIZED_FILE
from mutant import ROOT, TVM, Mutant
from mutants import MUTANTS
from mutants_kv import KV_MUTANTS
from mutants_parallel import PARALLEL_MUTANTS
from mutants_quantized import QUANTIZED_MUTANTS
from mutants_quantized_kernels import QUANTIZED_KERNELS

KEPT = ROOT / "build/mutants.json"
COPIED = (
    *("qwenspec", "backends", "tests", "pyproject.toml", "specs", "examples", "generated", "docs", "README.md"),
    *("LICENSE", "Makefile"),
)
TESTS = "tests/equivalence"
OVERLAY = "EQUIVALENCE_OVERLAY"  # the copy that the tests must import
CONTROL = "control"
CONTROL_OF_FILES = "control_of_files"
SURVIVED = "no test failed"
TIME_LIMIT = 1200  # seconds of a stage
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", re.M)

# The suite in parts. The likeliest to notice runs first, and the first that notices is the last.
OF_WORKLOADS = ("edges", "long", "features", "quantized", "kv_cache", "machines", "parallel")
WORKLOADS = [f"{TESTS}/test_{name}.py" for name in OF_WORKLOADS]
LOADING, QUANTIZED, KV_CACHE, FEATURES, PARALLEL, PLAN = (
    [f"{TESTS}/test_{name}.py"]
    for name in ("quantized_loading", "quantized", "kv_cache", "features", "parallel", "shard_plan")
)
PROPERTIES = [TESTS, *(f"--ignore={file}" for file in WORKLOADS)]
TRITON_ALONE = [*WORKLOADS, "-k", "not all_backends and not tvm"]
WITH_TVM = [*WORKLOADS, "-k", "all_backends or tvm"]
OF_KERNELS = ("edges", "long", "interpreter", "quantized")
INTERPRETER = ["-m", "interpreter", *(f"{TESTS}/test_{name}.py" for name in OF_KERNELS)]
CPU = "not interpreter and not aot and not gpu"


@dataclass(frozen=True)
class Result:
    """What became of one mistake. `test`: that failed; None when every test passed."""

    name: str
    test: str | None
    pair: str
    examples: int | None
    reason: str
    seconds: int


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of the planted runs (-p plant): the packages under test are those of the copy."""
    import qwenspec
    import qwenspec_triton
    import qwenspec_tvm

    for package in (qwenspec, qwenspec_triton, qwenspec_tvm):
        if not Path(str(package.__file__)).is_relative_to(os.environ[OVERLAY]):
            raise pytest.UsageError(f"{package.__file__} is not in {os.environ[OVERLAY]}")


@dataclass(frozen=True)
class Planting:
    """What is run: parts of the suite, each a process's arguments, with a mistake or, as a control, without."""

    name: str
    mutant: Mutant | None
    stages: list[list[str]]


def stages(mutant: Mutant | None) -> list[list[str]]:
    """The parts of the suite that can notice a mistake, each a process's arguments; without one, all of them."""
    if mutant is not None and mutant.tests:
        return files([mutant])
    if mutant in QUANTIZED_MUTANTS:
        return [LOADING, PROPERTIES, TRITON_ALONE, WITH_TVM]
    if mutant is not None and mutant in QUANTIZED_KERNELS:
        if mutant.interpreted:
            return [["-m", "interpreter", *QUANTIZED]]
        backend = "tvm" if mutant.file.startswith(TVM) else "triton"
        return [[*QUANTIZED, "-k", backend], [*QUANTIZED, *FEATURES, "-k", f"not {backend}"]]
    if mutant is not None and mutant in PARALLEL_MUTANTS:
        formats = "formats and " if mutant.file == QUANTIZED_FILE else ""
        ranks = [*PARALLEL, "-k", formats + ("tvm" if mutant.file.startswith(TVM) else "not tvm")]
        return [ranks, PLAN] if mutant.file.startswith("qwenspec/ir/") else [ranks]
    if mutant in KV_MUTANTS:
        return [[*KV_CACHE, "-k", "tvm" if mutant.file.startswith(TVM) else "triton"]]
    if mutant is None or mutant.file.startswith("qwenspec/ir/"):
        return [PROPERTIES, TRITON_ALONE, WITH_TVM, INTERPRETER]
    if mutant.interpreted:
        return [INTERPRETER]
    if mutant.file.startswith(TVM):
        return [WITH_TVM, PROPERTIES]
    return [TRITON_ALONE, WITH_TVM, PROPERTIES, INTERPRETER]


def files(mutants: Iterable[Mutant]) -> list[list[str]]:
    """The tests that these mistakes name, each once: a process for all, and one for those in Triton's interpreter."""
    interpreted = dict.fromkeys(test for mutant in mutants if mutant.interpreted for test in mutant.tests)
    others = dict.fromkeys(test for mutant in mutants if not mutant.interpreted for test in mutant.tests)
    marked = ((CPU, others), ("interpreter", interpreted))
    return [["-m", mark, *tests] for mark, tests in marked if tests]


def plant(planting: Planting, sources: Path) -> Result:
    """Run the parts on a copy of the sources that has the mistake, until a test fails."""
    name, mutant, start = planting.name, planting.mutant, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        overlay = Path(folder).resolve()
        shutil.copytree(sources, overlay, dirs_exist_ok=True)
        if mutant:
            mutant.apply(overlay)
        examples = 0
        for arguments in planting.stages:
            done = run(overlay, arguments)
            found, ran = read_report(overlay / "report.json")
            examples += ran
            if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                test, pair, reason = describe(done, found)
                return Result(name, test, pair, examples or None, reason, round(time.monotonic() - start))
    return Result(name, None, "", examples or None, SURVIVED, round(time.monotonic() - start))


def copy_sources(folder: Path) -> None:
    """What the suite imports, as it is now. The test of the mistakes themselves would fail on any of them."""
    ignored = shutil.ignore_patterns("__pycache__", "test_mutants_apply.py", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def run(overlay: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """One process of the suite, in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "plant", "-p", "no:cacheprovider", "--tb=short"]
    paths = [overlay, overlay / "backends", overlay / TESTS]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "EQUIVALENCE_PROFILE": "mutants",
        OVERLAY: str(overlay),
        # A library's key has the hash of the sources that it is compiled from: mistakes do not share any by mistake.
        "QWENSPEC_CACHE": os.environ.get("QWENSPEC_CACHE", str(ROOT / "build/mutants-libraries")),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    if "interpreter" in arguments:
        environment["TRITON_INTERPRET"] = "1"
    report = overlay / "report.json"
    report.unlink(missing_ok=True)
    command += arguments
    if any(argument.startswith(TESTS) for argument in arguments):  # the option is that folder's
        command.append(f"--equivalence-report={report}")
    try:
        return subprocess.run(
            command, cwd=overlay, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired as expired:
        return subprocess.CompletedProcess(command, pytest.ExitCode.INTERRUPTED, f"{expired}", "")


def read_report(file: Path) -> tuple[list[dict[str, str]], int]:
    """The failures that the suite described, and how many examples it had."""
    if not file.is_file():
        return [], 0
    report = json.loads(file.read_text())
    return report["found"], int(report["ran"]["examples"])


def describe(done: subprocess.CompletedProcess[str], found: list[dict[str, str]]) -> tuple[str | None, str, str]:
    """The test that failed, the pair that it found apart, and why. No test, if none ran: that notices nothing."""
    if found:
        first = found[0]
        return _short(first["test"]), " / ".join(first["pair"]), first["reason"].split("\n")[0]
    if done.returncode == pytest.ExitCode.TESTS_FAILED and (failed := FAILED.search(done.stdout)):
        return _short(failed[1]), "", (failed[2] or "").strip()
    if done.returncode < 0:
        return "process", "", f"ended by signal {-done.returncode}"
    return None, "", f"pytest ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}"


def _short(test: str) -> str:
    return test.removeprefix(f"{TESTS}/")


# ---------------------------------------------------------------------------------------------------- table


def table(results: dict[str, Result]) -> str:
    """The page of every mistake and what noticed it, by file."""
    lines = [
        "# Planted mistakes",
        "",
        "The tests are tested by mistakes: each is planted alone in a copy of the sources, and a test must fail. For a",
        "mistake in what a model computes that is one of the proof suite, in its `ci` profile; the others name the",
        "files that must notice them. `tests/equivalence/plant.py` wrote this page. A pair is what disagreed: a",
        "contender and what it is compared with; without one, a property of one part failed. Examples are those of the",
        "random workloads up to the failure.",
        "",
        "| file | mistake | lesson | noticed by | pair | examples | seconds |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for mutant in sorted(MUTANTS, key=lambda mutant: mutant.file):
        result = results.get(mutant.name)
        cells = [f"`{mutant.file}`", mutant.name, mutant.lesson]
        if result is None:
            cells += ["not planted", "", "", ""]
        else:
            examples = "" if result.examples is None else str(result.examples)
            noticed = f"`{result.test}`" if result.test else "**nothing**"
            cells += [noticed, result.pair, examples, str(result.seconds)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    caught = sum(mutant.name in results and results[mutant.name].test is not None for mutant in MUTANTS)
    return "\n".join([*lines, "", f"{caught} of {len(MUTANTS)} noticed.", ""])


def load_results() -> dict[str, Result]:
    if not KEPT.is_file():
        return {}
    return {name: Result(**kept) for name, kept in json.loads(KEPT.read_text()).items()}


def keep(result: Result) -> None:
    """Add one to what was found so far."""
    results = load_results() | {result.name: result}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({name: asdict(one) for name, one in sorted(results.items())}, indent=1))


def chosen(names: Sequence[str], only: str | None) -> list[Planting]:
    """The mistakes and controls of these names; of none: all of them. `only`: those that are noticed there."""
    of_files = [mutant for mutant in MUTANTS if mutant.tests]
    controls = [Planting(CONTROL, None, stages(None)), Planting(CONTROL_OF_FILES, None, files(of_files))]
    everything = controls + [Planting(mutant.name, mutant, stages(mutant)) for mutant in MUTANTS]
    there = {CONTROL_OF_FILES, *(mutant.name for mutant in of_files)}
    if only:
        everything = [planting for planting in everything if (planting.name in there) == (only == "files")]
    found = [one for one in everything if not names or any(fnmatch.fnmatch(one.name, name) for name in names)]
    if not found:
        raise SystemExit(f"no mistake is called {', '.join(names)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--only", choices=["suite", "files"], help="mistakes for the suite, or for the files they name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", type=Path, metavar="FILE")
    args = parser.parse_args()
    wrong = 0
    plantings = chosen(args.names, args.only)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        copy_sources(Path(folder))
        for done in as_completed([pool.submit(plant, planting, Path(folder)) for planting in plantings]):
            result = done.result()
            keep(result)
            wrong += result.reason != SURVIVED if result.name in (CONTROL, CONTROL_OF_FILES) else result.test is None
            print(f"{result.name:36} {result.seconds:5} s  {result.test} {result.pair}: {result.reason}", flush=True)
    if args.docs:
        args.docs.write_text(table(load_results()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
