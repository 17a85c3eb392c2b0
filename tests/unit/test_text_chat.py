"""Chat templates render as transformers renders them, and what is wrong in one is an error about it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATS, OPTIONS, TEMPLATES
from cli_runs import ROOT
from text_folders import change, text_folder
from transformers import AutoTokenizer

from qwenspec.backend.runtime import chat
from qwenspec.backend.runtime.stored import CheckpointError
from qwenspec.backend.runtime.text import Text, TextError

ONE = CHATS["one"]


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a template may not do is found before its time is up, however slow the machine is."""
    monkeypatch.setattr(chat, "SECONDS", math.inf)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(str(text_folder(tmp_path_factory.mktemp("theirs") / "x")))


def outcome(render: Any, *arguments: Any, **options: Any) -> str:
    try:
        return str(render(*arguments, **options))
    except Exception:
        return "an error"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str, theirs: Any, tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=TEMPLATES[name]))
    rendered = 0
    for messages in CHATS.values():
        for options in OPTIONS:
            asked = {"add_generation_prompt": True, "tokenize": False} | options
            theirs.chat_template = TEMPLATES[name]
            wanted = outcome(theirs.apply_chat_template, messages, **asked)
            assert outcome(text.chat, messages, **options) == wanted
            rendered += wanted != "an error"
    assert rendered >= 3


def test_the_special_tokens_that_a_template_sees(tmp_path: Path) -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ additional_special_tokens }}|{{ cls_token }}"
    folder = text_folder(tmp_path / "x", chat_template__jinja=template)
    named = {"bos_token": "<|im_start|>", "image_token": "<img>", "additional_special_tokens": ["<extra>"]}
    change(folder / "tokenizer_config.json", **named)
    wanted = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(ONE, tokenize=False)
    assert Text(folder).chat(ONE) == wanted == "<|im_start|>|<|im_end|>|<img>||"


def test_a_rendered_chat_gets_no_other_tokens(tmp_path: Path) -> None:
    """As `run --chat` encodes it; a text that is no chat gets them."""
    folder = text_folder(tmp_path / "x")
    added = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    added["single"] = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    added["special_tokens"] = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    change(folder / "tokenizer.json", post_processor=added)
    text, theirs = Text(folder), AutoTokenizer.from_pretrained(str(folder))
    ids = theirs.apply_chat_template(ONE, add_generation_prompt=True)["input_ids"]
    assert text.encode(text.chat(ONE), add_special_tokens=False) == ids
    assert text.encode("5") == theirs("5")["input_ids"] == [*text.encode("5", add_special_tokens=False), 0]


