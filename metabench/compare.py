"""Stored results against stored results: one verdict per row, and how small a change the comparison could have seen.

What may be claimed depends on what was kept equal. Scores are compared on the same test episodes. Where the trained
weights are the same too, the episode is the unit (the `adapt` gate); where two trainings are compared, the training
seed is (the `train` gate), since two seeds of one method differ significantly on paired episodes more often than not:
fewer than five seeds a side, and above all one retrained pair, decide nothing. Times count only within one stable
environment whose control rows held still: two runs are not sampled side by side, so their processes are never
paired. Counts are what they are, anywhere.

A row regressed where the hypothesis that it became worse by no more than its margin is rejected, by Holm's procedure
over all tested rows at a family-wise `ALPHA`; a gain likewise. It is unchanged where the 95 % interval stays within the
bound. Neither means inconclusive.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from metabench import stats
from metabench.cells import KERNEL_MEASURES, in_seconds
from metabench.disk import Ints, read_predictions
from metabench.environment import VOLATILE
from metabench.errors import ConfigError, NothingRan, StoreError
from metabench.joint import faster, join, method_of
from metabench.sides import Floats, Result, Scores, Side, load
from metabench.stats import Source
from metabench.thresholds import Kind, Margin, Thresholds, check_kinds, kind_of
from metabench.verdicts import Absent, Findings, Scale, Verdict, of_counts

ALPHA = 0.01  # family-wise, over all rows of a comparison and for each direction
TAIL = 0.025  # one side of the 95 % intervals shown
POWER = 0.8
TRAIN_SEEDS = 5
DRIFT = 0.02  # of a control row: beyond it the machine was another one
GRAIN = 2.0**20  # bytes: peaks of one code on a CPU differed by up to 0.31 MB between two runs
SCALES: Mapping[Kind, Scale] = {
    "time": "ratio",
    "memory": "ratio",
    "accuracy": "points",
    "mse": "error",
    "counts": "exact",
}
NOT_COMPARED = frozenset({"mse_before"})  # where adaptation starts from is no result
_SEED = re.compile(r"/seed\d+(?=/|$)")


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A row on its way to a verdict: how it changed for the worse, on the scale of the test.

    The scale is that of the verdict, but the logarithm of ratios. `held` says why the row must stay inconclusive
    whatever its numbers say.
    """

    verdict: Verdict
    worse_by: float
    margin: float
    bound: float
    sources: tuple[Source, ...]
    held: str = ""


def compare(
    baseline: Sequence[Path],
    candidate: Sequence[Path],
    *,
    select: str = "",
    kinds: Collection[str] = (),
    margins: Mapping[str, str] = MappingProxyType({}),
    across_machines: bool = False,
) -> Findings:
    """The candidate's stored results against the baseline's; both are run folders, folders of runs, or results.csv.

    `select`: only rows whose 'cell/measure' holds all of these words; `kinds`: only measures of these kinds, all where
    none is named. `margins` by kind ("5 points") go before those that a row's suite declares, the candidate's.
    `across_machines` compares times of unlike machines as well: the numbers then speak of the machines as much as of
    the code.

    Raises:
        StoreError: no results there, or damaged ones.
        ConfigError: results of two different suites; no such kind of measure or margin.
        NothingRan: no row of the baseline is left to compare, or none of it is in the candidate.
    """
    check_kinds(kinds)
    base, new = (_only(load(side, select=select), kinds) for side in (baseline, candidate))
    _check_sides(base, new, " ".join([select, *kinds]).strip())
    thresholds = {suite: Thresholds.of(new.thresholds.get(suite, {})).under(margins) for suite in new.suites}
    tested: list[Tested | Verdict] = []
    for pairs in _paired_rows(base, new):
        cell = _pooled_name([b for b, _ in pairs])
        row = pairs[0][1]
        margin = thresholds[row.text("suite")].margin(row.cell, row.text("algorithm"), row.measure)
        tested.append(_judge(cell, pairs, margin, across_machines))
    verdicts = decide(tested)
    found = Findings(
        title=f"{new.name} against {base.name}",
        verdicts=tuple(verdicts),
        joint=tuple(join(verdicts, _changed_by_method(base, new, faster(verdicts)))),
        absent=tuple(_absent(base, new)),
        notes=(*_notes(base, new, tested), *_given(margins)),
    )
    if not tested and not found.failed:
        _raise_nothing(base, new)
    return found


