"""A decoder's architecture, complete: what remains when a family's shared part and a variant are merged."""

from __future__ import annotations

from pydantic import Field

from qwenspec.spec.attention import Attention
from qwenspec.spec.base import Dtype, Model, PositiveInt
from qwenspec.spec.checkpoint import Checkpoint
from qwenspec.spec.head import Embedding, LmHead
from qwenspec.spec.mlp import Mlp
from qwenspec.spec.norm import Norm
from qwenspec.spec.rope import Rope


class Architecture(Model):
    """A dense decoder."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = Field(
        default=None, description="null: as many as attention heads (MHA); 1 is MQA, between is GQA."
    )
    intermediate_size: PositiveInt = Field(
        description="Width of gate and of up, each. Qwen-1's config.json stores twice this."
    )
    max_position_embeddings: PositiveInt
    dtype: Dtype = "bfloat16"
    tie_word_embeddings: bool = False
    norm: Norm
    attention: Attention = Attention()
    rope: Rope
    mlp: Mlp = Mlp()
    lm_head: LmHead | None = LmHead()
    embedding: Embedding | None = Field(
        default=None, description="Set for text-embedding models; lm_head is then null."
    )
    checkpoint: Checkpoint = Checkpoint(layout="qwen2")
