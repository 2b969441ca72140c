"""Numbers and sentences that all formats share: units, intervals, durations, what is said around a table."""

from __future__ import annotations

from metabench.report.model import Row, Table
from metabench.stats import Interval


def score(value: float, measure: str) -> str:
    """A quality as shown: accuracies in per cent with two decimals, errors with three digits or more."""
    if "accuracy" in measure:
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def signed(value: float, measure: str) -> str:
    """A difference of qualities, always with its sign."""
    text = score(value, measure)
    return text if text.startswith("-") else f"+{text}"


def half(interval: Interval | None, measure: str) -> str:
    """Half the width of an interval; empty where there is none."""
    return "" if interval is None or interval.half is None else score(interval.half, measure)


def bounds(interval: Interval | None, measure: str) -> str:
    """An interval as [low, high]; empty where there is none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"[{score(interval.low, measure)}, {score(interval.high, measure)}]"


def duration(seconds: float | None, digits: int = 3) -> str:
    """A time with so many digits, in the unit that suits it: 850 us, 12.3 ms, 34.0 s, 12.0 min, 2.10 h."""
    if seconds is None:
        return ""
    scale, unit = _time_unit(seconds)
    return f"{_digits(seconds * scale, digits)} {unit}"


def timing(time: Interval, *, bounds: bool) -> str:
    """A time with its interval in the unit that suits it: '12.3 ±0.4 ms', or '12.3 [11.9, 12.7] ms' with `bounds`."""
    scale, unit = _time_unit(time.value)
    low, high = (None if bound is None else bound * scale for bound in (time.low, time.high))
    scaled = Interval(time.value * scale, low, high, time.n, None)
    return f"{margin(scaled.value, scaled, bounds=bounds)} {unit}"


def margin(value: float, interval: Interval, *, bounds: bool) -> str:
    """A number with three digits and its interval, with one digit more where the interval is that narrow."""
    if interval.low is None or interval.high is None or interval.half is None:
        return digits(value)
    places = len(digits(value).partition(".")[2])
    places += interval.half < 0.5 * 10**-places
    if bounds:
        return f"{value:.{places}f} [{interval.low:.{places}f}, {interval.high:.{places}f}]"
    if interval.half >= value:
        return f"{digits(value)} ±>100 %"
    return f"{value:.{places}f} ±{interval.half:.{places}f}"


def amount(value: float) -> str:
    """A count with three digits and the prefix that suits it: 1.23 G, 45.6 M, 12.3 k, 8120."""
    for limit, scale, prefix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{digits(value / scale)} {prefix}"
    return f"{value:.0f}"


def digits(value: float, count: int = 3) -> str:
    """A number with so many digits, more for whole numbers that need them: 0.123, 12.3, 1234."""
    if value and abs(value) < 0.1:
        return f"{value:.{count}g}"
    return _digits(value, count)


def unit(measure: str) -> str:
    """The unit of a quality's column."""
    return "%" if "accuracy" in measure else ""


def name(measure: str) -> str:
    """A measure in words: accuracy_at_2 is the accuracy at presentation 2, val_accuracy that on validation classes."""
    head, _, k = measure.rpartition("_at_")
    text = f"{head} at presentation {k}" if head else measure.replace("_", " ")
    return text.replace("val ", "validation ")


def paper(row: Row) -> str:
    """The published number as shown beside ours: a question mark where unverified, ~ where its protocol differs."""
    if row.published is None:
        return ""
    text = score(row.published.value, row.published.measure).removesuffix("0")
    return text + ("~" if row.deviations else "") + ("" if row.published.verified else "?")


def sources(table: Table) -> dict[int, str]:
    """Where the published numbers come from, numbered in the order of the rows; equal ones share a number."""
    return dict(enumerate(dict.fromkeys(_source(row) for row in table.rows if row.published), start=1))


def source_number(row: Row, known: dict[int, str]) -> int | None:
    """The number under which `sources` lists this row's published number."""
    return next((number for number, text in known.items() if row.published and text == _source(row)), None)


def _source(row: Row) -> str:
    if row.published is None:
        return ""
    said = [row.published.source, row.published.protocol, "" if row.published.verified else "not verified"]
    other = [f"unlike this table: {', '.join(row.deviations)}"] if row.deviations else []
    return f"{row.algorithm} as published in " + "; ".join(part for part in said + other if part)


def over(table: Table) -> str:
    """What the intervals of the quality run over, for the head of their column: seeds, or the episodes of one seed."""
    return "seeds" if any(row.seeds > 1 for row in table.rows if row.quality) else "episodes"


def sentences(table: Table) -> list[str]:
    """What is said below a table, apart from its notes: ranking, what was visible, further measures, cautions."""
    said = [f"{_capital(block.verdict)}." for block in table.blocks if block.verdict]
    if table.visible:
        low, high = (score(value, table.measure) for value in table.visible)
        size = low if low == high else f"{low} to {high}"
        points = " points" if "accuracy" in table.measure else ""
        said.append(f"Smallest visible difference to {table.reference} (80 % power): {size}{points}.")
    by_measure: dict[str, list[str]] = {}
    for method, measure, value in table.details:
        by_measure.setdefault(measure, []).append(f"{method} {score(value, measure)}")
    said += [f"{_capital(name(measure))}: {', '.join(values)}." for measure, values in by_measure.items()]
    return said + list(table.footer)


def failures(table: Table) -> list[tuple[str, str, str]]:
    """(method, status, reason) of every row without a result, equal reasons joined."""
    joined: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        if row.status != "ok":
            joined.setdefault((row.status, row.reason), []).append(row.method)
    return [(", ".join(names), status, reason) for (status, reason), names in joined.items()]


def legend(tables: list[Table]) -> list[str]:
    """How to read the columns; only what these tables use."""
    rows = [row for table in tables for row in table.rows]
    said = []
    if any(row.seeds > 1 and row.quality for row in rows):
        said.append("Intervals are at 95 %: over seeds, with the shared test episodes as second source of variance.")
        if any(row.seeds == 1 and row.quality for row in rows):
            said.append("A row with one seed has its interval over test episodes alone.")
    elif any(row.quality for row in rows):
        said.append("Intervals are at 95 %, over test episodes.")
    if any(row.by_class for row in rows):
        said.append("By class: queries clustered by their class; the distractors they met are not counted.")
    if any(row.difference for row in rows):
        said.append("Differences are paired on the same episodes, each at 95 %, not corrected for their number.")
    if any(row.mark == "best" for row in rows):
        said.append("* best, supported by every paired difference.")
    if any(row.mark == "here" for row in rows):
        said.append("+ best on these episodes and trainings only.")
    if any(row.published for row in rows):
        said.append(
            "Published numbers come from the papers' own, longer trainings; ~ marks a known difference of protocol."
        )
    if any(row.published and not row.published.verified for row in rows):
        said.append("? published, not verified.")
    return said


MARKS = {"best": "*", "here": "+", "": ""}


def _time_unit(seconds: float) -> tuple[float, str]:
    """The factor from seconds to the unit that suits a time, and the unit."""
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if abs(seconds) < limit:
            return scale, unit
    return 1 / 3600, "h"


def _digits(value: float, digits: int) -> str:
    rounded = f"{abs(value):.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - max(0, int(rounded.partition('e')[2])))}f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
