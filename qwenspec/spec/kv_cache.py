"""Quantised keys and values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenspec.spec.base import Model


class Fp8KvCache(Model):
    """float8 e4m3: a byte a value."""

    scheme: Literal["fp8_e4m3"]
    scales: Literal["token", "checkpoint"] = Field(
        default="token",
        description="token: one a token and head, computed when the token is cached. checkpoint: one a layer for keys "
        "and one for values, as the checkpoint has them.",
    )


class Int8KvCache(Model):
    """int8, symmetric, a scale for each token and head: a byte a value."""

    scheme: Literal["int8"]


KvCache = Annotated[Fp8KvCache | Int8KvCache, Field(discriminator="scheme")]
