"""Our results beside the published ones: the difference, how sure it is, and where the two protocols part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from metabench.report import wording
from metabench.report.grids import DASH, Grid, Lines, Sheet
from metabench.report.model import Row, Table
from metabench.stats import Interval

NOTHING = "Nothing here has a published number to stand beside."
LEGEND = (
    "Ours with its interval at 95 %; the papers' intervals as they print them.",
    "Differences are ours minus the published one; the interval joins both where both are known.",
    "* the interval of the difference holds 0.",
    "Published numbers come from the papers' own, longer trainings; ~ marks a known difference of protocol, ? a "
    "number that could not be verified.",
)


@dataclass(frozen=True)
class Comparison:
    """One method on one task: `row` is ours, with the published number if there is one; `gap` ours minus theirs.

    `block` is the title of our table's block: inductive, transductive, controls.
    """

    row: Row
    gap: Interval | None
    block: str

    @property
    def agrees(self) -> bool:
        """Whether the interval of the difference holds 0."""
        return self.gap is not None and self.gap.low is not None and not self.gap.excludes(0.0)


def comparisons(table: Table) -> list[Comparison]:
    """The rows of a table that have a score, controls only where something was published; [] if nothing was."""
    rows = [(row, block.title) for block in table.blocks for row in block.rows]
    scored = [(row, title) for row, title in rows if row.quality is not None and row.status == "ok"]
    if not any(row.published for row, _ in scored):
        return []
    return [Comparison(row, _gap(row), title) for row, title in scored if row.published or title != "controls"]


def sheets(tables: Sequence[Table]) -> list[Sheet]:
    """A sheet for each table that has anything to compare."""
    return [_sheet(table, found) for table in tables if (found := comparisons(table))]


def records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """The comparisons as plain data, for JSON and CSV."""
    return [_record(table, one) for table in tables for one in comparisons(table)]


def _record(table: Table, one: Comparison) -> dict[str, Any]:
    row, paper = one.row, one.row.published
    ours, gap = row.quality, one.gap
    return {
        "task": table.title,
        "split": dict(table.protocol).get("split", ""),
        "rotations": dict(table.protocol).get("rotations", ""),
        "data": dict(table.protocol).get("data", ""),
        "method": row.method,
        "settings": row.settings,
        "block": one.block,
        "measure": table.measure,
        "seeds": row.seeds,
        "value": ours.value if ours else None,
        "ci_low": ours.low if ours else None,
        "ci_high": ours.high if ours else None,
        "published": paper.value if paper else None,
        "published_ci95": paper.ci95 if paper else None,
        "difference": gap.value if gap else None,
        "difference_low": gap.low if gap else None,
        "difference_high": gap.high if gap else None,
        "verified": paper.verified if paper else None,
        "source": paper.source if paper else "",
        "protocol": paper.protocol if paper else "",
        "unlike_ours": ", ".join(row.deviations),
    }


def _gap(row: Row) -> Interval | None:
    """The difference; its half width joins both intervals, or is ours where the paper prints none."""
    if row.published is None or row.quality is None:
        return None
    value = row.quality.value - row.published.value
    if row.quality.half is None:
        return Interval(value, None, None, row.quality.n, None)
    half = hypot(row.quality.half, row.published.ci95 or 0.0)
    return Interval(value, value - half, value + half, row.quality.n, None)


def _sheet(table: Table, found: Sequence[Comparison]) -> Sheet:
    known = wording.sources(table)
    unit = wording.unit(table.measure)
    heads = (
        ("", "method"), ("ours", unit), ("± over", wording.over(table)), ("published", unit), ("", "±"),
        ("", "difference"), ("", "source"),
    )  # fmt: skip
    rows = tuple(_cells(one, table.measure, known) for one in found)
    notes = tuple((str(number), text) for number, text in known.items())
    at = f", {wording.name(table.measure)}" if table.measure.startswith("accuracy_at_") else ""
    return Sheet(table.title + at, table.protocol, (Grid(heads, rows, 1),), notes)


def _cells(one: Comparison, measure: str, known: dict[int, str]) -> tuple[Lines, ...]:
    row, paper = one.row, one.row.published
    ours = "" if row.quality is None else wording.score(row.quality.value, measure)
    mine = (row.method,), (ours,), (wording.half(row.quality, measure),)
    if paper is None or one.gap is None:
        return *mine, (DASH,), ("",), ("",), ("",)
    margin = wording.half(one.gap, measure)
    gap = wording.signed(one.gap.value, measure) + (f" ±{margin}" if margin else "") + ("*" if one.agrees else "")
    theirs = "" if paper.ci95 is None else wording.score(paper.ci95, measure)
    return *mine, (wording.paper(row),), (theirs,), (gap,), (str(wording.source_number(row, known)),)
