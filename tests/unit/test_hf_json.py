"""JSON with places: what Python's own reader takes is read the same, and every mistake has its line and column."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenspec import tree
from qwenspec.diagnostics import SpecError
from qwenspec.hf import json_source

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def listed(value):
    """With lists for the tree's tuples."""
    if isinstance(value, tuple):
        return [listed(item) for item in value]
    return {key: listed(item) for key, item in value.items()} if isinstance(value, dict) else value


@settings(deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans(), st.sampled_from([None, 0, "\t"]))
def test_it_is_what_json_reads(value, escaped, indent):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    document = json_source.parse(text, "x.json")
    assert document.diagnostics == ()
    assert json.dumps(listed(tree.plain(document.root))) == json.dumps(value)
    for path, node in tree.walk(document.root):
        if isinstance(node, tree.Scalar) and isinstance(node.value, str):
            assert json.loads(tree.written(node.location)) == node.value, path


@settings(deadline=None)
@given(st.dictionaries(st.text(), VALUES, min_size=1, max_size=4), st.data())
def test_damaged_text_is_refused_as_json_refuses_it(value, data):
    text = json.dumps(value, indent=1)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", ",", "}", '"', "\\", "\n", "x", "0"])) + text[at + 1 :]
    try:
        expected = json.loads(damaged)
    except ValueError:
        expected = None
    outcome = read(damaged)
    if isinstance(outcome, SpecError):
        assert not isinstance(expected, dict) or "surrogate" in str(outcome)
        (told,) = outcome.diagnostics
        assert told.location.line == 0 or told.location.text == damaged.split("\n")[told.location.line - 1]
    else:
        assert isinstance(expected, dict)
        if not outcome.diagnostics:  # a key that is there twice
            assert json.dumps(listed(tree.plain(outcome.root))) == json.dumps(expected)


def read(text):
    """The document, or why there is none."""
    try:
        return json_source.parse(text, "x.json")
    except SpecError as error:
        return error


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("", "empty-file", 0, 0),
        (" \n\n", "empty-file", 0, 0),
        ("{\n", "json-syntax", 2, 1),
        ("{", "json-syntax", 1, 2),
        ('{"a": 1', "json-syntax", 1, 8),
        ('{"a": 1,}', "json-syntax", 1, 9),
        ('{"a" 1}', "json-syntax", 1, 6),
        ('{\n "a": tru}', "json-syntax", 2, 7),
        ('{"a": 1} x', "json-syntax", 1, 10),
        ('{"a": NaN}', "json-syntax", 1, 7),
        ('{"a": -Infinity}', "json-syntax", 1, 7),
        ('{"a": 01}', "json-syntax", 1, 8),
        ("{// c\n}", "json-syntax", 1, 2),
        ("model_type: qwen3\n", "json-syntax", 1, 1),
        ('{"a": "b\nc"}', "json-syntax", 1, 9),
        ('{"a": "b', "json-syntax", 1, 7),
        ('{"a": "\\ud800"}', "invalid-character", 1, 7),
        ("[]", "not-a-mapping", 1, 1),
        ('"x"', "not-a-mapping", 1, 1),
        ('{"a": ' + "1" * 1001 + "}", "number-too-long", 1, 7),
        ('{"a": ' + "[" * 100_000, "too-deep", 1, 71),
    ],
)
def test_mistakes_have_places(text, code, line, column):
    with pytest.raises(SpecError) as caught:
        json_source.parse(text, "x.json")
    (told,) = caught.value.diagnostics
    assert (told.code, told.location.line, told.location.column) == (code, line, column)


@pytest.mark.parametrize(
    "text", ['{"a": "\\ud83d\\ude00"}', '{"a": "\u2028"}', '{"a": "\x7f"}', "\ufeff{}", '\r\n{\t"a":\r1}', "{}\n\n"]
)
def test_what_yaml_refuses_and_json_does_not(text, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf-8", newline="")
    root = json_source.parse_file(tmp_path / "x.json").root
    assert tree.plain(root) == json.loads(text.removeprefix("\ufeff"))


def test_a_key_twice_is_told_at_the_second():
    (told,) = json_source.parse('{"a": 1,\n "b": 2, "a": 3}', "x.json").diagnostics
    assert (told.code, told.location.line, told.location.column) == ("duplicate-key", 2, 10)


def test_files_that_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "utf16").write_bytes("{}".encode("utf-16"))
    for name, code in (
        ("fifo", "not-a-file"),
        ("utf16", "not-utf-8"),
        ("absent", "file-not-found"),
        (".", "not-a-file"),
    ):
        with pytest.raises(SpecError) as caught:
            json_source.parse_file(tmp_path / name)
        assert caught.value.diagnostics[0].code == code
