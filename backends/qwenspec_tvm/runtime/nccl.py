"""What compiled code asks of several ranks on GPUs, done by NCCL.

Disco is TVM's runtime for several devices: to a library, an all-reduce is its function `runtime.disco.allreduce`.
Disco's own, with workers under one controlling process, is not used: TVM's wheel comes without NCCL, and a worker that
fails aborts, whatever the reason. So ranks are processes as on CPUs, and each calls NCCL for its own GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from ctypes import CDLL, POINTER, c_char_p, c_int, c_size_t, c_void_p

import tvm_ffi
from tvm.runtime import Device, Tensor

from .ranks import RankError, Ranks, together

LIBRARY = "libnccl.so.2"

# Of nccl.h:
SUM = 0  # compiled code says the same
BYTES = 1  # as a dtype, it fits every tensor
DTYPES = {"float16": 6, "float32": 7, "bfloat16": 9}


class UniqueId(ctypes.Structure):
    """What ranks find one another by."""

    _fields_ = [("internal", ctypes.c_char * 128)]


ARGUMENTS = {
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, UniqueId, c_int),
    "ncclAllReduce": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclAllGather": (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p),
}


def connect(ranks: Ranks, device: Device) -> None:
    """From now on, libraries in this process that are for several ranks reach the others, from this GPU to theirs.

    Every rank calls it. Raises RankError where one has no NCCL, or NCCL cannot connect them."""
    communicator = meet(ranks, device)
    tvm_ffi.register_global_func("runtime.disco.allreduce", communicator.all_reduce, override=True)
    tvm_ffi.register_global_func("runtime.disco.allgather", communicator.all_gather, override=True)


class Communicator:
    """The GPUs of all ranks. Work is queued on TVM's stream, between the kernels: calls return before it is done."""

    def __init__(self, nccl: CDLL, handle: c_void_p, device: Device) -> None:
        """handle: of ncclCommInitRank"""
        self._nccl = nccl
        self._handle = handle
        self._device = device

    def all_reduce(self, x: Tensor, kind: tvm_ffi.Shape, in_group: bool, out: Tensor) -> None:
        """out = the sum of the ranks' x.

        x, out: of one shape; float32, float16 or bfloat16"""
        assert kind[0] == SUM
        stream = tvm_ffi.get_raw_stream(self._device)
        sizes = x.numel(), DTYPES[x.dtype], SUM
        check(self._nccl, self._nccl.ncclAllReduce(x.data_ptr(), out.data_ptr(), *sizes, self._handle, stream))

    def all_gather(self, x: Tensor, in_group: bool, out: Tensor) -> None:
        """out = the ranks' x, one below the other.

        x: [n, …]; out: [ranks · n, …]"""
        stream = tvm_ffi.get_raw_stream(self._device)
        sizes = x.numel() * x.dtype.itemsize, BYTES
        check(self._nccl, self._nccl.ncclAllGather(x.data_ptr(), out.data_ptr(), *sizes, self._handle, stream))


@functools.cache
def meet(ranks: Ranks, device: Device) -> Communicator:
    """All ranks, once each of them is here. Models that are loaded later share the communicator."""
    from torch.distributed import broadcast_object_list

    nccl, unique_id = together(ranks, lambda: prepare(ranks))
    shared = [bytes(unique_id)]
    broadcast_object_list(shared)  # rank 0's
    handle = c_void_p()

    def initialize() -> None:
        device.sync()  # makes it this thread's GPU, and NCCL takes that
        check(nccl, nccl.ncclCommInitRank(handle, ranks.size, UniqueId.from_buffer_copy(shared[0]), ranks.rank))

    together(ranks, initialize)
    return Communicator(nccl, handle, device)


def prepare(ranks: Ranks) -> tuple[CDLL, UniqueId]:
    """NCCL, and on rank 0 what the others will find it by."""
    nccl, unique_id = find_nccl(), UniqueId()
    if ranks.rank == 0:
        check(nccl, nccl.ncclGetUniqueId(unique_id))
    return nccl, unique_id


def find_nccl() -> CDLL:
    """The system's, or that of NVIDIA's Python package, which PyTorch for CUDA brings along."""
    for path in (LIBRARY, *(f"{folder}/nvidia/nccl/lib/{LIBRARY}" for folder in sys.path)):
        with contextlib.suppress(OSError):
            nccl = CDLL(path)
            for name, arguments in ARGUMENTS.items():
                getattr(nccl, name).argtypes = arguments
            nccl.ncclGetErrorString.restype = nccl.ncclGetLastError.restype = c_char_p
            return nccl
    raise RankError(f"several GPUs need NCCL, and there is no {LIBRARY}: pip install nvidia-nccl-cu13")


def check(nccl: CDLL, result: int) -> None:
    """Raises RankError, with NCCL's words, unless a call went well."""
    if result:
        reasons = nccl.ncclGetErrorString(result), nccl.ncclGetLastError(None)
        raise RankError(f"NCCL: {'; '.join(reason.decode().strip() for reason in reasons if reason)}")
