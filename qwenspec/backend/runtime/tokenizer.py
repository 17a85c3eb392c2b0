"""The checkpoint's tokenizer, from what it has: tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.models import BPE

from .stored import read_json, read_optional_json, read_text
from .text import TextError

# How Qwen cuts a text before byte pairs are merged.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG = "tokenizer_config.json"
BY_ID = "added_tokens_decoder"
EXTRA = "extra_special_tokens"
END = "<|endoftext|>"
FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}


class JsonTokenizer:
    """Hugging Face's tokenizer. `special_tokens`: by name, as chat templates read them."""

    def __init__(self, folder: Path) -> None:
        config, file = _config(folder), folder / "tokenizer.json"
        stored = read_json(file) if file.exists() else {"model": _vocabulary(folder)}
        rebuilt = not file.exists() or _is_qwen2(folder, config, stored.get("model"))
        content = _qwen2(stored, bool(config.get("add_prefix_space"))) if rebuilt else stored
        self._file = file if file.exists() else folder / "vocab.json"
        self._tokenizer = _build(content, self._file)
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        if rebuilt:
            config = {"unk_token": END, "eos_token": END, "pad_token": END} | config
        named, extra = _special(config, folder / CONFIG)
        added = _added(folder, config, stored, named, extra)
        given = {str(token): token for token in added}
        named = {name: given.get(str(token), token) for name, token in named.items()}
        present = {str(token) for token in self._tokenizer.get_added_tokens_decoder().values()} | given.keys()
        special = [*named.values(), *extra]
        self.special_tokens = {name: str(token) for name, token in named.items()}
        for token in (*added, *special):
            token.special = token.special or str(token) in self.special_tokens.values()
        with _blamed(str(self._file)):
            self._tokenizer.add_tokens([*added, *(token for token in special if str(token) not in present)])
            if rebuilt:
                self._tokenizer.add_tokens([AddedToken(str(token), special=True) for token in special])
        if not file.exists():
            self._add_ends(bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with _blamed(str(self._file)):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens; bytes that are no character become U+FFFD."""
        with _blamed(str(self._file)):
            return str(self._tokenizer.decode(list(ids)))

    def _add_ends(self, first: bool, last: bool) -> None:
        """Put the bos and eos token round every text, where there is one."""
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        ends = [bos if first else None, eos if last else None]
        special = [(token, self._tokenizer.token_to_id(token)) for token in ends if token]
        single = [ends[0], "$A", ends[1]]
        template = processors.TemplateProcessing(single=[t for t in single if t], special_tokens=special)
        self._tokenizer.post_processor = template


class TiktokenTokenizer:
    """The first generation's: ranks of byte sequences in qwen.tiktoken, and 208 special tokens after them."""

    def __init__(self, file: Path) -> None:
        try:
            import tiktoken
        except ModuleNotFoundError as error:
            raise TextError(f"{file} needs tiktoken: pip install tiktoken") from error
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise TextError(f"{file}:{number} is not a token in base64 and its rank") from error
        if sorted(ranks.values()) != list(range(len(ranks))) or not ranks.keys() >= {bytes([i]) for i in range(256)}:
            raise TextError(f"{file}: ranks must count from 0, and every byte must have one")
        names = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
        special = {name: len(ranks) + i for i, name in enumerate(names)}
        self._file = file
        self.special_tokens: dict[str, str] = {}  # none has a name
        self._ordinary = len(ranks)
        self._encoding = tiktoken.Encoding("qwen", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Nothing is put round a text, whatever `add_special_tokens` says."""
        with _blamed(str(self._file)):
            return list(self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all"))

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens; bytes that are no character become U+FFFD."""
        return str(self._encoding.decode([i for i in ids if i < self._ordinary]))


def read_tokenizer(folder: Path) -> JsonTokenizer | TiktokenTokenizer:
    """Raises TextError or CheckpointError, which name the file that is missing or wrong."""
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return JsonTokenizer(folder)
    if (folder / "qwen.tiktoken").exists():
        return TiktokenTokenizer(folder / "qwen.tiktoken")
    raise TextError(
        f"{folder / 'tokenizer.json'} is missing, and so are vocab.json and qwen.tiktoken: "
        "text needs the checkpoint's tokenizer"
    )


def _is_qwen2(folder: Path, config: dict[str, Any], vocabulary: object) -> bool:
    """Whether transformers reads a tokenizer.json as a Qwen2Tokenizer, which takes no more than the vocabulary and
    what is put round a text from it."""
    if not isinstance(vocabulary, dict) or vocabulary.get("type") != "BPE":
        return False
    model = read_optional_json(folder / "config.json")
    if model.get("model_type") == "qwen2":  # other classes are known to be named by mistake
        return True
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if isinstance(named, str):
        return named.removesuffix("Fast") == "Qwen2Tokenizer"
    return model.get("model_type") == "qwen3"


def _qwen2(stored: dict[str, Any], prefix: bool) -> dict[str, Any]:
    """tokenizer.json of Qwen2's tokenizer with the vocabulary of another. `prefix`: a text begins with a space."""
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    vocabulary = {name: stored["model"].get(name) for name in ("vocab", "merges")}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": stored.get("post_processor"),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", **vocabulary},
    }


