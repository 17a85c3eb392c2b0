"""The model: a compiled library and its parameters, behind the methods that a serving engine calls.

n counts tokens over all sequences of a forward, in the order given to cache.begin_forward; b counts sequences.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import tvm
from tvm.runtime import Tensor
from tvm.target import Target
from tvm_ffi import Shape

from . import nccl, parallel
from .cache import PagedKVCache
from .checkpoint import open_checkpoint
from .checks import check_cache, check_embeds, check_integers
from .config import Config
from .kernels.kv_layout import ENTRY_DTYPE
from .library import Library, find_library, read_library, title
from .ranks import Ranks, join, together
from .rope import inverse_frequencies
from .targets import BuildError, find_device, find_target, usable_cores
from .weights import aligned_copy, load_parameters, share

DYNAMIC_ROPE = True  # flag: the rotary frequencies depend on the sequence's length
QUANTIZED_KV = False  # flag: keys and values are cached quantised

Ids: TypeAlias = "Sequence[int] | np.ndarray"  # integers [n]
Embeds: TypeAlias = "Tensor | np.ndarray"  # in the model's dtype, or of numpy in any that can be rounded to it


class Model:
    """`load` makes one. Tensors are TVM's: `.numpy()` copies one to the host."""

    def __init__(
        self,
        library: Library,
        parameters: Sequence[Tensor],
        device: tvm.runtime.Device,
        ranks: Ranks | None = None,
    ) -> None:
        """A library whose parameters are on a device of its kind.

        ranks: the processes that share the model, each with its own parameters; None: this one has all"""
        self.config = Config()
        self.ranks = ranks or Ranks()
        self._share = self.config.share(self.ranks.size)
        self.dtype: str = library.metadata["dtype"]
        self.device = device
        self._parameters = tvm.runtime.convert(list(parameters))
        machine = library.open(device)
        self._methods = {name: machine[name] for name in library.metadata["methods"]}

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "cpu", dtype: str | None = None, library: str | Path | None = None
    ) -> Model:
        """A Hugging Face checkpoint folder, in the model's dtype or another.

        device: "cpu", "cuda", "cuda:1", or a target as build.py takes it
        library: a file that build.py wrote, whose dtype is the default then. Without one, this package is compiled
            the first time, and kept (see library.py)
        Under torchrun every rank loads its share, calls the same methods with the same arguments, and gets the same.
        Raises CheckpointError, BuildError for a device or a library that cannot be used, or RankError."""
        ranks = join("cpu", tvm=tvm.__version__, dtype=dtype)
        target, place = together(ranks, lambda: _find_place(device, ranks))
        checkpoint = together(ranks, lambda: open_checkpoint(folder, ranks.rank, ranks.size))
        use_all_cores()
        if ranks.size > 1 and place.type == "cpu":
            parallel.connect()
        elif ranks.size > 1:
            nccl.connect(ranks, place)
        if library is None:
            found = _find_library(target, dtype or Config().dtype, ranks)
        else:
            found = together(ranks, lambda: _read_library(Path(library), target.kind.name, dtype, ranks))
        first_token = ranks.rank * Config().share(ranks.size).vocab_size
        described = found.metadata["params"]
        parameters = together(ranks, lambda: load_parameters(checkpoint, described, place, first_token))
        return cls(found, parameters, place, ranks)

    # ------------------------------------------------------------------- what a serving engine calls

    def embed(self, ids: Ids) -> Tensor:
        """ids [n] -> [1, n, hidden]."""
        array = _integers(ids, "ids", self.config.vocab_size)
        return self._methods["embed"](self._tensor(array), self._parameters)

    def prefill(self, embeds: Embeds, cache: PagedKVCache) -> Tensor:
        """[1, n, hidden] of one sequence -> logits of its last token [1, 1, vocab]."""
        embeds = self._embeds(embeds, 1, None)
        self._check_open(embeds, cache, sequences=1)
        return self._forward("prefill", embeds, cache)

    def decode(self, embeds: Embeds, cache: PagedKVCache) -> Tensor:
        """[1, 1, hidden] -> [1, 1, vocab]."""
        embeds = self._embeds(embeds, 1, 1)
        self._check_open(embeds, cache, sequences=1)
        return self._forward("decode", embeds, cache)

    def batch_prefill(self, embeds: Embeds, logit_positions: Ids, cache: PagedKVCache) -> Tensor:
        """[1, n, hidden] and positions [b] in 0 … n - 1 -> logits there [1, b, vocab]."""
        embeds = self._embeds(embeds, 1, None)
        self._check_open(embeds, cache)
        positions = _integers(logit_positions, "logit_positions", embeds.shape[1])
        return self._forward("batch_prefill", embeds, cache, self._tensor(positions))

    def batch_decode(self, embeds: Embeds, cache: PagedKVCache) -> Tensor:
        """[b, 1, hidden], a token of each sequence -> [b, 1, vocab]."""
        embeds = self._embeds(embeds, None, 1)
        self._check_open(embeds, cache, sequences=embeds.shape[0])
        return self._forward("batch_decode", embeds, cache)

    def batch_verify(self, embeds: Embeds, cache: PagedKVCache) -> Tensor:
        """[1, n, hidden] -> logits of every token [1, n, vocab]."""
        embeds = self._embeds(embeds, 1, None)
        self._check_open(embeds, cache)
        return self._forward("batch_verify", embeds, cache)

    def create_paged_kv_cache(
        self,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int = 16,
        support_sliding_window: bool = False,
    ) -> PagedKVCache:
        """Room for max_batch_size sequences in ceil(max_total_seq_len / page_size) pages.

        A forward takes at most prefill_chunk_size tokens. Pages behind a window are kept, so support_sliding_window
        is refused."""
        if support_sliding_window:
            raise ValueError("support_sliding_window: this package keeps the pages behind a window; leave it out")
        sizes = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size)
        if not QUANTIZED_KV:
            arguments: tuple[Any, ...] = (self._methods["create_paged_kv_cache"], *sizes, self.dtype, self.device)
        else:
            arguments = (self._methods["create_paged_kv_cache"], *sizes, ENTRY_DTYPE, self.device)
        if DYNAMIC_ROPE:
            arguments += (functools.partial(inverse_frequencies, self.config),)
        return PagedKVCache(self._share, *arguments)

    def _check_open(self, embeds: Tensor, cache: PagedKVCache, sequences: int | None = None) -> None:
        """The cache's forward must be open, for so many tokens, and for so many sequences where that is said."""
        check_cache(cache, PagedKVCache)
        cache.check_open(embeds.shape[0] * embeds.shape[1], sequences)

    def _forward(self, method: str, embeds: Tensor, cache: PagedKVCache, *others: Tensor) -> Tensor:
        if DYNAMIC_ROPE:
            return self._methods[method](embeds, *others, cache.state, cache.inv_freq, self._parameters)[0]
        return self._methods[method](embeds, *others, cache.state, self._parameters)[0]

    def _embeds(self, embeds: Embeds, rows: int | None, columns: int | None) -> Tensor:
        """On the device, if they are [rows, columns, hidden], where None is any number."""
        check_embeds(embeds, rows, columns, self.config.hidden_size)
        if isinstance(embeds, np.ndarray):
            dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
            return self._tensor(embeds.astype(dtype, copy=False))
        if embeds.dtype != self.dtype or embeds.device != self.device:
            raise ValueError(f"embeds are {embeds.dtype} on {embeds.device}, the model {self.dtype} on {self.device}")
        return embeds

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A copy on the device. On the CPU in a tenth of the time that TVM's own way takes, 60 µs for one number."""
        return share(aligned_copy(array)) if self.device.type == "cpu" else tvm.runtime.tensor(array, self.device)


