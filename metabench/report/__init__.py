"""Reports: results in, comparative tables out. Nothing here runs anything; torch is never imported.

`tables` and `kernel_report` build the structure, `render` turns it into text; one file per format. `render_against`
sets our results beside the published ones.
"""

from __future__ import annotations

from metabench.errors import ConfigError, did_you_mean
from metabench.report import against, csvfile, jsonfile, latex, markdown, table
from metabench.report.build import tables
from metabench.report.kernels import kernel_report
from metabench.report.model import Block, KernelReport, KernelTable, Row, RunData, Table
from metabench.report.published import Published, published

FORMATS = ("table", "md", "latex", "csv", "json")

__all__ = [
    "FORMATS",
    "Block",
    "KernelReport",
    "KernelTable",
    "Published",
    "Row",
    "RunData",
    "Table",
    "kernel_report",
    "published",
    "render",
    "render_against",
    "tables",
]


def render(data: RunData, format: str, reference: str | None = None, *, width: int = 80) -> str:
    """The report of `data` as text: table (at most `width` columns), md, latex, json, or csv (the rows of results.csv).

    `reference` names the method that the differences and ratios are taken to. Raises ConfigError for an unknown
    format or reference.
    """
    _check(format)
    if format == "csv":
        return csvfile.results(data.rows)
    made, kernels = tables(data, reference), kernel_report(data, reference)
    if format == "table":
        return table.render(made, kernels, width)
    if format == "md":
        return markdown.render(made, kernels)
    return latex.render(made, kernels) if format == "latex" else jsonfile.render(made, kernels)


def render_against(data: RunData, format: str, *, width: int = 80) -> str:
    """Our results beside the published ones, in the same formats. Raises ConfigError for an unknown format."""
    _check(format)
    made = tables(data, presentations=True)
    if format == "csv":
        return csvfile.records(against.records(made))
    if format == "json":
        return jsonfile.records(against.records(made))
    sheets = against.sheets(made)
    if not sheets:
        return f"{'% ' if format == 'latex' else ''}{against.NOTHING}\n"
    if format == "table":
        return table.render_sheets(sheets, against.LEGEND, width)
    if format == "md":
        return markdown.render_sheets(sheets, against.LEGEND)
    return latex.render_sheets(sheets, against.LEGEND)


def _check(format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"no report format {format!r}{did_you_mean(format, FORMATS)}")
