"""What `qwenspec verify` found, as data, as a table and as a page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from qwenspec.verify.metrics import Comparison, Verdict
from qwenspec.verify.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, plot
from qwenspec.verify.report import alike, headline, page, percent, share, small, summary, table
from qwenspec.verify.result import Cell, Check, Curve, Entrant, Example, Failure, NearTie, Verification

VOID = {"meta", "circle", "rect", "path", "line", "polyline"}
PAIR = ("tvm", "reference")
MODULES = ("embed_tokens", "layers.0.input_norm", "layers.0", "layers.1.input_norm", "layers.1", "norm", "logits")


def comparison(error: float = 1e-7, verdict: Verdict = Verdict.PASS, near_ties: int = 0) -> Comparison:
    return Comparison(
        verdict,
        error,
        bound=1e-5,
        max_abs=2 * error,
        mean_abs=error / 2,
        max_relative=error,
        cosine=0.99999,
        top_k_overlap=0.8,
        argmax_agreement=1.0,
        near_ties=near_ties,
        rows=3,
        worst_row=1,
    )


def verification(**changes: object) -> Verification:
    result = Verification("my-model", "my.yaml", "ab" * 32, "2 layers", 7, "qwenspec verify my.yaml --seed=7")
    result.dtypes = ("float32", "bfloat16")
    result.entrants = [Entrant("reference", "float64"), Entrant("tvm", "a package"), Entrant("triton", "", "no torch")]
    for dtype in result.dtypes:
        for check in (Check.FORWARD, Check.DECODE):
            result.cell(PAIR, check, dtype).add(comparison())
    result.by_layer = [Curve("tvm", "float32", 1e-5, tuple((name, 1e-8 * i) for i, name in enumerate(MODULES)))]
    result.by_position = [Curve("tvm", "float32", 1e-5, ((0, 1e-8), (1, 1e-7), (5, math.inf)))]
    result.examples = [Example(1, "float32", 28, "4 pages of 8", ("poison", "add 0", "prefill 0+7"))]
    for name, value in changes.items():
        setattr(result, name, value)
    return result


class Page(HTMLParser):
    """Collects what a page is made of, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        if "td" in self.open:
            self.cells[-1] += data


# ------------------------------------------------------------------------------------------------------- the data


def test_the_worst_verdict_and_the_worst_numbers_stay() -> None:
    result = verification()
    assert result.verdict is Verdict.PASS
    cell = result.cell(PAIR, Check.DECODE, "float32")
    cell.add(comparison(4e-6, Verdict.AMBIGUOUS, near_ties=2))
    cell.add(comparison(2e-6))
    assert result.verdict is cell.verdict is Verdict.AMBIGUOUS
    assert (cell.comparisons, cell.rows, cell.near_ties) == (3, 9, 2)
    assert (cell.error, cell.max_abs, cell.top_k_overlap) == (4e-6, 8e-6, 0.8)
    assert cell.used == pytest.approx(0.4)
    result.failures.append(Failure("it fails"))
    assert result.verdict is Verdict.FAIL


def test_a_dtype_with_a_wider_bound_does_not_hide_a_failure() -> None:
    merged = Cell(*PAIR, Check.DECODE, error=0.02, bound=0.1)
    merged.merge(Cell(*PAIR, Check.DECODE, error=2e-5, bound=1e-5, verdict=Verdict.FAIL))
    assert (merged.error, merged.bound, merged.verdict) == (2e-5, 1e-5, Verdict.FAIL)


def test_an_error_that_is_not_a_number_is_the_worst() -> None:
    cell = Cell(*PAIR, Check.DECODE, error=1.0, bound=1e-5)
    cell.merge(Cell(*PAIR, Check.DECODE, error=math.nan, bound=1e-5))
    assert math.isnan(cell.error)


def test_data_is_json_without_infinities() -> None:
    data = json.loads(json.dumps(verification().to_data(), allow_nan=False))
    assert (data["verdict"], data["spec"], data["seed"]) == ("pass", "my-model", 7)
    assert data["by_position"][0]["points"] == [[0, 1e-8], [1, 1e-7], [5, None]]
    assert [cell["check"] for cell in data["cells"][:2]] == ["every forward", "decode"]


# ------------------------------------------------------------------------------------------------------ in words


