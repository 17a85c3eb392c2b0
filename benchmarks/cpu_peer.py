"""One contender of cpu.py in its own process: answers each line of stdin with a line of JSON."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONTEXT = 128  # tokens before the first decoded one
STEPS = 8  # decoded in one measurement
PROMPTS = (128, 512)
READ = 1 << 28  # bytes read to measure bandwidth


def main(name: str, package: str, checkpoint: str) -> None:
    folder, weights = Path(package), Path(checkpoint)
    if name == "limits":
        answers = Limits(folder, weights).answers()
    else:
        contender = HuggingFace(folder, weights) if name == "hugging face" else Package(name, folder, weights)
        answers = {
            "bytes": contender.bytes_read,
            "logits": lambda: [row[::97].tolist() for row in contender.steps()],
            "decode": lambda: timed(contender.steps) / STEPS,
            **{f"prefill {n}": partial(contender.prefill_seconds, n) for n in PROMPTS},
        }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prompt(tokens: int, vocab_size: int) -> np.ndarray:
    """Token ids int32 [tokens]."""
    return np.arange(tokens, dtype=np.int32) * 7919 % vocab_size


class Package:
    """A generated package. `name` is its backend, and a dtype behind it if that is not float32; or how its weights are
    quantised, while it computes in float32."""

    def __init__(self, name: str, folder: Path, weights: Path) -> None:
        self.backend, _, variant = name.partition(" ")
        self.folder, self.dtype = folder, variant if variant in ("float16", "bfloat16") else "float32"
        sys.path.insert(0, str(folder.parent))
        self.model = __import__(folder.name).Model.load(weights, "cpu", self.dtype)
        if self.backend == "triton":
            import torch

            self.ids: Callable[[np.ndarray], Any] = torch.from_numpy
        else:
            self.ids = lambda ids: ids
        self.cache = self.model.create_paged_kv_cache(2, CONTEXT + STEPS + max(PROMPTS) + 32, max(PROMPTS))
        self.cache.add_sequence(0)
        self.prefill(0, CONTEXT)

    def bytes_read(self) -> int:
        """Of weights, a decode step."""
        if self.backend == "triton":
            from benchmarks import packages

            return packages.parameter_bytes_read(self.model)
        package = self.folder.name
        library, targets = (importlib.import_module(f"{package}.{name}") for name in ("library", "targets"))
        parameters = library.find_library(targets.find_target("cpu"), self.dtype).metadata["params"]
        tied = not any(one["name"].startswith("lm_head") for one in parameters)
        read = [one for one in parameters if tied or one["name"] != "embed_tokens.weight"]
        return sum(math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize for one in read)

    def prefill(self, sequence: int, tokens: int) -> Any:
        self.cache.begin_forward([sequence], [tokens])
        ids = self.ids(prompt(tokens, self.model.config.vocab_size))
        logits = self.model.prefill(self.model.embed(ids), self.cache)
        self.cache.end_forward()
        return logits

    def prefill_seconds(self, tokens: int) -> float:
        self.cache.add_sequence(1)
        seconds = timed(lambda: self.prefill(1, tokens))
        self.cache.remove_sequence(1)
        return seconds

    def steps(self) -> list[np.ndarray]:
        """Logits [vocab] of each decoded token; the cache is as before."""
        rows = []
        for i in range(STEPS):
            self.cache.begin_forward([0], [1])
            embeds = self.model.embed(self.ids(np.array([i], dtype=np.int32)))
            rows.append(self.model.decode(embeds, self.cache).numpy()[0, 0])
            self.cache.end_forward()
        self.cache.popn(0, STEPS)
        return rows


class HuggingFace:
    """Its sdpa attention and growing cache, with the last token's logits alone, in float32."""

    def __init__(self, folder: Path, weights: Path) -> None:
        import torch

        from benchmarks import packages

        torch.set_grad_enabled(False)
        package = packages.open_package(folder)
        self.torch = torch
        self.hf = packages.hugging_face(package, package.Model.load(weights, "cpu", "float32"))
        self.cache = self.prefill(CONTEXT)

    def bytes_read(self) -> int:
        """Of weights, a decode step."""
        from benchmarks import packages

        return packages.parameter_bytes_read(self.hf)

    def prefill(self, tokens: int) -> Any:
        ids = self.torch.from_numpy(prompt(tokens, self.hf.config.vocab_size)).long()[None]
        return self.hf(ids, use_cache=True, logits_to_keep=1).past_key_values

    def prefill_seconds(self, tokens: int) -> float:
        return timed(lambda: self.prefill(tokens))

    def steps(self) -> list[np.ndarray]:
        """As Package.steps."""
        rows = []
        for i in range(STEPS):
            ids = self.torch.tensor([[i]])
            rows.append(self.hf(ids, past_key_values=self.cache, use_cache=True).logits[0, 0].numpy())
        self.cache.crop(-STEPS)
        return rows


class Limits:
    """What the machine can do in float32; it also writes the checkpoint that all contenders read."""

    def __init__(self, folder: Path, weights: Path) -> None:
        import torch

        from benchmarks import limits, packages
        from benchmarks.reader import reader

        torch.set_grad_enabled(False)
        self.limits, self.torch, self.cpu = limits, torch, torch.device("cpu")
        self.read = reader(READ)
        package = packages.open_package(folder)
        model = packages.random_model(package, package.Config(), torch.bfloat16, self.cpu)
        packages.save_checkpoint(package, model, weights)
        self.bytes_read = packages.parameter_bytes_read(model) * 2  # of bfloat16, so twice in float32
        self.flops = {n: packages.prefill_flops(model, n) for n in PROMPTS}

    def answers(self) -> dict[str, Callable[[], Any]]:
        return {
            "checkpoint": lambda: "written",
            "bytes": lambda: self.bytes_read,
            "decode": self.read_seconds,
            **{f"prefill {n}": partial(self.multiply_seconds, n) for n in PROMPTS},
        }

    def read_seconds(self) -> float:
        """Seconds to read the weights of a decode step once, as fast as the best reader here."""
        torch_rate = self.limits.bandwidth(self.cpu, READ)
        return self.bytes_read / max(torch_rate, READ / self.limits.seconds(self.read, self.cpu))

    def multiply_seconds(self, tokens: int) -> float:
        """Seconds of a prefill's arithmetic at the rate of a large matrix product."""
        return self.flops[tokens] / self.limits.matrix_rate(self.cpu, self.torch.float32, 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
