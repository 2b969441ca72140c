"""Whether a run adds up: every stated figure made anew from raw rows, every episode from the data set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metabench import environment
from metabench.disk import Ints, read_predictions
from metabench.errors import StoreError
from metabench.leaderboard.collect import Fingerprint, Training, agree, check_scores, fingerprint, seed_of, telling
from metabench.leaderboard.source import (
    algorithm_of,
    check_manifest,
    coordinates,
    counted,
    finite,
    is_control,
    loaded,
    measured,
    plain,
    quality,
    regular,
)
from metabench.report import csvfile
from metabench.report.model import RunData
from metabench.stats import Floats, median_interval
from metabench.store import Key, Measurement, Run

EPISODES_SECONDS = 600.0  # for making the episodes of one run anew
CREDIT = 1e-12  # between a stored score and the share of its answers that are right: rounding
_Table = dict[tuple[str, str], tuple[int, dict[str, str]]]  # by cell and measure, a line's number and its columns


@dataclass(frozen=True)
class Problem:
    """One thing that does not add up: where, and what is stated against what was found."""

    where: str
    what: str


@dataclass(frozen=True)
class Audit:
    """What was checked of a run, how much of it, what could not be checked here and why, and what is wrong.

    `rows` counts finished rows. `recomputed` are the results of quality that were made anew, answers and episodes and
    all; `doubts` those that could not be, each with the reason: these stay claimed, though nothing about them is wrong.
    `trainings` say by a hash of the scores which seed of which cell they are, for who looks for the same scores under
    another seed.
    """

    run: str
    rows: int
    checked: tuple[tuple[str, int], ...]
    unchecked: tuple[str, ...]
    problems: tuple[Problem, ...]
    recomputed: frozenset[Key] = field(default=frozenset(), repr=False)
    doubts: Mapping[Key, str] = field(default_factory=dict, repr=False)
    trainings: Mapping[Fingerprint, Training] = field(default_factory=dict, repr=False)


@dataclass
class _Findings:
    run: Run
    counts: dict[str, int] = field(default_factory=dict)
    unchecked: dict[str, None] = field(default_factory=dict)
    problems: dict[Problem, None] = field(default_factory=dict)
    answered: dict[Key, str] = field(default_factory=dict)  # by row, a hash of the classes that its predictions name
    remade: set[Key] = field(default_factory=set)  # results whose test episodes came out again
    doubts: dict[Key, str] = field(default_factory=dict)
    trainings: dict[Fingerprint, Training] = field(default_factory=dict)

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def wrong(self, where: str, what: str) -> None:
        self.problems[Problem(plain(where, 500), what)] = None

    def doubt(self, one: Measurement, why: str) -> None:
        """Note why a row's scores are taken as they stand."""
        key = one.cell, one.measure
        if quality(one.measure):
            self.doubts[key] = f"{self.doubts[key]}; {why}" if key in self.doubts else why

    def refuse(self, error: StoreError) -> None:
        """Note an error of reading as a problem: its message begins with the place."""
        where, colon, what = str(error).partition(": ")
        self.wrong(where, what if colon else str(error))


def audit(run: Run, *, episodes: bool = True, withdrawn: Callable[[str], bool] = lambda algorithm: False) -> Audit:
    """Recompute what the run states, but for the rows of algorithms that are withdrawn.

    Raises StoreError where it cannot be read. No finished row is no problem: `rows` is 0 then.
    """
    check_manifest(run)
    found = _Findings(run)
    records = run.records()
    stored = measured(run, records)
    finished = [one for one in counted(run, stored).values() if one.status == "ok"]
    good = [one for one in finished if not withdrawn(algorithm_of(one.cell))]
    lost = [key for key in _lost(run, records, stored) if not withdrawn(algorithm_of(key[0]))]
    for key in lost:
        found.wrong(f"{run.path / 'measurements.jsonl'}: {key[0]} {key[1]}", "its raw samples are not in samples.jsonl")
    _whole_lines(found, needed=bool(good or lost))
    if said := loaded(run):
        found.unchecked[said] = None
    scores: dict[Key, Floats] = {}
    for one in good:
        _figure(found, one, scores)
    _repeated(found, scores)
    _environments(found, good)
    _derived(found, withdrawn)
    scored = [one for one in good if (one.cell, one.measure) in scores]
    if episodes:
        _episodes(found, scored)
    else:
        found.unchecked["the test episodes were not made anew (--no-episodes)"] = None
        for one in scored:
            found.doubt(one, "its test episodes were not made anew (--no-episodes)")
    return Audit(
        run=str(run.path),
        rows=len(good) + len(lost),
        checked=tuple(found.counts.items()),
        unchecked=tuple(found.unchecked),
        problems=tuple(found.problems),
        recomputed=frozenset(found.remade - found.doubts.keys()),
        doubts=found.doubts,
        trainings=found.trainings,
    )


