"""How long a leaderboard of many runs takes, and how much memory: `python docs/leaderboard_scale.py [RUNS]`.

Makes RUNS (100) runs of 200 cells each in a temporary folder: 5 methods with 5 seeds on 8 tasks, 600 test episodes,
every run by another submitter; then builds the site in a process of its own and prints what that took.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np

from metabench.stats import mean_interval
from metabench.store import Run

METHODS = {"protonet": 0.9, "matching": 0.88, "maml": 0.8, "reptile": 0.7, "baseline": 0.85}
TASKS = [f"{ways}w{shots}s15q" for ways in (5, 10, 15, 20) for shots in (1, 5)]
SEEDS, EPISODES = 5, 600


def make(out: Path, number: int) -> Path:
    """One run of 200 cells."""
    rng = np.random.default_rng(number)
    cells, rows, lines, samples, offset = {}, [], [], [], 0
    for task in TASKS:
        ids = [sha256(f"{task}{n}".encode()).hexdigest()[:16] for n in range(EPISODES)]
        ways, shots = int(task.split("w")[0]), int(task.split("w")[1].split("s")[0])
        for name, mean in METHODS.items():
            for seed in range(SEEDS):
                cell = f"{name}[train=5w1s1q*10]/glyphs[alphabets]/{task}/running/cpu-float32/seed{seed}"
                known = {"cell": cell, "algorithm": name, "params": "{}", "dataset": "glyphs", "split": "alphabets"}
                known |= {"ways": ways, "shots": shots, "queries": 15, "selection": "last", "seed": seed}
                cells[cell] = {**known, "train_spec": "5w1s1q*10", "bn_mode": "inductive", "norm": "running"}
                rows.append({"cell": cell, "measure": "accuracy", "hash": "h", "sources": "c0ffee000000-2"})
                noise = 0.01 * rng.normal() + 0.05 * rng.normal(size=EPISODES)
                scores = [float(x) for x in np.clip(np.round((mean + noise) * 75) / 75, 0, 1)]
                line = {"cell": cell, "measure": "accuracy", "scores": scores, "episodes": ids}
                found = mean_interval(scores)
                facts = {"episodes_hash": sha256("".join(ids).encode()).hexdigest()[:12]}
                record = {"cell": cell, "measure": "accuracy", "status": "ok", "n": found.n, "value": found.value}
                record |= {"sd": found.sd, "hash": "h", "at": f"2026-01-01T{number:06}", "facts": facts}
                lines.append(json.dumps({**record, "samples": offset}) + "\n")
                samples.append(json.dumps(line) + "\n")
                offset += len(samples[-1])
    manifest = {"suite": "scale", "controls": [], "cells": cells, "rows": rows}
    run = Run.create(out, "scale", {**manifest, "evaluation": {"episodes": EPISODES, "seed": 0}})
    (run.path / "samples.jsonl").write_text("".join(samples))
    (run.path / "measurements.jsonl").write_text("".join(lines))
    (run.path / "submission.json").write_text(json.dumps({"submitter": f"submitter {number}"}))
    return run.path


def main() -> None:
    """Make the runs, build the site, say what it took."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        runs = [make(Path(folder), number) for number in range(count)]
        command = [sys.executable, "-m", "metabench", "leaderboard", *map(str, runs), "--out", f"{folder}/site"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        page = (Path(folder) / "site/index.html").stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cells, gib = len(TASKS) * len(METHODS) * SEEDS, used.ru_maxrss / 2**20
    print(f"{count} runs of {cells} cells: {seconds:.1f} s, of the processor {used.ru_utime + used.ru_stime:.1f} s")
    print(f"memory {gib:.2f} GiB, page {page:,} bytes")


if __name__ == "__main__":
    main()