@pytest.mark.parametrize("where", ["list", "object", "files"])
def test_of_several_templates(where: str, tmp_path: Path) -> None:
    named = {"other": "other", "default": "default", "tool_use": "tools", "rag": "rag"}
    folder = text_folder(tmp_path / "x", chat_template__jinja=None)
    if where == "files":
        (folder / "chat_template.jinja").write_text("default")
        (folder / "additional_chat_templates").mkdir()
        for name in ("other", "tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
        change(folder / "tokenizer_config.json", chat_template="the files win")
    else:
        listed = [{"name": name, "template": source} for name, source in named.items()]
        change(folder / "tokenizer_config.json", chat_template=listed if where == "list" else named)
    text, theirs = Text(folder), AutoTokenizer.from_pretrained(str(folder))
    for tools in (None, [], [{"type": "function"}]):
        assert text.chat(ONE, tools=tools) == theirs.apply_chat_template(ONE, tools=tools, tokenize=False)
    assert text.chat(ONE) == "default"
    assert text.chat(ONE, tools=[]) == "tools"
    assert text.chat(ONE, template="rag") == "rag"
    with pytest.raises(TextError, match=r"has the chat templates default, other, rag, tool_use, and no chess$"):
        text.chat(ONE, template="chess")


def test_a_template_of_the_configuration(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", chat_template__jinja=None)
    change(folder / "tokenizer_config.json", chat_template="{{ messages[0].role }}")
    assert Text(folder).chat(ONE) == "user"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (7, "chat_template is neither a text nor several with names"),
        ({"a": 7}, "chat_template is neither a text nor several with names"),
        ([{"nam": "x"}], "chat_template is neither a text nor several with names"),
        ([["x"]], "chat_template is neither a text nor several with names"),
        ({"a": "b"}, "has the chat templates a, and no default"),
        ([], r"has the chat templates .*, and no default"),
        (None, r"has no chat template \(chat_template.jinja or tokenizer_config.json\)"),
    ],
)
def test_what_is_no_template(said: object, reason: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", chat_template__jinja=None)
    change(folder / "tokenizer_config.json", chat_template=said)
    with pytest.raises(TextError, match=reason) as raised:
        Text(folder).chat(ONE)
    assert str(folder) in str(raised.value)


ERRORS = [
    ("a\n{% if %}", 2, "Expected an expression"),
    ("\n\n{{ foo.bar.baz }}", 3, "'foo' is undefined"),
    ("\n{{ messages + 1 }}", 2, "can only concatenate list"),
    ("x\n{% for m in messages %}\n{{ raise_exception('no ' ~ m.role ~ ' \x1b[31m\n!') }}{% endfor %}", 3, ""),
    ("{{ ''.__class__.__mro__ }}", 1, "'__class__' of 'str' object is unsafe"),
    ("{{ cycler.__init__.__globals__ }}", 1, "'__init__' of 'type' object is unsafe"),
    ("{{ messages.append(1) }}", 1, "'append' of 'list' object is unsafe"),
    ("\n{% include '/etc/passwd' %}", 2, "no loader"),
    ("{{ messages | tojson(cls=dict) }}", 1, "unexpected keyword argument"),
    ("{{ 1 / 0 }}", 1, "division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 1, "nested too deep, or calls itself without end"),
    ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", 1, "nested too deep"),
    ("{% set ns = namespace(_a=1) %}", 1, "a namespace has no '_a'"),
    ("{% for a in range(10**12) %}x{% endfor %}", 1, "Range too big"),
    ("{{ 'a' * 10**11 }}", 1, "more than 67,108,864"),
    ("{{ 10**8 * [0] }}", 1, "more than 67,108,864"),
    ("{{ 9**(9**9) }}", 1, "an integer of more than 65,536 bits"),
    ("{{ 'x' | center(10**9) }}", 1, "more than 67,108,864"),
    ("{{ 'x'.ljust(10**9) }}", 1, "more than 67,108,864"),
    ("{{ messages | tojson(indent=10**9) }}", 1, "more than 67,108,864"),
]


@pytest.mark.parametrize(("template", "line", "reason"), ERRORS, ids=range(len(ERRORS)))
def test_a_wrong_template_is_named_with_its_line(template: str, line: int, reason: str, tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=template))
    with pytest.raises(TextError) as raised:
        text.chat(ONE)
    message = str(raised.value)
    assert message.startswith(f"{text.folder / 'chat_template.jinja'}, line {line}: ")
    assert reason in message
    assert message.isprintable()


def test_what_a_template_says_itself(tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=ERRORS[3][0]))
    with pytest.raises(TextError, match=r"line 3: the template says: no user \\x1b\[31m\\n!$"):
        text.chat(ONE)


DOUBLED = "{{% set ns = namespace(x='a' * 100) %}}{{% for i in range(40) %}}{{% set ns.x = {} %}}{{% endfor %}}"


