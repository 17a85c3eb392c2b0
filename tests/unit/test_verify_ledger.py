"""What is counted, what is missing, and the tables."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from hf_parity.oracle import tiny_spec
from qwenspec.verify.case import Case
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.metrics import compare
from qwenspec.verify.steps import CacheSizes

CASE = Case(tiny_spec(), 0, "float32", CacheSizes(4, 8, 3, 16), ("reference", "triton", "tvm"))
TRITON, TVM, BOTH = ("triton", "reference"), ("tvm", "reference"), ("triton", "tvm")
ROWS = np.array([[1.0, 2.0], [2.0, 1.0]])


def filled() -> Ledger:
    ledger = Ledger()
    ledger.example(CASE, ["logn=set", "bias=true"], [TRITON])
    ledger.example(CASE, ["bias=true"], [TRITON, TVM, BOTH])
    for kind in ("fork", "forward.batch_decode", "fork"):
        ledger.step(kind)
    ledger.kernels_ran("triton", Counter(decode_attention=3))
    ledger.kernels_ran("triton", Counter(decode_attention=1))
    ledger.kernels_ran("tvm", Counter(compact_pages=0))
    ledger.compared(TRITON, "float32", compare(ROWS * 1.1, ROWS, 0.2), {})
    ledger.compared(TRITON, "float32", compare(ROWS * 1.4, ROWS, 0.2), {})
    ledger.compared(TRITON, "float32", compare(np.array([[1.01, 1.0]]), np.array([[1.0, 1.01]]), 0.2), {})
    ledger.compared(TVM, "bfloat16", compare(ROWS * np.nan, ROWS, 0.2), {})
    return ledger


def test_comparisons_are_counted() -> None:
    found = filled().comparisons[TRITON, "float32"]
    assert (found.comparisons, found.rows) == (3, 5)
    assert (found.passed, found.ambiguous, found.failed) == (1, 1, 1)
    assert (found.error, found.used) == (pytest.approx(0.4), pytest.approx(2.0))


def test_counts_of_kernels_start_anew() -> None:
    ledger, calls = Ledger(), Counter(linear=2, rms_norm=0)
    ledger.kernels_ran("triton", calls)
    calls["linear"] += 5
    ledger.kernels_ran("triton", calls)
    assert ledger.kernels == {("triton", "linear"): 7, ("triton", "rms_norm"): 0}
    assert calls == {"linear": 0, "rms_norm": 0}


def test_missing_features() -> None:
    schema = {"logn=set", "bias=true", "yarn"}
    assert filled().missing(schema) == {"yarn"}
    assert filled().missing(schema, "triton") == {"yarn"}
    assert filled().missing(schema, "tvm") == {"yarn", "logn=set"}
    assert Ledger().missing(schema) == schema


def test_a_ledger_survives_json() -> None:
    data = filled().to_data()
    again = Ledger.from_data(json.loads(json.dumps(data, allow_nan=False)))
    assert vars(again) == vars(filled())
    assert again.to_data() == data


def test_merging_adds_up() -> None:
    total, other = filled(), Ledger()
    other.example(CASE, ["yarn"], [TVM])
    other.step("remove")
    other.kernels_ran("tvm", Counter(compact_pages=2))
    other.compared(TVM, "float32", compare(ROWS, ROWS, 0.2), {})
    total.merge(other)
    total.merge(filled())
    assert total.examples == 5
    assert total.features["bias=true", TRITON] == 4
    assert total.missing(["yarn", "logn=set"], "tvm") == {"logn=set"}
    assert total.steps == {"fork": 4, "forward.batch_decode": 2, "remove": 1}
    assert total.kernels == {("triton", "decode_attention"): 8, ("tvm", "compact_pages"): 2}
    assert total.comparisons[TRITON, "float32"].comparisons == 6
    assert total.comparisons[TVM, "float32"].passed == 1
    assert filled().comparisons[TRITON, "float32"].comparisons == 3  # what was merged is as it was


TABLES = """\
Examples by feature and pair

feature    triton / reference  tvm / reference  triton / tvm
(all)                       2                1             1
bias=true                   2                1             1
logn=set                    1                0             0

Comparisons by pair and dtype

pair                dtype     comparisons  rows  pass  ambiguous  fail  worst error  of its bound
triton / reference  float32             3     5     1          1     1      4.0e-01          2.00
tvm / reference     bfloat16            1     2     0          0     1          inf           inf

Steps

step                  times
fork                      2
forward.batch_decode      1

Kernels

contender  kernel            calls
triton     decode_attention      4
tvm        compact_pages         0"""

MARKDOWN = """\
### Examples by feature and pair

| feature | triton / reference | tvm / reference | triton / tvm |
| --- | ---: | ---: | ---: |
| (all) | 2 | 1 | 1 |
| `bias=true` | 2 | 1 | 1 |
| `logn=set` | 1 | 0 | 0 |
"""


def test_tables() -> None:
    assert filled().tables() == TABLES


def test_tables_as_markdown() -> None:
    text = filled().tables(markdown=True)
    assert text.startswith(MARKDOWN)
    assert "| tvm / reference | bfloat16 | 1 | 2 | 0 | 0 | 1 | inf | inf |" in text


def test_nothing_ran() -> None:
    assert Ledger().tables() == ""
