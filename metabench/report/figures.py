"""Figures of a run, as SVG and PNG: how time scales with each coordinate, accuracy against cost, learning curves.

matplotlib is imported only where something is drawn; nothing here needs a display.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from metabench.errors import StoreError
from metabench.report import wording
from metabench.report.build import measures
from metabench.report.kernels import CALL, base_label, by_process, interval, kernel_rows, ordinary
from metabench.report.methods import TASK, Method, count, methods, with_data
from metabench.report.model import RunData
from metabench.stats import Interval, PowerLaw, power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7.6, 4.2  # inches; 150 dots each fill a README's column
DOTS = 150
POINTS = 3  # fewer values of a coordinate are no scaling
BENT = 1.15  # a point this factor off the law: fixed costs, or a cache that is full
# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow (too pale on white) and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
GREY = "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "*")
STYLES = ("-", "--", ":", "-.")
AXES = {
    "tasks": "tasks per call", "ways": "ways", "shots": "shots per class", "steps": "inner steps",
    "images": "images per call", "threads": "threads",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One method in a scaling figure: times (s) at growing x, and the law fitted to them."""

    method: str
    algorithm: str
    x: tuple[float, ...]
    times: tuple[Interval, ...]
    law: PowerLaw


@dataclass(frozen=True)
class Scaling:
    """One figure: the time of a kernel against one coordinate, all else equal; `fixed` says what that is."""

    kernel: str
    axis: str
    fixed: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Point:
    """One method in a figure of quality against cost (s); `front`: no method is both cheaper and better."""

    method: str
    algorithm: str
    quality: Interval
    cost: Interval
    front: bool


@dataclass(frozen=True)
class Pareto:
    """One figure: the quality of a task's methods against one of their costs."""

    title: str
    measure: str
    cost: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """One method's learning: its scores on training tasks, and on validation episodes, at so many images seen.

    Means over the seeds that got so far; `score` is the accuracy where there is one, else the loss.
    """

    method: str
    algorithm: str
    score: str
    train: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Learning:
    """One figure: the learning curves of all methods with one score, trained on the same data with the same ways."""

    title: str
    score: str
    curves: tuple[Curve, ...]


def draw(data: RunData, folder: Path) -> list[Path]:
    """Draw every figure that the results allow into `folder`, as SVG and PNG; returns the files, sorted by figure.

    Raises:
        StoreError: the folder cannot be written.
    """
    drawn = [(f"scaling-{f.kernel}-{f.axis} {f.fixed}", _scaling_figure(f, data)) for f in scalings(data)]
    drawn += [(f"pareto-{f.cost} {f.title}", _pareto_figure(f, data)) for f in paretos(data)]
    drawn += [(f"learning-{f.score} {f.title}", _learning_figure(f, data)) for f in learnings(data)]
    names = [_slug(name) for name, _ in drawn]
    unique = [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]
    return [path for name, (_, figure) in zip(unique, drawn, strict=True) for path in _save(figure, folder, name)]


def learnings(data: RunData) -> list[Learning]:
    """The learning curves of a run, by data and training way, those of a method averaged over its seeds."""
    if data.curves.empty:
        return []
    timed = data.rows[data.rows["measure"] == "train_time"].drop_duplicates("training").set_index("training")
    points = data.curves[data.curves["training"].isin(timed.index)]
    told = timed.loc[points["training"]].reset_index()
    ways = told["train_spec"].astype(str).str.extract(r"^([0-9]+)w", expand=False)
    points = points.reset_index(drop=True).assign(
        method=[base_label(str(cell)) for cell in told["cell"]],
        algorithm=told["algorithm"],
        title=told["training"].astype(str).str.split("/").str[1] + (" " + ways + "-way").fillna(""),
    )
    found = []
    for title, group in points.groupby("title", sort=False):
        curves = [_curve(mine) for _, mine in group.groupby(["method", "algorithm"], sort=False)]
        for score in ("accuracy", "loss"):  # Siamese networks learn from pairs and have a loss alone
            # Reptile has no loss on queries: without validation there is nothing to draw of it
            told_of = tuple(curve for curve in curves if curve.score == score and (curve.train or curve.validation))
            found += [Learning(str(title), score, told_of)] if told_of else []
    return found


