"""A failure's folder: what is in it, which module it names, and running it again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cli_runs import TINY, call

from qwenspec.diagnostics import SpecError
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load
from qwenspec.verify import failure, opening, stored_failure, verification
from qwenspec.verify import session as session_module
from qwenspec.verify.case import Case
from qwenspec.verify.contenders import ReferenceContender, Rows
from qwenspec.verify.failure import locate, replay, write_failure
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import Add, CacheSizes, Fork, Forward, Step
from qwenspec.verify.weights import random_weights

SIZES = CacheSizes(page_size=4, pages=8, max_batch_size=3, chunk=16)
PREFILL = Forward({0: (1, 2, 3, 4, 5)}, "batch_prefill")
DECODE = Forward({0: (7,), 1: (8,)}, "batch_decode")
STEPS: list[Step] = [Add(0), PREFILL, Fork(0, 1, 3), DECODE]
FILES = {"README.txt", "spec.yaml", "case.json", "workload.json", "outputs.npz", "versions.json", "verdict.json"}

Change = Callable[[Any], object]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return load(path)


def found_in(case: Case, steps: list[Step] = STEPS) -> Disagreement:
    session = Session(case)
    try:
        for step in steps:
            session.do(step)
    except Disagreement as disagreement:
        return disagreement
    pytest.fail("all steps agree")


def verdict_of(folder: Path) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads((folder / "verdict.json").read_text())
    return verdict


# ------------------------------------------------------------------------------------- a fault in a generated package


@contextmanager
def planted(change: Change) -> Iterator[None]:
    """Every package that is opened here is changed, and those that were opened before are forgotten."""
    right = opening.open_runner

    def wrong(*arguments: Any) -> Any:
        runner = right(*arguments)
        change(runner)
        return runner

    opening._runner.cache_clear()
    with mock.patch.object(opening, "open_runner", wrong):
        yield
    opening._runner.cache_clear()


def scale_k_norm(runner: Any) -> None:
    runner.model.get_parameter("layers.1.attention.k_norm.weight").data.mul_(1.5)


def spoil_a_token(runner: Any) -> None:
    runner.model.embed_tokens.weight.data[8] *= 2


def spoil_decode(runner: Any) -> None:
    right = runner.batch_decode
    runner.batch_decode = lambda embeds, cache: 1.5 * right(embeds, cache)


@pytest.fixture
def triton(spec: Spec) -> Case:
    return Case(spec, 3, "float32", SIZES, ("reference", "triton"))


@pytest.mark.parametrize(
    ("change", "step", "module"),
    [(scale_k_norm, 2, "layers.1.attention.k_norm"), (spoil_a_token, 4, "embed_tokens")],
)
def test_the_module_is_named_and_the_failure_repeats(
    change: Change, step: int, module: str, triton: Case, tmp_path: Path
) -> None:
    with planted(change):
        disagreement = found_in(triton)
        parting = locate(disagreement)
        folder = write_failure(disagreement, tmp_path / "failures" / "one")
        again = replay(folder)
    assert replay(folder) is None
    assert str(again) == str(disagreement)
    assert len(disagreement.steps) == step
    assert parting is not None
    assert parting.module is not None
    assert (parting.contender, parting.module.address) == ("triton", module)
    assert folder == tmp_path / "failures" / "one"
    verdict = verdict_of(folder)
    assert (verdict["pair"], verdict["step"]) == (["triton", "reference"], step)
    assert verdict["again"] == "it failed in the same way"
    assert disagreement.comparison is not None
    assert verdict["comparison"]["error"] == disagreement.comparison.error > verdict["comparison"]["bound"]
    assert (verdict["parts"], verdict["module"]["address"]) == ("triton", module)
    assert [found["address"] for found in verdict["modules"]] == [error.address for error in parting.errors]
    assert f"Where: {module} of triton is the first module that parts" in (folder / "README.txt").read_text()


def test_modules_agree_where_one_method_alone_is_wrong(triton: Case, tmp_path: Path) -> None:
    with planted(spoil_decode):
        folder = write_failure(found_in(triton), tmp_path / "one")
    verdict = verdict_of(folder)
    assert (verdict["kind"], verdict["parts"], verdict["module"]) == ("forward.batch_decode", "triton", None)
    assert max(module["error"] for module in verdict["modules"]) < 1e-5
    assert "what only forward.batch_decode does is wrong" in (folder / "README.txt").read_text()


# --------------------------------------------------------------------------------------------- contenders made up


Fault = Callable[[Step, Rows | None], Rows | None]


class Odd(ReferenceContender):
    """The reference, with `fault` done to what it says."""

    def __init__(self, name: str, case: Case, fault: Fault) -> None:
        super().__init__(case.spec, random_weights(case.spec, case.seed))
        self.name = name
        self._fault = fault

    def do(self, step: Step) -> Rows | None:
        return self._fault(step, super().do(step))


def soundly(step: Step, rows: Rows | None) -> Rows | None:
    return rows


def off(step: Step, rows: Rows | None) -> Rows | None:
    return rows if rows is None else 1.1 * rows


def made_up(
    spec: Spec, monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, str] | None = None, **faults: Fault
) -> Case:
    """Of the reference and contenders with these faults. `changed`: a tensor of some is 1.5 times what it was."""

    def open_contenders(case: Case) -> dict[str, ReferenceContender]:
        weights = random_weights(case.spec, case.seed)
        opened = {"reference": ReferenceContender(case.spec, weights)}
        for name, fault in faults.items():
            opened[name] = Odd(name, case, fault)
            if tensor := (changed or {}).get(name):
                opened[name]._model = type(opened[name]._model)(case.spec, weights | {tensor: 1.5 * weights[tensor]})
        return opened

    monkeypatch.setattr(session_module, "open_contenders", open_contenders)
    monkeypatch.setattr(stored_failure, "problem", lambda *given: None)
    return Case(spec, 0, "float32", SIZES, ("reference", *faults))


@pytest.fixture
def disagreement(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> Disagreement:
    """Of a contender that is always wrong."""
    return found_in(made_up(spec, monkeypatch, a=off))


@pytest.mark.parametrize("pair", [("a", "b"), ("b", "a"), ("b", "reference")])
def test_the_one_that_parts_from_the_reference_is_named(
    pair: tuple[str, str], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made_up(spec, monkeypatch, {"b": "model.layers.0.mlp.down_proj.weight"}, a=soundly, b=soundly)
    disagreement = found_in(case)
    disagreement.pair = pair
    parting = locate(disagreement)
    assert parting is not None
    assert parting.module is not None
    assert (parting.contender, parting.module.address) == ("b", "layers.0.mlp.down_proj")


def test_two_that_are_far_apart_may_both_be_near_the_reference(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, one is off by half the bound at least: it is looked for with that."""
    case = made_up(spec, monkeypatch, {"b": "model.layers.0.mlp.down_proj.weight"}, a=soundly, b=soundly)
    disagreement = found_in(case)
    parting = locate(disagreement)
    assert parting is not None
    assert disagreement.comparison is not None
    bound = 1.5 * max(module.error for module in parting.errors)
    disagreement.comparison = dataclasses.replace(disagreement.comparison, bound=bound)
    for pair, found in ((("b", "reference"), False), (("a", "b"), True)):
        disagreement.pair = pair
        parting = locate(disagreement)
        assert parting is not None
        assert (parting.contender, parting.module is not None) == ("b", found)


