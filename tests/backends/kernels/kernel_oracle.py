"""What each kernel computes, in float64, one formula after the other.

Each function also returns a magnitude: the same sum over absolute values. Rounding errors are proportional to it,
whatever cancels in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]  # value, magnitude


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Result:
    x, weight = x.double(), weight.double()
    out = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight if one_plus else weight)
    return out, out.abs()


def act_and_mul(gate_up: Tensor, activation: str) -> Result:
    gate, up = gate_up.double().chunk(2, dim=-1)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    act = {
        "silu": gate / (1 + torch.exp(-gate)),
        "relu": torch.where(gate > 0, gate, torch.zeros_like(gate)),
        "gelu": gate * 0.5 * torch.erfc(-gate / math.sqrt(2)),
        "gelu_tanh": 0.5 * gate * (1 + torch.tanh(cubic)),
    }[activation]
    # 1 + erf and 1 + tanh lose digits where the result is a small part of the gate: at most 2^-24 of it.
    return act * up, act.abs() * up.abs() + 1e-2 * (gate * up).abs()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Result:
    """x [n, heads, head_dim]; cos, sin [n, rotary_dim / 2]."""
    half = cos.shape[-1]
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    out, magnitude = x.clone(), x.abs()
    for i in range(half):
        a, b, c, s = x[..., i], x[..., half + i], cos[..., i], sin[..., i]
        out[..., i], out[..., half + i] = a * c - b * s, b * c + a * s
        magnitude[..., i] = (a * c).abs() + (b * s).abs()
        magnitude[..., half + i] = (b * c).abs() + (a * s).abs()
    return out, magnitude


def path(parents: Sequence[int], node: int) -> list[int]:
    """A tree's nodes from the root to this one."""
    return ([] if parents[node] < 0 else path(parents, parents[node])) + [node]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, parents: Sequence[int] | None = None
) -> Result:
    """The last n of L tokens: q [n, heads, head_dim], k and v [L, kv_heads, head_dim] -> [n, heads, head_dim].

    parents: these tokens are a tree's, and each follows its parent, or what came before for -1."""
    n, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    q, k, v = q.double(), k.double(), v.double()
    out, magnitude = torch.empty_like(q), torch.empty_like(q)
    for i in range(n):
        new = range(i + 1) if parents is None else path(parents, i)
        seen = [*range(length - n), *(length - n + node for node in new)][-(window or length) :]
        for head in range(heads):
            shared = head // (heads // kv_heads)
            weights = torch.softmax(scale * (k[seen, shared] @ q[i, head]), dim=0)
            out[i, head] = weights @ v[seen, shared]
            magnitude[i, head] = weights @ v[seen, shared].abs()
    return out, magnitude
