"""The JSON Schema that editors read, against the loader that decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwenspec.source import parse_file
from qwenspec.spec.schema import json_schema, schema_text
from qwenspec.tree import plain

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def tree(path: Path) -> Any:
    """A file's plain data as JSON has it."""
    return json.loads(json.dumps(plain(parse_file(path).root)))


def test_the_committed_schema_is_current() -> None:
    committed = ROOT / "specs" / "schema" / "spec.v1.schema.json"
    assert committed.read_text(encoding="utf-8") == schema_text()


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_shipped_specs_follow_the_schema(path: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(tree(path))] == []
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema/spec.v1.schema.json\n")


@pytest.mark.parametrize(
    "name",
    ["unknown-key", "missing-key", "wrong-type", "wrong-type-document", "not-allowed", "out-of-range", "variant-name"],
)
def test_the_schema_refuses_what_the_loader_refuses(name: str) -> None:
    assert not VALIDATOR.is_valid(tree(ROOT / "tests" / "diagnostics" / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ((), "familly"),
        (("architecture",), "hiden_size"),
        (("architecture", "rope"), "thetta"),
        (("variants", "qwen3-0.6b"), "hiden_size"),
        (("variants", "qwen3-0.6b"), "schema_version"),
    ],
)
def test_an_unknown_key_anywhere_is_refused(where: tuple[str, ...], key: str) -> None:
    document = tree(ROOT / "specs" / "qwen3.yaml")
    target = document
    for step in where:
        target = target[step]
    target[key] = 1
    (error,) = VALIDATOR.iter_errors(document)
    assert key in error.message or any(key in inner.message for inner in error.context)


def test_parts_of_mappings_are_allowed_in_variants() -> None:
    document = tree(ROOT / "specs" / "qwen3.yaml")
    document["variants"]["partial"] = {
        "extends": "#qwen3-8b",
        "description": "a few lines",
        "rope": {"scaling": {"factor": 2}},
        "quantization": {"group_size": 64},
        "norm": {"weight": "one_plus"},
    }
    document["variants"]["nothing"] = None
    assert VALIDATOR.is_valid(document)


def test_every_key_of_an_architecture_is_described() -> None:
    schema = json_schema()
    properties = schema["$defs"]["Architecture"]["properties"] | schema["properties"]
    assert [key for key, value in properties.items() if not value.get("description")] == []
