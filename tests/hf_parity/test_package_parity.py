"""Generated packages, on CPU, against Hugging Face: all positions, however the tokens are fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hf_parity.cases import CASES, LENGTH, PARTIAL_ROTARY
from hf_parity.conftest import Open
from hf_parity.oracle import Oracle, some_ids, tiny_spec
from qwenspec.backend.api import Cache, Runner
from qwenspec.verify.reference import Reference

ALL = [*CASES, *(f"random-{seed}" for seed in range(12))]
LENGTHS = (LENGTH, 23, 9)
Step = dict[int, int]  # sequence -> how many of its tokens
WHOLE: list[Step] = [{0: 40}, {1: 23}, {2: 9}]
CHUNKED: list[Step] = [{0: 7}] * 5 + [{1: 5}, {1: 16}, {1: 2}, {2: 3}, {2: 6}, {0: 5}]
MIXED: list[Step] = [
    {0: 11},
    {0: 1, 1: 7},
    {2: 9, 0: 5, 1: 1},
    {1: 1, 0: 1},
    {0: 9, 1: 13},
    {0: 1, 1: 1},
    {0: 12},
]


def prompts(oracle: Oracle, seed: int = 0) -> list[np.ndarray]:
    return [some_ids(oracle.spec, n, 3 * seed + i) for i, n in enumerate(LENGTHS)]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Every position and every logit, relative to the largest logit."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def new_cache(runner: Runner, lengths: Sequence[int | None] = LENGTHS, **settings: bool) -> Cache:
    """Pages of 4 tokens, so that every sequence has several."""
    cache = runner.create_paged_kv_cache(
        max_batch_size=4, max_total_seq_len=160, prefill_chunk_size=64, page_size=4, **settings
    )
    for sequence, length in enumerate(lengths):
        cache.add_sequence(sequence, prompt_length=length)
    return cache


def feed(runner: Runner, cache: Cache, ids: list[np.ndarray], steps: list[Step]) -> list[np.ndarray]:
    """Each sequence's logits of all its tokens, fed step by step."""
    found: list[list[np.ndarray]] = [[] for _ in ids]
    done = [0] * len(ids)
    for step in steps:
        tokens = np.concatenate([ids[s][done[s] : done[s] + n] for s, n in step.items()])
        cache.begin_forward(list(step), list(step.values()))
        logits = runner.batch_verify(runner.embed(tokens), cache)
        cache.end_forward()
        assert logits.dtype == np.float32
        assert logits.shape[:2] == (1, len(tokens))
        for s, part in zip(step, np.split(logits[0], np.cumsum(list(step.values()))[:-1]), strict=True):
            found[s].append(part)
            done[s] += step[s]
    assert done == [len(i) for i in ids]
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize("case", ALL)
def test_prefill_chunks_and_mixed_batches(case: str, open_case: Open) -> None:
    oracle, runner = open_case(case)
    ids = prompts(oracle)
    expected = [oracle.logits(i) for i in ids]
    for steps in (WHOLE, CHUNKED, MIXED):
        for actual, wanted in zip(feed(runner, new_cache(runner), ids, steps), expected, strict=True):
            assert_close(actual, wanted)


@pytest.mark.parametrize("case", ALL)
def test_decode(case: str, open_case: Open) -> None:
    """A batch of prompts, then a token of each at a time; and the first prompt alone."""
    oracle, runner = open_case(case)
    ids = prompts(oracle)
    expected = [oracle.logits(i) for i in ids]
    starts = [len(i) - 8 for i in ids]
    cache = new_cache(runner)
    cache.begin_forward([0, 1, 2], starts)
    tokens = np.concatenate([i[:n] for i, n in zip(ids, starts, strict=True)])
    last = np.cumsum(starts, dtype=np.int32) - 1
    logits = runner.batch_prefill(runner.embed(tokens), last, cache)
    cache.end_forward()
    assert_close(logits[0], np.stack([e[n - 1] for e, n in zip(expected, starts, strict=True)]))
    for step in range(8):
        tokens = np.array([i[n + step] for i, n in zip(ids, starts, strict=True)], dtype=np.int32)
        cache.begin_forward([0, 1, 2], [1, 1, 1])
        logits = runner.batch_decode(runner.embed(tokens)[0][:, None], cache)
        cache.end_forward()
        assert_close(logits[:, 0], np.stack([e[n + step] for e, n in zip(expected, starts, strict=True)]))

    alone = new_cache(runner)
    alone.begin_forward([0], [20])
    assert_close(runner.prefill(runner.embed(ids[0][:20]), alone)[0], expected[0][19:20])
    alone.end_forward()
    for n in range(20, LENGTH):
        alone.begin_forward([0], [1])
        assert_close(runner.decode(runner.embed(ids[0][n : n + 1]), alone)[0], expected[0][n : n + 1])
        alone.end_forward()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("steps", [CHUNKED, MIXED], ids=["chunked", "mixed"])
def test_pages_behind_every_window_are_given_back(steps: list[Step], open_case: Open) -> None:
    oracle, runner = open_case("qwen2-sliding-all")
    ids = prompts(oracle)
    found = feed(runner, new_cache(runner, support_sliding_window=True), ids, steps)
    for actual, i in zip(found, ids, strict=True):
        assert_close(actual, oracle.logits(i))


@pytest.mark.parametrize("case", ["qwen3", "qwen3-sliding-some"])
def test_pages_that_some_layer_needs_are_not_promised_back(case: str, open_case: Open) -> None:
    assert_keeps_pages(open_case(case)[1])


