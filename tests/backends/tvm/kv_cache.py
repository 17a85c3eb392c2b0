"""The TVM packages' quantised KV caches: packages, attention alone, and what is cached, by its definition."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from attention_cache import Cache, host_target
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from hf_parity.oracle import QWEN3, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.document import Spec

FORMATS = {
    "fp8": {"scheme": "fp8_e4m3"},
    "int8": {"scheme": "int8"},
    "fp8 stored": {"scheme": "fp8_e4m3", "scales": "checkpoint"},
}
FOLDER = TemporaryDirectory()  # of packages
LARGEST = {"fp8": 448, "int8": 127, "fp8 stored": 448}
STORED_SCALES = np.array([[0.0625, 0.011], [0.3, 0.0007]], np.float32)  # [2 layers, keys and values]


def kv_spec(kind: str, *changes: dict[str, Any]) -> Spec:
    """A tiny model whose first layer slides, with a KV cache of one of FORMATS."""
    window = {"attention": {"sliding_window": {"window": 6, "layers": [0]}}}
    spec = tiny_spec(QWEN3, window, *changes)
    return Spec.model_validate(spec.model_dump(by_alias=True) | {"kv_cache": FORMATS[kind]})


@cache
def package(kind: str) -> ModuleType:
    return import_package(emit(kv_spec(kind), "tvm", Path(FOLDER.name, kind)))


def quantized(x: np.ndarray, kind: str, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """q, float64, and s, float32 [..., 1], of heads [..., head_dim], computed in float32. scale: the checkpoint's."""
    x = x.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        if scale is None:
            scale = np.abs(x).max(-1, keepdims=True) / np.float32(LARGEST[kind])
        ratio = x / scale
        if kind == "int8":
            q = np.clip(np.rint(ratio), -127, 127)
        else:
            q = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    q = np.where(scale == 0, 0, q.astype(np.float64))
    return q, np.broadcast_to(scale, (*x.shape[:-1], 1))


class Layers(nn.Module):
    """A layer's attention a window, by a package's own kernels."""

    def __init__(self, kind: str, num_heads: int, num_kv_heads: int, head_dim: int, windows: Sequence[int | None]):
        self.sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.windows, self.scale, self.stored = windows, head_dim**-0.5, kind == "fp8 stored"
        self.kernels: Any = importlib.import_module(f"{package(kind).__name__}.kernels.attention")

    def forward(self, qkv: nn.Tensor, layer: int, cache: PagedKVCache) -> nn.Tensor:
        scales = [nn.Tensor.from_const(STORED_SCALES[layer, i : i + 1]) for i in range(2)] if self.stored else []
        heads, window = self.sizes["num_heads"], self.windows[layer]
        return self.kernels.attend(cache, layer, qkv, heads, self.scale, window, *scales)

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
        config = max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window
        return self.kernels.create_cache(*config, windows=self.windows, **self.sizes)


@cache
def compiled(
    kind: str, num_heads: int, num_kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: str
) -> relax.VirtualMachine:
    attention = {
        "qkv": nn.spec.Tensor(["n", num_heads + 2 * num_kv_heads, head_dim], dtype),
        "paged_kv_cache": nn.spec.Object(object_type=PagedKVCache),
        "$": {"param_mode": "none", "effect_mode": "none"},
    }
    arguments = "max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window"
    creation = dict.fromkeys(arguments, int) | {"$": {"param_mode": "none", "effect_mode": "none"}}
    layers = Layers(kind, num_heads, num_kv_heads, head_dim, windows)
    spec = {"first": attention, "second": attention, "create_paged_kv_cache": creation}
    with host_target():
        module, _ = layers.export_tvm(spec=nn.spec.ModuleSpec.from_raw(spec, layers))
        return relax.VirtualMachine(tvm.compile(module, host_target()), tvm.cpu())


class QuantizedCache(Cache):
    """Attention is checked over what is cached by definition, the new tokens' keys and values among it."""

    def __init__(self, kind: str, *sizes: int, **options: Any) -> None:
        self.kind = kind
        super().__init__(*sizes, **options)
        self.limit *= 2  # scores are larger by outliers that do not cancel out

    def compiled(self, *sizes: Any) -> relax.VirtualMachine:
        return compiled(self.kind, *sizes)

    def draw(self, n: int) -> np.ndarray:
        """With a channel of keys that is 40 times as large, and heads of zeros."""
        qkv, heads = super().draw(n), self.sizes.heads
        qkv[:, heads : heads + self.sizes.kv_heads, 1] *= 40
        qkv[:, :heads, 1] /= 40
        qkv[:, heads:] *= self.rng.random((n, qkv.shape[1] - heads, 1)) > 0.1
        return qkv

    def cached(self, layer: int, kv: np.ndarray) -> np.ndarray:
        q, scale = quantized(kv, self.kind, self._stored(layer))
        return q * scale.astype(np.float64)

    def _stored(self, layer: int) -> np.ndarray | None:
        return STORED_SCALES[layer][:, None, None] if self.kind == "fp8 stored" else None

    def debug(self, sequence: int) -> np.ndarray:
        """The keys and values that the cache holds, [2, layers, tokens, kv_heads, head_dim], decoded."""
        length, head_dim = len(self.tokens[sequence][0]), self.sizes.head_dim
        entry = head_dim if self.kind == "fp8 stored" else head_dim + 4
        shape = 2, length, self.sizes.kv_heads, entry
        k, v = (tvm.runtime.tensor(np.zeros(shape, np.int8)) for _ in range(2))
        self.call("attention_kv_cache_debug_get_kv", sequence, 0, length, k, v)
        entries = np.stack([k.numpy(), v.numpy()])
        values = entries[..., :head_dim]
        if self.kind != "int8":
            values = values.view(ml_dtypes.float8_e4m3fn)
        if self.kind == "fp8 stored":
            scales = STORED_SCALES.T[:, :, None, None, None]
        else:
            scales = np.ascontiguousarray(entries[..., head_dim:]).view("<f4")
        return values.astype(np.float64) * scales
