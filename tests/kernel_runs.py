"""Run folders with timed kernels, made up: what the timing engine writes, without the time that it takes."""

from __future__ import annotations

import json

import numpy as np

from metabench.stats import median_interval
from metabench.store import Measurement, Run

ENVIRONMENT = {
    "cpu": "AMD EPYC", "cores": 2, "torch": "2.13.0+cpu", "python": "3.11.7", "gpu": None,
    "variables": {"OMP_WAIT_POLICY": "PASSIVE"}, "readings": {"load": [0.6, 0.5, 0.4]},
    "roofs": {"float32_flops": 1.0e11, "bf16_flops": 2.5e11, "bytes": 1.2e10, "threads": 2},
    "controls": {"matmul": [0.00200, 0.00202, 0.00201, 0.00203, 0.00200], "python": [0.003, 0.00301, 0.003]},
}  # fmt: skip
FAMILIES = {"protonet": "metric", "matching": "metric", "maml": "optimisation", "fomaml": "optimisation"}
CALL = {
    "tasks": 1,
    "steps": None,
    "threads_asked": None,
    "allocator": "kept",
    "layout": "channels_last",
    "compile": False,
}


class KernelRun:
    """A run being made up. Every process slows all rows down by a factor of its own, as a shared machine does."""

    def __init__(self, *, processes=5, drift=0.05, noise=0.005, environment=None, reference="protonet"):
        self.processes, self.noise, self.reference = processes, noise, reference
        self.rng = np.random.default_rng(0)
        self.drift = np.exp(drift * self.rng.standard_normal(processes))
        self.environment = {**ENVIRONMENT, **(environment or {})}
        self.cells, self.found = {}, []

    def cell(
        self, algorithm, params="", *, ways=5, shots=1, queries=15, device="cpu", precision="float32", seed=0, **call
    ):
        """The id of a cell, made where it is new."""
        segment = f"{algorithm}[{params}]" if params else algorithm
        names = {"threads_asked": "threads"}
        changed = [f"{names.get(k, k)}={v}" for k, v in call.items() if v != CALL[k]]
        where = [
            segment,
            "omniglot[vinyals]",
            f"{ways}w{shots}s{queries}q",
            "none",
            f"{device}-{precision}",
            f"seed{seed}",
        ]
        name = "/".join([*where, *([",".join(changed)] if changed else [])])
        self.cells[name] = {
            "cell": name, "algorithm": algorithm, "params": "{}", "dataset": "omniglot", "split": "vinyals",
            "ways": ways,
            "shots": shots, "queries": queries, "bn_mode": "inductive", "device": device, "precision": precision,
            "seed": seed, "rotations": "none", "norm": "none", "selection": "", "train_spec": "", "training": "",
            **CALL, **call,
        }  # fmt: skip
        return name

    def time(self, cell, kernel, seconds, **facts):
        """A time in every process, with its raw samples."""
        medians = seconds * self.drift * np.exp(self.noise * self.rng.standard_normal(self.processes))
        call = self.cells[cell]
        known = {
            "tasks": call["tasks"],
            "threads": call["threads_asked"] or 2,
            "iqr": 0.04,
            "processes": medians.tolist(),
            "backbone": "conv4",
            **facts,
        }
        span = median_interval(medians)
        numbers = {"n": span.n, "value": span.value, "ci_low": span.low, "ci_high": span.high, "sd": span.sd}
        self.found.append(
            (
                Measurement(cell, f"{kernel}_time", "ok", "", "s", hash="h", facts=known, environment="e1", **numbers),
                medians,
            )
        )
        return self

    def count(self, cell, kernel, **counts):
        """Counts of a kernel: flops=..., bytes=...."""
        for aspect, value in counts.items():
            facts = {"tasks": self.cells[cell]["tasks"], "threads": 2}
            self.found.append(
                (
                    Measurement(
                        cell,
                        f"{kernel}_{aspect}",
                        "ok",
                        "",
                        "1",
                        1,
                        float(value),
                        hash="h",
                        facts=facts,
                        environment="e1",
                    ),
                    None,
                )
            )
        return self

    def missing(self, cell, measure, status, reason):
        """A row without a value."""
        self.found.append((Measurement(cell, measure, status, reason, hash="h", environment="e1"), None))
        return self

    def write(self, out):
        """The folder."""
        rows = [{"cell": m.cell, "measure": m.measure, "hash": "h"} for m, _ in self.found]
        manifest = {
            "suite": "kernels", "controls": ["chance", "pixel-nn"], "reference": self.reference, "cells": self.cells,
            "rows": rows,
            "families": FAMILIES,
        }  # fmt: skip
        run = Run.create(out, "kernels", manifest)
        run.add_environment("e1", self.environment)
        with run.writing():
            for measurement, medians in self.found:
                *others, last = [None] if medians is None else [self._samples(p, s) for p, s in enumerate(medians)]
                with (run.path / "samples.jsonl").open("a") as file:
                    for one in others:
                        line = {"cell": measurement.cell, "measure": measurement.measure, **one}
                        file.write(json.dumps(line) + "\n")
                run.append(measurement, last)
        return run.path

    def _samples(self, process, median):
        begin = 100.0 * process
        return {
            "process": process,
            "hash": "h",
            "environment": "e1",
            "order": [3, 9, 14],
            "at": [begin, begin + 5, begin + 9],
            "seconds": [0.99 * median, median, 1.02 * median],
        }