def test_all_files_are_there(disagreement: Disagreement, tmp_path: Path) -> None:
    folder = write_failure(disagreement, tmp_path / "it's one")
    case = disagreement.case
    assert {file.name for file in folder.iterdir()} == FILES
    assert call("validate", folder / "spec.yaml").exit_code == 0
    assert load(folder / "spec.yaml").sha256() == case.spec.sha256()
    assert Case.from_data(json.loads((folder / "case.json").read_text())).to_data() == case.to_data()
    assert len(json.loads((folder / "workload.json").read_text())) == 2
    with np.load(folder / "outputs.npz") as outputs:
        assert set(outputs) == {"reference", "a"}
        assert np.array_equal(outputs["a"], disagreement.outputs["a"])
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["numpy"] == np.__version__
    libraries = {"python", "numpy", "torch", "triton", "tvm", "transformers", "safetensors", "qwenspec"}
    assert set(versions) == libraries | {"platform", "cpu"}
    readme = (folder / "README.txt").read_text()
    assert str(disagreement) in readme
    assert f"qwenspec verify --replay '{tmp_path}/it'\"'\"'s one'" in readme


def test_what_is_not_finite_is_null(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = made_up(spec, monkeypatch, a=lambda step, rows: rows if rows is None else np.full_like(rows, np.nan))
    folder = write_failure(found_in(case), tmp_path / "one")
    assert verdict_of(folder)["comparison"]["error"] is None
    assert np.isnan(np.load(folder / "outputs.npz")["a"]).all()


def test_an_exception_has_no_outputs(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Step, rows: Rows | None) -> Rows | None:
        raise ZeroDivisionError("by zero")

    disagreement = found_in(made_up(spec, monkeypatch, a=fails))
    assert locate(disagreement) is None
    folder = write_failure(disagreement, tmp_path / "one")
    assert {file.name for file in folder.iterdir()} == FILES - {"outputs.npz"}
    assert "outputs.npz" not in (folder / "README.txt").read_text()
    verdict = verdict_of(folder)
    assert (verdict["reason"], verdict["again"]) == ("ZeroDivisionError: by zero", "it failed in the same way")
    assert (verdict["comparison"], verdict["module"], verdict["modules"]) == (None, None, None)
    assert str(replay(folder)) == "a and reference, step 1 (add): ZeroDivisionError: by zero"


def forwards(fails: set[int]) -> Fault:
    """Wrong in these forwards, counted from 0 over all sessions."""
    count = itertools.count()

    def fault(step: Step, rows: Rows | None) -> Rows | None:
        return rows if rows is None or next(count) not in fails else 2 * rows

    return fault


@pytest.mark.parametrize(
    ("fails", "again"),
    [
        ({1}, "everything agreed, so it does not fail every time"),
        ({1, 2}, "it failed otherwise: a and reference, step 2 (forward.batch_prefill): error"),
    ],
)
def test_what_does_not_repeat_says_so(
    fails: set[int], again: str, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disagreement = found_in(made_up(spec, monkeypatch, a=forwards(fails)))
    assert len(disagreement.steps) == 4
    verdict = verdict_of(write_failure(disagreement, tmp_path / "one"))
    assert verdict["again"].startswith(again)
    assert verdict["module"] is None


def test_an_earlier_step_that_fails_now_leaves_nothing_to_locate(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    disagreement = found_in(made_up(spec, monkeypatch, a=forwards({1, 2})))
    assert locate(disagreement) is None


def test_a_failure_is_written_whatever_examining_it_meets(
    disagreement: Disagreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*given: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(failure, "module_errors", no_room)
    folder = write_failure(disagreement, tmp_path / "one")
    assert verdict_of(folder)["again"] == "it could not be examined: MemoryError: no room"
    assert "Where: not known" in (folder / "README.txt").read_text()


# ------------------------------------------------------------------------------------------------ complete or absent


def broken_disk(*given: Any, **named: Any) -> None:
    raise OSError("no space left on device")


def test_a_write_that_fails_leaves_nothing(
    disagreement: Disagreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "savez_compressed", broken_disk)
    failures = tmp_path / "failures"
    with pytest.raises(SpecError, match="no space"):
        write_failure(disagreement, failures / "one")
    assert not list(failures.iterdir())


def test_an_older_failure_stays_until_it_is_replaced(
    disagreement: Disagreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_failure(disagreement, tmp_path / "failures" / "one")
    (folder / "older").touch()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", broken_disk)
        with pytest.raises(SpecError, match="no space"):
            write_failure(disagreement, folder)
    assert {file.name for file in folder.iterdir()} == FILES | {"older"}
    write_failure(disagreement, folder)
    assert {file.name for file in folder.iterdir()} == FILES
    assert list(folder.parent.iterdir()) == [folder]


def test_one_that_cannot_be_written_is_told(disagreement: Disagreement, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = verification._written_down(disagreement, tmp_path / "file")
    assert told.reason.startswith(f"{disagreement}; it is not kept: {tmp_path / 'file'}")
    assert (told.folder, told.command) == ("", "")


def test_other_folders_are_not_replaced(disagreement: Disagreement, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_failure(disagreement, tmp_path / "mine")  # an empty one is
    for file in FILES:
        (tmp_path / "mine" / file).unlink()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(SpecError, match="is not the folder of a failure"):
        write_failure(disagreement, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


# --------------------------------------------------------------------------------------------------- damaged folders


def edited(file: str, change: Change) -> Change:
    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        change(data)
        (folder / file).write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("damage", "file", "code", "message"),
    [
        (lambda f: shutil.rmtree(f), "case.json", "file-not-found", "No such file"),
        (lambda f: (f / "workload.json").unlink(), "workload.json", "file-not-found", "No such file"),
        (lambda f: (f / "case.json").write_text('{"spec":'), "case.json", "damaged-failure", "Expecting value"),
        (lambda f: (f / "case.json").write_bytes(b"\xff"), "case.json", "damaged-failure", "utf-8"),
        (lambda f: (f / "case.json").write_text("[" * 10**6), "case.json", "damaged-failure", "recursion"),
        (lambda f: (f / "case.json").write_text("[]"), "case.json", "damaged-failure", "dictionary"),
        (edited("case.json", lambda d: d.pop("seed")), "case.json", "damaged-failure", "seed: Field required"),
        (
            edited("case.json", lambda d: d["spec"].pop("family")),
            "case.json",
            "damaged-failure",
            "family: Field required",
        ),
        (
            edited("case.json", lambda d: d.update(dtype="int8")),
            "case.json",
            "damaged-failure",
            "dtype: Input should be",
        ),
        (edited("case.json", lambda d: d["contenders"].pop(0)), "case.json", "damaged-failure", "contenders"),
        (edited("case.json", lambda d: d["sizes"].pop("chunk")), "case.json", "damaged-failure", "chunk"),
        (edited("case.json", lambda d: d.update(weights="/gone")), "case.json", "no-weights", "not in /gone any more"),
        (edited("workload.json", lambda d: d.clear()), "workload.json", "damaged-failure", "not a list of steps"),
        (edited("workload.json", lambda d: d[0].update(step="jump")), "workload.json", "damaged-failure", "'jump'"),
        (edited("workload.json", lambda d: d[1].pop("tokens")), "workload.json", "damaged-failure", "'tokens'"),
        (lambda f: (f / "workload.json").write_text("7"), "workload.json", "damaged-failure", "not a list of steps"),
    ],
)
def test_a_damaged_folder_is_told(
    damage: Change, file: str, code: str, message: str, disagreement: Disagreement, tmp_path: Path
) -> None:
    folder = write_failure(disagreement, tmp_path / "one")
    assert str(replay(folder)) == str(disagreement)
    damage(folder)
    with pytest.raises(SpecError) as caught:
        replay(folder)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, str(diagnostic.location)) == (code, str(folder / file))
    assert message in diagnostic.message


# What somebody may have written to a folder that is sent with a report: nothing of it is run, and nothing is 70.
HOSTILE: list[tuple[str, Change, str]] = [
    ("case.json", lambda d: d["spec"].update(file="a\nimport os#"), "`file` says where a spec came from"),
    ("case.json", lambda d: d["spec"].update(options=[["quantization", "int4"]]), "`options` says where"),
    ("case.json", lambda d: d["spec"].update(variant='x"""\nimport os\n"""'), "cannot name a variant"),
    ("case.json", lambda d: d["spec"].update(variant="../../up"), "cannot name a variant"),
    ("case.json", lambda d: d["spec"]["architecture"].update(vocab_size=-5), "vocab_size: Input should be greater"),
    ("case.json", lambda d: d["spec"]["architecture"].update(vocab_size="40"), "vocab_size: Input should be"),
    ("case.json", lambda d: d["spec"]["architecture"].update(num_key_value_heads=3), "do not divide 4 attention heads"),
    ("case.json", lambda d: d["spec"]["architecture"].update(hidden_size=2**20), "at most are drawn"),
    ("case.json", lambda d: d["spec"]["architecture"].update(num_hidden_layers=10**9), "less than or equal to 1000"),
    ("case.json", lambda d: d["spec"]["layout"].update(embedding="emb{i}"), "stands in the name of `layer` alone"),
    ("case.json", lambda d: d["sizes"].update(pages=10**9), "a cache of more than 16,384 tokens"),
    ("case.json", lambda d: d["sizes"].update(page_size=0), "page_size: Input should be greater"),
    ("case.json", lambda d: d["sizes"].update(chunk=True), "chunk: Input should be"),
    ("case.json", lambda d: d.update(seed="a"), "seed: Input should be"),
    ("case.json", lambda d: d.update(seed=-1), "seed: Input should be"),
    ("case.json", lambda d: d.update(seed=2**70), "seed: Input should be"),
    ("case.json", lambda d: d.update(device="cpu; id"), "device: String should match"),
    ("case.json", lambda d: d.update(contenders=["reference", "../x"]), "contenders.1: String should match"),
    ("case.json", lambda d: d.update(contenders=["reference", "a", "a"]), "contenders: the contenders are not"),
    ("case.json", lambda d: d.update(contenders=["reference", "triton@999999"]), "32 ranks in all, are run"),
    ("case.json", lambda d: d.update(contenders=["reference", *"abcdefghi"]), "more than 9 contenders"),
    ("case.json", lambda d: d.update(more=1), "more: Extra inputs are not permitted"),
    ("workload.json", lambda d: d.extend([d[0]] * 1000), "not a list of steps, 1 to 1,000"),
    ("workload.json", lambda d: d[0].update(seq=0.5), "'0.5' is not a number"),
    ("workload.json", lambda d: d[0].update(seq=2**40), "or too large"),
    ("workload.json", lambda d: d[0].update(warp=9), "add has no 'warp'"),
    ("workload.json", lambda d: d[1].update(method="__class__"), "there is no method '__class__'"),
    ("workload.json", lambda d: d[1].update(method="decode"), "step 2, forward.decode: decode of other than a token"),
    ("workload.json", lambda d: d[1].update(tokens=[[0, [99]]]), "step 2, forward.batch_prefill: a token outside"),
    ("workload.json", lambda d: d[1].update(tokens=[[0, [1] * 200_000]]), "a forward of more than 16,384 tokens"),
    ("workload.json", lambda d: d[1].update(tokens=[[7, [1]]]), "no sequence 7"),
    ("workload.json", lambda d: d[1].update(tokens=[]), "a forward without tokens"),
    ("workload.json", lambda d: d.insert(1, d[0]), "step 2, add: a sequence 0 again"),
    ("workload.json", lambda d: d.insert(1, {"step": "popn", "seq": 0, "n": 1}), "1 tokens to forget"),
    ("workload.json", lambda d: d.insert(1, {"step": "fork", "parent": 3, "child": 4, "at": 0}), "no sequence 3"),
    ("workload.json", lambda d: d.insert(1, {"step": "fork", "parent": 0, "child": 4, "at": 1}), "a fork at token 1"),
    ("workload.json", lambda d: d.insert(1, {"step": "remove", "seq": 4}), "no sequence 4"),
    ("workload.json", lambda d: d.insert(1, {"step": "commit", "leaves": [[0, 0]]}), "what is no token tree"),
    ("workload.json", lambda d: d.insert(1, {"step": "poison", "seed": -1}), "the seed -1"),
    (
        "workload.json",
        lambda d: d.insert(1, {"step": "restart", "sizes": dataclasses.asdict(SIZES) | {"pages": 10**9}}),
        "a cache of more than",
    ),
    (
        "workload.json",
        lambda d: d[1].update(method="batch_verify", trees=[[0, [-1, 5, 0, 0, 0]]]),
        "parents that are no tree's",
    ),
]


@pytest.mark.parametrize(("file", "change", "message"), HOSTILE, ids=[message for _, _, message in HOSTILE])
def test_a_folder_of_somebody_else_is_read_with_care(
    file: str, change: Change, message: str, disagreement: Disagreement, tmp_path: Path
) -> None:
    folder = write_failure(disagreement, tmp_path / "one")
    edited(file, change)(folder)
    told = call("verify", "--replay", folder)
    assert told.exit_code == 2
    assert f"{folder / file}: error[damaged-failure]" in told.stderr
    assert message in told.stderr


def test_what_never_ends_is_not_read(disagreement: Disagreement, tmp_path: Path) -> None:
    folder = write_failure(disagreement, tmp_path / "one")
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
        (folder / "workload.json").unlink()
        make(folder / "workload.json")
        assert "it is no regular file" in call("verify", "--replay", folder).stderr


@pytest.mark.parametrize(
    ("contender", "code", "message"),
    [
        ("triton@3", 2, "error[tensor-parallel-degree]"),
        ("tritn", 2, "did you mean `triton`?"),
        ("cobol", 3, "error[backend-missing]"),
    ],
)
def test_contenders_are_those_that_verify_takes(
    contender: str, code: int, message: str, triton: Case, tmp_path: Path
) -> None:
    folder = write_failure(Disagreement(triton, STEPS, ("triton", "reference"), "made up"), tmp_path / "one")
    edited("case.json", lambda data: data.update(contenders=["reference", contender]))(folder)
    told = call("verify", "--replay", folder)
    assert told.exit_code == code
    assert message in told.stderr


def test_a_library_that_is_needed_may_be_missing(
    disagreement: Disagreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_failure(disagreement, tmp_path / "one")
    edited("case.json", lambda data: data["contenders"].append("huggingface"))(folder)
    monkeypatch.setattr(stored_failure, "find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(SpecError, match="needs `transformers`, which cannot be imported"):
        replay(folder)
