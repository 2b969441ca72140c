"""Suites: declared experiments. A suite file and the catalogue make a Suite: cells, and how to measure them.

A suite is read strictly: every mistake in it is reported at once, each with file, line and, where a name is unknown,
the nearest one that is known. Nothing here runs or imports an algorithm.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from metabench.catalogue import NAME, Catalogue, Plugin, Value, catalogue
from metabench.cells import (
    DEVICES,
    KERNEL_MEASURES,
    Call,
    Cell,
    Task,
    TrainSpec,
    explicit,
    make_cell,
    matches,
    merge_training,
    no_match,
    train_spec,
    training_problems,
)
from metabench.document import Document, Where
from metabench.errors import ConfigError, did_you_mean
from metabench.suitefile import AlgorithmEntry, CallEntry, SuiteEntry, TaskEntry, validate

MAX_CELLS = 50_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How quality is measured: the test episodes, their seed, and the weights tested ("last", or best on "val")."""

    episodes: int
    seed: int
    selection: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How times are measured: in so many fresh processes, so many slices of each kernel in each."""

    processes: int
    slices: int


@dataclass(frozen=True, kw_only=True)
class Gating:
    """How two versions are told apart by time: see `suitefile.GateEntry`, whose keys these are."""

    alpha: float = 0.01
    looks: tuple[int, ...] = (14, 28)
    seconds: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A validated suite. `plugins` are the files it names, then those of the call; `threads` None means all cores."""

    name: str
    path: Path
    description: str
    evaluation: Evaluation
    threads: int | None
    reference: str | None
    controls: bool
    plugins: tuple[Path, ...]
    catalogue: Catalogue = field(repr=False, compare=False)
    timing: Timing
    gate: Gating = Gating()
    points: Mapping[Cell, tuple[str, ...]] = field(repr=False)
    thresholds: Mapping[str, Any] = field(default_factory=dict, repr=False)  # as thresholds.Thresholds.of reads them

    def cells(self) -> tuple[Cell, ...]:
        """Return the cells, each once: the grids', task by task, then the explicit ones, then the controls."""
        return tuple(self.points)

    def resolved(self) -> dict[str, Any]:
        """Return all that the suite means as plain data for JSON; cells are their ids."""
        return {
            "suite": self.name,
            "description": self.description,
            "plugins": [path.name for path in self.plugins],
            "evaluation": asdict(self.evaluation),
            "timing": asdict(self.timing),
            "controls": self.controls,
            "reference": self.reference,
            "threads": self.threads,
            "thresholds": dict(self.thresholds),
            "cells": {cell.id: list(measures) for cell, measures in self.points.items()},
        }


def load_suite(name: str | Path, *, plugins: Sequence[Path] = ()) -> Suite:
    """Load a shipped suite by its name, or a suite file; `plugins` are further plug-in files.

    Raises ConfigError with every mistake in the file, each as 'file:line: what is wrong'.
    """
    file = _find(name)
    document = Document(file, "a suite")
    entry = validate(document)
    if entry is None:
        document.raise_problems()
        raise ConfigError(f"{file}: not a suite")
    named = [file.parent / Path(plugin).expanduser() for plugin in entry.plugins]
    files = tuple(Path(plugin).resolve() for plugin in (*named, *plugins))
    _check_name(document, entry)
    try:
        known = catalogue(files)
    except ConfigError as error:
        for message in str(error).splitlines():
            document.report(("plugins",), message)
        document.raise_problems()
        raise
    points = _Expansion(document, entry, known).cells()
    document.raise_problems()
    return Suite(
        name=entry.suite or file.stem,
        path=file.resolve(),
        description=entry.description,
        evaluation=Evaluation(**entry.evaluation.model_dump()),
        threads=entry.threads,
        reference=entry.reference,
        controls=entry.controls,
        plugins=files,
        catalogue=known,
        timing=Timing(**entry.timing.model_dump()),
        gate=Gating(**{**entry.gate.model_dump(), "looks": tuple(entry.gate.looks)}),
        points=points,
        thresholds=entry.thresholds.model_dump(exclude_none=True, exclude_defaults=True),
    )


def shipped_suites() -> dict[str, Path]:
    """Return the suites that come with metabench by name: those of the wheel, or of the checkout it runs from."""
    package = Path(__file__).parent
    folder = package / "suites"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "suites"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of suite files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SuiteEntry.model_json_schema()}


def _find(name: str | Path) -> Path:
    """Return the file of a suite: shipped names first. Raises ConfigError for a name that is neither."""
    shipped = shipped_suites()
    if str(name) in shipped:
        return shipped[str(name)]
    file = Path(name)
    if not file.exists():
        noun = "no such suite file" if file.suffix or len(file.parts) > 1 else "unknown suite"
        raise ConfigError(f"{noun}: {str(name)!r}{did_you_mean(file.stem, shipped)}")
    return file