def results_of(run: Run) -> set[tuple[object, ...]]:
    """What tells the run's results of quality from those of another run, which takes another second to get them."""
    return {
        (one.cell, one.measure, one.at, one.value)
        for one in run.current().values()
        if one.status == "ok" and quality(one.measure) and not is_control(algorithm_of(one.cell))
    }


def _whole_lines(found: _Findings, *, needed: bool) -> None:
    """A run under way may end in half a line; one that is handed in may not. `needed`: rows point into these files."""
    for name in ("measurements.jsonl", "samples.jsonl"):
        file = regular(found.run, name)
        if file is None:
            if needed:
                found.wrong(str(found.run.path / name), "is missing")
            continue
        with file.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - 1))
            if size and handle.read(1) != b"\n":
                found.wrong(str(file), "ends in half a line: the run was killed; run its suite again to finish it")


def _lost(run: Run, records: Iterable[Mapping[str, Any]], stored: Mapping[Key, Measurement]) -> list[Key]:
    """Rows of the plan that have a line, but whose pointer leads to no raw samples: reading passes them over."""
    named = {(str(one.get("cell")), str(one.get("measure"))): str(one.get("status")) for one in records}
    planned = {(row["cell"], row["measure"]) for row in run.manifest["rows"]}
    return [key for key, status in named.items() if status == "ok" and key in planned and key not in stored]


def _figure(found: _Findings, one: Measurement, scores: dict[Key, Floats]) -> None:
    """One row: its coordinates, and its figures from its raw samples."""
    run = found.run
    where = f"{run.path / 'measurements.jsonl'}: {plain(one.cell)} {plain(one.measure)}"
    try:
        known = coordinates(run, one.cell)
        _stated(found, one.cell, known)
        if quality(one.measure) or one.measure in ("val_accuracy", "mse_before"):
            values, digest = check_scores(run, one)
            stated = one.facts.get("episodes_hash")
            if stated != digest:
                found.wrong(where, f"episodes_hash is {plain(stated)}, its episodes give {digest}")
            scores[one.cell, one.measure] = values
            found.count("scores", len(values))
            found.count("figures of quality")
            _count(found, where, len(values))
            _predictions(found, where, one, values, known)
        elif one.measure == "train_time":
            seconds = run.samples(one).get("seconds")
            agree(where, "value", one.value, float(np.median(_numbers(where, seconds))))
            found.count("times")
        elif isinstance(processes := one.facts.get("processes"), list) and processes:
            anew = median_interval(_numbers(where, processes))
            for name, value in (("value", anew.value), ("ci_low", anew.low), ("ci_high", anew.high)):
                agree(where, name, getattr(one, name), value, optional=name != "value")
            found.count("times")
        else:
            agree(where, "value", one.value, _number(where, one.value))
            found.unchecked["counts, and times of one process, have no raw rows: they stay as claimed"] = None
        _steps(found, where, one, known)
    except StoreError as error:
        found.refuse(error)


