"""The command line of a model that generates: its options, prompts or a dialogue, and what is printed."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from .answers import answer
from .console import note, warn
from .generation import Sampling
from .text import Text, TextError


@dataclass
class Answer:
    """One prompt's. `tokens` counts the new ones, a stop token among them; `seconds` from the start of its batch."""

    prompt: str
    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    finish_reason: str = ""  # "stop" or "length"
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return round(self.tokens / self.seconds, 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of a generation."""
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="again for a batch; -: all of standard input")
    add("--chat", action="store_true", help="a prompt is a user's message; without one, a dialogue: a line is a turn")
    add("--system", metavar="TEXT", help="the system's message, with --chat")
    add("--thinking", action=argparse.BooleanOptionalAction, help="what the chat template is told, if anything")
    add("--max-tokens", type=int, default=128)
    add("--temperature", type=float, help="0 is greedy; default: generation_config.json's, else 0")
    add("--top-k", type=int, help="default: generation_config.json's, else all")
    add("--top-p", type=float, help="default: generation_config.json's, else all")
    add("--seed", type=int, default=0)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add("--stats", action="store_true", help="say how many tokens, why they ended, and how fast they came")
    add("--json", action="store_true", help="print a JSON list, an object an answer, at the end")


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises TextError for options that do not go together."""
    if not args.chat and (args.system is not None or args.thinking is not None):
        raise TextError("--system, --thinking and --no-thinking are for a chat: give --chat too")
    if not args.chat and not args.prompt:
        raise TextError("give a --prompt, or --chat for a dialogue")
    if ranks > 1 and (not args.prompt or "-" in args.prompt):
        raise TextError("several ranks read no standard input: give a --prompt")


def choose(args: argparse.Namespace, text: Text) -> Sampling:
    """What the options say, and else the checkpoint's generation_config.json."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    default = {} if given.get("temperature") == 0 else text.sampling()
    if taken := [f"{name} {value:g}" for name, value in default.items() if name not in given]:
        note(f"generation_config.json says {', '.join(taken)}; --temperature 0 is greedy")
    if (penalty := text.generation_config().get("repetition_penalty", 1)) != 1:
        note(f"generation_config.json says repetition_penalty {penalty}, which is not applied")
    stop = text.stop_tokens()
    return Sampling(**{**default, **given}, seed=args.seed, max_tokens=args.max_tokens, stop_tokens=stop)


@dataclass(frozen=True)
class Question:
    """A prompt, and the tokens that the model is given for it."""

    prompt: str
    ids: list[int]


def questions(args: argparse.Namespace, text: Text) -> list[Question]:
    """One for each --prompt; none where a dialogue is wanted."""
    prompts = [_standard_input() if prompt == "-" else prompt for prompt in args.prompt or ()]
    return [Question(p, _ids(args, text, [*_system(args), _message("user", p)] if args.chat else p)) for p in prompts]


def fingerprint(asked: Sequence[Question], sampling: Sampling) -> str:
    """Equal where the same is generated from. Checkpoint folders of ranks may differ, and a template tell the time."""
    return hashlib.sha256(repr((asked, sampling)).encode()).hexdigest()[:12]


def converse(args: argparse.Namespace, text: Text, model: Any, sampling: Sampling, asked: Sequence[Question]) -> None:
    """Answer all questions, or else every line of a dialogue, and print."""
    done = _answers(args, text, model, sampling, asked) if asked else list(_dialogue(args, text, model, sampling))
    if args.json:
        print(json.dumps([_report(found, args.stats) for found in done]))
    elif len(args.prompt or ()) > 1:
        for found in done:
            print(f"--- {found.prompt}\n{found.text}")


def _dialogue(args: argparse.Namespace, text: Text, model: Any, sampling: Sampling) -> Iterator[Answer]:
    messages = _system(args)
    for line in _turns():
        messages.append(_message("user", line))
        [found] = _answers(args, text, model, sampling, [Question(line, _ids(args, text, messages))])
        messages.append(_message("assistant", found.text))
        yield found


def _answers(
    args: argparse.Namespace, text: Text, model: Any, sampling: Sampling, asked: Sequence[Question]
) -> list[Answer]:
    """Answer all at once; a single one's text is printed as it comes, unless JSON will be."""
    ids = [question.ids for question in asked]
    warn(max(map(len, ids)) + sampling.max_tokens, model.config.max_position_embeddings)
    streamed = len(ids) == 1 and not args.json
    done = [Answer(question.prompt, len(question.ids)) for question in asked]
    start = time.perf_counter()
    for piece in answer(model, text, ids, sampling, args.stop):
        found = done[piece.prompt]
        found.text += piece.text
        found.tokens += 1
        if piece.finished:
            found.finish_reason, found.seconds = piece.finished, time.perf_counter() - start
        if streamed:
            print(piece.text, end="", flush=True)
    if streamed:
        print(flush=True)
    if args.stats:
        for found in done:
            counts = f"{found.prompt_tokens} + {found.tokens} tokens, {found.finish_reason}"
            print(f"{counts}, {found.tokens_per_second} tokens/s", file=sys.stderr)
    return done


def _ids(args: argparse.Namespace, text: Text, prompt: str | list[dict[str, str]]) -> list[int]:
    if isinstance(prompt, str):
        return text.encode(prompt)
    options = {} if args.thinking is None else {"enable_thinking": args.thinking}
    return text.encode(text.chat(prompt, **options), add_special_tokens=False)


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [_message("system", args.system)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _report(found: Answer, stats: bool) -> dict[str, object]:
    rate = {"tokens_per_second": found.tokens_per_second} if stats else {}
    return {
        "prompt": found.prompt,
        "text": found.text,
        "prompt_tokens": found.prompt_tokens,
        "tokens": found.tokens,
        "finish_reason": found.finish_reason,
        **rate,
    }


def _turns() -> Iterator[str]:
    """Lines of standard input that say something."""
    while True:
        stdin = _stdin()
        if stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.buffer.readline()
        if not line:
            return
        if said := _decoded(line).strip():
            yield said


def _standard_input() -> str:
    """Without the line's end that a shell puts last."""
    return _decoded(_stdin().buffer.read()).removesuffix("\n").removesuffix("\r")


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise TextError("there is no standard input")
    return sys.stdin


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TextError("standard input is not UTF-8") from error
