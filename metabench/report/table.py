"""Tables for the terminal: readable in 80 columns, with full intervals where there is room for them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from metabench.report import grids, wording
from metabench.report.grids import Grid, Sheet
from metabench.report.model import KernelReport, Row, Table

GAP = "  "
NARROWEST_METHOD = 12
WIDEST_METHOD = 20  # of a table of kernels; a longer name takes several lines


@dataclass(frozen=True)
class Column:
    """A column: the two lines of its head and what it shows of a row."""

    head: tuple[str, str]
    cell: Callable[[Row], str]


def show(tables: Sequence[Table], kernels: KernelReport, console: Console) -> None:
    """Print the tables as wide as `console` is; colour and NO_COLOR are rich's business."""
    for line in lines(tables, kernels, console.width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def render(tables: Sequence[Table], kernels: KernelReport, width: int = 80) -> str:
    """The tables as plain text of at most `width` columns."""
    return "\n".join(line.plain.rstrip() for line in lines(tables, kernels, width)) + "\n"


def lines(tables: Sequence[Table], kernels: KernelReport, width: int) -> list[Text]:
    """The tables as styled lines, each kind followed by one legend for all of it."""
    if not tables and not kernels.tables:
        return [Text("No results.")]
    out: list[Text] = []
    for table in tables:
        body = _body(table, width)
        out += [*_head(table, width), *body, *_below(table, width), *_failures(table, body, width), Text("")]
    out += [line for text in wording.legend(list(tables)) for line in _wrapped(text, width, style="dim")]
    out += [Text("")] if tables and kernels.tables else []
    for one in kernels.tables:
        out += [*sheet_lines(grids.sheet(one, bounds=False), width), Text("")]
    out += [line for text in kernels.footer for line in _wrapped(text, width)]
    return out + [line for text in grids.legend(kernels) for line in _wrapped(text, width, style="dim")]


def _head(table: Table, width: int) -> list[Text]:
    facts = " · ".join(f"{name} {value}" for name, value in table.protocol)
    return [Text(table.title, style="bold cyan"), *_wrapped(facts, width, style="dim")]


def _below(table: Table, width: int) -> list[Text]:
    out: list[Text] = []
    for letter, text in table.notes:
        out += _wrapped(f"{letter}  {text}", width, indent=3)
    for sentence in wording.sentences(table):
        out += _wrapped(sentence, width)
    other = {row.algorithm: ", ".join(row.deviations) for row in reversed(table.rows) if row.deviations}
    if other:
        said = "; ".join(f"{name}: {how}" for name, how in reversed(other.items()))
        out += _wrapped(f"~ Published under another protocol. {said}.", width)
    return out


def render_sheets(sheets: Sequence[Sheet], legend: Sequence[str], width: int = 80) -> str:
    """Sheets as plain text of at most `width` columns, and one legend for all of them."""
    out = [line for sheet in sheets for line in [*sheet_lines(sheet, width), Text("")]]
    out += [line for text in legend for line in _wrapped(text, width)]
    return "\n".join(line.plain.rstrip() for line in out) + "\n"


def sheet_lines(sheet: Sheet, width: int) -> list[Text]:
    """A sheet as styled lines."""
    facts = " · ".join(f"{name} {value}" for name, value in sheet.facts)
    out = [Text(sheet.title, style="bold cyan"), *_wrapped(facts, width, style="dim")]
    for grid in sheet.grids:
        for panel in _panels(grid, width):
            out += _panel(panel, width)
    return out + [line for key, text in sheet.notes for line in _wrapped(f"{key}  {text}", width, indent=3)]


def _widths(grid: Grid) -> list[int]:
    """The width of each column; the first, the method, folds at WIDEST_METHOD."""
    columns = [[*head, *(text for row in grid.rows for text in row[i])] for i, head in enumerate(grid.heads)]
    widest = [max(len(text) for text in column) for column in columns]
    return [min(widest[0], WIDEST_METHOD), *widest[1:]]


def _panels(grid: Grid, width: int) -> list[Grid]:
    """The grid cut into grids of as many columns as fit `width`, each with the columns that name the row."""
    widths, labels = _widths(grid), list(range(grid.labels))
    room = width - sum(widths[i] for i in labels) - len(GAP) * (grid.labels - 1)
    cuts: list[list[int]] = [[]]
    for i in range(grid.labels, len(widths)):
        if cuts[-1] and sum(len(GAP) + widths[j] for j in [*cuts[-1], i]) > room:
            cuts.append([])
        cuts[-1].append(i)
    return [_only(grid, labels + cut) for cut in cuts]


def _only(grid: Grid, columns: Sequence[int]) -> Grid:
    """Those columns, and the rows that have anything in them."""
    rows = [tuple(row[i] for i in columns) for row in grid.rows]
    filled = [row for row in rows if any(any(cell) for cell in row[grid.labels :])]
    return Grid(tuple(grid.heads[i] for i in columns), tuple(filled), grid.labels, grid.dim)


def _panel(grid: Grid, width: int) -> list[Text]:
    widths = _widths(grid)
    total = min(width, sum(widths) + len(GAP) * (len(widths) - 1))
    heads = [[head[i] for head in grid.heads] for i in (0, 1)]
    out = [Text(_aligned(head, widths, grid.labels), style="bold") for head in heads if any(head)]
    out.append(Text("─" * total, style="dim"))
    for row in grid.rows:
        cells = [tuple(_folded(row[0][0], widths[0])), *row[1:]]
        for i in range(max(len(cell) for cell in cells)):
            texts = [cell[i] if i < len(cell) else "" for cell in cells]
            out.append(Text(_aligned(texts, widths, grid.labels), style="dim" if i and grid.dim else ""))
    return [*out, Text("─" * total, style="dim")]


def _aligned(texts: Sequence[str], widths: Sequence[int], labels: int) -> str:
    sides = ("<" if i < labels else ">" for i in range(len(texts)))
    return GAP.join(f"{text:{side}{size}}" for text, side, size in zip(texts, sides, widths, strict=True))


def _folded(name: str, width: int) -> list[str]:
    """A method's name on lines of at most `width`, broken after commas where that does it."""
    out = [""]
    for piece in re.findall(r"[^,\[]*[,\[]?", name):
        room = width - (len(out) > 1)
        if out[-1] and len(out[-1].strip()) + len(piece) > room:
            out.append("")
        text = out[-1] + piece if out[-1] else " " * (len(out) > 1) + piece
        while len(text) > width:
            out[-1], text = text[:width], " " + text[width:]
            out.append("")
        out[-1] = text
    return out


def _failures(table: Table, body: Sequence[Text], width: int) -> list[Text]:
    """The reasons in full that the body had to cut."""
    shown = "\n".join(line.plain for line in body)
    out: list[Text] = []
    for methods, status, reason in wording.failures(table):
        if f"{status}: {reason}" not in shown:
            style = "red" if status != "skipped" else ""
            out += _wrapped(f"{methods} {status}: {reason}", width, indent=3, style=style)
    return out


def _body(table: Table, width: int) -> list[Text]:
    columns = _fitting(table, width)
    cells = {id(row): [column.cell(row) for column in columns] for row in table.rows}
    widths = [
        max(len(text) for text in (*column.head, *(cells[id(row)][i] for row in table.rows if row.status == "ok")))
        for i, column in enumerate(columns)
    ]
    room = max(NARROWEST_METHOD, width - sum(widths) - len(GAP) * len(widths))
    first = min(room, max(len("method"), *(len(_name(row)) for row in table.rows)))
    total = first + sum(widths) + len(GAP) * len(widths)
    heads = [[column.head[i] for column in columns] for i in (0, 1)]
    out = [Text(_line("", heads[0], first, widths), style="bold")] if any(heads[0]) else []
    out += [Text(_line("method", heads[1], first, widths), style="bold"), Text("─" * total, style="dim")]
    for block in table.blocks:
        if len(table.blocks) > 1:
            out.append(Text(block.title, style="italic"))
        for row in block.rows:
            out += _row(row, cells[id(row)], first, widths, total, dim=block.title == "controls")
    return [*out, Text("─" * total, style="dim")]


def _row(row: Row, cells: list[str], first: int, widths: list[int], total: int, *, dim: bool) -> list[Text]:
    if row.status != "ok":
        text = f"{_name(row):<{first}}{GAP}{row.status}: {row.reason.splitlines()[0] if row.reason else ''}"
        return [Text(_cut(text, total), style="red" if row.status != "skipped" else "dim")]
    style = "bold" if row.mark else "dim" if dim else ""
    names = textwrap.wrap(_name(row), first, subsequent_indent=" ", break_on_hyphens=False) or [""]
    rest = [Text(name, style=style) for name in names[1:]]
    return [Text(_line(names[0], cells, first, widths), style=style), *rest]


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    return GAP.join([f"{name:<{first}}", *(f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True))])


