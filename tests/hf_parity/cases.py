"""What is compared: changes to a tiny model, one feature each, and random combinations of them."""

from __future__ import annotations

import random
from typing import Any

from hf_parity.oracle import QWEN1, QWEN2, QWEN3, merge

Change = dict[str, Any]


def attention(**settings: Any) -> Change:
    return {"attention": settings}


def scaling(kind: str, **settings: Any) -> Change:
    return {"rope": {"scaling": {"kind": kind, **settings}}}


def sliding(window: int, layers: Any = "all") -> Change:
    return attention(sliding_window={"window": window, "layers": layers})


LENGTH = 40  # of the longest sequence; longer than max_position_embeddings or the original length where it matters
SHORT_FACTOR, LONG_FACTOR = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
ALL_BIASES = merge(attention(bias={"qkv": True, "output": True}), {"mlp": {"bias": True}})
THREE_LAYERS = {"num_hidden_layers": 3}
QWEN1_LONG = merge(scaling("dynamic_qwen1", train_length=8), attention(logn={"train_length": 8}))

SCALINGS: dict[str, Change] = {
    "linear": scaling("linear", factor=4.0),
    "dynamic-below": merge(scaling("dynamic", factor=2.0), {"max_position_embeddings": LENGTH}),
    "dynamic-beyond": merge(scaling("dynamic", factor=2.0), {"max_position_embeddings": 16}),
    "yarn": scaling("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn-attention-factor": scaling(
        "yarn", factor=8.0, original_max_position_embeddings=256, attention_factor=0.8, truncate=False
    )
    | {"max_position_embeddings": 2048},
    "yarn-mscale": scaling(
        "yarn",
        factor=40.0,
        original_max_position_embeddings=2048,
        mscale=1.0,
        mscale_all_dim=0.5,
        beta_fast=16.0,
        beta_slow=2.0,
    )
    | {"max_position_embeddings": 81920},
    "llama3": scaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "longrope-short": scaling(
        "longrope",
        short_factor=SHORT_FACTOR,
        long_factor=LONG_FACTOR,
        original_max_position_embeddings=LENGTH,
        factor=4.0,
    )
    | {"max_position_embeddings": 4 * LENGTH},
    "longrope-long": scaling(
        "longrope", short_factor=SHORT_FACTOR, long_factor=LONG_FACTOR, original_max_position_embeddings=16
    ),
}

NATIVE: dict[str, list[Change]] = {
    "qwen2": [QWEN2],
    "qwen2-tied": [QWEN2, {"tie_word_embeddings": True}],
    "qwen2-one-kv-head": [QWEN2, {"num_key_value_heads": 1}],
    "qwen2-all-kv-heads": [QWEN2, {"num_key_value_heads": None}],
    "qwen2-derived-head-dim": [QWEN2, {"hidden_size": 64}, attention(head_dim=None)],
    "qwen2-eps": [QWEN2, {"norm": {"eps": 1e-2}}],
    "qwen3": [QWEN3],
    "qwen3-tied": [QWEN3, {"tie_word_embeddings": True}],
    "qwen3-bias": [QWEN3, attention(bias={"qkv": True, "output": True})],
    "qwen3-one-kv-head": [QWEN3, {"num_key_value_heads": 1}],
    "qwen3-all-kv-heads": [QWEN3, {"num_key_value_heads": 4}],
    "qwen2-sliding-all": [QWEN2, sliding(8)],
    "qwen3-sliding-from": [QWEN3, THREE_LAYERS, sliding(5, {"from": 1})],
    "qwen3-sliding-some": [QWEN3, THREE_LAYERS, sliding(16, [0, 2])],
    "qwen3-sliding-one": [QWEN3, sliding(1)],
    "qwen3-embedding": [QWEN3, {"lm_head": None, "embedding": {"normalize": True}}],
    "qwen3-embedding-raw": [QWEN3, {"lm_head": None, "embedding": {"normalize": False}}],
    **{f"qwen3-{name}": [QWEN3, change] for name, change in SCALINGS.items()},
    **{f"qwen2-{name}": [QWEN2, SCALINGS[name]] for name in ("yarn", "dynamic-beyond")},
    **{
        f"qwen2-{act}": [QWEN2, {"mlp": {"activation": act}}]
        for act in ("gelu", "relu", "swish", "gelu_new", "gelu_pytorch_tanh")
    },
}

DERIVED: dict[str, list[Change]] = {
    "no-bias-no-norm": [],
    "output-bias": [attention(bias={"output": True})],
    "all-biases": [QWEN3, ALL_BIASES],
    "scale": [QWEN2, attention(scale=0.1)],
    "one-plus-norm": [QWEN3, {"norm": {"weight": "one_plus"}}],
    "ntk": [QWEN3, scaling("ntk", factor=8.0)],
    "qwen1": [QWEN1],
    "qwen1-ntk": [QWEN1, scaling("dynamic_qwen1", train_length=8)],
    "qwen1-logn": [QWEN1, attention(logn={"train_length": 8})],
    "qwen1-long": [QWEN1, QWEN1_LONG],
    "logn-after-qk-norm": [QWEN3, attention(logn={"train_length": 4})],
}

CASES = NATIVE | DERIVED


# Weights from the full rotary embedding's Hugging Face model, logits from the reference.
PARTIAL_ROTARY: dict[str, list[Change]] = {
    f"{name}-rotary-{partial}": [change, {"rope": {"partial_rotary_factor": partial}}]
    for name, change in (("qwen2", QWEN2), ("qwen3", QWEN3), ("yarn", SCALINGS["yarn"]))
    for partial in (0.25, 0.5)
}


def changes(case: str) -> list[Change]:
    """Of one of CASES or PARTIAL_ROTARY; `random-7` is the combination of that seed."""
    if case.startswith("random-"):
        return random_case(int(case.removeprefix("random-")))
    return (CASES | PARTIAL_ROTARY)[case]


def random_case(seed: int) -> list[Change]:
    """One value of every feature at once."""
    draw = random.Random(seed)
    rope = draw.choice([{}, scaling("ntk", factor=3.0), *SCALINGS.values()])
    return [
        draw.choice([QWEN2, QWEN3]),
        {
            "num_hidden_layers": draw.choice([2, 3]),
            "num_key_value_heads": draw.choice([1, 2, 4]),
            "tie_word_embeddings": draw.random() < 0.5,
        },
        attention(bias={"qkv": draw.random() < 0.5, "output": draw.random() < 0.5}),
        attention(scale=draw.choice([None, 0.2])),
        attention(logn=draw.choice([None, {"train_length": 8}])),
        {"norm": {"eps": draw.choice([1e-6, 1e-5]), "weight": draw.choice(["plain", "one_plus"])}},
        {"mlp": {"activation": draw.choice(["silu", "gelu", "gelu_new"]), "bias": draw.random() < 0.5}},
        draw.choice([{}, sliding(6), sliding(9, {"from": 1}), sliding(17, [0])]),
        {"rope": {"theta": draw.choice([1e4, 1e6])}},
        rope,
    ]
