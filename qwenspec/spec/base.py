"""What every spec model shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """A frozen mapping in which an unknown key is an error and nothing is coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Dtype = Literal["bfloat16", "float16", "float32"]
LARGEST = 2**31 - 1  # of a size: what indices of 32 bits count
WIDEST = 2**20  # of what every step of a model's description goes through
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
