"""One side of a comparison: stored results as rows, wherever they come from.

A side is a run's folder, a folder of such folders, or a results.csv (with the episodes.csv and environment.json that
lie beside it). Everything is checked here: a row that leaves this module has finite numbers and stands once.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metabench.cells import matches
from metabench.errors import StoreError, did_you_mean
from metabench.store import SCHEMA_VERSION, Key, Measurement, Run, parsed

Floats = npt.NDArray[np.float64]
NEEDED = ("suite", "cell", "algorithm", "measure", "value", "status", "environment")
STATUSES = ("ok", "skipped", "failed", "timeout", "diverged")
ROUNDED = 1e-6  # between a stated mean and that of the episodes, relative
_NUMBERS = ("value", "ci_low", "ci_high")
_COUNTS = ("n", "seed")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per test episode its content hash and its score, (E,)."""

    episodes: tuple[str, ...]
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class Result:
    """One stored row. `columns` are those of results.csv and the run's facts; numbers are finite or None."""

    cell: str
    measure: str
    status: str
    reason: str
    n: int | None
    value: float | None
    ci_low: float | None
    ci_high: float | None
    seed: int
    columns: Mapping[str, Any]
    home: Home = field(repr=False, compare=False)
    measurement: Measurement | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> Key:
        """The row's key."""
        return self.cell, self.measure

    def text(self, column: str) -> str:
        """A column as text; empty where there is nothing."""
        value = self.columns.get(column)
        return "" if value is None else str(value)

    @property
    def environment(self) -> str:
        """The id of the machine and software that made it."""
        return self.text("environment")

    def scores(self) -> Scores | None:
        """Its test episodes, or None where only the mean was kept. Raises StoreError for damaged ones."""
        found = self.home.scores(self)
        if found is not None and self.value is not None and not _is_mean(self.value, found.scores):
            raise StoreError(
                f"{self.home.path}: {self.cell} {self.measure}: its value is {self.value}, its episodes give "
                f"{float(found.scores.mean())}: one of the two was edited; measure the row again"
            )
        return found

    def predictions(self) -> Path | None:
        """The file of its predictions, or None."""
        name = Path(self.text("predictions")).name  # of that folder, whatever a result says
        file = self.home.path / "predictions" / name
        return file if name and file.is_file() else None

    def machine(self) -> Mapping[str, Any]:
        """What is known of the machine, empty where nothing is."""
        found = self.home.environments.get(self.environment, {})
        return found if isinstance(found, Mapping) else {}

    def controls(self) -> dict[str, list[float]]:
        """The seconds of each control row on that machine in this run, a value per process; only sound ones."""
        found = self.machine().get("controls")
        kept = {}
        for name, times in found.items() if isinstance(found, Mapping) else ():
            if (
                isinstance(times, list)
                and times
                and all(isinstance(t, int | float) and 0 < t < math.inf for t in times)
            ):
                kept[str(name)] = [float(t) for t in times]
        return kept


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where rows lie: a run's folder, or the folder of a results.csv whose `kept` holds its episodes."""

    path: Path
    environments: Mapping[str, Any]
    run: Run | None = None
    kept: Mapping[Key, Scores] = field(default_factory=dict)

    def scores(self, row: Result) -> Scores | None:
        """The episodes of one of its rows."""
        if self.run is None or row.measurement is None:
            return self.kept.get(row.key)
        where = f"{self.path / 'samples.jsonl'}: {row.cell} {row.measure}"
        found = self.run.scored(row.measurement)
        return None if found is None else _checked(where, found[1], found[0])


@dataclass(frozen=True, kw_only=True)
class Side:
    """The rows of a side by key; `thresholds` by suite, as its newest run declares them, lacking where none does."""

    name: str
    suites: tuple[str, ...]
    rows: Mapping[Key, Result]
    thresholds: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()


