"""The gated feed-forward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwenspec.spec.base import Model

Activation = Literal["silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"]


class Mlp(Model):
    """down(act(gate(x)) · up(x))."""

    activation: Activation = Field(
        default="silu",
        description="swish is silu; gelu_new and gelu_pytorch_tanh are the tanh approximation.",
    )
    bias: bool = Field(default=False, description="A bias on gate, up and down.")
