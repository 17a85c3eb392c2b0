"""Steps as data, and what a session does when contenders differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_parity.oracle import tiny_spec
from qwenspec.verify import session as session_module
from qwenspec.verify.case import Case
from qwenspec.verify.contenders import ReferenceContender, Rows
from qwenspec.verify.metrics import bound
from qwenspec.verify.reference import Reference
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import (
    Add,
    CacheSizes,
    Commit,
    Fork,
    Forward,
    Poison,
    Popn,
    Remove,
    Restart,
    Step,
    from_data,
    kind_of,
    to_data,
)
from qwenspec.verify.weights import random_weights

SIZES = CacheSizes(4, 8, 3, 16)
numbers = st.integers(-1, 100)
by_sequence = st.dictionaries(st.integers(0, 5), st.lists(numbers, min_size=1).map(tuple))
steps = st.one_of(
    st.builds(Add, numbers, st.none() | numbers),
    st.builds(Forward, by_sequence, st.sampled_from(["prefill", "batch_verify"]), st.none() | by_sequence),
    st.builds(Commit, st.dictionaries(numbers, numbers)),
    st.builds(Fork, numbers, numbers, numbers),
    st.builds(Popn, numbers, numbers),
    st.builds(Remove, numbers),
    st.builds(Poison, numbers),
    st.builds(Restart, st.builds(CacheSizes, numbers, numbers, numbers, numbers, st.booleans())),
)


@given(steps)
def test_a_step_survives_json(step: Step) -> None:
    assert from_data(json.loads(json.dumps(to_data(step)))) == step


def test_a_case_survives_json() -> None:
    spec = tiny_spec({"rope": {"scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}}})
    case = Case(spec, 3, "float16", SIZES, ("reference", "triton"))
    again = Case.from_data(json.loads(json.dumps(case.to_data())))
    assert again.spec.sha256() == spec.sha256()
    assert again.to_data() == case.to_data()


class OutOfPages(RuntimeError):
    """As a package's own is called."""


class Odd(ReferenceContender):
    """The reference, until `fault` has its way."""

    def __init__(self, name: str, case: Case, fault: Callable[[Step, Rows | None], Rows | None]) -> None:
        super().__init__(case.spec, random_weights(case.spec, case.seed))
        self.name = name
        self._fault = fault

    def do(self, step: Step) -> Rows | None:
        return self._fault(step, super().do(step))


def open_session(
    monkeypatch: pytest.MonkeyPatch, faults: Mapping[str, Callable[[Step, Rows | None], Rows | None]], evicts=False
):
    def open_contenders(case: Case) -> dict[str, ReferenceContender]:
        reference = ReferenceContender(case.spec, random_weights(case.spec, case.seed))
        return {"reference": reference} | {name: Odd(name, case, fault) for name, fault in faults.items()}

    monkeypatch.setattr(session_module, "open_contenders", open_contenders)
    sizes = replace(SIZES, evicts=evicts)
    return Session(Case(tiny_spec(), 0, "float32", sizes, ("reference", *faults)))


def agree(step: Step, rows: Rows | None) -> Rows | None:
    return rows


def test_agreement_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(monkeypatch, {"a": agree, "b": agree})
    assert session.pairs == [("a", "reference"), ("b", "reference"), ("a", "b")]
    for step in (Add(0), Forward({0: (1, 2, 3)}), Fork(0, 1, 2), Forward({1: (4,), 0: (5,)}, "batch_decode")):
        assert session.do(step)
    assert len(session.steps) == 4
    assert session.ledger.steps == {"add": 1, "fork": 1, "forward.batch_verify": 1, "forward.batch_decode": 1}
    counts = {pair: (found.comparisons, found.rows, found.passed) for (pair, _), found in counted(session)}
    assert counts == dict.fromkeys(session.pairs, (2, 5, 2))


def counted(session: Session):
    return session.ledger.comparisons.items()


def by(factor: float) -> Callable[[Step, Rows | None], Rows | None]:
    return lambda step, rows: rows if rows is None else rows * (1 + factor)