def test_words_follow_the_verdict() -> None:
    result = verification()
    assert headline(result) == "All agree"
    assert "1 example in float32 and bfloat16: 6 rows of logits compared." in summary(result)
    assert "The largest error is 1.0% of what its bound allows." in summary(result)
    result.cell(PAIR, Check.FORWARD, "float32").add(comparison(verdict=Verdict.AMBIGUOUS, near_ties=1))
    assert headline(result) == "All agree, with near ties"
    assert "In 1 row two contenders prefer different tokens" in summary(result)
    result.cell(PAIR, Check.DECODE, "float32").add(comparison(1, Verdict.FAIL))
    assert headline(result) == "tvm disagrees"
    assert "prefer" not in summary(verification(failures=[Failure("it fails")]))
    result.cell(PAIR, Check.FORWARD, "float32").add(comparison(1, Verdict.FAIL))
    assert "The largest error is 100,000 times what its bound allows." in summary(result)
    result.cell(("triton", "tvm"), Check.DECODE, "float32").add(comparison(1, Verdict.FAIL))
    assert headline(result) == "tvm and triton disagree"
    assert headline(verification(cells=[])) == "Nothing was compared"


def test_numbers() -> None:
    assert [small(value) for value in (0.0, 3.14e-7, 0.25, 12345.0, math.inf)] == [
        "0",
        "3.1e-7",
        "2.5e-1",
        "1.2e4",
        "not finite",
    ]
    assert [percent(part) for part in (0, 1e-9, 0.0123, 0.987, 12.0, math.inf)] == [
        "0%",
        "<0.1%",
        "1.2%",
        "99%",
        "12×",
        "not finite",
    ]
    assert [share(value) for value in (1.0, 0.9999998, 0.5)] == ["1", "1.000000", "0.500"]
    assert [alike(value) for value in (1.0, 0.999998, 0.8, 0.0)] == ["100%", "99.9998%", "80.0%", "0.0%"]


def test_the_table_has_a_sign_in_every_cell() -> None:
    result = verification(
        failures=[Failure("tvm and reference differ", "failures/x", "qwenspec verify --replay failures/x")]
    )
    result.cell(PAIR, Check.DECODE, "float32").add(comparison(1e-4, Verdict.FAIL))
    result.cell(("triton", "tvm"), Check.FORK, "float32").add(comparison(2e-6, Verdict.AMBIGUOUS))
    lines = table(result).splitlines()
    assert lines[0].split() == ["tvm", "triton"]
    assert lines[1].split() == ["reference", "tvm"]
    assert lines[2].split() == ["every", "forward", "✓", "1.0%", "·"]
    assert lines[3].split() == ["decode", "✗", "10×", "·"]
    assert lines[4].split() == ["fork", "·", "≈", "20%"]
    assert len({line.index(word) for line, word in zip(lines[:4], ("tvm", "reference", "✓", "✗"), strict=True)}) == 1
    assert "triton did not take part: no torch" in lines
    assert lines[-2:] == ["✗ tvm and reference differ", "  again: qwenspec verify --replay failures/x"]


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_beside_itself() -> None:
    text = page(verification())
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    assert not [a for _, attributes in found.tags for a in attributes if a in ("src", "href", "srcset", "style")]
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_it_in_words_beside_colours() -> None:
    result = verification()
    result.cell(PAIR, Check.DECODE, "bfloat16").add(comparison(2e-5, Verdict.FAIL))
    result.cell(PAIR, Check.ROLLBACK, "bfloat16").add(comparison(2e-6, Verdict.AMBIGUOUS))
    result.cell(("triton", "tvm"), Check.FORK, "float32").add(comparison())
    found = Page(page(result))
    cells = [" ".join(cell.split()) for cell in found.cells[:8]]
    assert cells == [
        "✓ agrees1.0%", "· not run",
        "✗ fails200%", "· not run",
        "· not run", "✓ agrees1.0%",
        "≈ near ties20%", "· not run",
    ]  # fmt: skip
    for told in ("tvm disagrees", "qwenspec verify my.yaml --seed=7", "prefill 0+7", "no torch", "my.yaml"):
        assert told in found.text


def test_parts_have_their_unit_and_apostrophes_are_of_one_kind() -> None:
    found = Page(page(verification()))
    totals = [cell for cell in found.cells if cell.endswith("%") and cell[0].isdecimal()]
    assert totals == ["80.0%", "100%"] * 2
    assert "'" in found.text
    assert "’" not in found.text


