"""Generation from a TVM package: greedy against a plain loop, sampling, batches, chunks, stop tokens; wrong input."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parity.oracle import QWEN3, Oracle, some_ids, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

PROMPTS = [[5, 3, 8, 1, 9, 2], [7], [4] * 11]


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
        yield


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3, {"vocab_size": 300}))


@pytest.fixture(scope="module")
def module(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return import_package(emit(oracle.spec, "tvm", tmp_path_factory.mktemp("package")))


@pytest.fixture(scope="module")
def weights(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def model(module: ModuleType, weights: Path) -> Any:
    return module.Model.load(weights)


def part(module: ModuleType, name: str) -> ModuleType:
    """A module of the package; its __init__ hides `generate` behind the function of that name."""
    return importlib.import_module(f"{module.__name__}.{name}")


def tokens(stream: Any, prompts: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(prompts)]
    for token in stream:
        found[token.prompt].append(token.id)
    return found


def greedy_by_hand(oracle: Oracle, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_greedy_is_hugging_faces(oracle: Oracle, module: ModuleType, model: Any, chunk: int) -> None:
    sampling = module.Sampling(max_tokens=6)
    found = tokens(module.generate(model, PROMPTS, sampling, prefill_chunk_size=chunk, page_size=4), len(PROMPTS))
    assert found == [greedy_by_hand(oracle, prompt, 6) for prompt in PROMPTS]


def test_stop_tokens_end_one_sequence_and_not_the_others(module: ModuleType, model: Any) -> None:
    free = tokens(module.generate(model, PROMPTS, module.Sampling(max_tokens=8)), 3)
    stop = next(t for t in free[0] if t not in free[1] + free[2])
    sampling = module.Sampling(max_tokens=8, stop_tokens=frozenset([stop]))
    stream = list(module.generate(model, PROMPTS, sampling))
    found = tokens(stream, 3)
    assert found[0] == free[0][: free[0].index(stop) + 1]
    assert found[1:] == free[1:]
    assert {t.prompt: t.finished for t in stream if t.finished} == {0: "stop", 1: "length", 2: "length"}


def test_tokens_are_streamed(module: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes before the second is computed."""
    stream = module.generate(model, PROMPTS[:1], module.Sampling(max_tokens=3))
    next(stream)
    monkeypatch.setattr(type(model), "batch_decode", lambda *_: pytest.fail("decoded too early"))
    stream.close()


def test_a_seed_draws_the_same_alone_and_in_a_batch(module: ModuleType, model: Any) -> None:
    sampling = module.Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=7, max_tokens=10)
    batch = tokens(module.generate(model, PROMPTS, sampling), 3)
    alone = [tokens(module.generate(model, [p], sampling), 1)[0] for p in PROMPTS]
    assert batch == alone
    other = module.Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=8, max_tokens=10)
    assert tokens(module.generate(model, PROMPTS, other), 3) != batch


