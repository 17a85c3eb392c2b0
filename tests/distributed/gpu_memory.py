"""What a Triton package allocates on a GPU, measured without one.

Its Triton path runs on a CPU with kernel launches left out: what the path allocates are torch's tensors whatever the
device, and nobody looks at what kernels would have written. CUDA graphs have stand-ins that run the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PROCESSORS = 132


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made under it and are still in use; `peak`: the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor has made it, behind the modes' back
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, made=fresh), (args, kwargs))
        out = func(*args, **kwargs)
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, made=True), out)
        self.peak = max(self.peak, self.now)
        return out

    def _meet(self, tensor: Tensor, made: bool) -> None:
        """What an operator reads and none has made was there before, and does not count."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() if made else 0)

    @property
    def now(self) -> int:
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        return sum(size for _, size in self.storages.values())

    def restart(self) -> int:
        self.peak = self.now
        return self.peak


@dataclass
class Measured:
    """Bytes of what lives at once: each number is the most there was at any time."""

    weights: int
    kv_cache: int = 0
    activations: int = 0  # of a forward, up to the head
    logits: int = 0  # of the head
    graphs: int = 0  # of captured steps


@contextmanager
def gpu_path(package: ModuleType) -> Iterator[None]:
    """All kernels of the package are launched, and no launch does anything."""
    kernels = f"{package.__name__}.kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(f"{kernels}.dispatch"), "INTERPRET", True)
        patch.setattr(importlib.import_module(f"{kernels}.decode_attention"), "num_processors", lambda _: PROCESSORS)
        patch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None)
        # What is on a GPU is not compared.
        patch.setattr(importlib.import_module(f"{package.__name__}.model"), "check_integers", lambda *_: None)
        yield


@contextmanager
def one_of(package: ModuleType, rank: int, degree: int) -> Iterator[Any]:
    """The Ranks of one rank, whose collectives return at once: the others need not be there."""
    if degree > 1:
        dist.init_process_group("fake", rank=rank, world_size=degree, store=FakeStore())
    yield package.Ranks(rank, degree, rank)
    if degree > 1:
        dist.destroy_process_group()


def load(package: ModuleType, ranks: Any, folder: Path) -> Any:
    """What Model.load does once the ranks have met."""
    config = package.Config()
    model = package.Model(config, getattr(torch, config.dtype), torch.device("cpu"), ranks)
    importlib.import_module(f"{package.__name__}.weights").load_weights(model, folder, model.device, ranks)
    return model.eval()


def load_nothing(package: ModuleType, ranks: Any) -> Any:
    """The same with parameters without content, for FakeTensorMode."""
    config = package.Config()
    with unset_fake_temporarily():  # nn.Module cannot change the dtype of fake parameters
        model = package.Model(config, getattr(torch, config.dtype), torch.device("cpu"), ranks)
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        setattr(model.get_submodule(module), attribute, empty)
    for matrix in [module for module in model.modules() if hasattr(module, "pack")]:
        size = matrix.out_features, matrix.groups
        zeros, scales = np.zeros(size, np.uint8), np.zeros(size, np.float16)
        read = SimpleNamespace(pieces=lambda: (), scales=lambda: scales, zeros=lambda: zeros)  # noqa: B023  (called here)
        matrix.pack(read, torch.device("cpu"))
    return model