def load(paths: Sequence[Path], *, select: str = "") -> Side:
    """One side from one or several places; of a row that several runs hold, the newest finished one counts.

    A run is as new as its manifest says, wherever it stands among `paths`; a results.csv, which has no date, is older
    than any. Only rows whose 'cell/measure' holds every word of `select`.

    Raises:
        StoreError: not results, damaged ones, numbers that are none, or rows that stand twice in one file.
    """
    homes = sorted((home for path in paths for home in _homes(path)), key=lambda home: home.at)
    rows: dict[Key, Result] = {}
    twice: set[Key] = set()
    behind: set[Key] = set()  # a newer run has no result
    suites: dict[str, None] = {}
    for home in homes:
        for row in home.rows:
            suites[row.text("suite")] = None
            if not matches(f"{row.cell}/{row.measure}", select):
                continue
            twice |= {row.key} & rows.keys()
            if row.key not in rows or row.status == "ok" or rows[row.key].status != "ok":
                rows[row.key] = row
                behind.discard(row.key)
            else:
                behind.add(row.key)  # a failure never hides an earlier result
    name = ", ".join(str(path) for path in paths)
    thresholds = {suite: declared for home in homes for suite, declared in home.thresholds.items()}
    notes = [f"{len(twice)} rows of {name} stand in several runs: the newest finished one counts"] if twice else []
    notes += [f"{len(behind)} rows of {name} have no result in a newer run: the earlier one counts"] if behind else []
    return Side(name=name, suites=tuple(suites), rows=rows, thresholds=thresholds, notes=tuple(notes))


class _Found(NamedTuple):
    """The rows of one place, the thresholds by suite that it declares, and when it was made ('' where it says not)."""

    rows: Iterable[Result]
    thresholds: Mapping[str, Mapping[str, Any]]
    at: str


def _homes(path: Path) -> list[_Found]:
    """The places that a path names: a run, a results.csv, or every run in a folder."""
    if path.is_file():
        return [_Found(_of_csv(path), {}, "")]
    if (path / "manifest.json").is_file():
        return [_of_run(path)]
    inside = sorted(p for p in path.iterdir() if (p / "manifest.json").is_file()) if path.is_dir() else []
    inside = [p for p in inside if not p.is_symlink()] or inside  # `latest` is one of the others
    if not inside:
        reason = "no results here" if path.is_dir() else "no such run or file"
        raise StoreError(
            f"{path}: {reason}; name a run's folder (results/runs/SUITE/latest), a folder of runs, or a results.csv"
        )
    return [_of_run(p) for p in inside]


