"""Packages of both backends with a model that says what it is told to, so that nothing is compiled."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import TINY

import qwenspec
from qwenspec.backend.load import import_package

VOCABULARY = 400


def emitted(backend: str, folder: Path, more: str = "") -> ModuleType:
    """The package of TINY, with further lines of its architecture."""
    (folder / "tiny.yaml").write_text(TINY.replace("variants:", f"{more}variants:", 1))
    return import_package(qwenspec.emit(qwenspec.load(folder / "tiny.yaml"), backend, folder / backend))


def part(package: ModuleType, name: str) -> Any:
    """A module of the package, where its __init__ hides one behind a function of that name."""
    return importlib.import_module(f"{package.__name__}.{name}")


class Cache:
    """Counts tokens, and keeps nothing."""

    def __init__(self) -> None:
        self.sequences: dict[int, int] = {}
        self.batch: list[int] = []

    def add_sequence(self, number: int, prompt_length: int | None = None) -> None:
        self.sequences[number] = 0

    def remove_sequence(self, number: int) -> None:
        del self.sequences[number]

    def begin_forward(self, numbers: Sequence[int], lengths: Sequence[int]) -> None:
        self.batch = list(numbers)
        for number, length in zip(numbers, lengths, strict=True):
            self.sequences[number] += length

    def end_forward(self) -> None:
        pass


class Scripted:
    """After a prompt, whatever it is, the script's tokens of its number, and then token 0 for ever."""

    def __init__(self, backend: str, script: Mapping[int, Sequence[int]]) -> None:
        self.torch = backend == "triton"
        self.script = script
        self.config = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=1, max_position_embeddings=512)
        self.dtype = "float32"
        self.device = torch.device("cpu")
        self.ranks = SimpleNamespace(rank=0, size=1)
        self.prompts: list[list[int]] = []  # of every prefill

    def create_paged_kv_cache(self, *sizes: int) -> Cache:
        self.steps = dict.fromkeys(range(sizes[0]), 0)
        return Cache()

    def embed(self, ids: Any) -> Any:
        self.ids = [int(i) for i in ids]
        return torch.zeros(1, len(self.ids), 1)

    def batch_prefill(self, embeds: Any, ends: Any, cache: Cache) -> Any:
        self.prompts.append(self.ids)
        return self._logits(cache, torch.zeros if self.torch else np.zeros, 0)

    def batch_decode(self, embeds: Any, cache: Cache) -> Any:
        return self._logits(cache, torch.zeros if self.torch else np.zeros, 1)

    def _logits(self, cache: Cache, zeros: Any, axis: int) -> Any:
        rows = torch.zeros(len(cache.batch), VOCABULARY)
        for row, number in enumerate(cache.batch):
            told = self.script[number]
            step = self.steps[number]
            rows[row, told[step] if step < len(told) else 0] = 1.0
            self.steps[number] += 1
        found = rows[None] if axis == 0 else rows[:, None]
        return self.array(found)

    def array(self, values: Any) -> Any:
        """As the backend's methods return it."""
        found = torch.as_tensor(values)
        return found if self.torch else SimpleNamespace(numpy=found.numpy)


def patch(package: ModuleType, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM's arrays have no place here."""
    if backend == "tvm":
        monkeypatch.setattr(part(package, "generate"), "reshape", lambda array, shape: array)