def test_packages_are_compared_with_each_other_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within its bound of the reference, to either side."""
    limit = bound("float32", tiny_spec().architecture.num_hidden_layers, ("a", "reference"))
    session = open_session(monkeypatch, {"a": by(0.8 * limit), "b": by(-0.8 * limit)})
    session.do(Add(0))
    with pytest.raises(Disagreement) as caught:
        session.do(Forward({0: (1, 2, 3)}))
    assert caught.value.pair == ("a", "b")
    assert {pair: found.failed for (pair, _), found in counted(session)} == {
        ("a", "reference"): 0,
        ("b", "reference"): 0,
        ("a", "b"): 1,
    }


@pytest.mark.parametrize("name", ["triton", "huggingface"])
@pytest.mark.parametrize("wrong", ["prefill", "decode", "batch_prefill", "batch_decode", "batch_verify", "tree"])
def test_whatever_forward_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch, wrong: str, name: str) -> None:
    """Of any contender, by any method, and of trees."""

    def off(step: Step, rows: Rows | None) -> Rows | None:
        return rows * 1.01 if rows is not None and kind_of(step) == f"forward.{wrong}" else rows

    session = open_session(monkeypatch, {"triton": agree, name: off})
    steps = [Add(0), Forward({0: (1, 2, 3)}, "prefill"), Forward({0: (4,)}, "decode"), Add(1)]
    steps += [Forward({1: (5, 6), 0: (7,)}, "batch_prefill"), Forward({1: (8,), 0: (9,)}, "batch_decode")]
    steps += [Forward({0: (1, 2)}), Forward({0: (3, 4)}, "batch_verify", {0: (-1, -1)})]
    with pytest.raises(Disagreement, match=f"{name} and reference") as caught:
        [session.do(step) for step in steps]
    assert kind_of(caught.value.steps[-1]) == f"forward.{wrong}"


def test_tokens_behind_the_window_are_refused_where_pages_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it is a mistake to say so."""

    def refuses(step: Step, rows: Rows | None) -> Rows | None:
        if isinstance(step, Popn):
            raise ValueError("tokens 0 to 3 were given back")
        return rows

    session = open_session(monkeypatch, {"a": refuses, "b": refuses}, evicts=True)
    session.do(Add(0))
    assert not session.do(Popn(0, 0))
    assert session.ledger.steps["behind the window"] == 1
    session = open_session(monkeypatch, {"a": refuses, "b": refuses})
    session.do(Add(0))
    with pytest.raises(Disagreement, match="ValueError: tokens 0 to 3 were given back"):
        session.do(Popn(0, 0))


def test_the_reference_contender_is_the_reference() -> None:
    """Row by row, in the order of the batch, whatever came before."""
    spec = tiny_spec()
    weights = random_weights(spec, 0)
    contender, model = ReferenceContender(spec, weights), Reference(spec, weights)
    histories: dict[int, list[int]] = {0: [], 1: []}
    for seq in histories:
        contender.do(Add(seq))
    for tokens in ({0: (1, 2, 3), 1: (4, 5)}, {1: (6, 7, 8), 0: (9,)}):
        rows = contender.do(Forward(tokens))
        expected = []
        for seq, ids in tokens.items():
            histories[seq] += ids
            expected.append(model.sequence().forward(histories[seq])[-len(ids) :])
        assert rows is not None
        np.testing.assert_allclose(rows, np.concatenate(expected), rtol=1e-9)
    last = contender.do(Forward({0: (1, 2)}, "batch_prefill"))
    assert last is not None
    np.testing.assert_allclose(last, model.sequence().forward([*histories[0], 1, 2])[-1:], rtol=1e-9)


def test_the_second_backend_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(step: Step, rows: Rows | None) -> Rows | None:
        if rows is not None:
            rows = rows.copy()
            rows[-1] += 0.01 * np.abs(rows[-1]).max()
        return rows

    session = open_session(monkeypatch, {"a": agree, "b": off})
    session.do(Add(0))
    with pytest.raises(Disagreement, match=r"b and reference, step 2 \(forward.batch_verify\).* row 2") as caught:
        session.do(Forward({0: (1, 2, 3)}))
    assert caught.value.steps == [Add(0), Forward({0: (1, 2, 3)})]
    assert caught.value.comparison is not None
    assert caught.value.outputs is not None
    assert set(caught.value.outputs) == {"reference", "a", "b"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_differs(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    session = open_session(monkeypatch, {"a": lambda step, rows: rows if rows is None else np.full_like(rows, value)})
    session.do(Add(0))
    with pytest.raises(Disagreement, match="a and reference"):
        session.do(Forward({0: (1,)}))


def test_an_error_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Step, rows: Rows | None) -> Rows | None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(Disagreement, match=r"a and reference, step 1 \(add\): ZeroDivisionError: by zero"):
        open_session(monkeypatch, {"a": fails}).do(Add(0))


def test_all_run_out_of_pages_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: Step, rows: Rows | None) -> Rows | None:
        if isinstance(step, Fork):
            raise OutOfPages("1 more of 8 pages")
        return rows

    session = open_session(monkeypatch, {"a": full, "b": full})
    session.do(Add(0))
    assert not session.do(Fork(0, 1, 0))
    assert session.do(Forward({0: (1,)}))
    session = open_session(monkeypatch, {"a": agree, "b": full})
    session.do(Add(0))
    with pytest.raises(Disagreement, match=r"b and a, step 2 \(fork\): b is out of pages, a is not"):
        session.do(Fork(0, 1, 0))
