"""What the ranks of a model do together, by torch.distributed. One rank alone does none of it, and never imports it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ranks import Ranks

DTYPES = ("float32", "float16", "bfloat16")
LM_HEAD = True  # flag: the model has one, and tokens are sampled


class DeviceError(ValueError):
    """The model cannot be on a device, or in a dtype; the message says what can be."""


def own_device(device: str, ranks: Ranks) -> torch.device:
    """Where a rank computes: of several on "cuda", each on the GPU that has its number on the machine.

    Raises DeviceError."""
    if ranks.size > 1 and device == "cuda":
        return torch.device("cuda", ranks.local_rank)
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise DeviceError(f"{device!r} is no device of this package: name cpu, cuda, or cuda:1 for a second GPU")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{device!r}: no such GPU is visible here: use device 'cpu', or check nvidia-smi")
    return found


def own_dtype(dtype: str) -> torch.dtype:
    """Raises DeviceError for what no kernel computes in."""
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def all_reduce(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of every rank's x, which may take the place of x."""
    if ranks.size == 1:
        return x
    import torch.distributed as dist

    x = x.contiguous()
    dist.all_reduce(x)
    return x


def lookup(embedding: Callable[[Tensor], Tensor], ids: Tensor, vocab_size: int, ranks: Ranks) -> Tensor:
    """Embeddings of ids [n], each of which one rank has -> [n, hidden].

    An id outside the vocabulary is an error on every rank, as it is on one."""
    if ranks.size == 1:
        return embedding(ids)
    torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), f"an id is outside the vocabulary of {vocab_size}")
    rows = -(-vocab_size // ranks.size)
    own = ids - ranks.rank * rows
    elsewhere = (own < 0) | (own >= rows)
    x = embedding(own.masked_fill(elsewhere, 0))
    return all_reduce(x.masked_fill(elsewhere[:, None], 0), ranks)


if LM_HEAD:

    def gather_logits(logits: Tensor, vocab_size: int, ranks: Ranks) -> Tensor:
        """Every rank's columns side by side, without those of padding: [m, vocab share] -> [m, vocab_size]."""
        if ranks.size == 1:
            return logits
        import torch.distributed as dist

        logits = logits.contiguous()
        shares = [torch.empty_like(logits) for _ in range(ranks.size)]
        dist.all_gather(shares, logits)
        return torch.cat(shares, dim=1)[:, :vocab_size]

    def broadcast(x: Tensor, ranks: Ranks) -> Tensor:
        """Rank 0's x."""
        if ranks.size == 1:
            return x
        import torch.distributed as dist

        dist.broadcast(x, 0)
        return x