def decide(tested: Iterable[Tested | Verdict]) -> list[Verdict]:
    """The verdicts of rows under test, Holm's procedure over all of them; those that are verdicts already stay."""
    rows = list(tested)
    family = [row for row in rows if isinstance(row, Tested) and not row.held and row.sources]
    worse = stats.holm([stats.tail_probability(row.worse_by - row.margin, row.sources) for row in family])
    better = stats.holm([stats.tail_probability(-row.worse_by - row.margin, row.sources) for row in family])
    found = {id(row): (p, q) for row, p, q in zip(family, worse, better, strict=True)}
    return [
        row if isinstance(row, Verdict) else _verdict(row, *found.get(id(row), (1.0, 1.0)), tests=len(family) or 1)
        for row in rows
    ]


def _verdict(row: Tested, worse: float, better: float, *, tests: int) -> Verdict:
    """The verdict of one row, given its adjusted p-values."""
    made = row.verdict
    if row.sources:
        half = stats.half_width(row.sources, tail=TAIL)
        change = made.worse * row.worse_by
        seen = row.margin + stats.half_width(row.sources, tail=ALPHA / tests)
        seen += stats.half_width(row.sources, tail=1 - POWER)
        to = _shown(made.scale)
        made = replace(made, low=to(change - half), high=to(change + half), detectable=to(seen))
        sure = row.worse_by + half < row.bound
    else:
        half, sure = math.inf, False
    if row.held:
        return replace(made, outcome="inconclusive", reason=row.held)
    if worse < ALPHA:
        return replace(made, outcome="regressed", small=sure)
    if better < ALPHA:
        return replace(made, outcome="improved", small=-row.worse_by + half < row.bound)
    if sure:
        open_end = row.worse_by - half <= -row.bound
        return replace(made, outcome="unchanged", reason=_both(made.reason, "a gain is not excluded" * open_end))
    return replace(made, outcome="inconclusive", reason=_both(made.reason, "the interval is too wide to decide"))


def _shown(scale: Scale) -> Callable[[float], float]:
    """From the scale of the test to that of the verdict."""
    if scale != "ratio":
        return float
    return lambda value: math.expm1(value) if value < 700 else math.inf


def _both(first: str, second: str) -> str:
    return "; ".join(part for part in (first, second) if part)


# which rows belong together


def _only(side: Side, kinds: Collection[str]) -> Side:
    if not kinds:
        return side
    return replace(side, rows={key: row for key, row in side.rows.items() if kind_of(row.measure) in kinds})


def _check_sides(base: Side, new: Side, select: str) -> None:
    for side in (base, new):
        if not side.rows:
            words = f" whose 'cell/measure' holds all of {select!r}" if select else ""
            raise NothingRan(f"{side.name}: no measured row{words}; nothing to compare")
    if set(base.suites).isdisjoint(new.suites):
        raise ConfigError(
            f"{base.name} is of suite {', '.join(base.suites)}, {new.name} of {', '.join(new.suites)}: "
            "compare results of one suite"
        )


def _raise_nothing(base: Side, new: Side) -> None:
    ok = [sum(row.status == "ok" for row in side.rows.values()) for side in (base, new)]
    raise NothingRan(
        f"nothing to compare: {base.name} has {ok[0]} finished rows, {new.name} {ok[1]}, and none in common"
    )


def _ok(side: Side) -> dict[tuple[str, str], Result]:
    return {key: row for key, row in side.rows.items() if row.status == "ok" and row.measure not in NOT_COMPARED}


def _paired_rows(base: Side, new: Side) -> list[list[tuple[Result, Result]]]:
    """The rows that both sides have, (base's, candidate's): seeds of one quality together, costs each alone."""
    before, after = _ok(base), _ok(new)
    groups: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for key, row in before.items():
        if key in after:
            whole = row.cell if row.measure in KERNEL_MEASURES else _SEED.sub("", row.cell)
            groups.setdefault((whole, row.measure), []).append((row, after[key]))
    return [sorted(pairs, key=lambda pair: pair[0].seed) for pairs in groups.values()]


