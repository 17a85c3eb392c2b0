"""What a model costs: parameters, bytes and floating-point operations, by closed formulas over the IR."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qwenspec.ir.nodes import Dtype, EmbeddingHead, Layer, LmHead, Model, Param, Part
from qwenspec.ir.quantized import block_bytes, blocks
from qwenspec.ir.shard import TensorParallelPlan

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 4  # of a quantised KV cache: float32
LOGIT_BYTES = 4  # logits are float32 whatever the model's dtype


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of weights. A tied head counts under `embedding` alone; `per_layer` is the first layer's."""

    total: int
    embedding: int
    head: int
    per_layer: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on each rank, and the number of pages that `kv_cache` pays for (a page serves all layers)."""

    weights: int
    kv_cache: int
    kv_pages: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.logits


def count_parameters(model: Model) -> ParameterCount:
    first = f"{model.layers[0].name}."
    untied = isinstance(model.head, LmHead) and not model.head.tied
    return ParameterCount(
        total=_size(model.params()),
        embedding=_size([model.embed_tokens]),
        head=_size([model.head.weight]) if isinstance(model.head, LmHead) and untied else 0,
        per_layer=_size(param for param in model.params() if param.name.startswith(first)),
    )


def weight_bytes(model: Model) -> int:
    """Bytes of all parameters, each in its own dtype or quantised."""
    return sum(_bytes(param, param.shape, param.parts) for param in model.params())


def kv_bytes_per_token(model: Model, plan: TensorParallelPlan | None = None) -> int:
    """Bytes of keys and values, with their scales, that one token leaves in all layers, on one rank of `plan` when
    given."""
    heads = sum(plan.num_kv_heads if plan else layer.mixer.num_kv_heads for layer in model.layers)
    head_dim, kv = model.layers[0].mixer.head_dim, model.kv_cache
    of_a_head = head_dim * DTYPE_BYTES[model.dtype] if kv is None else head_dim + SCALE_BYTES * kv.token_scales
    return 2 * heads * of_a_head


def flops_per_token(model: Model, context: int) -> int:
    """Floating-point operations to produce one token that sees `context` tokens, itself among them.

    2 · (linear weights) + sum over layers of 4 · num_heads · head_dim · min(context, window).

    The head's weight counts, tied or not; the embedding is looked up and does not. A query head spends
    2 · head_dim on the score of a key that it sees and as many on its value. Norms, biases, softmax, rotary
    embedding and activations are left out: they grow with the width, not with its square.
    """
    weights = sum(_linear_size(layer) for layer in model.layers)
    if isinstance(model.head, LmHead):
        weights += math.prod(model.head.weight.shape)
    attention = sum(
        4 * layer.mixer.num_heads * layer.mixer.head_dim * min(context, layer.mixer.window or context)
        for layer in model.layers
    )
    return 2 * weights + attention


def memory(
    model: Model,
    plan: TensorParallelPlan,
    context: int,
    batch: int,
    page_size: int = 16,
    prefill_chunk: int = 2048,
) -> MemoryPlan:
    """One rank's memory to serve `batch` sequences of `context` tokens, prefilled `prefill_chunk` at a time.

    Pages are whole: every sequence rounds up to `page_size` tokens. Sliding layers keep all of theirs.
    Activations are an estimate of the peak in a layer, in the model's dtype: the residual and its norm, and
    the larger of attention (q, k, v, output) and MLP (gate, up, product). Logits are those of one token a
    sequence, float32, gathered over the padded vocabulary; a text-embedding model has its vector instead.
    """
    pages = batch * math.ceil(context / page_size)
    head_dim = model.layers[0].mixer.head_dim
    attention = 2 * (plan.num_heads + plan.num_kv_heads) * head_dim
    width = 2 * model.hidden_size + max(attention, 3 * plan.intermediate_size)
    tokens = max(min(context * batch, prefill_chunk), batch)
    outputs = model.hidden_size if isinstance(model.head, EmbeddingHead) else plan.degree * plan.vocab_size
    return MemoryPlan(
        weights=sum(_bytes(share.param, share.shape, share.parts) for share in plan.params),
        kv_cache=pages * page_size * kv_bytes_per_token(model, plan),
        kv_pages=pages,
        activations=tokens * width * DTYPE_BYTES[model.dtype],
        logits=batch * outputs * LOGIT_BYTES,
    )


def _bytes(param: Param, shape: tuple[int, ...], parts: tuple[Part, ...]) -> int:
    """Of a parameter, or of a rank's share of it, as it lies in memory."""
    pieces = blocks(param)
    rows = [shape[0]] if len(pieces) == 1 else [part.rows for part in parts]
    return sum(
        math.prod((n, *shape[1:])) * DTYPE_BYTES[param.dtype]
        if piece.format is None
        else block_bytes(piece.format, n, shape[1])
        for piece, n in zip(pieces, rows, strict=True)
    )


def _size(params: Iterable[Param]) -> int:
    return sum(math.prod(param.shape) for param in params)


def _linear_size(layer: Layer) -> int:
    return _size(linear.weight for linear in layer.linears())
