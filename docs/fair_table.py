"""One table of the fair ranking: a row for each method, a column for each task, tuned beside the papers' own settings.

python docs/fair_table.py RUN ...   (of the suites omniglot-fair, -paper and -free, in any number)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from metabench.report import Row, tables, wording
from metabench.report.load import load
from metabench.store import Run

COLUMNS = {"omniglot-fair": "tuned", "omniglot-fair-paper": "paper settings", "omniglot-fair-free": "free training"}


def table(runs: Sequence[Path]) -> str:
    """The table, best first at the first task; a method that a suite leaves out has an empty field.

    Columns are in the order of the suites in `COLUMNS`, and in that of the tasks in each.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for suite in COLUMNS:
        mine = [run for run in runs if Run.open(run).manifest["suite"] == suite]
        for one in tables(load(mine)) if mine else ():
            found[one.title, suite] = {row.algorithm: row for block in one.blocks for row in block.rows}
    columns = sorted(found, key=lambda column: [title for title, _ in found].index(column[0]))
    first = found[columns[0]]
    methods = sorted({m for rows in found.values() for m in rows}, key=lambda m: -_value(first.get(m)))
    heads = [f"{title.removeprefix('omniglot ')}, {COLUMNS[suite]}" for title, suite in columns]
    lines = [f"| method | {' | '.join(heads)} |", f"| :-- |{' --: |' * len(columns)}"]
    lines += [f"| {m} | {' | '.join(_text(found[column].get(m)) for column in columns)} |" for m in methods]
    return "\n".join(lines) + "\n"


def _value(row: Row | None) -> float:
    return row.quality.value if row and row.quality else -1.0


def _text(row: Row | None) -> str:
    if row is None:
        return ""
    if row.quality is None:
        return row.status
    half = f" ± {wording.score(row.quality.half, 'accuracy')}" if row.quality.half is not None else ""
    return f"{wording.score(row.quality.value, 'accuracy')}{half}"


if __name__ == "__main__":
    print(table([Path(run) for run in sys.argv[1:]]), end="")
