"""YAML 1.2's core schema, places, and what a file may not do to us."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwenspec.diagnostics import Location, SpecError, render
from qwenspec.source import MAX_BYTES, MAX_NODES, parse, parse_file
from qwenspec.spec.load import load
from qwenspec.tree import Mapping, Scalar, Sequence, at, place, plain, walk, written


def value_of(text: str) -> Any:
    return plain(parse(f"key: {text}\n", "file").root)["key"]


# --------------------------------------------------------------------------------------------- the core schema


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("1.0E+6", 1e6),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.0", -0.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("+12", 12),
        ("-7", -7),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        # Text in 1.2, something else in 1.1.
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("190:20:30", "190:20:30"),
        ("2001-01-23", "2001-01-23"),
        ("=", "="),
        ("'<<'", "<<"),
        # Text in both.
        ("1e", "1e"),
        (".", "."),
        ("e6", "e6"),
        ("0o8", "0o8"),
        ("nan", "nan"),
        ("tRUE", "tRUE"),
        ("'1'", "1"),
        ('"true"', "true"),
        ('"null"', "null"),
        ('""', ""),
        ("٣", "٣"),  # a digit, but not an ASCII one
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(value_of(".nan"))


def test_literal_and_folded_text() -> None:
    assert plain(parse("a: |\n  1\n  2\nb: >-\n  3\n  4\n", "f").root) == {"a": "1\n2\n", "b": "3 4"}


def test_an_alias_stands_for_its_value_and_is_placed_where_that_was_written() -> None:
    root = parse("a: &x [1, 2]\nb: *x\nc: &y {d: 3}\ne: *y\n", "f").root
    assert plain(root) == {"a": (1, 2), "b": (1, 2), "c": {"d": 3}, "e": {"d": 3}}
    assert place(root, ("b", 1)) == place(root, ("a", 1))
    assert root.entries["b"].key.line == 2


# ------------------------------------------------------------------------------------------------------ places

TEXT = """\
# a comment
schema_version: 1
rope: {theta: 1e6, scaling: null}
variants:
  small:
    layers:
      - 0
      - "two"
  empty:
"""


@pytest.mark.parametrize(
    ("path", "line", "column", "text"),
    [
        (("schema_version",), 2, 17, "1"),
        (("rope",), 3, 7, "{theta: 1e6, scaling: null}"),
        (("rope", "theta"), 3, 15, "1e6"),
        (("variants", "small", "layers", 0), 7, 9, "0"),
        (("variants", "small", "layers", 1), 8, 9, '"two"'),
        (("variants", "empty"), 9, 3, "empty"),
        # What is absent is told at the key of the mapping that lacks it.
        (("rope", "base"), 3, 1, "rope"),
        (("variants", "small", "hidden_size"), 5, 3, "small"),
    ],
)
def test_places(path: tuple[str | int, ...], line: int, column: int, text: str) -> None:
    here = place(parse(TEXT, "f").root, path)
    assert (here.file, here.line, here.column) == ("f", line, column)
    assert here.text == TEXT.splitlines()[line - 1]
    assert written(here) == text


def test_an_absent_top_level_key_is_told_at_the_start() -> None:
    assert place(parse(TEXT, "f").root, ("family",)).line == 2


def test_at() -> None:
    root = parse(TEXT, "f").root
    assert plain(at(root, ("variants", "small", "layers", 1)) or root) == "two"
    assert at(root, ("variants", "small", "layers", 2)) is None
    assert at(root, ("schema_version", "x")) is None


# ----------------------------------------------------------------------------------------------- any input at all

# Of one UTF-16 unit: JSON escapes the others as pairs, which YAML does not read.
WORDS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    WORDS,
)
TREES = st.dictionaries(
    WORDS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
        max_leaves=20,
    ),
    max_size=6,
)


def as_lists(value: Any) -> Any:
    if isinstance(value, tuple):
        return [as_lists(item) for item in value]
    return {key: as_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


@given(TREES)
def test_json_is_yaml(tree: dict[str, Any]) -> None:
    """JSON means in YAML 1.2 what it means in JSON."""
    document = parse(json.dumps(tree), "f")
    assert as_lists(plain(document.root)) == tree
    assert document.diagnostics == ()


class Quoting(yaml.SafeDumper):
    """pyyaml writes for 1.1 readers: text that only 1.2 takes for a number must be quoted by hand."""


Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(TREES, st.booleans())
def test_dumped_trees_come_back(tree: dict[str, Any], flow: bool) -> None:
    text = yaml.dump(tree, Dumper=Quoting, default_flow_style=flow, width=60)
    root = parse(text, "f").root
    assert as_lists(plain(root)) == tree
    lines = text.splitlines()
    for path, node in walk(root):
        here = node.location
        assert here.text == lines[here.line - 1]
        if path and isinstance(node, Scalar) and node.value is not None:
            starts_like(node, written(here))
        elif isinstance(node, Sequence) and flow:
            assert written(here).startswith("[")
        if isinstance(node, Mapping):
            assert all(written(entry.key).startswith('"') for entry in node.entries.values())


def starts_like(node: Scalar, text: str) -> None:
    """The source at a scalar's place begins with that scalar."""
    if isinstance(node.value, str):
        assert text.startswith('"')
    elif isinstance(node.value, bool):
        assert text == str(node.value).lower()
    else:
        assert float(text) == float(node.value or 0)


