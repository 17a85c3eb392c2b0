"""`qwenspec verify`: everything that is checked of one spec, in order."""

from __future__ import annotations

import json
import platform
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import qwenspec
from qwenspec.backend.emit import emit
from qwenspec.backend.fitting import check_fits
from qwenspec.backend.load import import_package
from qwenspec.backend.registry import find, installed
from qwenspec.backend.runtime.machine import out_of_memory
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError
from qwenspec.spec.base import Dtype
from qwenspec.spec.document import Spec
from qwenspec.verify.bisect import module_errors
from qwenspec.verify.case import HUGGING_FACE, REFERENCE, Case, backend_and_ranks, excess
from qwenspec.verify.contenders import Rows
from qwenspec.verify.full_size import differing, rope_errors, tensors_of_package, tensors_read
from qwenspec.verify.huggingface import obstacle
from qwenspec.verify.metrics import Verdict, bound
from qwenspec.verify.opening import open_contenders, problem
from qwenspec.verify.reduce import reduced
from qwenspec.verify.result import Check, Curve, Entrant, Failure, Verification
from qwenspec.verify.steps import Add, CacheSizes, Forward, Poison

if TYPE_CHECKING:
    from qwenspec.verify.session import Disagreement, Session
    from qwenspec.verify.watch import Watch

EXAMPLES, STEPS = 20, 30  # draws of an example
EXAMPLES_OF_CHECKPOINT, STEPS_OF_CHECKPOINT, MAX_LENGTH_OF_CHECKPOINT = 3, 8, 24
DTYPES = get_args(Dtype)
SEEDS = 4  # checkpoints of random weights: opening one takes longer than a workload on it
PROMPT = 40  # tokens of the forward whose modules are compared
SHRINKING = 60.0  # seconds that a failure is made smaller
ROPE_BOUND = 1e-12  # float64 on both sides

Progress = Callable[[str, int], None]  # what begins now, and how much of the work is done


@dataclass(frozen=True)
class Request:
    """What was asked for. `backends`: `triton`, or its package on two ranks, `triton@2`; empty: all that are installed.
    Empty `dtypes`: float32 and the spec's own, or with `weights` the spec's own."""

    spec: Spec
    command: str
    backends: tuple[str, ...] = ()
    weights: Path | None = None
    examples: int | None = None
    seed: int = 0
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"
    failures: Path = Path("failures")

    @property
    def subject(self) -> Spec:
        """The spec that is run: itself where there are weights for it, else one of its structure that is small."""
        return self.spec if self.weights is not None else reduced(self.spec)

    @property
    def resolved_dtypes(self) -> tuple[str, ...]:
        own = self.spec.architecture.dtype
        default = (own,) if self.weights is not None else ("float32", own)
        return tuple(dict.fromkeys(self.dtypes or default))

    @property
    def resolved_examples(self) -> int:
        """Of all dtypes together."""
        return self.examples or (EXAMPLES if self.weights is None else EXAMPLES_OF_CHECKPOINT)


