"""The resolved program, run in float64 by as many ranks as a tensor-parallel plan has.

It reads the IR and never the spec, and shares no code with the reference. Ranks take turns; a value that is a list has
one entry a rank, and what all ranks hold alike is an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenspec.ir.nodes import Attention, EmbeddingHead, GatedMlp, Linear, LmHead, Model, Param, RMSNorm, Rope, Shard
from qwenspec.ir.rope import frequencies
from qwenspec.ir.shard import ShardedParam, Sharing, plan

Array = npt.NDArray[np.float64]


def assembled(param: Param, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """A whole parameter from the checkpoint tensors that it names, each of which has the rows it says."""
    parts = [tensors[source.tensor] for source in param.sources]
    assert [len(part) for part in parts] == [source.rows for source in param.sources]
    whole = np.concatenate(parts)
    assert whole.shape == param.shape
    return whole


def share(model: Model, held: ShardedParam, whole: npt.NDArray[Any], degree: int, rank: int) -> npt.NDArray[Any]:
    """What of a whole parameter a rank holds; zeros where it holds less than there is room for."""
    how = Sharing(model).of(held.param)
    found = np.zeros(held.shape, whole.dtype)
    columns = how.column_piece(degree, rank)
    for piece in how.row_pieces(degree, rank):
        rows = whole[piece.start : piece.stop]
        assert piece.at + len(rows) <= held.shape[0]
        if whole.ndim == 1:
            found[piece.at :][: len(rows)] = rows
        else:
            rows = rows[:, columns.start : columns.stop]
            found[piece.at :][: len(rows), columns.at :][:, : rows.shape[1]] = rows
    return found


class ShardedModel:
    """One forward of one sequence, all of it at once."""

    def __init__(self, model: Model, tensors: Mapping[str, npt.NDArray[Any]], degree: int) -> None:
        """`tensors`: a checkpoint. Raises SpecError for an illegal degree."""
        self.model = model
        self.plan = plan(model, degree)
        self.ranks = range(degree)
        self.shares = {held.param.name: held for held in self.plan.params}
        whole = {name: assembled(held.param, tensors).astype(np.float64) for name, held in self.shares.items()}
        self.held = [
            {name: share(model, held, whole[name], degree, rank) for name, held in self.shares.items()}
            for rank in self.ranks
        ]

    def outputs(self, ids: Sequence[int]) -> Array:
        """Logits of each token [n, vocab], or a text-embedding model's embeddings [n, hidden]."""
        model, positions = self.model, np.arange(len(ids))
        x = self._embed(np.asarray(ids))
        for layer in model.layers:
            x = x + self._attention(layer.mixer, self._norm(layer.input_norm, x), positions)
            x = x + self._mlp(layer.feed_forward, self._norm(layer.post_attention_norm, x))
        x = self._norm(model.norm, x)
        match model.head:
            case LmHead(weight=weight):
                gathered = np.concatenate([x @ held[weight.name].T for held in self.held], axis=1)
                assert not gathered[:, model.vocab_size :].any()  # of rows of padding
                return gathered[:, : model.vocab_size]
            case EmbeddingHead(normalize=normalize):
                return x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x

    def _embed(self, ids: npt.NDArray[np.int64]) -> Array:
        """Each rank looks up what is in its rows; the sum has all."""
        name, rows = self.model.embed_tokens.name, self.plan.vocab_size
        found = []
        for rank in self.ranks:
            own = (ids >= rank * rows) & (ids < (rank + 1) * rows)
            found.append(self.held[rank][name][np.where(own, ids - rank * rows, 0)] * own[:, None])
        return _all_reduce(found)

    def _norm(self, norm: RMSNorm, x: Array) -> Array:
        assert norm.weight.shard is Shard.REPLICATE
        weight = self.held[0][norm.weight.name] + (norm.style == "one_plus")
        return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.eps)

    def _split(self, linear: Linear, x: Array) -> list[dict[str, Array]]:
        """Column-parallel: of each rank, its outputs of each part, by the part's name."""
        assert linear.weight.shard is Shard.COLUMN
        products = [x @ held[linear.weight.name].T for held in self.held]
        if linear.bias is not None:
            assert linear.bias.shard is Shard.COLUMN
            products = [y + held[linear.bias.name] for y, held in zip(products, self.held, strict=True)]
        parts = self.shares[linear.weight.name].parts
        ends = np.cumsum([part.rows for part in parts])
        names = [part.name for part in parts]
        return [dict(zip(names, np.split(product, ends[:-1], axis=1), strict=True)) for product in products]

    def _joined(self, linear: Linear, xs: Sequence[Array]) -> Array:
        """Row-parallel: the ranks' products are added up, each with its bias, which is zeros on all but one."""
        assert linear.weight.shard is Shard.ROW
        products = [x @ held[linear.weight.name].T for x, held in zip(xs, self.held, strict=True)]
        if linear.bias is not None:
            products = [y + held[linear.bias.name] for y, held in zip(products, self.held, strict=True)]
        return _all_reduce(products)

    def _attention(self, attention: Attention, x: Array, positions: npt.NDArray[np.int64]) -> Array:
        contexts = [
            self._contexts(attention, **parts, positions=positions) for parts in self._split(attention.qkv_proj, x)
        ]
        return self._joined(attention.o_proj, contexts)

    def _contexts(self, attention: Attention, q: Array, k: Array, v: Array, positions: npt.NDArray[np.int64]) -> Array:
        """One rank's heads: its query head j reads its KV head j // (query heads / KV heads of the rank)."""
        n, heads, kv_heads = len(q), self.plan.num_heads, self.plan.num_kv_heads
        q, k, v = q.reshape(n, heads, -1), k.reshape(n, kv_heads, -1), v.reshape(n, kv_heads, -1)
        q = q if attention.q_norm is None else self._norm(attention.q_norm, q)
        k = k if attention.k_norm is None else self._norm(attention.k_norm, k)
        q, k = _rotated(self.model.rope, q, positions), _rotated(self.model.rope, k, positions)
        if attention.logn is not None:
            longer = np.log(positions + 1) / math.log(attention.logn.train_length)
            q = q * np.maximum(longer, 1)[:, None, None]
        span = attention.window or n
        contexts = np.empty_like(q)
        for query, position in enumerate(positions):
            seen = slice(max(position - span + 1, 0), position + 1)
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = attention.scale * k[seen, kv_head] @ q[query, head]
                weights = np.exp(scores - scores.max())
                contexts[query, head] = weights @ v[seen, kv_head] / weights.sum()
        return contexts.reshape(n, -1)

    def _mlp(self, mlp: GatedMlp, x: Array) -> Array:
        parts = self._split(mlp.gate_up_proj, x)
        hidden = [_activated(mlp.activation, held["gate"]) * held["up"] for held in parts]
        return self._joined(mlp.down_proj, hidden)


def _all_reduce(values: Sequence[Array]) -> Array:
    return np.sum(values, axis=0)


def _rotated(rope: Rope, x: Array, positions: npt.NDArray[np.int64]) -> Array:
    """x [n, heads, head_dim]: values i and i + rotary_dim / 2 are the parts of a complex number that turns."""
    half = rope.rotary_dim // 2
    turn = rope.attention_factor * np.exp(1j * np.outer(positions, frequencies(rope, len(positions))))
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn[:, None]
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def _activated(kind: str, x: Array) -> Array:
    match kind:
        case "silu":
            return x * (1 + np.tanh(x / 2)) / 2
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return x * np.vectorize(lambda value: 1 + math.erf(value / math.sqrt(2)))(x) / 2
        case "gelu_tanh":
            return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        case _:
            raise AssertionError(kind)
