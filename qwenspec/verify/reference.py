"""The float64 reference: a decoder written from the formulas, slow and plain. It reads the spec, not the IR,
and shares nothing with `qwenspec.ir`, so a mistake in `lower` cannot hide.

The dtypes that a spec names (`dtype`, `lm_head.dtype`, `rope.compute_dtype`) round; nothing is rounded here, but for
the inputs of linear layers and the keys and values whose quantisation says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.spec.attention import LayersFrom, SlidingWindow
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache
from qwenspec.spec.mlp import Activation
from qwenspec.spec.norm import Norm
from qwenspec.spec.quantization import Fp8, Fp8Block
from qwenspec.spec.rope import DynamicQwen1
from qwenspec.verify.dequantize import quantized_matrices, rounded_activations, rounded_by
from qwenspec.verify.reference_kv import cached
from qwenspec.verify.reference_rope import Array, attention_factor, inverse_frequencies, rotate

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


class Reference:
    """A spec with weights. `weights` maps checkpoint names, as the spec's layout gives them, to arrays; those of a
    quantised checkpoint are read through `qwenspec.verify.dequantize.Dequantized`.

    Raises KeyError for a missing tensor and ValueError for a mis-shaped one, at the first forward."""

    def __init__(self, spec: Spec, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        a = spec.architecture
        self.spec = spec
        self.weights = weights
        self.heads = a.num_attention_heads
        self.kv_heads = a.num_key_value_heads or a.num_attention_heads
        self.head_dim = a.attention.head_dim or a.hidden_size // a.num_attention_heads
        self.rotary_dim = int(self.head_dim * a.rope.partial_rotary_factor)
        quantization = spec.quantization
        matrices = quantized_matrices(spec)
        activations = quantization.activations if isinstance(quantization, Fp8Block | Fp8) else "none"
        # Modules whose inputs are rounded, with how many of them share a scale, or with one that is stored.
        self._groups = {m: stored.group_size for m, stored in matrices.items() if activations == "dynamic"}
        self._scaled = frozenset(matrices if activations == "static" else ())

    def sequence(self, prompt_length: int | None = None) -> TokenSequence:
        """An empty sequence. `prompt_length` matters to the length-dependent RoPE scalings alone, when the
        prompt comes in chunks (default: the length of the first forward)."""
        return TokenSequence(self, prompt_length)

    def logits(self, ids: Ids) -> Array:
        """Logits of every token of one sequence, in one forward: [n, vocab].

        For a text-embedding model every token's embedding instead: [n, hidden]."""
        return self.sequence().forward(ids)

    def taps(self, ids: Ids) -> dict[str, Array]:
        """Every module's output in one forward, by address: `layers.1.attention.q_norm`, …, `logits`.

        Projections and norms are [n, features]; with heads apart, [n, heads, head_dim]. Beside the modules:
        `attention.q` and `attention.k` are what the scores are made of (after RoPE and LogN) and
        `attention.context` is what o_proj reads."""
        sequence = self.sequence()
        sequence.forward(ids)
        return sequence.taps

    def tensor(self, name: str, *shape: int) -> Array:
        """A checkpoint tensor in float64."""
        value = np.asarray(self.weights[name], dtype=np.float64)
        if shape == (1,):  # one number, with an axis or without
            value = value.reshape(-1)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, the spec says {shape}")
        return value

    def rounded(self, x: Array, module: str) -> Array:
        """A module's input: rounded, if the module is quantised and rounds its activations."""
        if module in self._scaled:
            return rounded_by(x, self.tensor(f"{module}.input_scale", 1))
        return rounded_activations(x, self._groups[module]) if module in self._groups else x

    def stacked(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> list[Array]:
        """Tensors of rows[i] rows each: the named ones, or the blocks of the only one named."""
        if len(names) == 1:
            fused = self.tensor(names[0], sum(rows), *columns)
            return np.split(fused, np.cumsum(rows)[:-1])
        return [self.tensor(name, n, *columns) for name, n in zip(names, rows, strict=True)]


class TokenSequence:
    """One sequence's tokens: keys as they were rotated when they came, and values, for every layer.

    Dynamic RoPE makes the split into forwards part of the result: a forward rotates its queries and keys for
    the sequence's length after it (at least `prompt_length`), and keys of earlier forwards keep theirs.
    dynamic_qwen1 keeps, for good, to the length that the first forward chose."""

    def __init__(self, model: Reference, prompt_length: int | None) -> None:
        self.model = model
        self.prompt_length = prompt_length or 0
        self.length = 0
        self._first_rope_length = 0  # of the forward that started the sequence
        self.taps: dict[str, Array] = {}  # of the last forward
        shape = (0, model.kv_heads, model.head_dim)
        layers = range(model.spec.architecture.num_hidden_layers)
        self._keys = [np.empty(shape) for _ in layers]
        self._values = [np.empty(shape) for _ in layers]

    def fork(self, at: int = -1) -> TokenSequence:
        """A sequence that starts with the first `at` tokens of this one (-1: all of them)."""
        child = TokenSequence(self.model, self.prompt_length)
        child.length = self.length if at < 0 else at
        child._first_rope_length = self._first_rope_length
        assert child.length <= self.length, f"cannot fork at {at}: {self.length} tokens"
        child._keys = [keys[: child.length] for keys in self._keys]
        child._values = [values[: child.length] for values in self._values]
        return child

    def popn(self, n: int) -> None:
        """Forget the last n tokens."""
        assert 0 <= n <= self.length, f"cannot remove {n} of {self.length} tokens"
        self.length -= n
        self._keys = [keys[: self.length] for keys in self._keys]
        self._values = [values[: self.length] for values in self._values]

    def forward(self, ids: Ids) -> Array:
        """Append tokens; logits of each of them: [n, vocab], or [n, hidden] for a text-embedding model."""
        model, arch, layout = self.model, self.model.spec.architecture, self.model.spec.layout
        self.taps = {}
        start, self.length = self.length, self.length + len(ids)
        positions = np.arange(start, self.length)
        frequencies = inverse_frequencies(
            arch.rope, model.rotary_dim, arch.max_position_embeddings, self._rope_length(start)
        )

        embedding = model.tensor(f"{layout.embedding}.weight", arch.vocab_size, arch.hidden_size)
        x = self._tap("embed_tokens", embedding[np.asarray(ids)])
        for i in range(arch.num_hidden_layers):
            names, name = layout.layer.format(i=i), f"layers.{i}"
            normed = self._norm(f"{name}.input_norm", x, f"{names}.{layout.input_norm}")
            x = x + self._attention(i, normed, positions, frequencies)
            normed = self._norm(f"{name}.post_attention_norm", x, f"{names}.{layout.post_attention_norm}")
            x = self._tap(name, x + self._mlp(i, normed))
        x = self._norm("norm", x, layout.norm)

        if arch.embedding is not None:
            return self._tap("logits", _unit(x) if arch.embedding.normalize else x)
        if not arch.tie_word_embeddings:
            embedding = model.tensor(f"{layout.lm_head}.weight", arch.vocab_size, arch.hidden_size)
        return self._tap("logits", x @ embedding.T)

    def _rope_length(self, start: int) -> int:
        length = max(self.prompt_length, self.length)
        if start == 0:
            self._first_rope_length = length
        frozen = isinstance(self.model.spec.architecture.rope.scaling, DynamicQwen1)
        return self._first_rope_length if frozen else length

    def _attention(self, i: int, x: Array, positions: npt.NDArray[np.int64], frequencies: Array) -> Array:
        model, arch, layout = self.model, self.model.spec.architecture, self.model.spec.layout
        attention, names = arch.attention, layout.attention
        heads, kv_heads, head_dim = model.heads, model.kv_heads, model.head_dim
        name, prefix = f"layers.{i}.attention", layout.layer.format(i=i)

        rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        parts = self._linear(x, [f"{prefix}.{n}" for n in names.qkv], rows, attention.bias.qkv)
        self._tap(f"{name}.qkv_proj", np.concatenate(parts, axis=-1))
        q, k, v = (part.reshape(len(x), part.shape[1] // head_dim, head_dim) for part in parts)
        if attention.qk_norm == "per_head":
            q = self._norm(f"{name}.q_norm", q, f"{prefix}.{names.q_norm}")
            k = self._norm(f"{name}.k_norm", k, f"{prefix}.{names.k_norm}")
        factor = attention_factor(arch.rope.scaling, arch.max_position_embeddings)
        q = rotate(q, positions, frequencies, factor)
        k = rotate(k, positions, frequencies, factor)
        if attention.logn is not None:
            q = q * logn(positions, attention.logn.train_length)[:, None, None]
        if model.spec.kv_cache is not None:
            k = cached(k, model.spec.kv_cache, self._kv_scale(f"{prefix}.{names.kv_scales}.k_scale"))
            v = cached(v, model.spec.kv_cache, self._kv_scale(f"{prefix}.{names.kv_scales}.v_scale"))
        self._tap(f"{name}.q", q)
        self._tap(f"{name}.k", k)

        self._keys[i] = np.concatenate([self._keys[i], k])
        self._values[i] = np.concatenate([self._values[i], v])
        keys = np.repeat(self._keys[i], heads // kv_heads, axis=1)  # query head h reads KV head h // group
        values = np.repeat(self._values[i], heads // kv_heads, axis=1)
        scale = head_dim**-0.5 if attention.scale is None else attention.scale
        scores = np.einsum("qhd,khd->hqk", q, keys) * scale
        scores[:, ~visible(positions, self.length, window_of_layer(attention.sliding_window, i))] = -np.inf
        context = np.einsum("hqk,khd->qhd", softmax(scores), values)
        self._tap(f"{name}.context", context)
        context = context.reshape(len(x), heads * head_dim)
        (out,) = self._linear(context, [f"{prefix}.{names.o}"], [arch.hidden_size], attention.bias.output)
        self._tap(f"{name}.o_proj", out)
        return self._tap(name, out)

    def _kv_scale(self, tensor: str) -> float | None:
        """The checkpoint's scale, where the cache is to have it."""
        kv_cache = self.model.spec.kv_cache
        stored = isinstance(kv_cache, Fp8KvCache) and kv_cache.scales == "checkpoint"
        return float(np.asarray(self.model.weights[tensor], np.float64).reshape(())) if stored else None

    def _mlp(self, i: int, x: Array) -> Array:
        arch, layout = self.model.spec.architecture, self.model.spec.layout
        name, prefix = f"layers.{i}.mlp", layout.layer.format(i=i)
        rows = [arch.intermediate_size] * 2
        gate, up = self._linear(x, [f"{prefix}.{n}" for n in layout.mlp.gate_up], rows, arch.mlp.bias)
        self._tap(f"{name}.gate_up_proj", np.concatenate([gate, up], axis=-1))
        hidden = activation(arch.mlp.activation, gate) * up
        (out,) = self._linear(hidden, [f"{prefix}.{layout.mlp.down}"], [arch.hidden_size], arch.mlp.bias)
        self._tap(f"{name}.down_proj", out)
        return self._tap(name, out)

    def _linear(self, x: Array, modules: Sequence[str], rows: Sequence[int], bias: bool) -> list[Array]:
        """x Wᵀ + b for each block of rows."""
        weights = self.model.stacked([f"{m}.weight" for m in modules], rows, x.shape[-1])
        inputs = [self.model.rounded(x, m) for m in modules] * (len(rows) // len(modules))
        products = [x @ w.T for x, w in zip(inputs, weights, strict=True)]
        if not bias:
            return products
        biases = self.model.stacked([f"{m}.bias" for m in modules], rows)
        return [y + b for y, b in zip(products, biases, strict=True)]

    def _norm(self, address: str, x: Array, module: str) -> Array:
        weight = self.model.tensor(f"{module}.weight", x.shape[-1])
        return self._tap(address, rms_norm(x, weight, self.model.spec.architecture.norm))

    def _tap(self, address: str, value: Array) -> Array:
        self.taps[address] = value
        return value


def rms_norm(x: Array, weight: Array, norm: Norm) -> Array:
    """x / sqrt(mean(x²) + eps) · w over the last axis; one_plus: · (1 + w)."""
    unit: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + norm.eps)
    return unit * (1 + weight if norm.weight == "one_plus" else weight)


def activation(kind: Activation, x: Array) -> Array:
    """The gate's activation, element by element: x times the share of it that passes."""
    share: Array
    match kind:
        case "silu" | "swish":
            share = np.exp(-np.logaddexp(0, -x))  # 1 / (1 + exp(-x))
        case "relu":
            share = np.where(x > 0, 1.0, 0.0)
        case "gelu":  # the normal distribution's Φ(x)
            share = np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2
        case "gelu_new" | "gelu_pytorch_tanh":  # arXiv:1606.08415
            share = (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * share


def softmax(scores: Array) -> Array:
    """Over the last axis, which may be empty; -inf weighs nothing."""
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    total: Array = weights.sum(axis=-1, keepdims=True)
    return weights / total


def logn(positions: npt.NDArray[np.int64], train_length: int) -> Array:
    """Qwen-1's factor on the query at each position: max(1, ln(p + 1) / ln(train_length))."""
    factor: Array = np.maximum(1, np.log(positions + 1) / math.log(train_length))
    return factor


def visible(positions: npt.NDArray[np.int64], length: int, window: int | None) -> npt.NDArray[np.bool_]:
    """Which of keys 0 … length - 1 each query sees: [n, length]. A window counts the query itself."""
    distance = positions[:, None] - np.arange(length)
    return (distance >= 0) & (distance < (window or np.inf))


def window_of_layer(sliding: SlidingWindow | None, layer: int) -> int | None:
    """The window of a layer, or None where it sees everything."""
    match sliding:
        case None:
            return None
        case SlidingWindow(layers="all"):
            return sliding.window
        case SlidingWindow(layers=LayersFrom(from_=first)):
            return sliding.window if layer >= first else None
        case SlidingWindow(layers=listed):
            return sliding.window if layer in listed else None


def _unit(x: Array) -> Array:
    length: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x / length
