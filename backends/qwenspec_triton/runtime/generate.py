"""Generation: chunked prefill, batched decode, sampling, a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_integer
from .generation import Sampling, Token, check_chosen, check_prompts, pack, why_finished
from .parallel import broadcast


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    stopped: Callable[[int, int], bool] | None = None,
    prefill_chunk_size: int = 2048,
    page_size: int = 16,
) -> Iterator[Token]:
    """Continue every prompt (token ids), all of them together, yielding tokens as they come.

    stopped: asked of each token (prompt, id) that is no stop token, whether it is that prompt's last."""
    sampling = sampling or Sampling()
    check_prompts(prompts, model.config.vocab_size)
    check_integer("page_size", page_size, least=1)
    check_integer("prefill_chunk_size", prefill_chunk_size, least=1)
    pages = sum(-(-(len(prompt) + sampling.max_tokens) // page_size) for prompt in prompts)
    cache = model.create_paged_kv_cache(len(prompts), pages * page_size, prefill_chunk_size, page_size)
    generators = [torch.Generator(model.device).manual_seed(sampling.seed) for _ in prompts]
    for i, prompt in enumerate(prompts):
        cache.add_sequence(i, prompt_length=len(prompt))
    logits = _prefill(model, cache, prompts, prefill_chunk_size)
    running = list(range(len(prompts)))
    produced = 0
    while True:
        sampled = sample(logits, sampling, [generators[i] for i in running])
        sampled = sampled.masked_fill(~logits.isfinite().all(-1), -1)  # comes to the host with the tokens
        ids = broadcast(sampled, model.ranks).tolist()  # ranks go on together, whatever each has rounded
        check_chosen(ids, running, str(model.dtype).removeprefix("torch."))
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
        embeds = model.embed(torch.tensor([token for _, token in alive], device=model.device))
        cache.begin_forward(running, [1] * len(running))
        logits = model.batch_decode(embeds.transpose(0, 1), cache)[:, 0]
        cache.end_forward()


def _prefill(model: Any, cache: Any, prompts: Sequence[Sequence[int]], chunk_size: int) -> Tensor:
    """Prefill every prompt and return the logits [b, vocab] of their last tokens."""
    last: dict[int, Tensor] = {}
    for chunks in pack([len(prompt) for prompt in prompts], chunk_size):
        ids = [i for prompt, start, end in chunks for i in prompts[prompt][start:end]]
        ends = torch.tensor([end - start for _, start, end in chunks]).cumsum(0) - 1
        cache.begin_forward([prompt for prompt, _, _ in chunks], [end - start for _, start, end in chunks])
        embeds = model.embed(torch.tensor(ids, device=model.device))
        logits = model.batch_prefill(embeds, ends.to(model.device), cache)[0]  # [chunks, vocab]
        cache.end_forward()
        last.update(zip((prompt for prompt, _, _ in chunks), logits, strict=True))
    return torch.stack([last[i] for i in range(len(prompts))])


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """logits [b, vocab] float32 -> token ids [b]."""
    if sampling.greedy:
        return logits.argmax(-1)
    logits = warp(logits, sampling)
    # Gumbel's trick, one generator a row: argmax of p / Exponential(1) is a draw from p.
    noise = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g) for g in generators])
    return (logits.softmax(-1) / noise).argmax(-1)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, as Hugging Face does: logits [b, vocab] -> [b, vocab], -inf for what is
    dropped."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