def reshape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same memory under another shape."""
    return _reshape(tensor, Shape(tuple(shape)))


_reshape = tvm.get_global_func("vm.builtin.reshape")


def use_all_cores() -> None:
    """TVM's threads become as many as the cores that this process may use, where the environment says nothing: those
    that torchrun started on this machine share them.

    To be called before TVM's threads start. TVM itself would take half the machine's, and bind each to a core that
    this process may not own, or another process keep busy. And its threads would spin long after a step, for 300,000
    turns; 1,000 bridge the gaps within one as well."""
    if not os.environ.keys() & {"TVM_NUM_THREADS", "OMP_NUM_THREADS"}:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ["TVM_NUM_THREADS"] = str(max(1, usable_cores() // here))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")


def _find_place(device: str, ranks: Ranks) -> tuple[Target, tvm.runtime.Device]:
    """What a rank compiles for and runs on: of several, on the GPU that has its number on the machine."""
    target, place = find_target(device), find_device(device)
    if ranks.size > 1 and place.type != "cpu":
        if device.startswith("cuda:") and device[5:].isdecimal():
            raise BuildError(f"each of {ranks.size} ranks takes the GPU of its own number: name cuda, and not {device}")
        place = find_device(f"cuda:{ranks.local_rank}")
    return target, place


def _find_library(target: Target, dtype: str, ranks: Ranks) -> Library:
    """On each machine its first rank compiles, and the others find what it kept."""
    first = together(ranks, lambda: None if ranks.local_rank else find_library(target, dtype, ranks.size))
    return together(ranks, lambda: first or find_library(target, dtype, ranks.size))


def _read_library(path: Path, kind: str, dtype: str | None, ranks: Ranks) -> Library:
    library = read_library(path)
    metadata, degree = library.metadata, library.metadata["tensor_parallel_shards"]
    if degree != ranks.size:
        raise BuildError(
            f"{path} is for {degree} rank{'s' if degree > 1 else ''}, and {ranks.size} "
            f"{'share' if ranks.size > 1 else 'runs'} the model: start with torchrun --nproc-per-node {degree}, or "
            f"build another with --tp {ranks.size}"
        )
    if metadata["target"]["kind"] != kind:
        raise BuildError(f"{path} is for {title(metadata)}, and the device is of kind {kind}: name another of the two")
    if dtype not in (None, metadata["dtype"]):
        raise BuildError(f"{path} is in {metadata['dtype']}, and {dtype} was asked for: leave dtype or library out")
    return library


def _integers(numbers: Ids, name: str, end: int) -> np.ndarray:
    """int32 [n], if each is in 0 … end - 1."""
    array = np.asarray(numbers)
    check_integers(array, name, end)
    return array.astype(np.int32, copy=False)
