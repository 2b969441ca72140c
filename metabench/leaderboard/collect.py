"""Runs in, plain scores and costs out: what a leaderboard is made of, each figure checked against its raw scores.

Nothing is taken as stated. A figure is made anew from its raw scores and must agree with what is stated; a result that
is handed in twice, or a training as two seeds, is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from metabench.errors import StoreError
from metabench.leaderboard.source import (
    ONE_METHOD,
    Source,
    Trust,
    algorithm_of,
    coordinates,
    finite,
    is_control,
    loaded,
    parsed_id,
    plain,
    quality,
)
from metabench.leaderboard.tried import Unlisted, count_tried, unlisted_of
from metabench.report.load import class_credit
from metabench.stats import Floats, mean_interval
from metabench.store import Measurement, Run

MISSING = "missing"  # the status of a row that is declared and has no measurement
TIMES = ("adapt_time", "train_time")
TOLERANCE = 1e-9  # between a stated figure and the one made anew, relative
Fingerprint = tuple[Any, ...]  # what equal scores of one method on one task have in common, whatever their seed


@dataclass(frozen=True)
class Training:
    """Which seed of which cell some scores are, and the run they lie in."""

    seed: int
    cell: str
    run: str

    def again(self, *, elsewhere: bool = False) -> str:
        """What to say where another seed has the same scores."""
        where = f" in {self.run}" if elsewhere else ""
        return f"the same scores as {plain(self.cell)}{where}: a seed that changes nothing is no second seed"


@dataclass(frozen=True, eq=False)
class Score:
    """One cell's quality in one run: the score of every test episode, or a status with its reason.

    `scores` (E,) is None where there is none, `telling` what the function of that name says of them; `credit` maps a
    class to its (queries, credit), where the predictions were handed in. `coordinates` are those of
    `cells.coordinates_of` with params, selection and backbone; `code` is what tells two versions of an algorithm's
    sources apart, `weights` names the file of what was trained. `rerun` says what a re-run of ours found that bears the
    score out, `copied` of which earlier result it is a copy, or nothing.
    """

    source: Source
    cell: str
    measure: str
    coordinates: Mapping[str, Any]
    code: str
    episode_seed: int | None
    episodes_hash: str = ""
    pixels: str = ""
    status: str = "ok"
    reason: str = ""
    at: str = ""
    environment: str = ""
    scores: Floats | None = None
    telling: str = ""
    credit: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    weights: str = ""
    rerun: str = ""
    copied: str = ""

    @property
    def trust(self) -> Trust:
        """How far this row is trusted."""
        if self.rerun:
            return "re-run"
        return "recomputed" if (self.cell, self.measure) in self.source.recomputed else "claimed"

    @property
    def doubt(self) -> str:
        """Why it stays claimed although its run was verified and adds up; empty where it does not."""
        return self.source.doubts.get((self.cell, self.measure), "")


@dataclass(frozen=True, eq=False)
class Cost:
    """One cell's cost in one run: a value per independent process in seconds (times), or one count."""

    source: Source
    cell: str
    measure: str
    coordinates: Mapping[str, Any]
    environment: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Collected:
    """Everything a leaderboard is made of.

    `tried` counts configurations by `tried_key`, `unlisted` holds results that no plan lists any more by
    `unlisted_key`. `remarks` say what of the runs was left out.
    """

    sources: tuple[Source, ...]
    scores: tuple[Score, ...]
    costs: tuple[Cost, ...]
    tried: Mapping[tuple[str, str, str], int]
    unlisted: Mapping[tuple[Any, ...], tuple[Unlisted, ...]]
    environments: Mapping[str, Mapping[str, Any]]
    remarks: tuple[str, ...] = ()


def collect(
    sources: Sequence[Source],
    withdrawn: Callable[[Source, str], bool] = lambda source, algorithm: False,
    *,
    besides: Sequence[Source] = (),
) -> Collected:
    """Read every run, without the rows of algorithms that `withdrawn` says were taken back.

    What was taken back still counts as tried; so do the runs `besides`, which were taken back whole.

    Raises:
        StoreError: a run is damaged, is handed in twice, states a figure that its raw scores do not give, or two seeds
            have the same scores.
    """
    scores: list[Score] = []
    costs: list[Cost] = []
    unlisted: dict[tuple[Any, ...], list[Unlisted]] = {}
    environments: dict[str, Mapping[str, Any]] = {}
    for source in sources:
        for known, one in () if loaded(source.run) else unlisted_of(source):
            unlisted.setdefault(known, []).append(one)
        environments |= source.environments
        for row in _rows(source, withdrawn):
            if isinstance(row, Score):
                scores.append(row)
            else:
                costs.append(row)
    _refuse_twice(scores)
    _refuse_repeated(scores)
    return Collected(
        sources=tuple(sources),
        scores=tuple(scores),
        costs=tuple(costs),
        tried=count_tried(sources, besides),
        unlisted={key: tuple(every) for key, every in unlisted.items()},
        environments=environments,
        remarks=tuple(
            f"{one.name}: what needs a training is left out: {said}" for one in sources if (said := loaded(one.run))
        ),
    )


