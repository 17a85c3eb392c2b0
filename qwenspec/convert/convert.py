"""Converting a checkpoint folder, a few rows of a tensor at a time, into a folder that gets its name at the end."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

import qwenspec
from qwenspec.backend.runtime.stored import Stored, either_name
from qwenspec.convert.partial import CONFIG, OURS, Identity, Partial, holds_others
from qwenspec.convert.plan import Job, Tensor, jobs, shards
from qwenspec.convert.report import REPORT, Report, TensorError, report_text
from qwenspec.convert.rounding import Error, Floats, RoundingError, round_rows
from qwenspec.diagnostics import Diagnostic, Location, SpecError
from qwenspec.hf import quantization, tensors
from qwenspec.hf.checkpoint import tensors_in, variant_name
from qwenspec.hf.config import Report as Findings
from qwenspec.hf.json_file import read_json
from qwenspec.hf.writer import spec_text
from qwenspec.ir.lower import lower
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Int4, Int8

SHARD_BYTES = 5 * 10**9  # of a file, as Hugging Face has it
PIECE = 1 << 18  # numbers rounded at once: what is computed of them stays in a core's cache
COPIED = 1 << 24  # bytes copied at once
SMALL = 64 << 20  # bytes of the largest file that is copied beside the weights
WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"))
SPEC = "spec.yaml"
WRITTEN = frozenset((CONFIG, REPORT, SPEC, *OURS))  # and not copied
QUANTIZED = (".qweight", ".weight_scale_inv", ".weight_scale")

Progress = Callable[[str, int, int], None]  # the tensor, and how many bytes of how many of the checkpoint are done


@dataclass(frozen=True, slots=True)
class Request:
    """What is converted into what: the checkpoint in `folder`, of a spec in full precision, into the folder `out`."""

    folder: Path
    spec: Spec
    quantization: Int8 | Int4
    out: Path
    shard_bytes: int = SHARD_BYTES

    @property
    def result(self) -> Spec:
        """The spec of what is written."""
        return self.spec.model_copy(update={"quantization": self.quantization})


def convert(request: Request, progress: Progress = lambda tensor, done, total: None) -> Report:
    """Write the folder `out`, or go on with what an interrupted run left in `out`.partial.

    Raises SpecError, and leaves `out` alone, for a checkpoint that is not of the spec, is quantised or is incomplete
    (`already-quantized`, `bad-checkpoint`, and what `qwenspec.hf.tensors.check` reports), for weights that
    cannot be rounded (`not-finite`, `scale-too-large`), and where `out` cannot be (`file-exists`,
    `unfinished-conversion`, `conversion-under-way`, `usage`, `no-space`).
    """
    _check_folders(request)
    stored = _stored(request)
    plan = shards(jobs(lower(request.result), stored), request.shard_bytes)
    with _room(request.out), Partial(request.out, _identity(request, stored), plan) as partial:
        if (free := shutil.disk_usage(partial.folder).free) < partial.missing_bytes:
            raise _no_space(request.out, f"{partial.missing_bytes:,} bytes are to be written, and {free:,} are free")
        _write_tensors(partial, stored, progress)
        report = _report(request, stored, partial, _copy_others(request.folder, partial.folder))
        (partial.folder / REPORT).write_text(report_text(report), encoding="utf-8")
        (partial.folder / SPEC).write_text(_spec_text(request), encoding="utf-8")
        partial.complete(_config(request))
    return report


# ------------------------------------------------------------------------------------------------ what is there


def _check_folders(request: Request) -> None:
    out = request.out
    if out.is_symlink():
        raise _fail(out, "file-exists", "this is a link, and OUT is a folder of its own", "choose another OUT")
    if out.exists() and not out.is_dir():
        raise _fail(out, "file-exists", "this is not a folder", "choose another OUT")
    if holds_others(out):
        raise _fail(out, "file-exists", "the folder is not empty", "choose another OUT, or remove what is in it")
    if out.resolve().is_relative_to(request.folder.resolve()):
        raise _fail(out, "usage", "OUT lies in the checkpoint's own folder", "choose another OUT")


def _stored(request: Request) -> dict[str, Stored]:
    """The checkpoint's tensors, which are those of the spec."""
    held = tensors_in(request.folder, whole=True)
    stored = held.stored
    if quantized := next((name for name in sorted(stored) if name.endswith(QUANTIZED)), None):
        message = f"the checkpoint is quantised already: it has {quantized}"
        raise _fail(request.folder, "already-quantized", message, "convert the one in full precision")
    findings = Findings(str(request.folder), None)
    tensors.check(request.spec, held, findings)
    findings.check()
    return either_name(stored, lower(request.spec).tied_names)


