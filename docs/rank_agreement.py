"""How alike glyphs and Omniglot order the same methods: Kendall's tau-b of a run of the suite `standin`, as Markdown.

python docs/rank_agreement.py results/reference/standin/RUN
"""

from __future__ import annotations

import sys
from pathlib import Path

from metabench.report import tables
from metabench.report.load import load
from metabench.stats import Interval, rank_agreement


def accuracies(runs: list[Path]) -> dict[str, dict[str, Interval]]:
    """data set -> method -> accuracy, without the controls."""
    found: dict[str, dict[str, Interval]] = {}
    for table in tables(load(runs)):
        data = table.title.split()[0]
        rows = [row for block in table.blocks if block.title != "controls" for row in block.rows]
        found[data] = {row.method: row.quality for row in rows if row.quality is not None}
    return found


def markdown(runs: list[Path]) -> str:
    """The table of both rankings and what their agreement is."""
    found = accuracies(runs)
    glyphs, omniglot = found["glyphs"], found["omniglot"]
    methods = sorted(omniglot, key=lambda method: -omniglot[method].value)
    agreement = rank_agreement([glyphs[m] for m in methods], [omniglot[m] for m in methods])
    lines = ["| method | Omniglot | glyphs |", "| :-- | --: | --: |"]
    lines += [f"| {m} | {_text(omniglot[m])} | {_text(glyphs[m])} |" for m in methods]
    lines += [
        "",
        f"Kendall's tau-b {agreement.tau:.2f} [{agreement.low:.2f}, {agreement.high:.2f}]; of {agreement.pairs} pairs "
        f"Omniglot decides {agreement.decided}, and glyphs orders {agreement.alike} of those alike "
        f"({100 * agreement.alike / max(agreement.decided, 1):.0f} %).",
    ]
    return "\n".join(lines)


def _text(accuracy: Interval) -> str:
    return f"{100 * accuracy.value:.1f} ± {100 * (accuracy.half or 0):.1f}"


if __name__ == "__main__":
    print(markdown([Path(argument) for argument in sys.argv[1:]]))