def _refuse_twice(scores: Sequence[Score]) -> None:
    """The same cell with the same scores at the same second is one result, in whatever folder it lies."""
    seen: dict[tuple[str, ...], Score] = {}
    for score in scores:
        if score.scores is None or is_control(score.coordinates["algorithm"]):
            continue
        answers = score.telling or str(score.scores[0])
        other = seen.setdefault((score.cell, score.measure, score.at, score.episodes_hash, answers), score)
        if other.source is not score.source:
            raise StoreError(
                f"{score.source.run.path}: {plain(score.cell)} is the same result as in {other.source.run.path}: "
                "a result counts once; name only one of these runs, or withdraw one in the board file"
            )


def telling(scores: Floats) -> str:
    """A hash of scores that only one training gives; empty where every episode has the same, which tells nothing."""
    return "" if (scores == scores[0]).all() else hashlib.sha256(scores.tobytes()).hexdigest()


def fingerprint(cell: str, measure: str, answers: str) -> Fingerprint | None:
    """What another seed's scores (`answers`: see `telling`) must not share; None where the seed need not matter.

    It does not for what is not trained, for controls, at a first presentation (no label is known), and where every
    episode has the same score. The device is no part of it: seeds of several machines are pooled, of one training too.
    """
    known = parsed_id(cell)
    untold = not known["train_spec"] or is_control(known["algorithm"]) or measure == "accuracy_at_1"
    return None if untold or not answers else (*(known[name] for name in ONE_METHOD), measure, answers)


def seed_of(cell: str) -> int:
    """The training seed in a cell's id."""
    return int(parsed_id(cell)["seed"])


def _refuse_repeated(scores: Sequence[Score]) -> None:
    """One training handed in as two seeds would look like a method without variance, in whatever runs they lie."""
    seen: dict[Fingerprint, Training] = {}
    for score in scores:
        key = fingerprint(score.cell, score.measure, score.telling)
        if key is None:
            continue
        mine = Training(seed_of(score.cell), score.cell, str(score.source.run.path))
        first = seen.setdefault(key, mine)
        if first.seed != mine.seed:
            what = first.again(elsewhere=first.run != mine.run)
            raise StoreError(
                f"{mine.run}: {plain(score.cell)} {score.measure}: {what}; leave the run out, or withdraw the method "
                "in the board file"
            )


def _rows(source: Source, withdrawn: Callable[[Source, str], bool]) -> Iterator[Score | Cost]:
    """The rows of the plan; in a run with loaded weights, its costs and what needs no training."""
    trained = not loaded(source.run)
    for row in source.run.manifest["rows"]:
        key = row["cell"], row["measure"]
        if withdrawn(source, algorithm_of(key[0])):
            continue
        found = source.counted.get(key)
        if quality(key[1]):
            if trained or not coordinates(source.run, key[0])["train_spec"]:
                yield _score(source, row, found)
        elif found is not None and found.status == "ok" and (key[1] in TIMES or key[1] == "adapt_flops"):
            yield from _cost(source, row, found)


