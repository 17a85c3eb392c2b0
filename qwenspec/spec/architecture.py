"""A decoder's architecture, complete: what remains when a family's shared part and a variant are merged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwenspec.spec.attention import Attention
from qwenspec.spec.base import WIDEST, Dtype, Model, PositiveInt
from qwenspec.spec.checkpoint import Checkpoint
from qwenspec.spec.head import Embedding, LmHead
from qwenspec.spec.mlp import Mlp
from qwenspec.spec.norm import Norm
from qwenspec.spec.rope import Rope


class Architecture(Model):
    """A dense decoder."""

    vocab_size: PositiveInt = Field(description="Rows of the embedding; a tokenizer may use fewer.")
    hidden_size: Annotated[int, Field(gt=0, le=WIDEST)] = Field(description="Width of the residual stream.")
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] = Field(description="How many layers.")
    num_attention_heads: Annotated[int, Field(gt=0, le=1024)] = Field(description="How many query heads.")
    num_key_value_heads: PositiveInt | None = Field(
        default=None, description="null: as many as attention heads (MHA); 1 is MQA, between is GQA."
    )
    intermediate_size: PositiveInt = Field(
        description="Width of gate and of up, each. Qwen-1's config.json stores twice this."
    )
    max_position_embeddings: PositiveInt = Field(description="The longest sequence, in tokens.")
    dtype: Dtype = Field(default="bfloat16", description="Dtype of weights and activations.")
    tie_word_embeddings: bool = Field(default=False, description="The LM head is the embedding, transposed.")
    norm: Norm = Field(description="The norms before attention, before the MLP and at the end, and QK-norm's.")
    attention: Attention = Field(default=Attention(), description="Softmax attention.")
    rope: Rope = Field(description="Rotary position embedding.")
    mlp: Mlp = Field(default=Mlp(), description="The gated feed-forward.")
    lm_head: LmHead | None = Field(default=LmHead(), description="null for text-embedding models, which have none.")
    embedding: Embedding | None = Field(
        default=None, description="Set for text-embedding models; lm_head is then null."
    )
    checkpoint: Checkpoint = Field(
        default=Checkpoint(layout="qwen2"), description="Where a checkpoint keeps each tensor."
    )