def _stated(found: _Findings, cell: str, known: Mapping[str, Any]) -> None:
    """What the manifest states of a cell beside its id is what the id and the evaluation say."""
    where = f"{found.run.path / 'manifest.json'}: cell {plain(cell)}"
    if wrong := _params_against_id(known):
        found.wrong(where, wrong)
    evaluation = found.run.manifest.get("evaluation")
    selection = evaluation.get("selection") if isinstance(evaluation, dict) else None
    wanted = (selection or known["selection"]) if known["train_spec"] else ""
    if known["selection"] != wanted:
        found.wrong(where, f"selection is {plain(known['selection'])!r}, the run's evaluation says {plain(wanted)!r}")


def _params_against_id(known: Mapping[str, Any]) -> str | None:
    """What of the stated parameters (all, as JSON) is not what the id has (those set away from their defaults)."""
    if not known["params"]:
        return None  # of a run that states none
    try:
        stated = json.loads(known["params"])
    except (ValueError, RecursionError):
        stated = None
    if not isinstance(stated, dict):
        return "params is no JSON mapping"
    items = [item.partition("=") for item in known["trained"].partition("[")[2].removesuffix("]").split(",")]
    wanted = {name: text for name, equals, text in items if equals and name != "train"}
    if "norm" in stated:
        wanted["norm"] = known["norm"]
    for name, text in wanted.items():
        if name not in stated or stated[name] != _value(text):
            return f"params has {plain(name)} as {plain(stated.get(name))!r}, its id as {plain(text)!r}"
    return None


def _value(text: str) -> object:
    """A value as ids have it: bare text, or JSON."""
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _number(where: str, value: object) -> float:
    number = finite(value)
    if number is None:
        raise StoreError(f"{where}: value is {plain(value)}, which is no finite number")
    return number


def _numbers(where: str, values: object) -> list[float]:
    if not isinstance(values, list) or not values:
        raise StoreError(f"{where}: no raw samples")
    found = [_number(where, value) for value in values]
    if min(found) <= 0:
        raise StoreError(f"{where}: a time must be above 0")
    return found


def _count(found: _Findings, where: str, episodes: int) -> None:
    evaluation = found.run.manifest.get("evaluation")
    declared = evaluation.get("episodes") if isinstance(evaluation, dict) else None
    if declared is not None and declared != episodes:
        found.wrong(where, f"has {episodes} test episodes, the manifest's protocol {plain(declared)}")


def _steps(found: _Findings, where: str, one: Measurement, known: Mapping[str, Any]) -> None:
    """A training is as long as its row says."""
    budget = str(known["train_spec"]).rpartition("*")[2]
    steps = one.facts.get("train_steps")
    if budget.isdecimal() and steps is not None and steps != int(budget):
        found.wrong(where, f"trained for {plain(steps)} steps, its cell says {budget}")


def _predictions(found: _Findings, where: str, one: Measurement, scores: Floats, known: Mapping[str, Any]) -> None:
    """The scores again, from what every query was answered."""
    name = one.facts.get("predictions")
    file = regular(found.run, f"predictions/{Path(str(name)).name}") if name else None
    if file is None or file.name != name:
        if name:
            found.wrong(where, f"names predictions {plain(name)} that are not there")
        elif "accuracy" in one.measure:  # of an error there is nothing to keep: it has no right and wrong answers
            found.unchecked[f"{one.measure}: no predictions were kept: scores are taken as they stand"] = None
            found.doubt(one, "what its queries were answered was not handed in")
        return
    predicted, ties, labels, classes = read_predictions(file, "predicted", "ties", "labels", "classes")
    wrong = _answers(scores, predicted, ties, labels, classes, known)
    if wrong:
        found.wrong(str(file), f"{wrong} (predictions of {plain(one.cell)} {one.measure})")
    else:
        found.count("predictions", labels.size)
        found.answered[one.cell, one.measure] = hashlib.sha256(classes.astype("<i8").tobytes()).hexdigest()


