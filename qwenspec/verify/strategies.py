"""Hypothesis strategies: specs over the whole product of dense features, and sizes of caches.

Specs shrink to one layer, one head, small sizes and nothing switched on. Hypothesis takes what comes first, and what
needs fewer draws, for simpler: so nothing that is off may draw more than it would on. Lengths at which something
begins (windows, scalings, LogN) are small, so that short sequences pass them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from qwenspec import tree
from qwenspec.diagnostics import Location, SpecError
from qwenspec.spec.check import check
from qwenspec.spec.document import Spec
from qwenspec.verify.steps import CacheSizes
from qwenspec.verify.strategies_quantized import KV_CACHES, QUANTIZATIONS, head_unit_of, skipped, unit_of

Draw = Callable[..., Any]
Tree = dict[str, Any]

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEADS = 8
_HALF = st.booleans()
_QUARTER = st.sampled_from((False, False, False, True))
_EIGHTH = st.sampled_from((False,) * 7 + (True,))
_LENGTHS = st.sampled_from((8, 16, 32, 48))  # the original ones, that sequences outgrow
_FACTORS = st.sampled_from((2.0, 4.0, 1.5, 3.0, 8.0, 1.0))
_ATTENTION_FACTORS = st.sampled_from((None, 0.75, 1.25))


@st.composite
def specs(
    draw: Draw,
    max_layers: int = 3,
    dtypes: Sequence[str] = DTYPES,
    scalings: Sequence[str | None] | None = None,
    quantizations: Sequence[str | None] = (None,),
    kv_caches: Sequence[str | None] = (None,),
    hugging_face: bool = False,
    ranks: int = 1,
) -> Spec:
    """Valid specs. `dtypes`, `scalings` (keys of SCALINGS, None for none), `quantizations` (of QUANTIZATIONS) and
    `kv_caches` (of KV_CACHES): what `dtype`, `rope.scaling`, `quantization` and `kv_cache` are drawn from.
    `hugging_face`: only what its configs can say. `ranks`: so many can share the model.

    Of one run's examples most are mutations of the one before, from the eleventh on: for many different specs, make
    many short runs, such as one for each scaling and dtype."""
    if scalings is None:
        known = tuple(kind for kind in SCALINGS if not hugging_face or kind not in _NOT_IN_HUGGING_FACE)
        scalings = (None, None, *known, "yarn", "longrope")  # the last two have many options
    scheme = draw(st.sampled_from(quantizations))
    quantization = None if scheme is None else {"scheme": scheme, **QUANTIZATIONS[scheme](draw)}
    units = _Units(unit_of(quantization), head_unit_of(quantization) if ranks > 1 else 2, ranks)
    architecture = _architecture(draw, max_layers, dtypes, scalings, hugging_face, units)
    kind = draw(st.sampled_from(kv_caches))
    kv_cache = None if kind is None else KV_CACHES[kind]
    spec = spec_of(architecture, quantization, kv_cache)
    skip = draw(skipped(spec, ranks > 1)) if quantization else []
    return spec_of(architecture, {**(quantization or {}), "skip": skip}, kv_cache) if skip else spec


def cache_sizes() -> st.SearchStrategy[CacheSizes]:
    """Small caches: many run out before a batch of sequences ends. They shrink to room for 160 tokens."""
    return st.builds(
        lambda page_size, tokens, batch, chunk: CacheSizes(page_size, max(2, tokens // page_size), batch, chunk),
        page_size=st.integers(1, 16),
        tokens=_down_to(24, 160),
        batch=st.integers(2, 5),
        chunk=_down_to(1, 64),
    )


def _down_to(least: int, most: int) -> st.SearchStrategy[int]:
    """Integers of which the largest is the simplest."""
    return st.integers(0, most - least).map(lambda below: most - below)


def spec_of(
    architecture: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    kv_cache: Mapping[str, Any] | None = None,
) -> Spec:
    """The spec of plain trees, by the checks that a file goes through. Raises SpecError for their mistakes."""
    document = {"schema_version": 1, "architecture": architecture, "quantization": quantization, "kv_cache": kv_cache}
    node = _node(document)
    assert isinstance(node, tree.Mapping)
    spec, findings = check(node, "drawn", "drawn", "A drawn spec.", "")
    if spec is None:
        raise SpecError(finding.diagnostic for finding in findings)
    return spec


_NOWHERE = Location("", 0, 0)


def _node(value: Any) -> tree.Node:
    match value:
        case dict():
            entries = {key: tree.Entry(_NOWHERE, _node(inner)) for key, inner in value.items()}
            return tree.Mapping(entries, _NOWHERE)
        case list() | tuple():
            return tree.Sequence(tuple(map(_node, value)), _NOWHERE)
        case _:
            return tree.Scalar(value, _NOWHERE)


# ------------------------------------------------------------------------------------------ parts of an architecture


def _architecture(
    draw: Draw,
    max_layers: int,
    dtypes: Sequence[str],
    scalings: Sequence[str | None],
    hugging_face: bool,
    units: _Units,
) -> Tree:
    layers = draw(st.integers(1, max_layers))
    kind = draw(st.sampled_from(scalings))
    sizes, head_dim = _sizes(draw, units)
    partial = draw(_HALF) and not hugging_face
    pairs = draw(st.integers(2 if kind in _NEED_TWO_PAIRS else 1, head_dim // 2)) if partial else head_dim // 2
    scaling, max_position = _scaling(draw, kind, pairs)
    attention = _attention(draw, layers, head_dim, hugging_face)
    head_dtype = None if hugging_face else draw(st.sampled_from((None, None, *DTYPES)))
    embedding = {"normalize": hugging_face or not draw(_HALF)} if draw(_QUARTER) else None
    sizes["attention"] |= attention
    return sizes | {
        "num_hidden_layers": layers,
        "max_position_embeddings": max_position,
        "dtype": draw(st.sampled_from(dtypes)),
        "tie_word_embeddings": draw(_HALF),
        "norm": {
            "eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2, 0.1))),
            "weight": "plain" if hugging_face else draw(st.sampled_from(("plain", "one_plus"))),
        },
        "rope": {
            "theta": draw(st.sampled_from((1e4, 100.0, 1e6, 10.0))),
            "partial_rotary_factor": _fraction(2 * pairs, head_dim),
            "compute_dtype": "activation" if hugging_face else draw(st.sampled_from(("activation", "float32"))),
            "scaling": scaling,
        },
        "mlp": {
            "activation": draw(st.sampled_from(("silu", "gelu", "gelu_new", "relu", "swish", "gelu_pytorch_tanh"))),
            "bias": not hugging_face and draw(_HALF),
        },
        "lm_head": None if embedding else {"dtype": head_dtype},
        "embedding": embedding,
        "checkpoint": {"layout": _layout(draw, attention["qk_norm"] != "none", embedding is not None, hugging_face)},
    }


# Of several ranks: query and key/value heads. Of the latter there are fewer than ranks, as many, or more, or neither
# number divides the other: some are on several ranks then, or more than once on one.
_SHARED_HEADS = {
    2: ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (6, 3), (6, 1), (12, 3)),
    3: ((3, 1), (3, 3), (6, 2), (6, 1), (12, 4), (12, 2), (6, 6)),
    4: ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (12, 3), (12, 2), (12, 6), (8, 8)),
}


@dataclass(frozen=True)
class _Units:
    """What sizes are multiples of: those of matrices, a head's width, and the query heads."""

    matrices: int
    head_dim: int
    heads: int


