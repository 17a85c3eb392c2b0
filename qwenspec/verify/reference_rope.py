"""The rotary embedding of the float64 reference, from the papers and from what Hugging Face and Qwen-1 do."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qwenspec.spec.rope import (
    Dynamic,
    DynamicQwen1,
    Linear,
    Llama3,
    LongRope,
    Ntk,
    Rope,
    RopeScaling,
    Yarn,
)

Array = npt.NDArray[np.float64]


def inverse_frequencies(rope: Rope, dim: int, max_position: int, length: int) -> Array:
    """Radians a position of each pair of a head: [dim / 2].

    `dim` is the even number of a head's values that rotate, `max_position` is max_position_embeddings.
    `length` is the sequence's, in tokens; only dynamic, dynamic_qwen1 and longrope look at it."""
    theta = rope.theta
    match rope.scaling:
        case None:
            return _powers(theta, dim)
        case Linear(factor=factor):
            return _powers(theta, dim) / factor
        case Ntk(factor=factor):
            return _powers(_ntk_base(theta, dim, factor), dim)
        case Dynamic(factor=factor):
            stretch = factor * max(length, max_position) / max_position - (factor - 1)
            return _powers(_ntk_base(theta, dim, stretch), dim)
        case DynamicQwen1(train_length=train_length):
            return _powers(_ntk_base(theta, dim, qwen1_alpha(length, train_length)), dim)
        case Yarn() as yarn:
            return _yarn(theta, dim, yarn)
        case LongRope() as long:
            divisors = long.long_factor if length > long.original_max_position_embeddings else long.short_factor
            return _powers(theta, dim) / np.array(divisors, dtype=np.float64)
        case Llama3() as llama3:
            return np.array([_llama3(frequency, llama3) for frequency in _powers(theta, dim)])


def attention_factor(scaling: RopeScaling | None, max_position: int) -> float:
    """What cos and sin are multiplied by."""
    match scaling:
        case Yarn() as yarn:
            if yarn.attention_factor is not None:
                return yarn.attention_factor
            if yarn.mscale is not None and yarn.mscale_all_dim is not None:
                return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
            return _mscale(yarn.factor, 1.0)
        case LongRope() as long:
            original = long.original_max_position_embeddings
            factor = max_position / original if long.factor is None else long.factor
            if long.attention_factor is not None:
                return long.attention_factor
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        case _:
            return 1.0


def rotate(x: Array, positions: npt.NDArray[np.int64], frequencies: Array, factor: float) -> Array:
    """Turn the first 2 · len(frequencies) values of every head by position · frequency: [n, heads, head_dim].

    Value i is paired with value i + len(frequencies) (rotate-half); the values after them pass through."""
    half = len(frequencies)
    angles = positions[:, None, None] * frequencies  # [n, 1, half]
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def qwen1_alpha(length: int, train_length: int) -> int:
    """Qwen-1's step: 2^(k + 1) - 1 for the smallest k with length ≤ 2^k · train_length: 1, 3, 7, 15 …"""
    k = 0
    while length > train_length << k:
        k += 1
    return (2 << k) - 1


def _powers(base: float, dim: int) -> Array:
    powers: Array = base ** -(np.arange(0, dim, 2) / dim)
    return powers


def _ntk_base(theta: float, dim: int, alpha: float) -> float:
    """The base that leaves the fastest pair alone and slows the slowest by alpha."""
    return theta * math.pow(alpha, dim / (dim - 2))


def _yarn(theta: float, dim: int, yarn: Yarn) -> Array:
    """Pairs that turn more than beta_fast times in the original context stay, those that turn less than
    beta_slow times are slowed by the factor; between, a linear ramp over the pairs' indices
    (arXiv:2309.00071, 3.2)."""

    def pair_that_turns(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / rotations
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as Hugging Face does, so that the ramp becomes a step
    slowed: Array = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    unscaled = _powers(theta, dim)
    return unscaled * (1 - slowed) + unscaled / yarn.factor * slowed


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequency: float, scaling: Llama3) -> float:
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - kept) * frequency / scaling.factor + kept * frequency
