"""A spec file as people write it, and a spec: one of its variants, merged and validated."""

from __future__ import annotations

import hashlib
import json
import keyword
import re
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.base import Model
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.kv_cache import KvCache
from qwenspec.spec.quantization import Quantization

VARIANT_NAME = "[A-Za-z](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
BESIDE = ("quantization", "kv_cache")  # the architecture: keys of a document, a variant and a spec

Extends = Field(
    default=None,
    min_length=1,
    description="Start from another variant: `other.yaml#variant` (relative to this file), `#variant`, or "
    "`qwenspec:variant` of those that come with qwenspec.",
)


class Variant(Model):
    """What a variant says beside the keys of an architecture, which it may all have."""

    model_config = ConfigDict(extra="allow")

    description: str = Field(default="", description="What this variant is, for people.")
    extends: str | None = Extends
    quantization: dict[str, Any] | None = Field(
        default=None, description="How the weights are quantised; merged over the file's."
    )
    kv_cache: dict[str, Any] | None = Field(
        default=None, description="How keys and values are quantised; merged over the file's."
    )


class Document(Model):
    """A family of decoders: what its variants share, and the variants."""

    schema_version: Literal[1] = Field(description="The version of this format.")
    family: str = Field(min_length=1, description="The family's name; the only variant's when there are no `variants`.")
    description: str = Field(default="", description="What the family is, for people.")
    extends: str | None = Extends
    default_variant: str | None = Field(default=None, description="The variant that is meant when none is named.")
    architecture: dict[str, Any] = Field(
        default={}, description="What all variants share; a variant may override any key."
    )
    quantization: dict[str, Any] | None = Field(
        default=None, description="How the weights are quantised; null: not at all."
    )
    kv_cache: dict[str, Any] | None = Field(
        default=None, description="How keys and values are quantised; null: they are of the model's dtype."
    )
    variants: dict[str, Variant | None] | None = Field(
        default=None, description="Each variant's name, and its differences from the shared architecture."
    )


def names_a_variant(text: str) -> bool:
    """A variant's name becomes that of a folder and of a Python package."""
    return bool(re.fullmatch(VARIANT_NAME, text)) and len(text) <= 100 and not keyword.iskeyword(module_name(text))


def module_name(variant: str) -> str:
    """How a variant's name begins that of its packages."""
    return re.sub(r"[-.]", "_", variant).lower()


class Spec(Model):
    """One variant, complete. `sha256` ignores where it came from."""

    schema_version: Literal[1] = 1
    family: str
    variant: str
    description: str = ""
    architecture: Architecture
    quantization: Quantization | None = None
    kv_cache: KvCache | None = None
    layout: Layout  # architecture.checkpoint.layout, resolved
    file: str = Field(default="", exclude=True)
    # Keys and names that the command line put in place of what the file says.
    options: tuple[tuple[str, str], ...] = Field(default=(), exclude=True)

    @field_validator("variant")
    @classmethod
    def _is_a_name(cls, variant: str) -> str:
        if not names_a_variant(variant):
            raise ValueError("it cannot name a variant")
        return variant

    def sha256(self) -> str:
        """Hash of what the spec means: comments, order and file name do not change it."""
        meaning = self.model_dump(mode="json", by_alias=True, exclude={"description"})
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
