"""Where two computations part: every module's output on both sides, and which module is to blame.

Errors travel: whatever follows a wrong module is wrong too, and rounding grows from layer to layer. So a module is
judged by its inputs, which its address tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]


ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of one operation, relative
SMALL_ROW = 0.01  # of the mean row's length: a shorter row is judged as if it had this

# How many times its inputs' error a sound module's may be: twice what 69 sound packages of random weights showed, each
# in float32 and bfloat16, with outliers in most matrices. The MLP's product has two factors' errors.
GROWTH = {"attention.context": 64.0, "mlp.down_proj": 12.0, "logits": 10.0}
OTHER_GROWTH = 6.0
SOFTMAX_GROWTH = 2.0  # the context's, times one more than the largest score, up to what GROWTH says

STREAM = "stream"  # the residual stream that a layer starts from: of the layer before, or embed_tokens
INPUTS: dict[str, tuple[str, ...]] = {
    "embed_tokens": (),
    "input_norm": (STREAM,),
    "attention.qkv_proj": ("input_norm",),
    "attention.q_norm": ("attention.qkv_proj",),
    "attention.k_norm": ("attention.qkv_proj",),
    "attention.q": ("attention.q_norm",),
    "attention.k": ("attention.k_norm",),
    "attention.context": ("attention.q", "attention.k", "attention.qkv_proj"),
    "attention.o_proj": ("attention.context",),
    "attention": ("attention.o_proj",),
    "post_attention_norm": (STREAM, "attention"),
    "mlp.gate_up_proj": ("post_attention_norm",),
    "mlp.down_proj": ("mlp.gate_up_proj",),
    "mlp": ("mlp.down_proj",),
    "": (STREAM, "attention", "mlp"),  # the layer itself
    "norm": (STREAM,),
    "logits": ("norm",),
}


@dataclass(frozen=True)
class ModuleError:
    """How far a module's output is from what was expected: of the worst row, as a share of its length."""

    address: str
    error: float  # infinite where either is not finite, or the shapes differ


def module_errors(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> list[ModuleError]:
    """Of every address that both have, in the order of `expected`: the worst row's ‖actual - expected‖ / ‖expected‖.

    Outputs are [n, …], a row a token, in any two shapes of as many values. Raises ValueError for no address at all."""
    both = [address for address in expected if address in actual]
    found = [ModuleError(address, _error(actual[address], expected[address])) for address in both]
    if not found:
        raise ValueError(f"no address in common: {[*actual]} and {[*expected]}")
    return found


def first_parting(
    actual: Mapping[str, Array], expected: Mapping[str, Array], bound: float, dtype: str
) -> ModuleError | None:
    """The module whose own contribution is wrong; None if no module is off by more than `bound`.

    It is the first, in the order of `expected`, that is off by more than `bound` and by more than its inputs explain:
    the largest error among them, or one rounding in `dtype`, times what such a module makes of it (`GROWTH`). Where
    inputs explain every module that is off by more than `bound`, it is the one that they explain least: a slight
    fault, which later modules made larger."""
    errors = {module.address: module.error for module in module_errors(actual, expected)}
    if max(errors.values()) <= bound:
        return None
    unexplained = _unexplained(errors, expected, ROUNDING[dtype])
    wrong = [address for address in errors if errors[address] > bound and unexplained[address] > 1]
    address = wrong[0] if wrong else max(unexplained, key=lambda address: unexplained[address])
    return ModuleError(address, errors[address])


def _error(actual: Array, expected: Array) -> float:
    n = len(expected)
    if len(actual) != n or actual.size != expected.size:
        return np.inf
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return np.inf
    rows = expected.reshape(n, -1).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    # Where every row is zero, a share of anything is too much.
    floor = max(SMALL_ROW * float(lengths.mean()), float(np.finfo(np.float32).tiny))
    distances = np.linalg.norm(actual.reshape(n, -1) - rows, axis=1)
    return float((distances / np.maximum(lengths, floor)).max())


def _unexplained(errors: Mapping[str, float], expected: Mapping[str, Array], rounding: float) -> dict[str, float]:
    """Each module's error as a multiple of the largest that its inputs explain."""
    found, stream = {}, "embed_tokens"
    for address, error in errors.items():
        layer, name = _split(address)
        inputs = max((errors.get(i, 0.0) for i in _inputs(layer, name, stream, errors)), default=0.0)
        explained = _growth(address, name, expected) * max(inputs, rounding)
        found[address] = error / explained if np.isfinite(explained) else 0.0
        if not name:
            stream = address
    return found


def _growth(address: str, name: str, expected: Mapping[str, Array]) -> float:
    growth = GROWTH.get(name, OTHER_GROWTH)
    if name != "attention.context":
        return growth
    # Softmax turns a score's absolute error into a relative one. No score is larger than the product of two lengths,
    # over the root of head_dim, as nearly every model scales them.
    q, k = (expected[address.replace("context", kind)] for kind in "qk")
    score = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(q.shape[-1])
    return min(SOFTMAX_GROWTH * (1 + float(score)), growth)


def _split(address: str) -> tuple[str, str]:
    """`layers.1.attention.q` -> `layers.1`, `attention.q`; outside of layers: an empty string and the address."""
    match = re.fullmatch(r"(layers\.\d+)\.?(.*)", address)
    return (match[1], match[2]) if match else ("", address)


def _inputs(layer: str, name: str, stream: str, errors: Mapping[str, float]) -> Iterator[str]:
    """Addresses of what a module reads; in place of one that is not there, a QK-norm say, of what that reads."""
    for key in INPUTS[name]:
        address = stream if key == STREAM else ".".join(part for part in (layer, key) if part)
        if address in errors or key == STREAM:
            yield address
        else:
            yield from _inputs(layer, key, stream, errors)