@pytest.mark.parametrize("template", [DOUBLED.format("ns.x + ns.x"), DOUBLED.format("ns.x ~ ns.x")])
def test_values_and_texts_have_a_largest_size(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SIZE", 10_000)
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=template))
    with pytest.raises(TextError, match="more than 10,000"):
        text.chat(ONE)
    many = text_folder(tmp_path / "y", chat_template__jinja="{% for i in range(1001) %}0123456789{% endfor %}")
    with pytest.raises(TextError, match="more than 10,000"):
        Text(many).chat(ONE)
    few = text_folder(tmp_path / "z", chat_template__jinja="{% for i in range(1000) %}0123456789{% endfor %}")
    assert len(Text(few).chat(ONE)) == 10_000


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(20) %}{% for b in range(20) %}{% for c in [1] %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(8) }}",
        "{% for m in [[0, 0]] recursive %}{{ loop([[0, 0], [0, 0]]) if loop.depth < 8 }}{% endfor %}",
    ],
    ids=["loops", "macro", "recursive loop"],
)
def test_a_template_that_takes_too_long(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of loops in loops and macros that call themselves twice, each round looks at the clock."""
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=template))
    assert text.chat(ONE) == ""
    monkeypatch.setattr(chat, "SECONDS", 0.0)
    with pytest.raises(TextError, match=r"chat_template\.jinja, line 1: it does not end within 0 seconds"):
        text.chat(ONE)


LARGE = [
    "'%900000000s' % 'x'",
    "'%*d' % (900000000, 1)",
    "'%900000000s' | format('x')",
    "'%(a)s%(a)s' | format(a=t)",
    "'{:>900000000}'.format('x')",
    "'{:>{w}}'.format('x', w=900000000)",
    "'{0}{0}'.format(t)",
    "'{a}{a}'.format_map({'a': t})",
    "'\\t'.expandtabs(tabsize=900000000)",
    "'x'.encode().ljust(900000000)",
    "(1).to_bytes(length=900000000)",
    "'x'.zfill(900000000)",
    "t.join(['a', 'b', 'c'])",
    "'a,a'.translate({97: t})",
    "'aaa'.replace('a', t)",
    "'aaa'.encode().replace('a'.encode(), t.encode())",
    "([t] * 2) | join",
    "[{'a': t}, {'a': t}] | join(attribute='a')",
    "[0, 1, 2] | join(t)",
    "'aaa' | replace('a', t)",
    "('\\n' * 100) | indent(1000000)",
    "('\\n' * 9) | indent(t)",
    "'x' | center(width=900000000)",
    "'a b c' | wordwrap(1, wrapstring=t)",
    "'www.a.de www.a.de' | urlize(target=t)",
    "[1] | tojson(indent=900000000)",
    "[1, 2, 3] | tojson(separators=(t, t))",
    "([t] * 2) | tojson",
    "([t] * 2) | string",
    "([t] * 2) | pprint",
    "([t] * 2) | escape",
    "([t] * 2) ~ ''",
    "[t] * 2",
    "{'a': t, 'b': t} | xmlattr",
    "{'a': t, 'b': t} | urlencode",
    "[[0]] | slice(90000000) | list",
    "[[0]] | batch(90000000, 0) | list",
    "([[0] * 40000000] * 2) | sum(start=[])",
    "3 ** 12000000",
    "1 | round(-900000000)",
    "1 | round(900000000, 'ceil')",
    "lipsum(90000000)",
]


@pytest.mark.parametrize("value", LARGE)
def test_nothing_makes_more_than_a_template_may(value: str) -> None:
    """Asked for with a text of 40 million characters, it is refused before there is more."""
    source = f"{{% set t = 'x' * 40000000 %}}{{% set y = {value} %}}{{{{ y }}}}"
    tracemalloc.start()
    try:
        with pytest.raises(TextError, match=r"more than (67,108,864|65,536) "):
            chat.render(chat.Template(source, "template"), [], {})
        assert tracemalloc.get_traced_memory()[1] < 7e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'%5s|%-3d' % ('x', 1700000000)", "    x|1700000000"),
        ("'{:>3}{n:02}'.format('x', n=10**10)", "  x10000000000"),
        ("[{'a': 1}, {'a': 2}] | join('-', attribute='a')", "1-2"),
        ("[{'a': 1}, {'a': 2}] | sum('a', 5)", "8"),
        ("[[1], [2]] | sum(start=[])", "[1, 2]"),
        ("2.345 | round(2, 'floor')", "2.34"),
        ("{'b': ['é', 1.5], 'a': none} | tojson(sort_keys=true)", '{"a": null, "b": ["é", 1.5]}'),
        ("'a\\nb' | indent(2)", "a\n  b"),
        ("'a,b' | replace(',', '')", "ab"),
        ("1700000000 * 1000", "1700000000000"),
        ("['a', 'b'] | map('center', 3) | join", " a  b "),
    ],
)
def test_what_is_bounded_is_computed_as_ever(value: str, text: str) -> None:
    assert chat.render(chat.Template(f"{{{{ {value} }}}}", "template"), [], {}) == text


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", chat_template__jinja="→ é")
    change(folder / "tokenizer_config.json", bos_token="雪")
    code = "import sys; from qwenspec.backend.runtime.text import Text; t = Text(sys.argv[1]); "
    code += "print(ascii([t.chat([]), t.encode('雪')[0] > 2, t._tokenizer.special_tokens['bos_token']]))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code.replace("'雪'", r"'\u96ea'"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ascii(["→ é", True, "雪"]) + "\n"


def test_a_template_that_is_not_utf_8(tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", chat_template__jinja=b"\xff\xfe"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        text.chat(ONE)


# ------------------------------------------------------------------------- generation_config.json, and stop tokens


def test_stop_tokens_are_those_of_the_generation_config_first(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", generation_config__json={"eos_token_id": [2, 0]})
    change(folder / "config.json", eos_token_id=7)
    assert Text(folder).stop_tokens() == {0, 2}
    change(folder / "generation_config.json", eos_token_id=5)
    assert Text(folder).stop_tokens() == {5}
    change(folder / "generation_config.json", eos_token_id=None)
    assert Text(folder).stop_tokens() == {7}


@pytest.mark.parametrize("wrong", ["abc", [None], True, [True], -1, 2.5, {"a": 1}, [[2]], ["a", None], float("inf")])
def test_what_is_no_stop_token(wrong: object, tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", generation_config__json={"eos_token_id": wrong}))
    with pytest.raises(TextError, match=r"generation_config\.json: eos_token_id is neither a token id nor a list"):
        text.stop_tokens()


def test_sampling_is_what_the_generation_config_says(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x")
    assert Text(folder).sampling() == {}  # do_sample is false
    change(folder / "generation_config.json", do_sample=True)
    assert Text(folder).sampling() == {"temperature": 1.0}
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    change(folder / "generation_config.json", **said)
    assert Text(folder).sampling() == said
    change(folder / "generation_config.json", do_sample=False)
    assert Text(folder).sampling() == {}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"do_sample": "yes"}, "do_sample is neither true nor false"),
        ({"top_k": "20"}, "top_k is no number"),
        ({"top_k": 2.5}, "top_k is an integer from 0 on, and not 2.5"),
        ({"top_k": float("inf")}, "top_k is an integer from 0 on, and not inf"),
        ({"temperature": True}, "temperature is no number"),
        ({"temperature": 10**400}, "int too large to convert to float"),
        ({"temperature": -1}, "temperature is a number from 0 on, and not -1"),
        ({"temperature": float("nan")}, "temperature is a number from 0 on, and not nan"),
        ({"top_p": 0}, "top_p is above 0 and at most 1, and not 0"),
    ],
)
def test_sampling_that_cannot_be(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    text = Text(text_folder(tmp_path / "x", generation_config__json={"do_sample": True} | said))
    with pytest.raises(TextError, match=rf"generation_config\.json: {reason}"):
        text.sampling()
