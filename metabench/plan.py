"""From a suite to work: its rows, what determines each number, the run's description, and jobs for the workers.

Plain data, no torch; nothing here runs anything.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import metabench
from metabench.catalogue import Catalogue
from metabench.cells import KERNEL_MEASURES, Cell, matches
from metabench.store import FINAL, Key, Measurement, Run
from metabench.suite import Suite

PACKAGE = Path(metabench.__file__).parent
COSTS = frozenset(KERNEL_MEASURES)  # measured last, by a core of their own, while nothing else of ours runs
CORES = {False: "measure.py", True: "bench.py"}  # the module that measures: quality, and the cost of kernels


@dataclass(frozen=True)
class Row:
    """One row to be: a cell, a measure, and the hash of all that determines the number, `sources` that of its code."""

    cell: Cell
    measure: str
    hash: str
    sources: str

    @property
    def key(self) -> Key:
        """The row's key in the store."""
        return self.cell.id, self.measure

    @property
    def kernel(self) -> str:
        """The kernel whose cost the row is about; '' for quality and training time."""
        return self.measure.rpartition("_")[0] if self.measure in COSTS else ""

    @property
    def aspect(self) -> str:
        """What of the kernel is measured: time, flops, ..."""
        return self.measure.rpartition("_")[2]


def override(suite: Suite, *, seeds: Sequence[int] | None = None, device: str | None = None) -> Suite:
    """The suite with every cell on these seeds, or on this device, instead of its own."""
    points: dict[Cell, tuple[str, ...]] = {}
    for cell, measures in suite.points.items():
        for seed in seeds if seeds is not None else [cell.seed]:
            one = replace(cell, device=device or cell.device, seed=seed)
            points[one] = tuple(dict.fromkeys((*points.get(one, ()), *measures)))
    return replace(suite, points=points)


def rows_of(suite: Suite) -> tuple[Row, ...]:
    """Every row of the suite."""
    rows = []
    for cell, measures in suite.points.items():
        for measure in measures:
            sources = sources_of(suite.catalogue, cell.algorithm, cell.dataset, cost=measure in COSTS)
            rows.append(Row(cell, measure, _row_hash(cell, measure, suite, sources), sources))
    return tuple(rows)


def select_rows(rows: Iterable[Row], words: str) -> list[Row]:
    """The rows whose 'cell.id/measure' holds every word (-k)."""
    return [row for row in rows if matches(f"{row.cell.id}/{row.measure}", words)]


def is_done(row: Row, done: Mapping[Key, Measurement]) -> bool:
    """Whether the row needs no work: a final status, made by what its hash covers."""
    found = done.get(row.key)
    return found is not None and found.status in FINAL and found.hash == row.hash


def _row_hash(cell: Cell, measure: str, suite: Suite, sources: str) -> str:
    """What a finished row is valid for; a training does not depend on how many test episodes follow it."""
    protocol: dict[str, Any] = asdict(suite.evaluation) if measure not in COSTS else {}
    if measure == "train_time":
        protocol.pop("episodes")
    elif measure.endswith("_time"):
        protocol = {**asdict(suite.timing), "threads": suite.threads}
    what = [cell.id, cell.resolved, measure, protocol, sources]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def sources_of(known: Catalogue, algorithm: str, dataset: str, *, cost: bool) -> str:
    """The hash of the code that makes a cell's numbers: its algorithm, its data set, the core, and torch's version."""
    files = (known.algorithm(algorithm).file, known.dataset(dataset).file, PACKAGE / CORES[cost])
    return f"{source_hash(files)}-{importlib.metadata.version('torch')}"


@functools.cache
def source_hash(files: tuple[Path, ...]) -> str:
    """A hash over these source files and every module of metabench that they import; line ends do not count."""
    digest = hashlib.sha256()
    for file in sorted(imported_files(files), key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12]


def imported_files(files: Iterable[Path]) -> set[Path]:
    """These files and the modules of metabench that they import, however far."""
    seen: set[Path] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo.extend(_imports(file))
    return seen


def _imports(file: Path) -> Iterator[Path]:
    """The files of metabench's modules that a source file imports by name, and packaged data that it names."""
    text = file.read_bytes()
    if file.suffix != ".py":
        return
    yield from (data for data in sorted((PACKAGE / "data").iterdir()) if data.name.encode() in text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            candidate = PACKAGE.joinpath(*rest).with_suffix(".py") if rest else PACKAGE / "__init__.py"
            if first == "metabench" and rest and candidate.is_file():
                yield candidate


def manifest_of(suite: Suite, rows: Sequence[Row], keep: Run | None) -> dict[str, Any]:
    """The run's description; with `keep`, rows of that run that the new plan does not name stay."""
    cells = {row.cell.id: coordinates(row.cell, suite) for row in rows}
    listed = [{"cell": row.cell.id, "measure": row.measure, "hash": row.hash, "sources": row.sources} for row in rows]
    if keep is not None:
        named = {row.key for row in rows}
        old = [r for r in keep.manifest["rows"] if (r["cell"], r["measure"]) not in named]
        old = [r for r in old if _still_valid(r, keep.manifest["cells"][r["cell"]], suite.catalogue)]
        listed = old + listed
        cells = {**{r["cell"]: keep.manifest["cells"][r["cell"]] for r in old}, **cells}
    return {
        "suite": suite.name,
        "description": suite.description,
        "reference": suite.reference,
        "evaluation": asdict(suite.evaluation),
        "resolved": suite.resolved(),
        "thresholds": dict(suite.thresholds),
        "hash": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12],
        "metabench": metabench.__version__,
        "argv": ["metabench", *sys.argv[1:]],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "controls": sorted(name for name, plugin in suite.catalogue.algorithms.items() if plugin.meta["control"]),
        "families": {name: plugin.meta["family"] for name, plugin in sorted(suite.catalogue.algorithms.items())},
        "cells": cells,
        "rows": listed,
    }


