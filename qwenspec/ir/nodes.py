"""The resolved program of one model: frozen, complete, nothing optional that is not optional in the maths.

Every default and derived size has been decided by `lower`; emitters read these nodes and never a spec.
A node's `name` is its address, the same here, as an attribute of generated code, in errors and in weights:
`layers.3.attention.q_norm`. Shapes of linear weights are [out_features, in_features].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]  # `lower` resolves aliases (swish, gelu_new, …)
NormWeight = Literal["plain", "one_plus"]


class Shard(Enum):
    """How tensor parallelism splits a parameter."""

    REPLICATE = "replicate"
    FIRST = "first"  # rank 0 has it, and the others zeros: a bias of what an all-reduce adds up
    COLUMN = "column"  # output features (dim 0), each fused part on its own
    ROW = "row"  # input features (dim 1); an all-reduce follows
    VOCAB = "vocab"  # vocabulary rows (dim 0), padded when they do not divide


@dataclass(frozen=True, slots=True)
class IntFormat:
    """W[n, k] = (q[n, k] - z[n, g]) · s[n, g], where g is the group of input k.

    `packing`: how the checkpoint packs it. `group_size`: inputs that share a scale, of which the last group may have
    fewer; None: all of them. Without `zero_points` z is 2^(bits - 1). `act_order`: inputs belong to groups in another
    order than their own (GPTQ's desc_act).
    """

    packing: Literal["awq", "gptq", "gptq_v2", "pack_quantized", "int8", "int4"]
    bits: Literal[4, 8]
    group_size: int | None
    zero_points: bool = False
    act_order: bool = False

    def groups(self, inputs: int) -> int:
        """How many there are."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """W[n, k] = q[n, k] · s[n // block[0], k // block[1]], q in float8 e4m3; blocks at the edges may be smaller.

    `block`: with 0 inputs, all of them. `scales`: what has a scale in the checkpoint; a tensor's is each row's in
    memory. `activations`: whether they are rounded to e4m3 too, dynamic: with a scale for each token and block[1]
    inputs, or static: with one for all tokens, which the checkpoint has for each of its modules.
    """

    block: tuple[int, int]
    scales: Literal["block", "channel", "tensor"] = "block"
    activations: Literal["dynamic", "static", "none"] = "none"

    def groups(self, inputs: int) -> int:
        """Blocks beside one another."""
        return -(-inputs // self.block[1]) if self.block[1] else 1


WeightFormat = IntFormat | Fp8Format


@dataclass(frozen=True, slots=True)
class KvFormat:
    """Keys and values are cached as q with x = q · s.

    `fp8_e4m3`: q = e4m3(x / s), at most 448 in magnitude; `int8`: q = round(x / s). `token_scales`: s is of each token
    and head, its largest magnitude over 448 or 127; otherwise it is the layer's k_scale or v_scale.
    """

    dtype: Literal["fp8_e4m3", "int8"]
    token_scales: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A block of consecutive rows in a fused parameter. `heads` counts its attention heads, 0 for none."""

    name: str
    rows: int
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor that fills the next `rows` rows (dim 0) of a parameter.

    Where it has a `format`, tensors of the same module with other suffixes than `weight` take its place."""

    tensor: str
    rows: int
    format: WeightFormat | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as it lies in memory, and the checkpoint tensors it is read from, top row first.

    `parts` has one entry for a plain parameter and one per block for a fused one.
    A fused parameter's `sources` are either one per part or a single tensor that is fused on disk too.
    What is quantised has the shape and dtype of full precision here; `qwenspec.ir.quantized` says how it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    shard: Shard
    parts: tuple[Part, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + b."""

    name: str
    in_features: int
    out_features: int
    weight: Param
    bias: Param | None


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) · w over the last `size` values, statistics in float32.

    `plain`: x̂ is cast to the activation dtype, then multiplied by w.
    `one_plus`: x̂ · (1 + w) in float32, then cast.
    """

    name: str
    size: int
    eps: float
    style: NormWeight
    weight: Param


# ------------------------------------------------------------------------------------------ rotary embedding


@dataclass(frozen=True, slots=True)
class DefaultRope:
    """θ^(-2i/d)."""


@dataclass(frozen=True, slots=True)
class LinearRope:
    factor: float


@dataclass(frozen=True, slots=True)
class NtkRope:
    factor: float


@dataclass(frozen=True, slots=True)
class DynamicRope:
    """Hugging Face's dynamic NTK: the base grows with the sequence's length beyond `max_position`."""

    factor: float
    max_position: int


@dataclass(frozen=True, slots=True)
class DynamicQwen1Rope:
    """Qwen-1's dynamic NTK: a power-of-two step chosen from the prompt's length, then frozen."""

    train_length: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongRope:
    """`long_factor` once the sequence is longer than `original_max_position`, else `short_factor`."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


RopeScaling = DefaultRope | LinearRope | NtkRope | DynamicRope | DynamicQwen1Rope | YarnRope | LongRope | Llama3Rope


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotate-half (NeoX) rotary embedding of the first `rotary_dim` values of each head.

    `attention_factor` multiplies cos and sin. `compute_dtype` `activation`: cos and sin are rounded to the
    activation dtype before use (Qwen1.5 and later); `float32`: the rotation is done in float32 (Qwen-1).
    """

    rotary_dim: int
    theta: float
    compute_dtype: Literal["activation", "float32"]
    scaling: RopeScaling
    attention_factor: float


# ---------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, slots=True)
class LogN:
    """The query at position p is multiplied by max(1, ln(p + 1) / ln(train_length)), after RoPE."""

    train_length: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention. A query at p sees keys p - window + 1 … p, or all of 0 … p when `window` is None."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    logn: LogN | None
    qkv_proj: Linear  # parts q, k, v
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    o_proj: Linear
    k_scale: Param | None  # [1] float32, where the checkpoint has the KV cache's scales
    v_scale: Param | None


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) · up(x))."""

    name: str
    intermediate_size: int
    activation: Activation
    gate_up_proj: Linear  # parts gate, up
    down_proj: Linear


Mixer = Attention
FeedForward = GatedMlp


@dataclass(frozen=True, slots=True)
class Layer:
    """x += mixer(input_norm(x)); x += feed_forward(post_attention_norm(x))."""

    name: str
    index: int
    input_norm: RMSNorm
    mixer: Mixer
    post_attention_norm: RMSNorm
    feed_forward: FeedForward

    def linears(self) -> tuple[Linear, ...]:
        """Its matrix products, in the order of the forward pass."""
        attention, mlp = self.mixer, self.feed_forward
        return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


@dataclass(frozen=True, slots=True)
class LmHead:
    """Logits in float32. `weight` is the embedding's own Param when tied. The product is taken in `dtype`."""

    name: str
    weight: Param
    tied: bool
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class EmbeddingHead:
    """A text-embedding model's output: the last token's hidden state, L2-normalised in float32 if asked."""

    name: str
    normalize: bool


Head = LmHead | EmbeddingHead


@dataclass(frozen=True, slots=True)
class Model:
    """One variant, ready to emit."""

    name: str
    family: str
    spec_file: str
    spec_sha256: str
    dtype: Dtype
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    embed_tokens: Param
    rope: Rope
    layers: tuple[Layer, ...]
    norm: RMSNorm
    head: Head
    kv_cache: KvFormat | None  # None: the model's dtype
    checkpoint_layer: str  # the checkpoint's name of layer {i}: what its tensors' names start with
    ignored_tensors: tuple[str, ...]  # fnmatch patterns of checkpoint tensors that may be left unread
    zero_tensors: tuple[str, ...]  # … and of those that may only if they hold nothing but zeros
    tied_tensor: str | None = None  # the LM head's own name, under which some checkpoints hold the tied embedding

    @property
    def tied_names(self) -> tuple[str, ...]:
        """The two names under either of which a checkpoint may hold the tied embedding; none where it is not tied."""
        return (self.embed_tokens.sources[0].tensor, self.tied_tensor) if self.tied_tensor else ()

    def params(self) -> tuple[Param, ...]:
        """Every distinct parameter, in the order of the forward pass; a tied weight appears once."""
        found: list[Param] = [self.embed_tokens]
        for layer in self.layers:
            attention, mlp = layer.mixer, layer.feed_forward
            found += _norm_params(layer.input_norm) + _linear_params(attention.qkv_proj)
            found += _norm_params(attention.q_norm) + _norm_params(attention.k_norm)
            found += [scale for scale in (attention.k_scale, attention.v_scale) if scale is not None]
            found += _linear_params(attention.o_proj) + _norm_params(layer.post_attention_norm)
            found += _linear_params(mlp.gate_up_proj) + _linear_params(mlp.down_proj)
        found += _norm_params(self.norm)
        if isinstance(self.head, LmHead) and not self.head.tied:
            found.append(self.head.weight)
        return tuple(found)


def _linear_params(linear: Linear) -> list[Param]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def _norm_params(norm: RMSNorm | None) -> list[Param]:
    return [] if norm is None else [norm.weight]
