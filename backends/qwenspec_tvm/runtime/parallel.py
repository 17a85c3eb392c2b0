"""What compiled code and `generate` ask of several ranks on CPUs, done by torch.distributed.

TVM's runtime has no collectives for CPUs, but names for them, under which a library looks for them when it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm_ffi
from tvm.runtime import Tensor

from .ranks import Ranks

LM_HEAD = True  # flag: the model has one, and tokens are sampled

SUM = 0  # as compiled code says it


def connect() -> None:
    """From now on, libraries in this process that are for several ranks reach the others, which `ranks.join` met."""
    tvm_ffi.register_global_func("runtime.disco.allreduce", all_reduce, override=True)
    tvm_ffi.register_global_func("runtime.disco.allgather", all_gather, override=True)


def all_reduce(x: Tensor, kind: tvm_ffi.Shape, in_group: bool, out: Tensor) -> None:
    """out = the sum of the ranks' x.

    x, out: of one shape; float32, float16 or bfloat16"""
    import torch.distributed as dist
    from torch.utils.dlpack import from_dlpack

    assert kind[0] == SUM
    x.copyto(out)
    dist.all_reduce(from_dlpack(out))


def all_gather(x: Tensor, in_group: bool, out: Tensor) -> None:
    """out = the ranks' x, one below the other.

    x: [n, …]; out: [ranks · n, …]"""
    import torch.distributed as dist
    from torch.utils.dlpack import from_dlpack

    dist.all_gather(list(from_dlpack(out).chunk(dist.get_world_size())), from_dlpack(x))


if LM_HEAD:

    def broadcast(numbers: np.ndarray, ranks: Ranks) -> np.ndarray:
        """Rank 0's numbers, of which every rank has as many."""
        if ranks.size == 1:
            return numbers
        import torch
        import torch.distributed as dist

        agreed: Any = torch.from_numpy(np.array(numbers))
        dist.broadcast(agreed, 0)
        array: np.ndarray = agreed.numpy()
        return array
