"""Generated packages against Hugging Face, and captured decode steps against eager ones."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.packages import hugging_face, open_package, random_model, recast, shrunk
from gpu.report import Report

PAGE_SIZE = 16
CHECKS = ("kernel_checks", "kv_checks", "quantized_checks")  # in tests/backends/kernels
ALLOWED = 1.5  # times the error of Hugging Face in the same dtype


def kernels(report: Report, device: torch.device) -> None:
    """Every kernel against a float64 oracle: all its cases, whatever fails."""
    report.table("kernels against a float64 oracle", "kernel", "cases", "result")
    for name in CHECKS:
        _check_all(report, device, importlib.import_module(name))


def _check_all(report: Report, device: torch.device, module: ModuleType) -> None:
    checks = {name: check for name, check in vars(module).items() if name.startswith("check_") and name != "check_all"}
    problems: dict[str, list[str]] = {name: [] for name in checks}

    def recorded(name: str) -> Callable[..., None]:
        def check(*args: Any, **kwargs: Any) -> None:
            try:
                checks[name](*args, **kwargs)
                problems[name].append("")
            except Exception as error:
                problems[name].append(f"{type(error).__name__}: {error}, for {args[1:]} {kwargs}")

        return check

    with mock.patch.multiple(module, **{name: recorded(name) for name in checks}):
        module.check_all(device)
    for name, found in problems.items():
        wrong = [problem for problem in found if problem]
        result = f"{len(wrong)} wrong; {wrong[0]}" if wrong else "as expected"
        report.check(bool(found) and not wrong, name.removeprefix("check_"), str(len(found)), result)


# ------------------------------------------------------------------------------------ against Hugging Face


@torch.inference_mode()
def packages(report: Report, device: torch.device, folders: Sequence[Path], quick: bool) -> None:
    """In bfloat16, a package is no further from Hugging Face in float32 than 1.5 × Hugging Face in bfloat16 is.

    An error is a position's, relative to the size of its logits: the median and the worst are compared."""
    title = "bfloat16, error against Hugging Face in float32 (median, worst position)"
    report.table(title, "package", "path", "ours", "Hugging Face", "ratios")
    tokens, chunk, decoded = (40, 13, 6) if quick else (300, 77, 24)
    paths = {
        "prefill": [tokens],
        "chunked prefill": [min(chunk, tokens - start) for start in range(0, tokens, chunk)],
        "decode": [tokens - decoded] + [1] * decoded,
    }
    for folder in folders:
        package = open_package(folder)
        config = package.Config()
        config = shrunk(config) if quick else dataclasses.replace(config, num_hidden_layers=4)
        model = random_model(package, config, torch.bfloat16, device)
        ids = some_ids(tokens, config.vocab_size, device)
        exact = hugging_face(package, recast(package, model, torch.float32), "eager")(ids[None]).logits[0]
        peer = errors(hugging_face(package, model)(ids[None]).logits[0], exact)
        for path, lengths in paths.items():
            error = errors(forward(model, ids, lengths), exact)
            ratios = error / peer
            report.check(bool((ratios <= ALLOWED).all()), folder.name, path, *map(pair, (error, peer, ratios)))


