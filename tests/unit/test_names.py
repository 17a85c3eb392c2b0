"""What a SPEC may be: a file, a variant that comes with qwenspec, or a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import QWEN3, ROOT, TINY, call, data, process

import qwenspec
from qwenspec.commands.specs import pick, weights_of
from qwenspec.diagnostics import SpecError
from qwenspec.spec import bundled
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load, load_all

EXAMPLE = ROOT / "examples" / "tiny-qwen3"
SPECS = sorted((ROOT / "specs").glob("*.yaml"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder without the spec that the example has beside its weights."""
    folder = tmp_path / "Tiny Model"
    folder.mkdir()
    for file in EXAMPLE.iterdir():
        if file.suffix != ".yaml":
            shutil.copy(file, folder)
    return folder


def refusal(spec: str, variant: str | None = None) -> tuple[str, str, str]:
    """The one diagnostic's code, message and hint."""
    with pytest.raises(SpecError) as caught:
        pick(spec, variant)
    (told,) = caught.value.diagnostics
    return told.code, told.message, told.hint


def meaning(spec: Spec) -> tuple[object, str]:
    """All of a spec but where it came from."""
    return spec.model_dump(), spec.sha256()


# ------------------------------------------------------------------------------------------ variants by their names


def test_every_variant_has_a_name_of_its_own() -> None:
    """By which it is found, whatever its file is called."""
    specs = [spec for file in SPECS for spec in load_all(file)]
    assert [*bundled.variants()] == [spec.variant for spec in specs]
    for spec in specs:
        whole = f"qwenspec:{Path(spec.file).name}#{spec.variant}"
        for spelled in ("{}", "qwenspec:{}", "Qwen/{}"):
            assert bundled.resolve(spelled.format(spec.variant)) == whole
            assert bundled.resolve(spelled.format(spec.variant.title())) == whole
    for spec in specs[::10]:
        assert meaning(load(spec.variant)) == meaning(spec)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("qwenspec:qwen3.yaml", "qwen3-0.6b"),
        ("qwenspec:qwen3.yaml#qwen3-8b", "qwen3-8b"),
        ("qwenspec:Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen3-Embedding-4B", "qwen3-embedding-4b"),
        ("Qwen/QwQ-32B", "qwq-32b"),
    ],
)
def test_a_name_says_which_variant(name: str, variant: str) -> None:
    found = qwenspec.load(name)
    assert (found.variant, found.file[:9]) == (variant, "qwenspec:")
    assert pick(name) == found


def test_the_same_file_by_either_name_is_the_same_spec() -> None:
    ours, files = load("qwen3-8b"), load(f"{QWEN3}#qwen3-8b")
    assert meaning(ours) == meaning(files)
    assert (ours.file, files.file) == ("qwenspec:qwen3.yaml", QWEN3)


def test_an_option_names_another_variant_of_the_same_file() -> None:
    assert pick("qwen3-0.6b", "qwen3-8b").variant == "qwen3-8b"
    assert pick(f"{QWEN3}#qwen3-0.6b", "qwen3-8b").variant == "qwen3-8b"


