"""Hypothesis strategies for the quantisation of drawn specs: each scheme's options, and what sizes they ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Fp8, Gptq, PackQuantized
from qwenspec.verify.dequantize import quantized_matrices

Draw = Callable[..., Any]
Tree = dict[str, Any]


def _fp8_block(draw: Draw) -> Tree:
    height, width = draw(st.sampled_from((16, 32, 8, 20, 9))), draw(st.sampled_from((16, 32, 8, 20, 9)))
    return {"block": [height, width], "activations": draw(st.sampled_from(("none", "dynamic")))}


def _fp8(draw: Draw) -> Tree:
    return {
        "scales": draw(st.sampled_from(("channel", "tensor"))),
        "activations": draw(st.sampled_from(("none", "dynamic", "static"))),
    }


def _awq(draw: Draw) -> Tree:
    return {"group_size": draw(st.sampled_from((16, 8, 32)))}


def _gptq(draw: Draw) -> Tree:
    return {
        "bits": draw(st.sampled_from((4, 8))),
        "group_size": draw(st.sampled_from((16, 8, 32, 20, 9, -1))),
        "sym": not draw(st.booleans()),
        "desc_act": draw(st.booleans()),
        "checkpoint_format": draw(st.sampled_from(("gptq", "gptq_v2"))),
    }


def _pack_quantized(draw: Draw) -> Tree:
    return {
        "bits": draw(st.sampled_from((4, 8))),
        "group_size": draw(st.sampled_from((16, 8, 32, 20, 9, -1))),
        "sym": not draw(st.booleans()),
        "desc_act": draw(st.booleans()),
    }


def _int8(draw: Draw) -> Tree:
    return {"head": draw(st.sampled_from(("none", "int8")))}


def _int4(draw: Draw) -> Tree:
    return {
        "group_size": draw(st.sampled_from((16, 8, 32, 20, 9))),
        "head": draw(st.sampled_from(("none", "int8", "int4"))),
    }


# Groups and blocks are small, so that small matrices have several, and the last one is often ragged.
QUANTIZATIONS: dict[str, Callable[[Draw], Tree]] = {
    "fp8_block": _fp8_block,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "pack_quantized": _pack_quantized,
    "int8": _int8,
    "int4": _int4,
}


def unit_of(quantization: Tree | None) -> int:
    """What sizes must be multiples of: what a word packs, and AWQ's groups."""
    match quantization:
        case {"scheme": "awq", "group_size": size}:
            return math.lcm(8, size)
        case {"scheme": "gptq", "bits": bits}:
            return 32 // int(bits)
        case _:
            return 1


def head_unit_of(quantization: Tree | None) -> int:
    """What a head's width must be a multiple of for no rank to cut what shares a scale."""
    match quantization:
        case {"block": [height, width]}:
            return math.lcm(2, height, width)
        case {"group_size": size} if size > 0:
            return math.lcm(2, size)
        case _:
            return 2


def _row_parallel(spec: Spec) -> list[str]:
    last = (spec.layout.attention.o, spec.layout.mlp.down)
    return [name for name in quantized_matrices(spec) if name.endswith(last)]


def skipped(spec: Spec, shared: bool) -> st.SearchStrategy[list[str]]:
    """Some of the quantised modules, but not all; one of them at most in two of three.

    shared: by ranks, so that all whose inputs would be shared, and have an order of their own or one scale a token, are
        among them"""
    names = list(quantized_matrices(spec))
    ordered = shared and (
        (isinstance(spec.quantization, Gptq | PackQuantized) and spec.quantization.desc_act)
        or (isinstance(spec.quantization, Fp8) and spec.quantization.activations == "dynamic")
    )
    always = _row_parallel(spec) if ordered else []

    def some(most: int) -> st.SearchStrategy[list[str]]:
        drawn = st.lists(st.sampled_from(names), max_size=min(most, len(names) - 1), unique=True)
        return drawn.map(lambda found: sorted({*found, *always}))

    return st.sampled_from((0, 1, 4)).flatmap(some)


KV_CACHES: dict[str, Tree] = {
    "int8": {"scheme": "int8"},
    "fp8": {"scheme": "fp8_e4m3"},
    "fp8, stored scales": {"scheme": "fp8_e4m3", "scales": "checkpoint"},
}
