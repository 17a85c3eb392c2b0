"""What a model costs: parameters, bytes and floating-point operations, by closed formulas over the IR."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qwenspec.ir.activations import DTYPE_BYTES, PROCESSORS, Forward, Rank, activation_bytes, graph_bytes, logit_bytes
from qwenspec.ir.nodes import Layer, LmHead, Model, Param, Part
from qwenspec.ir.quantized import block_bytes, blocks
from qwenspec.ir.shard import TensorParallelPlan

PAGE_SIZE = 16  # tokens, as packages have it unless told otherwise
PREFILL_CHUNK = 2048  # tokens of a forward, likewise
SCALE_BYTES = 4  # of a quantised KV cache: float32


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
    graphs: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.logits + self.graphs


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
    page_size: int = PAGE_SIZE,
    prefill_chunk: int = PREFILL_CHUNK,
    processors: int = PROCESSORS,
) -> MemoryPlan:
    """One rank's memory to serve `batch` sequences of `context` tokens, prefilled `prefill_chunk` at a time.

    This is what the Triton package takes on a GPU, and each number is a peak of its own. Pages are whole: every
    sequence rounds up to `page_size` tokens, and sliding layers keep all of theirs. Activations are those of the
    largest forward, a chunk of as many whole prompts as fit in, or a decode step; logits are those of one token a
    sequence; graphs are decode steps as captured, of which CPUs have none. `processors` are the GPU's streaming
    multiprocessors. `qwenspec.ir.activations` has the formulas.

    The TVM package's weights are the same but for panels, whose rows round up to a vector or two, and for fp8: it keeps
    each block's scale once for every row, which is 2.3 % more with blocks of 128 × 128. Its pages are the same.
    """
    width = math.ceil(context / page_size)
    rank = Rank(model, plan, page_size, processors)
    tokens = min(context * batch, prefill_chunk)
    prefill, decode = Forward(tokens, math.ceil(tokens / context), width), Forward(batch, batch, width)
    return MemoryPlan(
        weights=sum(_bytes(share.param, share.shape, share.parts) for share in plan.params),
        kv_cache=batch * width * page_size * kv_bytes_per_token(model, plan),
        kv_pages=batch * width,
        activations=activation_bytes(rank, prefill, decode),
        logits=logit_bytes(rank, decode.padded.tokens),
        graphs=graph_bytes(rank, decode),
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