def kernels_run(**options):
    """A run with a bit of everything, five processes unless said otherwise."""
    run = KernelRun(**options)
    speeds = {
        "protonet": 1.0,
        "matching": 1.3,
        "maml[backbone=conv4,inner_steps=5]": 14.0,
        "fomaml": 12.5,
        "baseline": 3.0,
    }
    for label, factor in speeds.items():
        algorithm, _, inside = label.partition("[")
        cell = run.cell(algorithm, inside.rstrip("]"), tasks=8)
        run.time(cell, "adapt", 0.0032 * factor).count(
            cell, "adapt", flops=1.1e8 * factor, bytes=6e6 * factor, memory=4.1e7, nodes=120 * factor
        )
        run.time(cell, "predict", 0.0121).time(cell, "meta_step", 0.034 * factor)
        run.count(cell, "meta_step", flops=2.2e9 * factor, bytes=9e7 * factor, memory=3.4e8, nodes=410)
        run.time(cell, "episode", 0.00045)
        if factor > 10:
            run.time(cell, "inner_step", 0.0007 * factor, intercept=0.002)
        else:
            run.missing(cell, "inner_step_time", "skipped", f"{algorithm} has no inner steps")
        run.missing(cell, "adapt_launches", "skipped", "launches are counted on cuda")
    cell = run.cell("pixel-nn", tasks=8)
    run.time(cell, "adapt", 0.0001).missing(
        cell, "meta_step_time", "failed", "the worker ran out of memory: fewer tasks per call"
    )
    return run


def scaling_run(**options):
    """Rows that differ in one coordinate at a time."""
    run = KernelRun(**options)
    for algorithm, power, base in (
        ("protonet", 0.7, 0.003),
        ("maml", 0.95, 0.03),
        ("fomaml", 0.9, 0.02),
        ("pixel-nn", 0.5, 0.0002),
    ):
        for tasks in (1, 2, 4, 8, 16, 32):
            cell = run.cell(algorithm, tasks=tasks)
            run.time(cell, "adapt", base * (0.3 + tasks**power)).time(
                cell, "meta_step", 5 * base * (0.1 + tasks**power)
            )
            run.time(cell, "embed", base * tasks**power, images=80 * tasks)
        for shots in (5, 10):
            cell = run.cell(algorithm, shots=shots)
            run.time(cell, "adapt", base * (0.5 + shots**power))
        for ways in (10, 20):
            run.time(run.cell(algorithm, ways=ways), "adapt", base * (0.5 + (ways / 5) ** power))
        if algorithm == "maml":
            for steps in (1, 3, 10):
                run.time(run.cell(algorithm, steps=steps), "adapt", 0.006 * (1 + steps))
    return run
