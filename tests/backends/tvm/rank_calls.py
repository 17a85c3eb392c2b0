"""What tests have each rank of a pool do. Ranks are processes of their own, which import this module by its name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from qwenspec.backend.load import import_package

CALLS: list[tuple[str, str, tuple[int, ...]]] = []  # of torch.distributed: which, and what it sends


def part(module: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{module.__name__}.{name}")


def count_collectives() -> None:
    """From now on every sum and gather is in CALLS."""
    import torch.distributed as dist

    def counting(name: str, sent: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*tensors: Any) -> None:
            CALLS.append((name, str(tensors[sent].dtype).removeprefix("torch."), tuple(tensors[sent].shape)))
            function(*tensors)

        return counted

    for name, sent in (("all_reduce", 0), ("all_gather", 1)):
        if getattr(dist, name).__module__ != __name__:
            setattr(dist, name, counting(name, sent, getattr(dist, name)))


def calls() -> list[tuple[str, str, tuple[int, ...]]]:
    """Those since the last call."""
    found = CALLS[:]
    CALLS.clear()
    return found


def generated(runner: Any, prompts: Sequence[Sequence[int]], seed: int, differ: bool) -> list[tuple[int, int]]:
    """Prompt and id of each token. differ: every rank draws with a seed of its own, and rank 0 with this one."""
    package = runner.module
    seed += runner.model.ranks.rank if differ else 0
    sampling = package.Sampling(max_tokens=8, temperature=2.0, seed=seed)
    return [(token.prompt, token.id) for token in package.generate(runner.model, prompts, sampling)]


def compiles(package: Path, weights: Path, cache: Path) -> int:
    """Load a model where no library is kept; how often this rank compiled."""
    module, compiled = import_package(package), []
    library = part(module, "library")
    compile_library = library.compile_library

    def noted(*arguments: Any) -> Any:
        compiled.append(arguments)
        return compile_library(*arguments)

    library.compile_library = noted
    with patch.dict(os.environ, QWENSPEC_CACHE=str(cache)):
        module.Model.load(weights)
    return len(compiled)


def compile_in_vain(package: Path, weights: Path, cache: Path) -> None:
    """Load a model where none can be compiled."""
    module = import_package(package)

    def failing(*_: Any) -> Any:
        raise MemoryError("LLVM has no memory")

    part(module, "library").compile_library = failing
    with patch.dict(os.environ, QWENSPEC_CACHE=str(cache)):
        module.Model.load(weights)


def load_library(package: Path, weights: Path, library: Path) -> None:
    module = import_package(package)
    try:
        module.Model.load(weights, library=library)
    except module.BuildError as error:
        raise ValueError(str(error)) from error


def embeddings(runner: Any, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Of each token of a text [n, hidden], and the collectives that they took."""
    cache = runner.create_paged_kv_cache(1, 64, 32)
    cache.add_sequence(0)
    calls()
    embeds = runner.embed(ids)
    cache.begin_forward([0], [len(ids)])
    out = runner.batch_verify(embeds, cache)[0]
    cache.end_forward()
    return out, [name for name, _, _ in calls()]


def summed(runner: Any, dtype: str) -> np.ndarray:
    """The sum of what each rank has, 0.5 to 3.5 times its number and one, float32 [7]."""
    parallel, size = part(runner.module, "parallel"), 7
    own = np.arange(0.5, 4, 0.5, np.float32) * (runner.model.ranks.rank + 1)
    x = tvm.runtime.tensor(own.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    out = tvm.runtime.empty((size,), dtype)
    parallel.all_reduce(x, tvm_ffi.Shape([parallel.SUM]), True, out)
    assert np.array_equal(x.numpy().astype(np.float32), own)  # is left as it was
    return out.numpy().astype(np.float32)
