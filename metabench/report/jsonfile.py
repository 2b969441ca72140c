"""The tables as JSON, for a program to read: every field of `model.Table` and `model.KernelReport`.

Intervals are objects, null stands for nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from metabench.report.model import KernelCell, KernelReport, KernelTable, Table

SCHEMA_VERSION = 1


def render(tables: Sequence[Table], kernels: KernelReport) -> str:
    """{"schema_version": 1, "tables": [...], "kernels": {"tables": [...], "footer": [...]}}, with a final line end."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "tables": [_plain(_table(table)) for table in tables],
        "kernels": {
            "tables": [_plain(_kernels(table)) for table in kernels.tables],
            "footer": list(kernels.footer),
        },
    }
    return _dumped(content)


def records(found: Sequence[Mapping[str, Any]]) -> str:
    """{"schema_version": 1, "comparisons": [...]}: our results beside the published ones."""
    return _dumped({"schema_version": SCHEMA_VERSION, "comparisons": [_plain(dict(one)) for one in found]})


def _dumped(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _table(table: Table) -> dict[str, Any]:
    details = [{"method": method, "measure": measure, "value": value} for method, measure, value in table.details]
    return {**asdict(table), "protocol": dict(table.protocol), "details": details, "notes": dict(table.notes)}


def _kernels(table: KernelTable) -> dict[str, Any]:
    rows = [{**asdict(row), "cells": [_cell(cell) for cell in row.cells]} for row in table.rows]
    return {**asdict(table), "rows": rows, "protocol": dict(table.protocol), "notes": dict(table.notes)}


def _cell(cell: KernelCell) -> dict[str, Any]:
    return {**asdict(cell), "missing": dict(cell.missing)}


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