def _score(source: Source, row: Mapping[str, Any], found: Measurement | None) -> Score:
    run, cell, measure = source.run, row["cell"], row["measure"]
    sources = row.get("sources")
    code = sources[:12] if isinstance(sources, str) and sources else f"run {source.name}"
    evaluation = run.manifest.get("evaluation")
    seed = evaluation.get("seed") if isinstance(evaluation, dict) else None
    base = partial(
        Score,
        source=source,
        cell=cell,
        measure=measure,
        coordinates=coordinates(run, cell),
        code=code,
        episode_seed=seed if isinstance(seed, int) else None,
    )
    if found is None:
        return base(status=MISSING, reason="never measured, or not with the code that the manifest names")
    known = {**base.keywords["coordinates"], "backbone": plain(found.facts.get("backbone") or "")}
    base = partial(base, coordinates=known, at=str(found.at), environment=plain(found.environment))
    if found.status != "ok":
        return base(status=plain(found.status), reason=plain(found.reason or "no reason recorded"))
    scores, digest = check_scores(run, found)
    stated = found.facts.get("episodes_hash")
    if stated and stated != digest:
        raise StoreError(f"{_place(run, found)}: episodes_hash is {plain(stated)}, its episodes give {digest}")
    return base(
        episodes_hash=digest,
        pixels=plain(found.facts.get("pixels") or ""),
        weights=plain(found.facts.get("weights") or ""),
        scores=scores,
        telling=telling(scores),
        credit=class_credit(run, found),
    )


def check_scores(run: Run, found: Measurement) -> tuple[Floats, str]:
    """The raw scores (E,) of a finished row and the hash of its episodes.

    Raises StoreError where there are none, one is out of range, an episode comes twice, or the stated figures (n,
    value, interval, sd) are not those of the scores.
    """
    where = _place(run, found)
    raw = run.scored(found)
    if raw is None or not raw[0]:
        raise StoreError(f"{where}: no raw scores: every figure must follow from its episodes")
    if len(raw[0]) != len(raw[1]):
        raise StoreError(f"{where}: {len(raw[0])} scores for {len(raw[1])} episodes in samples.jsonl")
    try:
        scores = np.array(raw[0], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise StoreError(f"{where}: a raw score is no number") from None
    digest, wrong = _digest(raw[1])
    if wrong:
        raise StoreError(f"{where}: {wrong}")
    bound = 1.0 if "accuracy" in found.measure else math.inf
    within = scores.ndim == 1 and scores.min() >= 0 and (most := scores.max()) <= bound and most < math.inf
    if not within:  # NaN is neither above nor below
        raise StoreError(f"{where}: a raw score is not finite or out of range")
    _agree(where, found, scores)
    return scores, digest


@lru_cache(maxsize=256)
def _digest(episodes: tuple[str, ...]) -> tuple[str, str]:
    """The hash of a list of episodes, which many rows share, and what is wrong with it, or nothing."""
    digest = hashlib.sha256("".join(episodes).encode("utf-8", "backslashreplace")).hexdigest()[:12]
    if not all(episodes):  # the hash of a list does not see it
        return digest, "an episode has an empty name in samples.jsonl"
    twice = len(set(episodes)) != len(episodes)
    return digest, f"an episode stands twice among the {len(episodes)}" if twice else ""


def _agree(where: str, found: Measurement, scores: Floats) -> None:
    """Raise StoreError unless n, value, sd and interval are those of the scores."""
    if found.n != len(scores):
        raise StoreError(f"{where}: n is {found.n!r}, samples.jsonl has {len(scores)} scores")
    anew = mean_interval(scores)
    for name, value in (("value", anew.value), ("sd", anew.sd), ("ci_low", anew.low), ("ci_high", anew.high)):
        agree(where, name, getattr(found, name), value, optional=name != "value")


def agree(where: str, name: str, stated: object, value: float | None, *, optional: bool = False) -> None:
    """Raise StoreError unless a stated figure is the one made anew; an optional one may be absent."""
    if stated is None and (optional or value is None):
        return
    number = finite(stated)
    if value is None or number is None or abs(number - value) > TOLERANCE * max(1e-3, abs(value)):
        raise StoreError(f"{where}: {name} is stated as {plain(stated)}, the raw samples give {value}")


def _place(run: Run, found: Measurement) -> str:
    return f"{run.path}/measurements.jsonl: {plain(found.cell)} {plain(found.measure)}"


def _cost(source: Source, row: Mapping[str, Any], found: Measurement) -> Iterator[Cost]:
    known = coordinates(source.run, row["cell"])
    if known["call"]:
        return  # timed in another way than scored: several tasks a call, other steps or threads
    if row["measure"] not in TIMES and found.value == 0:
        return  # a method that counts no operation to adapt has no place on an axis of factors
    processes = found.facts.get("processes")
    stated = processes if isinstance(processes, list) and processes else [found.value]
    values = tuple(number for value in stated if (number := finite(value)) is not None and number > 0)
    if len(values) != len(stated):
        raise StoreError(f"{_place(source.run, found)}: a time or a count must be a finite number above 0")
    yield Cost(source, row["cell"], row["measure"], known, plain(found.environment), values)