def forward(model: Any, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits [n, vocab] of one sequence in forwards of these lengths; those of one token are decode steps."""
    cache = model.create_paged_kv_cache(1, len(ids), max(lengths), PAGE_SIZE)
    cache.add_sequence(0)
    logits = []
    for part in ids.split(list(lengths)):
        cache.begin_forward([0], [len(part)])
        step = model.decode if len(part) == 1 else model.batch_verify
        logits.append(step(model.embed(part), cache)[0])
        cache.end_forward()
    return torch.cat(logits)


def some_ids(n: int, vocab_size: int, device: torch.device, seed: int = 0) -> Tensor:
    """n random tokens, the same on every device."""
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).to(device)


def errors(logits: Tensor, exact: Tensor) -> Tensor:
    """Median and largest over positions of |logits - exact| / |exact|, Euclidean norms over the vocabulary: [2]."""
    exact = exact.double()
    relative = (logits.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return torch.stack([relative.median(), relative.max()])


def pair(values: Tensor) -> str:
    return ", ".join(f"{value:.2g}" for value in values.tolist())


# ---------------------------------------------------------------------------------- captured against eager

# Lengths before the first step: some cross a page, 254 and 510 cross into a wider block table.
LENGTHS = (254, 3, 510, 17, 240, 256, 1, 100)
# Who decodes in each step: batches of 1, 3 and 8, in changing order, so that a graph's rows change hands.
TRIOS = [[0, 2, 5], [5, 0, 2], [2, 7, 1], [0, 2, 5]]
SCHEDULE = [[0]] * 4 + TRIOS + [list(range(8)), list(range(7, -1, -1))] * 3 + [[2]] * 3


@torch.inference_mode()
def graphs(report: Report, device: torch.device, folder: Path) -> None:
    """A captured step is within bfloat16's own error of an eager one without padding, over another cache. Whether
    it is the eager step on the same padded inputs bit for bit is cuBLAS's choice, and only told."""
    report.table("CUDA graphs against the eager step", "what", "result")
    package = open_package(folder)
    config = dataclasses.replace(package.Config(), num_hidden_layers=4)
    model = random_model(package, config, torch.bfloat16, device)
    exact_model = recast(package, model, torch.float32)
    captured, eager, exact = (started(m, config.vocab_size) for m in (model, model, exact_model))
    identical, outputs = 0, []
    with counted_replays(package) as replays:
        for step, seq_ids in enumerate(SCHEDULE):
            ids = some_ids(len(seq_ids), config.vocab_size, device, seed=step)
            logits = decode(model.batch_decode, model, captured, seq_ids, ids)
            graph = replays[-1]
            again = model.step(graph.embeds, graph.batch, captured)[: len(seq_ids)]
            identical += int(torch.equal(logits, again))
            plain = decode(eager_step(model), model, eager, seq_ids, ids)
            truth = decode(eager_step(exact_model), exact_model, exact, seq_ids, ids)
            outputs.append((logits, plain, truth))
    buckets = {(graph.embeds.shape[0], graph.batch.block_tables.shape[1]) for graph in replays}
    steps = len(SCHEDULE)
    report.check(len(replays) == steps, "steps replayed", f"{len(replays)} of {steps}")
    report.check(len(buckets) >= 5, "graphs captured, as (batch, pages)", str(sorted(buckets)))
    report.row("bit for bit the eager step on the same inputs", f"{identical} of {steps} steps")
    logits, plain, truth = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    difference, noise = errors(logits, plain), errors(plain, truth)
    cells = f"{pair(difference)}; bfloat16's own error {pair(noise)}"
    report.check(bool((difference <= ALLOWED * noise).all()), "difference from the eager step without padding", cells)


def started(model: Any, vocab_size: int) -> Any:
    """A cache with sequences of LENGTHS tokens, the same for every model."""
    pages = sum(-(-(length + len(SCHEDULE)) // PAGE_SIZE) for length in LENGTHS)
    cache = model.create_paged_kv_cache(len(LENGTHS), pages * PAGE_SIZE, sum(LENGTHS), PAGE_SIZE)
    for i in range(len(LENGTHS)):
        cache.add_sequence(i)
    ids = some_ids(sum(LENGTHS), vocab_size, model.device)
    ends = torch.tensor(LENGTHS, device=model.device).cumsum(0) - 1
    cache.begin_forward(range(len(LENGTHS)), LENGTHS)
    model.batch_prefill(model.embed(ids), ends, cache)
    cache.end_forward()
    return cache


def decode(step: Callable[..., Tensor], model: Any, cache: Any, seq_ids: Sequence[int], ids: Tensor) -> Tensor:
    """One token of each sequence -> logits [b, vocab]."""
    cache.begin_forward(seq_ids, [1] * len(seq_ids))
    logits = step(model.embed(ids).transpose(0, 1), cache)[:, 0]
    cache.end_forward()
    return logits


def eager_step(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """batch_decode without a graph."""
    return lambda embeds, cache: model.step(embeds[:, 0], cache.open_batch(len(embeds)), cache)[:, None]


@contextmanager
def counted_replays(package: ModuleType) -> Iterator[list[Any]]:
    """The DecodeGraph of every replay within the block, in order."""
    graph_class = importlib.import_module(f"{package.__name__}.graphs").DecodeGraph
    original, seen = graph_class.replay, []

    def replay(self: Any, *inputs: Any) -> Tensor:
        seen.append(self)
        return original(self, *inputs)

    graph_class.replay = replay
    try:
        yield seen
    finally:
        graph_class.replay = original
