"""What tests ask ranks to do with a Triton package (`qwenspec.verify.rank_pool`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

COLLECTIVES = ("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier")


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """New tensors are NaN until something is written there."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@unwritten_is_nan()
def outputs(package: Path, weights: Path, dtype: str) -> list[np.ndarray]:
    """What each forward gives of prefills, one of them in chunks, a fork, batched decodes and a verification."""
    import torch

    from qwenspec.backend.load import import_package

    model = import_package(package).Model.load(weights, dtype=dtype)
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, model.config.vocab_size, 64))
    ids[:2] = torch.tensor([0, model.config.vocab_size - 1])
    cache = model.create_paged_kv_cache(4, 64, 32, 4)
    found: list[torch.Tensor] = []

    def forward(method: str, sequences: Sequence[int], lengths: Sequence[int], *positions: Any) -> None:
        nonlocal ids
        new, ids = ids[: sum(lengths)], ids[sum(lengths) :]
        embeds = model.embed(new)
        cache.begin_forward(sequences, lengths)
        embeds = embeds.transpose(0, 1) if method == "batch_decode" else embeds
        found.append(getattr(model, method)(embeds, *positions, cache))
        cache.end_forward()

    cache.add_sequence(0)
    forward("prefill", [0], [9])
    cache.add_sequence(1, prompt_length=7)
    forward("prefill", [1], [4])
    forward("batch_prefill", [1, 0], [3, 1], torch.tensor([2, 3]))
    cache.fork_sequence(0, 2, 6)
    forward("batch_decode", [2, 0, 1], [1, 1, 1])
    cache.popn(1, 2)
    forward("batch_decode", [1, 2], [1, 1])
    forward("batch_verify", [0, 2], [3, 2])
    return [output.float().numpy() for output in found]


def tokens(package: Path, weights: Path, temperature: float) -> list[tuple[int, int]]:
    """Prompts and tokens of a generation for which every rank's own random numbers differ."""
    from qwenspec.backend.load import import_package

    module = import_package(package)
    model = module.Model.load(weights)
    sampling = module.Sampling(temperature=temperature, seed=17 + 100 * model.ranks.rank, max_tokens=6)
    return [(token.prompt, token.id) for token in module.generate(model, [[1, 2, 3], [4]], sampling)]


def collectives(package: Path, weights: Path) -> dict[str, list[str]]:
    """What ranks do together in each step."""
    import torch
    import torch.distributed as dist

    from qwenspec.backend.load import import_package

    model = import_package(package).Model.load(weights)
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def count(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*arguments, **options)

        return count

    names = [name for name in dir(dist) if name.startswith(COLLECTIVES)]
    originals = {name: getattr(dist, name) for name in names}
    found = {}
    vars(dist).update({name: counted(name) for name in names})
    try:
        cache = model.create_paged_kv_cache(1, 16, 16, 4)
        cache.add_sequence(0)
        for method, length in (("prefill", 5), ("decode", 1)):
            embeds = model.embed(torch.arange(length))
            found[f"embed {length}"] = calls[:]
            calls.clear()
            cache.begin_forward([0], [length])
            getattr(model, method)(embeds, cache)
            cache.end_forward()
            found[method] = calls[:]
            calls.clear()
    finally:
        vars(dist).update(originals)
    return found


def outside(package: Path, weights: Path) -> str:
    """What an id beyond the vocabulary raises, which has a row of padding."""
    import torch

    from qwenspec.backend.load import import_package

    model = import_package(package).Model.load(weights)
    try:
        model.embed(torch.tensor([1, model.config.vocab_size]))
    except ValueError as error:
        return str(error)
    return ""
