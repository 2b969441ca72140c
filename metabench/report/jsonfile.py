"""The tables as JSON, for a program to read: every field of `model.Table`, intervals as objects, null for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metabench.report.model import Table

SCHEMA_VERSION = 1


def render(tables: Sequence[Table]) -> str:
    """{"schema_version": 1, "tables": [...]}, indented, with a final line end."""
    content = {"schema_version": SCHEMA_VERSION, "tables": [_plain(_table(table)) for table in tables]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _table(table: Table) -> dict[str, Any]:
    details = [{"method": method, "measure": measure, "value": value} for method, measure, value in table.details]
    return {**asdict(table), "protocol": dict(table.protocol), "details": details, "notes": dict(table.notes)}


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
