"""`qwenspec verify`: what it checks, what it says when something is wrong, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import ROOT, TINY, call, data

from qwenspec.backend.emit import emit
from qwenspec.backend.fitting import check_fits
from qwenspec.commands import verify as command
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir.lower import lower
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load, load_all
from qwenspec.verify import full_size, session, verification
from qwenspec.verify.full_size import differing, rope_lengths, tensors_of_package, tensors_read
from qwenspec.verify.result import Check

EXAMPLE = ROOT / "examples" / "tiny-qwen3"
SPECS = [spec for file in sorted((ROOT / "specs").glob("*.yaml")) for spec in load_all(file) if not spec.quantization]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def verified(spec: Path, *options: str | Path, exit_code: int = 0) -> Any:
    """The data of a run on the Triton package in float32."""
    result = call("verify", spec, "--backend", "triton", "--dtype", "float32", "--json", *options)
    assert result.exit_code == exit_code, result.stderr
    return data(result)


def cells(found: Any, verdict: str) -> set[tuple[str, str, str]]:
    return {(c["actual"], c["expected"], c["check"]) for c in found["cells"] if c["verdict"] == verdict}


# ---------------------------------------------------------------------------------------------------- what it does


def test_a_sound_spec_agrees_everywhere(spec: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    found = verified(spec, "--examples", "8", "--seed", "3", "--report", report)
    assert found["verdict"] == "pass"
    assert {entrant["name"]: entrant["absent"] for entrant in found["entrants"]} == {
        "reference": "",
        "triton": "",
        "huggingface": "",
    }
    agreeing = cells(found, "pass")
    pairs = {(actual, expected) for actual, expected, _ in agreeing}
    assert pairs == {("triton", "reference"), ("huggingface", "reference"), ("triton", "huggingface")}
    for check in ("every forward", "prefill", "decode", "verify rows", "rope at full size", "parameters"):
        assert ("triton", "reference", check) in agreeing
    total = next(c for c in found["cells"] if (c["actual"], c["check"]) == ("triton", "every forward"))
    assert total["rows"] > 100
    assert 0 < total["error"] < total["bound"]
    (layers,) = found["by_layer"]
    addresses = [address for address, _ in layers["points"]]
    assert addresses[0] == "embed_tokens"
    assert "layers.1.attention.q_norm" in addresses
    assert max(error for _, error in layers["points"]) < layers["bound"]
    assert {curve["contender"] for curve in found["by_position"]} == {"triton", "huggingface"}
    assert all(
        any("decode" in step or "verify" in step or "prefill" in step or "trees" in step for step in e["steps"])
        for e in found["examples"]
    )
    assert "All agree" in report.read_text()
    assert found["command"].startswith(f"qwenspec verify {spec} --backend=triton --examples=8 --seed=3")


def test_a_package_on_two_ranks_takes_part(spec: Path) -> None:
    found = verified(spec, "--backend", "triton@2", "--examples", "3")
    assert found["verdict"] == "pass"
    agreeing = {(frozenset(pair), check) for *pair, check in cells(found, "pass")}
    assert (frozenset({"triton", "triton@2"}), "every forward") in agreeing
    (name,) = {entrant["description"] for entrant in found["entrants"] if entrant["name"] == "triton@2"}
    assert name == "a generated package, on 2 ranks, cpu"
    assert {curve["contender"] for curve in found["by_layer"]} == {"triton", "triton@2"}


def test_ranks_that_cannot_share_the_spec(spec: Path) -> None:
    result = call("verify", spec, "--backend", "triton@3")
    assert result.exit_code == 2
    assert "cannot be shared evenly by 3 ranks" in result.stderr


@pytest.mark.parametrize("backends", [["triton@32"], [f"triton@{ranks}" for ranks in range(1, 9)]])
def test_more_than_a_machine_is_asked_to_run(spec: Path, backends: list[str]) -> None:
    result = call("verify", spec, *(word for name in backends for word in ("-b", name)))
    assert result.exit_code == 2
    assert "error[too-many-contenders]: no more than 9 contenders, and 32 ranks in all, are run" in result.stderr


def test_the_same_seed_draws_the_same(spec: Path) -> None:
    first, second = (verified(spec, "--examples", "3", "--seed", "5") for _ in range(2))
    assert first["examples"] == second["examples"]
    assert first["cells"] == second["cells"]
    assert verified(spec, "--examples", "3", "--seed", "6")["examples"] != first["examples"]


def test_a_checkpoint_is_verified_at_its_size() -> None:
    found = verified(EXAMPLE / "spec.yaml", "--weights", EXAMPLE, "--examples", "2")
    assert found["verdict"] == "pass"
    assert str(EXAMPLE) in found["size"]
    assert ("huggingface", "reference", "every forward") in cells(found, "pass")


def test_the_table_is_for_people(spec: Path) -> None:
    result = call("verify", spec, "--backend", "triton", "--dtype", "float32", "--examples", "2")
    assert result.exit_code == 0
    assert "✓ All agree" in result.stdout.splitlines()
    assert result.stderr == ""


# --------------------------------------------------------------------------------------------- what it says is wrong


def test_a_disagreement_fails_and_leaves_a_folder(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SHRINKING", 2.0)
    monkeypatch.setattr(session, "bound", lambda *case: 1e-12)
    report, failures = tmp_path / "report.html", tmp_path / "failures"
    found = verified(spec, "--examples", "4", "--failures", failures, "--report", report, exit_code=1)
    assert found["verdict"] == "fail"
    assert ("triton", "reference", "every forward") in cells(found, "fail")
    failure, other = found["failures"]
    assert "triton and reference" in failure["reason"]
    assert "huggingface and reference" in other["reason"]
    assert failure["command"] == f"qwenspec verify --replay {failure['folder']}"
    assert Path(failure["folder"]).parent == failures
    assert "triton and huggingface disagree" in report.read_text()

    again = call("verify", "--replay", failure["folder"])
    assert (again.exit_code, again.stdout.split(":")[0]) == (1, "✗ " + failure["reason"].split(":")[0])
    monkeypatch.undo()
    assert data(call("verify", "--replay", failure["folder"], "--json")) == {
        "folder": failure["folder"],
        "verdict": "pass",
        "reason": "",
    }
    assert call("verify", "--replay", tmp_path).exit_code == 2


def test_a_contender_that_raises_has_failed(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenspec.verify.contenders import PackageContender
    from qwenspec.verify.steps import Popn, Step

    do = PackageContender.do

    def broken(self: PackageContender, step: Step) -> Any:
        if isinstance(step, Popn):
            raise RuntimeError("no way back")
        return do(self, step)

    monkeypatch.setattr(verification, "SHRINKING", 2.0)
    monkeypatch.setattr(PackageContender, "do", broken)
    found = verified(spec, "--examples", "12", "--failures", tmp_path, exit_code=1)
    assert ("triton", "reference", "rollback") in cells(found, "fail")
    (failure,) = found["failures"]
    assert "no way back" in failure["reason"]
    assert ("huggingface", "reference", "rollback") in cells(found, "pass")  # the others go on


def test_a_wrong_attention_factor_is_found_at_full_size(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "attention_factor", lambda scaling, max_position: 1.25)
    found = verified(spec, "--examples", "1", exit_code=1)
    assert ("triton", "reference", "rope at full size") in cells(found, "fail")
    assert "triton: rotary frequencies or their factor are off by 2.0e-01 at length 1" in found["failures"][0]["reason"]


def test_a_tensor_that_nobody_reads_is_found(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "tensors_read", lambda spec: tensors_read(spec) | {"extra.weight": (3,)})
    found = verified(spec, "--examples", "1", exit_code=1)
    assert ("triton", "reference", "parameters") in cells(found, "fail")
    assert "extra.weight is missing" in found["failures"][0]["reason"]


# ----------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize("arguments", [[], ["spec.yaml", "--replay", "folder"]])
def test_it_takes_a_spec_or_a_folder(arguments: list[str]) -> None:
    result = call("verify", *arguments)
    assert result.exit_code == 2
    assert "`verify` takes a SPEC or --replay FOLDER" in result.stderr


def test_hypothesis_may_be_missing(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "hypothesis" else name)
    result = call("verify", spec)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "`qwenspec verify` needs `hypothesis`" in result.stderr
    assert "pip install 'qwenspec[verify]'" in result.stderr


def test_backends_that_cannot_take_part(spec: Path) -> None:
    assert call("verify", spec, "--backend", "cobol").exit_code == 3
    device = call("verify", spec, "--backend", "triton", "--device", "warp:3")
    assert device.exit_code == 2
    assert "the triton backend cannot use the device `warp:3` here" in device.stderr


def test_a_backend_that_cannot_emit_a_spec(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenspec.backend.registry import find
    from qwenspec.diagnostics import Diagnostic

    refused = Diagnostic("unsupported", "triton cannot do this yet")
    monkeypatch.setattr(type(find("triton")), "unsupported", lambda self, model: [refused])
    for command_line in (["verify", spec, "--backend", "triton"], ["gen", spec, "--out", tmp_path / "packages"]):
        result = call(*command_line)
        assert result.exit_code == 2
        assert "error[unsupported]: triton cannot do this yet" in result.stderr
    assert not (tmp_path / "packages").exists()


def test_a_backend_that_is_not_asked_for_may_be_absent(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenspec.backend.registry import find
    from qwenspec.diagnostics import Diagnostic

    missing = Diagnostic("backend-missing", "tvm is away")
    monkeypatch.setattr(type(find("tvm")), "unavailable", lambda self: missing if self.name == "tvm" else None)
    result = call("verify", spec, "--dtype", "float32", "--examples", "1")
    assert result.exit_code == 0
    assert "tvm did not take part: tvm is away" in result.stdout
    assert call("verify", spec, "--backend", "tvm").exit_code == 3


def test_a_checkpoint_that_does_not_fit(spec: Path, tmp_path: Path) -> None:
    result = call("verify", spec, "--weights", EXAMPLE)
    assert result.exit_code == 2
    assert f"{EXAMPLE} does not hold tiny:\n" in result.stderr
    assert (
        "\n  shape: model.embed_tokens.weight is [384, 256], and embed_tokens.weight needs [40, 32]\n" in result.stderr
    )
    assert call("verify", spec, "--weights", tmp_path).exit_code == 2


def test_hypothesis_leaves_nothing_in_the_current_folder(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it keeps of its own while it draws."""
    from hypothesis.configuration import storage_directory

    def verify(*_: object) -> None:
        folders.append(storage_directory("constants").path)
        raise SpecError([Diagnostic("stop", "here")])

    folders: list[Path] = []
    monkeypatch.setattr("qwenspec.verify.verification.verify", verify)
    assert call("verify", spec).exit_code == 2
    (folder,) = folders
    assert not folder.is_relative_to(Path.cwd())
    assert not folder.parent.exists()
    assert storage_directory("constants").path.is_relative_to(Path.cwd())


