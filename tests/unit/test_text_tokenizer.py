"""A checkpoint's tokenizer is the one that transformers reads from the same files."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_folders import TINY, change, split_vocabulary, text_folder
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import logging

from qwenspec.backend.runtime.stored import CheckpointError
from qwenspec.backend.runtime.text import Text, TextError
from qwenspec.backend.runtime.tokenizer import JsonTokenizer

logging.set_verbosity_error()

TEXTS = (
    "<|im_start|>user\nsort 5 8 1 3 9 8<|im_end|>\n<|im_start|>assistant\n",
    "sort <tool> 5 <img> <extra>x<bos><late>",
    "  two  spaces\r\n\r\n\tand it's 1234",
    "naïve e\u0301 雪 ½ \u200d <|endoftext|>",
)
DRAWN = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["<|im_end|>", "<tool>", "<img>", "e\u0301", "\u1100\u1161", "  ", "\r\n", "'LL", "12", " x"]),
    ),
    max_size=6,
).map("".join)


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags


BY_ID = {
    "0": token("<|endoftext|>", special=True),
    "1": token("<|im_start|>", special=True),
    "2": token("<|im_end|>", special=True),
    "379": token("<img>", special=True, lstrip=True, rstrip=True),
    "380": token("<tool>", special=False),
    "1000": token("<late>", special=False),
}
FILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "added_tokens": {"added_tokens__json": {"<tool>": 380, "<img>": 379}},
    "special_tokens_map": {
        "added_tokens__json": {"<tool>": 380, "<img>": 379},
        "special_tokens_map__json": {
            "bos_token": token("<bos>"),
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<img>", "<extra>"],
        },
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by_id": {"added_tokens_decoder": BY_ID},
    "ends": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<bos>"},
    "additional": {"additional_special_tokens": ["<tool>", "<extra>"], "image_token": "<img>"},
    "extra": {
        "extra_special_tokens": {"tool_token": "<tool>"},
        "pad_token": token("<extra>") | {"__type": "AddedToken"},
    },
    "split": {"split_special_tokens": True},
    "prefix": {"add_prefix_space": True},
}


def compare(folder: Path, *texts: str) -> None:
    ours, theirs = Text(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in texts:
        for ends in (True, False):
            ids = theirs(text, add_special_tokens=ends)["input_ids"]
            assert ours.encode(text, ends) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours._tokenizer.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("named", ["TokenizersBackend", "Qwen2TokenizerFast", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_the_configuration_says(config: str, named: str | None, model_type: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", model_type)
    change(folder / "tokenizer_config.json", tokenizer_class=named, backend=None, **CONFIGS[config])
    compare(folder, *TEXTS)


@pytest.mark.parametrize("named", ["TokenizersBackend", "Qwen2Tokenizer"])
@pytest.mark.parametrize("files", FILES)
def test_tokens_of_other_files(files: str, named: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", **FILES[files])
    change(folder / "tokenizer_config.json", tokenizer_class=named, backend=None)
    compare(folder, *TEXTS)


@pytest.mark.parametrize("config", CONFIGS)
def test_vocab_json_and_merges_txt(config: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x")
    split_vocabulary(folder)
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", backend=None, **CONFIGS[config])
    compare(folder, *TEXTS)
    assert Text(folder).encode("é") == Text(folder).encode("e\u0301")  # NFC


def test_truncation_and_padding_are_of_training(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x")
    whole = Text(folder).encode(TEXTS[0])
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    filled = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None}
    filled |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    for key, value in {"truncation": cut, "padding": filled}.items():
        changed = text_folder(tmp_path / key)
        change(changed / "tokenizer.json", **{key: value})
        assert Text(changed).encode(TEXTS[0]) == whole
        theirs = AutoTokenizer.from_pretrained(str(changed))
        assert theirs(TEXTS[0], truncation=False, padding=False)["input_ids"] == whole


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json", "rebuilt"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Any]:
    folder = text_folder(tmp_path_factory.mktemp("pair") / "x")
    named = "TokenizersBackend" if request.param == "tokenizer.json" else "Qwen2Tokenizer"
    if request.param == "vocab.json":
        split_vocabulary(folder)
    change(folder / "tokenizer_config.json", tokenizer_class=named, backend=None, added_tokens_decoder=BY_ID)
    return Text(folder), AutoTokenizer.from_pretrained(str(folder))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=DRAWN)
def test_any_text(pair: tuple[Text, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------- qwen.tiktoken


def ranks(folder: Path) -> list[bytes]:
    """The vocabulary of a tokenizer.json without its special tokens, as bytes, in order."""
    back = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), _bytes(), strict=True))
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = sorted((word for word in vocabulary if not word.startswith("<|")), key=vocabulary.__getitem__)
    return [bytes(back[char] for char in word) for word in words]


def _bytes() -> list[int]:
    """Every byte, in the order of the characters that stand for them: the printable ones, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


