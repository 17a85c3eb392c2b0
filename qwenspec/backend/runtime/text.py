"""Text in and out: the checkpoint's tokenizer, chat template and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextError(ValueError):
    """The checkpoint folder lacks what turns text into tokens."""


class Text:
    """The text side of a checkpoint folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{file} is missing: text needs the checkpoint's tokenizer")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(file))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        `add_special_tokens`: also those that the tokenizer puts round a text, such as the one at the end that an
        embedding model reads. A rendered chat brings its own."""
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise TextError(f"{text!r} is {len(ids)} tokens, and should be one")
        return ids[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def stream(self, tokens: Iterable[Any]) -> Iterator[tuple[int, str]]:
        """(prompt, piece of text) as generate's tokens come; a character waits until its last byte is there."""
        streams: dict[int, DecodeStream] = {}
        for token in tokens:
            if token.finished == "stop":
                continue
            decode = streams.setdefault(token.prompt, DecodeStream(skip_special_tokens=True))
            if piece := decode.step(self.tokenizer, token.id):
                yield token.prompt, piece

    def chat(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The checkpoint's chat template, rendered up to where the assistant speaks."""
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise TextError("chat templates need jinja2: pip install jinja2") from error
        template = self._chat_template()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        special = {name: token for name, token in self._special_tokens().items() if token}
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **special, **options
        )

    def stop_tokens(self) -> frozenset[int]:
        """End-of-sequence ids of generation_config.json, else of config.json."""
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(self.folder / name).get("eos_token_id")
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset()

    def _chat_template(self) -> str:
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text()
        template = _read_json(self.folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not template:
            raise TextError(f"{self.folder} has no chat template (chat_template.jinja or tokenizer_config.json)")
        return str(template)

    def _special_tokens(self) -> dict[str, str]:
        config = _read_json(self.folder / "tokenizer_config.json")
        tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t is not None}


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _raise(message: str) -> None:
    raise TextError(f"the chat template says: {message}")
