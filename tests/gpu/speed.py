"""How fast generated packages decode and prefill, as a share of the machine's limits and beside Hugging Face."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from benchmarks import limits, packages
from gpu.report import Report

DTYPE = torch.bfloat16
PAGE_SIZE = 16
STEPS = 24  # decode steps in one measurement
GOAL_SHARE = 0.7  # of the bandwidth limit, at batch 1


@dataclass
class Plan:
    """What is measured: toy sizes when quick. `compile_seconds` is left for compiling Hugging Face's models."""

    quick: bool
    compile_seconds: float

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 3) if self.quick else (1, 8, 64)

    @property
    def context(self) -> int:
        """Tokens in every sequence when the last step of a measurement is done."""
        return 64 if self.quick else 1024

    @property
    def prompt(self) -> int:
        return 128 if self.quick else 2048

    def model(self, folder: Path, device: torch.device) -> tuple[Any, Any]:
        """A package's model with random weights, and Hugging Face's."""
        package = packages.open_package(folder)
        config = packages.shrunk(package.Config()) if self.quick else package.Config()
        model = packages.random_model(package, config, DTYPE, device)
        return model, packages.hugging_face(package, model)


@dataclass(frozen=True)
class Limits:
    """bytes/s and FLOP/s, measured."""

    bandwidth: float
    matrix_rate: float

    def decode_seconds(self, model: Any, batch: int, context: int) -> float:
        """A step reads the weights, and all cached keys and values, once."""
        weights = packages.parameter_bytes_read(model)
        moved = weights + packages.kv_bytes(model, batch * context)
        return max(moved / self.bandwidth, 2 * batch * weights / DTYPE.itemsize / self.matrix_rate)

    def prefill_seconds(self, model: Any, tokens: int) -> float:
        return packages.prefill_flops(model, tokens) / self.matrix_rate


def table(report: Report, device: torch.device, folders: Sequence[Path], goals: Sequence[str], plan: Plan) -> None:
    """Decode latency and prefill time of every package; a goal is a share of the limit at batch 1."""
    bound = measure_limits(report, device, plan.quick)
    title = f"milliseconds: decode steps up to {plan.context} tokens of context, prefill of {plan.prompt} tokens"
    columns = ("ours", "graph alone", "tokens/s", "of the limit", "HF sdpa", "HF compiled")
    report.table(title, "package", "what", *columns)
    for folder in folders:
        model, hf = plan.model(folder, device)
        for batch in plan.batches:
            ours, graph = decode_seconds(model, batch, plan.context)
            share = bound.decode_seconds(model, batch, plan.context) / ours
            peer = ms(hf_decode_seconds(hf, batch, plan.context))
            compiled = hf_compiled(hf, plan) if batch == 1 else "-"
            cells = (f"decode, batch {batch}", ms(ours), graph, f"{batch / ours:.0f}", f"{share:.0%}", peer, compiled)
            if batch == 1 and folder.name in goals and not plan.quick:
                report.goal(share >= GOAL_SHARE, folder.name, *cells)
            else:
                report.row(folder.name, *cells)
        ours = prefill_seconds(model, plan.prompt)
        share = bound.prefill_seconds(model, plan.prompt) / ours
        peer = ms(hf_prefill_seconds(hf, plan.prompt))
        report.row(folder.name, "prefill", ms(ours), "-", f"{plan.prompt / ours:.0f}", f"{share:.0%}", peer, "-")
        del model, hf
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_limits(report: Report, device: torch.device, quick: bool) -> Limits:
    bandwidth = limits.bandwidth(device, 1 << (24 if quick else 32))
    matrix_rate = limits.matrix_rate(device, DTYPE, 256 if quick else 8192)
    report.table("measured limits", "limit", "value")
    report.row("memory bandwidth", f"{bandwidth / 1e9:.0f} GB/s")
    report.row("bfloat16 matrix rate", f"{matrix_rate / 1e12:.3g} TFLOP/s")
    return Limits(bandwidth, matrix_rate)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


# ------------------------------------------------------------------------------------------------------ ours


def decode_seconds(model: Any, batch: int, context: int) -> tuple[float, str]:
    """Seconds of a greedy decode step, bookkeeping and sampling included; the captured graph's own milliseconds."""
    cache = filled_cache(model, batch, context)
    sequences, ones = list(range(batch)), [1] * batch

    def steps() -> None:
        ids = torch.zeros(batch, dtype=torch.int64, device=model.device)
        for _ in range(STEPS):
            cache.begin_forward(sequences, ones)
            logits = model.batch_decode(model.embed(ids).transpose(0, 1), cache)
            cache.end_forward()
            ids = logits[:, 0].argmax(-1)
        for sequence in sequences:
            cache.popn(sequence, STEPS)

    seconds = limits.seconds(steps, model.device) / STEPS
    if model.device.type != "cuda":
        return seconds, "-"
    graph = list(cache.graphs.graphs.values())[-1].graph  # replayed again, it writes what it wrote
    return seconds, ms(limits.seconds(lambda: limits.repeat(STEPS, graph.replay), model.device) / STEPS)


