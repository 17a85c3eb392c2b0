"""A spec that was right, with one thing changed in its text: what is told is about that line, and can be printed."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenspec.diagnostics import Diagnostic, SpecError, render
from qwenspec.spec.load import load_all

GOOD = """\
schema_version: 1
family: tiny
description: "of every sort of value"
default_variant: tiny
architecture:
  vocab_size: 40
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 128
  dtype: float32
  tie_word_embeddings: true
  norm:
    eps: 1.0e-6
    weight: plain
  attention:
    head_dim: 16
    scale: 0.25
    bias:
      qkv: true
      output: false
    qk_norm: per_head
    logn:
      train_length: 16
    sliding_window:
      window: 8
      layers: [0]
  rope:
    theta: 10000.0
    partial_rotary_factor: 0.5
    scaling:
      kind: yarn
      factor: 2.0
      original_max_position_embeddings: 64
      truncate: true
  mlp:
    activation: silu
    bias: false
  checkpoint:
    layout: qwen2
quantization:
  scheme: gptq
  bits: 4
  group_size: 16
variants:
  tiny: {}
"""
LINES = GOOD.splitlines()
KEY = re.compile(r"( *)(\w+):(?: (.+))?$")
KEYED = [(number, *match.groups()) for number, line in enumerate(LINES, 1) if (match := KEY.fullmatch(line))]
LEAVES = [one for one in KEYED if one[3] is not None]
# Without them a spec is another one, but right.
OPTIONAL = {"description", "default_variant", "num_key_value_heads", "tie_word_embeddings", "dtype", "weight", "scale"}
OPTIONAL |= {"head_dim", "qkv", "output", "qk_norm", "partial_rotary_factor", "truncate", "activation", "bias"}
OPTIONAL |= {"group_size", "layers", "train_length", "tiny"}
VALUES = [
    "{}",
    "[1, two]",
    "{odd: {}}",
    "-1",
    "1.5",
    "true",
    "null",
    '"\\u001b[31m\\u0000"',
    "'\u2028'",
    "\U0001f600",
    "1e999",
    ".nan",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed") / "spec.yaml"


def told(file: Path, lines: list[str]) -> tuple[Diagnostic, ...]:
    """Of the file with these lines, each a thing that can be found in it and printed."""
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        load_all(file)
    except SpecError as error:
        diagnostics = error.diagnostics
    else:
        return ()
    for diagnostic in diagnostics:
        place = diagnostic.location
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", diagnostic.code)
        assert diagnostic.message
        assert place is not None
        assert place.file == str(file)
        assert 1 <= place.line <= len(lines) + 1  # where the file ends
        assert place.text == [*lines, ""][place.line - 1]
        assert 1 <= place.column <= len(place.text) + 1
        assert place.column - 1 + place.width <= len(place.text) + 1
    shown = render(diagnostics)
    assert all(char == "\n" or char.isprintable() or unicodedata.category(char) == "Zs" for char in shown), repr(shown)
    return diagnostics


def test_it_is_right(file: Path) -> None:
    assert told(file, LINES) == ()


@pytest.mark.parametrize(("number", "indent", "key", "value"), KEYED, ids=[f"{n}-{key}" for n, _, key, _ in KEYED])
def test_a_key_of_another_name(file: Path, number: int, indent: str, key: str, value: str | None) -> None:
    """It is told where it stands, with the right name, and to take that up is the whole way out."""
    lines = LINES.copy()
    lines[number - 1] = lines[number - 1].replace(f"{key}:", f"{key}x:")
    found = {diagnostic.code: diagnostic for diagnostic in told(file, lines)}
    if key == "tiny":
        assert found.keys() == {"unknown-variant"}  # default_variant's line says which it is
        return
    if key in ("kind", "scheme"):  # without it nobody knows which keys there are
        assert f"`{key}`" in found["missing-key"].message
        return
    unknown = found["unknown-key"]
    assert unknown.location is not None
    assert (unknown.location.line, unknown.location.column) == (number, len(indent) + 1)
    assert f"`{key}x`" in unknown.message
    assert f"`{key}`" in unknown.hint


@pytest.mark.parametrize(("number", "indent", "key", "value"), LEAVES, ids=[f"{n}-{key}" for n, _, key, _ in LEAVES])
def test_a_key_that_is_gone(file: Path, number: int, indent: str, key: str, value: str) -> None:
    """It is named, at the mapping that lacks it or at the variant; or nothing is wrong."""
    found = told(file, LINES[: number - 1] + LINES[number:])
    assert bool(found) == (key not in OPTIONAL)
    for diagnostic in found:
        assert diagnostic.code == (
            "wrong-type" if key == "layout" else "missing-key"
        )  # nothing is left of `checkpoint`
        assert f"`{key}`" in diagnostic.message
        assert diagnostic.location is not None
        above = [n for n, other, *_ in KEYED if n < number and len(other) < len(indent)]
        assert diagnostic.location.line in (max(above, default=1), len(LINES) - 1)


@given(leaf=st.sampled_from(LEAVES), value=st.sampled_from(VALUES))
def test_a_value_of_another_sort(file: Path, leaf: tuple[int, str, str, str], value: str) -> None:
    """What is told first is about this line, or about a line that no longer goes with it."""
    number, _, key, before = leaf
    lines = LINES.copy()
    lines[number - 1] = lines[number - 1].replace(f"{key}: {before}", f"{key}: {value}")
    found = told(file, lines)
    wrong = [one for one in found if one.code in ("wrong-type", "not-allowed", "out-of-range", "schema-version")]
    assert all(one.location and one.location.line == number for one in wrong), wrong
    if value in ("{odd: {}}", "[1, two]"):
        assert [one for one in found if one.location and one.location.line == number], found
    if found and not wrong:
        assert any(f"`{key}`" in one.message or (one.location and one.location.line == number) for one in found), found


@given(data=st.data())
def test_text_that_was_cut_doubled_or_spoilt(file: Path, data: st.DataObject) -> None:
    lines = LINES.copy()
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        how = data.draw(st.sampled_from(["cut", "twice", "indent", "insert"]))
        at = data.draw(st.integers(0, len(lines[number])))
        if how == "cut":
            lines[number] = lines[number][:at]
        elif how == "twice":
            lines.insert(number, lines[number])
        elif how == "indent":
            lines[number] = data.draw(st.sampled_from([" ", "  "])) + lines[number]
        else:
            lines[number] = (
                lines[number][:at]
                + data.draw(st.sampled_from("\t\x1b:{[&*!'\"#|-?%@\xa0\u202e宽"))
                + lines[number][at:]
            )
    told(file, lines)
