"""Run folders in, RunData out: the one place where a report reads a disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metabench.disk import Ints, read_predictions
from metabench.errors import StoreError
from metabench.report.model import RunData
from metabench.store import Key, Measurement, Run

MAX_CLASSES = 10**6  # of a data set: what is beyond is no run of ours


def load(paths: Sequence[Path]) -> RunData:
    """Everything that reports need of one or several runs; of rows that they share the last run's wins.

    Raises:
        StoreError: not a run folder, a damaged one, or one of another schema.
    """
    runs = [Run.open(path) for path in paths]
    found: dict[Key, tuple[Run, Measurement, dict[str, Any]]] = {}
    for run in runs:
        current = run.current()
        for row in run.rows():
            key = (row["cell"], row["measure"])
            if key not in found or row["status"] == "ok" or found[key][1].status != "ok":
                found[key] = (run, current[key], row)  # a failure never hides an earlier result
    episodes: list[dict[str, Any]] = []
    by_class: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    slices = {run.path: run.slices() for run in runs}
    for run, measurement, row in found.values():
        facts.append({**run.manifest["cells"][row["cell"]], **measurement.facts, **_key(row)})
        timings += ({**_key(row), **one} for one in _timings(slices[run.path], measurement))
        where = {"cell": row["cell"], "seed": row["seed"], "measure": row["measure"]}
        episodes += ({**where, **score} for score in _scores(run, measurement))
        by_class += ({**where, **credit} for credit in _credit(run, measurement))
        if row["measure"] == "train_time":  # cells that share a training share its curve
            points = run.samples(measurement).get("curve", [])
            curves[row["training"]] = [{"training": row["training"], "seed": row["seed"], **one} for one in points]
    return RunData.of(
        [row for _, _, row in found.values()],
        episodes,
        by_class,
        facts=facts,
        timings=timings,
        curves=[point for points in curves.values() for point in points],
        manifest=runs[-1].manifest if runs else {},
        environment={name: facts for run in runs for name, facts in run.environments().items()},
        controls={name for run in runs for name in run.manifest["controls"]},
        families={name: family for run in runs for name, family in run.manifest.get("families", {}).items()},
    )


def _key(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"cell": row["cell"], "measure": row["measure"]}


def _timings(slices: Mapping[Key, Sequence[Mapping[str, Any]]], m: Measurement) -> Iterator[dict[str, Any]]:
    """What each process made of a row, and when it was sampled; nothing where raw samples were lost."""
    seconds = m.facts.get("processes", ())
    lines = [one for one in slices.get(m.key, ()) if (one["hash"], one["environment"]) == (m.hash, m.environment)]
    if len(lines) == len(seconds):
        for line, value in zip(lines, seconds, strict=True):
            yield {"process": line["process"], "seconds": value, "begin": min(line["at"]), "end": max(line["at"])}


def _scores(run: Run, measurement: Measurement) -> Iterator[dict[str, Any]]:
    samples = run.samples(measurement)
    pairs = zip(samples.get("episodes", ()), samples.get("scores", ()), strict=True)
    for number, (name, score) in enumerate(pairs):
        yield {"episode": number, "hash": name, "score": score}


def class_credit(run: Run, measurement: Measurement) -> dict[int, tuple[float, float]]:
    """Per class of the data set: its queries and the sum of their credit; empty where no predictions are kept.

    Episodes weigh alike, as in the score: where they ask unlike numbers of queries (streams, how many of their classes
    come k times), each of a query's counts is the mean number over its episode's own.

    Raises:
        StoreError: the file is damaged, or the row names one outside the run's folder.
    """
    name = measurement.facts.get("predictions")
    if not name:
        return {}
    folder = run.path / "predictions"
    file = folder / str(name)
    if file.name != name or file.is_symlink() or folder.is_symlink():
        raise StoreError(f"{run.path}: {measurement.cell}: its predictions {name!r} are no file of the run")
    if not file.is_file():
        return {}
    try:
        ties, labels, classes = read_predictions(file, "ties", "labels", "classes")
        if classes.size and classes.max() >= MAX_CLASSES:
            raise StoreError(f"{file}: damaged (a class number is out of range)")
        queries, sums = _by_class(ties, labels, classes)
    except StoreError as error:
        raise StoreError(f"{error}; delete it to go on without intervals by class") from error
    return {int(number): (float(queries[number]), float(sums[number])) for number in np.flatnonzero(queries)}


def _by_class(ties: Ints, labels: Ints, classes: Ints) -> tuple[np.ndarray, np.ndarray]:
    """By the number of a class, its queries and the sum of their credit."""
    credit = np.where(ties > 0, 1.0 / np.maximum(ties, 1), 0.0)
    asked = labels < classes.shape[1]  # any other label stands for a query that does not count
    counts = asked.sum(axis=1, keepdims=True)
    weights = asked * (counts.mean() / np.maximum(counts, 1))
    of_query = np.take_along_axis(classes, np.where(asked, labels, 0), axis=1).ravel()
    queries = np.bincount(of_query, weights=weights.ravel())
    return queries, np.bincount(of_query, weights=(credit * weights).ravel())


def _credit(run: Run, measurement: Measurement) -> Iterator[dict[str, Any]]:
    for number, (queries, credit) in class_credit(run, measurement).items():
        yield {"class": number, "queries": queries, "credit": credit}
