"""One contender of cpu.py in its own process: answers each line of stdin with a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits, packages

CONTEXT = 128  # tokens before the first decoded one
STEPS = 8  # decoded in one measurement
PROMPTS = (128, 512)


def main(peer: str, folder: str, dtype: str, layers: str) -> None:
    torch.set_grad_enabled(False)
    package = packages.open_package(Path(folder))
    config = package.Config()
    config = replace(config, num_hidden_layers=int(layers)) if int(layers) else config
    model = packages.random_model(package, config, getattr(torch, dtype), torch.device("cpu"))
    contender = Ours(model) if peer == "ours" else HuggingFace(packages.hugging_face(package, model))
    answers: dict[str, Callable[[], Any]] = {
        "logits": lambda: [row[::97].tolist() for row in contender.steps()],
        "decode": lambda: timed(contender.steps) / STEPS,
        "limit decode": lambda: read_seconds(model),
    }
    for n in PROMPTS:
        answers[f"prefill {n}"] = lambda n=n: contender.prefill_seconds(n)
        answers[f"limit prefill {n}"] = lambda n=n: multiply_seconds(model, n)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prompt(tokens: int, vocab_size: int) -> Tensor:
    """Token ids [tokens]."""
    return torch.arange(tokens) * 7919 % vocab_size


def read_seconds(model: Any) -> float:
    """Seconds to read the weights of a decode step once."""
    return packages.parameter_bytes_read(model) / limits.bandwidth(model.device, 1 << 28)


def multiply_seconds(model: Any, tokens: int) -> float:
    """Seconds of a prefill's arithmetic at the rate of a large matrix product."""
    return packages.prefill_flops(model, tokens) / limits.matrix_rate(model.device, model.dtype, 1024)


class Ours:
    """The generated package."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = model.create_paged_kv_cache(2, CONTEXT + STEPS + max(PROMPTS) + 32, max(PROMPTS))
        self.cache.add_sequence(0)
        self.prefill(0, CONTEXT)

    def prefill(self, sequence: int, tokens: int) -> None:
        self.cache.begin_forward([sequence], [tokens])
        self.model.prefill(self.model.embed(prompt(tokens, self.model.config.vocab_size)), self.cache)
        self.cache.end_forward()

    def prefill_seconds(self, tokens: int) -> float:
        self.cache.add_sequence(1)
        seconds = timed(lambda: self.prefill(1, tokens))
        self.cache.remove_sequence(1)
        return seconds

    def steps(self) -> list[Tensor]:
        """Logits [vocab] of each decoded token; the cache is as before."""
        ids, rows = torch.zeros(1, dtype=torch.int64), []
        for _ in range(STEPS):
            self.cache.begin_forward([0], [1])
            rows.append(self.model.decode(self.model.embed(ids), self.cache)[0, 0])
            self.cache.end_forward()
            ids = rows[-1].argmax(-1, keepdim=True)
        self.cache.popn(0, STEPS)
        return rows


class HuggingFace:
    """Its sdpa attention and growing cache, with the last token's logits alone."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.cache = self.prefill(CONTEXT)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> Any:
        ids = prompt(tokens, self.hf.config.vocab_size)[None]
        return self.hf(ids, use_cache=True, logits_to_keep=1).past_key_values

    def prefill_seconds(self, tokens: int) -> float:
        return timed(lambda: self.prefill(tokens))

    @torch.inference_mode()
    def steps(self) -> list[Tensor]:
        ids, rows = torch.zeros(1, 1, dtype=torch.int64), []
        for _ in range(STEPS):
            rows.append(self.hf(ids, past_key_values=self.cache, use_cache=True).logits[0, 0].float())
            ids = rows[-1].argmax(-1).view(1, 1)
        self.cache.crop(-STEPS)
        return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
