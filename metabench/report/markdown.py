"""Tables as GitHub-flavoured Markdown, intervals written out, notes and sources below each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metabench.report import grids, wording
from metabench.report.grids import Grid, Sheet
from metabench.report.model import KernelReport, Row, Table
from metabench.stats import Interval


def render(tables: Sequence[Table], kernels: KernelReport) -> str:
    """All tables, each under its own heading, each kind with its legend."""
    if not tables and not kernels.tables:
        return "No results.\n"
    legends = [escape(" ".join(said)) for said in (wording.legend(list(tables)), grids.legend(kernels))]
    footer = "\n".join(f"- {escape(text)}" for text in kernels.footer)
    parts = [
        *map(_table, tables),
        legends[0],
        *(sheet_text(grids.sheet(one, bounds=True)) for one in kernels.tables),
        footer,
        legends[1],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_sheets(sheets: Sequence[Sheet], legend: Sequence[str]) -> str:
    """Sheets, and one legend for all of them."""
    return "\n\n".join([*map(sheet_text, sheets), escape(" ".join(legend))]) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", text).replace("<", "&lt;").replace("\n", " ")


def _table(table: Table) -> str:
    known = wording.sources(table)
    facts = " · ".join(f"{escape(name)} {escape(value)}" for name, value in table.protocol)
    below = [f"- {letter}: {escape(text)}" for letter, text in table.notes]
    below += [f"- {escape(text)}" for text in wording.sentences(table)]
    below += [f"- {escape(f'{names} {status}: {reason}')}" for names, status, reason in wording.failures(table)]
    below += [f"- [{number}] {escape(text)}" for number, text in known.items()]
    return "\n".join([f"### {escape(table.title)}", "", facts, "", *_grid(table, known), "", *below]).rstrip()


def _grid(table: Table, known: dict[int, str]) -> list[str]:
    """The lines of the table itself, without columns that say nothing."""
    heads = _heads(table)
    cells = [[_cells(row, table.measure, known, len(heads)) for row in block.rows] for block in table.blocks]
    used = [i for i in range(len(heads)) if i < 2 or any(row[i] for rows in cells for row in rows)]
    lines = [_line([heads[i] for i in used]), _line([":--", *["--:"] * (len(used) - 1)])]
    for block, rows in zip(table.blocks, cells, strict=True):
        lines += [_line([f"*{escape(block.title)}*", *[""] * (len(used) - 1)])] if len(table.blocks) > 1 else []
        lines += [_line([row[i] for i in used]) for row in rows]
    return lines


def sheet_text(sheet: Sheet) -> str:
    """A sheet under its own heading."""
    facts = " · ".join(f"{escape(name)} {escape(value)}" for name, value in sheet.facts)
    parts = ["\n".join(_text_grid(grid)) for grid in sheet.grids]
    notes = "\n".join(f"- {key}: {escape(text)}" for key, text in sheet.notes)
    return "\n\n".join(part for part in [f"### {escape(sheet.title)}", facts, *parts, notes] if part)


def _text_grid(grid: Grid) -> list[str]:
    lines = [
        _line([escape(" ".join(head).strip()) for head in grid.heads]),
        _line([":--"] * grid.labels + ["--:"] * (len(grid.heads) - grid.labels)),
    ]
    return lines + [_line(["<br>".join(escape(text) for text in cell) for cell in row]) for row in grid.rows]


def _heads(table: Table) -> list[str]:
    quality = " ".join(part for part in (wording.name(table.measure) or "quality", wording.unit(table.measure)) if part)
    gap = f"difference to {escape(table.reference)}" if table.reference else "difference"
    over = f"95 % over {wording.over(table)}"
    return [
        "method", quality, over, "95 % by class", gap, "published", "adaptation per task", "training", "steps", "seeds",
    ]  # fmt: skip


def _cells(row: Row, measure: str, known: dict[int, str], width: int) -> list[str]:
    name = escape(row.method) + (f" ({','.join(row.notes)})" if row.notes else "")
    if row.status != "ok":
        return [name, row.status, *[""] * (width - 2)]
    return [
        name,
        _quality(row, measure),
        wording.bounds(row.quality, measure),
        wording.bounds(row.by_class, measure),
        _difference(row.difference, measure) if row.difference else "reference" if row.is_reference else "",
        f"{escape(wording.paper(row))} [{wording.source_number(row, known)}]" if row.published else "",
        _time(row.adapt_time),
        wording.duration(row.train_time.value if row.train_time else None, 2),
        str(row.train_steps or ""),
        str(row.seeds) if row.quality else "",
    ]


def _quality(row: Row, measure: str) -> str:
    if row.quality is None:
        return ""
    text = wording.score(row.quality.value, measure)
    return f"**{text}** \\{wording.MARKS[row.mark]}" if row.mark else text


def _difference(interval: Interval, measure: str) -> str:
    return f"{wording.signed(interval.value, measure)} {wording.bounds(interval, measure)}".rstrip()


def _time(interval: Interval | None) -> str:
    return wording.duration(interval.value if interval else None)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