def _answers(
    scores: Floats, predicted: Ints, ties: Ints, labels: Ints, classes: Ints, known: Mapping[str, Any]
) -> str | None:
    """What is wrong with the answers to (E, m) queries, or None.

    In a stream, a label beyond the ways stands for a step that does not count.
    """
    ways, queries, stream = known["ways"], known["queries"], known["stream"]
    shape = (len(scores), stream or ways * queries) if ways and (stream or queries) else labels.shape
    if not labels.shape == ties.shape == predicted.shape == shape or classes.shape != (len(scores), ways):
        return f"answers of shape {labels.shape} where the cell has {shape}"
    asked = labels < ways if stream else np.ones(shape, dtype=bool)
    if not asked.any(1).all():
        return "a stream has no step that counts"
    if not all(0 <= part.min() <= part.max() < ways for part in (labels[asked], predicted)) or ties.min() < 0:
        return "a label is not among the ways"
    if queries and not stream and any((np.bincount(row, minlength=ways) != queries).any() for row in labels):
        return f"an episode does not have {queries} queries of each class"
    if stream and any((np.bincount(row[row < ways]) > 1).any() for row in labels):
        return "a class comes twice in a stream among the steps that count: one of them is not that presentation"
    if ties[~asked].any() or ((ties == 1) != (predicted == labels))[asked & (ties <= 1)].any() or ties.max() > ways:
        return "an answer is credited that does not name the label, or the other way round"
    credit = np.where(ties > 0, 1.0 / np.maximum(ties, 1), 0.0).sum(1) / asked.sum(1)
    off = np.flatnonzero(np.abs(credit - scores) > CREDIT)
    if len(off):
        return f"episode {off[0]} scores {scores[off[0]]} in samples.jsonl, its answers give {credit[off[0]]}"
    return None


def _repeated(found: _Findings, scores: Mapping[Key, Floats]) -> None:
    """Two trainings that agree on every episode are one, handed in twice."""
    for (cell, measure), values in scores.items():
        key = fingerprint(cell, measure, telling(values))
        if key is None:
            continue
        first = found.trainings.setdefault(key, Training(seed_of(cell), cell, str(found.run.path)))
        if first.seed != seed_of(cell):
            found.wrong(f"{found.run.path / 'samples.jsonl'}: {plain(cell)} {measure}", first.again())


def _environments(found: _Findings, good: Sequence[Measurement]) -> None:
    """Each row's machine is described, and its name follows from the description."""
    described = found.run.environments()
    for name in dict.fromkeys(one.environment for one in good):
        facts = described.get(name)
        where = str(found.run.path / "environment.json")
        if not isinstance(facts, dict):
            found.wrong(where, f"does not describe environment {plain(name)}, which rows name")
            continue
        stable = {key: value for key, value in facts.items() if key not in environment.VOLATILE}
        if environment.name(stable) != name:
            found.wrong(
                where, f"{plain(name)}: its description gives the name {environment.name(stable)}: it was edited"
            )
        else:
            found.count("environments")


def _derived(found: _Findings, withdrawn: Callable[[str], bool]) -> None:
    """results.csv, where there is one, is what the rows give."""
    file = regular(found.run, "results.csv")
    if file is None:
        return
    try:
        anew = _kept(_table(csvfile.results(RunData.of(found.run.rows()).rows)), withdrawn)
    except (ValueError, TypeError, OverflowError) as error:  # facts of others: a count that is none
        found.wrong(str(found.run.path / "measurements.jsonl"), f"its rows give no results.csv ({plain(error)})")
        return
    try:
        stated = _kept(_table(file.read_text(encoding="utf-8")), withdrawn)
    except (OSError, ValueError, csv.Error) as error:
        found.wrong(str(file), f"cannot be read ({error})")
        return
    for key in anew.keys() - stated.keys():
        found.wrong(f"{file}: {' '.join(key)}", "the row is missing")
    for key, (line, row) in stated.items():
        if key not in anew:
            found.wrong(f"{file}:{line}", f"{plain(' '.join(key))}: no such row in measurements.jsonl")
            continue
        for name, value in row.items():
            real = anew[key][1].get(name, value)  # a column that this version does not have is not judged
            if name != "run" and value != real and not _close(value, real):
                found.wrong(f"{file}:{line}", f"{plain(name)} is {plain(value)!r}, the rows give {real!r}")
    found.count("lines of results.csv", len(stated))


