"""Decode steps as captured CUDA graphs: one launch a step instead of hundreds.

A graph is captured for a batch size and a block-table width, both rounded up to a power of two; smaller batches
run in it with padding rows that write nowhere and see nothing. What ranks do together is captured too: all have the
same batches, and so capture and replay the same graphs in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .cache import Batch, PagedKVCache

Step = Callable[[Tensor, Batch, PagedKVCache], Tensor]


class DecodeGraph:
    """One decode step for `size` sequences: its inputs stay at fixed addresses and are overwritten before a replay."""

    def __init__(
        self, step: Step, size: int, width: int, embeds: Tensor, batch: Batch, cache: PagedKVCache, pool: Any
    ) -> None:
        self.embeds = embeds.new_zeros(size, embeds.shape[1])  # [size, hidden]
        self.batch = padded(batch, size, width)
        with torch.cuda.device(embeds.device):
            # Kernels compile, libraries pick algorithms and ranks connect on a first run, which cannot be captured.
            # The inputs are padding, so that these runs leave the cache alone.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step(self.embeds, self.batch, cache)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.logits = step(self.embeds, self.batch, cache)

    def replay(self, embeds: Tensor, batch: Batch) -> Tensor:
        """embeds [b, hidden] with b <= size -> logits [b, vocab]."""
        b, n = batch.block_tables.shape
        if b < len(self.embeds):  # the rest is padding
            self.batch.slots.fill_(-1)
            self.batch.kv_lens.zero_()
        for name in tensor_fields(batch):
            source, target = getattr(batch, name), getattr(self.batch, name)
            if name == "block_tables":
                target[:b, :n].copy_(source)
            elif name != "q_starts":  # 0, 1, 2 … whatever the batch
                target[:b].copy_(source)
        self.embeds[:b].copy_(embeds)
        self.graph.replay()
        return self.logits[:b].clone()


class DecodeGraphs:
    """The graphs of one cache, captured when first needed."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        self.pool: Any = None

    def __call__(self, embeds: Tensor, batch: Batch, cache: PagedKVCache) -> Tensor:
        """embeds [b, hidden] -> logits [b, vocab]."""
        size = power_of_two(len(embeds))
        width = power_of_two(max(batch.block_tables.shape[1], 16))
        # One memory pool for all: no two graphs run at once, and logits are copied out of it.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        if (size, width) not in self.graphs:
            self.graphs[size, width] = DecodeGraph(self.step, size, width, embeds, batch, cache, self.pool)
        return self.graphs[size, width].replay(embeds, batch)


def padded(batch: Batch, size: int, width: int) -> Batch:
    """A batch of `size` padding rows, like `batch` in everything else."""
    template = batch.positions
    rows = Batch(
        positions=template.new_zeros(size),
        slots=template.new_full((size,), -1),
        block_tables=template.new_zeros(size, width),
        kv_lens=template.new_zeros(size),
        q_starts=torch.arange(size + 1, device=template.device),
        max_q_len=1,
    )
    for name in tensor_fields(batch):
        if not hasattr(rows, name):
            value = getattr(batch, name)
            setattr(rows, name, value.new_zeros(size, *value.shape[1:]))
    return rows


def tensor_fields(batch: Batch) -> list[str]:
    return [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
