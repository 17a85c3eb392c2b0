"""Rotary position embedding: inverse frequencies and attention factors, a self-contained function a scaling.

A head's first `dim` values rotate in dim // 2 pairs (i, i + dim // 2). At position p pair i turns by
p · inv_freq[i] radians, and cos and sin are multiplied by the attention factor.
Backends copy the source text of the functions that a variant needs, so each uses `math` and nothing else.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import assert_never

from qwenspec.ir import nodes


def default(dim: int, theta: float) -> list[float]:
    """RoPE (arXiv:2104.09864): θ^(-2i/d)."""
    return [theta ** (-i / dim) for i in range(0, dim, 2)]


def linear(dim: int, theta: float, factor: float) -> list[float]:
    """Position interpolation (arXiv:2306.15595): θ^(-2i/d) / factor."""
    return [theta ** (-i / dim) / factor for i in range(0, dim, 2)]


def ntk(dim: int, theta: float, factor: float) -> list[float]:
    """NTK-aware interpolation (arXiv:2309.00071): the base becomes θ · factor^(d/(d-2)).

    The fastest pair keeps its frequency and the slowest one is divided by exactly `factor`.
    """
    base = theta * factor ** (dim / (dim - 2))
    return [base ** (-i / dim) for i in range(0, dim, 2)]


def dynamic(dim: int, theta: float, factor: float, max_position: int, length: int) -> list[float]:
    """Dynamic NTK as Hugging Face computes it: the base grows once the sequence outgrows `max_position`.

    base = θ · (factor · L / max_position - (factor - 1))^(d/(d-2)), where L = max(length, max_position).
    """
    stretch = factor * max(length, max_position) / max_position - (factor - 1)
    base = theta * stretch ** (dim / (dim - 2))
    return [base ** (-i / dim) for i in range(0, dim, 2)]


def dynamic_qwen1(dim: int, theta: float, train_length: int, length: int) -> list[float]:
    """Qwen-1's dynamic NTK (arXiv:2309.16609): base = θ · α^(d/(d-2)), where α moves in steps.

    α = max(2^ceil(log2(length / train_length) + 1) - 1, 1): 1 for up to train_length = T tokens, 3 up to 2T,
    7 up to 4T, 15 up to 8T. The prompt's length decides, and the choice holds for the whole sequence.
    """
    doublings = max(math.ceil(math.log2(length / train_length)), 0)
    alpha = 2 ** (doublings + 1) - 1
    base = theta * alpha ** (dim / (dim - 2))
    return [base ** (-i / dim) for i in range(0, dim, 2)]


def yarn(
    dim: int,
    theta: float,
    factor: float,
    original_max_position: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> list[float]:
    """YaRN (arXiv:2309.00071): slow pairs are interpolated, fast ones kept, with a ramp in between.

    Over the original context pair i makes original_max_position · θ^(-2i/d) / 2π turns. The ramp starts at
    `beta_fast` turns and ends at `beta_slow`; `truncate` widens it to whole pairs.
    """

    def pair_turning(rotations: float) -> float:
        return dim * math.log(original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001

    inv_freq = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        inv_freq.append(frequency / factor * ramp + frequency * (1 - ramp))
    return inv_freq


def longrope(
    dim: int,
    theta: float,
    short_factor: tuple[float, ...],
    long_factor: tuple[float, ...],
    original_max_position: int,
    length: int,
) -> list[float]:
    """LongRoPE (arXiv:2402.13753): each pair has its own divisor, θ^(-2i/d) / factor[i].

    `long_factor` serves sequences of more than `original_max_position` tokens, `short_factor` the others.
    """
    factors = long_factor if length > original_max_position else short_factor
    return [theta ** (-2 * i / dim) / factor for i, factor in enumerate(factors)]


def llama3(
    dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> list[float]:
    """Llama 3.1's scaling (arXiv:2407.21783; formula from its reference code), by how often a pair turns.

    A pair that turns fewer than `low_freq_factor` times over `original_max_position` tokens is divided by
    `factor`, one that turns more than `high_freq_factor` times is kept, and the rest is blended linearly.
    """
    inv_freq = []
    for i in range(0, dim, 2):
        frequency = theta ** (-i / dim)
        turns = original_max_position * frequency / (2 * math.pi)
        kept = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        inv_freq.append(frequency / factor * (1 - kept) + frequency * kept)
    return inv_freq


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What multiplies cos and sin under YaRN: m(1), or m(mscale) / m(mscale_all_dim) when both are given.

    m(s) = 0.1 · s · ln(factor) + 1 (arXiv:2309.00071, where s is 1), and 1 for a factor of at most 1.
    """

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    return m(mscale) / m(mscale_all_dim) if mscale and mscale_all_dim else m(1.0)


def longrope_attention_factor(factor: float, original_max_position: int) -> float:
    """What multiplies cos and sin under LongRoPE: sqrt(1 + ln(factor) / ln(original_max_position)).

    It is 1 for a factor of at most 1. As Hugging Face computes it, first for Phi-3 (arXiv:2404.14219).
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position)) if factor > 1 else 1.0


def formula(scaling: nodes.RopeScaling) -> Callable[..., list[float]]:
    """The function above that computes a scaling.

    Its parameters are `dim`, `theta`, the fields of the scaling's node and, where the frequencies follow the
    sequence, `length`.
    """
    match scaling:
        case nodes.DefaultRope():
            return default
        case nodes.LinearRope():
            return linear
        case nodes.NtkRope():
            return ntk
        case nodes.DynamicRope():
            return dynamic
        case nodes.DynamicQwen1Rope():
            return dynamic_qwen1
        case nodes.YarnRope():
            return yarn
        case nodes.LongRope():
            return longrope
        case nodes.Llama3Rope():
            return llama3
        case _:
            assert_never(scaling)


def follows_length(scaling: nodes.RopeScaling) -> bool:
    """Whether the frequencies depend on the sequence's length."""
    return "length" in inspect.signature(formula(scaling)).parameters


def frequencies(rope: nodes.Rope, length: int) -> list[float]:
    """The rotary_dim // 2 inverse frequencies, in radians a token, for a sequence of `length` tokens."""
    arguments = {field.name: getattr(rope.scaling, field.name) for field in fields(rope.scaling)}
    if follows_length(rope.scaling):
        arguments["length"] = length
    return formula(rope.scaling)(rope.rotary_dim, rope.theta, **arguments)
