"""Contenders of a case: packages are emitted to disk and imported from there, as a user would."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from qwenspec.backend.api import Runner
from qwenspec.backend.emit import emit
from qwenspec.backend.registry import find, no_device, open_runner
from qwenspec.diagnostics import Diagnostic
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import obstacles
from qwenspec.spec.document import Spec
from qwenspec.verify.case import HUGGING_FACE, REFERENCE, Case, backend_and_ranks
from qwenspec.verify.checkpoint import StoredTensors
from qwenspec.verify.contenders import Contender, PackageContender, ReferenceContender
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.instruments import counting
from qwenspec.verify.parallel import ParallelRunner
from qwenspec.verify.rank_pool import RankFailure, RankPool, give_up, pool
from qwenspec.verify.weights import save_checkpoint, stored_weights


def open_contenders(case: Case) -> dict[str, Contender]:
    """By name, in the case's order; each with an empty cache.

    Raises what opening raises: SpecError for a checkpoint that does not fit or a missing backend."""
    return {name: _open(name, case) for name in case.contenders}


def problem(name: str, spec: Spec, subject: Spec, device: str) -> Diagnostic | None:
    """Why a backend, or so many ranks of its package, cannot take part: of a spec that is to be checked, and of the one
    of its structure that is run."""
    name, ranks = backend_and_ranks(name)
    backend = find(name)
    if reason := backend.unavailable():
        return reason
    if unsupported := backend.unsupported(lower(spec)):
        return unsupported[0]
    return no_device(backend, device) or next(iter(obstacles(lower(subject), ranks)), None)


def _open(name: str, case: Case) -> Contender:
    if name == REFERENCE:
        return ReferenceContender(case.spec, _weights(case))
    if name == HUGGING_FACE:
        from qwenspec.verify.huggingface import HuggingFaceContender

        plain = case.spec.quantization is None
        return HuggingFaceContender(
            case.spec, _folder_of(case, "float32") if plain else _dequantized(case.spec, case.seed)
        )
    backend, ranks = backend_and_ranks(name)
    weights = _folder_of(case, case.dtype)
    if ranks > 1:
        parallel = _parallel_runner(pool(ranks), case.spec, backend, weights, case.device, case.dtype)
        return PackageContender(name, parallel, case.sizes)
    runner, kernels = _runner(case.spec, backend, weights, case.device, case.dtype)
    return PackageContender(name, runner, case.sizes, kernels)


def _folder_of(case: Case, dtype: str) -> Path:
    return case.weights or _checkpoint(case.spec, case.seed, dtype)


def _weights(case: Case) -> Mapping[str, npt.NDArray[Any]]:
    """As the reference reads them."""
    if case.weights is None:
        return dict(Dequantized(case.spec, stored_weights(case.spec, case.seed)))
    return Dequantized(case.spec, StoredTensors(case.weights, lower(case.spec).tied_names))


# Examples that are made smaller, and workloads on one spec, open the same packages again and again.
@functools.lru_cache(maxsize=32)
def _runner(spec: Spec, backend: str, weights: Path, device: str, dtype: str) -> tuple[Runner, Counter[str]]:
    """And how often each of its kernels has run."""
    with contextlib.redirect_stderr(io.StringIO()):  # a backend may say that it compiles
        runner = open_runner(_package(spec, backend), weights, device, dtype)
        calls: Counter[str] = Counter()
        calls.update(dict.fromkeys(counting(runner, lambda name: calls.update((name,))), 0))
    return runner, calls


@functools.lru_cache(maxsize=32)
def _parallel_runner(
    ranks: RankPool, spec: Spec, backend: str, weights: Path, device: str, dtype: str
) -> ParallelRunner:
    """The same on several ranks; nobody counts their kernels."""
    runner = None
    try:
        runner = ParallelRunner(ranks, _package(spec, backend), weights, device, dtype)
    except RankFailure:
        if not ranks.closed:
            raise
    return runner or give_up(ranks)


@functools.lru_cache(maxsize=64)
def _package(spec: Spec, backend: str) -> Path:
    return emit(spec, backend, Path(tempfile.mkdtemp(dir=_folder())))


@functools.lru_cache(maxsize=64)
def _checkpoint(spec: Spec, seed: int, dtype: str) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    save_checkpoint(spec, stored_weights(spec, seed), folder, dtype)
    return folder


@functools.lru_cache(maxsize=64)
def _dequantized(spec: Spec, seed: int) -> Path:
    """The random weights in float32, and no word of quantisation."""
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    weights = Dequantized(spec, stored_weights(spec, seed))
    save_checkpoint(spec.model_copy(update={"quantization": None}), weights, folder, "float32")
    return folder


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qwenspec-verify-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
