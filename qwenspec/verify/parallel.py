"""A generated package on several ranks, behind the protocols of one: every rank does every call."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenspec.backend.registry import open_runner
from qwenspec.verify.rank_pool import RankFailure, RankPool
from qwenspec.verify.rank_worker import Handle

if TYPE_CHECKING:
    from qwenspec.backend.api import Cache, Floats, Ints

# What the taps of a rank have of its own heads and features.
_QUERIES = ("attention.q_norm", "attention.q", "attention.context")
_OWN = (*_QUERIES, "attention.qkv_proj", "attention.k_norm", "attention.k", "mlp.gate_up_proj")
_SUMMANDS = ("attention.o_proj", "mlp.down_proj")  # what the ranks' sum is made of


class ParallelRunner:
    """Keeps qwenspec.backend.api.Runner. Methods raise what all ranks raise, and RankFailure where they differ."""

    def __init__(self, pool: RankPool, package: Path, weights: Path, device: str, dtype: str | None) -> None:
        self._pool = pool
        self._runner = pool.make(_opened, package, weights, device, dtype)

    def embed(self, ids: Ints) -> Floats:
        return self._all("embed", ids)

    def prefill(self, embeds: Floats, cache: Cache) -> Floats:
        return self._all("prefill", embeds, _held(cache))

    def decode(self, embeds: Floats, cache: Cache) -> Floats:
        return self._all("decode", embeds, _held(cache))

    def batch_prefill(self, embeds: Floats, logit_positions: Ints, cache: Cache) -> Floats:
        return self._all("batch_prefill", embeds, logit_positions, _held(cache))

    def batch_decode(self, embeds: Floats, cache: Cache) -> Floats:
        return self._all("batch_decode", embeds, _held(cache))

    def batch_verify(self, embeds: Floats, cache: Cache) -> Floats:
        return self._all("batch_verify", embeds, _held(cache))

    def create_paged_kv_cache(
        self,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int = 16,
        support_sliding_window: bool = False,
    ) -> ParallelCache:
        sizes = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window)
        return ParallelCache(
            self._pool, self._pool.make(_called, self._runner, "create_paged_kv_cache", *sizes), self._runner
        )

    def taps(self, ids: Ints, cache: Cache) -> Mapping[str, Floats]:
        """What all ranks have alike, and query heads put together. No parts of fused matrices: they are shared."""
        parts = self._pool.each(_called, self._runner, "taps", ids, _held(cache))
        found = {}
        for address, own in parts[0].items():
            name = address.partition(".")[2].partition(".")[2]  # in its layer
            if address == "embed_tokens":  # of a rank, those of its own rows
                found[address] = self.embed(ids)[0]
            elif name in _QUERIES:
                found[address] = np.concatenate([part[address] for part in parts], axis=1)
            elif name not in (*_OWN, *_SUMMANDS):
                if not all(np.array_equal(part[address], own, equal_nan=True) for part in parts):
                    raise RankFailure(f"ranks differ in {address}")
                found[address] = own
        return found

    def _all(self, method: str, *arguments: Any) -> Floats:
        result: Floats = self._pool.do(_called, self._runner, method, *arguments)
        return result


class ParallelCache:
    """Keeps qwenspec.backend.api.Cache."""

    def __init__(self, pool: RankPool, handle: Handle, runner: Handle) -> None:
        self._pool, self.handle = pool, handle
        self._runner = runner  # ranks need it for as long as they need the cache

    def add_sequence(self, seq_id: int, prompt_length: int | None = None) -> None:
        self._all("add_sequence", seq_id, prompt_length)

    def remove_sequence(self, seq_id: int) -> None:
        self._all("remove_sequence", seq_id)

    def fork_sequence(self, parent: int, child: int, at: int = -1) -> None:
        self._all("fork_sequence", parent, child, at)

    def popn(self, seq_id: int, n: int) -> None:
        self._all("popn", seq_id, n)

    def begin_forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], tree_parents: Sequence[int] | None = None
    ) -> None:
        self._all("begin_forward", seq_ids, lengths, tree_parents)

    def end_forward(self) -> None:
        self._all("end_forward")

    def cancel_forward(self) -> None:
        self._all("cancel_forward")

    @property
    def free_pages(self) -> int:
        pages: int = self.on_ranks(getattr, "free_pages")
        return pages

    def commit_tree(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        self._all("commit_tree", seq_ids, leaves)

    def on_ranks(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(cache, *arguments) on every rank."""
        return self._pool.do(function, self.handle, *arguments)

    def _all(self, method: str, *arguments: Any) -> None:
        self._pool.do(_called, self.handle, method, *arguments)


def _held(cache: Cache) -> Handle:
    assert isinstance(cache, ParallelCache), "a cache of the ranks"
    return cache.handle


# ------------------------------------------------------------------------------------------- what ranks run


def _opened(package: Path, weights: Path, device: str, dtype: str | None) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # a backend may say that it compiles
        return open_runner(package, weights, device, dtype)


def _called(target: Any, method: str, *arguments: Any) -> Any:
    return getattr(target, method)(*arguments)
