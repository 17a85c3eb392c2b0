"""Profiles, and what ran: every process counts for itself, and the first one adds up, prints and judges.

EQUIVALENCE_PROFILE: `ci` (always the same examples), `thorough` (ten times as many, other ones every time), or
`mutants` (those of ci, until the first failure, which is not made smaller).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
import torch
from hypothesis import Phase

from qwenspec.backend.registry import installed
from qwenspec.verify.case import Case
from qwenspec.verify.failure import write_failure
from qwenspec.verify.features import features, schema_features
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.search import DEFAULTS, search
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Step

PROFILE = os.environ.get("EQUIVALENCE_PROFILE", "ci")
TIMES = 10 if PROFILE == "thorough" else 1
FAILURES = Path("build/equivalence")

hypothesis.settings.register_profile("ci", DEFAULTS, derandomize=True)
hypothesis.settings.register_profile("thorough", DEFAULTS, max_examples=1000)
hypothesis.settings.register_profile(
    "mutants", DEFAULTS, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False
)

# TRITON_INTERPRET=1 decides for the whole process, and is for these files.
_INTERPRETED = ("test_edges.py", "test_interpreter.py", "test_kv_cache.py", "test_long.py", "test_quantized.py")
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401  (repairs it)

    collect_ignore = [file.name for file in Path(__file__).parent.glob("test_*.py") if file.name not in _INTERPRETED]
else:
    collect_ignore = ["test_interpreter.py"]

LEDGER = pytest.StashKey[Ledger]()
FOUND = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="fail when the schema has a feature that no example had")
    parser.addoption("--equivalence-report", metavar="FILE", help="write what ran, and what failed, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile(PROFILE)
    config.stash[LEDGER] = Ledger()
    config.stash[FOUND] = []


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["TVM_NUM_THREADS"] = "1"  # a process a core


@pytest.fixture(scope="session", autouse=True)
def _quick_libraries() -> None:
    # Hundreds of libraries, each for a few steps: LLVM's optimiser would take most of the time. tests/hf_parity and
    # tests/backends run what it makes.
    os.environ.setdefault("QWENSPEC_LLVM_OPT_LEVEL", "0")


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return request.config.stash[LEDGER]


@pytest.fixture
def look(request: pytest.FixtureRequest, ledger: Ledger) -> Callable[..., None]:
    """look(cases, sizes, examples=…, steps=…, seed=…): fails with a folder that runs the failure again."""

    def look(*strategies: Any, examples: int, seed: int, **options: Any) -> None:
        before = ledger.examples
        seed = seed if PROFILE != "thorough" else random.SystemRandom().randrange(1 << 32)
        disagreement = search(
            *strategies,
            examples=examples * TIMES,
            seed=seed,
            ledger=ledger,
            settings=hypothesis.settings.get_profile(PROFILE),
            **options,
        )
        if disagreement is not None:
            _fail(request, disagreement, ledger.examples - before)

    return look


@pytest.fixture
def follow(request: pytest.FixtureRequest, ledger: Ledger) -> Callable[[Case, Iterable[Step]], None]:
    """follow(case, steps): this very workload."""

    def follow(case: Case, steps: Iterable[Step]) -> None:
        session = Session(case, ledger)
        ledger.example(case, features(case.spec), session.pairs)
        try:
            for step in steps:
                session.do(step)
        except Disagreement as disagreement:
            _fail(request, disagreement, 1)

    return follow


def _fail(request: pytest.FixtureRequest, disagreement: Disagreement, examples: int) -> NoReturn:
    found = {"test": request.node.nodeid, "pair": disagreement.pair, "examples": examples}
    request.config.stash[FOUND].append(found | {"reason": disagreement.reason})
    if PROFILE == "mutants":
        pytest.fail(str(disagreement), pytrace=False)
    folder = write_failure(disagreement, FAILURES / re.sub(r"\W+", "-", request.node.name).strip("-"))
    pytest.fail(f"{disagreement}\nagain: qwenspec verify --replay {folder}", pytrace=False)


# ------------------------------------------------------------------------------------------------- what ran


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has gone: what it counted is added up here."""
    output = getattr(node, "workeroutput", {})
    if "ledger" in output:
        node.config.stash[LEDGER].merge(Ledger.from_data(json.loads(output["ledger"])))
        node.config.stash[FOUND] += json.loads(output["found"])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    ledger, found = config.stash[LEDGER], config.stash[FOUND]
    if hasattr(config, "workeroutput"):
        config.workeroutput |= {"ledger": json.dumps(ledger.to_data()), "found": json.dumps(found)}
        return
    if file := config.getoption("--equivalence-report"):
        Path(file).write_text(json.dumps({"found": found, "ran": ledger.to_data()}, indent=1))
    if config.getoption("--complete") and not session.exitstatus and any(_missing(ledger).values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ledger = config.stash[LEDGER]
    if ledger.examples:
        steps = sum(ledger.steps.values())
        terminalreporter.section(f"what ran: {ledger.examples} examples of {len(ledger.specs)} specs, {steps:,} steps")
        terminalreporter.write_line(ledger.tables())
    for backend, absent in _missing(ledger).items() if config.getoption("--complete") else ():
        if absent:
            terminalreporter.write_line(f"{backend}: no example had {', '.join(sorted(absent))}")


def _missing(ledger: Ledger) -> dict[str, frozenset[str]]:
    """Of each installed backend the features of the schema that nothing showed: all of them, if it never ran."""
    return {backend: ledger.missing(schema_features(), backend) for backend in installed()}