def _kept(table: _Table, withdrawn: Callable[[str], bool]) -> _Table:
    return {key: line for key, line in table.items() if not withdrawn(algorithm_of(key[0]))}


def _table(text: str) -> _Table:
    """The lines by cell and measure, each with its number. Raises ValueError for what is no results.csv."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"cell", "measure"} <= set(reader.fieldnames or ()):
        raise ValueError("it lacks the columns cell and measure")
    found: _Table = {}
    for row in reader:
        key = row["cell"] or "", row["measure"] or ""
        if key in found:
            raise ValueError(f"line {reader.line_num}: {plain(' '.join(key))} stands there twice")
        found[key] = reader.line_num, {str(name): value or "" for name, value in row.items()}
    return found


def _close(a: str, b: str) -> bool:
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-12)
    except ValueError:
        return False


# episodes


def _episodes(found: _Findings, rows: Sequence[Measurement]) -> None:
    """Make the test episodes of every protocol anew, in a process of its own that has torch, and compare."""
    questions: dict[str, dict[str, Any]] = {}
    asked: dict[str, list[Measurement]] = {}
    for one in rows:
        question = _question(found.run, one)
        key = json.dumps(question, sort_keys=True)
        questions.setdefault(key, question)
        asked.setdefault(key, []).append(one)
    for key, answer in zip(questions, _recount(list(questions.values())), strict=True):
        for one in asked[key]:
            _compare(found, one, answer)


def _question(run: Run, one: Measurement) -> dict[str, Any]:
    known = coordinates(run, one.cell)
    evaluation = run.manifest.get("evaluation")
    seed = evaluation.get("seed") if isinstance(evaluation, dict) else None
    names = ("data", "ways", "shots", "queries", "stream")
    return {
        **{name: known[name] for name in names},
        "subset": "val" if one.measure == "val_accuracy" else "test",
        "seed": seed if isinstance(seed, int) else 0,
        "count": one.n,
    }


def _recount(questions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "metabench.recount"]
    try:
        done = subprocess.run(
            command, input=json.dumps(questions), capture_output=True, text=True, timeout=EPISODES_SECONDS, check=True
        )
        yield from json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        reason = plain(last[0] if last else type(error).__name__)
        yield from ({"unknown": f"the process that makes them failed: {reason}"} for _ in questions)


def _compare(found: _Findings, one: Measurement, answer: Mapping[str, Any]) -> None:
    where = f"{found.run.path / 'samples.jsonl'}: {plain(one.cell)} {plain(one.measure)}"
    if "unknown" in answer:
        why = f"test episodes not made anew: {plain(answer['unknown'])}"
        found.unchecked[why] = None
        found.doubt(one, why)
        return
    ids = found.run.samples(one)["episodes"]
    right = answer["ids"]
    if ids != right:
        place = next(n for n, pair in enumerate(zip(ids, right, strict=True)) if pair[0] != pair[1])
        other = next((name for name, hashes in answer["others"].items() if hashes == ids[: len(hashes)]), None)
        what = f"they are those of the {other} classes" if other else f"episode {place} is {plain(ids[place])}"
        found.wrong(where, f"not the test episodes of this protocol: {what}, where the data set gives {right[place]}")
        return
    pixels = one.facts.get("pixels")
    if pixels is not None and answer["pixels"] is not None and pixels != answer["pixels"]:
        found.wrong(where, f"pixels hash is {plain(pixels)}, the data set here has {answer['pixels']}")
    found.count("test episodes", len(ids))
    if quality(one.measure):
        found.remade.add(one.key)
    stated = found.answered.get((one.cell, one.measure))
    if stated and answer["classes"] is not None and stated != answer["classes"]:
        name = Path(str(one.facts["predictions"])).name
        found.wrong(str(found.run.path / "predictions" / name), "its classes are not those of the test episodes")
