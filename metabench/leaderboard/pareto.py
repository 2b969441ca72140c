"""The picture of accuracy against cost: where its points, intervals, labels and ticks lie. No text of HTML in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metabench.leaderboard.boards import Board
from metabench.leaderboard.files import name_of
from metabench.leaderboard.standings import Standing
from metabench.report import wording
from metabench.stats import Interval

WIDTH, HEIGHT = 640.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 20.0, 14.0, 44.0
LINE = 18.0  # between two labels
LABELS = 30  # more cannot be read


@dataclass(frozen=True)
class Axis:
    """From values to lengths 0..`size`, and the ticks between; `log` counts factors."""

    low: float
    high: float
    size: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high, one = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.size * (one - low) / (high - low) if high > low else self.size / 2


@dataclass(frozen=True)
class Point:
    """One method: its place, the ends of its intervals, and where its label stands; others' have their submitter."""

    label: str
    group: str
    control: bool
    front: bool
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    text_x: float
    text_y: float
    anchor: str
    labelled: bool


@dataclass(frozen=True)
class Plot:
    """A picture: `axes` are (position, text) of ticks, `front` the corners of the line through what nothing beats."""

    cost: str
    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    front: str
    left_out: tuple[str, ...]
    summary: str


def linear(low: float, high: float, size: float) -> Axis:
    """An axis with round ticks and some air."""
    gap = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * gap, high + 0.06 * gap
    step = 10 ** math.floor(math.log10(gap / 3))
    step = next(step * k for k in (1, 2, 5, 10) if gap / (step * k) <= 5)
    first = math.ceil(low / step)
    ticks = [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]
    return Axis(low, high, size, False, tuple(ticks))


def logarithmic(low: float, high: float, size: float) -> Axis:
    """An axis of factors with ticks at 1, 2 and 5, or at powers of ten where there are many."""
    low, high = low / 1.35, high * 1.35
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if math.log10(high / low) <= 2.5 else (1,)
    ticks = [d * 10.0**k for k in decades for d in digits]
    return Axis(low, high, size, True, tuple(t for t in ticks if low <= t <= high))


def relative(board: Board) -> Plot | None:
    """Quality against the time of adapting as a multiple of the yardstick's."""
    return _plot(board, "time of adapting, multiple of protonet's in the same run", lambda one: one.relative)


def flops(board: Board) -> Plot | None:
    """Quality against operations of adapting to one task: exact, the same on every machine."""

    def cost(one: Standing) -> Interval | None:
        return None if one.flops is None else Interval(one.flops, None, None, 1, None)

    return _plot(board, "operations of adapting to one task (FLOP)", cost)


def _plot(board: Board, name: str, cost: Callable[[Standing], Interval | None]) -> Plot | None:
    shown = [one for one in board.standings if not one.control or one.algorithm == "untrained"]
    known = [(one, one.quality, cost(one)) for one in shown]
    drawn = [(one, quality, price) for one, quality, price in known if quality and price]
    if sum(not one.control for one, _, _ in drawn) < 2:
        return None
    x = logarithmic(*_range([price for _, _, price in drawn]), WIDTH - LEFT - RIGHT)
    y = linear(*_range([quality for _, quality, _ in drawn]), HEIGHT - TOP - BOTTOM)
    sign = 1 if board.protocol.higher_is_better else -1
    front = _front([(price.value, sign * quality.value) for _, quality, price in drawn])
    points = [_point(one, quality, price, x, y, n in front) for n, (one, quality, price) in enumerate(drawn)]
    placed = _labels(points)
    corners = sorted((points[n].x, points[n].y) for n in front)
    left_out = [name_of(one) for one, quality, price in known if quality and not price]
    names = ", ".join(points[n].label for n in sorted(front, key=lambda n: points[n].x))
    return Plot(
        cost=name,
        points=tuple(placed),
        x_ticks=tuple((round(LEFT + x.at(t), 1), _tick(t)) for t in x.ticks),
        y_ticks=tuple(
            (round(HEIGHT - BOTTOM - y.at(t), 1), f"{100 * t:g}" if "accuracy" in board.protocol.measure else f"{t:g}")
            for t in y.ticks
        ),
        front=" ".join(f"{px:.1f},{py:.1f}" for px, py in _steps(corners)),
        left_out=tuple(left_out),
        summary=f"Neither cheaper nor better by estimate than any other: {names}.",
    )


def _tick(value: float) -> str:
    return wording.amount(value) if value >= 1e4 else f"{value:g}"


def _range(intervals: Sequence[Interval]) -> tuple[float, float]:
    edges = [e for i in intervals for e in (i.low, i.high, i.value) if e is not None and math.isfinite(e)]
    return min(edges), max(edges)


def _point(one: Standing, quality: Interval, price: Interval, x: Axis, y: Axis, front: bool) -> Point:
    def across(value: float | None) -> float:
        return round(LEFT + x.at(price.value if value is None else value), 1)

    def down(value: float | None) -> float:
        return round(HEIGHT - BOTTOM - y.at(quality.value if value is None else value), 1)

    at, name = across(None), name_of(one)
    flip = at > WIDTH - RIGHT - 7 * len(name) - 12
    return Point(
        label=name,
        group=one.group,
        control=one.control,
        front=front,
        x=at,
        y=down(None),
        x_low=across(price.low),
        x_high=across(price.high),
        y_low=down(quality.low),
        y_high=down(quality.high),
        text_x=at - 8 if flip else at + 8,
        text_y=down(None) - 6,
        anchor="end" if flip else "start",
        labelled=True,
    )


def _front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which (cost, goodness) no other beats in both."""
    return {
        n
        for n, (cost, good) in enumerate(points)
        if not any(c <= cost and g >= good and (c, g) != (cost, good) for c, g in points)
    }


def _steps(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    line: list[tuple[float, float]] = []
    for x, y in corners:
        if line:
            line.append((x, line[-1][1]))
        line.append((x, y))
    return line


def _labels(points: Sequence[Point]) -> list[Point]:
    """Labels moved down until none lies on another; beyond `LABELS` only those of the front are kept."""
    taken: list[tuple[float, float, float]] = []
    placed: dict[int, Point] = {}
    for n in sorted(range(len(points)), key=lambda n: (points[n].y, points[n].x)):
        one = points[n]
        if len(points) > LABELS and not one.front:
            placed[n] = Point(**{**vars(one), "labelled": False})
            continue
        width = 6.6 * len(one.label)
        left = one.text_x - width if one.anchor == "end" else one.text_x
        y = one.text_y
        while any(abs(y - other) < LINE and left < right and left + width > start for start, right, other in taken):
            y += 2.0
        taken.append((left, left + width, y))
        placed[n] = Point(**{**vars(one), "text_y": round(min(y, HEIGHT - BOTTOM - 4), 1)})
    return [placed[n] for n in range(len(points))]