def _pooled_name(rows: Sequence[Result]) -> str:
    """The cell's id; of several seeds '.../seeds0-4'."""
    if len(rows) == 1:
        return rows[0].cell
    runs = groupby(enumerate(row.seed for row in rows), key=lambda item: item[1] - item[0])
    spans = [[seed for _, seed in group] for _, group in runs]
    text = ",".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ",".join(map(str, span)) for span in spans)
    return _SEED.sub(f"/seeds{text}", rows[0].cell)


def _absent(base: Side, new: Side) -> Iterable[Absent]:
    """Rows without a verdict: missing and failed ones first, then new ones."""
    for key, row in base.rows.items():
        if row.status != "ok" or row.measure in NOT_COMPARED:
            continue
        found = new.rows.get(key)
        if found is None:
            yield Absent(cell=row.cell, measure=row.measure, status="missing", reason="the candidate has no such row")
        elif found.status != "ok" and not _untimed(found):
            status = "missing" if found.status == "skipped" else found.status
            yield Absent(cell=row.cell, measure=row.measure, status=status, reason=found.reason)
    for key, row in new.rows.items():
        before = base.rows.get(key)
        if (before is not None and before.status == "ok") or row.measure in NOT_COMPARED:
            continue
        if row.status == "ok":
            yield Absent(cell=row.cell, measure=row.measure, status="new", reason="only the candidate has it")
        elif not _no_news(before, row):
            yield Absent(cell=row.cell, measure=row.measure, status=row.status, reason=row.reason)


def _no_news(before: Result | None, after: Result) -> bool:
    """Whether a row without a result in the candidate was none before: it failed there too, or it is only skipped."""
    return after.status == "skipped" or (before is not None and before.status not in ("ok", "skipped"))


def _given(margins: Mapping[str, str]) -> Iterable[str]:
    if margins:
        yield f"margins as asked for here: {', '.join(f'{kind} {margin}' for kind, margin in margins.items())}"


def _untimed(row: Result) -> bool:
    """Whether a row is the time of a training that never was: the weights were loaded, as somebody asked."""
    return row.measure == "train_time" and row.status == "skipped" and bool(row.text("weights"))


def _notes(base: Side, new: Side, tested: Sequence[Tested | Verdict]) -> Iterable[str]:
    yield from (*base.notes, *new.notes)
    both_have = set(base.suites) & set(new.suites)
    if any(base.thresholds.get(suite, {}) != new.thresholds.get(suite, {}) for suite in both_have):
        yield "the two sides declare different thresholds: the candidate's hold"
    family = sum(isinstance(row, Tested) and bool(row.sources) and not row.held for row in tested)
    if family:
        yield (
            f"{family} rows tested: false alarms at most {ALPHA:.0%} over all of them (Holm); intervals at 95 %, "
            f"each for itself; could see: the change found with {POWER:.0%} power"
        )
    if untimed := sum(_untimed(row) for row in new.rows.values()):
        yield f"the candidate loaded weights instead of training: {untimed} training times are not compared"
    both = [(row, new.rows[key]) for key, row in base.rows.items() if row.status != "ok" and key in new.rows]
    if left := sum(after.status != "ok" and _no_news(before, after) for before, after in both):
        yield f"{left} rows have no result on either side"


# one row


def _judge(cell: str, pairs: Sequence[tuple[Result, Result]], margin: Margin, across: bool) -> Tested | Verdict:
    measure = pairs[0][0].measure
    kind = kind_of(measure)
    made = Verdict(
        cell=cell,
        measure=measure,
        outcome="inconclusive",
        scale=SCALES[kind],
        worse=-1 if kind == "accuracy" else 1,
        margin=margin.margin,
    )
    if kind in ("accuracy", "mse"):
        return _quality(made, pairs, margin)
    if kind == "time":
        return _time(made, pairs, margin, across)
    return _count(made, *pairs[0])


