"""From token ids to text as they come: whole characters, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_folders import TINY, change, text_folder

from qwenspec.backend.runtime.detokenizer import TextStream
from qwenspec.backend.runtime.text import Text, TextError

TEXT = Text(TINY)
BYTE = {byte: ids[0] for byte in range(128) if len(ids := TEXT.encode(chr(byte), False)) == 1}


def pieces(ids: Sequence[int], stop: Sequence[str] = (), text: Text = TEXT) -> tuple[list[str], bool]:
    """What is taken after each token, until a stop; and whether it stopped."""
    stream, found = TextStream(text, stop), []
    for number, token in enumerate(ids, start=1):
        stopped = stream.add(token)
        found.append(stream.take(stopped or number == len(ids)))
        if stopped:
            return found, True
    return found, False


def expected(whole: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop that is complete first, character by character."""
    for end in range(1, len(whole) + 1):
        ends = [word for word in stop if whole[:end].endswith(word)]
        if ends:
            return whole[: end - max(map(len, ends))], True
    return whole, False


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ids=st.lists(st.integers(0, 333), min_size=1, max_size=30))
def test_the_pieces_of_any_tokens_are_their_text(ids: list[int]) -> None:
    found, stopped = pieces(ids)
    assert "".join(found) == TEXT.decode(ids)
    assert not stopped


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    text=st.lists(st.sampled_from(["sort", "user", "assistant", "so", "or", "t", " "]), min_size=1, max_size=6).map(
        "".join
    ),
    stop=st.lists(st.text("sort ", min_size=1, max_size=5), max_size=3),
    whole=st.booleans(),
)
def test_a_stop_string_is_found_wherever_tokens_end(text: str, stop: list[str], whole: bool) -> None:
    ids = TEXT.encode(text, False) if whole else [BYTE[ord(char)] for char in text]
    found, stopped = pieces(ids, stop)
    assert ("".join(found), stopped) == expected(text, stop)


def test_the_stop_string_that_is_complete_first_counts() -> None:
    """However the text is cut into tokens."""
    whole, letters = TEXT.encode("sort", False), [BYTE[ord(char)] for char in "sort"]
    assert len(whole) == 1
    assert pieces(whole, ["sort", "or", "rt"]) == (["s"], True)
    assert pieces(letters, ["sort", "or", "rt"]) == (["", "", "s"], True)


def test_a_character_waits_for_its_last_byte() -> None:
    ids = TEXT.encode("naïve 雪!", False)
    found, _ = pieces(ids)
    assert "".join(found) == "naïve 雪!"
    assert not any("\ufffd" in piece for piece in found)
    assert found.count("") == 3  # one of ï's two bytes, two of 雪's three


def test_a_character_that_is_cut_off_is_told_at_the_end() -> None:
    found, _ = pieces(TEXT.encode("a雪", False)[:-1])
    assert found == ["a", "", "\ufffd"]


def test_what_may_begin_a_stop_string_waits_no_longer_than_it_may() -> None:
    ids = [BYTE[ord(char)] for char in "abaabbx"]
    assert pieces(ids, ["abb"])[0] == ["", "", "ab", "a", "", ""]
    assert pieces(ids[:5], ["abbb"])[0] == ["", "", "ab", "a", "ab"]  # at the end it is told
    assert pieces(ids, ["zz"])[0] == list("abaabbx")


def test_special_tokens_are_not_shown(tmp_path: Path) -> None:
    ids = TEXT.encode("a<|im_start|>b<|endoftext|>c", False)
    assert pieces(ids)[0] == ["a", "", "b", "", "c"]
    folder = text_folder(tmp_path / "x", added_tokens__json={"<tool>": 334})
    change(folder / "tokenizer_config.json", bos_token="<bos>")
    text = Text(folder)
    assert "".join(pieces(text.encode("a<tool>b<bos>c", False), text=text)[0]) == "a<tool>bc"  # <tool> is not special


def test_every_prompt_has_a_stream_of_its_own() -> None:
    first, second = TextStream(TEXT), TextStream(TEXT)
    snow = TEXT.encode("雪", False)
    first.add(snow[0])
    second.add(BYTE[ord("x")])
    assert (first.take(False), second.take(False)) == ("", "x")
    for token in snow[1:]:
        first.add(token)
    assert first.take(True) == "雪"


def test_a_stop_string_says_something() -> None:
    for stop, reason in (("", "a stop string is empty"), ("\udcff", "the text is not UTF-8")):
        with pytest.raises(TextError, match=reason):
            TextStream(TEXT, [stop])


def test_one_text_is_not_several_stops() -> None:
    with pytest.raises(TextError, match=r"stop is several texts, as \['END'\]"):
        TextStream(TEXT, "END")
