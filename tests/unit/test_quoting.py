"""No text of a spec's, nor its path, becomes code: packages of hostile ones are those of tame ones."""

from __future__ import annotations

import ast
import functools
import json
import shlex
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from cli_runs import TINY, call
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qwenspec.backend.emit import render_package
from qwenspec.backend.quoting import comment, inside_quotes
from qwenspec.backend.registry import MANIFEST, find, installed
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

# What could end a literal, a comment or a line, begin a template's expression, or be read as it does not look.
PARTS = (
    *("'", '"', '"""', "'''", "\\", "\\N{DASH}", "\\x41", "#", "%s", "%(prog)s", "{{ 7 * 7 }}", "{% raw %}", "{#"),
    *("\n", "\r", "\t", "\f", "\v", "\x00", "\x1b[2J", "\x85", "\u2028", "\u2029", "\u202e", "\ufeff", "\udcff", "é"),
    *(
        "\nimport os\n",
        '"""\nimport os\n"""',
        "'; import os; '",
        "# type: ignore",
        "# fmt: off",
        "$(id)",
        "`id`",
        "{i}",
    ),
)
hostile = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), min_size=1, max_size=6).map("".join)
calm = hypothesis.settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    path = tmp_path_factory.mktemp("tame") / "tiny.yaml"
    path.write_text(TINY)
    return load(path, "tiny").model_copy(update={"file": "tame.yaml"})


def changed(spec: Spec, name: str, path: str, description: str, module: str) -> Spec:
    """What no check would let through: generation does not rely on them."""
    layout = spec.layout.model_copy(update={"embedding": module, "layer": f"{module}.{{i}}", "ignore": (module,)})
    texts = {"variant": name, "family": name, "file": path, "description": description, "layout": layout}
    return spec.model_copy(update=texts | {"options": (("quantization", path),)})


@pytest.mark.parametrize("backend", installed())
@hypothesis.settings(calm, max_examples=5)
@hypothesis.example(name='"', path="a\n__import__('os').abort()#.yaml", description='"""', module='"{i}\n')
@hypothesis.example(name="x", path="coding=raw_unicode_escape \\u000aimport os\\u000a#", description="", module="m")
@hypothesis.example(name='"""\nimport os\n"""', path="a\r__import__('os').abort()#", description="{{ 7 }}", module="\\")
@given(name=hostile, path=hostile, description=hostile, module=hostile)
def test_a_hostile_spec_gives_the_code_of_a_tame_one(
    backend: str, name: str, path: str, description: str, module: str, tame: Spec
) -> None:
    name = f"{name}~tame~{name}"  # unlike anything else in the code
    before = tame_package(backend, tame)
    after = render_package(changed(tame, name, path, description, module), find(backend))
    assert after.keys() == before.keys()
    for file in before.keys() - {MANIFEST}:
        assert code(after[file], name) == code(before[file], "tame"), file


@functools.cache
def tame_package(backend: str, tame: Spec) -> dict[str, str]:
    return render_package(changed(tame, "tame", "tame.yaml", "Tame.", "tame"), find(backend))


def code(text: str, name: str) -> str:
    """The syntax tree, where literals have a word for the variant's name; white space at the ends of docstrings is the
    formatter's."""
    tree = ast.parse(text.encode())  # as a file, whose first lines may name its encoding
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = node.value.replace(name, "NAME").replace(name.strip(), "NAME")
    return ast.dump(tree)


