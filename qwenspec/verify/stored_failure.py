"""The folder of a failure, read with the distrust that a file from somebody else deserves."""

from __future__ import annotations

import json
import math
import os
import stat
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from qwenspec.backend.fitting import check_fits
from qwenspec.diagnostics import Diagnostic, ExitCode, Location, SpecError, listed
from qwenspec.ir.lower import lower
from qwenspec.spec.document import Spec
from qwenspec.spec.rules import RULES
from qwenspec.verify.case import HUGGING_FACE, Case
from qwenspec.verify.huggingface import obstacle
from qwenspec.verify.opening import problem
from qwenspec.verify.steps import Add, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step, from_data, path

MOST_BYTES, MOST_STEPS = 8 << 20, 1000
MOST_WEIGHTS = 1 << 27  # that are drawn
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


def read_case(file: Path) -> Case:
    """The case, which can be run here.

    Raises SpecError for what write_failure did not write, weights that are gone or do not fit, contenders that
    `qwenspec verify --backend` refuses, and libraries that are missing."""
    data = _json(file)
    try:
        case = Case.from_data(data)
        _check_spec(case.spec, drawn=case.weights is None)
        if HUGGING_FACE in case.contenders and (reason := obstacle(case.spec)):
            raise ValueError(f"transformers cannot take part: {reason}")
    except _DAMAGE as error:
        damaged(file, error)
    if case.weights is not None and not case.weights.is_dir():
        message = f"the weights are not in {case.weights} any more"
        hint = f"put them back, or write where they are to `weights` in {file.name}"
        raise SpecError([Diagnostic("no-weights", message, Location(str(file), 0, 0), hint)])
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if HUGGING_FACE in case.contenders and missing:
        message = f"running this again needs {listed(missing, 'and')}, which cannot be imported"
        raise SpecError([Diagnostic("library-missing", message, Location(str(file), 0, 0))], ExitCode.BACKEND_MISSING)
    for name in case.packages:
        if told := problem(name, case.spec, case.spec, case.device):
            code = ExitCode.BACKEND_MISSING if told.code.endswith("missing") else ExitCode.USAGE
            raise SpecError([told], code)
    if case.weights is not None:
        check_fits(case.spec, case.weights)
    return case


def read_steps(file: Path) -> list[Step]:
    """The workload. Raises SpecError for what write_failure did not write."""
    data = _json(file)
    try:
        if not isinstance(data, list) or not 0 < len(data) <= MOST_STEPS:
            raise ValueError(f"it is not a list of steps, 1 to {MOST_STEPS:,}")
        return [from_data(step) for step in data]
    except _DAMAGE as error:
        damaged(file, error)


