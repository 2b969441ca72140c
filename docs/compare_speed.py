"""How long comparing many runs takes, and in how much memory.

python docs/compare_speed.py [RUNS] [CELLS]: makes RUNS runs of CELLS cells with 600 test episodes each in a temporary
folder, half of them the baseline and half the candidate, and compares the two folders in a fresh process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from metabench.stats import mean_interval
from metabench.store import SCHEMA_VERSION

EPISODES = 600


def make(folder: Path, seed: int, cells: int, shift: float) -> None:
    """One run: every cell with its accuracy, seed `seed`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, int(1e4 * abs(shift))])
    names = [
        f"maml[inner_steps={n + 1},train=1w1s1q*9]/glyphs[x]/5w1s15q/support/cpu-float32/seed{seed}"
        for n in range(cells)
    ]
    known = {
        name: {"cell": name, "algorithm": "maml", "seed": seed, "device": "cpu", "training": name} for name in names
    }
    rows = [{"cell": name, "measure": "accuracy", "hash": f"h{shift}"} for name in names]
    manifest = {"schema_version": SCHEMA_VERSION, "suite": "s", "controls": [], "cells": known, "rows": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "environment.json").write_text("{}")
    episodes = [f"{n:016x}" for n in range(EPISODES)]
    with (folder / "samples.jsonl").open("w") as samples, (folder / "measurements.jsonl").open("w") as lines:
        for row in rows:
            scores = np.clip(0.9 + shift + 0.05 * rng.standard_normal(EPISODES), 0, 1)
            found = mean_interval(scores)
            key = {"cell": row["cell"], "measure": row["measure"]}
            whole = {
                "status": "ok",
                "hash": row["hash"],
                "n": EPISODES,
                "value": found.value,
                "samples": samples.tell(),
            }
            samples.write(json.dumps({**key, "scores": scores.tolist(), "episodes": episodes}) + "\n")
            lines.write(json.dumps({**key, **whole}) + "\n")


def main(runs: int = 100, cells: int = 200) -> None:
    """Make, compare, print."""
    with tempfile.TemporaryDirectory() as made:
        for side, shift in (("base", 0.0), ("candidate", -0.02)):
            for seed in range(runs // 2):
                make(Path(made) / side / f"{seed:03}", seed, cells, shift)
        command = [sys.executable, "-m", "metabench", "compare", f"{made}/base", f"{made}/candidate", "-f", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    verdicts = [row["outcome"] for row in json.loads(done.stdout)["comparisons"][0]["rows"]]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, gib = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    print(f"{runs} runs x {cells} cells: {len(verdicts)} verdicts {set(verdicts)}")
    print(f"{seconds:.1f} s of the processor, peak {gib:.2f} GiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
