"""Beyond the blocks that kernels work in: sequences and layers larger than the machines draw, in a workload that is
certain to reach them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenspec.spec.document import Spec
from qwenspec.verify.case import Case
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Restart, Step
from qwenspec.verify.strategies import spec_of
from qwenspec.verify.weights import random_weights, save_checkpoint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["triton", "tvm"]
CHUNK = 75 if INTERPRETED else 100  # blocks of queries have 64 at most
SIZES = CacheSizes(page_size=16, pages=60, max_batch_size=3, chunk=CHUNK)
pytestmark = [pytest.mark.interpreter] if INTERPRETED else []


def wide_spec(sliding_window: Any = None, rope: Any = None) -> Spec:
    return spec_of(
        {
            "vocab_size": 40,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 600,
            "max_position_embeddings": 512,
            "dtype": "float32",
            "norm": {"eps": 1e-6},
            "attention": {"head_dim": 16, "bias": {"qkv": True}, "sliding_window": sliding_window},
            "rope": rope or {"theta": 10000.0},
            "mlp": {"activation": "gelu", "bias": True},
        }
    )


def steps(chunks: int) -> Iterator[Step]:
    """Chunks of one sequence, and then tokens of it and of its forks, alone and together."""

    def ids(n: int, seed: int) -> tuple[int, ...]:
        return tuple((7 * i + 11 * seed) % 40 for i in range(n))

    yield Poison(1)
    yield Add(0)
    for chunk in range(chunks):
        yield Forward({0: ids(CHUNK, chunk)}, "batch_verify")
    yield Forward({0: ids(1, 9)}, "decode")
    yield Fork(0, 1, CHUNK * chunks - 10)
    yield Add(2)
    yield Forward({2: ids(3, 4), 1: ids(5, 5), 0: ids(2, 6)}, "batch_verify")
    yield Popn(0, 4)
    yield Forward({0: ids(1, 7), 2: ids(1, 8), 1: ids(1, 9)}, "batch_decode")
    yield Forward({0: ids(4, 1), 1: ids(3, 2)}, "batch_verify", {0: (-1, -1, 1, 0), 1: (-1, 0, 0)})
    yield Commit({1: 2, 0: 3})
    yield Restart(SIZES)


@pytest.mark.parametrize("window", [None, 70, 270])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_and_wide_layers(backend: str, window: int | None, follow: Callable[..., None]) -> None:
    spec = wide_spec(sliding_window={"window": window} if window else None)
    follow(Case(spec, 4, "float32", SIZES, ("reference", backend)), steps(1 if INTERPRETED else 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_beyond_what_exp_can_hold(backend: str, follow: Callable[..., None], tmp_path: Path) -> None:
    """All scores by as much: a large bias of queries and keys, where RoPE does not turn them. softmax must not mind."""
    spec = wide_spec(rope={"theta": 10000.0, "partial_rotary_factor": 0.5})
    weights, biases = random_weights(spec, 5), 22.0  # 22 · 22 / sqrt(head_dim) is 121; float32 has e^88
    for head in range(2):
        weights["model.layers.0.self_attn.q_proj.bias"][16 * head + 15] = biases
    weights["model.layers.0.self_attn.k_proj.bias"][15] = biases
    save_checkpoint(spec, weights, tmp_path, "float32")
    follow(Case(spec, 0, "float32", SIZES, ("reference", backend), tmp_path), steps(1))
