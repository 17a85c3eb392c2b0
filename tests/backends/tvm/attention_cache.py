"""The KV cache of the TVM packages in a module of attention alone, beside the definition of attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import ml_dtypes  # noqa: F401  (numpy's bfloat16)
import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qwenspec_tvm.kernels.attention import attend, create_cache

BUILTIN = "vm.builtin."
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Layers(nn.Module):
    """A layer's attention a window, nothing else."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, windows: Sequence[int | None], dtype: str):
        self.sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.windows, self.dtype = windows, dtype
        self.scale = head_dim**-0.5

    def forward(self, qkv: nn.Tensor, layer: int, paged_kv_cache: PagedKVCache) -> nn.Tensor:
        return attend(paged_kv_cache, layer, qkv, self.sizes["num_heads"], self.scale, self.windows[layer])

    def first(self, qkv: nn.Tensor, paged_kv_cache: PagedKVCache) -> nn.Tensor:
        return self.forward(qkv, 0, paged_kv_cache)

    def second(self, qkv: nn.Tensor, paged_kv_cache: PagedKVCache) -> nn.Tensor:
        return self.forward(qkv, 1, paged_kv_cache)

    def create_paged_kv_cache(
        self,
        max_batch_size: tvm.tirx.Var,
        max_total_seq_len: tvm.tirx.Var,
        prefill_chunk_size: tvm.tirx.Var,
        page_size: tvm.tirx.Var,
        support_sliding_window: tvm.tirx.Var,
    ) -> PagedKVCache:
        return create_cache(
            max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window,
            windows=self.windows, dtype=self.dtype, **self.sizes,
        )  # fmt: skip


def host_target() -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 2})


@cache
def export(
    num_heads: int, num_kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: str
) -> tvm.IRModule:
    heads = num_heads + 2 * num_kv_heads
    attention = {
        "qkv": nn.spec.Tensor(["n", heads, head_dim], dtype),
        "paged_kv_cache": nn.spec.Object(object_type=PagedKVCache),
        "$": {"param_mode": "none", "effect_mode": "none"},
    }
    arguments = "max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window"
    creation = dict.fromkeys(arguments, int) | {"$": {"param_mode": "none", "effect_mode": "none"}}
    layers = Layers(num_heads, num_kv_heads, head_dim, windows, dtype)
    spec = {"first": attention, "second": attention, "create_paged_kv_cache": creation}
    with host_target():
        module, _ = layers.export_tvm(spec=nn.spec.ModuleSpec.from_raw(spec, layers))
    return module


@cache
def compiled(*sizes: object) -> relax.VirtualMachine:
    with host_target():
        return relax.VirtualMachine(tvm.compile(export(*sizes), host_target()), tvm.cpu())