@pytest.fixture(scope="module")
def first_generation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Any, int]:
    """The same vocabulary as qwen.tiktoken, and as transformers' Qwen2Tokenizer; and its size."""
    parent = tmp_path_factory.mktemp("tiktoken")
    modern = text_folder(parent / "modern")
    words = ranks(modern)
    lines = "".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    old = text_folder(parent / "old", tokenizer__json=None, qwen__tiktoken=lines, tokenizer_config__json=None)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    content = json.loads((modern / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ordered = sorted(content["vocab"], key=content["vocab"].__getitem__)
    vocabulary = {word: i for i, word in enumerate(word for word in ordered if not word.startswith("<|"))}
    split_vocabulary(modern)
    (modern / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    by_id = {str(len(words) + i): token(name, special=True) for i, name in enumerate(names)}
    change(modern / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", backend=None, added_tokens_decoder=by_id)
    return Text(old), AutoTokenizer.from_pretrained(str(modern)), len(words)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=DRAWN)
def test_the_first_generations_tokenizer(first_generation: tuple[Text, Any, int], text: str) -> None:
    ours, theirs, _ = first_generation
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_first_generations_special_tokens(first_generation: tuple[Text, Any, int]) -> None:
    text, _, size = first_generation
    assert text.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>") == [
        *range(size, size + 4),
        size + 207,
    ]
    assert text.decode([*text.encode("a"), size, size + 207, size + 208, 10**6]) == "a"  # nor ids that nothing has


def test_a_library_that_only_the_first_generation_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder(tmp_path / "x", tokenizer__json=None, qwen__tiktoken="")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TextError, match=r"qwen\.tiktoken needs tiktoken: pip install tiktoken$"):
        Text(folder)


# ------------------------------------------------------------------------------------------------ wrong files


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer__json": None}, r"tokenizer\.json is missing, and so are vocab\.json and qwen\.tiktoken"),
        ({"tokenizer__json": ""}, r"tokenizer\.json:1:1 is not valid JSON"),
        ({"tokenizer__json": '{"model": {"vocab"'}, r"tokenizer\.json:1:\d+ is not valid JSON"),
        ({"tokenizer__json": "{}"}, r"tokenizer\.json is no tokenizer: Model missing"),
        ({"tokenizer__json": b"\xff\xfe"}, r"tokenizer\.json is not UTF-8"),
        ({"tokenizer__json": "[" * 100_000}, r"tokenizer\.json is nested too deep"),
        ({"tokenizer__json": "[]"}, r"tokenizer\.json holds no JSON object"),
        ({"tokenizer_config__json": "[1]"}, r"tokenizer_config\.json holds no JSON object"),
        ({"tokenizer_config__json": {"bos_token": {"x": 1}}}, r'tokenizer_config\.json: \{"x": 1\} is no token'),
        ({"tokenizer_config__json": {"bos_token": 7}}, r"tokenizer_config\.json: 7 is no token"),
        ({"tokenizer_config__json": {"extra_special_tokens": 7}}, r"extra_special_tokens is no list"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, r"added_tokens_decoder is no object of"),
        ({"added_tokens__json": {"<tool>": "7"}}, r"added_tokens\.json: the id of '<tool>' is no integer"),
        ({"tokenizer__json": None, "vocab__json": {}}, r"merges\.txt is missing"),
        (
            {"tokenizer__json": None, "vocab__json": {"a": 0}, "merges__txt": "a b c\n"},
            r"vocab\.json and merges\.txt: ",
        ),
        ({"tokenizer__json": None, "vocab__json": {"a": 0}, "merges__txt": "a b\n"}, r"vocab\.json is no tokenizer: "),
        ({"tokenizer__json": None, "qwen__tiktoken": "YQ== 0\nnot base64\n"}, r"qwen\.tiktoken:2 is not a token"),
        ({"tokenizer__json": None, "qwen__tiktoken": "YQ== 0\n"}, r"every byte must have one"),
    ],
)
def test_a_wrong_file_is_named(files: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", **files)
    with pytest.raises((TextError, CheckpointError), match=reason) as raised:
        Text(folder)
    assert str(folder) in str(raised.value)


BACKTRACKING = {"pattern": {"Regex": "(a+)+$"}}
NOTHING = {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False, **BACKTRACKING}},
            ": Onig: Regex",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, " is no tokenizer: Precompiled: "),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, ": index out of bounds"),
        ({**NOTHING, "added_tokens": []}, r": WordLevel error: Missing \[UNK\]"),
    ],
)
def test_what_ends_inside_the_library_is_about_the_file(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Some of it is a panic, which is no Exception."""
    folder = text_folder(tmp_path / "x", model_type="other", tokenizer_config__json="{}")
    change(folder / "tokenizer.json", **changes)
    with pytest.raises(TextError, match=rf"tokenizer\.json{reason}"):
        Text(folder).encode("a" * 40 + "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, TypeError])
def test_what_is_not_about_the_file_stays_what_it_is(error: type[BaseException]) -> None:
    reader = JsonTokenizer(TINY)
    reader._tokenizer = mock.Mock()
    reader._tokenizer.encode.side_effect = error
    with pytest.raises(error):
        reader.encode("a", add_special_tokens=False)


def test_a_text_that_is_too_much_for_the_first_generation(first_generation: tuple[Text, Any, int]) -> None:
    with pytest.raises(TextError, match=r"qwen\.tiktoken: .*stack size"):
        first_generation[0].encode(" " * 1_000_000)


def test_a_text_that_is_not_unicode() -> None:
    with pytest.raises(TextError, match=r"the text is not UTF-8: character 3 is '\\udcff'"):
        Text(TINY).encode("ab\udcff")


def test_a_library_that_text_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qwenspec.backend.runtime.tokenizer", raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TextError, match="text needs tokenizers: pip install tokenizers"):
        Text(TINY)
