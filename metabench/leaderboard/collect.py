"""Runs in, plain scores and costs out: the one place where a leaderboard reads a disk, and trusts nothing it reads.

Result files come from anybody. What stands in a cell's id is taken from there and must agree with the manifest; a
figure is made anew from its raw scores and must agree with what is stated; text is text, whatever it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metabench.cells import coordinates_of
from metabench.errors import ConfigError, StoreError
from metabench.report.load import class_credit
from metabench.report.model import CONTROLS
from metabench.stats import Floats, mean_interval
from metabench.store import FINAL, NOT_HERE, Key, Measurement, Run, parsed

Trust = Literal["claimed", "recomputed", "re-run"]
SUBMISSION = "submission.json"
LOCAL = ""  # the submitter of a run without a submission file: whoever builds the board
MAINTAINERS = "this board's maintainers"  # that submitter in words: nobody else may take the name
STATED = ("cell", "algorithm", "dataset", "split", "rotations", "within", "ways", "shots", "queries", "stream", "norm",
          "bn_mode", "device", "precision", "seed", "train_spec")  # fmt: skip
TIMES = ("adapt_time", "train_time")
TOLERANCE = 1e-9  # between a stated figure and the one made anew, relative


_Tried = dict[
    tuple[str, str, str], dict[tuple[str, str], dict[Key, set[str]]]
]  # by row, the hashes it was scored under
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
class Source:
    """One run as it was handed in: its folder, who sent it, and what became of verifying it.

    `recomputed` are the results that were shown to follow from answers and test episodes: no other result is called
    so. `doubts` are results of a verified run that were not, each with the reason.
    """

    run: Run
    submitter: str
    recomputed: frozenset[Key] = frozenset()
    doubts: Mapping[Key, str] = field(default_factory=dict)

    @property
    def trust(self) -> Trust:
        """How far the run as a whole is trusted: no further than any of its results."""
        results = [key for key, one in self.counted.items() if one.status == "ok" and quality(key[1])]
        return "recomputed" if results and self.recomputed.issuperset(results) else "claimed"

    @property
    def name(self) -> str:
        """The run's name as shown."""
        return plain(self.run.name)

    @cached_property
    def measured(self) -> dict[Key, Measurement]:
        """Its measurements, read once. Raises StoreError, naming the row, for a field that is not of its type."""
        return measured(self.run)

    @cached_property
    def counted(self) -> dict[Key, Measurement]:
        """Of those the ones that count: see the function of that name."""
        return counted(self.run, self.measured)


@dataclass(frozen=True, eq=False)
class Score:
    """One cell's quality in one run: the score of every test episode, or a status with its reason.

    `scores` (E,) is None where there is none; `credit` maps a class to its (queries, credit), where the predictions
    were handed in. `coordinates` are those of `cells.coordinates_of` with params, selection and backbone; `code` is
    what tells two versions of an algorithm's sources apart, `weights` names the file of what was trained. `rerun` says
    what a re-run of ours found that bears the score out, `copied` of which earlier result it is a copy, or nothing.
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
class Unlisted:
    """A result that was measured and that its run's plan lists no more: which seed it was, and what became of it."""

    seed: int
    status: str


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


def plain(text: object, limit: int = 300) -> str:
    """Text of others as one line that plays no tricks: no control characters, none that turn the writing around."""
    shown = str(text)
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(" " if c in "\n\t\r" else c if _harmless(c) else "\ufffd" for c in shown)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _harmless(char: str) -> bool:
    return char.isprintable() and unicodedata.category(char) != "Cf"


def source_of(run: Run) -> Source:
    """A run as a source. Raises StoreError where its manifest does not hold together or a file of it is a link."""
    for name in ("manifest.json", "measurements.jsonl", "samples.jsonl", "environment.json"):
        regular(run, name)
    check_manifest(run)
    return Source(run, submitter_of(run))


def regular(run: Run, name: str) -> Path | None:
    """The file of that name inside the run's folder, or None where there is none.

    Raises StoreError for a link or anything else that is no plain file inside it: a run folder of others must not make
    us read, or publish, our own files.
    """
    file = run.path / name
    if not file.exists() and not file.is_symlink():
        return None
    if file.is_symlink() or not file.is_file() or run.path not in file.resolve().parents:
        raise StoreError(f"{file}: not a plain file of the run; links are not followed")
    return file