def _curve(points: pd.DataFrame) -> Curve:
    def path(name: str) -> tuple[tuple[float, float], ...]:
        means = points.dropna(subset=[name]).astype({name: float}).groupby("images")[name].mean().sort_index()
        return tuple(zip(map(float, means.index), map(float, means), strict=True))

    score = "accuracy" if points["accuracy"].notna().any() else "loss"
    first = points.iloc[0]
    return Curve(str(first["method"]), str(first["algorithm"]), score, path(score), path("validation"))


def scalings(data: RunData) -> list[Scaling]:
    """Every (kernel, coordinate, all else) where a method was timed at three or more values of the coordinate.

    Coordinates are AXES: tasks per call, ways, shots, inner steps, threads; of embed images per call and threads.
    """
    rows = kernel_rows(data)
    times = rows[(rows["aspect"] == "time") & (rows["status"] == "ok") & rows["value"].notna()]
    times = times.assign(method=_methods(times))
    found = []
    for axis in AXES:
        images = times["kernel"] == "embed"
        part = times[images if axis == "images" else ~images if axis != "threads" else slice(None)]
        found += list(_along(part.dropna(subset=[axis]), axis, data))
    return found


def _methods(times: pd.DataFrame) -> list[str]:
    """The label of each row: the algorithm with its parameters, and its norm where it was timed with several."""
    base = pd.Series([base_label(cell) for cell in times["cell"]], index=times.index, dtype=object)
    several = times["norm"].groupby(base).transform("nunique") > 1
    return [f"{b} norm={n}" if s else b for b, n, s in zip(base, times["norm"], several, strict=True)]


def _along(times: pd.DataFrame, axis: str, data: RunData) -> Iterator[Scaling]:
    own = {"images": {"tasks", "ways", "shots", "queries"}, "threads": {"threads_asked"}}.get(axis, {axis})
    others = [*TASK, "stream", *CALL, "steps", "seed", "environment", "kernel"]
    fixed = [name for name in others if name not in own]
    for _, group in times.groupby(fixed, sort=False, dropna=False):
        lines = [_line(mine, axis, data) for _, mine in group.groupby("method", sort=False)]
        kept = tuple(line for line in lines if line is not None)
        if kept:
            yield Scaling(str(group["kernel"].iloc[0]), axis, _fixed(group.iloc[0], fixed), kept)


def _line(rows: pd.DataFrame, axis: str, data: RunData) -> Line | None:
    rows = rows.drop_duplicates(axis, keep="last").sort_values(axis)
    if len(rows) < POINTS:
        return None
    x, each = rows[axis].to_numpy(dtype=float), [row for _, row in rows.iterrows()]
    times = tuple(interval(row) for row in each)
    raw = pd.concat([by_process(data, row)["seconds"].rename(i) for i, row in enumerate(each)], axis=1).dropna()
    seconds = raw.to_numpy().astype(float) if len(raw) > 1 else [t.value for t in times]
    first = rows.iloc[0]
    return Line(str(first["method"]), str(first["algorithm"]), tuple(x), times, power_law(x, seconds))


def _fixed(row: pd.Series, names: Sequence[str]) -> str:
    """What is equal in a figure, in words: 'omniglot 5-way 1-shot 15 queries, 8 tasks per call, cpu float32'."""
    known = {name: row[name] for name in names if not pd.isna(row[name])}
    task = [str(row["dataset"])]
    task += [f"{int(known[n])}-{n.removesuffix('s')}" for n in ("ways", "shots") if n in known]
    task += [f"{int(known['queries'])} queries"] if "queries" in known else []
    task += [f"streams of {int(known['stream'])}"] if "stream" in known else []
    said = [" ".join(task)]
    said += [f"{int(known['tasks'])} tasks per call"] if known.get("tasks", 1) != 1 else []
    said += [f"{int(known['steps'])} steps"] if "steps" in known else []
    said += [f"{int(known['threads_asked'])} threads"] if "threads_asked" in known else []
    said += [f"{row['device']} {row['precision']}"]
    usual = {"allocator": "kept", "layout": "channels_last"}
    said += [f"{name} {known[name]}" for name in usual if known.get(name, usual[name]) != usual[name]]
    said += ["compiled"] if known.get("compile") else []
    inside = str(row["data"]).partition("[")[2].rstrip("]")
    said += [inside] if "=" in inside else []
    said += [f"seed {int(known['seed'])}"] if known.get("seed", 0) else []
    return ", ".join(said)