def _check_name(document: Document, entry: SuiteEntry) -> None:
    """Report a name that is none, or a shipped suite's: results lie in a folder of that name, and would mix."""
    name = entry.suite or document.file.stem
    shipped = shipped_suites().get(name)
    if not NAME.fullmatch(name):
        fix = "add 'suite: NAME' (letters, digits and . _ + -)"
        document.report(("suite",), f"{name!r} cannot be a suite's name: {fix}")
    elif shipped is not None and shipped.read_bytes() != document.file.read_bytes():
        document.report(("suite",), f"{name!r} is a suite that comes with metabench: add 'suite: ANOTHER-NAME'")


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """An algorithm with one value for each parameter, and where the suite says so."""

    plugin: Plugin
    params: Mapping[str, Value]
    train: Mapping[str, Value]
    where: Where


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where and how a cell is measured, besides its task and algorithm."""

    device: str
    precision: str
    seed: int
    call: Call
    measures: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Whether a measure needs a training: the cost of kernels does not depend on what was learned."""
        return not {*self.measures} <= {*KERNEL_MEASURES}


def _calls(entry: CallEntry) -> list[Call]:
    """Return every call that an entry sweeps."""
    every_steps: list[int | None] = [*entry.steps] if entry.steps else [None]
    every_threads: list[int | None] = [*entry.threads] if entry.threads else [None]
    axes = itertools.product(entry.tasks, every_steps, every_threads, entry.allocator, entry.layout, entry.compile)
    return [
        Call(tasks=tasks, steps=steps, threads=threads, allocator=allocator, layout=layout, compile=compiled)
        for tasks, steps, threads, allocator, layout, compiled in axes
    ]


