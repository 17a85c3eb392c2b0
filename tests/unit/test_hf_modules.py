"""sentence-transformers' modules.json: whether to normalise; what is not the last token's state is refused by name."""

import json

import pytest

from qwenspec.diagnostics import SpecError
from qwenspec.hf.modules import normalizes

LAST = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
TYPES = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path):
    """Write modules.json and a config.json for each module after the first."""

    def write(kinds, pooling=LAST, **files):
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": TYPES + kind}
            for i, kind in enumerate(kinds)
        ]
        for module in modules[1:]:
            (tmp_path / module["path"]).mkdir(exist_ok=True)
            keys = pooling if module["path"].endswith("Pooling") else {}
            (tmp_path / module["path"] / "config.json").write_text(json.dumps(keys))
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        return tmp_path

    return write


def refusal(path):
    with pytest.raises(SpecError) as caught:
        normalizes(path)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.code, diagnostic.message


def test_modules_say_whether_to_normalize(folder, tmp_path):
    assert normalizes(tmp_path) == (None, ())
    assert normalizes(folder(["Transformer", "Pooling", "Normalize"])) == (True, ())
    assert normalizes(folder(["Transformer", "Pooling"])) == (False, ())


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["Transformer", "Pooling", "Dense"], "the module `Dense` is not supported"),
        (["Transformer", "Pooling", "Dense", "Normalize"], "the module `Dense` is not supported"),
        (["Transformer", "Pooling", "LayerNorm"], "the module `LayerNorm` is not supported"),
        (["Transformer", "WordWeights", "Pooling"], "the module `WordWeights` is not supported"),
        (["Transformer", "Normalize", "Pooling"], "the modules are"),
        (["Transformer"], "the modules are"),
        ([], "the modules are"),
    ],
)
def test_other_modules_are_refused_by_name(folder, kinds, said):
    code, message = refusal(folder(kinds))
    assert code == "unsupported-module"
    assert message.startswith(said)


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),  # older than the last token's
        ({"word_embedding_dimension": 8}, "mean"),
        ({}, "mean"),
        (LAST | {"pooling_mode_lasttoken": False, "pooling_mode_cls_token": True}, "cls"),
        (LAST | {"pooling_mode_mean_tokens": True}, "mean and lasttoken"),
        (LAST | {"pooling_mode_lasttoken": False}, "nothing"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "weightedmean", "pooling_mode_lasttoken": True}, "weightedmean"),
        ({"pooling_mode": ["cls", "lasttoken"]}, "cls and lasttoken"),
    ],
)
def test_other_poolings_are_refused_by_name(folder, pooling, said):
    code, message = refusal(folder(["Transformer", "Pooling"], pooling))
    assert (code, message.split("`")[1]) == ("unsupported-pooling", said)


def test_the_last_token_s_pooling_in_its_other_forms(folder):
    assert normalizes(folder(["Transformer", "Pooling"], {"pooling_mode": "lasttoken"})) == (False, ())
    assert normalizes(folder(["Transformer", "Pooling"], LAST | {"include_prompt": False})) == (False, ())
    alone, (note,) = normalizes(folder(["Transformer", "Pooling"], {"pooling_mode_lasttoken": True}))
    assert (alone, "the last token's alone" in note) == (False, True)


def test_prompts_are_told(folder):
    path = folder(["Transformer", "Pooling"])
    prompts = {"prompts": {"query": "Instruct: ", "document": ""}, "default_prompt_name": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert "a package does not" in normalizes(path)[1][0]
    named = prompts | {"default_prompt_name": "a\nb"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(named))
    assert "\n" not in normalizes(path)[1][0]
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"document": ""}}))
    assert normalizes(path) == (False, ())


@pytest.mark.parametrize(
    "text",
    [
        '{"not": "a list"}',
        "3",
        "[1]",
        '[{"type": "a.Pooling", "path": "../../etc"}]',
        '[{"type": "a.Pooling", "path": "/dev/zero"}]',
        '[{"type": 3, "path": ""}]',
        '[{"type": "a.Pooling"}]',
    ],
)
def test_what_is_no_list_of_modules(folder, text):
    path = folder(["Transformer", "Pooling"])
    (path / "modules.json").write_text(text)
    assert refusal(path)[0] == "bad-modules"


def test_broken_json_is_told_as_such(folder):
    path = folder(["Transformer", "Pooling"])
    (path / "1_Pooling/config.json").write_text("")
    assert refusal(path)[0] == "empty-file"
    (path / "modules.json").write_text("[\n")
    assert refusal(path)[0] == "json-syntax"
