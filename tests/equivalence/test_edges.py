"""Where one token more or less decides: the ends of pages and windows, and the lengths at which RoPE changes.

The machines come there by chance; these workloads come there for certain."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qwenspec.spec.document import Spec
from qwenspec.verify.case import Case
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step
from qwenspec.verify.strategies import spec_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["triton", "tvm"]
pytestmark = [pytest.mark.interpreter] if INTERPRETED else []

PAGE, WINDOW, TRAINED = 4, 6, 8
SIZES = CacheSizes(page_size=PAGE, pages=24, max_batch_size=3, chunk=40)
LENGTHS = {
    "dynamic": {"kind": "dynamic", "factor": 3.0},
    "dynamic_qwen1": {"kind": "dynamic_qwen1", "train_length": TRAINED},
    "longrope": {
        "kind": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [3.0, 6.0],
        "original_max_position_embeddings": TRAINED,
    },
}


def spec(scaling: dict[str, Any] | None = None, window: Any = None, kv_cache: Any = None) -> Spec:
    return spec_of(
        {
            "vocab_size": 50,
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "max_position_embeddings": TRAINED,
            "dtype": "float32",
            "norm": {"eps": 1e-6},
            "attention": {"head_dim": 4, "sliding_window": window},
            "rope": {"theta": 100.0, "scaling": scaling},
        },
        kv_cache=kv_cache,
    )


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple((7 * i + 11 * seed) % 50 for i in range(n))


def forks_and_rollbacks(lengths: list[int], told: list[int | None]) -> Iterator[Step]:
    """A prompt of each length, forked at each, and rolled back to each; then both go on, and are looked at together."""
    yield Poison(1)
    for number, (prompt, fork, back, length) in enumerate(itertools.product(lengths, lengths, lengths, told)):
        if max(fork, back) > prompt:
            continue
        yield Add(0, length)
        yield Forward({0: ids(prompt, number)}, "batch_verify")
        yield Fork(0, 1, fork)
        yield Popn(0, prompt - back)
        yield Forward({0: ids(3, number + 1)}, "batch_prefill")
        yield Forward({1: ids(1, number + 2), 0: ids(1, number + 3)}, "batch_decode")
        yield Remove(0)
        yield Forward({1: ids(4, number + 4)}, "batch_verify", {1: (-1, 0, 0, 2)})
        yield Commit({1: 3})
        yield Forward({1: ids(3, number + 5)}, "batch_verify")
        yield Remove(1)
    yield Restart(SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [None, "all", [1]], ids=["full", "sliding", "mixed"])
def test_pages_and_windows(layers: Any, backend: str, follow: Callable[..., None]) -> None:
    window = layers and {"window": WINDOW, "layers": layers}
    case = Case(spec(window=window), 1, "float32", SIZES, ("reference", backend))
    lengths = [PAGE, WINDOW + 1] if INTERPRETED else [1, PAGE - 1, PAGE, PAGE + 1, WINDOW + 1, 2 * PAGE]
    follow(case, forks_and_rollbacks(lengths, [None]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", [] if INTERPRETED else LENGTHS)  # kernels are told of no length
def test_lengths_that_rope_follows(scaling: str, backend: str, follow: Callable[..., None]) -> None:
    case = Case(spec(LENGTHS[scaling]), 2, "float32", SIZES, ("reference", backend))
    follow(case, forks_and_rollbacks([1, TRAINED, TRAINED + 1, 2 * TRAINED + 1], [None, TRAINED + 1]))
