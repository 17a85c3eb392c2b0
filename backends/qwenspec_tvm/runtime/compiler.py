"""From the model's modules to an executable of TVM's virtual machine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tvm import IRModule, relax
from tvm.ir import StringImm
from tvm.ir.transform import Pass, PassContext, Sequential
from tvm.relax.transform import (
    AttachGlobalSymbol,
    CallTIRRewrite,
    ComputePrimValue,
    KillAfterLastUse,
    LegalizeOps,
    LowerAllocTensor,
    LowerRuntimeBuiltin,
    RemovePurityChecking,
    RewriteDataflowReshape,
    StaticPlanBlockMemory,
    ToNonDataflow,
    VMShapeLower,
)
from tvm.target import Target

from . import cuda
from .config import Config
from .model import Decoder

METHODS = (
    "embed",
    "prefill",
    "decode",
    "batch_prefill",
    "batch_decode",
    "batch_verify",
    "create_paged_kv_cache",
)


def export(dtype: str, target: Target, degree: int = 1) -> tuple[IRModule, list[dict[str, Any]]]:
    """The Relax functions METHODS, and the parameters that they take, in order, as {name, shape, dtype}: those of
    each of `degree` ranks."""
    with target, quick_frames():
        decoder = Decoder(Config(), dtype, degree)
        module, parameters = decoder.export_tvm(spec=decoder.get_default_spec())
    described = [{"name": name, "shape": [int(i) for i in p.shape], "dtype": str(p.dtype)} for name, p in parameters]
    return module, described


@contextmanager
def quick_frames() -> Iterator[None]:
    """Spares TVMScript's parser the source lines of the stack, which it asks inspect for at each call of a macro, and
    never uses: with torch in the process, reading them takes most of the time of an export."""

    def frame_info(frame: FrameType, context: int = 1) -> inspect.Traceback:
        code = frame.f_code
        return inspect.Traceback(code.co_filename, frame.f_lineno, code.co_name, None, None)

    original = inspect.getframeinfo
    inspect.getframeinfo = frame_info  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getframeinfo = original


def compile_module(module: IRModule, target: Target, metadata: dict[str, Any]) -> relax.VMExecutable:
    """An executable, in which `_metadata()` gives the metadata as JSON."""
    module["_metadata"] = _constant_function(json.dumps(metadata))
    with target:
        module = Sequential([*_operators(target), *_virtual_machine()])(module)
    with PassContext(opt_level=PassContext.current().opt_level, disabled_pass=_needless(target)):
        return relax.build(module, target, relax_pipeline=None)


def _needless(target: Target) -> list[str]:
    """The pass that shrinks buffers to what is used of them: on CPUs the kernels' are no larger, and finding that out
    would take a quarter of the time."""
    return ["s_tir.CompactBufferAllocation"] if target.kind.name == "llvm" else []


def _operators(target: Target) -> list[Pass]:
    """Relax operators become TIR functions that are ready to be compiled."""
    if target.kind.name == "llvm":
        # The kernels are TIR already, scheduled and fused by hand. What is left is small: loops as they come will do.
        return [LegalizeOps()]
    return cuda.operators()


def _virtual_machine() -> list[Pass]:
    """Relax functions become calls of TIR functions on memory that was planned ahead."""
    return [
        RewriteDataflowReshape(),
        ToNonDataflow(),
        RemovePurityChecking(),
        CallTIRRewrite(),
        StaticPlanBlockMemory(),
        LowerAllocTensor(),
        KillAfterLastUse(),
        LowerRuntimeBuiltin(),
        ComputePrimValue(),
        VMShapeLower(),
        AttachGlobalSymbol(),
    ]


def _constant_function(value: str) -> relax.Function:
    builder = relax.BlockBuilder()
    with builder.function("constant", params=[]):
        builder.emit_func_output(StringImm(value))
    return builder.get()["constant"]
