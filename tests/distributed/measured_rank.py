"""One of several ranks: loads its share of a package's model and writes down what it takes in memory.

Run by torchrun with the package's folder, the checkpoint, a folder for `{rank}.json`, and what to serve, as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distributed.gpu_memory import gpu_path, measure
from distributed.processes import PATIENCE
from qwenspec.backend.load import import_package


def settled(collective: Callable[..., None]) -> Callable[..., None]:
    """A thread of gloo's may hold tensors for a moment longer than the collective takes; a GPU's streams do not."""

    def uses(arguments: Any) -> list[int]:
        tensors: list[Tensor] = tree_leaves(arguments)
        return [t._use_count() + torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in tensors]

    @wraps(collective)
    def call(*arguments: Any) -> None:
        before, until = uses(arguments), time.monotonic() + PATIENCE
        collective(*arguments)
        while uses(arguments) != before and time.monotonic() < until:
            time.sleep(0.0005)

    return call


def main(folder: str, weights: str, results: str, served: str) -> None:
    package = import_package(Path(folder))
    dist.all_reduce, dist.all_gather = settled(dist.all_reduce), settled(dist.all_gather)
    with gpu_path(package):
        model = package.Model.load(weights)
        found = measure(package, model, *json.loads(served))
    (Path(results) / f"{model.ranks.rank}.json").write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