def filled_cache(model: Any, batch: int, context: int) -> Any:
    """`batch` sequences that STEPS more tokens bring to `context`, with random keys and values."""
    room = batch * -(-context // PAGE_SIZE) * PAGE_SIZE
    cache = model.create_paged_kv_cache(batch, room, batch * context, PAGE_SIZE)
    cache.pages.normal_()
    for sequence in range(batch):
        cache.add_sequence(sequence)
    cache.begin_forward(list(range(batch)), [context - STEPS] * batch)
    cache.end_forward()
    return cache


def prefill_seconds(model: Any, tokens: int) -> float:
    cache = model.create_paged_kv_cache(1, tokens, tokens, PAGE_SIZE)
    ids = torch.arange(tokens, device=model.device) % model.config.vocab_size

    def prefill() -> None:
        cache.add_sequence(0)
        cache.begin_forward([0], [tokens])
        model.prefill(model.embed(ids), cache)
        cache.end_forward()
        cache.remove_sequence(0)

    return limits.seconds(prefill, model.device)


# ---------------------------------------------------------------------------------------------- Hugging Face


@torch.inference_mode()
def hf_decode_seconds(hf: Any, batch: int, context: int) -> float:
    """The same steps with its growing cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    fill(cache, hf, batch, context - STEPS)

    def steps() -> None:
        greedy(hf.forward, hf, cache, batch)
        cache.crop(-STEPS)

    return limits.seconds(steps, hf.device) / STEPS


@torch.inference_mode()
def hf_prefill_seconds(hf: Any, tokens: int) -> float:
    ids = torch.arange(tokens, device=hf.device)[None] % hf.config.vocab_size
    return limits.seconds(lambda: hf(ids, use_cache=True, logits_to_keep=1), hf.device)


def hf_compiled(hf: Any, plan: Plan) -> str:
    """Milliseconds of a compiled decode step at batch 1 with a static cache, or why there are none."""
    start = time.monotonic()
    try:
        with deadline(plan.compile_seconds):
            return ms(hf_compiled_seconds(hf, plan.context))
    except Exception as error:  # a peer's failure is a result too
        return f"{type(error).__name__}: {str(error)[:80]}".strip().replace("\n", " ")
    finally:
        plan.compile_seconds -= time.monotonic() - start
        torch._dynamo.reset()


@torch.no_grad()
def hf_compiled_seconds(hf: Any, context: int) -> float:
    """Its cache cannot go back, so that it has room for every round: attention reads that room too."""
    from transformers import StaticCache

    warmup, rounds = 1, 3
    cache = StaticCache(config=hf.config, max_cache_len=context + (warmup + rounds - 1) * STEPS)
    fill(cache, hf, 1, context - STEPS)
    compiled = torch.compile(hf.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return limits.seconds(lambda: greedy(compiled, hf, cache, 1), hf.device, rounds, warmup) / STEPS


def fill(cache: Any, hf: Any, batch: int, tokens: int) -> None:
    """Random keys and values of so many tokens in every layer."""
    shape = (batch, hf.config.num_key_value_heads, tokens, hf.config.head_dim)
    for layer in range(hf.config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=DTYPE, device=hf.device) for _ in range(2))
        cache.update(keys, values, layer)


def greedy(forward: Callable[..., Any], hf: Any, cache: Any, batch: int) -> None:
    """STEPS decode steps."""
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=hf.device)
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """TimeoutError in the block when it takes longer."""

    def stop(*_: Any) -> NoReturn:
        raise TimeoutError("no time left to compile")

    if seconds <= 0:
        stop()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --------------------------------------------------------------------------------------------------- profile


def profile(report: Report, device: torch.device, folders: Sequence[Path], plan: Plan) -> None:
    """Where a decode step at batch 1 and a prefill spend the GPU's time, kernel by kernel."""
    for folder in folders:
        model, _ = plan.model(folder, device)
        for what, run in (
            ("decode steps", lambda model=model: decode_seconds(model, 1, plan.context)),
            ("prefills", lambda model=model: prefill_seconds(model, plan.prompt)),
        ):
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                run()
            kernels = sorted(trace.key_averages(), key=lambda k: -k.self_device_time_total)[:14]
            total = sum(kernel.self_device_time_total for kernel in trace.key_averages())
            report.table(f"{folder.name}, {what}", "share", "calls", "us a call", "kernel")
            for kernel in kernels:
                share, call = kernel.self_device_time_total / total, kernel.self_device_time_total / kernel.count
                report.row(f"{share:.1%}", str(kernel.count), f"{call:.1f}", kernel.key[:90])
        del model
