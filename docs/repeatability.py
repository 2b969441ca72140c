"""How far two runs of a timing suite agree: what an interval of the first says about the medians of the second.

python docs/repeatability.py FIRST_RUN SECOND_RUN
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from metabench.stats import median_interval
from metabench.store import Key, Run

LEVEL = 0.99
NEAR = (0.05, 0.10)


def processes(run: Run) -> dict[Key, list[float]]:
    """The seconds of each process, of every time that was measured on the CPU."""
    cells = run.manifest["cells"]
    timed = {key: row for key, row in run.current().items() if row.status == "ok" and "processes" in row.facts}
    return {key: list(row.facts["processes"]) for key, row in timed.items() if cells[key[0]]["device"] == "cpu"}


def main(first: Path, second: Path) -> None:
    """Print the shares, and the rows outside."""
    before, after = processes(Run.open(first)), processes(Run.open(second))
    shared = [key for key in before if key in after]
    inside, ratios, outside = 0, [], []
    for key in shared:
        span, median = median_interval(before[key], level=LEVEL), statistics.median(after[key])
        ratios.append(median / span.value)
        if span.low is not None and span.high is not None and span.low <= median <= span.high:
            inside += 1
        else:
            outside.append((abs(ratios[-1] - 1), key, ratios[-1]))
    print(
        f"{len(shared)} CPU rows; {inside / len(shared):.1%} of the second medians in the first's {LEVEL:.0%} interval"
    )
    for near in NEAR:
        print(f"{sum(abs(r - 1) <= near for r in ratios) / len(ratios):.1%} within {near:.0%}")
    print(f"median ratio {statistics.median(ratios):.3f}")
    for _, (cell, measure), found in sorted(outside, reverse=True)[:10]:
        print(f"  x{found:.2f}  {cell} {measure}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
