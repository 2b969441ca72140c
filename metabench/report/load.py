"""Run folders in, RunData out: the one place where a report reads a disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from metabench.errors import StoreError
from metabench.report.model import RunData
from metabench.store import Measurement, Run


def load(paths: Sequence[Path]) -> RunData:
    """Everything that reports need of one or several runs; of rows that they share the last run's wins.

    Raises:
        StoreError: not a run folder, a damaged one, or one of another schema.
    """
    runs = [Run.open(path) for path in paths]
    rows: list[dict[str, Any]] = []
    episodes: list[dict[str, Any]] = []
    by_class: list[dict[str, Any]] = []
    controls: set[str] = set()
    environments: dict[str, Any] = {}
    for run in runs:
        rows += run.rows()
        environments |= run.environments()
        controls |= set(run.manifest["controls"])
        for measurement in run.current().values():
            where = {
                "cell": measurement.cell,
                "seed": run.manifest["cells"][measurement.cell]["seed"],
                "measure": measurement.measure,
            }
            episodes += ({**where, **row} for row in _scores(run, measurement))
            by_class += ({**where, **row} for row in _credit(run, measurement))
    manifest = runs[-1].manifest if runs else {}
    return RunData.of(
        rows, episodes, by_class, manifest=manifest, environment=environments, controls=controls or {"chance"}
    )


def _scores(run: Run, measurement: Measurement) -> Iterator[dict[str, Any]]:
    samples = run.samples(measurement)
    pairs = zip(samples.get("episodes", ()), samples.get("scores", ()), strict=True)
    for number, (name, score) in enumerate(pairs):
        yield {"episode": number, "hash": name, "score": score}


def _credit(run: Run, measurement: Measurement) -> Iterator[dict[str, Any]]:
    """Per class of the data set: its queries and the sum of their credit."""
    name = measurement.facts.get("predictions")
    file = run.path / "predictions" / str(name)
    if not name or not file.is_file():
        return
    try:
        with np.load(file) as kept:
            ties, labels, classes = kept["ties"], kept["labels"].astype(np.int64), kept["classes"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise StoreError(f"{file}: damaged ({error}); delete it to go on without intervals by class") from error
    credit = np.where(ties > 0, 1.0 / np.maximum(ties, 1), 0.0)
    of_query = np.take_along_axis(classes, labels, axis=1)
    queries = np.bincount(of_query.ravel())
    sums = np.bincount(of_query.ravel(), weights=credit.ravel())
    for number in np.flatnonzero(queries):
        yield {"class": int(number), "queries": int(queries[number]), "credit": float(sums[number])}
