"""The command line: what each command prints, where, and how it ends."""

from __future__ import annotations

import json
import pstats
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import QWEN3, ROOT, TINY, call, data, on_terminal, process

import qwenspec
from qwenspec.ir.weights import LINEARS

BROKEN = "schema_version: 1\nfamily: broken\narchitecture: {hiden_size: 32}\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    return path


def test_version_and_help() -> None:
    assert call("--version").stdout == f"qwenspec {qwenspec.__version__}\n"
    top = call("--help").stdout
    assert "130 interrupted" in " ".join(top.split())
    commands = re.findall(r"^  (\w+) {2,}\w", top.split("Commands:")[1], re.M)
    expected = "gen backends validate schema import convert list show diff plan run logits verify"
    assert commands == expected.split()
    for command in commands:
        shown = call(command, "--help")
        assert shown.exit_code == 0
        assert "Usage: qwenspec" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["gne"],
        ["show"],
        ["show", QWEN3, "--jsno"],
        ["plan", QWEN3, "--tp", "two"],
        ["run", QWEN3, "-p", "x", "--top-p", "0"],
        ["run", QWEN3, "-p", "x", "--top-p", "nan"],
    ],
)
def test_bad_usage_exits_2_and_leaves_stdout_alone(arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: qwenspec" in result.stderr


# ------------------------------------------------------------------------------------------------------------ gen


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_gen_writes_a_package_and_check_compares_it(backend: str, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = call("gen", spec, "--backend", backend, "--out", out)
    package = out / f"tiny_{backend}"
    assert written.exit_code == 0
    assert written.stdout.startswith(f"{package}  (tiny, {backend})\n")
    files = [*package.rglob("*.py"), package / "MANIFEST.json"]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert written.stdout.endswith(f"\n  {len(files)} files, {lines:,} lines\n")

    same = call("gen", spec, "--backend", backend, "--out", out, "--check")
    assert (same.exit_code, same.stdout, same.stderr) == (0, "", "1 package up to date\n")

    edited = (package / "config.py").read_text().replace("= 32", "= 33")
    (package / "config.py").write_text(edited)
    different = call("gen", spec, "--backend", backend, "--out", out, "--check")
    assert different.exit_code == 1
    assert re.search(r"^-.*hidden_size.*= 33$", different.stdout, re.M)
    assert re.search(r"^\+.*hidden_size.*= 32$", different.stdout, re.M)
    assert "out of date" in different.stderr
    assert (package / "config.py").read_text() == edited


def test_a_variant_is_named_after_the_file_or_by_the_option(spec: Path, tmp_path: Path) -> None:
    for arguments in ([f"{spec}#tiny-tied"], [spec, "--variant", "tiny-tied"], [f"{spec}#tiny", "-v", "tiny-tied"]):
        assert data(call("show", *arguments, "--json"))["variant"] == "tiny-tied"
    (written,) = data(call("gen", spec, "--variant", "tiny-tied", "--out", tmp_path, "--json"))
    assert written["package"] == str(tmp_path / "tiny_tied_triton")
    assert written["lines"]["model.py"] > 20


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_gen_quantises_as_the_spec_or_the_option_says(backend: str, spec: Path, tmp_path: Path) -> None:
    for arguments, packing in (
        ([f"{spec}#tiny-int8"], "int8"),
        ([spec, "--quantization", "int8"], "int8"),
        ([f"{spec}#tiny-int8", "--quantization", "int4"], "int4"),
        ([f"{spec}#tiny-int8", "--quantization", "none"], None),
    ):
        done = call("gen", *arguments, "--backend", backend, "--out", tmp_path / "out", "--json")
        assert done.exit_code == 0, done.stderr
        (written,) = data(done)
        manifest = json.loads((Path(written["package"]) / "MANIFEST.json").read_text())
        packings = {entry["name"]: entry.get("format", {}).get("packing") for entry in manifest["parameters"]}
        assert packings["layers.{i}.attention.qkv_proj.weight"] == packing
        assert packings["lm_head.weight"] == (packing and "int8")
        assert packings["layers.{i}.attention.q_norm.weight"] is None


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("int9", "did you mean `int8`?"), ("zzz", "there are `"), ("gptq", "`gptq` has no default for `bits`")],
)
def test_a_scheme_that_does_not_exist_or_needs_more(spec: Path, scheme: str, reason: str) -> None:
    result = call("gen", spec, "--quantization", scheme)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_gen_names_the_nearest_backend_and_tells_a_missing_one(spec: Path) -> None:
    assert call("gen", spec, "--backend", "tritn").exit_code == 2
    missing = call("gen", spec, "--backend", "cobol")
    assert missing.exit_code == 3
    assert "error[backend-missing]: the backend `cobol` is not installed" in missing.stderr


