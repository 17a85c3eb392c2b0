"""What one rank allocates beside weights and KV cache, in bytes: the Triton package on a GPU, tensor by tensor.

Each function adds up the tensors that live at once when most do; kernels need nothing else. A tensor is counted for as
long as generated code holds it, which is longer than it is needed: the arguments of a layer, for one, live until it
returns. What is not a tensor is left out: the CUDA context, workspaces of cuBLAS and NCCL, and what an allocator rounds
up to; so is what a caller makes of the logits. On a CPU, PyTorch's functions stand in for kernels and compute in
float32: in 16 bits the same forward takes twice as much there. n counts the tokens of a forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from qwenspec.ir.nodes import (
    Dtype,
    DynamicQwen1Rope,
    DynamicRope,
    EmbeddingHead,
    Fp8Format,
    Layer,
    Linear,
    LongRope,
    Model,
    WeightFormat,
)
from qwenspec.ir.quantized import blocks
from qwenspec.ir.shard import ShardedParam, TensorParallelPlan

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT32 = 4
INDEX = 8  # positions, slots and page numbers are int64

PROCESSORS = 132  # streaming multiprocessors of an H100 or H200; decode attention is split among them
MAX_SPLITS = 64  # of a sequence's keys
LEAST_WIDTH = 16  # pages in a captured block table


@dataclass(frozen=True, slots=True)
class Forward:
    """`tokens` new ones of `sequences` that have up to `pages` pages each."""

    tokens: int
    sequences: int
    pages: int

    @property
    def decodes(self) -> bool:
        return self.tokens == self.sequences

    @property
    def padded(self) -> Forward:
        """A decode step as it is captured: in powers of two."""
        size = _power_of_two(self.sequences)
        return Forward(size, size, _power_of_two(max(self.pages, LEAST_WIDTH)))


@dataclass(frozen=True)
class Rank:
    """A rank of a model, its cache and its GPU."""

    model: Model
    plan: TensorParallelPlan
    page_size: int
    processors: int = PROCESSORS

    @cached_property
    def shares(self) -> dict[str, ShardedParam]:
        return {share.param.name: share for share in self.plan.params}

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.model.dtype]

    @property
    def hidden(self) -> int:
        """Bytes of a token's hidden state."""
        return self.model.hidden_size * self.value


def activation_bytes(rank: Rank, prefill: Forward, decode: Forward) -> int:
    """Of the larger one of two forwards, with what their caller holds: the embeddings and the batch's description.

    A decode step runs on a padded copy of both."""
    return max(_forward(rank, prefill), _inputs(rank, decode) + _forward(rank, decode.padded))


def logit_bytes(rank: Rank, rows: int) -> int:
    """Of the head, from the hidden states of `rows` tokens to logits of the whole vocabulary.

    The product is in the head's dtype. What several ranks have of it is gathered, each in a tensor of its own, then
    copied side by side; the last copy is in float32. A head in another dtype than the model's casts the hidden states,
    and a tied one its weight, which is larger than all logits. A text-embedding model has its vectors in float32, and
    once more when they are normalised.
    """
    model, plan, head = rank.model, rank.plan, rank.model.head
    if isinstance(head, EmbeddingHead):
        return rows * model.hidden_size * FLOAT32 * ((model.dtype != "float32") + head.normalize)
    value = DTYPE_BYTES[head.dtype]
    product = rows * plan.vocab_size * value
    cast = 0
    if head.dtype != model.dtype:
        cast_weight = head.tied and blocks(head.weight)[0].format is None
        cast = (rows + plan.vocab_size * cast_weight) * model.hidden_size * value
    gathered = plan.degree * product if plan.degree > 1 else 0
    copied = rows * model.vocab_size * FLOAT32 if head.dtype != "float32" else 0
    return product + max(cast, gathered + max(gathered, copied))


def graph_bytes(rank: Rank, decode: Forward) -> int:
    """Of decode steps captured as CUDA graphs: one for every power of two up to the number of sequences, times every
    one up to the number of pages.

    Each has inputs and logits of its own. The memory that they run in is the same for all, as much as the largest
    takes, and nothing else can use it.
    """
    largest = decode.padded
    sizes, widths = _powers_of_two(1, largest.tokens), _powers_of_two(LEAST_WIDTH, largest.pages)
    steps = [Forward(size, size, width) for size in sizes for width in widths]
    outputs = rank.model.hidden_size if isinstance(rank.model.head, EmbeddingHead) else rank.model.vocab_size
    kept = sum(_inputs(rank, step) + step.tokens * outputs * FLOAT32 for step in steps)
    layers = _forward(rank, largest) - _inputs(rank, largest)
    head = largest.tokens * rank.hidden + logit_bytes(rank, largest.tokens)
    return kept + max(layers, head) - largest.tokens * outputs * FLOAT32