def _vocabulary(folder: Path) -> dict[str, Any]:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    read_text(merges)  # says what is wrong with the file itself
    read_json(vocab)
    with _blamed(f"{vocab} and {merges.name}"):
        found = BPE.read_file(str(vocab), str(merges))
    return {"vocab": found[0], "merges": found[1]}


def _build(content: dict[str, Any], file: Path) -> Tokenizer:
    """Without truncation and padding, which are of training."""
    with _blamed(f"{file} is no tokenizer"):
        return Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """What a library raises is an error about this. They raise nothing narrower, and panics, which are no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error) in (Exception, ValueError) or type(error).__name__ == "PanicException":
            raise TextError(f"{what}: {error}") from error
        raise


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what an older file says beside one that does not name tokens by id."""
    config = read_optional_json(folder / CONFIG)
    if not config.get(EXTRA) and "additional_special_tokens" in config:  # its former name
        config[EXTRA] = config.pop("additional_special_tokens")
    return config if BY_ID in config else config | read_optional_json(folder / "special_tokens_map.json")


def _added(
    folder: Path,
    config: dict[str, Any],
    stored: dict[str, Any],
    named: dict[str, AddedToken],
    extra: list[AddedToken],
) -> list[AddedToken]:
    """Tokens beside the vocabulary's, in the order of their ids, which is all that counts: they follow its last."""
    if BY_ID in config:
        listed = config[BY_ID]
        if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
            raise TextError(f"{folder / CONFIG}: {BY_ID} is no object of token ids")
        return [_token(listed[key], folder / CONFIG) for key in sorted(listed, key=int)]
    special = {str(named[name]) for name in NAMES if name in named}
    special |= {str(token) for token in extra if config.get(EXTRA)}
    found = {}
    file = folder / "added_tokens.json"
    for text, index in read_optional_json(file).items():
        if type(index) is not int:
            raise TextError(f"{file}: the id of {text!r} is no integer")
        found[index] = AddedToken(text, normalized=text not in special, special=text in special)
    file = folder / "tokenizer.json"
    for entry in stored.get("added_tokens") or []:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise TextError(f"{file}: an added token without an id")
        found[entry["id"]] = _token(entry, file)
    return [found[index] for index in sorted(found)]


def _special(config: dict[str, Any], place: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens that have a name, and those that have none."""
    extra = config.get(EXTRA) or config.get("additional_special_tokens") or []
    named = {name: config.get(name) for name in NAMES}
    named |= {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and name not in NAMES and isinstance(value, str | dict)
    }
    if isinstance(extra, dict):
        named |= extra
        extra = []
    if not isinstance(extra, list):
        raise TextError(f"{place}: extra_special_tokens is no list")
    return (
        {name: _token(value, place) for name, value in named.items() if value is not None},
        [_token(value, place) for value in extra],
    )


def _token(value: object, place: Path) -> AddedToken:
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return AddedToken(value["content"], **{name: bool(flag) for name, flag in value.items() if name in FLAGS})
    if isinstance(value, str):
        return AddedToken(value, special=True)
    raise TextError(f"{place}: {json.dumps(value)[:80]} is no token")