def _sizes(draw: Draw, units: _Units) -> tuple[Tree, int]:
    """Sizes of the matrices, and a head's width."""

    def multiple(size: int, unit: int = units.matrices) -> int:
        return -(-size // unit) * unit

    heads, kv_heads = _heads(draw, units.heads)
    head_dim = multiple(2 * draw(st.integers(2, 16)), math.lcm(units.matrices, units.head_dim))
    null_kv_heads = draw(_HALF)
    write_kv_heads = kv_heads < heads or not null_kv_heads
    hidden = width = heads * head_dim
    if own_width := draw(st.sampled_from((True, True, False))):
        hidden = draw(st.integers(8, 80).map(multiple).filter(lambda size: size != width))
    sizes = {
        "vocab_size": draw(st.integers(11, 130)),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if write_kv_heads else None,
        "intermediate_size": multiple(draw(st.integers(4, 90)) + (512 if draw(_EIGHTH) else 0)),
        "attention": {"head_dim": head_dim if own_width or draw(_HALF) else None},
    }
    return sizes, head_dim


def _heads(draw: Draw, ranks: int) -> tuple[int, int]:
    if ranks > 1:
        heads: tuple[int, int] = draw(st.sampled_from(_SHARED_HEADS[ranks]))
        return heads
    kv_heads = draw(st.integers(1, 4))
    return kv_heads * draw(st.integers(1, min(4, MAX_HEADS // kv_heads))), kv_heads


def _attention(draw: Draw, layers: int, head_dim: int, hugging_face: bool) -> Tree:
    """All but head_dim."""
    qk_norm = draw(_HALF)
    qkv, output = draw(_HALF), draw(_HALF)
    if hugging_face:  # Qwen3 has one switch for both, Qwen2 none
        qkv, output = (qkv, qkv) if qk_norm else (True, False)
    scale = None if hugging_face else draw(st.sampled_from((None, 1.5, 0.6)))
    return {
        "scale": None if scale is None else scale * head_dim**-0.5,
        "bias": {"qkv": qkv, "output": output},
        "qk_norm": "per_head" if qk_norm else "none",
        "logn": None if hugging_face or not draw(_HALF) else {"train_length": draw(st.integers(4, 32))},
        "sliding_window": _sliding_window(draw, layers) if draw(_HALF) else None,
    }


def _sliding_window(draw: Draw, layers: int) -> Tree:
    slides = st.one_of(
        st.just("all"),
        st.integers(0, layers).map(lambda first: {"from": first}),
        st.sets(st.integers(0, layers - 1), min_size=1).map(sorted),
    )
    return {"window": draw(st.integers(1, 20)), "layers": draw(slides)}


def _fraction(rotary_dim: int, head_dim: int) -> float:
    """The partial_rotary_factor of which int(head_dim · factor) is rotary_dim."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def _layout(draw: Draw, qk_norm: bool, embedding: bool, hugging_face: bool) -> str | Tree:
    if hugging_face:
        return "qwen3_embedding" if embedding else "qwen2"
    first_generation = () if qk_norm else ("qwen1",)
    name: str = draw(st.sampled_from(("qwen2", "qwen3_embedding", "inline", *first_generation)))
    return _inline_layout(draw, qk_norm) if name == "inline" else name


def _inline_layout(draw: Draw, qk_norm: bool) -> Tree:
    norms = {"q_norm": "mixer.norm_q", "k_norm": "mixer.norm_k"} if qk_norm else {}
    return {
        "embedding": "decoder.words",
        "layer": "decoder.block_{i}",
        "input_norm": "norm_1",
        "attention": {
            "qkv": draw(st.sampled_from((["mixer.wqkv"], ["mixer.wq", "mixer.wk", "mixer.wv"]))),
            "o": "mixer.wo",
            "kv_scales": "mixer.cache",
            **norms,
        },
        "post_attention_norm": "norm_2",
        "mlp": {"gate_up": draw(st.sampled_from((["ffn.w13"], ["ffn.w1", "ffn.w3"]))), "down": "ffn.w2"},
        "norm": "decoder.norm",
        "lm_head": "to_words",
    }


# ------------------------------------------------------------------------------------------------ RoPE scalings


def _scaling(draw: Draw, kind: str | None, pairs: int) -> tuple[Tree | None, int]:
    """The scaling of that kind, for so many rotating pairs, and max_position_embeddings."""
    if kind is None:
        return None, draw(st.sampled_from((64, 4096)))
    scaling = {"kind": kind, **SCALINGS[kind](draw, pairs)}
    original = scaling.get("original_max_position_embeddings")
    if original is None:
        return scaling, draw(_LENGTHS)
    return scaling, original * draw(st.sampled_from((4, 1, 2)))


def _with_factor(draw: Draw, pairs: int) -> Tree:
    return {"factor": draw(_FACTORS)}


def _dynamic_qwen1(draw: Draw, pairs: int) -> Tree:
    return {"train_length": draw(st.integers(4, 32))}


def _yarn(draw: Draw, pairs: int) -> Tree:
    beta_fast, beta_slow = draw(st.sampled_from(((32.0, 1.0), (4.0, 0.5), (1.0, 0.05))))
    mscale, mscale_all_dim = draw(st.sampled_from(((None, None), (1.0, 0.5), (0.7, 1.5))))
    return {
        "factor": draw(_FACTORS),
        "original_max_position_embeddings": draw(_LENGTHS),
        "attention_factor": draw(_ATTENTION_FACTORS),
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "truncate": not draw(_HALF),
    }


def _longrope(draw: Draw, pairs: int) -> Tree:
    def divisors(*values: float) -> list[float]:
        drawn: list[float] = draw(st.lists(st.sampled_from(values), min_size=pairs, max_size=pairs))
        return drawn

    return {
        "short_factor": divisors(1.0, 1.25, 1.5),
        "long_factor": divisors(2.0, 3.0, 6.0, 20.0),
        "original_max_position_embeddings": draw(_LENGTHS),
        "factor": draw(st.none() | _FACTORS),
        "attention_factor": draw(_ATTENTION_FACTORS),
    }


def _llama3(draw: Draw, pairs: int) -> Tree:
    low, high = draw(st.sampled_from(((1.0, 4.0), (0.25, 0.5), (0.1, 8.0))))
    return {
        "factor": draw(_FACTORS),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": draw(_LENGTHS),
    }


SCALINGS: dict[str, Callable[[Draw, int], Tree]] = {
    "linear": _with_factor,
    "ntk": _with_factor,
    "dynamic": _with_factor,
    "dynamic_qwen1": _dynamic_qwen1,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
_NEED_TWO_PAIRS = ("ntk", "dynamic", "dynamic_qwen1")
_NOT_IN_HUGGING_FACE = ("ntk", "dynamic_qwen1")