@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbfa: 1\n")
@example(b"\xff\xfea\x00")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_bytes_never_cause_a_traceback(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(data)
    answers_once(lambda: parse_file(path))


YAML_LIKE = st.lists(
    st.sampled_from(
        [
            "a",
            "b: ",
            "- ",
            "? ",
            ": ",
            "\n",
            "\n  ",
            "\t",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "&x ",
            "*x",
            "!",
            "!!str ",
            "|",
            ">",
            "---\n",
            "...\n",
            "%YAML 1.2\n",
            "'",
            '"',
            "#",
            "\\",
            "<<: ",
            "1e6",
            "0o17",
            "~",
            "\r",
            "\u2028",
            "\x85",
            "@",
            "`",
        ]
    ),
    max_size=40,
).map("".join)


@given(st.text(max_size=200) | YAML_LIKE)
@settings(max_examples=500)
def test_text_never_causes_a_traceback(text: str) -> None:
    answers_once(lambda: parse(text, "f"))


def answers_once(read: Any) -> None:
    """A document, or exactly one diagnostic that has a place."""
    try:
        read()
    except SpecError as error:
        (diagnostic,) = error.diagnostics
        assert diagnostic.message
        assert diagnostic.location


# ----------------------------------------------------------------------------------------------- large and hostile


def alphabet_soup() -> str:
    letters = random.Random(0)
    return "".join(letters.choices("ab:-[]{}?&*!|>'\"@`#, \n", k=MAX_BYTES))


def chain_of_aliases() -> str:
    """The billion laughs: ten levels of nine aliases would be three billion values."""
    links = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)]
    return "a0: &a0 [ha, ha, ha]\n" + "".join(links)


HOSTILE = {
    "deep lists": "[" * MAX_BYTES,
    "deep mappings": "{a: " * (MAX_BYTES // 4),
    "deep block lists": "- " * (MAX_BYTES // 2),
    "deep complex keys": "? " * (MAX_BYTES // 2),
    "deep aliases": "".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 []\n" for i in range(100)),
    "billion laughs": chain_of_aliases(),
    "many keys": "".join(f"key_{i}: 1\n" for i in range(70_000)),
    "many items": "- a\n" * (MAX_BYTES // 4),
    "many duplicates": "a: 1\n" * (MAX_BYTES // 5),
    "many tags": "- !a b\n" * (MAX_BYTES // 7),
    "many anchors": "- &a\n" * (MAX_BYTES // 5),
    "many documents": "--- a\n" * (MAX_BYTES // 6),
    "many directives": "".join(f"%TAG !a{i}! b\n" for i in range(MAX_BYTES // 18)),
    "directives after a document": "a: 1\r...\r" + "".join(f"%TAG !a{i}! b\r" for i in range(MAX_BYTES // 18)),
    "one long scalar": "a" * MAX_BYTES,
    "one long number": "a: " + "1" * (MAX_BYTES - 3),
    "open quotes": '"' + "a\n" * (MAX_BYTES // 2 - 1),
    "comments": "#\n" * (MAX_BYTES // 2),
    "spaces": " " * MAX_BYTES,
    "alphabet soup": alphabet_soup(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_much_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more events than the largest spec has, and no directive, of which libyaml takes the square of their number."""
    path = tmp_path / "spec.yaml"
    path.write_bytes(HOSTILE[name].encode()[:MAX_BYTES])
    given: list[str] = []
    events: list[yaml.Event] = []
    parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Counting(parser):  # type: ignore[misc]
        def __init__(self, text: str) -> None:
            given.append(text)
            super().__init__(text)

        def get_event(self) -> yaml.Event:
            events.append(super().get_event())
            return events[-1]

    monkeypatch.setattr(yaml, parser.__name__, Counting)
    with pytest.raises(SpecError) as caught:
        parse_file(path)
    assert len(events) <= 2 * MAX_NODES
    assert not re.search("^%", "".join(given), re.MULTILINE)
    (diagnostic,) = caught.value.diagnostics
    assert len(diagnostic.message) < 200


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    root = parse_file(path).root
    assert plain(root) == {"a": 1, "b": 2}
    assert (root.entries["b"].key.line, root.entries["b"].key.column) == (2, 1)


def test_a_missing_file_is_told_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "qwen3.yaml").touch()
    named = Location("other.yaml", 3, 10, "extends: qwen4.yaml", 10)
    with pytest.raises(SpecError) as caught:
        parse_file(tmp_path / "qwen4.yaml", wanted_by=named)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "file-not-found"
    assert diagnostic.location == named
    assert "qwen3.yaml" in diagnostic.hint


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError) as caught:
        parse_file(tmp_path / "pipe")
    assert [d.code for d in caught.value.diagnostics] == ["not-a-file"]


def test_a_file_that_another_names_is_yaml_and_no_link_to_what_is_not(tmp_path: Path) -> None:
    """Diagnostics quote lines: those of any file that the user can read would be told to whoever sees them."""
    (tmp_path / "secret").write_text("password: hunter2\nhunter3")
    (tmp_path / "names.yaml").symlink_to(tmp_path / "secret")
    (tmp_path / "spec.yaml").write_text("extends: names.yaml\nfamily: f\nschema_version: 1\n")
    with pytest.raises(SpecError) as caught:
        load(tmp_path / "spec.yaml")
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["not-a-yaml-file"]
    assert "hunter" not in render(caught.value.diagnostics)
    (tmp_path / "other.yaml").write_text("a: [")
    (tmp_path / "names.yaml").unlink()
    (tmp_path / "names.yaml").symlink_to("other.yaml")
    with pytest.raises(SpecError, match="not valid YAML"):
        load(tmp_path / "spec.yaml")


@pytest.mark.parametrize("digits", ["9" * 1001, "0x" + "f" * 1000, "-" + "1" * 1000])
def test_integers_are_no_longer_than_anyone_writes(digits: str) -> None:
    with pytest.raises(SpecError, match=r"a number of 1,00\d characters"):
        parse(f"a: {digits}", "f.yaml")