@pytest.mark.parametrize("backend", ["tvm"], indirect=True)
def test_a_cache_that_keeps_all_pages_promises_none(open_case: Open) -> None:
    assert_keeps_pages(open_case("qwen2-sliding-all")[1])


def assert_keeps_pages(runner: Runner) -> None:
    with pytest.raises(ValueError, match="support_sliding_window"):
        new_cache(runner, support_sliding_window=True)


@pytest.mark.parametrize("n", [7, 8, 9])
def test_lengths_around_a_window(n: int, open_case: Open) -> None:
    oracle, runner = open_case("qwen2-sliding-all")
    ids = some_ids(oracle.spec, n)
    expected = oracle.logits(ids)
    assert_close(feed(runner, new_cache(runner, [None]), [ids], [{0: n}])[0], expected)
    assert_close(feed(runner, new_cache(runner, [None]), [ids], [{0: 1}] * n)[0], expected)


@pytest.mark.parametrize("prompt", [5, 9, 17])
@pytest.mark.parametrize("case", ["qwen1-ntk", "qwen1-long", "qwen3-dynamic-beyond", "qwen3-longrope-long"])
def test_decoding_past_a_threshold_of_length(case: str, prompt: int, open_case: Open) -> None:
    """With no length told in advance, against the float64 reference: 8, 16 and 32 are thresholds."""
    oracle, runner = open_case(case)
    ids = some_ids(oracle.spec, LENGTH)
    sequence = Reference(oracle.spec, oracle.weights()).sequence()
    expected = [
        sequence.forward(ids[:prompt]),
        *(sequence.forward(ids[n : n + 1]) for n in range(prompt, LENGTH)),
    ]
    steps = [{0: prompt}] + [{0: 1}] * (LENGTH - prompt)
    assert_close(feed(runner, new_cache(runner, [None]), [ids], steps)[0], np.concatenate(expected))


@pytest.mark.parametrize("told", [None, LENGTH])
@pytest.mark.parametrize("case", ["qwen1-long", "qwen3-dynamic-beyond", "qwen3-longrope-long", "qwen3"])
def test_fork_and_rollback_around_a_threshold(case: str, told: int | None, open_case: Open) -> None:
    oracle, runner = open_case(case)
    ids = some_ids(oracle.spec, LENGTH)
    parent = Reference(oracle.spec, oracle.weights()).sequence(prompt_length=told)
    cache = new_cache(runner, [told])

    def both(sequence: int, reference, tokens: np.ndarray) -> None:
        cache.begin_forward([sequence], [len(tokens)])
        logits = runner.batch_verify(runner.embed(tokens), cache)[0]
        cache.end_forward()
        assert_close(logits, reference.forward(tokens))

    both(0, parent, ids[:14])
    cache.fork_sequence(0, 1, at=6)
    child = parent.fork(at=6)
    both(1, child, ids[20:36])
    cache.popn(1, 9)
    child.popn(9)
    both(1, child, ids[36:38])
    both(0, parent, ids[14:20])


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3-tied", "qwen3-yarn", "qwen2-sliding-all", "qwen1-long"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(case: str, dtype: str, open_case: Open) -> None:
    """No further from Hugging Face in float32 than Hugging Face in the same dtype is, times 1.5.

    One batch's largest error is noise: it is one token's, and another's on another CPU. The mean over many is not."""
    oracle, runner = open_case(case, dtype)
    ours, theirs = [], []
    for seed, steps in enumerate((WHOLE, MIXED, CHUNKED, MIXED) * 3):
        ids = prompts(oracle, seed)
        exact = np.concatenate([oracle.logits(i) for i in ids])
        theirs.append(np.concatenate([oracle.logits(i, getattr(torch, dtype)) for i in ids]) - exact)
        ours.append(np.concatenate(feed(runner, new_cache(runner), ids, steps)) - exact)
    largest, wanted = (np.abs(errors).max((1, 2)).mean() for errors in (ours, theirs))
    assert largest <= 1.5 * wanted
    assert np.linalg.norm(ours) <= 1.5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "all-biases", "qwen1-long"])
def test_every_module_agrees_with_the_reference(case: str, open_case: Open) -> None:
    """Addresses are the same on both sides, and in the same order."""
    oracle, runner = open_case(case)
    ids = some_ids(oracle.spec, LENGTH)
    cache = new_cache(runner, [None])
    cache.begin_forward([0], [LENGTH])
    expected, actual = Reference(oracle.spec, oracle.weights()).taps(ids), runner.taps(ids, cache)
    cache.end_forward()
    assert list(actual) == list(expected)
    for address, output in expected.items():
        assert_close(actual[address].reshape(LENGTH, -1), output.reshape(LENGTH, -1))


@pytest.mark.parametrize("case", PARTIAL_ROTARY)
def test_partial_rotary(case: str, open_case: Open) -> None:
    oracle, runner = open_case(case)
    spec = tiny_spec(*PARTIAL_ROTARY[case])
    ids = prompts(oracle)
    reference = Reference(spec, oracle.weights())
    for actual, tokens in zip(feed(runner, new_cache(runner), ids, MIXED), ids, strict=True):
        assert_close(actual, reference.logits(tokens))
    assert np.abs(reference.logits(ids[0]) - oracle.logits(ids[0])).max() > 0.1  # it matters
