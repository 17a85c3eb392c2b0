"""The CUDA target: operators become kernels, and the kernels' source becomes machine code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.ir.transform import Pass
from tvm.relax.transform import (
    AnnotateTIROpPattern,
    DeadCodeElimination,
    FoldConstant,
    FuseOps,
    FuseTIR,
    FuseTransposeMatmul,
    LegalizeOps,
    RewriteDataflowReshape,
)
from tvm.s_tir import dlight
from tvm.target import Target

from .config import Config
from .kept import doubt, make_private
from .targets import BuildError

HEAD_DIMS = (16, 32, 64, 128)  # a head's threads, each with 4 dimensions, then lie in one warp
MAX_THREADS_Z = 64  # of a block


class Matmul:
    """dlight's rule for products, on CUDA cores.

    Its way to tensor cores, which it takes for float16, is closed: it ends in Schedule.tensorize, which in the 0.27
    wheels crashes the process on any intrinsic, a copy of 16 values too. What is left is a product in tiles of shared
    memory, in the accumulator's dtype, for any number of rows.
    """

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # The rule asks the architecture for nothing but tensor cores, and only imports their intrinsics, for which
        # TVMScript takes seconds, where it may use them.
        without = Target({**target.export(), "arch": "sm_60"})
        return dlight.gpu.Matmul().apply(func, without, tunable)


def operators() -> list[Pass]:
    """Relax operators become TIR functions, each scheduled for a GPU by the first rule that fits it."""
    return [
        FuseTransposeMatmul(),  # before legalisation, or each product would first write its weight's transpose
        LegalizeOps(),
        AnnotateTIROpPattern(),
        FoldConstant(),
        FuseOps(),
        FuseTIR(),
        RewriteDataflowReshape(),
        DeadCodeElimination(),  # the copies that reshapes were, until now
        dlight.ApplyDefaultSchedule(
            Matmul(),
            dlight.gpu.GEMV(),  # products of one row, which Matmul leaves
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        ),
    ]


def check_sizes(config: Config) -> None:
    """Raises BuildError for heads that TVM's attention kernels for GPUs compute wrongly, or cannot be launched for.

    They take it for granted that blocks of threads divide the heads, and that a head's threads run in step where the
    results of two ranges of keys are merged; TVM does not look.
    """
    heads, dim = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads
    rows = _fitting(group, dim // 4, 512)
    if dim not in HEAD_DIMS:
        reason = f"head_dim is {dim}, and must be one of {', '.join(map(str, HEAD_DIMS))}"
    elif group % rows or heads % _fitting(heads, dim // 4, 1024):
        reason = f"{heads} query heads on {config.num_key_value_heads} key heads do not divide into blocks of threads"
    elif 512 // (dim // 4 * rows) > MAX_THREADS_Z:
        reason = f"{group} query head of {dim} a key head is too few: together they must have 32 values or more"
    else:
        return
    raise BuildError(f"TVM's attention kernels for GPUs do not fit this model: {reason}; use device 'cpu'")


def _fitting(rows: int, threads: int, limit: int) -> int:
    """How many rows of threads TVM puts in a block."""
    while rows > 1 and rows * threads > limit:
        rows //= 2
    return rows


def source(executable: relax.VMExecutable) -> str:
    """The CUDA source of an executable's kernels."""
    modules = [kernels for host in executable.mod.imports for kernels in host.imports if kernels.kind == "cuda"]
    assert len(modules) == 1
    return str(modules[0].inspect_source())


def install_compiler(arch: str, cache: Path) -> None:
    """From now on TVM compiles CUDA source by machine_code: not with its own options, which trade accuracy for speed
    in every division and exponential, and not again in each process.

    Call it before a library is compiled, and before one is opened: TVM asks for machine code at once where it sees a
    GPU, and elsewhere it puts the source into the library, to be compiled where its first kernel runs.
    """
    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile", functools.partial(machine_code, arch=arch, cache=cache), override=True
    )


def machine_code(text: str, arch: str, cache: Path) -> bytes:
    """CUDA source -> a cubin for `arch` ("sm_90"), kept in the folder `cache` where that can be written.

    By nvcc, or where there is none by NVRTC from the Python package cuda-bindings. Raises BuildError.
    """
    path = cache / f"kernels-{arch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cubin"
    if not (doubt(cache) or doubt(path)):
        with contextlib.suppress(OSError):  # it is not there, or not to be read
            return path.read_bytes()
    code = _nvcc(text, arch) if shutil.which("nvcc") else _nvrtc(text, arch)
    with contextlib.suppress(OSError):  # a full disk, say: it is compiled again next time
        _keep(code, path)
    return code


def _keep(code: bytes, path: Path) -> None:
    """In the cache, where that is this user's alone. Raises OSError."""
    make_private(path.parent)
    if doubt(path.parent):
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        file = Path(folder) / path.name
        file.write_bytes(code)
        file.chmod(0o600)  # code: others never write to it
        file.replace(path)  # at once, for others may look for it


def _nvcc(text: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        out = Path(folder) / "kernels.cubin"
        out.with_suffix(".cu").write_text(text, encoding="utf-8")
        command = ["nvcc", "-cubin", f"-arch={arch}", "-O3", "-w", "-o", str(out), str(out.with_suffix(".cu"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr + done.stdout).strip().splitlines()
            raise BuildError(f"nvcc cannot compile the kernels for {arch}: {lines[0] if lines else 'no reason given'}")
        return out.read_bytes()


def _nvrtc(text: str, arch: str) -> bytes:
    try:
        return bytes(tvm.support.nvcc.compile_cuda(text, target_format="cubin", arch=arch, compiler="nvrtc"))
    except RuntimeError as error:
        raise BuildError(
            f"the kernels need a compiler for {arch}: {str(error).splitlines()[0]}; put nvcc of the CUDA toolkit on "
            "PATH, or pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error