class Cache:
    """TVM's cache with our functions, and what it must hold: keys and values of every sequence, layer by layer.

    Every forward checks both layers' outputs against softmax attention in float64.
    """

    def __init__(
        self,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        windows: tuple[int | None, ...] = (6, None),
        dtype: str = "float32",
        page_size: int = 4,
        seed: int = 0,
        capacity: int = 512,
        chunk: int = 256,
    ):
        self.sizes = SimpleNamespace(heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim)
        self.windows, self.dtype, self.rng = windows, dtype, np.random.default_rng(seed)
        self.vm = self.compiled(num_heads, num_kv_heads, head_dim, windows, dtype)
        self.state = self.vm["create_paged_kv_cache"](
            *(tvm_ffi.Shape([size]) for size in (64, capacity, chunk, page_size, 0))
        )
        # Of each sequence: its tokens' keys and values, [2 layers][tokens] of [2, kv_heads, head_dim].
        self.tokens: dict[int, list[list[np.ndarray]]] = {}
        self.worst = 0.0  # error, as a share of EPS
        self.limit = (12 if dtype == "float32" else 3) * EPS[dtype]

    def compiled(self, *sizes: object) -> relax.VirtualMachine:
        """The module of attention."""
        return compiled(*sizes)

    def cached(self, layer: int, kv: np.ndarray) -> np.ndarray:
        """Keys and values [n, 2, kv_heads, head_dim] as attention is to see them."""
        return kv

    def call(self, name: str, *arguments: object) -> object:
        return tvm.get_global_func(BUILTIN + name)(self.state, *arguments)

    def add(self, sequence: int) -> None:
        self.call("kv_state_add_sequence", sequence)
        self.tokens[sequence] = [[], []]

    def remove(self, sequence: int) -> None:
        self.call("kv_state_remove_sequence", sequence)
        del self.tokens[sequence]

    def fork(self, parent: int, child: int, at: int = -1) -> None:
        self.call("kv_state_fork_sequence", parent, child, at)
        end = len(self.tokens[parent][0]) if at == -1 else at
        self.tokens[child] = [layer[:end] for layer in self.tokens[parent]]

    def popn(self, sequence: int, count: int) -> None:
        self.call("kv_state_popn", sequence, count)
        for layer in self.tokens[sequence]:
            del layer[len(layer) - count :]

    def forward(self, lengths: dict[int, int], trees: dict[int, list[int]] | None = None, poison: bool = False) -> None:
        """Appends random tokens, so many a sequence; trees: their parents. poison: NaN, and no check."""
        shape = tvm_ffi.Shape(list(lengths)), tvm_ffi.Shape(list(lengths.values()))
        if trees is None:
            self.call("kv_state_begin_forward", *shape)
        else:
            self.call("kv_state_begin_forward", *shape, tvm_ffi.Shape([p for s in lengths for p in trees[s]]))
        n, sizes = sum(lengths.values()), self.sizes
        for layer, name in enumerate(("first", "second")):
            qkv = self.draw(n)
            qkv = np.full_like(qkv, np.nan).astype(self.dtype) if poison else qkv.astype(self.dtype)
            out = self.vm[name](tvm.runtime.tensor(qkv), self.state).numpy()
            if not poison:
                self.check(layer, qkv.astype("float64"), out.astype("float64"), lengths, trees)
            start = 0
            for sequence, length in lengths.items():
                new = qkv[start : start + length, sizes.heads :].reshape(length, 2, sizes.kv_heads, -1)
                self.tokens[sequence][layer] += list(self.cached(layer, new.astype("float64")))
                start += length
        self.call("kv_state_end_forward")

    def draw(self, n: int) -> np.ndarray:
        """Queries, keys and values of n new tokens."""
        sizes = self.sizes
        qkv = self.rng.standard_normal((n, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim))
        qkv[:, : sizes.heads + sizes.kv_heads] *= 2  # scores far apart
        qkv[:, sizes.heads + sizes.kv_heads] *= 1 + 9 * (self.rng.random((n, 1)) > 0.9)  # outliers
        return qkv

    def commit(self, leaves: dict[int, int], trees: dict[int, list[int]]) -> None:
        """Keeps of each sequence's last tree the path to a leaf, or nothing for leaf -1."""
        self.call(
            "attention_kv_cache_commit_accepted_token_tree_nodes",
            tvm_ffi.Shape(list(leaves)),
            tvm_ffi.Shape(list(leaves.values())),
        )
        for sequence, leaf in leaves.items():
            path = ancestors(trees[sequence], leaf)
            for layer in self.tokens[sequence]:
                prefix = len(layer) - len(trees[sequence])
                layer[prefix:] = [layer[prefix + node] for node in path]

    def check(
        self, layer: int, qkv: np.ndarray, out: np.ndarray, lengths: dict[int, int], trees: dict[int, list[int]] | None
    ) -> None:
        sizes, start = self.sizes, 0
        for sequence, length in lengths.items():
            new = qkv[start : start + length]
            prefix = self.tokens[sequence][layer]
            kv = self.cached(layer, new[:, sizes.heads :].reshape(length, 2, sizes.kv_heads, -1))
            for i in range(length):
                path = list(range(i + 1)) if trees is None else ancestors(trees[sequence], i)
                known = prefix + [kv[j] for j in path]
                seen = np.stack(known)[-(self.windows[layer] or len(known)) :]
                expected = attention(new[i, : sizes.heads], seen[:, 0], seen[:, 1])
                error = np.abs(out[start + i] - expected).max() / max(np.abs(seen[:, 1]).max(), 1e-30)
                self.worst = max(self.worst, error / EPS[self.dtype])
                assert error < self.limit, (
                    f"sequence {sequence}, layer {layer}, new token {i} of {length}: off by {error:.1e} of the values"
                )
            start += length

    def debug(self, sequence: int) -> np.ndarray:
        """The keys and values that the cache holds, [2, layers, tokens, kv_heads, head_dim]."""
        length = len(self.tokens[sequence][0])
        shape = 2, length, self.sizes.kv_heads, self.sizes.head_dim
        k, v = (tvm.runtime.tensor(np.zeros(shape, self.dtype)) for _ in range(2))
        self.call("attention_kv_cache_debug_get_kv", sequence, 0, length, k, v)
        return np.stack([k.numpy(), v.numpy()]).astype("float64")


def ancestors(parents: list[int], node: int) -> list[int]:
    """The path from the root to a node, both included; empty for -1."""
    path: list[int] = []
    while node != -1:
        path.insert(0, node)
        node = parents[node]
    return path


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One token's softmax(q Kᵀ / sqrt(head_dim)) V. q: [heads, head_dim]; k, v: [keys, kv_heads, head_dim]."""
    group = len(q) // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(-1, keepdims=True), v)