@pytest.mark.parametrize("arguments", [[], [QWEN3, "--all"], ["--all", "--variant", "qwen3-8b"]])
def test_gen_takes_a_spec_or_all(arguments: list[str]) -> None:
    result = call("gen", *arguments)
    assert result.exit_code == 2
    assert "error[usage]" in result.stderr


def test_gen_all_writes_what_the_manifest_lists(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "generated"
    assert "there is no" in call("gen", "--all", "--out", out).stderr
    out.mkdir()
    package = out / "tiny_triton"
    entry = {"spec": str(spec), "variant": "tiny", "backend": "triton"}
    (out / "manifest.yaml").write_text(json.dumps([entry]))
    assert call("gen", "--all", "--out", out, "--check").exit_code == 1
    assert [written["package"] for written in data(call("gen", "--all", "--out", out, "--json"))] == [str(package)]
    assert call("gen", "--all", "--out", out, "--check").exit_code == 0

    shutil.copytree(package, out / "old_triton")
    stray = call("gen", "--all", "--out", out, "--check", "--json")
    assert stray.exit_code == 1
    assert data(stray) == {"checked": [str(package)], "stale": {}, "stray": [str(out / "old_triton")]}
    assert "old_triton is not in the manifest" in stray.stderr

    for text in ("- {spec: 3}", '- {spec: a, backend: triton, variant: !!int ""}', "!!python/none []"):
        (out / "manifest.yaml").write_text(text)
        assert "error[bad-manifest]" in call("gen", "--all", "--out", out).stderr


# -------------------------------------------------------------------------------------- validate, schema, import


def test_validate_counts_variants(spec: Path) -> None:
    result = call("validate", spec, QWEN3)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{spec}: 3 variants\n{QWEN3}: ")
    assert result.stderr == ""


def test_validate_reports_every_file(spec: Path, broken: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    result = call("validate", broken, spec, missing)
    assert result.exit_code == 2
    assert result.stdout == f"{spec}: 3 variants\n"
    assert f"{broken}:3:16: error[unknown-key]" in result.stderr
    assert "did you mean `hidden_size`" in result.stderr
    assert f"{missing}: error[file-not-found]" in result.stderr
    assert result.stderr.endswith("errors in 2 files\n")

    as_data = call("validate", broken, spec, "--json")
    assert as_data.exit_code == 2
    first, second = data(as_data)
    told = {"code": "unknown-key", "file": str(broken), "line": 3, "column": 16}
    assert any(told.items() <= diagnostic.items() for diagnostic in first["diagnostics"])
    assert second == {"file": str(spec), "variants": ["tiny", "tiny-tied", "tiny-int8"], "diagnostics": []}


def test_schema_prints_writes_and_checks(tmp_path: Path) -> None:
    file = tmp_path / "schema" / "spec.json"
    shown = call("schema")
    assert data(shown)["$schema"].startswith("https://json-schema.org/")
    assert call("schema", "--check", "-o", file).exit_code == 1
    assert call("schema", "-o", file).exit_code == 0
    assert file.read_text() == shown.stdout
    assert call("schema", "--check", "-o", file).exit_code == 0
    file.write_text(file.read_text().replace("vocab_size", "vocabulary"))
    stale = call("schema", "--check", "-o", file)
    assert stale.exit_code == 1
    assert re.search(r"^\+.*vocab_size", stale.stdout, re.M)
    file.write_bytes(b"\xff")
    assert call("schema", "--check", "-o", file).exit_code == 2


CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def test_import_gives_a_spec_that_validates(tmp_path: Path) -> None:
    config, out = tmp_path / "config.json", tmp_path / "imported.yaml"
    config.write_text(json.dumps(CONFIG))
    result = call("import", config, "--name", "my-model", "-o", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert call("validate", out).stdout == f"{out}: 1 variant\n"
    assert call("import", config, "--name", "my-model").stdout == out.read_text()
    assert data(call("import", config, "--json"))["spec"]["architecture"]["hidden_size"] == 32

    refused = call("import", config, "-o", out)
    assert refused.exit_code == 2
    assert "error[file-exists]" in refused.stderr
    assert call("import", config, "--force", "-o", out).exit_code == 0
    nowhere = call("import", config, "-o", "/dev/null")
    assert nowhere.exit_code == 2
    assert "error[cannot-write]: /dev/null is no regular file" in nowhere.stderr


def test_import_names_the_key_that_nobody_reads(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"warp_factor": 9}))
    result = call("import", config)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[unread-key]" in result.stderr
    assert "warp_factor" in result.stderr


# -------------------------------------------------------------------------------------------- show, diff and plan


def test_show_agrees_with_the_published_sizes() -> None:
    text = call("show", QWEN3).stdout
    assert text.startswith("qwen3-0.6b  (family qwen3, ")
    assert re.search(r"parameters +596,049,920$", text, re.M)  # the model card's 0.6B, and 0.44B without embedding
    shown = data(call("show", f"{QWEN3}#qwen3-8b", "--context", "1", "--json"))
    assert shown["parameters"]["total"] == 8_190_735_360
    assert shown["weight_bytes"] == 2 * shown["parameters"]["total"]
    assert shown["kv_bytes_per_token"] == 2 * 36 * 8 * 128 * 2
    assert shown["attention"]["windows"] == [{"window": None, "layers": list(range(36))}]
    assert shown["rope"] | {"theta": 1e6, "scaling": None} == shown["rope"]
    assert shown["quantization"] is None


def test_show_tells_the_features_of_a_variant(tmp_path: Path) -> None:
    spec = tmp_path / "features.yaml"
    spec.write_text(
        TINY.replace("qk_norm: per_head}", "bias: {qkv: true}, sliding_window: {window: 8, layers: {from: 1}}}")
        .replace("theta: 10000.0", "theta: 10000.0, scaling: {kind: linear, factor: 2.0}")
        .replace("tiny: {}", "tiny: {intermediate_size: 64, quantization: {scheme: int4}}")
    )
    text = call("show", spec).stdout
    assert "4 query heads on 2 key/value heads of 16, bias on qkv" in text
    assert "the whole context in layers 0, a window of 8 tokens in layers 1" in text
    assert "linear scaling (factor 2.0)" in text
    assert "int4 (group_size 32, head int8)" in text
    assert re.search(r"^  weights +[0-9.]+ KiB in int4 and float32$", text, re.M), text


def test_show_ir(spec: Path) -> None:
    assert "layers 0…1" in call("show", spec, "--ir").stdout
    sections = data(call("show", spec, "--ir", "--json"))
    assert "layers.1.attention.q_norm" in sections["modules"]


def test_diff_tells_what_changes(spec: Path) -> None:
    text = call("diff", spec, f"{spec}#tiny-tied").stdout
    assert text.startswith("tiny -> tiny-tied\n")
    assert "tied to embed_tokens.weight" in text
    changes = data(call("diff", spec, f"{spec}#tiny-int8", "--json"))
    matrices = {f"layers.{i}.{name}.weight" for i in range(2) for name in LINEARS} | {"lm_head.weight"}
    differences = {entry["path"]: (entry["a"], entry["b"]) for entry in changes["differences"]}
    assert differences.keys() == {f"{matrix}.sources" for matrix in matrices} | {"quantization"}
    assert differences["quantization"] == (None, {"scheme": "int8", "skip": [], "head": "int8"})
    before, after = differences["lm_head.weight.sources"]
    assert before == [{"kind": "Source", "tensor": "lm_head.weight", "rows": 40, "format": None}]
    assert after[0]["format"]["packing"] == "int8"
    assert "int8" in call("diff", spec, f"{spec}#tiny-int8").stdout
    assert call("diff", spec, spec).stdout == "tiny and tiny compute the same function\n"
    assert data(call("diff", spec, spec, "--json"))["differences"] == []


def test_differences_are_values_and_absence_is_no_value(spec: Path, tmp_path: Path) -> None:
    windowed = tmp_path / "windowed.yaml"
    text = TINY.replace("num_hidden_layers: 2", "num_hidden_layers: 3").replace("theta: 10000.0", "theta: 20000.0")
    windowed.write_text(text.replace("per_head}", "none, sliding_window: {window: 8, layers: {from: 1}}}"))
    found = data(call("diff", spec, windowed, "--json"))["differences"]
    differences = {entry.pop("path"): entry for entry in found}
    assert differences["rope.theta"] == {"a": 10000.0, "b": 20000.0}
    assert differences["layers.1.attention.window"] == {"a": None, "b": 8}
    assert differences["layers.2.attention.window"] == {"b": 8}
    assert differences["layers.0.attention.q_norm.eps"] == {"a": 1e-6}
    assert differences["num_layers"] == {"a": 2, "b": 3}
    assert "layers.0.attention.window" not in differences
    assert not any(path.startswith(("spec", "name", "family")) for path in differences)


def test_plan_shows_a_rank() -> None:
    text = call("plan", f"{QWEN3}#qwen3-8b", "--tp", "16", "--batch", "4").stdout
    assert "2 query heads on 1 key/value head, each held by several ranks" in text
    assert "layers.*.attention.qkv_proj.weight   512 × 4096  of 6144 × 4096, split by column" in text
    planned = data(call("plan", f"{QWEN3}#qwen3-8b", "--tp", "2", "--context", "1000", "--batch", "3", "--json"))
    assert planned["legal_degrees"] == [1, 2, 4, 8, 16, 32]
    assert planned["bytes"]["kv_cache"] == 3 * 1008 * 2 * 36 * 4 * 128 * 2  # whole pages of 16
    assert planned["bytes"]["total"] == sum(v for k, v in planned["bytes"].items() if k not in ("total", "kv_pages"))


def test_plan_says_why_a_degree_is_illegal() -> None:
    result = call("plan", f"{QWEN3}#qwen3-8b", "--tp", "3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "32 query heads cannot be shared evenly by 3 ranks" in result.stderr
    assert "degrees that work: 1, 2, 4, 8, 16, 32" in result.stderr
    for command in ("plan", "show"):
        longer = call(command, QWEN3, "--context", "50000")
        assert (longer.exit_code, longer.stdout) == (2, "")
        assert "error[context-too-long]: qwen3-0.6b has 40,960 positions, not 50,000" in longer.stderr


def test_the_usual_context_is_no_longer_than_the_model(spec: Path) -> None:
    assert data(call("plan", spec, "--json"))["context"] == 128
    assert data(call("show", spec, "--json"))["flops_per_token"]["context"] == 128


@pytest.mark.parametrize(("backend", "library"), [("triton", "torch"), ("tvm", "apache-tvm")])
def test_backends_tells_what_is_installed(backend: str, library: str) -> None:
    (report,) = [report for report in data(call("backends", "--json")) if report["name"] == backend]
    assert report["problem"] is None
    assert "cpu" in report["devices"]
    assert report["libraries"][library]


# -------------------------------------------------------------------------------------------- how a process ends


def test_json_is_alone_on_stdout_whatever_else_is_said(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
    result = process("import", config, "--json")
    assert "note: The dtype is not given" in result.stderr
    assert data(result)["notes"]


def test_no_color_and_no_escape_codes_in_a_pipe(broken: Path) -> None:
    assert "\x1b" not in process("validate", broken).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_colour_on_a_terminal_unless_no_color(broken: Path) -> None:
    assert "\x1b[1;31m" in on_terminal("validate", str(broken), TERM="xterm")
    plain = on_terminal("validate", str(broken), TERM="xterm", NO_COLOR="1")
    assert "error[unknown-key]" in plain
    assert not re.search(r"\x1b\[[0-9;]*m", plain)


def test_a_reader_that_goes_away_is_no_error(spec: Path) -> None:
    command = f"{sys.executable} -m qwenspec show {spec} --ir | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))  # 0: everything fitted into the pipe in time


def test_an_interrupt_is_quiet(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    result = call("show", spec)
    assert (result.exit_code, result.output) == (130, "")


def test_our_own_bugs_are_told_apart(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("layers"))
    result = call("show", spec)
    assert (result.exit_code, result.stdout) == (70, "")
    assert re.match(r"error\[internal\]: this is a bug in qwenspec: KeyError: 'layers', at .+\.py:\d+\n", result.stderr)
    assert "QWENSPEC_TRACEBACK=1" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("QWENSPEC_TRACEBACK", "1")
    result = call("show", spec)
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr


def test_running_out_of_memory_is_not_our_bug(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    raising(monkeypatch, torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    result = call("show", spec)
    assert result.exit_code == 2
    first, hint = result.stderr.splitlines()
    assert first == "error[out-of-memory]: there is not enough memory on the GPU"
    assert hint == "  = help: fewer tokens, a smaller --dtype or a smaller model need less"


def test_a_place_that_cannot_be_written_is_not_our_bug(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("schema", "-o", tmp_path / "file" / "schema.json")
    assert result.exit_code == 2
    assert "error[cannot-write]" in result.stderr


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def pick(*_: object) -> None:
        raise error

    monkeypatch.setattr("qwenspec.commands.specs.pick", pick)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(shell: str) -> None:
    script = process(_QWENSPEC_COMPLETE=f"source_{shell}")
    assert script.returncode == 0
    assert "_QWENSPEC_COMPLETE" in script.stdout


def test_completion_knows_commands_backends_and_variants() -> None:
    completed = {"_QWENSPEC_COMPLETE": "complete_bash", "COMP_WORDS": "qwenspec val", "COMP_CWORD": "1"}
    assert process(**completed).stdout.split() == ["validate"]
    completed |= {"COMP_WORDS": "qwenspec gen --backend tr", "COMP_CWORD": "3"}
    assert process(**completed).stdout.split() == ["triton"]
    completed |= {"COMP_WORDS": f"qwenspec show {QWEN3}#qwen3-0", "COMP_CWORD": "2"}
    assert process(**completed).stdout.split() == [f"{QWEN3}#qwen3-0.6b", f"{QWEN3}#qwen3-0.6b-base"]
    completed |= {"COMP_WORDS": "qwenspec show missing.yaml#q"}
    assert process(**completed).stdout.split() == []


# ---------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [
        (0.3, ["--help"]),
        (1.5, ["validate", *sorted(map(str, (ROOT / "specs").glob("*.yaml")))]),
        (15, ["gen", QWEN3, "--out", "OUT"]),
        (20, ["gen", QWEN3, "--backend", "tvm", "--out", "OUT"]),
    ],
    ids=["help", "validate", "gen", "gen tvm"],
)
def test_commands_are_quick(limit: float, arguments: list[str], tmp_path: Path) -> None:
    """In millions of calls, imports included: as many on any machine, however busy."""
    arguments = [str(tmp_path) if word == "OUT" else word for word in arguments]
    profile = tmp_path / "profile"
    command = [sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "qwenspec", *arguments]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert pstats.Stats(str(profile)).total_calls < limit * 1e6


def test_the_core_starts_without_a_tensor_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from qwenspec.cli import app;"
        f"assert CliRunner().invoke(app, ['show', {QWEN3!r}]).exit_code == 0;"
        "print(sorted({'torch', 'triton', 'tvm', 'numpy', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
