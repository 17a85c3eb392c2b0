"""Steps as data, and what a session does when contenders differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_parity.oracle import tiny_spec
from qwenspec.verify import session as session_module
from qwenspec.verify.case import Case
from qwenspec.verify.contenders import ReferenceContender, Rows
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


def open_session(monkeypatch: pytest.MonkeyPatch, faults: Mapping[str, Callable[[Step, Rows | None], Rows | None]]):
    def open_contenders(case: Case) -> dict[str, ReferenceContender]:
        reference = ReferenceContender(case.spec, random_weights(case.spec, case.seed))
        return {"reference": reference} | {name: Odd(name, case, fault) for name, fault in faults.items()}

    monkeypatch.setattr(session_module, "open_contenders", open_contenders)
    return Session(Case(tiny_spec(), 0, "float32", SIZES, ("reference", *faults)))


def agree(step: Step, rows: Rows | None) -> Rows | None:
    return rows


def test_agreement_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(monkeypatch, {"a": agree, "b": agree})
    assert session.pairs == [("a", "reference"), ("b", "reference"), ("a", "b")]
    for step in (Add(0), Forward({0: (1, 2, 3)}), Fork(0, 1, 2), Forward({1: (4,), 0: (5,)}, "batch_decode")):
        assert session.do(step)
    assert len(session.steps) == 4


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