def test_plots_of_one_dtype_stand_beside_one_another() -> None:
    def beside(result: Verification) -> bool:
        return ("div", {"class": "beside"}) in Page(page(result)).tags

    result = verification()
    assert beside(result)
    result.by_layer.append(Curve("tvm", "bfloat16", 1e-2, result.by_layer[0].points))
    assert not beside(result)


def test_whatever_a_spec_or_a_message_holds_is_text() -> None:
    hostile = "<script>alert('x')</script>&\"{{ 7 * 7 }}"
    result = verification(
        spec=hostile,
        command=hostile,
        failures=[Failure(hostile, hostile, hostile)],
        near_ties=[NearTie(1, 2, 3, 4, (hostile, hostile), hostile, (17, 23), 1e-3)],
        by_layer=[Curve(hostile, hostile, 1e-5, ((hostile, 1e-7), (hostile + "2", 1e-7)))],
    )
    found = Page(page(result))
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(hostile) >= 9


def test_near_ties_are_listed_and_cut() -> None:
    ties = [NearTie(2, 5, 0, position, PAIR, "float32", (17, 401), 3.1e-3) for position in range(45)]
    text = Page(page(verification(near_ties=ties))).text
    assert text.count("17, 401") == 40
    assert "5 more." in text
    assert "None: in every row" in Page(page(verification())).text


# --------------------------------------------------------------------------------------------------------- plots


def points(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_larger_errors_are_higher_on_a_logarithmic_axis() -> None:
    curve = Curve("tvm", "float32", 1e-3, ((0, 1e-6), (1, 1e-5), (2, 1e-4), (3, 0.0), (4, math.inf)))
    drawn = plot("float32", [curve], ["tvm"])
    assert drawn is not None
    (line,) = drawn.lines
    (x0, y0), (x1, y1), (x2, y2), (_, zero), (x4, infinite) = points(line.points)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 - line.bound_at == pytest.approx(y1 - y2, abs=0.2)
    assert (zero, infinite) == (HEIGHT - BOTTOM, TOP)
    assert (x0, x4) == (LEFT, WIDTH - RIGHT)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert [tick.text for tick in drawn.x_ticks] == ["0", "1", "2", "3", "4"]
    by_power = {tick.text: tick.at for tick in drawn.y_ticks}
    assert by_power["10⁻⁵"] == y1
    assert [bound.text for bound in drawn.bounds] == ["bound 1e-3"]


def test_layers_are_labelled_under_their_middle() -> None:
    curve = Curve("tvm", "float32", 1e-5, tuple((name, 1e-7) for name in MODULES))
    drawn = plot("float32", [curve], ["tvm"])
    assert drawn is not None
    xs = [x for x, _ in points(drawn.lines[0].points)]
    assert [(tick.text, tick.at) for tick in drawn.x_ticks] == [
        ("0", (xs[1] + xs[2]) / 2),
        ("1", (xs[3] + xs[4]) / 2),
    ]
    assert drawn.x_grid == (xs[1], xs[3], xs[5])


def test_many_layers_get_few_labels() -> None:
    names = ["embed_tokens", *(f"layers.{i}.{m}" for i in range(80) for m in ("attention", "mlp")), "logits"]
    drawn = plot("float32", [Curve("tvm", "float32", 1e-5, tuple((name, 1e-7) for name in names))], ["tvm"])
    assert drawn is not None
    assert len(drawn.x_ticks) <= 9
    assert len(drawn.lines[0].marks) <= 17


def test_a_contender_keeps_its_style_and_nothing_is_no_plot() -> None:
    curves = [Curve(name, "float32", 1e-5, ((0, 1e-7), (1, 1e-7))) for name in ("tvm", "huggingface")]
    drawn = plot("float32", curves, ["triton", "tvm", "huggingface"])
    assert drawn is not None
    assert [line.style for line in drawn.lines] == [1, 2]
    assert plot("float32", [Curve("tvm", "float32", 1e-5, ((0, 0.0),))], ["tvm"]) is None


def test_positions_are_where_they_are_also_when_some_are_missing() -> None:
    drawn = plot("float32", [Curve("tvm", "float32", 1e-5, ((0, 1e-7), (10, 1e-7), (40, 1e-7)))], ["tvm"])
    assert drawn is not None
    x0, x10, x40 = (x for x, _ in points(drawn.lines[0].points))
    assert (x10 - x0) * 4 == pytest.approx(x40 - x0, abs=0.3)
    assert [tick.text for tick in drawn.x_ticks] == ["0", "5", "10", "15", "20", "25", "30", "35", "40"]
