"""`run` and `logits`: emit a package into a temporary folder and use it, as anyone would who was given it."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenspec.backend.emit import emit
from qwenspec.backend.fitting import way_out_if_unfit
from qwenspec.backend.registry import find, no_device, open_runner
from qwenspec.commands import console
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError
from qwenspec.files import write_whole
from qwenspec.ir.lower import lower
from qwenspec.ir.shard import plan
from qwenspec.spec.document import Spec

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats

Data = dict[str, Any]
TOP = 5  # tokens that `logits` shows of a position


def run(spec: Spec, backend: str, weights: Path, device: str | None, arguments: Sequence[str]) -> None:
    """`python -m <package> --weights weights arguments`, in this process. Ends it with SystemExit, as that does."""
    if importlib.util.find_spec("tokenizers") is None:
        raise _missing("text needs tokenizers, which is not installed", "run")
    with _package(spec, backend, device) as package, _way_out(spec, weights):
        sys.path.insert(0, str(package.parent))
        sys.argv = ["qwenspec run", f"--weights={weights}", *arguments]
        runpy.run_module(package.name, run_name="__main__")


def run_ranks(
    spec: Spec, backend: str, weights: Path, device: str | None, arguments: Sequence[str], degree: int
) -> None:
    """The same by `degree` processes that share the model. Ends this one with SystemExit too."""
    plan(lower(spec), degree)  # raises where so many cannot
    _check_ranks(backend, device, degree)
    with _package(spec, backend, device) as package, _way_out(spec, weights):
        command = [sys.executable, "-P", "-m", "qwenspec.commands.launch", str(degree), str(package)]
        command += [f"--weights={weights}", *arguments]
        # In a session of its own: Ctrl-C is for this process, which ends the others.
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = launcher.wait()
        finally:
            launcher.terminate()
            launcher.wait()
        raise SystemExit(code if code >= 0 else 128 - code)


def arguments(options: Mapping[str, object]) -> list[str]:
    """Options as a command line has them: flags without a value, a list's option once for each item."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        elif value is not None:
            words += [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


def logits(spec: Spec, backend: str, weights: Path, ids: list[int], device: str, dtype: str | None) -> Floats:
    """Logits float32 [n, vocab] of every one of the ids; of an embedding model, its vectors [n, hidden]."""
    import numpy as np

    vocabulary = spec.architecture.vocab_size
    if outside := [i for i in ids if not 0 <= i < vocabulary]:
        raise _bad_ids(
            f"token id {outside[0]} is outside the vocabulary of {vocabulary:,}", f"ids are 0 to {vocabulary - 1:,}"
        )
    with _package(spec, backend, device) as package:
        runner = open_runner(package, weights, device, dtype)
        cache = runner.create_paged_kv_cache(1, len(ids), len(ids))
        cache.add_sequence(0)
        cache.begin_forward([0], [len(ids)])
        found: Floats = runner.batch_verify(runner.embed(np.array(ids, np.int32)), cache)[0]
        cache.end_forward()
    if bad := [i for i, row in enumerate(found) if not np.isfinite(row).all()]:
        message = f"what the model returns is NaN or infinite from position {bad[0]} on ({len(bad)} of {len(ids)})"
        hint = "float16 ends at 65504, bfloat16 and float32 do not: try --dtype; or the weights are damaged"
        raise SpecError([Diagnostic("not-finite", message, hint=hint)])
    return found


def token_ids(text: str) -> list[int]:
    """`1,2,3` as integers."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and len(word) < 20 for word in words):
        shown = text if len(text) <= 100 else f"{text[:100]}…"
        raise _bad_ids(f"`{shown}` is not a list of token ids", "write them like 1,2,3")
    return [int(word) for word in words]


def save(file: Path, values: Floats) -> None:
    """Write the array as NumPy's .npy, under exactly that name."""
    import numpy as np

    write_whole(file, lambda stream: np.save(stream, values))
    console.note(f"wrote {file}: {values.dtype} {list(values.shape)}")


def likeliest(ids: Sequence[int], values: Floats) -> list[Data]:
    """Each position, its token, and the largest entries of what the model returns there, largest first."""
    order = (-values).argsort(axis=-1, kind="stable")[:, :TOP]
    return [
        {"position": i, "id": ids[i], "top": [{"id": int(t), "logit": float(values[i, t])} for t in best]}
        for i, best in enumerate(order)
    ]


def likeliest_text(positions: list[Data]) -> str:
    lines = ["position  token id  most likely next (id: logit)"]
    for entry in positions:
        best = "  ".join(f"{token['id']}: {token['logit']:.4f}" for token in entry["top"])
        lines.append(f"{entry['position']:8}  {entry['id']:8}  {best}")
    return "\n".join(lines)


@contextmanager
def _package(spec: Spec, backend: str, device: str | None) -> Iterator[Path]:
    """The package of `spec`, which can run on `device`, in a folder that is gone afterwards."""
    found = find(backend)
    if reason := found.unavailable():
        raise SpecError([reason], ExitCode.BACKEND_MISSING)
    if device is not None and (reason := no_device(found, device)):
        raise SpecError([reason])
    with tempfile.TemporaryDirectory(prefix="qwenspec-") as folder:
        yield emit(spec, backend, folder)


@contextmanager
def _way_out(spec: Spec, weights: Path) -> Iterator[None]:
    """A package that ends because of its checkpoint says what is wrong with that; say what can be done, which takes the
    spec's file."""
    try:
        yield
    except SystemExit as end:
        if end.code == ExitCode.USAGE and (hint := way_out_if_unfit(spec, weights)):
            console.note(f"  = help: {hint}")
        raise


def _check_ranks(backend: str, device: str | None, degree: int) -> None:
    """Raises SpecError where this machine cannot run so many ranks."""
    for module, extra in (("torch", "triton"), ("tokenizers", "run")):
        if importlib.util.find_spec(module) is None:
            raise _missing(f"{degree} ranks need {module}, which is not installed", extra)
    found = find(backend)
    if device == "cpu" or found.unavailable():
        return
    gpus = sum(name.startswith("cuda") for name in found.devices())
    hint = f"--tp {gpus} at most, or --device cpu" if gpus else "--device cpu"
    if device is not None and device != "cuda":
        raise SpecError(
            [
                Diagnostic(
                    "no-device", f"each rank takes a GPU of its own, and not `{device}`", hint="use `cuda` or `cpu`"
                )
            ]
        )
    if gpus < degree and (gpus or device):
        raise SpecError(
            [Diagnostic("no-device", f"{degree} ranks take a GPU each, and there are {gpus} here", hint=hint)]
        )


def _bad_ids(message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic("bad-token-id", message, hint=hint)])


def _missing(problem: str, extra: str) -> SpecError:
    hint = f"pip install 'qwenspec[{extra}]'"
    return SpecError([Diagnostic("backend-missing", problem, hint=hint)], ExitCode.BACKEND_MISSING)
