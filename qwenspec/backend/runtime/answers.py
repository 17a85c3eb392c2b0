"""From prompts to their answers' text, as it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .detokenizer import TextStream
from .generate import generate
from .generation import Sampling
from .text import Text


@dataclass(frozen=True)
class Piece:
    """What one more token of prompt number `prompt` adds to its answer; often nothing yet. `finished`: why it is the
    last token, "stop" (a stop token, or a stop string) or "length", or None."""

    prompt: int
    text: str
    finished: str | None


def answer(
    model: Any,
    text: Text,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    **options: int,
) -> Iterator[Piece]:
    """Continue every prompt (token ids), all of them together, yielding text as it comes: a piece a token.

    stop: texts that end an answer, and are not part of it. options: of `generate`. Raises TextError for an empty stop,
    and what `generate` raises."""
    streams = [TextStream(text, stop) for _ in prompts]
    tokens = generate(model, prompts, sampling, stopped=lambda prompt, id: streams[prompt].add(id), **options)
    for token in tokens:
        yield Piece(token.prompt, streams[token.prompt].take(token.finished is not None), token.finished)