def _name(row: Row) -> str:
    return f"{row.method} {','.join(row.notes)}".rstrip() if row.notes else row.method


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrapped(text: str, width: int, *, indent: int = 0, style: str = "") -> list[Text]:
    pieces = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=True, break_on_hyphens=False)
    return [Text(piece, style=style) for piece in pieces]


def _fitting(table: Table, width: int) -> list[Column]:
    """The wide columns where they leave room for the longest method, else the narrow ones; never an empty one."""
    longest = max(len(_name(row)) for row in table.rows)
    wide = _filled(table, _wide(table))
    taken = sum(
        len(GAP) + max(len(text) for text in (*c.head, *(c.cell(row) for row in table.rows if row.status == "ok")))
        for c in wide
    )
    return wide if longest + taken <= width else _filled(table, _narrow(table))


def _filled(table: Table, columns: list[Column]) -> list[Column]:
    return [c for c in columns if any(c.cell(row) for row in table.rows if row.status == "ok")]


def _narrow(table: Table) -> list[Column]:
    m = table.measure
    return [
        _quality(m),
        Column(
            ("± over", "seeds") if wording.over(table) == "seeds" else ("± one", "seed"),
            lambda row: wording.half(row.quality, m),
        ),
        Column(("± by", "class"), lambda row: wording.half(row.by_class, m)),
        Column(("difference", f"to {_cut(table.reference or '', 10)}"), lambda row: _gap(row, m, wide=False)),
        Column(("paper", wording.unit(m)), wording.paper),
        *_costs(),
    ]


