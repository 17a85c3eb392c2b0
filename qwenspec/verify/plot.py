"""Where the lines, ticks and labels of a plot go: curves of errors on a logarithmic axis, in SVG's coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwenspec.verify.result import Curve

WIDTH, HEIGHT = 460, 264
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 18, 34
STYLES = 5  # colours with a mark and a dash of their own
MARKED = 16  # marks a line, at most
DECADES = 2  # least height of the axis
LABELS = 9  # along the x axis, at most


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    name: str
    style: int
    points: str  # as <polyline> takes them
    marks: tuple[Mark, ...]
    bound: float
    bound_at: float


@dataclass(frozen=True)
class Plot:
    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    x_grid: tuple[float, ...]
    y_ticks: tuple[Tick, ...]
    bounds: tuple[Tick, ...]  # of the lines, each once
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot(title: str, curves: Sequence[Curve], order: Sequence[str]) -> Plot | None:
    """The plot of some curves, or None where there is nothing to draw. `order`: of all contenders, for their styles.

    Points that are not finite are drawn at the top, zeros at the bottom."""
    values = [value for curve in curves for _, value in curve.points if value > 0 and math.isfinite(value)]
    if not values:
        return None
    low, high = _decades([*values, *(curve.bound for curve in curves)])

    def y(value: float) -> float:
        if value == 0:
            return HEIGHT - BOTTOM
        part = (math.log10(value) - low) / (high - low) if math.isfinite(value) else 1.0
        return round(HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP), 1)

    keys = list(dict.fromkeys(key for curve in sorted(curves, key=_size) for key, _ in curve.points))
    by_position = isinstance(keys[0], int)
    places = {key: int(key) if by_position else i for i, key in enumerate(keys)}
    first, last = min(places.values()), max(places.values())

    def x(place: float) -> float:
        return round(LEFT + (place - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT), 1)

    at = {key: x(place) for key, place in places.items()}
    x_ticks = _position_ticks(first, last, x) if by_position else _layer_ticks(at)
    lines = []
    for curve in curves:
        marks = [Mark(at[key], y(value), f"{curve.contender}, {key}: {value:.2e}") for key, value in curve.points]
        every = math.ceil(len(marks) / MARKED)
        points = " ".join(f"{mark.x},{mark.y}" for mark in marks)
        style = order.index(curve.contender) % STYLES
        lines.append(Line(curve.contender, style, points, tuple(marks[::every]), curve.bound, y(curve.bound)))
    bounds = dict.fromkeys(Tick(line.bound_at, f"bound {line.bound:.0e}".replace("e-0", "e-")) for line in lines)
    return Plot(
        title,
        "position" if by_position else "layer",
        tuple(lines),
        x_ticks,
        tuple(tick.at for tick in x_ticks) if by_position else _layer_starts(at),
        tuple(Tick(y(10.0**power), _power(power)) for power in range(low, high + 1, _step(high - low))),
        tuple(bounds),
    )


def _size(curve: Curve) -> int:
    return -len(curve.points)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 0.05)
    return min(low, high - DECADES), high


def _step(decades: int) -> int:
    return math.ceil(decades / 6)


def _power(power: int) -> str:
    superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{superscript}"


def _position_ticks(first: int, last: int, x: Callable[[float], float]) -> tuple[Tick, ...]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if (last - first) / s < LABELS)
    return tuple(Tick(x(position), str(position)) for position in range(first, last + 1) if position % step == 0)


def _layer_ticks(at: dict[str | int, float]) -> tuple[Tick, ...]:
    """Each layer's number under the middle of its modules, as many as there is room for."""
    spans: dict[str, list[float]] = {}
    for key, x in at.items():
        if str(key).startswith("layers."):
            spans.setdefault(str(key).split(".")[1], []).append(x)
    every = math.ceil(len(spans) / LABELS)
    return tuple(Tick((xs[0] + xs[-1]) / 2, number) for number, xs in spans.items() if int(number) % every == 0)


def _layer_starts(at: dict[str | int, float]) -> tuple[float, ...]:
    """Where each layer begins and the last one ends."""
    starts: dict[str, float] = {}
    for key, x in at.items():
        parts = str(key).split(".")
        starts.setdefault(parts[1] if parts[0] == "layers" else "" if not starts else "end", x)
    return tuple(starts.values())[1:]