class _Expansion:
    """From a suite's entry to its cells; what cannot be is reported to the document and left out."""

    def __init__(self, document: Document, entry: SuiteEntry, known: Catalogue) -> None:
        self.document, self.entry, self.known = document, entry, known
        self.train = entry.train.model_dump(exclude_none=True)
        self.found: dict[Cell, dict[str, None]] = {}
        self.used: dict[tuple[Task, _Place], tuple[Where, set[str]]] = {}

    def cells(self) -> dict[Cell, tuple[str, ...]]:
        """Return the cells of grids, explicit cells and controls, each with its measures."""
        for g, grid in enumerate(self.entry.grid):
            tasks = self._placed_tasks((("grid", g, "tasks", n), one) for n, one in enumerate(grid.tasks))
            choices = self._all_choices((("grid", g, "algorithms", n), one) for n, one in enumerate(grid.algorithms))
            measures = tuple(grid.measures or self.entry.measures)
            places = [
                _Place(device=device, precision=precision, seed=seed, call=call, measures=measures)
                for device, precision, seed in itertools.product(grid.devices, grid.precisions, grid.seeds)
                for entry in grid.calls
                for call in _calls(entry)
            ]
            if self._few(len(tasks) * len(choices) * len(places), ("grid", g)):
                for (where, task), choice in itertools.product(tasks, choices):
                    self._add(where, task, choice, places)
        for n, one in enumerate(self.entry.cells):
            place = _Place(
                device=one.device,
                precision=one.precision,
                seed=one.seed,
                call=Call(),
                measures=tuple(self.entry.measures),
            )
            for where, task in self._placed_tasks([(("cells", n, "task"), one.task)]):
                for choice in self._all_choices([(("cells", n, "algorithm"), one.algorithm)]):
                    self._add(where, task, choice, [place])
        if self.entry.controls:
            self._add_controls()
        self._check_whole()
        return {cell: tuple(measures) for cell, measures in self.found.items()}

    def _add(self, where: Where, task: Task, choice: _Choice, places: Sequence[_Place]) -> None:
        for place in places:
            for train in self._training(where, task, choice) if place.trains else [None]:
                if self.document.problems:
                    return  # no cells any more, but the rest is still to be checked
                cell = make_cell(
                    choice.plugin,
                    task,
                    params=choice.params,
                    train=train,
                    device=place.device,
                    precision=place.precision,
                    seed=place.seed,
                    call=place.call,
                )
                wanted = self.found.setdefault(cell, {})
                wanted |= dict.fromkeys(cell.measures(place.measures))
                _, names = self.used.setdefault((task, place), (where, set()))
                names.add(choice.plugin.name)

    def _add_controls(self) -> None:
        """Add to each task and place the controls that fit and are not named there."""
        for control in [one for one in self.known.algorithms.values() if one.meta["control"]]:
            choices = self._choices(("controls",), AlgorithmEntry(name=control.name))
            for (task, place), (where, names) in list(self.used.items()):
                if control.name not in names and no_match(control, task.problem) is None:
                    for choice in choices:
                        self._add(where, task, choice, [place])

    def _check_whole(self) -> None:
        """Report unknown names and, unless other mistakes may be why, an empty suite and margins of no cell."""
        reference, clean = self.entry.reference, not self.document.problems
        if clean and not self.found:
            self.document.report((), "the suite has no cells: add a grid of tasks and algorithms, or cells")
        names = {cell.algorithm for cell in self.found} if clean else self.known.algorithms.keys()
        if reference is not None and reference not in names:
            self.document.report(
                ("reference",), f"reference {reference!r} is no algorithm of the suite{did_you_mean(reference, names)}"
            )
        for n, override in enumerate(self.entry.thresholds.overrides):
            where, name = ("thresholds", "overrides", n), override.algorithm
            if name is not None and name not in names:
                hint = did_you_mean(name, names)
                self.document.report((*where, "algorithm"), f"{name!r} is no algorithm of the suite{hint}")
            elif clean and self.found and (problem := self._fits_none(name, override.match)):
                self.document.report((*where, "match"), problem)

    def _fits_none(self, algorithm: str | None, match: str) -> str:
        """Why no cell (of an algorithm) has all words of a margin's `match` in its id, or ''."""
        cells = [cell for cell in self.found if algorithm in (None, cell.algorithm)]
        if any(matches(one, match) for cell in cells for one in _ids(cell, match)):
            return ""
        parts = {part for cell in cells for part in re.findall(r"[^][/,=]+", cell.id)}
        hints = [did_you_mean(word, parts) for word in match.split() if not any(word in cell.id for cell in cells)]
        hint = next((hint for hint in hints if "did you mean" in hint), "")
        return f"match {match!r} fits no cell{f' of {algorithm}' if algorithm else ' of the suite'}{hint}"

    def _placed_tasks(self, entries: Iterable[tuple[Where, TaskEntry]]) -> list[tuple[Where, Task]]:
        return [(where, task) for where, entry in entries for task in self._tasks(where, entry)]

    def _all_choices(self, entries: Iterable[tuple[Where, AlgorithmEntry]]) -> list[_Choice]:
        return [choice for where, entry in entries for choice in self._choices(where, entry)]

    def _tasks(self, where: Where, entry: TaskEntry) -> list[Task]:
        """Return the tasks that an entry sweeps, those that are impossible reported and left out."""
        dataset, split = self._dataset(where, entry)
        if dataset is None:
            return []
        swept = self._sweep(dataset, entry.params, where, {"split": split})
        every_ways: list[int | None] = [*entry.ways] if entry.ways else [None]
        if not self._few(len(swept) * len(every_ways) * len(entry.shots), where):
            return []
        task = Task(
            dataset=dataset,
            split=split,
            rotations=entry.rotations,
            within=entry.within,
            ways=None,
            shots=1,
            queries=entry.queries,
        )
        tasks = [
            replace(task, params=explicit(dataset, params), ways=ways, shots=shots)
            for params, ways, shots in itertools.product(swept, every_ways, entry.shots)
        ]
        if entry.stream is not None:
            tasks = [replace(one, shots=0, queries=0, stream=entry.stream) for one in tasks]
        return [task for task in tasks if self._possible(where, task)]

    def _dataset(self, where: Where, entry: TaskEntry) -> tuple[Plugin | None, str]:
        """Return the data set and the split that a task names; None, and a report, if there is none."""
        name, bracket, split = entry.dataset.removesuffix("]").partition("[")
        dataset = self.known.datasets.get(name)
        if dataset is None:
            hint = did_you_mean(name, self.known.datasets)
            self.document.report((*where, "dataset"), f"unknown data set {name!r}{hint}")
            return None, split
        splits = dataset.meta["splits"]
        split = split if bracket else next(iter(splits))
        if split not in splits or bool(bracket) != entry.dataset.endswith("]"):
            self.document.report((*where, "dataset"), f"{name} has no split {split!r}{did_you_mean(split, splits)}")
            return None, split
        if "split" in entry.params:
            self.document.report((*where, "params", "split"), f"write the split as dataset: '{name}[{split}]'")
            return None, split
        return dataset, split

    def _choices(self, where: Where, entry: AlgorithmEntry) -> list[_Choice]:
        """Return the algorithm with each of the parameters that an entry sweeps; mistakes are reported."""
        plugin = self.known.algorithms.get(entry.name)
        if plugin is None:
            hint = did_you_mean(entry.name, self.known.algorithms)
            self.document.report((*where, "name"), f"unknown algorithm {entry.name!r}{hint}")
            return []
        train = entry.train.model_dump(exclude_none=True)
        swept = self._sweep(plugin, entry.params, where, {})
        return [_Choice(plugin=plugin, params=params, train=train, where=where) for params in swept]

    def _sweep(
        self, plugin: Plugin, given: Mapping[str, Any], where: Where, fixed: Mapping[str, Value]
    ) -> list[dict[str, Value]]:
        """Return every combination of the listed values; mistakes are reported, and the defaults stand in for them."""
        axes = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        problems: list[tuple[Where, str | None]] = [((), problem) for problem in plugin.missing({*given, *fixed})]
        for name, values in axes.items():
            place: Where = ("params", name)
            problems += [(place, plugin.wrong(name, value)) for value in values]
            problems += [] if values else [(place, f"{name}: the list is empty")]
        problems = [(place, problem) for place, problem in problems if problem]
        for place, problem in problems:
            self.document.report((*where, *place), str(problem))
        if problems or not self._few(math.prod(map(len, axes.values())), where):
            return [{}]
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def _few(self, cells: int, where: Where) -> bool:
        """Return whether so many cells are bearable, and report it if not."""
        if cells > MAX_CELLS:
            self.document.report(where, f"{cells:,} cells are too many (at most {MAX_CELLS:,}): split the suite")
        return cells <= MAX_CELLS

    @property
    def _validates(self) -> bool:
        """Whether validation tasks are drawn anywhere."""
        measured = [*self.entry.measures, *(one for grid in self.entry.grid for one in grid.measures or [])]
        return self.entry.evaluation.selection == "val" or "val_accuracy" in measured

    def _possible(self, where: Where, task: Task) -> bool:
        """Return whether the data set has what a test task needs, and report what it has not."""
        problems = list(_task_problems(task, validates=self._validates))
        for key, problem in problems:
            if key or self.document.whole(where):
                self.document.report((*where, key), problem)
        return not problems

    def _training(self, where: Where, task: Task, choice: _Choice) -> list[TrainSpec | None]:
        """Return how the algorithm is trained for the task (None: not at all), or nothing if that was reported."""
        plugin, feeds = choice.plugin, choice.plugin.meta["feeds"]
        if feeds is None or no_match(plugin, task.problem):
            return [None]
        layers = [plugin.meta["train"], self.train, choice.train]
        given = merge_training(layers)
        follows = "stream" in plugin.meta["problems"]
        problems = list(training_problems(given, feeds=feeds, task=task, follows=follows))
        for key, problem in problems:
            if key or (self.document.whole(("train",)) and self.document.whole((*choice.where, "train"))):
                self.document.report(self._origin(key, where, choice), f"{plugin.name}: {problem}")
        return [] if problems else [train_spec(given, feeds=feeds, task=task)]

    def _origin(self, key: str, task: Where, choice: _Choice) -> Where:
        """Return the place that sets a training key: the algorithm's entry, the suite's, or else the task."""
        if key in choice.train:
            return (*choice.where, "train", key)
        if key in self.train:
            return ("train", key)
        return choice.where if not key or key in choice.plugin.meta["train"] else (*task, key)


