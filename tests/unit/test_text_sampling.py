"""How the next token is chosen, in both backends: the distribution is Hugging Face's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from text_models import Scripted, emitted, part, patch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

QUIET: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module", params=["triton", "tvm"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def package(backend: str, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return emitted(backend, tmp_path_factory.mktemp("package"))


def warped(package: ModuleType, logits: np.ndarray, **options: Any) -> np.ndarray:
    given: Any = torch.from_numpy(logits) if "triton" in package.__name__ else logits
    return np.asarray(part(package, "generate").warp(given, package.Sampling(**options)))


@settings(max_examples=150, **QUIET)
@given(
    rows=st.lists(st.lists(st.integers(-24, 24), min_size=12, max_size=12, unique=True), min_size=1, max_size=3),
    temperature=st.sampled_from([0.1, 0.6, 1.0, 1.7, 8.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 11, 12, 40]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1.0]),
)
def test_what_is_kept_is_what_transformers_keeps(
    package: ModuleType, rows: list[list[int]], temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array(rows, np.float32) / 4
    wanted = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    sums = wanted.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume((sums - top_p).abs().min() > 1e-5)  # else rounding decides
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    found = warped(package, logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert found.dtype == np.float32
    assert np.array_equal(np.isinf(found), np.isinf(wanted.numpy()))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


def test_the_token_that_crosses_the_bound_is_kept(package: ModuleType) -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    assert np.isfinite(warped(package, logits, temperature=1.0, top_p=0.6)).tolist() == [[True, True, False]]
    assert np.isfinite(warped(package, logits, temperature=1.0, top_p=0.4)).tolist() == [[True, False, False]]


def test_the_temperature_comes_before_top_p(package: ModuleType) -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))  # at 4: 0.38, 0.33, 0.30
    assert np.isfinite(warped(package, logits, temperature=4.0, top_p=0.75)).tolist() == [[True, True, True]]
    assert np.isfinite(warped(package, logits, temperature=0.25, top_p=0.75)).tolist() == [[True, False, False]]


def drawn(package: ModuleType, logits: np.ndarray, count: int, **options: Any) -> list[int]:
    sampling = package.Sampling(**options)
    rows = np.repeat(logits[None], count, axis=0)
    if "triton" in package.__name__:
        generator = torch.Generator().manual_seed(0)
        found = part(package, "generate").sample(torch.from_numpy(rows), sampling, [generator] * count)
    else:
        found = part(package, "generate").sample(rows, sampling, [np.random.default_rng(0)] * count)
    return [int(i) for i in found]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-38, 1e-31, 1e-30, 1e-29, 1e-9])
def test_a_tiny_temperature_is_greedy(package: ModuleType, temperature: float) -> None:
    logits = np.array([-1e4, 3.0, 3.25, 1e4 - 1, 1e4, -3.0], np.float32)
    assert set(drawn(package, logits, 20, temperature=temperature)) == {4}
    assert set(drawn(package, logits, 20, temperature=temperature, top_k=3, top_p=0.9)) == {4}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": float("nan")}, "temperature is a number from 0 on, and not nan"),
        ({"temperature": float("inf")}, "temperature is a number from 0 on, and not inf"),
        ({"temperature": -0.1}, "temperature is a number from 0 on, and not -0.1"),
        ({"top_k": -1}, "top_k is an integer from 0 on, and not -1"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1, and not 0.0"),
        ({"top_p": float("nan")}, "top_p is above 0 and at most 1, and not nan"),
        ({"seed": -1}, r"seed is an integer from 0 to 2\^64 - 1, and not -1"),
        ({"seed": 2**64}, r"seed is an integer from 0 to 2\^64 - 1, and not 18446744073709551616"),
        ({"seed": 1.5}, r"seed is an integer from 0 to 2\^64 - 1, and not 1.5"),
        ({"max_tokens": 0}, "max_tokens is an integer from 1 on, and not 0"),
    ],
)
def test_what_cannot_be_asked(package: ModuleType, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        package.Sampling(**options)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_in_bounds_works(
    package: ModuleType, backend: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(package, backend, monkeypatch)
    sampling = package.Sampling(temperature=1.0, seed=seed, max_tokens=4)
    first, second = ([t.id for t in package.generate(Scripted(backend, {0: [5]}), [[1]], sampling)] for _ in range(2))
    assert first == second
    assert len(first) == 4


def test_a_stop_token_is_told_before_the_length_limit(
    package: ModuleType, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(package, backend, monkeypatch)
    sampling = package.Sampling(max_tokens=3, stop_tokens=frozenset([9]))
    model = Scripted(backend, {0: [5, 6, 9], 1: [5, 9], 2: [5, 6, 7]})
    found = [(t.prompt, t.id, t.finished) for t in package.generate(model, [[1], [2], [3]], sampling) if t.finished]
    assert found == [(1, 9, "stop"), (0, 9, "stop"), (2, 7, "length")]


def test_whoever_watches_may_end_a_prompt(package: ModuleType, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(package, backend, monkeypatch)
    sampling = package.Sampling(max_tokens=3, stop_tokens=frozenset([9]))
    asked: list[tuple[int, int]] = []

    def stopped(prompt: int, id: int) -> bool:
        asked.append((prompt, id))
        return id == 7

    model = Scripted(backend, {0: [7, 8], 1: [5, 6, 7], 2: [5, 9]})
    found = list(package.generate(model, [[1], [2], [3]], sampling, stopped=stopped))
    assert [(t.prompt, t.id, t.finished) for t in found if t.finished] == [
        (0, 7, "stop"),
        (2, 9, "stop"),
        (1, 7, "stop"),
    ]
    assert asked == [(0, 7), (1, 5), (2, 5), (1, 6), (1, 7)]  # and not of a stop token
