"""Generation: chunked prefill, batched decode, sampling, a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .checks import check_integer
from .engine import reshape
from .generation import Sampling, Token, check_chosen, check_prompts, pack, why_finished
from .parallel import broadcast


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    stopped: Callable[[int, int], bool] | None = None,
    prefill_chunk_size: int = 2048,
    page_size: int = 16,
) -> Iterator[Token]:
    """Continue every prompt (token ids), all of them together, yielding tokens as they come: rank 0's, on every rank.

    stopped: asked of each token (prompt, id) that is no stop token, whether it is that prompt's last. Draws are
    numpy's: with the same seed, other tokens than a PyTorch generator's."""
    sampling = sampling or Sampling()
    check_prompts(prompts, model.config.vocab_size)
    check_integer("page_size", page_size, least=1)
    check_integer("prefill_chunk_size", prefill_chunk_size, least=1)
    pages = sum(-(-(len(prompt) + sampling.max_tokens) // page_size) for prompt in prompts)
    cache = model.create_paged_kv_cache(len(prompts), pages * page_size, prefill_chunk_size, page_size)
    generators = [np.random.default_rng(sampling.seed) for _ in prompts]
    for i, prompt in enumerate(prompts):
        cache.add_sequence(i, prompt_length=len(prompt))
    logits = _prefill(model, cache, prompts, prefill_chunk_size)
    running = list(range(len(prompts)))
    produced = 0
    while True:
        with np.errstate(all="ignore"):  # of what is not finite
            drawn = sample(logits, sampling, [generators[i] for i in running])
        drawn = np.where(np.isfinite(logits).all(-1), drawn, -1)
        ids = broadcast(drawn, model.ranks).tolist()
        check_chosen(ids, running, model.dtype)
        produced += 1
        alive = []
        for i, token in zip(running, ids, strict=True):
            new = Token(i, token, why_finished(i, token, produced, sampling, stopped))
            yield new
            if new.finished is None:
                alive.append((i, token))
            else:
                cache.remove_sequence(i)
        if not alive:
            return
        running = [i for i, _ in alive]
        embeds = reshape(model.embed([token for _, token in alive]), (len(alive), 1, model.config.hidden_size))
        cache.begin_forward(running, [1] * len(running))
        logits = model.batch_decode(embeds, cache).numpy()[:, 0]
        cache.end_forward()


def _prefill(model: Any, cache: Any, prompts: Sequence[Sequence[int]], chunk_size: int) -> np.ndarray:
    """Prefill every prompt and return the logits [b, vocab] of their last tokens."""
    last: dict[int, np.ndarray] = {}
    for chunks in pack([len(prompt) for prompt in prompts], chunk_size):
        ids = [i for prompt, start, end in chunks for i in prompts[prompt][start:end]]
        ends = np.cumsum([end - start for _, start, end in chunks]) - 1
        cache.begin_forward([prompt for prompt, _, _ in chunks], [end - start for _, start, end in chunks])
        logits = model.batch_prefill(model.embed(ids), ends, cache).numpy()[0]  # [chunks, vocab]
        cache.end_forward()
        last.update(zip((prompt for prompt, _, _ in chunks), logits, strict=True))
    return np.stack([last[i] for i in range(len(prompts))])


def sample(logits: np.ndarray, sampling: Sampling, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """logits [b, vocab] float32 -> token ids [b]."""
    if sampling.greedy:
        return logits.argmax(-1)
    logits = warp(logits, sampling)
    # Gumbel's trick, one generator a row: argmax of p / Exponential(1) is a draw from p.
    noise = np.stack([generator.standard_exponential(logits.shape[-1], np.float32) for generator in generators])
    return (softmax(logits) / noise).argmax(-1)


def warp(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, then top-k, then top-p, as Hugging Face does: logits [b, vocab] -> [b, vocab], -inf for what is
    dropped."""
    logits = logits / np.float32(sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = np.partition(logits, -sampling.top_k)[:, -sampling.top_k, None]
        logits = np.where(logits < smallest, -np.inf, logits)
    if sampling.top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        likeliest = softmax(np.take_along_axis(logits, order, -1))
        before = likeliest.cumsum(-1) - likeliest  # probability of all likelier tokens
        dropped = np.zeros_like(before, dtype=bool)
        np.put_along_axis(dropped, order, before >= sampling.top_p, -1)
        logits = np.where(dropped, -np.inf, logits)
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