def paretos(data: RunData) -> list[Pareto]:
    """For each task with scores: quality against adaptation time per task, and against training time."""
    found = []
    shown = ordinary(data)
    for _, rows in with_data(shown.rows).groupby([*TASK, "stream"], sort=False, dropna=False):
        for measure in measures(rows):
            scored = [m for m in methods(rows, measure, shown) if measure and m.quality is not None]
            found += [_pareto(scored, measure, cost) for cost in ("adapt_time", "train_time")]
    return [figure for figure in found if len(figure.points) > 1]


def _pareto(scored: Sequence[Method], measure: str, cost: str) -> Pareto:
    known = [(m, q, price) for m in scored if (q := m.quality) and (price := m.cost(cost)) and price.value > 0]
    sign = -1.0 if measure.startswith("mse") else 1.0
    ranked = [(sign * q.value, price.value) for m, q, price in known if not m.control]
    points = []
    for m, quality, price in known:
        mine = (sign * quality.value, price.value)
        beaten = any(a >= mine[0] and b <= mine[1] and (a, b) != mine for a, b in ranked)
        points.append(Point(m.label, m.algorithm, quality, price, not m.control and not beaten))
    title = ""
    if scored:
        task = scored[0].rows.iloc[0]
        size = [f"{count(task[n])}-{n.removesuffix('s')}" for n in ("ways", "shots") if count(task[n])]
        title = " ".join([str(task["dataset"]), *size, f"{task['device']} {task['precision']}"])
    return Pareto(title, measure, cost, tuple(points))


def _scaling_figure(scaling: Scaling, data: RunData) -> Figure:
    figure, axes = _axes()
    for line, (colour, marker, style) in zip(scaling.lines, _looks(scaling.lines, data), strict=True):
        axes.errorbar(
            line.x, [t.value for t in line.times], yerr=_bars(line.times), color=colour, marker=marker, markersize=5,
            linestyle=style, linewidth=1.4, capsize=2, label=f"{line.method}\n{_law(line.law)}",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=AXES[scaling.axis])
    unit = "step" if scaling.kernel == "inner_step" else "call"
    axes.set_ylabel(f"{scaling.kernel.replace('_', ' ')}: time per {unit}")
    values = sorted({x for line in scaling.lines for x in line.x})
    axes.set_xticks(values, [f"{x:g}" for x in values])
    _log_ticks(axes, "y", _seconds)
    _finish(axes, scaling.fixed)
    return figure


def _law(law: PowerLaw) -> str:
    """The fitted exponent for the legend: 'exponent 0.95 ±0.01', and how far from a line the points are if they are."""
    value, half = law.exponent.value, law.exponent.half
    places = 3 if half is not None and half < 0.005 else 2
    margin = "" if half is None else f" ±{half:.{places}f}"
    bent = f"\n(bent: up to {100 * (law.worst - 1):.0f} % off)" if law.worst > BENT else ""
    return f"exponent {value:.{places}f}{margin}{bent}"