class Sequences:
    """Whether a step can be asked for at all, as the sequences are: a folder may say anything."""

    def __init__(self, case: Case) -> None:
        self._vocabulary = case.spec.architecture.vocab_size
        self._lengths: dict[int, int] = {}
        self._trees: Forward | None = None  # that wait for a commit

    def check(self, step: Step) -> None:
        """Raises ValueError."""
        if self._trees is not None and not isinstance(step, Commit | Restart):
            raise ValueError("token trees wait for a commit")
        match step:
            case Add(seq, prompt_length):
                self._check_new(seq)
                _check(prompt_length is None or prompt_length > 0, f"a prompt of {prompt_length} tokens")
            case Fork(parent, child, at):
                self._check_new(child)
                self._check_there(parent)
                _check(-1 <= at <= self._lengths[parent], f"a fork at token {at}")
            case Popn(seq, n):
                self._check_there(seq)
                _check(0 <= n <= self._lengths[seq], f"{n} tokens to forget")
            case Remove(seq):
                self._check_there(seq)
            case Commit(leaves):
                self._check_commit(leaves)
            case Forward():
                self._check_forward(step)
            case Poison(seed):
                _check(seed >= 0, f"the seed {seed}")
            case Restart():
                pass

    def done(self, step: Step) -> None:
        """All did the step."""
        match step:
            case Restart():
                self._lengths, self._trees = {}, None
            case Add(seq):
                self._lengths[seq] = 0
            case Fork(parent, child, at):
                self._lengths[child] = at if at >= 0 else self._lengths[parent]
            case Popn(seq, n):
                self._lengths[seq] -= n
            case Remove(seq):
                del self._lengths[seq]
            case Commit(leaves):
                assert self._trees is not None
                assert self._trees.trees is not None
                for seq, leaf in leaves.items():
                    self._lengths[seq] += len(path(self._trees.trees[seq], leaf))
                self._trees = None
            case Forward(tokens, _, trees):
                self._trees = step if trees is not None else None
                for seq, ids in tokens.items():
                    self._lengths[seq] += len(ids) if trees is None else 0

    def _check_new(self, seq: int) -> None:
        _check(seq >= 0 and seq not in self._lengths, f"a sequence {seq} again, or below 0")

    def _check_there(self, seq: int) -> None:
        _check(seq in self._lengths, f"no sequence {seq}")

    def _check_commit(self, leaves: Any) -> None:
        waiting = self._trees.tokens if self._trees is not None else {}
        _check(bool(leaves) and leaves.keys() <= waiting.keys(), "a commit of what is no token tree")
        for seq, leaf in leaves.items():
            _check(-1 <= leaf < len(waiting[seq]), f"the leaf {leaf}")

    def _check_forward(self, step: Forward) -> None:
        _check(bool(step.tokens) and all(step.tokens.values()), "a forward without tokens")
        for seq, ids in step.tokens.items():
            self._check_there(seq)
            _check(all(0 <= token < self._vocabulary for token in ids), "a token outside the vocabulary")
            if step.trees is not None:
                parents = step.trees.get(seq, ())
                whole = len(parents) == len(ids) and all(-1 <= p < i for i, p in enumerate(parents))
                _check(whole, "parents that are no tree's")
        _check(step.trees is None or step.method == "batch_verify", f"token trees through {step.method}")
        _check(step.method != "prefill" or len(step.tokens) == 1, "a prefill of several sequences")
        alone = step.method != "decode" or len(step.tokens) == 1
        single = step.method not in ("decode", "batch_decode") or set(step.lengths) == {1}
        _check(alone and single, f"{step.method} of other than a token each")


def damaged(file: Path, error: Exception) -> NoReturn:
    """Raises SpecError for what is not as write_failure wrote it."""
    match error:
        case ValidationError():
            first = error.errors(include_url=False)[0]
            reason = ": ".join((".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")))
        case KeyError():
            reason = f"there is no {error}"
        case _:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
    diagnostic = Diagnostic("damaged-failure", f"the file is damaged: {reason}", Location(str(file), 0, 0))
    raise SpecError([diagnostic]) from error


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _check_spec(spec: Spec, drawn: bool) -> None:
    """What the checks of a spec file find, and `verify` bounds."""
    for rule in RULES:
        for mistake in rule.check(spec):
            raise ValueError(f"{'.'.join(map(str, mistake.path))}: {mistake.message}")
    weights = sum(math.prod(param.shape) for param in lower(spec).params())
    _check(not drawn or weights <= MOST_WEIGHTS, f"{weights:,} weights, and {MOST_WEIGHTS:,} at most are drawn")


def _json(file: Path) -> Any:
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as opened:
            _check(stat.S_ISREG(os.fstat(opened.fileno()).st_mode), "it is no regular file")
            data = opened.read(MOST_BYTES + 1)
        _check(len(data) <= MOST_BYTES, f"it is larger than {MOST_BYTES >> 20} MiB")
        return json.loads(data.decode())
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}"
        hint = "`qwenspec verify --replay` takes a folder that a failed verification wrote"
        code = "file-not-found" if isinstance(error, FileNotFoundError) else "unreadable-file"
        raise SpecError([Diagnostic(code, message, Location(str(file), 0, 0), hint)]) from error
    except _DAMAGE as error:
        damaged(file, error)