def outline(value: Any) -> Any:
    """Of JSON the keys and the types."""
    if isinstance(value, dict):
        return {key: outline(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [outline(inner) for inner in value]
    return type(value).__name__


@calm
@given(hostile | st.text())
def test_a_comment_is_one_line_and_a_literal_what_it_says(text: str) -> None:
    commented = f"# {comment(text)}\nx = 1\n"
    assert ast.dump(ast.parse(commented)) == ast.dump(ast.parse("x = 1\n"))
    assert len(commented.splitlines()) == 2
    commented.encode()
    for quote in ('"', '"""'):
        literal = f"{quote}{inside_quotes(text)}{quote}"
        assert ast.literal_eval(literal) == text
        assert len(literal.splitlines()) == 1
        literal.encode()


def test_ordinary_names_stay_as_they_are() -> None:
    for text in ("qwen3-0.6b", "müller/日本語\u3000模型 2.yaml", "it's"):
        assert comment(text) == text
    assert inside_quotes("müller/日本語") == "müller/日本語"


@pytest.mark.parametrize("name", ["my spec.yaml", "it's.yaml", "$(id).yaml"])
def test_the_command_in_a_package_makes_it_again(name: str, tmp_path: Path) -> None:
    """As a shell reads it."""
    spec = tmp_path / name
    spec.write_text(TINY)
    package = Path(json.loads(call("gen", f"{spec}#tiny-tied", "-o", tmp_path / "out", "--json").stdout)[0]["package"])
    said = next(line for line in (package / "config.py").read_text().splitlines() if line.startswith("#   "))
    program, *arguments = shlex.split(said.removeprefix("#"))
    assert program == "qwenspec"
    again = call(*arguments, "-o", tmp_path / "out", "--check")
    assert (again.exit_code, again.stderr) == (0, "1 package up to date\n")


@pytest.mark.parametrize("mark", ["\n", "\r", "\x1b", "\u2028", "\u202e", "\udcff"])
def test_a_path_that_cannot_be_printed_is_refused(mark: str, tmp_path: Path) -> None:
    (tmp_path / f"a{mark}b").mkdir()
    for path in (f"a{mark}b.yaml", f"a{mark}b/spec.yaml"):
        (tmp_path / path).write_text(TINY)
        refused = call("gen", tmp_path / path, "-o", tmp_path / "out")
        assert refused.exit_code == 2
        assert "error[unprintable-path]" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [r"\0bad.yaml", r"bad\n.yaml", r"a\rb/c.yaml"])
@pytest.mark.parametrize("key", ["extends", "layout"])
def test_so_is_one_that_a_spec_names(key: str, name: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    line = f'extends: "{name}"\n' if key == "extends" else f'architecture: {{checkpoint: {{layout: "{name}"}}}}\n'
    spec.write_text(f"schema_version: 1\nfamily: f\n{line}")
    refused = call("validate", spec)
    assert refused.exit_code == 2
    assert f"{spec}:3:" in refused.stderr
    assert "error[unprintable-path]" in refused.stderr


@pytest.mark.parametrize("name", ["", "../up", "/tmp/x", "a b", 'x"""', "x\n", "class", "a" * 101, "{{ 7 }}"])
def test_a_spec_checks_its_name_itself(name: str, tame: Spec) -> None:
    with pytest.raises(ValidationError, match="cannot name a variant"):
        Spec.model_validate(tame.model_dump(by_alias=True) | {"variant": name})


def test_the_index_of_a_layer_is_replaced_in_names_alone(tmp_path: Path) -> None:
    """`F1` begins the first layer's names, and a dtype of its tensors."""
    layout = "{embedding: e, layer: 'F{i}', input_norm: a, post_attention_norm: b, norm: n, lm_head: h, "
    layout += "attention: {qkv: [q, k, v], o: o, q_norm: qn, k_norm: kn}, mlp: {gate_up: [g, u], down: d}}"
    spec = tmp_path / "spec.yaml"
    spec.write_text(TINY.replace("architecture:\n", f"architecture:\n  checkpoint: {{layout: {layout}}}\n"))
    package = Path(json.loads(call("gen", f"{spec}#tiny-int8", "-o", tmp_path, "--json").stdout)[0]["package"])
    text = (package / MANIFEST).read_text()
    assert "F{i}.q" in text
    assert '"F16"' in text
    assert "F{i}6" not in text
