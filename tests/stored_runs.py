"""Runs on disk with made-up numbers, as the store would have written them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from metabench.report import csvfile
from metabench.report.load import load
from metabench.stats import mean_interval, median_interval
from metabench.store import Measurement, Run

MACHINE = {"cpu": "Model A", "cores": 2, "packages": {"torch": "2.13.0"}}
STILL = {"matmul": [1.0, 1.01, 0.99], "python": [2.0, 2.0, 2.01]}


class Stored:
    """A run in the making; `quality`, `time`, `count` and `row` add rows, `at` writes them."""

    def __init__(self, suite="s", environment="e1", machine=MACHINE, controls=STILL, thresholds=None):
        self.suite, self.environment, self.thresholds = suite, environment, thresholds
        self.machine = {**machine, **({"controls": controls} if controls else {})}
        self.rows, self.cells = [], {}

    def row(self, cell, measure, *, samples=None, predictions=None, status="ok", code="h", facts=None, **more):
        """One row; the cell's columns follow from its id."""
        known = {"status": status, "hash": code, "environment": self.environment, "facts": facts or {}}
        self.rows.append((Measurement(cell=cell, measure=measure, **known, **more), samples, predictions))
        name, data, *_ = cell.split("/")
        trained = name.partition("train=")[2].rstrip("]")
        columns = {"algorithm": name.partition("[")[0], "dataset": data, "device": "cuda" if "cuda" in cell else "cpu"}
        seed = int(cell.partition("/seed")[2].partition("/")[0])
        training = f"{name}/{data}/seed{seed}" if trained else ""
        self.cells[cell] = {
            "cell": cell, "seed": seed, "train_spec": trained, "training": training,
            "selection": "last" if trained else "", "params": "{}", "split": "x", **columns,
        }  # fmt: skip
        return self

    def quality(self, scores, name="maml[train=1w1s1q*9]", *, seed=0, measure="accuracy", predictions=None, **more):
        """Scores of test episodes; `episodes` may name them, `task` and `device` the cell."""
        task, device = more.pop("task", "5w1s15q"), more.pop("device", "cpu")
        cell = f"{name}/glyphs[x]/{task}/support/{device}-float32/seed{seed}"
        episodes = more.pop("episodes", [f"h{i}" for i in range(len(scores))])
        found = mean_interval(scores)
        numbers = {"n": found.n, "value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}
        facts = {"backbone": "conv4", "train_steps": 9, "threads": 1, **more.pop("facts", {})}
        samples = {"scores": [float(s) for s in scores], "episodes": episodes}
        unit = "fraction" if "accuracy" in measure else "squared error"
        settings = {**numbers, "facts": facts, "unit": unit, **more}
        return self.row(cell, measure, samples=samples, predictions=predictions, **settings)

    def time(self, seconds, name="maml", *, measure="adapt_time", seed=0, **more):
        """A time, one value per process."""
        found = median_interval(seconds)
        numbers = {"n": found.n, "value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}
        facts = {"processes": list(seconds)}
        cell = f"{name}/glyphs[x]/5w1s15q/support/cpu-float32/seed{seed}"
        return self.row(cell, measure, unit="s", facts=facts, **numbers, **more)

    def count(self, value, measure="adapt_flops", name="maml", device="cpu", **more):
        """A count or a peak of memory."""
        return self.row(f"{name}/glyphs[x]/5w1s15q/support/{device}-float32/seed0", measure, n=1, value=value, **more)

    def at(self, folder: Path, name="run") -> Path:
        """Write the run; its folder."""
        manifest = {
            "suite": self.suite, "controls": [], "cells": self.cells, "evaluation": {}, "reference": None,
            "rows": [{"cell": m.cell, "measure": m.measure, "hash": m.hash} for m, *_ in self.rows],
            **({"thresholds": self.thresholds} if self.thresholds else {}),
        }  # fmt: skip
        run = Run.create(folder / name, self.suite, manifest)
        run.add_environment(self.environment, self.machine)
        (run.path / "predictions").mkdir()
        with run.writing():
            for number, (m, samples, predictions) in enumerate(self.rows):
                if predictions is not None:
                    file = run.path / "predictions" / f"{number}.npz"
                    ties = np.ones_like(predictions)
                    np.savez_compressed(file, predicted=predictions, ties=ties, labels=ties, classes=ties)
                    m = Measurement(**{**vars(m), "facts": {**m.facts, "predictions": file.name}})
                run.append(m, samples)
        return run.path


def as_csv(run: Path, folder: Path) -> Path:
    """The run's results.csv, with the episodes.csv and environment.json beside it, in another folder."""
    data = load([run])
    folder.mkdir()
    (folder / "results.csv").write_text(csvfile.results(data.rows))
    (folder / "episodes.csv").write_text(csvfile.episodes(data.episodes))
    (folder / "environment.json").write_text(json.dumps(data.environment))
    return folder / "results.csv"