def _ids(cell: Cell, words: str) -> Iterator[str]:
    """The ids that a cell has on every device and, of the seeds, with its own and those among the words.

    A run may be asked for other devices and seeds than the suite lists.
    """
    seeds = {cell.seed, *map(int, re.findall(r"seed([0-9]{1,18})", words))}
    return (replace(cell, device=device, seed=seed).id for device in DEVICES for seed in seeds)


def _task_problems(task: Task, *, validates: bool) -> Iterator[tuple[str, str]]:
    """Yield what is impossible about a test task: the key at fault ('' if one lacks), and why."""
    if task.within not in ("none", *task.dataset.meta["within"]):
        yield "within", f"{task.dataset.name} has no tasks within one {task.within}"
    elif task.within != "none" and task.stream is not None:
        yield "within", "a stream is drawn from all classes: leave within out"
    if task.images is None:
        if task.ways is not None:
            yield "ways", f"{task.name} is regression: its tasks have no ways"
        if task.rotations != "none":
            yield "rotations", f"{task.name} is regression: it has no rotations"
        if task.stream is not None:
            yield "stream", f"{task.name} is regression: it has no streams"
        return
    if task.ways is None:
        yield "", f"ways is missing: tasks of {task.name} have classes"
        return
    for subset in ("test", "val") if validates else ("test",):
        if task.ways > (classes := task.classes(subset)):
            yield "ways", f"{task.ways} ways are more than the {classes} {subset} classes of {task.name}"
    if task.stream is not None and task.stream > (drawings := task.ways * task.images):
        yield "stream", f"a stream of {task.stream}: {task.ways} classes of {task.name} have {drawings} images"
    if (examples := task.shots + task.queries) > task.images:
        why = f"{task.shots} shots + {task.queries} queries are {examples}"
        yield "queries", f"{why}: a class of {task.name} has {task.images} images"
