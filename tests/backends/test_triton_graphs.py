"""The bookkeeping round captured CUDA graphs, without CUDA: what a replay reads must be this step's, padded.

A captured graph is stood in for by running the step again on the same static inputs, into the same output.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hf_parity.cases import QWEN1_LONG, scaling
from hf_parity.oracle import QWEN1, QWEN3, Oracle, some_ids, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.document import Spec

CHANGES = {
    "qwen3": [QWEN3],
    "qwen1-long": [QWEN1, QWEN1_LONG],
    "dynamic": [QWEN3, scaling("dynamic", factor=2.0), {"max_position_embeddings": 16}],
    "sliding": [QWEN3, {"attention": {"sliding_window": {"window": 6, "layers": [1]}}}],
    "quantized-kv": [QWEN3],
}


@pytest.fixture(params=CHANGES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    spec = tiny_spec(*CHANGES[request.param])
    if request.param == "quantized-kv":
        spec = Spec.model_validate(spec.model_dump(by_alias=True) | {"kv_cache": {"scheme": "fp8_e4m3"}})
    oracle = Oracle(spec)
    module = import_package(emit(oracle.spec, "triton", tmp_path))
    model = module.Model.load(oracle.save(tmp_path / "weights"))
    model.oracle, model.package = oracle, module
    return model


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Stand-ins for torch.cuda; each replay's (batch size, table width) is recorded."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    stand_ins = {
        "device": lambda _: nullcontext(),
        "Stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: stream,
        "CUDAGraph": SimpleNamespace,
        "graph": lambda _graph, pool: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return []


def stand_in_for_capture(package: ModuleType, replays: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = importlib.import_module(f"{package.__name__}.graphs")
    build = graphs.DecodeGraph.__init__

    def build_and_arm(
        self: Any, step: Any, size: int, width: int, embeds: Any, batch: Any, cache: Any, pool: Any
    ) -> None:
        build(self, step, size, width, embeds, batch, cache, pool)

        def replay() -> None:
            replays.append((size, width))
            self.logits.copy_(step(self.embeds, self.batch, cache))

        self.graph.replay = replay

    monkeypatch.setattr(graphs.DecodeGraph, "__init__", build_and_arm)


def cached_tensors(cache: Any) -> list[torch.Tensor]:
    """Pages, and their scales where they are quantised."""
    return [tensor for tensor in vars(cache).values() if isinstance(tensor, torch.Tensor)]


@torch.inference_mode()
def test_replays_are_the_eager_step(
    model: Any, replays: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that shrink, grow and change members, lengths that cross a bucket, pages that change hands."""
    stand_in_for_capture(model.package, replays, monkeypatch)
    eager, captured = caches = [model.create_paged_kv_cache(4, 300, 128, page_size=2) for _ in range(2)]
    ids = torch.from_numpy(some_ids(model.oracle.spec, 200))

    def prefill(sequence: int, length: int) -> None:
        for cache in caches:
            cache.add_sequence(sequence)
            cache.begin_forward([sequence], [length])
            model.prefill(model.embed(ids[:length]), cache)
            cache.end_forward()

    def decode(batch: list[int]) -> None:
        embeds = model.embed(ids[len(replays) :][: len(batch)])[0]
        eager.begin_forward(batch, [1] * len(batch))
        expected = model.step(embeds, eager.open_batch(len(batch)), eager)
        captured.begin_forward(batch, [1] * len(batch))
        actual = captured.graphs(embeds, captured.open_batch(len(batch)), captured)
        for cache in caches:
            cache.end_forward()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    for tensor in (tensor for cache in caches for tensor in cached_tensors(cache)):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 127)
    for sequence, length in enumerate((5, 29, 30, 9)):
        prefill(sequence, length)
    for batch in ([0, 1, 2, 3], [1], [2, 0, 3], [0, 1, 2, 3], [1, 2], [0]):
        decode(batch)
    for cache in caches:
        cache.remove_sequence(3)
    prefill(4, 14)  # in the pages that sequence 3 had, where the last row of a full batch wrote
    for batch in ([2, 1, 0], [4, 0], [1, 2, 4, 0]):
        decode(batch)

    # Keys and values went where the eager step put them, and nowhere else.
    for actual, expected in zip(cached_tensors(captured), cached_tensors(eager), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert len(replays) == 9
    assert {size for size, _ in replays} == {1, 2, 4}
    assert {width for _, width in replays} == {16, 32}