def _identity(request: Request, stored: dict[str, Stored]) -> Identity:
    """What an interrupted run must have had in common with this one for its tensors to be of use."""
    files = {stored[name].file for name in stored} | {request.folder / CONFIG}
    stats = {file.name: file.stat() for file in sorted(files) if file.is_file()}
    return {
        "version of qwenspec": qwenspec.__version__,
        "spec or options": request.result.sha256(),
        "size of shards": request.shard_bytes,
        "checkpoint": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


# ------------------------------------------------------------------------------------------------- the tensors


def _write_tensors(partial: Partial, stored: dict[str, Stored], progress: Progress) -> None:
    total = sum(_bytes(stored[job.tensor]) for shard in partial.shards for job in shard.jobs)
    done = 0
    for number, shard in enumerate(partial.shards):
        with partial.open(number) as file:
            for job in shard.jobs:
                progress(job.tensor, done, total)
                if job.tensor not in partial.finished:
                    partial.finish(job.tensor, _do(job, stored[job.tensor], shard.offsets, file), file)
                done += _bytes(stored[job.tensor])
    progress("", done, total)


def _bytes(stored: Stored) -> int:
    return stored.end - stored.start


def _do(job: Job, stored: Stored, offsets: dict[str, int], file: BinaryIO) -> Error | None:
    """Write what becomes of a tensor, and return what rounding it lost."""
    if job.format is None:
        file.seek(offsets[job.tensor])
        _copy(stored, file)
        return None
    error, first = Error(), 0
    try:
        for values in _pieces(stored):
            for suffix, rows in round_rows(values, job.format, error).items():
                _write_rows(file, offsets, job.written[suffix], first, rows.tobytes())
            first += len(values)
    except RoundingError as reason:
        message = f"`{job.tensor}` cannot be {job.format.packing}: {reason}"
        raise _fail(stored.file, reason.code, message, reason.hint) from None
    return error


def _write_rows(file: BinaryIO, offsets: dict[str, int], tensor: Tensor, first: int, rows: bytes) -> None:
    file.seek(offsets[tensor.name] + first * tensor.row_bytes)
    file.write(rows)


def _pieces(stored: Stored) -> Iterator[Floats]:
    """A matrix from the top, some rows at a time, in float32."""
    rows, columns = stored.shape
    step = max(1, PIECE // columns)
    dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[stored.dtype]
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            values = np.fromfile(file, dtype, count * columns).reshape(count, columns)
            if stored.dtype == "BF16":
                yield (values.astype(np.uint32) << 16).view(np.float32)
            else:
                with np.errstate(over="ignore"):  # float64 beyond float32 is refused, as infinities are
                    yield values.astype(np.float32, copy=False)


def _copy(stored: Stored, file: BinaryIO) -> None:
    with stored.file.open("rb") as original:
        original.seek(stored.start)
        for start in range(stored.start, stored.end, COPIED):
            file.write(original.read(min(COPIED, stored.end - start)))


# ------------------------------------------------------------------------------------------- what goes with them


def _copy_others(folder: Path, out: Path) -> tuple[str, ...]:
    """The tokenizer, generation_config.json and whatever else is small, holds no weights and is not written anew.

    Returns the names of links that lead out of the checkpoint, which are not copied."""
    left_out = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.suffix in WEIGHTS or name.name.endswith(".index.json")
        if hidden or weights or str(name) in WRITTEN or not file.is_file() or file.stat().st_size > SMALL:
            continue
        if not _belongs(file, folder):
            left_out.append(str(name))
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
    return tuple(left_out)


def _belongs(file: Path, folder: Path) -> bool:
    """Whether a file's content is the checkpoint's: a link may lead to anything. In Hugging Face's cache every file
    of snapshots/REVISION is one to a file in blobs, beside snapshots."""
    content, folder = file.resolve(), folder.resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return content.is_relative_to(folder) or content.parent == blobs


def _spec_text(request: Request) -> str:
    """The spec of what is written, which needs no other file."""
    spec = request.result.model_copy(update={"variant": variant_name(request.out.absolute().name.lower())})
    return spec_text(spec, (f"Converted from {request.spec.variant} by `qwenspec convert`.",))


def _config(request: Request) -> dict[str, object] | None:
    """The checkpoint's config.json, with how it is quantised now; None if it had none."""
    config = read_json(request.folder / CONFIG)
    if not config:
        return None
    arch = request.spec.architecture
    if arch.lm_head is not None:  # where a head of its own was found, it is not tied, whatever the config says
        config["tie_word_embeddings"] = arch.tie_word_embeddings
    return config | quantization.write(request.quantization)


def _report(request: Request, stored: dict[str, Stored], partial: Partial, left_out: tuple[str, ...]) -> Report:
    planned = [job for shard in partial.shards for job in shard.jobs]
    errors = [
        TensorError(job.tensor, job.shape, job.format.packing, error)
        for job in planned
        if job.format is not None and (error := partial.finished[job.tensor]) is not None
    ]
    read, written = sum(_bytes(stored[job.tensor]) for job in planned), sum(job.bytes for job in planned)
    return Report(str(request.folder), request.quantization, read, written, tuple(errors), left_out)


# ------------------------------------------------------------------------------------------------------ mistakes


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """A full disk is no bug."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_space(out, "there is no space left") from error


def _no_space(out: Path, message: str) -> SpecError:
    hint = "make room and run the command again: it goes on where it stopped"
    return _fail(out.absolute().parent, "no-space", message, hint)


def _fail(path: Path, code: str, message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic(code, message, Location(str(path), 0, 0), hint)])
