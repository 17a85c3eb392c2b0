"""One rank of test_tvm_nccl.py: on a CPU, and talking to the others as on a GPU.

python nccl_rank.py PACKAGE WEIGHTS OUT [dies|mourns]: the logits of a prefill and a decode, and what NCCL was asked
for, in OUT. `dies`: before the decode, without a word; `mourns`: another one does."""

import functools
import importlib
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tvm

IDS = [5, 3, 100, 1, 99, 2, 50, 51]  # the last one is decoded
PATIENCE = 10.0  # seconds without a sign of a rank that has died


def main(package: str, weights: str, out: str, fate: str = "") -> None:
    sys.path.insert(0, str(Path(package).parent))
    names = ("engine", "nccl", "ranks", "meeting")
    engine, nccl, ranks, meeting = (importlib.import_module(f"{Path(package).name}.{name}") for name in names)
    meeting.SILENCE_SECONDS = math.inf
    engine.parallel.connect = functools.partial(nccl.connect, ranks.read_environment(), tvm.cpu())
    asked = record(nccl)

    model = engine.Model.load(weights, "cpu")
    cache = model.create_paged_kv_cache(1, 32, 16)
    cache.add_sequence(0)
    cache.begin_forward([0], [len(IDS) - 1])
    prefilled = model.batch_verify(model.embed(IDS[:-1]), cache).numpy()[0]
    cache.end_forward()
    if fate == "dies":
        os._exit(3)
    if fate == "mourns":
        meeting.SILENCE_SECONDS = PATIENCE
    cache.begin_forward([0], [1])
    decoded = model.decode(model.embed(IDS[-1:]), cache).numpy()[0]
    cache.end_forward()
    np.savez(out, logits=np.concatenate([prefilled, decoded]), asked=asked)


def record(nccl: ModuleType) -> list[str]:
    """What NCCL is asked for from now on, in order."""
    asked = []

    class Recorded(nccl.Communicator):
        def all_reduce(self, *arguments: Any) -> None:
            asked.append("all_reduce")
            super().all_reduce(*arguments)

        def all_gather(self, *arguments: Any) -> None:
            asked.append("all_gather")
            super().all_gather(*arguments)

    nccl.Communicator = Recorded
    return asked


if __name__ == "__main__":
    main(*sys.argv[1:])
