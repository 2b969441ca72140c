"""One table of all tasks of some runs: ours beside the published number, as Markdown for the README.

python docs/published_table.py results/reference/omniglot-papers/RUN ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metabench.report import against, tables, wording
from metabench.report.load import load

HEADS = (
    "method", "set away from its defaults", "task", "our protocol", "ours", "published", "difference",
    "its protocol is known to differ in",
)  # fmt: skip


def table(runs: Sequence[Path]) -> str:
    """The comparisons of the runs, a row each, in the order of the results; "none" where no paper has the number."""
    records = against.records(tables(load(runs), presentations=True))
    head = [f"| {' | '.join(HEADS)} |", "| :-- | :-- | :-- | :-- | --: | --: | --: | :-- |"]
    return "\n".join([*head, *map(_row, records)]) + "\n"


def _row(one: dict[str, Any]) -> str:
    def score(name: str, *, signed: bool = False) -> str:
        return (wording.signed if signed else wording.score)(one[name], one["measure"])

    half = wording.score((one["ci_high"] - one["ci_low"]) / 2, one["measure"])
    task = one["task"] if not one["measure"].startswith("accuracy_at") else f"{one['task']}, {_presentation(one)}"
    split = one["split"].partition(" ")[0]
    turned = f"rotations {one['rotations']}" if one["rotations"] else ""
    protocol = ", ".join(part for part in (split, turned, one["data"], one["block"]) if part)
    name = one["method"].partition(" ")[0]  # what its rows differ in stands among its settings
    trained = [word for word in one["method"].split(" ") if word.startswith("train=")]  # said where it tells rows apart
    settings = " ".join(filter(None, (one["settings"], *trained)))
    ours = f"| {name} | {settings} | {task} | {protocol} | {score('value')} ± {half} |"
    if one["published"] is None:
        return f"{ours} none |  |  |"
    margin = wording.score((one["difference_high"] - one["difference_low"]) / 2, one["measure"])
    theirs = score("published").removesuffix("0") + ("" if one["verified"] else "?")
    gap = f"{score('difference', signed=True)} ± {margin}"
    return f"{ours} {theirs} | {gap} | {one['unlike_ours']} |"


def _presentation(one: dict[str, Any]) -> str:
    return f"presentation {one['measure'].rpartition('_')[2]}"


if __name__ == "__main__":
    print(table([Path(run) for run in sys.argv[1:]]), end="")
