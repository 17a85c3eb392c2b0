"""The fastest plain reader of memory that TVM compiles: what a product of one row is measured against on CPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

PARTS, STREAMS, LANES = 64, 4, 16  # tasks; places that each reads at once; values at each place


def reader(size: int) -> Callable[[], None]:
    """Sums `size` bytes of float32 on all of TVM's threads, from huge pages where Linux has them."""
    per_stream = size // 4 // (PARTS * STREAMS * LANES)
    memory = mmap.mmap(-1, PARTS * STREAMS * per_stream * LANES * 4)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, np.float32).reshape(PARTS, STREAMS, per_stream, LANES)
    data[:] = 1
    sums = np.zeros(PARTS * LANES + LANES, np.float32)
    start = -sums.ctypes.data % 64 // 4  # compiled code relies on an alignment of 64 bytes
    out = sums[start : start + PARTS * LANES].reshape(PARTS, LANES)
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    compiled = tvm.compile(tvm.IRModule({"read": _sum(per_stream)}), tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    function, arguments = compiled["read"], (tvm.runtime.from_dlpack(data), tvm.runtime.from_dlpack(out))
    function(*arguments)
    assert out.sum() == data.size, "the reader left something out"
    return lambda: function(*arguments)


def _sum(per_stream: int) -> tvm.tirx.PrimFunc:
    """data [PARTS, STREAMS, per_stream, LANES] -> out [PARTS, LANES]."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("read")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "global_symbol": "read"})
        data = T.match_buffer(T.arg("data", T.handle()), (PARTS, STREAMS, per_stream, LANES), "float32")
        out = T.match_buffer(T.arg("out", T.handle()), (PARTS, LANES), "float32")
        with T.parallel(PARTS) as part:
            sums = T.alloc_buffer((STREAMS, LANES), "float32")
            for stream in range(STREAMS):
                with T.vectorized(LANES) as j:
                    T.buffer_store(sums, T.float32(0), [stream, j])
            with T.serial(per_stream) as i:
                for stream in range(STREAMS):
                    with T.vectorized(LANES) as j:
                        T.buffer_store(sums, sums[stream, j] + data[part, stream, i, j], [stream, j])
            with T.vectorized(LANES) as j:
                total = sums[0, j]
                for stream in range(1, STREAMS):
                    total = total + sums[stream, j]
                T.buffer_store(out, total, [part, j])
    return builder.get()