def _count(made: Verdict, before: Result, after: Result) -> Verdict:
    """Counts are exact; a peak of memory repeats to within its margin, and to `GRAIN` where the system counts it."""
    a, b = float(before.value or 0.0), float(after.value or 0.0)
    if made.scale == "ratio" and before.text("device") == "cpu" and a > 0:
        made = replace(made, margin=max(made.margin, GRAIN / a))
    found = of_counts(made, a, b)
    if before.environment != after.environment and b != a:
        found = replace(found, reason=f"{found.reason}; {_differ(before, after)}")
    if found.scale == "exact":
        return found
    if a <= 0:
        return replace(made, outcome="incomparable", change=None, reason=f"{found.reason}: no ratio to a peak of 0")
    return replace(found, change=b / a - 1, margin=made.margin, detectable=made.margin)


# times


def _time(made: Verdict, pairs: Sequence[tuple[Result, Result]], margin: Margin, across: bool) -> Tested | Verdict:
    """A kernel's time over processes, or the time of trainings over their seeds."""
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    for before, after in pairs:
        if in_seconds(before.text("train_spec")) and made.measure == "train_time":
            return replace(made, outcome="incomparable", reason="the budget of the training is its wall time")
        if before.environment != after.environment and not across:
            return replace(made, outcome="incomparable", reason=_differ(before, after))
    try:
        first, second = (_log_time(rows) for rows in sides)
    except ValueError:
        return replace(made, outcome="incomparable", reason="a time that is not above 0")
    ratio = second[0] - first[0]
    made = replace(made, change=math.expm1(ratio))
    if first[1] is None or second[1] is None:
        what = "training" if made.measure == "train_time" else "process"
        return replace(made, reason=f"one {what} on a side gives no interval")
    elsewhere = next((pair for pair in pairs if pair[0].environment != pair[1].environment), None)
    return Tested(
        verdict=replace(made, reason=_differ(*elsewhere) if elsewhere else ""),
        worse_by=ratio,
        margin=math.log1p(margin.margin),
        bound=math.log1p(margin.unchanged),
        sources=(first[1], second[1]),
        held="" if elsewhere else next(filter(None, (_drift(*pair) for pair in pairs)), ""),
    )


def _log_time(rows: Sequence[Result]) -> tuple[float, Source | None]:
    """The logarithm of a time, and its error: over processes, or over the trainings of several seeds."""
    row, values = rows[0], [float(row.value or 0.0) for row in rows]
    if len(rows) > 1:
        found = stats.median_interval(values)
        value, low, high, n = found.value, found.low, found.high, found.n
    else:
        value, low, high, n = values[0], row.ci_low, row.ci_high, row.n or 1
    if low is None or high is None or n < 2:
        return math.log(value), None
    if low <= 0:
        raise ValueError("a time that may be 0 has no ratio")
    quantile = stats.half_width([Source(1.0, n - 1)], tail=TAIL)
    return math.log(value), Source(math.log(high / low) / 2 / quantile, n - 1)


def _drift(before: Result, after: Result) -> str:
    """Why these times cannot be trusted: the control rows moved, or there are none. Empty where they held still."""
    old, new = before.controls(), after.controls()
    moved = [(statistics.median(new[name]) / statistics.median(old[name]) - 1, name) for name in old if name in new]
    if not moved:
        return "no control rows in both runs: the machine's own drift between them is unknown"
    worst, name = max(moved, key=lambda one: abs(one[0]))
    if abs(worst) <= DRIFT:
        return ""
    return f"contaminated: the control {name} itself moved by {worst:+.1%} between the runs"