def verify(request: Request, progress: Progress = lambda what, done: None) -> Verification:
    """Runs every check. What differs is in the result; failures lie in folders below `request.failures`.

    Raises SpecError when there is nothing to compare: a backend that was named cannot take part, none
    can, or the checkpoint does not fit."""
    began = time.monotonic()
    if request.weights is not None:
        check_fits(request.spec, request.weights)
    if reason := excess((REFERENCE, HUGGING_FACE, *dict.fromkeys(request.backends))):
        raise SpecError([Diagnostic("too-many-contenders", reason, hint="compare some at a time: give fewer -b")])
    entrants = list(_entrants(request))
    present = (backend_and_ranks(entrant.name)[0] for entrant in entrants if not entrant.absent)
    backends = [name for name in dict.fromkeys(present) if name in installed()]
    result = Verification(
        spec=request.spec.variant,
        file=request.spec.file,
        sha256=request.spec.sha256(),
        size=_size(request),
        seed=request.seed,
        command=request.command,
        dtypes=request.resolved_dtypes,
        versions=_versions(backends, entrants),
        entrants=entrants,
    )
    for backend in backends:
        progress(f"{backend} at full size", 0)
        _at_full_size(request.spec, backend, result)
    contenders = [entrant.name for entrant in entrants if not entrant.absent]
    for number, dtype in enumerate(result.dtypes):
        _search(request, dtype, number, contenders, result, progress)
        progress(f"{dtype}, module by module", request.resolved_examples * (number + 1) // len(result.dtypes))
        _module_by_module(request, dtype, contenders, result)
    result.seconds = time.monotonic() - began
    return result


# -------------------------------------------------------------------------------------------------- who takes part


def _entrants(request: Request) -> Iterator[Entrant]:
    yield Entrant(REFERENCE, "float64, written from the formulas; reads the spec alone")
    reasons: list[Diagnostic] = []
    for name in dict.fromkeys(request.backends or installed()):
        reason = problem(name, request.spec, request.subject, request.device)
        reasons += [reason] if reason else []
        ranks = backend_and_ranks(name)[1]
        place = request.device if ranks == 1 else f"{ranks} ranks, {request.device}"
        yield Entrant(name, f"a generated package, on {place}", reason.message if reason else "")
    if reasons and (request.backends or len(reasons) == len(installed())):
        raise SpecError(reasons, _exit_code(reasons))
    missing = find_spec("transformers") is None or find_spec("torch") is None
    absent = "transformers is not installed" if missing else obstacle(request.subject)
    if absent is None and "float32" not in request.resolved_dtypes:
        absent = "it computes in float32, and these are other dtypes"
    if absent is None and request.weights is not None and not (request.weights / "config.json").exists():
        absent = f"there is no config.json in {request.weights}"
    if absent is None and request.weights is not None and request.spec.quantization is not None:
        absent = "it would need the checkpoint's weights in full precision"
    yield Entrant(HUGGING_FACE, "transformers, float32, without a cache", absent or "")


def _exit_code(reasons: Sequence[Diagnostic]) -> ExitCode:
    missing = any(reason.code.endswith("missing") for reason in reasons)
    return ExitCode.BACKEND_MISSING if missing else ExitCode.USAGE


def _size(request: Request) -> str:
    arch = request.subject.architecture
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads or arch.num_attention_heads
    told = f"{arch.num_hidden_layers} layers, hidden {arch.hidden_size:,}, {heads} heads on {kv_heads}"
    told = f"{told}, vocabulary {arch.vocab_size:,}"
    if request.weights is not None:
        return f"{told}, the weights in {request.weights}"
    return f"its structure at {told}, random weights"


def _versions(backends: Sequence[str], entrants: Sequence[Entrant]) -> dict[str, str]:
    libraries = ["numpy", "hypothesis", *(library for name in backends for library in find(name).libraries)]
    if any(entrant.name == HUGGING_FACE and not entrant.absent for entrant in entrants):
        libraries.append("transformers")
    found = {"qwenspec": qwenspec.__version__, "python": platform.python_version()}
    for library in dict.fromkeys(libraries):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------------------------------------- checks


def _at_full_size(spec: Spec, backend: str, result: Verification) -> None:
    """Rotary frequencies, and the tensors that are read, of the package as it is written for the spec."""
    pair = (backend, REFERENCE)
    with tempfile.TemporaryDirectory(prefix="qwenspec-") as folder:
        package = emit(spec, backend, folder)
        errors = rope_errors(spec, import_package(package))
        expected = tensors_read(spec)
        problems = differing(tensors_of_package(package), expected)
    rope = result.cell(pair, Check.ROPE)
    rope.comparisons, rope.error, rope.bound = len(errors), max(errors.values()), ROPE_BOUND
    if rope.error > rope.bound:
        rope.verdict = Verdict.FAIL
        length = next(length for length, error in errors.items() if error > ROPE_BOUND)
        reason = f"{backend}: rotary frequencies or their factor are off by {errors[length]:.1e} at length {length:,}"
        result.failures.append(Failure(reason))
    parameters = result.cell(pair, Check.PARAMETERS)
    parameters.comparisons, parameters.note = len(expected), f"{len(expected):,} tensors"
    if problems:
        parameters.verdict, parameters.note = Verdict.FAIL, f"{len(problems):,} differ"
        result.failures.append(Failure(f"{backend} reads other tensors than the reference: {'; '.join(problems[:3])}"))


def _search(
    request: Request, dtype: str, number: int, contenders: Sequence[str], result: Verification, progress: Progress
) -> None:
    """Workloads in one dtype. A disagreement is made small and written down, and the others go on without that one."""
    from qwenspec.verify.watch import Watch

    count, dtypes = request.resolved_examples, len(result.dtypes)
    first, last = count * number // dtypes, count * (number + 1) // dtypes
    watch = Watch(result)

    def tell(what: str) -> None:
        progress(f"{what} in {dtype}", min(first + watch.examples_so_far, last))

    names = tuple(name for name in contenders if name != HUGGING_FACE or dtype == "float32")
    while len(names) > 1:
        disagreement = _workloads(request, dtype, names, max(1, last - first), watch, tell)
        if disagreement is None:
            break
        tell("where they part")
        result.failures.append(_written_down(disagreement, request.failures))
        names = tuple(name for name in names if name != disagreement.pair[0])
        watch.go_on()
    watch.finish()


def _workloads(
    request: Request,
    dtype: str,
    names: tuple[str, ...],
    examples: int,
    watch: Watch,
    tell: Callable[[str], None],
) -> Disagreement | None:
    """So many workloads by these contenders; the smallest disagreement that was found in time."""
    import hypothesis
    from hypothesis import strategies as st

    from qwenspec.verify.machine import MAX_LENGTH
    from qwenspec.verify.search import DEFAULTS, search
    from qwenspec.verify.strategies import cache_sizes

    def start(session: Session) -> None:
        tell("a smaller workload that fails" if watch.over else "workloads")
        if watch.seconds_over > SHRINKING:
            hypothesis.reject()
        watch.start(session)

    def case(seed: int, sizes: CacheSizes) -> Case:
        return Case(spec, request.seed * SEEDS + seed, dtype, sizes, names, request.weights, request.device)

    spec, with_weights = request.subject, request.weights is not None
    return search(
        st.builds(case, st.just(0) if with_weights else st.integers(0, SEEDS - 1), cache_sizes()),
        cache_sizes(),
        examples=examples,
        steps=STEPS_OF_CHECKPOINT if with_weights else STEPS,
        seed=request.seed * len(DTYPES) + DTYPES.index(dtype),
        ledger=watch,
        settings=hypothesis.settings(DEFAULTS, verbosity=hypothesis.Verbosity.quiet),  # stdout is for the result
        on_start=start,
        on_disagreement=watch.fail,
        max_length=MAX_LENGTH_OF_CHECKPOINT if with_weights else MAX_LENGTH,
    )


def _written_down(disagreement: Disagreement, folder: Path) -> Failure:
    """The failure in a folder of its own, below this one."""
    from qwenspec.verify.failure import VERDICT, write_failure

    case = disagreement.case
    name = re.sub(r"[^\w.-]", "-", f"{case.spec.variant}-{'-'.join(disagreement.pair)}-{case.dtype}")
    try:
        written = write_failure(disagreement, folder / name)
    except SpecError as error:  # what was found is still to be told
        return Failure(f"{disagreement}; it is not kept: {error}")
    verdict = json.loads((written / VERDICT).read_text(encoding="utf-8"))
    where = f"; {verdict['parts']} parts at {verdict['module']['address']}" if verdict["module"] else ""
    command = shlex.join(["qwenspec", "verify", "--replay", str(written)])
    return Failure(f"{disagreement}{where}", str(written), command)


def _module_by_module(request: Request, dtype: str, contenders: Sequence[str], result: Verification) -> None:
    """One prompt in one forward, every module's output against the reference's."""
    packages = tuple(name for name in contenders if name not in (REFERENCE, HUGGING_FACE))
    sizes = CacheSizes(page_size=16, pages=-(-PROMPT // 16) + 1, max_batch_size=1, chunk=PROMPT)
    spec = request.subject
    case = Case(spec, request.seed * SEEDS, dtype, sizes, (REFERENCE, *packages), request.weights, request.device)
    ids = tuple((7919 * i + 17) % spec.architecture.vocab_size for i in range(PROMPT))
    taps: dict[str, Mapping[str, Rows]] = {}
    for name, contender in open_contenders(case).items():
        try:
            for step in (Poison(request.seed), Add(0)):
                contender.do(step)
            taps[name] = contender.taps(Forward({0: ids}))
        except Exception as error:  # whatever a package raises, the others are still to be seen
            if name == REFERENCE or out_of_memory(error):
                raise
            reason = f"{name}, module by module in {dtype}: {type(error).__name__}: {error}"
            result.failures.append(Failure(reason))
    for name in (name for name in packages if name in taps):
        layers = spec.architecture.num_hidden_layers
        limit = bound(dtype, layers, (name, REFERENCE), case.head_dtype, case.rounded)
        points = tuple((module.address, module.error) for module in module_errors(taps[name], taps[REFERENCE]))
        result.by_layer.append(Curve(name, dtype, limit, points))
