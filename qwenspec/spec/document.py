"""A spec: one variant of a family, merged and validated."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.base import Model
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.quantization import Quantization


class Spec(Model):
    """One variant, complete. Equality and `sha256` ignore where it came from."""

    schema_version: Literal[1] = 1
    family: str
    variant: str
    description: str = ""
    architecture: Architecture
    quantization: Quantization | None = None
    layout: Layout  # architecture.checkpoint.layout, resolved
    file: str = Field(default="", exclude=True)

    def sha256(self) -> str:
        """Hash of what the spec means: comments, order and file name do not change it."""
        meaning = self.model_dump(mode="json", by_alias=True, exclude={"description"})
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