def _differ(before: Result, after: Result) -> str:
    """In words, what is not the same about two environments."""
    a, b = before.machine(), after.machine()
    names = [name for name in (*a, *b) if name not in VOLATILE and a.get(name) != b.get(name)]
    if not a or not b or not names:
        return f"another machine or software ({before.environment or 'unknown'}, {after.environment or 'unknown'})"
    parts = []
    for name in dict.fromkeys(names):
        old, new = a.get(name), b.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            parts += [f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
        else:
            parts.append(f"{name} {old} -> {new}")
    return f"another machine or software: {', '.join(parts[:4])}{' ...' if len(parts) > 4 else ''}"


# quality


def _quality(made: Verdict, pairs: Sequence[tuple[Result, Result]], margin: Margin) -> Tested | Verdict:
    """Accuracy or error on the episodes that both sides scored."""
    if reason := next(filter(None, (_unlike(*pair) for pair in pairs)), ""):
        return replace(made, outcome="incomparable", reason=reason)
    scored = [(before.scores(), after.scores()) for before, after in pairs]
    kept = [(before, after) for before, after in scored if before is not None and after is not None]
    if len(kept) < len(scored):
        means = [float(np.mean([pair[side].value or 0.0 for pair in pairs])) for side in (0, 1)]
        change = _relative(means[1] - means[0], means[0], made.scale)
        why = "no scores of single episodes: give the run's folder, or keep episodes.csv beside results.csv"
        return replace(made, change=change, reason=why)
    old, new = _on_shared_episodes(kept)
    count = old.shape[1]
    if count == 0:
        return replace(made, outcome="incomparable", reason="no test episode in common")
    if np.array_equal(old, new):
        found = [_changed_predictions(*pair, *both) for pair, both in zip(pairs, kept, strict=True)]
        same = [None if one is None else one.changed == 0 for one in found]
        if False not in same:
            reason = f"identical {'predictions' if all(same) else 'scores'} on {count} episodes"
            return replace(made, outcome="unchanged", reason=reason, change=0.0, low=0.0, high=0.0, detectable=0.0)
    return _on_episodes(made, pairs, old, new, margin)


def _on_episodes(
    made: Verdict, pairs: Sequence[tuple[Result, Result]], old: Floats, new: Floats, margin: Margin
) -> Tested | Verdict:
    """The verdict on scores (S seeds, E episodes) of both sides; the unit is what was drawn anew."""
    mean = float(old.mean())
    gap = float(new.mean()) - mean
    change = _relative(gap, mean, made.scale)
    if change is None:
        return replace(made, outcome="incomparable", reason="the baseline's error is 0")
    # of a ratio of means: the differences from the line through both (the delta method)
    differences = new - old if made.scale == "points" else (new - (1 + change) * old) / mean
    (seeds, episodes), held = old.shape, ""
    sources: tuple[Source, ...] = ()
    if _gate(pairs) == "adapt":
        reason = f"adapt gate: same weights, {episodes} paired episodes"
        sources = _episode_source(differences.mean(axis=0)) if episodes > 1 else ()
    else:
        reason = f"train gate: {seeds} seeds, {episodes} paired episodes"
        # the spread over the episodes of one retrained pair says nothing about the method
        sources = stats.seed_sources(differences) if min(old.shape) > 1 else ()
        if seeds < TRAIN_SEEDS:
            alone = "a single retrained pair" if seeds == 1 else f"{seeds} retrained pairs"
            held = f"{alone}: two training seeds alone differ as much; {TRAIN_SEEDS} shared seeds a side decide"
    return Tested(
        verdict=replace(made, change=change, reason=reason),
        worse_by=made.worse * change,
        margin=margin.margin,
        bound=margin.unchanged,
        sources=sources,
        held=held,
    )


def _episode_source(differences: Floats) -> tuple[Source, ...]:
    found = stats.mean_interval(differences)
    return (Source(found.se or 0.0, len(differences) - 1),)


def _relative(gap: float, mean: float, scale: Scale) -> float | None:
    if scale == "points":
        return gap
    return gap / mean if mean else None


def _unlike(before: Result, after: Result) -> str:
    """Why two scores answer different questions, or ''."""
    if in_seconds(before.text("train_spec")):
        return "trained for a wall time: such rows are never gated"
    if before.text("selection") != after.text("selection"):
        return f"weights selected by {before.text('selection')} and by {after.text('selection')}"
    pixels = before.text("pixels"), after.text("pixels")
    if all(pixels) and pixels[0] != pixels[1]:
        return "the images of the data set differ"
    return ""


def _on_shared_episodes(scored: Sequence[tuple[Scores, Scores]]) -> tuple[Floats, Floats]:
    """Both sides' scores (S seeds, E episodes) of the episodes that every row has, a column an episode."""
    every = [one for pair in scored for one in pair]
    first = every[0].episodes
    if all(one.episodes == first for one in every):
        return np.stack([a.scores for a, _ in scored]), np.stack([b.scores for _, b in scored])
    places = [{name: place for place, name in enumerate(_numbered(one.episodes))} for one in every]
    shared = [name for name in _numbered(first) if all(name in known for known in places)]
    rows = [one.scores[[known[name] for name in shared]] for one, known in zip(every, places, strict=True)]
    return np.stack(rows[0::2]), np.stack(rows[1::2])


def _numbered(episodes: Sequence[str]) -> Iterable[tuple[str, int]]:
    """(hash, how often it came before): a small data set may draw an episode twice."""
    seen: dict[str, int] = {}
    for name in episodes:
        seen[name] = seen.get(name, -1) + 1
        yield name, seen[name]


def _gate(pairs: Sequence[tuple[Result, Result]]) -> Literal["adapt", "train"]:
    return "adapt" if all(_same_weights(*pair) for pair in pairs) else "train"


def _same_weights(before: Result, after: Result) -> bool:
    """Whether both rows tested the same trained weights.

    They did where a digest of them says so; where nothing is trained, and no network is drawn or the same code draws
    it; and where the same code trained to the same steps from the same seed in the same CPU environment, which
    repeats to the bit.
    """
    digests = before.text("weights"), after.text("weights")
    if all(digests):
        return digests[0] == digests[1]
    if not before.text("training"):
        return not (before.text("backbone") or after.text("backbone")) or _same_code(before, after)
    return (
        before.text("device") == after.text("device") == "cpu"
        and bool(before.environment)
        and before.environment == after.environment
        and all(before.text(name) == after.text(name) for name in ("training", "train_steps", "threads"))
        and _same_code(before, after)
    )


def _same_code(before: Result, after: Result) -> bool:
    """Whether the same sources made both rows, whatever the number of test episodes."""
    return any(bool(before.text(name)) and before.text(name) == after.text(name) for name in ("code", "sources"))


class _Changed(NamedTuple):
    """Of how many of the episodes that two rows share a prediction changed."""

    changed: int
    shared: int


def _changed_predictions(before: Result, after: Result, old: Scores, new: Scores) -> _Changed | None:
    """How many predictions changed, episode by episode as for the scores; None where predictions were not kept."""
    files = before.predictions(), after.predictions()
    if files[0] is None or files[1] is None:
        return None
    if old.episodes == new.episodes and files[0].read_bytes() == files[1].read_bytes():
        return _Changed(0, len(old.episodes))
    answers = [_predicted(file, len(scored.episodes)) for file, scored in zip(files, (old, new), strict=True) if file]
    places = [{name: place for place, name in enumerate(_numbered(scored.episodes))} for scored in (old, new)]
    shared = [name for name in places[0] if name in places[1]]
    if answers[0].shape[1:] != answers[1].shape[1:]:
        return _Changed(len(shared), len(shared))
    first, second = (one[[known[name] for name in shared]] for one, known in zip(answers, places, strict=True))
    return _Changed(int((first != second).any(axis=(1, 2)).sum()), len(shared))


def _predicted(file: Path, episodes: int) -> Ints:
    """(E, queries, 2): each query's predicted label and how many maxima tied with it, in the order of the labels."""
    try:
        predicted, ties, labels = read_predictions(file, "predicted", "ties", "labels")
        if len(predicted) != episodes:
            raise StoreError(f"{file}: damaged (answers of {len(predicted)} episodes, scores of {episodes})")
    except StoreError as error:
        raise StoreError(f"{error}; delete it to compare by scores alone") from error
    # files of earlier versions have the order in which the queries came
    order = np.argsort(labels, axis=1, kind="stable")[..., None]
    return np.take_along_axis(np.stack([predicted, ties], axis=-1), order, axis=1)


def _changed_by_method(base: Side, new: Side, methods: Container[str]) -> dict[str, str]:
    """What to say of those methods whose predictions are not what they were."""
    found: dict[str, list[_Changed]] = {}
    before, after = _ok(base), _ok(new)
    for key, row in before.items():
        if key in after and method_of(row.cell) in methods and kind_of(row.measure) == "accuracy":
            old, scored = row.scores(), after[key].scores()
            count = _changed_predictions(row, after[key], old, scored) if old and scored else None
            if count is not None:
                found.setdefault(method_of(row.cell), []).append(count)
    return {name: text for name, counts in found.items() if (text := _mind(counts))}


def _mind(counts: Sequence[_Changed]) -> str:
    changed, shared = (sum(part) for part in zip(*counts, strict=True))
    return f"mind: its predictions changed in {changed} of {shared} episodes" if changed else ""
