"""Spec -> IR: every default and every derived size, decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection
from typing import assert_never

from qwenspec.ir import nodes, weights
from qwenspec.ir.nodes import Part, Shard
from qwenspec.ir.quantized import head_format, weight_format
from qwenspec.ir.rope import longrope_attention_factor, yarn_attention_factor
from qwenspec.spec import rope as spec_rope
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.attention import LayersFrom
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache, Int8KvCache, KvCache
from qwenspec.spec.quantization import Gptq

ACTIVATIONS: dict[str, nodes.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def lower(spec: Spec) -> nodes.Model:
    """The resolved program of one variant.

    Raises SpecError when the checkpoint layout names a tensor twice.
    """
    arch = spec.architecture
    build = _Builder(spec)
    embed_tokens = build.param("embed_tokens.weight", (arch.vocab_size, arch.hidden_size), Shard.VOCAB)
    head = build.head(embed_tokens)
    model = nodes.Model(
        name=spec.variant,
        family=spec.family,
        spec_file=spec.file,
        spec_sha256=spec.sha256(),
        dtype=arch.dtype,
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        max_position_embeddings=arch.max_position_embeddings,
        embed_tokens=embed_tokens,
        rope=_rope(arch),
        layers=tuple(build.layer(i, window) for i, window in enumerate(_windows(arch))),
        norm=build.norm("norm", arch.hidden_size),
        head=head,
        kv_cache=build.kv_cache,
        checkpoint_layer=spec.layout.layer,
        ignored_tensors=spec.layout.ignore + arch.checkpoint.ignore + _unread_head(spec, head),
        # GPTQ's files may have biases that the model has not.
        zero_tensors=("*.bias",) if isinstance(spec.quantization, Gptq) else (),
        tied_tensor=_tied_tensor(spec, head),
    )
    weights.check_distinct(model.params())
    return model


class _Builder:
    """Makes the nodes that own parameters; a parameter's address decides where it is read from."""

    def __init__(self, spec: Spec) -> None:
        self.arch = spec.architecture
        self.modules = weights.modules(spec.layout, self.arch.num_hidden_layers)
        self.formats = _formats(spec)
        self.kv_cache = _kv_cache(spec.kv_cache)

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard,
        parts: tuple[Part, ...] = (),
        dtype: nodes.Dtype | None = None,
    ) -> nodes.Param:
        module, _, suffix = name.rpartition(".")
        parts = parts or (Part(module.rpartition(".")[2], shape[0]),)
        sources = weights.sources(self.modules[module], suffix, parts, self.formats)
        return nodes.Param(name, shape, dtype or self.arch.dtype, shard, parts, sources)

    def linear(
        self, name: str, in_features: int, out_features: int, shard: Shard, bias: bool, *parts: Part
    ) -> nodes.Linear:
        weight = self.param(f"{name}.weight", (out_features, in_features), shard, parts)
        # A row-parallel product is a sum over ranks: its bias must be in it once.
        bias_shard = Shard.COLUMN if shard is Shard.COLUMN else Shard.FIRST
        bias_param = self.param(f"{name}.bias", (out_features,), bias_shard, parts) if bias else None
        return nodes.Linear(name, in_features, out_features, weight, bias_param)

    def norm(self, name: str, size: int) -> nodes.RMSNorm:
        norm = self.arch.norm
        return nodes.RMSNorm(name, size, norm.eps, norm.weight, self.param(f"{name}.weight", (size,), Shard.REPLICATE))

    def layer(self, index: int, window: int | None) -> nodes.Layer:
        name, hidden = f"layers.{index}", self.arch.hidden_size
        return nodes.Layer(
            name=name,
            index=index,
            input_norm=self.norm(f"{name}.input_norm", hidden),
            mixer=self.attention(f"{name}.attention", window),
            post_attention_norm=self.norm(f"{name}.post_attention_norm", hidden),
            feed_forward=self.mlp(f"{name}.mlp"),
        )

    def attention(self, name: str, window: int | None) -> nodes.Attention:
        arch, attention = self.arch, self.arch.attention
        head_dim, heads = _head_dim(arch), arch.num_attention_heads
        kv_heads = arch.num_key_value_heads or heads
        q, kv = heads * head_dim, kv_heads * head_dim
        qk_norm = attention.qk_norm == "per_head"
        return nodes.Attention(
            name=name,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if attention.scale is None else attention.scale,
            window=window,
            logn=None if attention.logn is None else nodes.LogN(attention.logn.train_length),
            qkv_proj=self.linear(
                f"{name}.qkv_proj",
                arch.hidden_size,
                q + 2 * kv,
                Shard.COLUMN,
                attention.bias.qkv,
                Part("q", q, heads),
                Part("k", kv, kv_heads),
                Part("v", kv, kv_heads),
            ),
            q_norm=self.norm(f"{name}.q_norm", head_dim) if qk_norm else None,
            k_norm=self.norm(f"{name}.k_norm", head_dim) if qk_norm else None,
            o_proj=self.linear(f"{name}.o_proj", q, arch.hidden_size, Shard.ROW, attention.bias.output),
            k_scale=self.kv_scale(f"{name}.k_scale"),
            v_scale=self.kv_scale(f"{name}.v_scale"),
        )

    def kv_scale(self, name: str) -> nodes.Param | None:
        if self.kv_cache is None or self.kv_cache.token_scales:
            return None
        return self.param(name, (1,), Shard.REPLICATE, dtype="float32")

    def mlp(self, name: str) -> nodes.GatedMlp:
        hidden, width, mlp = self.arch.hidden_size, self.arch.intermediate_size, self.arch.mlp
        return nodes.GatedMlp(
            name=name,
            intermediate_size=width,
            activation=ACTIVATIONS[mlp.activation],
            gate_up_proj=self.linear(
                f"{name}.gate_up_proj",
                hidden,
                2 * width,
                Shard.COLUMN,
                mlp.bias,
                Part("gate", width),
                Part("up", width),
            ),
            down_proj=self.linear(f"{name}.down_proj", width, hidden, Shard.ROW, mlp.bias),
        )

    def head(self, embed_tokens: nodes.Param) -> nodes.Head:
        arch = self.arch
        if arch.embedding is not None:
            return nodes.EmbeddingHead("embedding", arch.embedding.normalize)
        assert arch.lm_head is not None, "the spec's rules ask for one of lm_head and embedding"
        dtype = arch.lm_head.dtype or arch.dtype
        if arch.tie_word_embeddings:
            return nodes.LmHead("lm_head", embed_tokens, True, dtype)
        weight = self.param("lm_head.weight", (arch.vocab_size, arch.hidden_size), Shard.VOCAB, dtype=dtype)
        return nodes.LmHead("lm_head", weight, False, dtype)