def test_a_report_needs_a_folder(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("verify", spec, "--report", tmp_path / "file" / "report.html")
    assert result.exit_code == 2
    assert "is no folder" in result.stderr


# ------------------------------------------------------------------------------------------------------ at full size


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.variant)
def test_the_reference_reads_what_the_program_names(spec: Spec) -> None:
    named = {s.tensor: (s.rows, *param.shape[1:]) for param in lower(spec).params() for s in param.sources}
    assert tensors_read(spec) == named


def test_the_manifest_names_what_the_reference_reads(tmp_path: Path) -> None:
    fused = load(ROOT / "specs" / "qwen1.yaml", "qwen-7b")
    assert tensors_of_package(emit(fused, "triton", tmp_path)) == tensors_read(fused)


def test_differences_are_told_apart() -> None:
    told = differing({"a": (1, 2), "b": (3,)}, {"a": (2, 1), "c": (3,)})
    assert told == ["c is missing", "b is not expected", "a is [1, 2], not [2, 1]"]


def test_lengths_around_every_threshold() -> None:
    qwen = load(ROOT / "specs" / "qwen1.yaml", "qwen-7b-chat-v1.0")  # trained on 2048, up to 6144
    lengths = rope_lengths(qwen)
    assert {1, 2047, 2048, 2049, 4096, 4097, 6143, 6144, 6145, 8193, 12289} <= set(lengths)
    yarn = load(ROOT / "specs" / "qwen3.yaml", "qwen3-8b-yarn-128k")
    assert {32767, 32768, 32769, 131073} <= set(rope_lengths(yarn))


def test_a_checkpoint_that_fits() -> None:
    check_fits(load(EXAMPLE / "spec.yaml"), EXAMPLE)
    with pytest.raises(SpecError, match=r"(?s)it holds:.*model\.layers\.{i}\.self_attn\.q_proj\.weight"):
        check_fits(load(ROOT / "specs" / "qwen3.yaml"), EXAMPLE)


def test_every_check_has_a_meaning() -> None:
    from qwenspec.verify.result import MEANING

    assert list(MEANING) == list(Check)


def test_the_page_of_real_data_is_json_safe(spec: Path) -> None:
    json.dumps(verified(spec, "--examples", "1"), allow_nan=False)
