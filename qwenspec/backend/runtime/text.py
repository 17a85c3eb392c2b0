"""Text in and out.

[LM_HEAD] The checkpoint's tokenizer, chat template, stop tokens and sampling.
[not LM_HEAD] The checkpoint's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .generation import Sampling
from .stored import read_optional_json

LM_HEAD = True  # flag: it generates text


class TextError(ValueError):
    """The checkpoint folder lacks what turns text into tokens, or it is wrong; or a text cannot be used."""


class Text:
    """The text side of a checkpoint folder. Raises TextError or CheckpointError, which name the file that is wrong."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from .tokenizer import read_tokenizer
        except ModuleNotFoundError as error:
            raise TextError(f"text needs {error.name}: pip install {error.name}") from error
        self.folder = Path(folder)
        self._tokenizer = read_tokenizer(self.folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        `add_special_tokens`: also those that the tokenizer puts round a text, such as the one at the end that an
        embedding model reads. A rendered chat brings its own."""
        return self._tokenizer.encode(unicode(text), add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode(ids)

    if LM_HEAD:

        def chat(
            self,
            messages: Sequence[Mapping[str, Any]],
            *,
            tools: Sequence[Mapping[str, Any]] | None = None,
            documents: Sequence[Mapping[str, Any]] | None = None,
            template: str | None = None,
            **options: Any,
        ) -> str:
            """The checkpoint's chat template, rendered up to where the assistant speaks.

            messages: `role`, `content` and what else the template reads, as `reasoning_content` or `tool_calls`.
            template: the name of one, where there are several; by default `tool_use` with tools, else `default`.
            options: whatever else the template reads, as `enable_thinking=False`. Raises TextError."""
            try:
                from .chat import read_templates, render
            except ModuleNotFoundError as error:
                raise TextError(f"chat templates need {error.name}: pip install {error.name}") from error
            found = read_templates(self.folder)
            name = template or ("tool_use" if tools is not None and "tool_use" in found else "default")
            if name not in found:
                raise TextError(f"{self.folder} has the chat templates {', '.join(sorted(found))}, and no {name}")
            known = {"add_generation_prompt": True, **self._tokenizer.special_tokens, **options}
            return render(found[name], messages, {"tools": tools, "documents": documents, **known})

        def generation_config(self) -> dict[str, Any]:
            """generation_config.json; empty where there is none."""
            return read_optional_json(self.folder / "generation_config.json")

        def stop_tokens(self) -> frozenset[int]:
            """End-of-sequence ids of generation_config.json, else of config.json."""
            for file in (self.folder / "generation_config.json", self.folder / "config.json"):
                ids = read_optional_json(file).get("eos_token_id")
                if ids is not None:
                    listed = ids if isinstance(ids, list) else [ids]
                    if not all(type(i) is int and i >= 0 for i in listed):
                        raise TextError(f"{file}: eos_token_id is neither a token id nor a list of them")
                    return frozenset(listed)
            return frozenset()

        def sampling(self) -> dict[str, Any]:
            """What generation_config.json says of `temperature`, `top_k` and `top_p`; nothing where it is greedy."""
            file, config = self.folder / "generation_config.json", self.generation_config()
            sampled = config.get("do_sample", False)
            if not isinstance(sampled, bool):
                raise TextError(f"{file}: do_sample is neither true nor false")
            if not sampled:
                return {}
            found: dict[str, Any] = {"temperature": 1.0}
            found |= {name: config[name] for name in ("temperature", "top_k", "top_p") if config.get(name) is not None}
            if wrong := [name for name, value in found.items() if type(value) not in (int, float)]:
                raise TextError(f"{file}: {wrong[0]} is no number")
            try:
                Sampling(**found)
            except (ValueError, OverflowError) as error:  # an integer may be too large for a float
                raise TextError(f"{file}: {error}") from error
            return found


def unicode(text: str) -> str:
    """The same text; raises TextError where it holds bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not UTF-8: character {error.start + 1} is {text[error.start]!a}") from error
    return text
