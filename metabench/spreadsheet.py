"""CSV that a spreadsheet may open: results come from anywhere, and no text in them may become a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are their wide forms, which count as well
_LOOKED_AT = FORMULA | {" "}


def defused(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    if isinstance(value, str) and (value[:1] in FORMULA or (value[:1] == " " and value.lstrip(" ")[:1] in FORMULA)):
        return f"'{value}"
    return value


def table(columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> str:
    """Records as CSV with formulas defused; empty where a record has no such column, or None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        row = [record.get(name) for name in columns]
        writer.writerow([defused(x) if isinstance(x, str) and x[:1] in _LOOKED_AT else x for x in row])
    return out.getvalue()
