"""Normalisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwenspec.spec.base import Model, PositiveFloat


class Norm(Model):
    """RMSNorm: x / sqrt(mean(x²) + eps) · w, statistics in float32."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = Field(description="Added to the mean square. 1e-6, but 1e-5 for Qwen2.5 from 14B on.")
    weight: Literal["plain", "one_plus"] = Field(
        default="plain",
        description="plain: x̂ is cast to the activation dtype, then multiplied by w. one_plus: x̂ · (1 + w) in float32.",
    )
