"""Reports: results in, comparative tables out. Nothing here runs anything; torch is never imported.

`tables` builds the structure, `render` turns it into text; one file per format.
"""

from __future__ import annotations

from metabench.errors import ConfigError, did_you_mean
from metabench.report import csvfile, jsonfile, latex, markdown, table
from metabench.report.build import tables
from metabench.report.model import Block, Row, RunData, Table
from metabench.report.published import Published, published

FORMATS = ("table", "md", "latex", "csv", "json")

__all__ = ["FORMATS", "Block", "Published", "Row", "RunData", "Table", "published", "render", "tables"]


def render(data: RunData, format: str, reference: str | None = None, *, width: int = 80) -> str:
    """The report of `data` as text: table (at most `width` columns), md, latex, json, or csv (the rows of results.csv).

    `reference` names the method that the differences are taken to. Raises ConfigError for an unknown format or
    reference.
    """
    if format == "csv":
        return csvfile.results(data.rows)
    if format not in FORMATS:
        raise ConfigError(f"no report format {format!r}{did_you_mean(format, FORMATS)}")
    made = tables(data, reference)
    if format == "table":
        return table.render(made, width)
    if format == "md":
        return markdown.render(made)
    return latex.render(made) if format == "latex" else jsonfile.render(made)