# ------------------------------------------------------------------------------------------------- a forward


def _forward(rank: Rank, forward: Forward) -> int:
    """What it is given, tables for all layers, and the layer that takes most."""
    layers = max(_layer(rank, layer, forward) for layer in rank.model.layers)
    return _inputs(rank, forward) + forward.tokens * _tables(rank.model) + layers


def _inputs(rank: Rank, forward: Forward) -> int:
    """Embeddings; positions and slots of tokens; page numbers, lengths and starts of sequences; and each token's rotary
    frequencies, where they follow its sequence's length."""
    indices = 2 * forward.tokens + forward.sequences * (forward.pages + 2) + 1
    rope = rank.model.rope
    dynamic = isinstance(rope.scaling, DynamicRope | DynamicQwen1Rope | LongRope)
    of_a_token = rank.hidden + dynamic * rope.rotary_dim // 2 * FLOAT32
    return forward.tokens * of_a_token + indices * INDEX


def _tables(model: Model) -> int:
    """Bytes a token: cos and sin of half of rotary_dim each, and LogN's factor."""
    value = FLOAT32 if model.rope.compute_dtype == "float32" else DTYPE_BYTES[model.dtype]
    return model.rope.rotary_dim * value + FLOAT32 * any(layer.mixer.logn for layer in model.layers)


def _layer(rank: Rank, layer: Layer, forward: Forward) -> int:
    """The larger one of attention and MLP, and the hidden states that wait for it.

    These are x and residual as the layer was given them, and both as its norm gave them on; between attention and MLP a
    norm has what goes in and what comes out. The first layer is given the embeddings alone, which the caller has, and
    they are the first residual, too.
    """
    n, hidden = forward.tokens, forward.tokens * rank.hidden
    first = layer.index == 0
    attention = _attention(rank, layer, forward) + hidden * (1 if first else 4)
    mlp = n * _mlp(rank, layer) + hidden * (2 if first else 4)
    return max(attention, mlp, hidden * (3 if first else 6))


def _attention(rank: Rank, layer: Layer, forward: Forward) -> int:
    """qkv and q live until the output is there; decode attention's splits are gone before o_proj starts."""
    n, plan, mixer = forward.tokens, rank.plan, layer.mixer
    queries = plan.num_heads * mixer.head_dim * rank.value
    qkv = queries + 2 * plan.num_kv_heads * mixer.head_dim * rank.value
    splits = _splits(rank, layer, forward) if forward.decodes else 0
    attended = n * plan.num_heads * splits * (mixer.head_dim + 1) * FLOAT32
    projected = n * _product(rank, mixer.o_proj)
    return max(n * _product(rank, mixer.qkv_proj), n * (qkv + 2 * queries) + max(attended, projected))


def _splits(rank: Rank, layer: Layer, forward: Forward) -> int:
    """Parts that a sequence's keys are cut into: two programs a processor, of no less than a block of keys each."""
    mixer = layer.mixer
    wide = _power_of_two(mixer.head_dim) * rank.value > 256
    keys = min(forward.pages * rank.page_size, mixer.window or math.inf)
    programs = forward.sequences * rank.plan.num_kv_heads
    return max(1, min(-(-2 * rank.processors // programs), math.ceil(keys / (32 if wide else 64)), MAX_SPLITS))


def _mlp(rank: Rank, layer: Layer) -> int:
    """Bytes a token: gate and up, their product, and down_proj's own."""
    mlp, width = layer.feed_forward, rank.plan.intermediate_size * rank.value
    return max(_product(rank, mlp.gate_up_proj), 3 * width + _product(rank, mlp.down_proj))


def _product(rank: Rank, linear: Linear) -> int:
    """Bytes a token of x Wᵀ: the outputs, and what x is turned into for it.

    Blocks of rows with weights of their own are multiplied one after the other, and their outputs are then copied side
    by side.
    """
    share = rank.shares[linear.weight.name]
    pieces = blocks(linear.weight)
    rows = [share.shape[0]] if len(pieces) == 1 else [part.rows for part in share.parts]
    peak = done = 0
    for piece, n in zip(pieces, rows, strict=True):
        done += n * rank.value
        peak = max(peak, done + _turned(rank, piece.format, share))
    return peak if len(pieces) == 1 else max(peak, 2 * done)


def _turned(rank: Rank, format: WeightFormat | None, share: ShardedParam) -> int:
    """Bytes a token of x as a format multiplies it: in its order, or in e4m3 with a scale a group."""
    inputs = share.shape[1]
    if format is None:
        return 0
    if isinstance(format, Fp8Format):
        return (inputs + format.groups(inputs) * FLOAT32) * (format.activations != "none")
    return inputs * rank.value * format.act_order


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def _powers_of_two(first: int, last: int) -> list[int]:
    return [1 << i for i in range(first.bit_length() - 1, last.bit_length())]
