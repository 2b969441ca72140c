"""rerun.json: what a re-run of ours found of a submission's rows, and which rows exactly it speaks of.

It lies in the folder of the re-run, on the side of whoever keeps the board, and is read from there alone: nothing that
a submitter hands in can give a row this trust. A row is bound by a hash of its submitter, coordinates, code, raw
scores, weights and the plug-ins that came with it: change any of them, and the re-run speaks of another row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from metabench.errors import StoreError
from metabench.leaderboard.collect import Collected, Score
from metabench.leaderboard.source import plain, regular
from metabench.store import Run

NAME = "rerun.json"
Outcome = Literal["agrees", "refused", "failed", "not re-run"]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Entry):
    """A mean over test episodes, with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    n: int


class RowEntry(_Entry):
    """One row: what was claimed, what came out on new episodes, and what follows.

    `bound` is the hash of the claimed row, `again_cell` the re-run's own row. `p` is Holm's adjusted p-value of the
    claim being too good, `visible` the excess of a claim that the test would have found in four of five cases.
    `same_code`: algorithm, data set, core and torch here are those of the claim.
    """

    cell: str
    measure: str
    outcome: Outcome
    reason: str = ""
    bound: str
    claimed: Figure
    again_cell: str = ""
    again: Figure | None = None
    p: float | None = None
    visible: float | None = None
    same_code: bool = False


class RerunEntry(_Entry):
    """A re-run. `drawn`: the episode seed came from the operating system, after the submission was read."""

    schema_version: Literal[1] = 1
    at: str
    metabench: str
    run: str
    submitter: str
    files: dict[str, str]
    episode_seed: int
    drawn: bool
    episodes: int
    alpha: float
    rows: tuple[RowEntry, ...]


def bound(score: Score) -> str:
    """The hash that binds a re-run to a row."""
    assert score.scores is not None
    what = [
        score.source.submitter, score.cell, score.measure, sorted(map(str, score.coordinates.items())), score.code,
        score.at, score.episode_seed, score.episodes_hash, score.pixels, score.weights,
        hashlib.sha256(score.scores.astype("<f8").tobytes()).hexdigest(), sorted(plugins(score.source.run).items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def plugins(run: Run) -> dict[str, str]:
    """The SHA-256 of every plug-in in a run's folder, by its path there. Raises StoreError for links."""
    files = [regular(run, f"plugins/{file.name}") for file in sorted((run.path / "plugins").glob("*.py"))]
    return {f"plugins/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file}


def write(folder: Run, entry: RerunEntry) -> Path:
    """Write the record into the folder of the re-run, in one move."""
    return folder.write(NAME, entry.model_dump_json(indent=1) + "\n")


def read(folder: Path) -> list[tuple[Path, RerunEntry]]:
    """Every record under a folder, sorted by path. Raises StoreError where there is none, or a damaged one."""
    files = sorted(folder.rglob(NAME))
    if not files:
        raise StoreError(f"{folder}: no {NAME} in it: name the folder that `leaderboard rerun` wrote into (its --out)")
    return [(file, _read(file)) for file in files]


def _read(file: Path) -> RerunEntry:
    try:
        return RerunEntry.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{file}: damaged: {where}: {first['msg']}; run `leaderboard rerun` again") from error
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror or error})") from error


def apply(found: Collected, records: Sequence[tuple[Path, RerunEntry]]) -> Collected:
    """The rows, `re-run` where a record bears them out. A seed that was given could have been known: it lifts nothing.

    Raises StoreError for a row that a record refuses.
    """
    spoken_of = {(row.cell, row.measure) for _, record in records for row in record.rows}
    agreed: dict[str, str] = {}
    refused: dict[str, tuple[Path, RowEntry]] = {}
    for file, record in records:
        for row in record.rows:
            if row.outcome == "refused":
                refused[row.bound] = file, row
            elif row.outcome == "agrees" and record.drawn:
                agreed[row.bound] = f"{sentence(row)}, episode seed {record.episode_seed}"
    scores, wrong = [], []
    for score in found.scores:
        told = score.scores is not None and (score.cell, score.measure) in spoken_of
        digest = bound(score) if told else ""  # hashing every row of a large board would take its time
        if digest in refused:
            file, row = refused[digest]
            wrong.append(
                f"{score.source.run.path}: {plain(row.cell)} {row.measure}: did not hold when it was run again: "
                f"{sentence(row)} ({file}); withdraw it in the board file"
            )
        scores.append(replace(score, rerun=agreed[digest]) if digest in agreed else score)
    if wrong:
        raise StoreError("\n".join(wrong))
    return replace(found, scores=tuple(scores))


def sentence(row: RowEntry) -> str:
    """What came out, in words."""
    if row.again is None:
        return plain(row.reason)
    claimed, again = (_figure(one) for one in (row.claimed, row.again))
    seen = f"; an excess of {row.visible:.2g} would have been seen" if row.visible else ""
    p = f", p = {row.p:.2g}" if row.outcome == "refused" and row.p is not None else ""
    code = "" if row.same_code else "; by other code or torch than the claim's"
    return f"claimed {claimed}, again {again} on {row.again.n} new episodes{p}{seen}{code}"


def _figure(one: Figure) -> str:
    bounds = f" ({one.low:.4g} to {one.high:.4g})" if one.low is not None and one.high is not None else ""
    return f"{one.value:.4g}{bounds}"
