"""Tables as grids of text, a form that the terminal, Markdown and LaTeX render each in its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metabench.report import wording
from metabench.report.model import KernelCell, KernelReport, KernelRow, KernelTable
from metabench.stats import Interval

Lines = tuple[str, ...]
DASH = "–"
SHORT = {"compute": "comp", "memory": "mem"}
KERNEL_HEADS = {
    "adapt": "adapt", "inner_step": "inner step", "predict": "predict", "embed": "embed", "meta_step": "meta step",
    "episode": "episode",
}  # fmt: skip
COUNT_HEADS = {
    "flops": ("", "FLOP"), "bytes": ("bytes", "moved"), "memory": ("peak", "bytes"), "nodes": ("graph", "nodes"),
    "launches": ("", "launches"),
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Text in rows and columns; a cell has one line or several. The first `labels` columns name the row.

    `heads` has two lines for each column. `dim`: what follows a cell's first line is secondary.
    """

    heads: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Lines, ...], ...]
    labels: int
    dim: bool = False


@dataclass(frozen=True)
class Sheet:
    """Grids under one title: the facts above them, the notes (key, text) below."""

    title: str
    facts: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]
    notes: tuple[tuple[str, str], ...]


def sheet(table: KernelTable, *, bounds: bool) -> Sheet:
    """The times of a table of kernels, and what was counted; intervals as bounds or as their half width."""
    reference = [("ratios to", table.reference)] if table.reference and len(table.rows) > 1 else []
    filled = tuple(grid for grid in (_times(table, bounds), _counts(table)) if grid.rows)
    return Sheet(table.title, (*table.protocol, *reference), filled, table.notes)


def legend(report: KernelReport) -> list[str]:
    """How to read the tables of kernels; only what they use."""
    cells = [cell for table in report.tables for row in table.rows for cell in row.cells]
    said = []
    if any(cell.time for cell in cells):
        said.append("Times are the median over processes, per call.")
    if any(cell.kernel == "inner_step" and cell.time for cell in cells):
        said.append("An inner step's time is the slope over step counts; once: what a call costs beside its steps.")
    if any(cell.time and cell.time.half is not None for cell in cells):
        said.append("Intervals are at 95 %, over processes.")
    if any(cell.ratio for cell in cells):
        how = {cell.paired for cell in cells if cell.ratio}
        words = {True: "paired by process", False: "of independent medians"}
        which = " or ".join(words[one] for one in sorted(how, reverse=True))
        said.append(f"× is the time relative to the reference's in the same column, {which}: below 1 is faster.")
    if any(cell.share is not None for cell in cells):
        said.append(
            "Roof: the least time that the machine's peak rate (comp) or its copy bandwidth (mem) allows, as a "
            "share of the time. Bytes are those of every operation's operands, so caches can bring it above 100 %."
        )
    return said


def _times(table: KernelTable, bounds: bool) -> Grid:
    kernels = [k for k in table.kernels if any(_has_time(row.cell(k)) for row in table.rows)]
    heads = (("", "method"), *(("", KERNEL_HEADS[kernel]) for kernel in kernels))
    rows = [
        ((row.method,), *(_time(row.cell(kernel), row, bounds) for kernel in kernels))
        for row in table.rows
        if any(_has_time(cell) for cell in row.cells)
    ]
    return Grid(heads, tuple(rows) if kernels else (), 1, dim=True)


def _has_time(cell: KernelCell | None) -> bool:
    return cell is not None and (cell.time is not None or "time" in dict(cell.missing))


def _time(cell: KernelCell | None, row: KernelRow, bounds: bool) -> Lines:
    if cell is None or not _has_time(cell):
        return ("",)
    if cell.time is None:
        return (f"{DASH} {dict(cell.missing)['time']}",)
    ratio = "×1" if row.is_reference else _ratio(cell.ratio, bounds) if cell.ratio else ""
    once = "" if cell.intercept is None else f"once {wording.duration(cell.intercept)}"
    return wording.timing(cell.time, bounds=bounds), *(text for text in (ratio, once) if text)


def _ratio(ratio: Interval, bounds: bool) -> str:
    return f"×{wording.margin(ratio.value, ratio, bounds=bounds)}"


def _counts(table: KernelTable) -> Grid:
    """A line for each method and kernel with counts."""
    columns: list[tuple[tuple[str, str], Callable[[KernelCell], str]]] = [
        (COUNT_HEADS[aspect], _counter(aspect)) for aspect in table.counts
    ]
    cells = [cell for row in table.rows for cell in row.cells]
    if any(cell.rate is not None for cell in cells):
        columns.append((("GFLOP", "/s"), lambda c: "" if c.rate is None else wording.digits(c.rate / 1e9)))
    if any(cell.share is not None for cell in cells):
        columns.append((("share", "of roof"), _share))
    rows = []
    for row in table.rows:
        counted = [cell for cell in row.cells if _is_counted(cell, table.counts)]
        if counted:
            names = tuple(KERNEL_HEADS[cell.kernel] for cell in counted)
            rows.append(((row.method,), names, *(tuple(show(cell) for cell in counted) for _, show in columns)))
    heads = (("", "method"), ("", "kernel"), *(head for head, _ in columns))
    return Grid(heads, tuple(rows) if columns else (), 2)


def _is_counted(cell: KernelCell, aspects: Sequence[str]) -> bool:
    return any(aspect in cell.counts or aspect in dict(cell.missing) for aspect in aspects)


def _counter(aspect: str) -> Callable[[KernelCell], str]:
    def show(cell: KernelCell) -> str:
        if aspect in cell.counts:
            return wording.amount(cell.counts[aspect])
        letter = dict(cell.missing).get(aspect)
        return f"{DASH} {letter}" if letter else ""

    return show


def _share(cell: KernelCell) -> str:
    if cell.share is None:
        return ""
    return f"{wording.digits(100 * cell.share, 2)} % {SHORT.get(cell.bound, '')}".rstrip()