def _wide(table: Table) -> list[Column]:
    m = table.measure
    return [
        _quality(m),
        Column(("95 % over", wording.over(table)), lambda row: wording.bounds(row.quality, m)),
        Column(("95 % by", "class"), lambda row: wording.bounds(row.by_class, m)),
        Column(("difference", f"to {table.reference}"), lambda row: _gap(row, m, wide=True)),
        Column(("paper", wording.unit(m)), wording.paper),
        *_costs(),
        Column(("training", "steps"), lambda row: f"{row.train_steps}" if row.train_steps else ""),
        Column(("", "seeds"), lambda row: f"{row.seeds}" if row.quality else ""),
    ]


def _quality(measure: str) -> Column:
    def cell(row: Row) -> str:
        return wording.score(row.quality.value, measure) + (wording.MARKS[row.mark] or " ") if row.quality else ""

    return Column(
        (wording.name(measure) if len(wording.name(measure)) < 12 else "accuracy", wording.unit(measure)), cell
    )


def _costs() -> list[Column]:
    return [
        Column(("adapt", "/task"), lambda row: wording.duration(row.adapt_time.value if row.adapt_time else None)),
        Column(("train", "time"), lambda row: wording.duration(row.train_time.value if row.train_time else None, 2)),
    ]


def _gap(row: Row, measure: str, *, wide: bool) -> str:
    if row.difference is None:
        return "reference" if row.is_reference else ""
    value = wording.signed(row.difference.value, measure)
    if wide:
        return f"{value} {wording.bounds(row.difference, measure)}".rstrip()
    margin = wording.half(row.difference, measure)
    return f"{value} ±{margin}" if margin else value