def submitter_of(run: Run) -> str:
    """Who handed the run in, as its submission file says; empty for a run of our own. Raises StoreError if damaged."""
    file = regular(run, SUBMISSION)
    if file is None:
        return LOCAL
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["submitter"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{file}: cannot be read ({error}); make the bundle again") from error
    if not isinstance(name, str) or not name.strip():
        raise StoreError(f"{file}: the submitter must be a name")
    if reserved(name):
        raise StoreError(f"{file}: the submitter {plain(name.strip(), 80)!r} is reserved for whoever builds a board")
    return plain(name.strip(), 80)


def reserved(submitter: str) -> bool:
    """Whether a name reads like the one that stands for whoever builds a board."""
    words = unicodedata.normalize("NFKC", submitter).casefold().replace("\u2019", "'").split()
    return " ".join(words) == MAINTAINERS


def loaded(run: Run) -> str:
    """What to say of a run that loaded another's weights, as its manifest has it; empty for one that trained."""
    origin = run.manifest.get("weights")
    if not origin:
        return ""
    name = plain(origin, 100)
    return (
        f"its weights are those of {name}, loaded (metabench run --weights): nothing was trained, and a training "
        f"counts once; name {name} instead"
    )


def check_manifest(run: Run) -> None:
    """Raise StoreError, naming the place, where a manifest's cells and rows are not what reading relies on."""
    file = run.path / "manifest.json"
    cells, rows = run.manifest["cells"], run.manifest["rows"]
    if not isinstance(cells, dict) or not isinstance(rows, list):
        raise StoreError(f"{file}: cells must be a mapping and rows a list; the run is damaged")
    seen: set[Key] = set()
    for number, row in enumerate(rows):
        where = f"{file}: rows[{number}]"
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("cell", "measure", "hash")):
            raise StoreError(f"{where}: a row has a cell, a measure and a hash, all text; the run is damaged")
        key = row["cell"], row["measure"]
        if key in seen:
            raise StoreError(f"{where}: {key[0]} {key[1]} is listed twice; keep one of the rows")
        if not isinstance(cells.get(key[0]), dict):
            raise StoreError(f"{where}: its cell {plain(key[0])} is not among the manifest's cells")
        seen.add(key)


MISSING = "missing"  # the status of a row that is declared and has no measurement
TEXTS = ("cell", "measure", "status", "reason", "unit", "hash", "environment", "at")
NUMBERS = ("n", "value", "ci_low", "ci_high", "sd", "samples")


def measured(run: Run) -> dict[Key, Measurement]:
    """The run's measurements. Raises StoreError, naming the row, for a field that is not of its type."""
    file = run.path / "measurements.jsonl"
    try:
        found = run.measurements()
    except (TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"{file}: damaged: a row's pointer into samples.jsonl is no position ({error})") from error
    for one in found.values():
        wrong = [f"{name} is of a wrong type" for name in TEXTS if not isinstance(getattr(one, name), str)]
        wrong += [f"{name} is no finite number" for name in NUMBERS if not _optional_number(getattr(one, name))]
        wrong += [] if isinstance(one.facts, dict) else ["facts is of a wrong type"]
        if wrong:
            raise StoreError(f"{file}: {plain(one.cell)} {plain(one.measure)}: {wrong[0]}")
    if not isinstance(run.environments(), dict):
        raise StoreError(f"{run.path / 'environment.json'}: must be a mapping of machines; the run is damaged")
    return found


def counted(run: Run, last: Mapping[Key, Measurement]) -> dict[Key, Measurement]:
    """Of each row of the plan its measurement in `last`, if it was made as the plan says (by its hash).

    A row that was skipped for want of a device has a hash of its own. Nothing else may have it: a number under that
    hash was made nobody knows how.
    """
    found: dict[Key, Measurement] = {}
    for row in run.manifest["rows"]:
        one = last.get((row["cell"], row["measure"]))
        if one and (one.hash == row["hash"] or (one.hash == NOT_HERE and one.status == "skipped")):
            found[one.key] = one
    return found


def lines(run: Run) -> Iterator[Mapping[str, Any]]:
    """Every whole line of measurements.jsonl, also of earlier measurements. Raises StoreError if one is damaged."""
    file = run.path / "measurements.jsonl"
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.is_file() else [], 1):
        try:
            record = parsed(line)
        except ValueError as error:
            raise StoreError(f"{file}:{number}: damaged line ({error}); delete that line to go on") from error
        if isinstance(record, dict):
            yield record