def measure(package: ModuleType, model: Any, context: int, batch: int, page_size: int, chunk: int) -> Measured:
    """Serve `batch` sequences of `context` tokens: prefill, then decode steps of every size and width, which ascend.

    Runs under gpu_path, as the model was loaded."""
    tensors = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers()]}
    ids = torch.zeros(max(chunk, batch), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), LiveBytes() as live:
        meter = _Meter(model, live, patch)
        per_sequence = -(-context // page_size) * page_size
        cache = model.create_paged_kv_cache(batch, batch * per_sequence, chunk, page_size)
        found = Measured(sum(tensors.values()), live.now)
        everyone = list(range(batch))
        for i in everyone:
            cache.add_sequence(i, prompt_length=context)
        _prefill(meter, cache, ids, everyone, context, chunk)
        for i in everyone:
            cache.popn(i, context - 1)
        graphs = importlib.import_module(f"{package.__name__}.graphs").DecodeGraphs(model.step)
        for length in [16 * page_size << i for i in range(20) if 16 * page_size << i < context] + [context]:
            _prefill(meter, cache, ids, everyone, length - 1, chunk)
            for size in sorted({min(1 << i, batch) for i in range(batch.bit_length() + 1)}):
                with meter.forward():
                    _decode(graphs, model, cache, ids, everyone[:size])
        found.activations, found.logits = meter.activations, meter.logits
        found.graphs = live.now - found.kv_cache - meter.kept + meter.pool
    return found


def _prefill(meter: _Meter, cache: Any, ids: Tensor, sequences: Sequence[int], length: int, chunk: int) -> None:
    """Each sequence up to `length` tokens, in forwards that are as full as can be."""
    model = meter.model
    missing = {i: length - cache.length(i) for i in sequences}
    while any(missing.values()):
        room, lengths = chunk, dict[int, int]()
        for i in sequences:
            if taken := min(room, missing[i]):
                lengths[i], room, missing[i] = taken, room - taken, missing[i] - taken
        with meter.forward():
            cache.begin_forward(list(lengths), list(lengths.values()))
            ends = torch.tensor(list(lengths.values())).cumsum(0) - 1
            model.batch_prefill(model.embed(ids[: sum(lengths.values())]), ends, cache)
            cache.end_forward()


def _decode(graphs: Any, model: Any, cache: Any, ids: Tensor, sequences: Sequence[int]) -> None:
    """What batch_decode does on a GPU, and then undone."""
    embeds = model.embed(ids[: len(sequences)])[0]
    cache.begin_forward(sequences, [1] * len(sequences))
    graphs(embeds, cache.open_batch(len(sequences)), cache)
    cache.end_forward()
    for i in sequences:
        cache.popn(i, 1)


class _Meter:
    """Watches forwards through the model's head and stand-ins for torch.cuda."""

    def __init__(self, model: Any, live: LiveBytes, patch: pytest.MonkeyPatch) -> None:
        self.model, self.live = model, live
        self.activations = self.logits = self.pool = self.kept = 0
        self._head, self._layers = model.head, model.forward
        self._base = self._captured_from = self._captured = 0
        patch.setattr(model, "head", self._watched_head)
        patch.setattr(model, "forward", self._watched_layers)
        stream = SimpleNamespace(wait_stream=lambda _: None)
        stand_ins = {
            "device": lambda _: nullcontext(),
            "Stream": lambda: stream,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda: stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self._capture,
            "graph_pool_handle": lambda: (0, 1),
        }
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is there before it, it has not allocated."""
        self._base = self.live.restart()
        yield

    def _watched_layers(self, embeds: Tensor, batch: Any, cache: Any) -> Tensor:
        self.live.restart()
        x: Tensor = self._layers(embeds, batch, cache)
        self.activations = max(self.activations, self._note() - self._base)
        return x

    def _watched_head(self, x: Tensor) -> Tensor:
        before = self.live.restart()
        out: Tensor = self._head(x)
        self.logits = max(self.logits, self._note() - before)
        return out

    @contextmanager
    def _capture(self, _: Any, pool: Any) -> Iterator[None]:
        """Memory that a captured step has freed is the next one's; what it has kept is not."""
        self._captured_from, self._captured = self.live.restart(), 0
        yield
        self.pool = max(self.pool, self.kept + self._captured)
        self.kept += self.live.now - self._captured_from

    def _note(self) -> int:
        """The peak up to here; what follows has a peak of its own."""
        peak = self.live.peak
        self._captured = max(self._captured, peak - self._captured_from)
        self.live.restart()
        return peak
