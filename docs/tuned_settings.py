"""The trials of each method and the one that it is ranked with, the best on validation classes, as Markdown.

python docs/tuned_settings.py results/reference/omniglot-trials/RUN
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from metabench.catalogue import catalogue
from metabench.cells import Cell, parse_id
from metabench.store import Run

HEAD = "| method | setting | validation accuracy % | |\n| :-- | :-- | --: | :-- |"


def trials(run: Run) -> dict[str, list[tuple[Cell, dict[str, Any]]]]:
    """Of every method its trials, in the suite's order.

    Raises:
        SystemExit: a trial is missing or failed, so that the choice would be another one.
    """
    known, rows = catalogue(), run.rows()
    missing = [row["cell"] for row in rows if row["status"] != "ok"] or len(run.manifest["rows"]) - len(rows)
    if missing:
        raise SystemExit(f"{run.path}: not every trial has a result: {missing}")
    pairs = [(parse_id(row["cell"], known), row) for row in rows]
    return {name: list(group) for name, group in groupby(pairs, key=lambda pair: pair[0].algorithm)}


def chosen(run: Run) -> dict[str, Cell]:
    """Of every method the trial with the highest accuracy on validation classes; of equal ones the first."""
    return {name: max(pairs, key=lambda pair: pair[1]["value"])[0] for name, pairs in trials(run).items()}


def setting(cell: Cell) -> str:
    """What a trial turns: its parameters but for the shared backbone."""
    return " ".join(f"{key}={value}" for key, value in cell.params if key != "backbone") or "its defaults"


def markdown(run: Run) -> str:
    """All trials, a row each."""
    best, lines = chosen(run), [HEAD]
    for name, pairs in trials(run).items():
        for cell, row in pairs:
            half = 100 * (row["ci_high"] - row["ci_low"]) / 2
            mark = "chosen" if cell == best[name] else ""
            lines.append(f"| {name} | {setting(cell)} | {100 * row['value']:.2f} ± {half:.2f} | {mark} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(Run.open(Path(sys.argv[1]))))
