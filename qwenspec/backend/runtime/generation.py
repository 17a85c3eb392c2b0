"""What is asked of a generation and what it gives, and prompts cut into forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .checks import check_integer

GREEDY = 1e-30  # logits divided by less would overflow, and nothing but the likeliest token would be drawn


class NonFiniteError(ValueError):
    """Logits are NaN or infinite: no token can be chosen by them."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy, and then the rest does not matter."""

    temperature: float = 0.0
    top_k: int = 0  # the k most likely tokens alone; 0: all
    top_p: float = 1.0  # the fewest most likely tokens whose probabilities reach top_p
    seed: int = 0  # of each sequence's own generator: a sequence draws the same in any batch; 0 … 2⁶⁴ - 1
    max_tokens: int = 128
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is a number from 0 on, and not {self.temperature}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is an integer from 0 on, and not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is above 0 and at most 1, and not {self.top_p}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is an integer from 0 to 2^64 - 1, and not {self.seed}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens is an integer from 1 on, and not {self.max_tokens}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY


@dataclass(frozen=True)
class Token:
    """One new token of prompt number `prompt`. `finished`: why it is the last, or None. A stop token is not shown
    to the caller as text, but it is reported here."""

    prompt: int
    id: int
    finished: str | None  # "stop", "length" or None


def why_finished(
    prompt: int, id: int, produced: int, sampling: Sampling, stopped: Callable[[int, int], bool] | None
) -> str | None:
    """Why a prompt's token number `produced`, from 1 on, is its last: "stop", "length", or None where it is not.

    stopped: asked of each token (prompt, id) that is no stop token."""
    if id in sampling.stop_tokens or (stopped and stopped(prompt, id)):
        return "stop"
    return "length" if produced == sampling.max_tokens else None


def pack(lengths: Sequence[int], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut prompts into forwards of at most `size` tokens: lists of (prompt, start, end)."""
    forward, room = [], size
    for prompt, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            forward.append((prompt, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield forward
                forward, room = [], size
    if forward:
        yield forward


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """One at least, each with a token at least, and no token that the model has not."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs a token")
    for number, prompt in enumerate(prompts):
        for token in prompt:
            check_integer(f"a token of prompt {number}", token)
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")


def check_chosen(tokens: Sequence[int], prompts: Sequence[int], dtype: str) -> None:
    """tokens: the next of each of these prompts, -1 where its logits are not finite. Raises NonFiniteError."""
    if -1 in tokens:
        where = ", ".join(str(prompt) for prompt, token in zip(prompts, tokens, strict=True) if token == -1)
        raise NonFiniteError(
            f"the logits of prompt {where} are NaN or infinite, so there is no next token: {_why(dtype)}"
        )


def _why(dtype: str) -> str:
    if dtype == "float16":
        return "a model trained in bfloat16 may exceed float16's range of 65504; take dtype bfloat16 or float32"
    return f"in {dtype}, weights or scales that are damaged, or not this model's, may be why"