def test_draws_follow_the_distribution(module: ModuleType) -> None:
    """20,000 draws against softmax(logits / T), each count within five standard deviations."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, 4.0], np.float32)
    n, temperature = 20_000, 2.0
    sampling = module.Sampling(temperature=temperature)
    generator = np.random.default_rng(0)
    ids = part(module, "generate").sample(np.broadcast_to(logits, (n, 5)), sampling, [generator] * n).tolist()
    counts = Counter(ids)
    total = sum(math.exp(x / temperature) for x in logits.tolist())
    for i, x in enumerate(logits.tolist()):
        p = math.exp(x / temperature) / total
        assert abs(counts[i] - n * p) < 5 * math.sqrt(n * p * (1 - p))


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.integers(-16, 16).map(lambda i: i / 4), min_size=6, max_size=6, unique=True),
    top_k=st.integers(0, 7),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_and_top_p_keep_what_they_should(
    module: ModuleType, logits: list[float], top_k: int, top_p: float
) -> None:
    order = sorted(range(6), key=lambda i: -logits[i])[: top_k or 6]
    weights = [math.exp(logits[i]) for i in order]
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights) * (1 + 1e-5):
            break
        kept.append(i)
        mass += weight
    sampling = module.Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    rows = np.broadcast_to(np.array(logits, np.float32), (300, 6))
    drawn = part(module, "generate").sample(rows, sampling, [np.random.default_rng(1)] * 300)
    assert set(drawn.tolist()) <= set(kept)


def test_wrong_input_says_so(module: ModuleType, model: Any) -> None:
    with pytest.raises(ValueError, match="top_p"):
        module.Sampling(top_p=0.0)
    with pytest.raises(ValueError, match="every prompt needs a token"):
        next(module.generate(model, [[1], []]))
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary of 300"):
        next(module.generate(model, [[300]]))


# -------------------------------------------------------------------------------------------- the model's own methods


def test_embeds_come_from_numpy_too(oracle: Oracle, model: Any) -> None:
    """In any floating dtype, and then they are the model's."""
    ids = some_ids(oracle.spec, 5)
    embeds = model.embed(list(ids)).numpy()
    assert np.array_equal(embeds[0], oracle.state["model.embed_tokens.weight"].numpy()[ids])
    expected = oracle.logits(ids)
    for given_embeds in (
        embeds,
        embeds.astype(np.float64),
        np.asfortranarray(embeds),
        embeds.astype(ml_dtypes.bfloat16),
    ):
        cache = model.create_paged_kv_cache(1, 16, 16)
        cache.add_sequence(0)
        cache.begin_forward([0], [5])
        found = model.batch_verify(given_embeds, cache).numpy()[0]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([300], r"ids: 300 is not in 0 … 299"),
        ([5, -1], r"ids: -1 is not in 0 … 299"),
        ([], r"ids are int32 or int64 \[n\], at least one, and not float64 \[0\]"),
        ([[1, 2]], r"ids are int32 or int64 \[n\], at least one, and not int64 \[1, 2\]"),
        ([1.5], r"ids are int32 or int64 \[n\], at least one, and not float64 \[1\]"),
    ],
)
def test_wrong_ids(model: Any, ids: Any, message: str) -> None:
    """Compiled code would read elsewhere in memory."""
    with pytest.raises(ValueError, match=message):
        model.embed(ids)


def test_wrong_embeds_and_positions(model: Any) -> None:
    cache = model.create_paged_kv_cache(2, 64, 16)
    cache.add_sequence(0)
    embeds = model.embed([1, 2, 3])
    with pytest.raises(RuntimeError, match="no forward is open"):
        model.prefill(embeds, cache)
    cache.begin_forward([0], [3])
    with pytest.raises(ValueError, match="2 tokens are given, and begin_forward made room for 3"):
        model.prefill(model.embed([1, 2]), cache)
    with pytest.raises(ValueError, match=r"embeds are \[1, 3, 48\], and this method takes \[1, 1, 48\]"):
        model.decode(embeds, cache)
    with pytest.raises(ValueError, match=r"embeds are \[1, 3, 48\], and this method takes \[b, 1, 48\]"):
        model.batch_decode(embeds, cache)
    with pytest.raises(ValueError, match=r"embeds are \[3, 48\], and this method takes \[1, n, 48\]"):
        model.prefill(embeds.numpy()[0], cache)
    with pytest.raises(ValueError, match=r"embeds are float16 on cpu:0, the model float32 on cpu:0"):
        model.prefill(tvm.runtime.tensor(embeds.numpy().astype(np.float16)), cache)
    with pytest.raises(ValueError, match="logit_positions: 3 is not in 0 … 2"):
        model.batch_prefill(embeds, [3], cache)
    assert model.batch_prefill(embeds, [2, 0], cache).shape == (1, 2, 300)  # nothing of this closed the forward
    with pytest.raises(ValueError, match="support_sliding_window"):
        model.create_paged_kv_cache(1, 16, 16, support_sliding_window=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory in use")
def test_forwards_of_many_lengths_leave_no_memory_behind(model: Any) -> None:
    """Of 20 lengths around 2,000 tokens, each with logits of 2.4 MB and as much again within."""
    cache = model.create_paged_kv_cache(1, 2048, 2048)
    cache.add_sequence(0)
    used = []
    for n in range(1990, 2010):
        cache.begin_forward([0], [n])
        model.batch_verify(model.embed([1] * n), cache)
        cache.end_forward()
        cache.popn(0, n)
        used.append(int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024)
    assert used[-1] - used[1] < 10e6, f"{(used[-1] - used[1]) / 1e6:.0f} MB more after 18 more lengths"