def _of_run(path: Path) -> _Found:
    run = Run.open(path)
    suite = str(run.manifest["suite"])
    home = Home(path=run.path, environments=run.environments(), run=run)
    try:
        sources = {(row["cell"], row["measure"], row["hash"]): row.get("sources", "") for row in run.manifest["rows"]}
        known = {cell: {**found, "suite": suite} for cell, found in run.manifest["cells"].items()}
        seeds = {cell: int(found.get("seed") or 0) for cell, found in known.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{path / 'manifest.json'}: damaged ({error!r}); the run cannot be read") from error

    def rows() -> Iterator[Result]:
        for m in run.current().values():
            where = f"{path / 'measurements.jsonl'}: {m.cell} {m.measure}"
            _check_types(where, m)
            columns = {**known.get(m.cell, {}), **m.facts, "environment": m.environment, "code": m.hash, "unit": m.unit}
            numbers = {name: _finite(where, name, getattr(m, name)) for name in _NUMBERS}
            _check_bounds(where, numbers)
            yield Result(
                cell=m.cell,
                measure=m.measure,
                status=_status(where, m.status, numbers["value"]),
                reason=m.reason,
                n=m.n,
                seed=seeds.get(m.cell, 0),
                columns={**columns, "sources": sources.get((m.cell, m.measure, m.hash), "")},
                home=home,
                measurement=m,
                value=numbers["value"],
                ci_low=numbers["ci_low"],
                ci_high=numbers["ci_high"],
            )

    declared = run.manifest.get("thresholds")
    thresholds = {suite: declared} if isinstance(declared, dict) else {}
    return _Found(rows(), thresholds, str(run.manifest.get("at") or ""))


def _of_csv(path: Path) -> Iterator[Result]:
    home = Home(path=path.parent, environments=_environments(path.parent), kept=_episodes(path.parent / "episodes.csv"))
    lines: dict[Key, int] = {}
    for number, record in _records(path, NEEDED):
        where = f"{path}:{number}"
        row = _of_record(where, record, home)
        if row.key in lines:
            raise StoreError(f"{where}: {row.cell} {row.measure} stands on line {lines[row.key]} already; keep one")
        lines[row.key] = number
        yield row


def _of_record(where: str, record: Mapping[str, str], home: Home) -> Result:
    numbers = {name: _number(where, name, record.get(name, "")) for name in _NUMBERS}
    _check_bounds(where, numbers)
    n, seed = (_number(where, name, record.get(name, "")) for name in _COUNTS)
    return Result(
        cell=record["cell"],
        measure=record["measure"],
        status=_status(where, record["status"], numbers["value"]),
        reason=record.get("reason", ""),
        n=None if n is None else int(n),
        seed=int(seed or 0),
        columns=dict(record),
        home=home,
        value=numbers["value"],
        ci_low=numbers["ci_low"],
        ci_high=numbers["ci_high"],
    )


def _records(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record) of a CSV file, every line as long as its head."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            if lacking := [name for name in needed if name not in head]:
                raise StoreError(
                    f"{path}: not a results.csv of schema {SCHEMA_VERSION}: lacks the column"
                    f"{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}{did_you_mean(lacking[0], head)}"
                )
            for line in reader:
                if len(line) != len(head):
                    raise StoreError(
                        f"{path}:{reader.line_num}: half a line ({len(line)} of {len(head)} columns); "
                        "write the file again with `metabench report RUN -f csv`"
                    )
                yield reader.line_num, dict(zip(head, line, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read as CSV ({error})") from error


def _episodes(path: Path) -> dict[Key, Scores]:
    """The scores of an episodes.csv; none where there is no such file."""
    if not path.is_file():
        return {}
    found: dict[Key, tuple[list[str], list[float]]] = {}
    for number, record in _records(path, ("cell", "measure", "hash", "score")):
        score = _number(f"{path}:{number}", "score", record["score"])
        if score is None:
            raise StoreError(f"{path}:{number}: no score")
        hashes, scores = found.setdefault((record["cell"], record["measure"]), ([], []))
        hashes.append(record["hash"])
        scores.append(score)
    checked = ((key, tuple(hashes), scores) for key, (hashes, scores) in found.items())
    return {key: _checked(f"{path}: {' '.join(key)}", hashes, scores) for key, hashes, scores in checked}


def _checked(where: str, episodes: tuple[str, ...], scores: Sequence[float]) -> Scores:
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: scores that are no numbers; measure the row again") from error
    if values.shape != (len(episodes),) or not len(episodes):
        raise StoreError(f"{where}: {len(episodes)} episodes but {values.size} scores; the row is damaged")
    if not np.isfinite(values).all():
        raise StoreError(f"{where}: a score is not finite (NaN?); measure the row again")
    return Scores(episodes=episodes, scores=values)


def _is_mean(value: float, scores: Floats) -> bool:
    """Whether a stated value is the scores' mean, but for what a spreadsheet may have rounded."""
    return abs(value - float(scores.mean())) <= ROUNDED * max(1.0, abs(value))


def _environments(folder: Path) -> dict[str, Any]:
    file = folder / "environment.json"
    try:
        found = parsed(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}); delete it to go on without machines") from error
    return found if isinstance(found, dict) else {}


def _number(where: str, name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise StoreError(f"{where}: {name} is {text!r}, not a number") from None
    return _finite(where, name, value)


def _check_types(where: str, m: Measurement) -> None:
    """Raise StoreError for a measurement whose fields are not what they should be."""
    texts = ("reason", "unit", "hash", "environment", "at", "status")
    wrong = [name for name in texts if not isinstance(getattr(m, name), str)]
    wrong += [] if isinstance(m.facts, dict) else ["facts"]
    wrong += [] if m.n is None or (isinstance(m.n, int) and m.n > 0) else ["n"]
    if wrong:
        raise StoreError(f"{where}: {wrong[0]} is {getattr(m, wrong[0])!r}; the row is damaged")


def _finite(where: str, name: str, value: float | None) -> float | None:
    if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
        raise StoreError(f"{where}: {name} is {value!r}, not a finite number; measure the row again")
    return value


def _check_bounds(where: str, numbers: Mapping[str, float | None]) -> None:
    """Raise StoreError for an interval without its value inside."""
    value, low, high = (numbers[name] for name in _NUMBERS)
    if (low is None) != (high is None) or (
        None not in (value, low, high) and not (low or 0.0) <= (value or 0.0) <= (high or 0.0)
    ):
        raise StoreError(f"{where}: value {value} is not in its interval [{low}, {high}]; the row is damaged")


def _status(where: str, status: str, value: float | None) -> str:
    if status not in STATUSES:
        raise StoreError(f"{where}: unknown status {status!r}{did_you_mean(status, STATUSES)}")
    if status == "ok" and value is None:
        raise StoreError(f"{where}: ok, but without a value; the row is damaged")
    return status
