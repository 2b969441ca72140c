r"""Tables for a paper: booktabs and threeparttable, with what deviates in a protocol as table notes.

The text needs `\usepackage{booktabs,threeparttable}`.
"""

from __future__ import annotations

from collections.abc import Sequence

from metabench.report import grids, wording
from metabench.report.grids import Grid, Lines, Sheet
from metabench.report.model import KernelReport, Row, Table

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "·": r"$\cdot$", "±": r"$\pm$", "\n": " ", "[": "{[}", "×": r"$\times$", "–": "--",
}  # fmt: skip


def render(tables: Sequence[Table], kernels: KernelReport) -> str:
    """One table environment per task (and call, for kernels), ready to be input."""
    if not tables and not kernels.tables:
        return "% No results.\n"
    said = [*grids.legend(kernels), *kernels.footer]
    sheets = [sheet_text(grids.sheet(table, bounds=False), said) for table in kernels.tables]
    return "\n\n".join([*map(_table, tables), *sheets]) + "\n"


def render_sheets(sheets: Sequence[Sheet], legend: Sequence[str]) -> str:
    """One table environment per sheet, each with the legend."""
    return "\n\n".join(sheet_text(sheet, legend) for sheet in sheets) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(character, character) for character in text)


def _table(table: Table) -> str:
    known = wording.sources(table)
    facts = ", ".join(f"{name} {value}" for name, value in table.protocol)
    return "\n".join([
        r"\begin{table}", r"\centering", r"\begin{threeparttable}",
        rf"\caption{{{escape(f'{table.title}: {facts}')}.}}",
        *_grid(table, known),
        r"\begin{tablenotes}\footnotesize", *_notes(table, known), r"\end{tablenotes}",
        r"\end{threeparttable}", r"\end{table}",
    ])  # fmt: skip


def _grid(table: Table, known: dict[int, str]) -> list[str]:
    """The tabular itself, without columns that say nothing."""
    heads = _heads(table)
    cells = [[_cells(row, table.measure, known, len(heads)) for row in block.rows] for block in table.blocks]
    used = [i for i in range(len(heads)) if i < 2 or any(row[i] for rows in cells for row in rows)]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(used) - 1)}}}", r"\toprule", _line([heads[i] for i in used])]
    for block, rows in zip(table.blocks, cells, strict=True):
        title = rf"\multicolumn{{{len(used)}}}{{l}}{{\emph{{{escape(block.title)}}}}} \\"
        lines += [r"\midrule", *([title] if len(table.blocks) > 1 else [])]
        lines += [_line([row[i] for i in used]) for row in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def sheet_text(sheet: Sheet, said: Sequence[str]) -> str:
    """A sheet as a table environment; `said` are sentences for its notes."""
    facts = ", ".join(f"{name} {value}" for name, value in sheet.facts)
    return "\n".join([
        r"\begin{table}", r"\centering", r"\begin{threeparttable}",
        rf"\caption{{{escape(f'{sheet.title}: {facts}')}.}}",
        *(line for grid in sheet.grids for line in _text_grid(grid)),
        r"\begin{tablenotes}\footnotesize",
        *(rf"\item[{escape(key)}] {escape(text)}" for key, text in sheet.notes),
        *(rf"\item {escape(text)}" for text in said),
        r"\end{tablenotes}", r"\end{threeparttable}", r"\end{table}",
    ])  # fmt: skip


def _text_grid(grid: Grid) -> list[str]:
    heads = [_line([_stacked(tuple(text for text in head if text)) for head in grid.heads])]
    rows = [_line([_stacked(cell) for cell in row]) for row in grid.rows]
    columns = "l" * grid.labels + "r" * (len(grid.heads) - grid.labels)
    begin = rf"\begin{{tabular}}{{{columns}}}"
    return [begin, r"\toprule", *heads, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""]


def _stacked(lines: Lines) -> str:
    if len(lines) == 1:
        return escape(lines[0])
    inside = r" \\ ".join(map(escape, lines))
    return rf"\shortstack[r]{{{inside}}}"


def _heads(table: Table) -> list[str]:
    unit = f" ({wording.unit(table.measure)})" if wording.unit(table.measure) else ""
    gap = f"difference to {table.reference}" if table.reference else "difference"
    quality = f"{wording.name(table.measure) or 'quality'}{unit}"
    heads = ["method", quality, "by class", gap, "published", "adapt", "train"]
    return [escape(head) for head in heads]


def _cells(row: Row, measure: str, known: dict[int, str], width: int) -> list[str]:
    method = escape(row.method) + "".join(rf"\tnote{{{letter}}}" for letter in row.notes)
    if row.status != "ok":
        return [method, row.status, *[""] * (width - 2)]
    gap = row.difference
    return [
        method,
        _quality(row, measure),
        _margin(wording.half(row.by_class, measure)).removeprefix(r"\,"),
        f"${wording.signed(gap.value, measure)}${_margin(wording.half(gap, measure))}"
        if gap
        else "reference"
        if row.is_reference
        else "",
        f"{escape(wording.paper(row))}\\tnote{{{wording.source_number(row, known)}}}" if row.published else "",
        escape(wording.duration(row.adapt_time.value if row.adapt_time else None)),
        escape(wording.duration(row.train_time.value if row.train_time else None, 2)),
    ]


def _quality(row: Row, measure: str) -> str:
    if row.quality is None:
        return ""
    text = wording.score(row.quality.value, measure)
    text = rf"\textbf{{{text}}}" if row.mark == "best" else text + ("$^{+}$" if row.mark else "")
    return text + _margin(wording.half(row.quality, measure))


def _margin(half: str) -> str:
    return rf"\,$\pm$\,{half}" if half else ""


def _notes(table: Table, known: dict[int, str]) -> list[str]:
    marked = [*table.notes, *((str(number), text) for number, text in known.items())]
    said = [*wording.sentences(table), *wording.legend([table])]
    said = [text.replace("* best", "Bold: best") for text in said]
    said += [f"{names} {status}: {reason}." for names, status, reason in wording.failures(table)]
    return [rf"\item[{mark}] {escape(text)}" for mark, text in marked] + [rf"\item {escape(text)}" for text in said]


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