def _formats(spec: Spec) -> weights.Formats:
    """Of each quantised module of the checkpoint."""
    quantization, arch = spec.quantization, spec.architecture
    if quantization is None:
        return {}
    found = dict.fromkeys(weights.linears(spec.layout, arch.num_hidden_layers), weight_format(quantization))
    head = head_format(quantization)
    if head is not None and arch.lm_head is not None:
        found[spec.layout.embedding if arch.tie_word_embeddings else spec.layout.lm_head] = head
    return {module: format for module, format in found.items() if module not in quantization.skip}


def _kv_cache(kv_cache: KvCache | None) -> nodes.KvFormat | None:
    match kv_cache:
        case None:
            return None
        case Fp8KvCache(scales=scales):
            return nodes.KvFormat("fp8_e4m3", token_scales=scales == "token")
        case Int8KvCache():
            return nodes.KvFormat("int8", token_scales=True)


def _unread_head(spec: Spec, head: nodes.Head) -> tuple[str, ...]:
    """A checkpoint may hold a head that the model has no use for, such as a copy of the tied embedding."""
    read = isinstance(head, nodes.LmHead) and not head.tied
    return () if read else (f"{spec.layout.lm_head}.weight",)


def _tied_tensor(spec: Spec, head: nodes.Head) -> str | None:
    tied = isinstance(head, nodes.LmHead) and head.tied and head.weight.sources[0].format is None
    return f"{spec.layout.lm_head}.weight" if tied else None


def _head_dim(arch: Architecture) -> int:
    return arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads


def _windows(arch: Architecture) -> list[int | None]:
    """The sliding window of each layer, None where attention is full."""
    sliding, count = arch.attention.sliding_window, arch.num_hidden_layers
    if sliding is None:
        return [None] * count
    slides: Collection[int]
    match sliding.layers:
        case "all":
            slides = range(count)
        case LayersFrom(from_=first):
            slides = range(first, count)
        case indices:
            slides = indices
    return [sliding.window if i in slides else None for i in range(count)]


def _rope(arch: Architecture) -> nodes.Rope:
    rope = arch.rope
    scaling, attention_factor = _rope_scaling(rope.scaling, arch.max_position_embeddings)
    return nodes.Rope(
        rotary_dim=int(_head_dim(arch) * rope.partial_rotary_factor),
        theta=rope.theta,
        compute_dtype=rope.compute_dtype,
        scaling=scaling,
        attention_factor=attention_factor,
    )


def _rope_scaling(scaling: spec_rope.RopeScaling | None, max_position: int) -> tuple[nodes.RopeScaling, float]:
    """The scaling and the factor on cos and sin."""
    match scaling:
        case None:
            return nodes.DefaultRope(), 1.0
        case spec_rope.Linear():
            return nodes.LinearRope(scaling.factor), 1.0
        case spec_rope.Ntk():
            return nodes.NtkRope(scaling.factor), 1.0
        case spec_rope.Dynamic():
            return nodes.DynamicRope(scaling.factor, max_position), 1.0
        case spec_rope.DynamicQwen1():
            return nodes.DynamicQwen1Rope(scaling.train_length), 1.0
        case spec_rope.Yarn():
            yarn = nodes.YarnRope(
                scaling.factor,
                scaling.original_max_position_embeddings,
                scaling.beta_fast,
                scaling.beta_slow,
                scaling.truncate,
            )
            return yarn, scaling.attention_factor or yarn_attention_factor(
                scaling.factor, scaling.mscale, scaling.mscale_all_dim
            )
        case spec_rope.LongRope():
            original = scaling.original_max_position_embeddings
            longrope = nodes.LongRope(scaling.short_factor, scaling.long_factor, original)
            return longrope, scaling.attention_factor or longrope_attention_factor(
                scaling.factor or max_position / original, original
            )
        case spec_rope.Llama3():
            return nodes.Llama3Rope(
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_max_position_embeddings,
            ), 1.0
        case _:
            assert_never(scaling)