def _pareto_figure(pareto: Pareto, data: RunData) -> Figure:
    figure, axes = _axes()
    scale = 100.0 if "accuracy" in pareto.measure else 1.0
    front = sorted((p.cost.value, scale * p.quality.value) for p in pareto.points if p.front)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color="#444444", linewidth=1, linestyle=":")
    for point, (colour, marker, _) in zip(pareto.points, _looks(pareto.points, data), strict=True):
        errors = _bars([point.quality])
        axes.errorbar(
            point.cost.value, scale * point.quality.value, xerr=_bars([point.cost]),
            yerr=None if errors is None else scale * errors, color=colour, marker=marker,
            markersize=9 if point.front else 6, markeredgecolor="black" if point.front else colour,
            markeredgewidth=1.2, alpha=0.85, linestyle="none", linewidth=1.2, capsize=2,
            label=point.method + (" (front)" if point.front else ""),
        )  # fmt: skip
    axes.set(xscale="log")
    axes.set_xlabel("adaptation time per task" if pareto.cost == "adapt_time" else "training time")
    unit = wording.unit(pareto.measure)
    axes.set_ylabel(wording.name(pareto.measure) + (f" ({unit})" if unit else ""))
    _log_ticks(axes, "x", _seconds)
    _finish(axes, pareto.title)
    return figure


def _learning_figure(learning: Learning, data: RunData) -> Figure:
    figure, axes = _axes()
    shown, accuracies = learning.curves, learning.score == "accuracy"
    scale = 100.0 if accuracies else 1.0
    for curve, (colour, marker, style) in zip(shown, _looks(shown, data), strict=True):
        x, y = [x for x, _ in curve.train], [scale * y for _, y in curve.train]
        axes.plot(x, y, color=colour, linewidth=1.2, linestyle=style, label=curve.method)
        x, y = [x for x, _ in curve.validation], [scale * y for _, y in curve.validation]
        axes.plot(x, y, color=colour, linestyle="", marker=marker, markersize=5)
    axes.set_xscale("log")
    _log_ticks(axes, "x", _thousands)
    if not accuracies:
        axes.set_yscale("log")
        _log_ticks(axes, "y", _thousands)
    axes.set_xlabel("training images seen" + (", markers: validation" if any(c.validation for c in shown) else ""))
    axes.set_ylabel("accuracy on training tasks (%)" if accuracies else "loss on training tasks")
    _finish(axes, f"{learning.title}: learning curves")
    return figure


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)


def _log_ticks(axes: Axes, which: str, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2, 5 of every power of ten (1 alone over many), written as `text` says."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.minorticks_off()


def _seconds(value: float) -> str:
    """500 us, 20 ms."""
    return wording.duration(value, 1)


def _thousands(value: float) -> str:
    """500, 20k, 1M."""
    return next((f"{value / unit:g}{name}" for unit, name in ((1e6, "M"), (1e3, "k")) if value >= unit), f"{value:g}")


def _bars(intervals: Sequence[Interval]) -> Any:
    """Lengths below and above, as errorbar wants them; nothing where there is no interval."""
    sides = [
        (0.0, 0.0) if i.low is None or i.high is None else (max(0.0, i.value - i.low), max(0.0, i.high - i.value))
        for i in intervals
    ]
    return np.array(sides).T if any(any(side) for side in sides) else None


def _looks(shown: Sequence[Line] | Sequence[Point] | Sequence[Curve], data: RunData) -> list[tuple[str, str, str]]:
    """(colour, marker, line style) of each: a marker for each family, controls grey, no two alike while looks last."""
    families = list(dict.fromkeys(_family(one, data) for one in shown))
    looks: list[tuple[str, str, str]] = []
    coloured = 0
    for one in shown:
        control = one.algorithm in data.controls
        colour = GREY if control else COLOURS[coloured % len(COLOURS)]
        style = "-" if control else STYLES[coloured // len(COLOURS) % len(STYLES)]
        coloured += not control
        used = {marker for known, marker, _ in looks if known == colour}
        first = families.index(_family(one, data)) % len(MARKERS)
        markers = (*MARKERS[first:], *MARKERS[:first])
        looks.append((colour, next((m for m in markers if m not in used), markers[0]), style))
    return looks


def _family(one: Line | Point | Curve, data: RunData) -> str:
    return data.families.get(one.algorithm, one.algorithm)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.=+-]+", "-", text.lower()).strip("-")


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    import matplotlib

    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes for the same results
            figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=DOTS)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write figures here ({error.strerror or error})") from error
    return paths