def algorithm_of(cell: str) -> str:
    """The algorithm's name in a cell's id, or in whatever stands in its place."""
    return re.split(r"[\[/]", cell, maxsplit=1)[0]


def finite(value: object) -> float | None:
    """A number as a float; None for what is no number, is not finite, or is larger than any float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _optional_number(value: object) -> bool:
    return value is None or finite(value) is not None


def coordinates(run: Run, cell: str) -> dict[str, Any]:
    """A cell's coordinates: from its id, with what only the manifest knows. Raises StoreError where they disagree."""
    stated = run.manifest["cells"][cell]
    try:
        found = {"cell": cell, **_parsed_id(cell)}
    except ConfigError as error:
        raise StoreError(f"{run.path / 'manifest.json'}: {error}") from error
    for name in STATED:
        # a run of an earlier version states fewer of them, and a stream's shots and queries as none
        if name in stated and stated[name] != found[name] and _unlike(stated[name], found[name]):
            raise StoreError(
                f"{run.path / 'manifest.json'}: cell {plain(cell)}: {name} is {plain(stated[name])!r} there, "
                f"{found[name]!r} in the cell's id"
            )
    if found["ways"] == 1:
        raise StoreError(
            f"{run.path / 'manifest.json'}: cell {plain(cell)}: a task of one way has nothing to tell apart: "
            "ways are 2 or more"
        )
    known = {name: stated.get(name) or "" for name in ("params", "selection")}
    if not all(isinstance(value, str) for value in known.values()):
        raise StoreError(f"{run.path / 'manifest.json'}: cell {plain(cell)}: params and selection must be text")
    return {**found, **known}


@lru_cache(maxsize=16384)
def _parsed_id(cell: str) -> Mapping[str, Any]:
    """The coordinates in a cell's id, which many runs have; never to be changed."""
    return coordinates_of(cell)


def _unlike(stated: object, found: object) -> bool:
    return (stated or None) != (found or None) and not (stated == 0 and found == 0)


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
        for known, one in () if loaded(source.run) else _unlisted(source):
            unlisted.setdefault(known, []).append(one)
        environments |= {name: facts for name, facts in source.run.environments().items() if isinstance(facts, dict)}
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
        tried=_tried(sources, besides),
        unlisted={key: tuple(every) for key, every in unlisted.items()},
        environments=environments,
        remarks=tuple(
            f"{one.name}: what needs a training is left out: {said}" for one in sources if (said := loaded(one.run))
        ),
    )


def quality(measure: str) -> bool:
    """Whether a measure may head a board: accuracy, that at a presentation, or the error; never that on validation."""
    return measure in ("accuracy", "mse") or measure.startswith("accuracy_at_")


def _refuse_twice(scores: Sequence[Score]) -> None:
    """The same cell with the same scores at the same second is one result, in whatever folder it lies."""
    seen: dict[tuple[str, ...], Score] = {}
    for score in scores:
        if score.scores is None or is_control(score.coordinates["algorithm"]):
            continue
        digest = hashlib.sha256(score.scores.tobytes()).hexdigest()
        other = seen.setdefault((score.cell, score.measure, score.at, score.episodes_hash, digest), score)
        if other.source is not score.source:
            raise StoreError(
                f"{score.source.run.path}: {plain(score.cell)} is the same result as in {other.source.run.path}: "
                "a result counts once; name only one of these runs, or withdraw one in the board file"
            )


def fingerprint(cell: str, measure: str, scores: Floats) -> Fingerprint | None:
    """What another seed's scores must not share; None where the seed need not matter.

    It does not for what is not trained, for controls, at a first presentation (no label is known), and where every
    episode has the same score. The device is no part of it: seeds of several machines are pooled, of one training too.
    """
    known = _parsed_id(cell)
    untold = not known["train_spec"] or is_control(known["algorithm"]) or measure == "accuracy_at_1"
    if untold or np.ptp(scores) == 0:
        return None
    names = ("trained", "data", "ways", "shots", "queries", "stream", "norm", "precision")
    return (*(known[name] for name in names), measure, hashlib.sha256(scores.tobytes()).hexdigest())


def seed_of(cell: str) -> int:
    """The training seed in a cell's id."""
    return int(_parsed_id(cell)["seed"])


