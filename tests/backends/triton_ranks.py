"""Ranks of a Triton package as real processes, which stay and run what tests send them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

COLLECTIVES = ("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier")
SECONDS = 120  # for what is sent; the slowest answer is the first, after torch has been imported


class RankProcesses:
    """`degree` processes with torchrun's environment, over gloo."""

    def __init__(self, degree: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(degree):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(degree),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returns on each rank. `function` is one of an importable module."""
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self.connections):
            assert connection.poll(SECONDS), f"rank {rank} does not answer"
            answers.append(connection.recv())
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(SECONDS)
            assert process.exitcode == 0, f"rank ended with {process.exitcode}"


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are NaN until something is written there
    while (call := connection.recv()) is not None:
        function, arguments = call
        try:
            connection.send((function(*arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


# --------------------------------------------------------------------------------------- what ranks are sent


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
    except RuntimeError as error:
        return str(error)
    return ""
