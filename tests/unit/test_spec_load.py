"""Variants, `extends` and merging; what is told about a file as a whole."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_specs import make_spec

from qwenspec import source
from qwenspec.diagnostics import Diagnostic, Location, SpecError, nearest, render
from qwenspec.spec.checkpoint import builtin_layouts
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load, load_all, variants
from qwenspec.spec.rope import Linear, Yarn

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "norm": {"eps": 1e-6},
    "rope": {"theta": 1e4},
}


def write(path: Path, **keys: Any) -> Path:
    """A spec file; JSON is YAML."""
    path.write_text(json.dumps({"schema_version": 1, "family": "f", "architecture": ARCHITECTURE} | keys))
    return path


def mistakes(path: Path | str, variant: str | None = None) -> list[Diagnostic]:
    with pytest.raises(SpecError) as caught:
        load(path, variant)
    return list(caught.value.diagnostics)


# --------------------------------------------------------------------------------------------- the specs we ship


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_shipped_specs_have_no_mistakes(path: Path) -> None:
    specs = load_all(path)
    assert [spec.variant for spec in specs] == variants(path)
    assert load(path) in specs
    assert all(load(path, spec.variant) == spec == load(f"{path}#{spec.variant}") for spec in specs[:3])


def test_names_are_unique_in_all_shipped_specs() -> None:
    names = [name for path in SPECS for name in variants(path)]
    assert len(names) == len(set(names)) > 0


def test_reading_specs_imports_no_library_of_tensors() -> None:
    program = (
        "import sys; from qwenspec.spec.load import load_all; [load_all(path) for path in sys.argv[1:]];"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", program, *SPECS], check=True)


def test_a_text_is_parsed_once_however_many_variants_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: Counter[str] = Counter()
    parse = source.parse
    monkeypatch.setattr(source, "parse", lambda text, file: [parsed.update([file]), parse(text, file)][1])
    base = write(tmp_path / "base.yaml", variants={f"b-{i}": {} for i in range(50)})
    layouts: tuple[object, ...] = (*builtin_layouts(), {"extends": "qwen2"})
    own: list[dict[str, Any]] = [{"checkpoint": {"layout": layout}} for layout in layouts]
    named = {f"f-{i}": {"extends": f"{base}#b-{i}", **own[i % len(own)]} for i in range(50)}
    assert len(load_all(write(tmp_path / "f.yaml", variants=named))) == 50
    assert parsed[str(base)] == parsed[str(tmp_path / "f.yaml")] == 1
    assert max(parsed.values()) == 1


# ----------------------------------------------------------------------------------------------------- variants


def test_a_variant_overrides_the_shared_part_key_by_key(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.yaml",
        description="the family",
        default_variant="f-b",
        variants={
            "f-a": {"norm": {"weight": "one_plus"}, "description": "one"},
            "f-b": {"rope": {"theta": 1e6}, "attention": {"bias": {"qkv": True}}},
            "f-c": None,
        },
    )
    a, b, c = load_all(path)
    assert (a.architecture.norm.eps, a.architecture.norm.weight) == (1e-6, "one_plus")
    assert (b.architecture.norm.weight, b.architecture.rope.theta) == ("plain", 1e6)
    assert (b.architecture.attention.bias.qkv, b.architecture.attention.bias.output) == (True, False)
    assert [spec.description for spec in (a, b, c)] == ["one", "the family", "the family"]
    assert load(path) == b
    assert load(path, "f-c") == c == load(f"{path}#f-c")
    assert {spec.file for spec in (a, b, c)} == {str(path)}


def test_a_file_without_variants_is_one_named_like_its_family(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", family="tiny-f")
    (spec,) = load_all(path)
    assert (spec.family, spec.variant) == ("tiny-f", "tiny-f")
    assert load(path) == load(path, "tiny-f") == spec
    assert variants(path) == ["tiny-f"]


def test_a_single_variant_is_the_default(tmp_path: Path) -> None:
    assert load(write(tmp_path / "f.yaml", variants={"f-a": {}})).variant == "f-a"


def test_several_variants_need_a_default_only_when_none_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", variants={"f-a": {}, "f-b": {}})
    assert len(load_all(path)) == 2
    assert load(path, "f-b").variant == "f-b"
    (told,) = mistakes(path)
    assert told.code == "no-default-variant"
    assert "`f-a` or `f-b`" in told.hint


def test_an_unknown_variant_has_a_nearest_spelling(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", variants={"f-small": {}, "f-large": {}})
    for told in (*mistakes(path, "f-smal"), *mistakes(f"{path}#f-smal")):
        assert told.code == "unknown-variant"
        assert "did you mean `f-small`?" in told.hint


def test_a_mistake_in_one_variant_does_not_stop_another(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", variants={"f-a": {}, "f-b": {"num_key_value_heads": 3}})
    assert load(path, "f-a").variant == "f-a"
    assert [told.code for told in mistakes(path, "f-b")] == ["kv-heads-do-not-divide"]


def test_a_file_name_may_hold_a_number_sign(tmp_path: Path) -> None:
    path = write(tmp_path / "a#b.yaml")
    assert load(path).variant == "f"
    assert load(f"{path}#f").variant == "f"


# ------------------------------------------------------------------------------------------------------ extends


def test_extends_another_file(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(
        tmp_path / "bases" / "base.yaml",
        family="base",
        quantization={"scheme": "int4", "group_size": 32},
        variants={"b-1": {"hidden_size": 128}, "b-2": {}},
    )
    path = tmp_path / "f.yaml"
    path.write_text(
        "schema_version: 1\nfamily: f\nextends: bases/base.yaml#b-1\narchitecture: {dtype: float16}\n"
        "variants:\n"
        "  f-a: {}\n"
        "  f-b: {extends: '#f-a', vocab_size: 97, quantization: {group_size: 64}}\n"
        "  f-c: {extends: bases/base.yaml#b-2, quantization: {scheme: int8}}\n"
        "  f-d: {extends: '#f-c', dtype: float32, quantization: null}\n"
    )
    a, b, c, d = load_all(path)
    assert [s.architecture.hidden_size for s in (a, b, c, d)] == [128, 128, 64, 64]
    assert [s.architecture.dtype for s in (a, b, c, d)] == ["float16", "float16", "float16", "float32"]
    assert [s.architecture.vocab_size for s in (a, b, c, d)] == [96, 97, 96, 96]
    assert [s.quantization and s.quantization.model_dump(exclude={"skip"}) for s in (a, b, c, d)] == [
        {"scheme": "int4", "group_size": 32, "head": "int8"},
        {"scheme": "int4", "group_size": 64, "head": "int8"},
        {"scheme": "int8", "head": "int8"},
        None,
    ]


def test_another_scheme_of_a_kv_cache_replaces_it(tmp_path: Path) -> None:
    """Its keys mean something else; another `scales` is merged."""
    variants = {"f-a": {"dtype": "float16", "kv_cache": {"scheme": "int8"}}, "f-b": {"kv_cache": {"scales": "token"}}}
    path = write(tmp_path / "f.yaml", kv_cache={"scheme": "fp8_e4m3", "scales": "checkpoint"}, variants=variants)
    a, b = load_all(path)
    assert (a.architecture.dtype, a.kv_cache.model_dump()) == ("float16", {"scheme": "int8"})
    assert b.kv_cache.model_dump() == {"scheme": "fp8_e4m3", "scales": "token"}


def test_extends_without_a_name_means_the_default_variant(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", default_variant="b-2", variants={"b-1": {}, "b-2": {"vocab_size": 7}})
    (tmp_path / "f.yaml").write_text("schema_version: 1\nfamily: f\nextends: base.yaml\n")
    assert load(tmp_path / "f.yaml").architecture.vocab_size == 7


def test_files_may_extend_each_other_without_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", variants={"a-1": {"vocab_size": 7}, "a-2": {"extends": "b.yaml#b-1"}})
    write(tmp_path / "b.yaml", architecture={}, variants={"b-1": {"extends": "a.yaml#a-1", "hidden_size": 32}})
    spec = load(tmp_path / "a.yaml", "a-2")
    assert spec.architecture.vocab_size == 96  # the shared part of a.yaml is nearer than what b.yaml inherited
    assert load(tmp_path / "b.yaml").architecture.vocab_size == 7


def test_another_kind_replaces_a_mapping_whole(tmp_path: Path) -> None:
    yarn = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}
    path = write(
        tmp_path / "f.yaml",
        architecture=ARCHITECTURE | {"rope": {"theta": 1e4, "scaling": yarn}},
        variants={
            "f-same": {"rope": {"scaling": {"factor": 2}}},
            "f-linear": {"rope": {"scaling": {"kind": "linear", "factor": 2}}},
            "f-none": {"rope": {"scaling": None}},
        },
    )
    same, linear, none = (spec.architecture.rope.scaling for spec in load_all(path))
    assert same == Yarn(**(yarn | {"factor": 2.0}))
    assert linear == Linear(kind="linear", factor=2.0)
    assert none is None


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    sliding = {"sliding_window": {"window": 8, "layers": [0, 1]}}
    path = write(
        tmp_path / "f.yaml",
        architecture=ARCHITECTURE | {"attention": sliding},
        variants={"f-a": {"attention": {"sliding_window": {"layers": [3]}}}},
    )
    (spec,) = load_all(path)
    assert spec.architecture.attention.sliding_window
    assert spec.architecture.attention.sliding_window.layers == (3,)


def test_an_inherited_mistake_is_told_in_the_file_that_wrote_it(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", variants={"b": {"num_key_value_heads": 3}})
    (tmp_path / "f.yaml").write_text("schema_version: 1\nfamily: f\nextends: base.yaml#b\n")
    (told,) = mistakes(tmp_path / "f.yaml")
    assert told.location
    assert told.location.file == str(base)


# ------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", builtin_layouts())
def test_builtin_layouts(name: str, tmp_path: Path) -> None:
    spec = load(write(tmp_path / "f.yaml", architecture=ARCHITECTURE | {"checkpoint": {"layout": name}}))
    assert "{i}" in spec.layout.layer


def test_a_layout_file_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = builtin_layouts()["qwen1"].read_text().replace("transformer.wte", "tokens")
    (tmp_path / "sub" / "names.yaml").write_text(names)
    write(tmp_path / "sub" / "base.yaml", architecture=ARCHITECTURE | {"checkpoint": {"layout": "./names.yaml"}})
    (tmp_path / "f.yaml").write_text("schema_version: 1\nfamily: f\nextends: sub/base.yaml\n")
    assert load(tmp_path / "f.yaml").layout.embedding == "tokens"


def test_an_inline_layout(tmp_path: Path) -> None:
    layout = load(write(tmp_path / "f.yaml")).layout.model_dump()
    spec = load(write(tmp_path / "g.yaml", architecture=ARCHITECTURE | {"checkpoint": {"layout": layout}}))
    assert spec.layout.model_dump() == layout


def test_a_layout_extends_another_by_the_names_that_differ(tmp_path: Path) -> None:
    base = load(write(tmp_path / "f.yaml")).layout.model_dump()
    changes = {"lm_head": "output", "attention": {"qkv": ["self_attn.W_pack"], "q_norm": None}}
    expected = base | {"lm_head": "output", "attention": base["attention"] | changes["attention"]}
    expected["attention"]["qkv"] = ("self_attn.W_pack",)

    inline = write(tmp_path / "g.yaml", architecture=with_layout(changes | {"extends": "qwen2"}))
    (tmp_path / "names.yaml").write_text(json.dumps(changes | {"extends": "qwen2"}))
    file = write(tmp_path / "h.yaml", architecture=with_layout("./names.yaml"))
    whole = write(tmp_path / "i.yaml", architecture=with_layout(expected))
    for spec in map(load, (inline, file, whole)):
        assert spec.layout.model_dump() == expected
        assert spec.layout.extends is None
    assert load(inline).sha256() == load(whole).sha256()
    assert Spec.model_validate(load(inline).model_dump()).layout == load(inline).layout  # as a failure's folder has it


def test_layouts_extend_one_another_from_where_they_lie(tmp_path: Path) -> None:
    """A file that extends one beside it, which extends a built-in one; and a variant that changes one more name."""
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "a.yaml").write_text("extends: b.yaml\nnorm: last_norm\n")
    (tmp_path / "names" / "b.yaml").write_text("extends: qwen1\nlm_head: output\nnorm: overridden\n")
    spec = write(
        tmp_path / "f.yaml",
        architecture=with_layout({"extends": "names/a.yaml", "embedding": "tokens"}),
        variants={"v": {"checkpoint": {"layout": {"embedding": "words"}}}},
        default_variant="v",
    )
    layout = load(spec).layout
    assert (layout.embedding, layout.norm, layout.lm_head) == ("words", "last_norm", "output")
    assert layout.attention.qkv == ("attn.c_attn",)


def test_a_chain_of_layouts_is_bounded(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"n{i}.yaml").write_text(f"extends: {f'./n{i - 1}.yaml' if i else 'qwen2'}\n")
    assert load(write(tmp_path / "f.yaml", architecture=with_layout("n7.yaml"))).layout.lm_head == "lm_head"
    (told,) = mistakes(write(tmp_path / "g.yaml", architecture=with_layout("n8.yaml")))
    assert told.code == "extends-too-long"


def with_layout(layout: object) -> dict[str, Any]:
    return ARCHITECTURE | {"checkpoint": {"layout": layout}}


# -------------------------------------------------------------------------------------------------------- meaning


def test_the_hash_is_of_the_meaning(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", description="one")
    commented = tmp_path / "g.yaml"
    commented.write_text("# the same\n" + path.read_text().replace('"one"', '"two"'))
    assert load(path).sha256() == load(commented).sha256()
    assert load(path).sha256() != load(write(path, architecture=ARCHITECTURE | {"vocab_size": 97})).sha256()


BOUNDARIES: list[dict[str, Any]] = [
    {"num_key_value_heads": None},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_attention_heads": 5, "num_key_value_heads": 5, "attention": {"head_dim": 16}},
    {"rope": {"theta": 1e4, "partial_rotary_factor": 0.125}},  # two of sixteen values rotate
    {"rope": {"theta": 1e4, "partial_rotary_factor": 0.25, "scaling": {"kind": "ntk", "factor": 1}}},
    {"attention": {"sliding_window": {"window": 1, "layers": {"from": 4}}}},
    {"attention": {"sliding_window": {"window": 512, "layers": [0, 3]}}},
    {"attention": {"logn": {"train_length": 2}}},
    {"lm_head": None, "embedding": {}, "tie_word_embeddings": True},
]


@pytest.mark.parametrize("keys", BOUNDARIES, ids=str)
def test_just_allowed(keys: dict[str, Any], tmp_path: Path) -> None:
    spec = load(write(tmp_path / "f.yaml", architecture=ARCHITECTURE | keys))
    assert isinstance(spec, Spec)


def test_whole_numbers_stand_for_numbers(tmp_path: Path) -> None:
    spec = load(write(tmp_path / "f.yaml", architecture=ARCHITECTURE | {"rope": {"theta": 10000}}))
    assert spec.architecture.rope.theta == 10000.0
    assert isinstance(spec.architecture.rope.theta, float)


# ------------------------------------------------------------------------------------------------ any tree at all

KEYS = st.sampled_from(
    [
        "architecture",
        "variants",
        "extends",
        "family",
        "quantization",
        "scheme",
        "rope",
        "theta",
        "scaling",
        "kind",
        "factor",
        "attention",
        "sliding_window",
        "layers",
        "from",
        "window",
        "norm",
        "eps",
        "checkpoint",
        "layout",
        "layer",
        "mlp",
        "lm_head",
        "embedding",
        "bias",
        "qkv",
        "f-a",
        "default_variant",
        "description",
        "x",
        *list(ARCHITECTURE),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats(allow_nan=True)
    | st.sampled_from(
        ["", "#f-a", "yarn", "linear", "fp8_block", "qwen1", "all", "f-a", "spec.yaml", "bfloat16", "no"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=4))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_tree_is_a_spec_or_has_placed_mistakes(
    tmp_path: Path, architecture: dict[str, Any], top: dict[str, Any]
) -> None:
    path = tmp_path / "spec.yaml"
    text = json.dumps({"schema_version": 1, "family": "f", "architecture": ARCHITECTURE | architecture} | top, indent=1)
    path.write_text(text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf"))
    told = outcome(path)
    assert all(diagnostic.location and diagnostic.location.line for diagnostic in told)
    assert len({(diagnostic.location, diagnostic.code, diagnostic.message) for diagnostic in told}) == len(told)
    assert bool(render(told)) == bool(told)


def outcome(path: Path) -> tuple[Diagnostic, ...]:
    try:
        assert load_all(path)
    except SpecError as error:
        return error.diagnostics
    return ()


# ------------------------------------------------------------------------------------------------------ rendering


def test_carets_stand_under_wide_characters_and_tabs() -> None:
    text = "\t宽: a\u0301bc"
    told = render([Diagnostic("some-code", "some reason", Location("f.yaml", 7, 5, text, 3), "a way out")])
    assert told == (
        "f.yaml:7:5: error[some-code]: some reason\n"
        "   7 |     宽: a\u0301bc\n"
        "     |         ^^\n"
        "     = help: a way out\n"
    )


def test_long_lines_are_cut_around_the_caret() -> None:
    text = "x" * 500 + "HERE" + "y" * 500
    _, line, caret, *_ = render([Diagnostic("c-c", "m", Location("f", 1, 501, text, 4))]).splitlines()
    assert len(line) < 140
    assert line[caret.index("^") : caret.rindex("^") + 1] == "HERE"
    assert line.count("…") == 2


def test_control_characters_do_not_reach_the_terminal() -> None:
    told = render([Diagnostic("c-c", "bad \x1b[31m name", Location("a\x1b.yaml", 1, 1, "a\x1b\x07", 1), "\x07")])
    assert "\x1b" not in told
    assert "\x07" not in told


def test_color_is_only_color() -> None:
    told = [Diagnostic("some-code", "some reason", Location("f.yaml", 7, 1, "text", 3), "a way out")]
    colored = render(told, color=True)
    plain = render(told)
    assert "\x1b[" in colored
    for escape in ("0", "1", "34", "1;31", "1;36"):
        colored = colored.replace(f"\x1b[{escape}m", "")
    assert colored == plain


def test_json_form() -> None:
    assert Diagnostic("c-c", "m", Location("f", 2, 3, "text"), "h").as_dict() == {
        "code": "c-c",
        "message": "m",
        "file": "f",
        "line": 2,
        "column": 3,
        "hint": "h",
    }
    assert Diagnostic("c-c", "m", Location("f", 0, 0)).as_dict() == {"code": "c-c", "message": "m", "file": "f"}
    assert Diagnostic("c-c", "m").as_dict() == {"code": "c-c", "message": "m"}


@pytest.mark.parametrize(
    ("word", "meant"), [("hiden_size", "hidden_size"), ("Hidden-Size", "hidden_size"), ("zzz", None), ("", None)]
)
def test_nearest(word: str, meant: str | None) -> None:
    assert nearest(word, ["hidden_size", "head_dim"]) == meant


def test_nearest_compares_little_whatever_the_word() -> None:
    """Comparing two words takes the square of their lengths."""
    allowed = [f"{'x' * 50}{i}" for i in range(100_000)]
    with patch("difflib.get_close_matches", wraps=difflib.get_close_matches) as asked:
        assert nearest("x" * 10**6, allowed) is not None
    (word, compared) = asked.call_args.args
    assert (len(word), len(compared)) == (80, 500)


def test_a_name_that_no_file_has_is_told_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text('schema_version: 1\nfamily: f\nextends: "\\0bad.yaml"\n')
    with pytest.raises(SpecError) as caught:
        load(tmp_path / "spec.yaml")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.location and diagnostic.location.line) == ("unprintable-path", 3)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"norm": {"eps": 1e-320}}, "norm-eps", "the smallest normal float32 number"),
        ({"rope": {"theta": 1e300}}, "rope-range", "`theta` is 1e+300, beyond float32"),
        ({"rope": {"theta": 1e4, "scaling": {"kind": "ntk", "factor": 1e308}}}, "rope-range", "`factor` is 1e+308"),
    ],
)
def test_numbers_beyond_float32(changes: dict[str, Any], code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=re.escape(words)) as caught:
        make_spec(tmp_path, **changes)
    (problem,) = caught.value.diagnostics
    assert problem.code == code
    assert problem.location is not None