def _refuse_repeated(scores: Sequence[Score]) -> None:
    """One training handed in as two seeds would look like a method without variance, in whatever runs they lie."""
    seen: dict[Fingerprint, Training] = {}
    for score in scores:
        key = None if score.scores is None else fingerprint(score.cell, score.measure, score.scores)
        if score.scores is None or key is None:
            continue
        mine = Training(seed_of(score.cell), score.cell, str(score.source.run.path))
        first = seen.setdefault(key, mine)
        if first.seed != mine.seed:
            what = first.again(elsewhere=first.run != mine.run)
            raise StoreError(
                f"{mine.run}: {plain(score.cell)} {score.measure}: {what}; leave the run out, or withdraw the method "
                "in the board file"
            )


def _tried(sources: Iterable[Source], besides: Iterable[Source]) -> dict[tuple[str, str, str], int]:
    """How many configurations were scored, by `tried_key`: settings, each as often as it has versions.

    Every line counts, whether or not the manifest still lists its row. Versions of code and protocol are told apart by
    the hashes of one and the same row, since a hash covers the seed too.
    """
    hashes: _Tried = {}
    for source in sources:
        _note_tried(hashes, source)
    for source in besides:
        with contextlib.suppress(StoreError):  # it was taken back, perhaps for this very damage
            _note_tried(hashes, source)
    return {
        who: sum(max(map(len, versions.values())) for versions in settings.values()) for who, settings in hashes.items()
    }


def _note_tried(hashes: _Tried, source: Source) -> None:
    trained = not loaded(source.run)
    for line in lines(source.run):
        key = str(line.get("cell")), str(line.get("measure"))
        known = _known(key[0]) if quality(key[1]) and line.get("status") == "ok" else None
        if known is None or (known["train_spec"] and not trained):
            continue
        settings = hashes.setdefault(tried_key(source.submitter, known), {})
        versions = settings.setdefault((str(known["trained"]), str(known["norm"])), {})
        versions.setdefault(key, set()).add(str(line.get("hash")))


def _known(cell: str) -> Mapping[str, Any] | None:
    """The coordinates in a cell's id; None for what is no id, in lines that the plan does not list."""
    try:
        return _parsed_id(cell)
    except ConfigError:
        return None


def tried_key(submitter: str, known: Mapping[str, Any]) -> tuple[str, str, str]:
    """The key of `Collected.tried` for a cell's coordinates."""
    task = f"{known['data']} {known['ways']} {known['shots']} {known['queries']} {known['stream']}"
    return submitter, str(known["algorithm"]), task


def unlisted_key(submitter: str, known: Mapping[str, Any], measure: str) -> tuple[Any, ...]:
    """The key of `Collected.unlisted` for a cell's coordinates: whose seeds of one method on one task they are."""
    names = ("trained", "data", "ways", "shots", "queries", "stream", "norm", "precision")
    return (submitter, *(known[name] for name in names), measure)


def _unlisted(source: Source) -> Iterator[tuple[tuple[Any, ...], Unlisted]]:
    """Results of quality that were measured, and that the plan lists no more."""
    planned = {(row["cell"], row["measure"]) for row in source.run.manifest["rows"]}
    for key, one in source.measured.items():
        known = _known(key[0]) if key not in planned and quality(key[1]) and one.status != "skipped" else None
        if known is not None:
            yield unlisted_key(source.submitter, known, key[1]), Unlisted(known["seed"], plain(one.status, 40))


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
    if not all(raw[1]):  # the hash of a list does not see it
        raise StoreError(f"{where}: an episode has an empty name in samples.jsonl")
    digest = _digest(raw[1])
    if digest is None:
        raise StoreError(f"{where}: an episode stands twice among the {len(raw[1])}")
    bound = 1.0 if "accuracy" in found.measure else math.inf
    if scores.ndim != 1 or not (0 <= scores.min() <= scores.max() <= bound and scores.max() < math.inf):  # NaN: neither
        raise StoreError(f"{where}: a raw score is not finite or out of range")
    _agree(where, found, scores)
    return scores, digest


@lru_cache(maxsize=256)
def _digest(episodes: tuple[str, ...]) -> str | None:
    """The hash of a list of episodes, which many rows share; None where one stands twice."""
    if len(set(episodes)) != len(episodes):
        return None
    return hashlib.sha256("".join(episodes).encode("utf-8", "backslashreplace")).hexdigest()[:12]


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


def unfinished(score: Score) -> bool:
    """Whether a row was tried and has no result, for another reason than that the method cannot do the task."""
    return score.status not in FINAL


def is_control(algorithm: str) -> bool:
    """Whether a method is one of ours that only gives the scale; what a result file says of it does not count."""
    return algorithm in CONTROLS