def _still_valid(row: Mapping[str, Any], cell: Mapping[str, Any], known: Catalogue) -> bool:
    """Whether the code that made a row of an earlier plan is still the code."""
    if cell["algorithm"] not in known.algorithms or cell["dataset"] not in known.datasets:
        return False
    return row.get("sources") == sources_of(known, cell["algorithm"], cell["dataset"], cost=row["measure"] in COSTS)


def coordinates(cell: Cell, suite: Suite) -> dict[str, Any]:
    """The columns of results.csv that are known before anything runs, and the hash of the cell's code."""
    return {
        "cell": cell.id,
        "algorithm": cell.algorithm,
        "params": json.dumps(dict(cell.resolved), sort_keys=True),
        "dataset": cell.dataset,
        "split": cell.split,
        "ways": cell.ways,
        "shots": cell.shots or None,
        "queries": cell.queries or None,
        "stream": cell.stream,
        "bn_mode": cell.bn_mode,
        "device": cell.device,
        "precision": cell.precision,
        "seed": cell.seed,
        "rotations": cell.rotations,
        "within": cell.within,
        "norm": cell.norm,
        "selection": suite.evaluation.selection if cell.train else "",
        "train_spec": cell.train.text if cell.train else "",
        "training": cell.training_id if cell.train else "",
        "tasks": cell.call.tasks,
        "steps": cell.call.steps,
        "threads_asked": cell.call.threads,
        "allocator": cell.call.allocator,
        "layout": cell.call.layout,
        "compile": cell.call.compile,
    }


@dataclass(frozen=True)
class Job:
    """Rows of quality that share one training, or the weights file that stands for it."""

    rows: tuple[Row, ...]
    weights: Path | None = None

    @property
    def title(self) -> str:
        """What is done, on what."""
        algorithm, data = self.rows[0].cell.id.split("/")[:2]
        verb = "loading" if self.weights else "training" if self.rows[0].cell.train else "measuring"
        return f"{verb} {algorithm} on {data}"

    def message(self, number: int, suite: Suite, folder: Path, *, keep_weights: bool = False) -> dict[str, Any]:
        """The job as the plain data a worker understands (see measure.py and weights.py)."""
        cell = self.rows[0].cell
        measures: dict[str, list[str]] = {}
        for row in self.rows:
            measures.setdefault(row.cell.id, []).append(row.measure)
        shapes = {row.cell.id: row.cell for row in self.rows}
        version = importlib.metadata.version("torch")
        what = [cell.training_id, self.rows[0].sources, suite.evaluation.selection, suite.evaluation.seed, version]
        what += [self.weights.name] if self.weights else []
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        return {
            "kind": "job",
            "id": number,
            **model_message(cell),
            "train": {**asdict(cell.train), "images_per_step": cell.train.images_per_step} if cell.train else None,
            "evaluation": asdict(suite.evaluation),
            "cells": [
                {
                    "id": key,
                    **{name: getattr(c, name) for name in ("ways", "shots", "queries", "stream", "within")},
                    "measures": measures[key],
                }
                for key, c in shapes.items()
            ],
            "checkpoint": str(folder / "checkpoints" / f"{name}.pt"),
            "predictions": str(folder / "predictions"),
            "keep": str(folder / "weights") if keep_weights else None,
            "weights": str(self.weights) if self.weights else None,
        }


def model_message(cell: Cell) -> dict[str, Any]:
    """What a worker needs in order to build a cell's algorithm and data."""
    return {
        "algorithm": cell.algorithm,
        "params": dict(cell.resolved),
        "dataset": cell.dataset,
        "data_params": {**dict(cell.data_params), "split": cell.split},
        "rotations": cell.rotations,
        "precision": cell.precision,
        "device": cell.device,
        "seed": cell.seed,
    }


def cost_message(row: Row) -> dict[str, Any]:
    """A row of cost as the plain data a worker understands (see bench.py)."""
    cell = row.cell
    return {
        **model_message(cell),
        "ways": cell.ways,
        "shots": cell.shots,
        "queries": cell.queries,
        "stream": cell.stream,
        "call": asdict(cell.call),
        "kernel": row.kernel,
        "aspect": row.aspect,
    }


def jobs_of(rows: Iterable[Row], weights: Mapping[str, Path] = MappingProxyType({})) -> list[Job]:
    """The trainings in the suite's order, each with all its rows of quality; `weights` are files by cell id."""
    groups: dict[tuple[str, Path | None], list[Row]] = {}
    for row in rows:
        if row.measure not in COSTS:
            groups.setdefault((row.cell.training_id, weights.get(row.cell.id)), []).append(row)
    return [Job(tuple(members), file) for (_, file), members in groups.items()]
