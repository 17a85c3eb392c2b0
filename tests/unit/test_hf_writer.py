"""Numbers in written specs: every reader of YAML or JSON takes them for what they are."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from qwenspec import source, tree
from qwenspec.hf.writer import number, write_spec

# The floats of YAML 1.2's core schema (10.3.2); those without a point or exponent are integers there.
CORE_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(1e-6)
@example(1e22)
@example(1e16)
@example(5e-324)
@example(-0.0)
@example(1.5e300)
def test_a_float_is_one_to_every_reader(value: float) -> None:
    text = number(value)
    assert CORE_FLOAT.fullmatch(text)
    assert "." in text
    for read in (yaml.safe_load(text), json.loads(text), plain(text), float(text)):
        assert type(read) is float
        assert repr(read) == repr(value)


def plain(text: str) -> object:
    """As specs are read."""
    return tree.plain(source.parse(f"x: {text}\n", "f").root)["x"]


@pytest.mark.parametrize(
    ("value", "text"), [(1e-6, "1.0e-6"), (1e22, "1.0e+22"), (2.5e-7, "2.5e-7"), (10000.0, "10000.0"), (0.001, "0.001")]
)
def test_numbers_as_they_are_written(value: float, text: str) -> None:
    assert number(value) == text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@given(st.dictionaries(st.text(min_size=1, max_size=12), TREES, max_size=5))
def test_a_tree_is_read_as_it_was_written(architecture: dict[str, object]) -> None:
    """By PyYAML, which knows YAML 1.1."""
    document = {"schema_version": 1, "family": "f", "description": "", "default_variant": "v"}
    text = write_spec(document | {"architecture": architecture, "variants": {"v": {}}})
    assert repr(yaml.safe_load(text)["architecture"]) == repr(architecture)