def test_what_exists_is_never_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qwen3-8b").write_text(TINY)
    assert load("qwen3-8b").variant == "tiny"
    assert load("qwenspec:qwen3-8b").variant == "qwen3-8b"
    Path("qwen3-4b").mkdir()
    assert refusal("qwen3-4b")[0] == "not-a-checkpoint"


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        ("qwen3-0.66b", "unknown-spec", "did you mean `qwen3-0.6b`"),
        ("Qwen/Qwen3-0.66B", "unknown-spec", "did you mean `qwen3-0.6b`"),
        ("qwenspec:qwen3-0.66b", "unknown-spec", "did you mean `qwen3-0.6b`"),
        ("something-else", "unknown-spec", "`qwenspec list` shows what comes with qwenspec"),
        ("no/such/qwen3.yaml#qwen3-8b", "file-not-found", "`qwenspec:qwen3.yaml#qwen3-8b` comes with qwenspec"),
        ("qwen3.yaml#no-such", "file-not-found", "`qwenspec:qwen3.yaml` comes with qwenspec"),
        ("no/such/thing", "file-not-found", ""),
        ("Llama/Qwen3-0.6B", "file-not-found", ""),
    ],
)
def test_what_nothing_is_called(
    name: str, code: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, message, way_out = refusal(name)
    assert found == code
    assert name.partition("#")[0].removeprefix("qwenspec:") in message
    assert way_out.startswith(hint)


def test_a_variant_among_very_many_is_told_in_a_line() -> None:
    code, _, hint = refusal(f"{QWEN3}#qwen3-0.66b")
    assert code == "unknown-variant"
    count = len(load_all(QWEN3))
    assert hint.endswith(f"? `qwenspec list {QWEN3}` shows all {count}")
    assert hint.startswith("did you mean `qwen3-0.6b`, ")
    assert hint.count("`") == 2 * 4  # three variants and the command


def test_a_spec_extends_what_comes_with_qwenspec(tmp_path: Path) -> None:
    text = "schema_version: 1\nfamily: longer\nextends: {}\narchitecture: {{max_position_embeddings: 131072}}\n"
    for base in ("qwenspec:qwen3.yaml#qwen3-8b", "qwenspec:qwen3-8b"):
        spec = tmp_path / "longer.yaml"
        spec.write_text(text.format(f'"{base}"'))
        found = load(spec)
        expected = load("qwen3-8b").architecture.model_copy(update={"max_position_embeddings": 131072})
        assert (found.variant, found.architecture) == ("longer", expected)


def test_generated_code_names_the_file_as_every_machine_knows_it(tmp_path: Path) -> None:
    done = call("gen", "Qwen/Qwen3-0.6B", "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    package = tmp_path / "qwen3_0_6b_triton"
    config = (package / "config.py").read_text()
    command = "qwenspec gen qwenspec:qwen3.yaml --variant qwen3-0.6b --backend triton"
    assert f"a spec with the sha256 {load('qwen3-0.6b').sha256()[:12]}" in config
    assert "#   qwenspec gen qwenspec:qwen3.yaml --variant qwen3-0.6b" in config
    assert command in config
    again = call(*command.split()[1:], "--out", tmp_path, "--check")
    assert (again.exit_code, again.stdout) == (0, "")


def test_list_shows_every_variant_and_its_sizes(tmp_path: Path) -> None:
    listed = data(call("list", "--json"))
    assert [entry["variant"] for entry in listed] == [spec.variant for file in SPECS for spec in load_all(file)]
    (eight,) = (entry for entry in listed if entry["variant"] == "qwen3-8b")
    assert eight["parameters"] == 8_190_735_360
    lines = call("list").stdout.splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "variant parameters layers hidden heads context quantisation file"
    assert "qwen3-8b-fp8 8.19B 36 4096 32/8 40,960 fp8_block qwenspec:qwen3.yaml" in words
    (tmp_path / "own.yaml").write_text(TINY)
    names = [line.split()[0] for line in call("list", tmp_path / "own.yaml").stdout.splitlines()]
    assert names == ["variant", "tiny", "tiny-tied", "tiny-int8"]


def test_names_are_completed() -> None:
    words = {"_QWENSPEC_COMPLETE": "complete_bash", "COMP_WORDS": "qwenspec show qwen3-0", "COMP_CWORD": "2"}
    assert process(**words).stdout.split() == ["qwen3-0.6b", "qwen3-0.6b-base"]


# ------------------------------------------------------------------------------------------------ checkpoint folders


def test_a_folder_is_the_spec_that_import_writes(checkpoint: Path, tmp_path: Path) -> None:
    written = tmp_path / "written.yaml"
    assert call("import", checkpoint, "-o", written).exit_code == 0
    for folder in (str(checkpoint), f"{checkpoint}/", str(checkpoint / "config.json")):
        found = pick(folder)
        assert meaning(found) == meaning(load(written))
        assert found.variant == "tiny-model"
        assert found.file == folder.rstrip("/")
    assert call("diff", checkpoint, EXAMPLE / "spec.yaml").stdout.endswith(" compute the same function\n")


def test_a_variant_of_a_folder_is_its_name(checkpoint: Path) -> None:
    assert pick(str(checkpoint), "mine").variant == pick(f"{checkpoint}#mine").variant == "mine"
    assert pick(str(checkpoint), "mine", "int8").options == (("quantization", "int8"),)


def test_what_import_notes_is_said(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    shown = call("show", checkpoint / "config.json", "--json")
    assert data(shown)["dtype"] == "bfloat16"
    assert "note: The dtype is not given" in shown.stderr


def test_generated_code_of_a_folder_can_be_made_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint.rename(checkpoint.with_name("tiny"))
    monkeypatch.chdir(checkpoint.parent)
    assert call("gen", "tiny").exit_code == 0
    command = "qwenspec gen tiny --variant tiny --backend triton"
    assert command in Path("generated/tiny_triton/config.py").read_text()
    assert call(*command.split()[1:], "--check").exit_code == 0


def test_a_path_that_nobody_could_read_in_generated_code_is_refused(checkpoint: Path) -> None:
    folder = checkpoint.rename(checkpoint.with_name("a\nb"))
    for spec in (folder, folder / "config.json"):
        assert refusal(str(spec))[0] == "unprintable-path"


def test_a_folder_without_config_says_what_to_name(tmp_path: Path) -> None:
    assert refusal(str(tmp_path))[:2] == ("not-a-checkpoint", "this folder has no config.json, so it is no checkpoint")
    (tmp_path / "own.yaml").write_text(TINY)
    assert refusal(str(tmp_path))[2] == f"name a spec in it: `{tmp_path}/own.yaml`"


# ------------------------------------------------------------------------------------------------------- its weights


def test_a_folder_has_its_own_weights(checkpoint: Path, tmp_path: Path) -> None:
    assert weights_of(str(checkpoint), None) == checkpoint
    assert weights_of(str(checkpoint / "config.json"), None) == checkpoint
    assert weights_of(f"{checkpoint}#mine", None) == checkpoint
    assert weights_of(str(checkpoint), tmp_path) == tmp_path
    alone = call("logits", checkpoint, "--ids", "1,2,3", "--json")
    assert alone.exit_code == 0, alone.stderr
    assert [entry["id"] for entry in data(alone)] == [1, 2, 3]


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["logits", "--ids", "1"], ["verify"]])
def test_weights_that_are_no_folder_are_told_at_once(command: list[str], checkpoint: Path) -> None:
    name, *options = command
    if name != "verify":
        missing = call(name, "qwen3-0.6b", *options)
        assert missing.exit_code == 2
        assert "error[no-weights]: `qwen3-0.6b` says what the model is" in missing.stderr
        assert "--weights DIR" in missing.stderr
    file = checkpoint / "model.safetensors"
    for weights, words in (
        (checkpoint / "nowhere", "does not exist"),
        (file, "is a file, and not a checkpoint's folder"),
    ):
        told = call(name, EXAMPLE / "spec.yaml", *options, "-w", weights)
        assert (told.exit_code, told.stdout) == (2, "")
        assert f"error[no-weights]: {weights} {words}" in told.stderr
        assert "tokenizer" not in told.stderr


def test_a_name_is_validated_and_listed() -> None:
    done = call("validate", "Qwen/Qwen3-0.6B", "qwen3-0.7b")
    assert done.exit_code == 2
    assert done.stdout == "Qwen/Qwen3-0.6B: 1 variant\n"
    assert "error[unknown-spec]: `qwen3-0.7b` is neither" in done.stderr
    (found,) = json.loads(call("list", "qwen3-0.6b", "--json").stdout)
    assert (found["variant"], found["file"]) == ("qwen3-0.6b", "qwenspec:qwen3.yaml")
