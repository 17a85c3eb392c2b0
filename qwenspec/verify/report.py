"""A verification for people: a table for terminals, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from qwenspec.verify.metrics import Verdict
from qwenspec.verify.plot import Plot, plot
from qwenspec.verify.result import MEANING, Cell, Check, Curve, Verification

SIGNS = {Verdict.PASS: "✓", Verdict.AMBIGUOUS: "≈", Verdict.FAIL: "✗"}
WORDS = {Verdict.PASS: "agrees", Verdict.AMBIGUOUS: "near ties", Verdict.FAIL: "fails"}
NOT_RUN = "·"
TEMPLATES = Path(__file__).parent / "templates"
SHOWN_NEAR_TIES = 40


# --------------------------------------------------------------------------------------------------- in words


def headline(result: Verification) -> str:
    """The verdict in a few words."""
    if result.verdict is Verdict.FAIL:
        return f"{_names(_failing(result))} {_verb(_failing(result), 'disagrees', 'disagree')}"
    if not result.pairs:
        return "Nothing was compared"
    return "All agree, with near ties" if result.verdict is Verdict.AMBIGUOUS else "All agree"


def summary(result: Verification) -> str:
    """What the verdict rests on, and how close it was."""
    forwards = [cell for cell in result.cells if cell.check is Check.FORWARD]
    rows, used = sum(cell.rows for cell in forwards), max((cell.used for cell in forwards), default=0.0)
    near_ties = sum(cell.near_ties for cell in forwards)
    drawn = f"{_counted(len(result.examples), 'example')} in {_names(result.dtypes)}"
    told = [f"{drawn}: {_counted(rows, 'row')} of logits compared."]
    if rows:
        part = f"{used:,.0f} times" if used >= 10 else f"{percent(used)} of"
        told.append(f"The largest error is {part} what its bound allows.")
    if near_ties:
        told.append(f"In {_counted(near_ties, 'row')} two contenders prefer different tokens, which nearly tie.")
    elif rows and result.verdict is Verdict.PASS:
        told.append("All prefer the same token in every row.")
    return " ".join(told)


def _failing(result: Verification) -> list[str]:
    found = dict.fromkeys(cell.actual for cell in result.cells if cell.verdict is Verdict.FAIL)
    return list(found) or ["a contender"]


def _names(names: Sequence[str]) -> str:
    *head, tail = names or [""]
    return f"{', '.join(head)} and {tail}" if head else tail


def _verb(things: Sequence[object], one: str, many: str) -> str:
    return one if len(things) == 1 else many


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------- numbers


def small(value: float) -> str:
    """Two digits and a power of ten: 3.1e-7."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float) -> str:
    """A number up to 1, of which what it lacks is what matters: 0.999998, 1."""
    return "1" if value == 1 else f"{value:.6f}" if value > 0.999 else f"{value:.3f}"


def alike(part: float) -> str:
    """Of tokens or rows those that are alike, of which what is missing is what matters: 99.9998%, 80.0%, 100%."""
    return "100%" if part == 1 else f"{part:.4%}" if part > 0.999 else f"{part:.1%}"


def percent(part: float) -> str:
    """Of a bound, or how many times it."""
    if not math.isfinite(part):
        return "not finite"
    if part >= 10:
        return f"{part:,.0f}×"
    return f"{part:.0%}" if part >= 0.1 or part == 0 else f"{part:.1%}" if part >= 0.001 else "<0.1%"


# ------------------------------------------------------------------------------------------------- a terminal


def table(result: Verification) -> str:
    """The matrix check by pair, as text; every cell has a sign and how much of the bound was used."""
    pairs = result.pairs
    rows = [["", *(actual for actual, _ in pairs)], ["", *(expected for _, expected in pairs)]]
    for check in Check:
        cells = [result.merged(pair, check) for pair in pairs]
        if any(cells):
            rows.append([check.value, *(_in_text(cell) for cell in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(pairs) + 1)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"{SIGNS[result.verdict]} {headline(result)}", *textwrap.wrap(summary(result), 100)]
    lines += [f"{entrant.name} did not take part: {entrant.absent}" for entrant in result.entrants if entrant.absent]
    for failure in result.failures:
        lines += ["", f"{SIGNS[Verdict.FAIL]} {failure.reason}"]
        lines += [f"  again: {failure.command}"] if failure.command else []
    return "\n".join(lines)


def _in_text(cell: Cell | None) -> str:
    if cell is None:
        return NOT_RUN
    return f"{SIGNS[cell.verdict]} {cell.note or percent(cell.used)}"


# ---------------------------------------------------------------------------------------------------- a page


@dataclass(frozen=True)
class MatrixRow:
    check: Check
    meaning: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Figure:
    """The same kind of plot for every dtype."""

    title: str
    caption: str
    plots: tuple[Plot, ...]


def page(result: Verification) -> str:
    """The report as one HTML document: no script, and nothing is loaded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"small": small, "share": share, "alike": alike, "percent": percent}
    figures = _figures(result)
    return environment.get_template("report.html.jinja").render(
        result=result,
        headline=headline(result),
        summary=summary(result),
        signs=SIGNS,
        words=WORDS,
        matrix=_matrix(result),
        totals=[cell for cell in result.cells if cell.check is Check.FORWARD],
        figures=figures,
        beside=all(len(figure.plots) == 1 for figure in figures),
        near_ties=result.near_ties[:SHOWN_NEAR_TIES],
        absent=[entrant for entrant in result.entrants if entrant.absent],
    )


def _matrix(result: Verification) -> list[MatrixRow]:
    rows = [
        MatrixRow(check, MEANING[check], tuple(result.merged(pair, check) for pair in result.pairs)) for check in Check
    ]
    return [row for row in rows if any(row.cells)]


def _figures(result: Verification) -> list[Figure]:
    # One contender has the same colour and mark in every plot.
    order = list(dict.fromkeys(curve.contender for curve in (*result.by_layer, *result.by_position)))
    figures = [
        Figure(
            "Error by layer",
            "Every module's output on one prompt, in the order of execution, against the float64 reference. "
            "Zeros are drawn at the bottom.",
            _plots(result.by_layer, order),
        ),
        Figure(
            "Error by position",
            "The largest error of the logits at each position of a sequence, over all examples.",
            _plots(result.by_position, order),
        ),
    ]
    return [figure for figure in figures if figure.plots]


def _plots(curves: Sequence[Curve], order: Sequence[str]) -> tuple[Plot, ...]:
    dtypes = dict.fromkeys(curve.dtype for curve in curves)
    drawn = [plot(dtype, [curve for curve in curves if curve.dtype == dtype], order) for dtype in dtypes]
    return tuple(one for one in drawn if one is not None)
