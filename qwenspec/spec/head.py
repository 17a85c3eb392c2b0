"""What the model returns: logits, or one embedding a sequence."""

from __future__ import annotations

from pydantic import Field

from qwenspec.spec.base import Dtype, Model


class LmHead(Model):
    """Logits over the vocabulary, always returned in float32."""

    dtype: Dtype | None = Field(default=None, description="Dtype of the head's weight and product. null: the model's.")


class Embedding(Model):
    """A text-embedding model (Qwen3-Embedding): the last token's final hidden state. It has no LM head."""

    normalize: bool = Field(default=True, description="Divide by the L2 norm.")
