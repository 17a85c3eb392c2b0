"""`verify`: what `qwenspec.verify` finds of a spec, with a progress bar, as a table and as a page."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwenspec.commands import console
from qwenspec.commands.execute import arguments
from qwenspec.commands.specs import pick
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError, listed
from qwenspec.files import check_place, write_whole

LIBRARIES = ("numpy", "safetensors", "hypothesis")  # without which nothing can be verified
SGR = {"✓": "32", "≈": "33", "✗": "1;31"}  # colours of the signs


def run(spec: str, page: Path | None, as_json: bool, **options: Any) -> ExitCode:
    """Verify, print the table or the data, write the page; CHECK_FAILED when anything disagrees.

    `options`: of the command line, by their names there; None is what was not given."""
    _require_libraries()
    from qwenspec.verify import report
    from qwenspec.verify.metrics import Verdict
    from qwenspec.verify.verification import Request, verify

    if page is not None:
        check_place(page)
    request = Request(
        pick(spec, options["variant"]),
        shlex.join(["qwenspec", "verify", spec, *arguments(options)]),
        backends=tuple(options["backend"] or ()),
        weights=options["weights"],
        examples=options["examples"],
        seed=options["seed"],
        dtypes=tuple(map(str, options["dtype"] or ())),
        device=options["device"] or "cpu",
        failures=options["failures"],
    )
    with _no_hypothesis_folder(), _bar(request.resolved_examples) as progress:
        result = verify(request, progress)
    if page is not None:  # before anything else can fail
        write_whole(page, report.page(result))
        console.note(f"wrote {page}")
    if as_json:
        console.show_json(result.to_data())
    else:
        console.show(report.table(result), _painted)
    return ExitCode.CHECK_FAILED if result.verdict is Verdict.FAIL else ExitCode.OK


def replay(folder: Path, as_json: bool) -> ExitCode:
    """Run the failure in a folder again, and say whether it still fails."""
    _require_libraries()
    from qwenspec.verify import failure

    found = failure.replay(folder)
    told = {"folder": str(folder), "verdict": "pass" if found is None else "fail", "reason": str(found or "")}
    if as_json:
        console.show_json(told)
    else:
        console.show("✓ all agree now" if found is None else f"✗ {found}", _painted)
    return ExitCode.OK if found is None else ExitCode.CHECK_FAILED


def _require_libraries() -> None:
    if missing := [library for library in LIBRARIES if find_spec(library) is None]:
        message = f"`qwenspec verify` needs {listed(missing, 'and')}, which cannot be imported"
        hint = "pip install 'qwenspec[verify]'"
        raise SpecError([Diagnostic("library-missing", message, hint=hint)], ExitCode.BACKEND_MISSING)


@contextmanager
def _no_hypothesis_folder() -> Iterator[None]:
    """Hypothesis keeps tables in a folder `.hypothesis` of the current one; here in one that is gone afterwards."""
    from hypothesis.configuration import set_hypothesis_home_dir

    with tempfile.TemporaryDirectory(prefix="qwenspec-") as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def _painted(text: str) -> str:
    if console.colored(sys.stdout):
        for sign, sgr in SGR.items():
            text = text.replace(sign, f"\x1b[{sgr}m{sign}\x1b[0m")
    return text


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr of so many examples; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    quiet = not console.wipeable(sys.stderr)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)
