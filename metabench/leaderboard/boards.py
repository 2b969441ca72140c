"""From scores to boards: who stands where on one protocol, and what the numbers do not support.

A board holds rows of one protocol and nothing else: the same data, split, test episodes (by their hash), ways, shots,
queries, rotations, mode of normalisation, way of selecting weights, and measure. Scores are accuracy on those episodes,
wherever they were computed; times are never compared between environments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from metabench.leaderboard.collect import LOCAL, Collected, Cost, Score, Trust, is_control, plain, tried_key
from metabench.leaderboard.ranking import MIN_SEEDS, Differences, Ranking, differences, rank
from metabench.report.build import WITHIN
from metabench.stats import Floats, Interval, cluster_interval, median_interval, paired_ratio, seeds_interval

YARDSTICK = "protonet"  # costs of unlike machines are compared as multiples of its row in the same run


@dataclass(frozen=True)
class Protocol:
    """What all rows of a board have in common. `episodes` counts test episodes, `pixels` is the hash of the images."""

    measure: str
    dataset: str
    data: str
    split: str
    rotations: str
    within: str
    ways: int | None
    shots: int | None
    queries: int | None
    stream: int | None
    bn_mode: str
    selection: str
    episodes: int | None
    episode_seed: int | None
    episodes_hash: str
    pixels: str

    @property
    def title(self) -> str:
        """The task, as in reports, and the mode of normalisation."""
        extra = re.sub(r"^[^\[]*\[[^,\]]*,?|\]$", "", self.data)
        extra = ", ".join(p for p in extra.split(",") if p and not p.startswith(("rotations=", "within=")))
        parts = (
            self.dataset + (f" ({extra})" if extra else ""),
            f"{self.ways}-way" if self.ways else "",
            f"streams of {self.stream}" if self.stream else f"{self.shots}-shot" if self.shots else "",
            WITHIN.get(self.within, ""),
        )
        return plain(" ".join(part for part in parts if part))

    @property
    def chance(self) -> float | None:
        """The score of guessing; None for errors."""
        return 1 / self.ways if self.ways and "accuracy" in self.measure else None

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better: not so for errors."""
        return not self.measure.startswith("mse")

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """The protocol in words, without what is empty."""
        shown = {
            "measure": self.measure.replace("_", " "),
            "split": f"{self.split}, test classes",
            "queries per class": self.queries or "",
            "rotations": self.rotations,
            "normalisation": self.bn_mode,
            "weights": {"last": "the last", "val": "best on validation classes"}.get(self.selection, "no training"),
            "test episodes": f"{self.episodes}" if self.episodes else "",
            "episode seed": "" if self.episode_seed is None else self.episode_seed,
            "episodes hash": self.episodes_hash,
            "pixels hash": self.pixels,
        }
        return tuple((name, plain(value)) for name, value in shown.items() if value != "")


@dataclass(frozen=True)
class Time:
    """A time in one environment: seconds, over processes (or seeds, where each took one)."""

    measure: str
    environment: str
    seconds: Interval


@dataclass(frozen=True, eq=False)
class Standing:
    """One method on one board.

    `table` (S, E) are its scores by seed of `seeds` and test episode. `rank` is the interval of its rank and `group`
    its tie groups, where it is ranked; `remarks` say why it is not, and what else a reader must know. `relative` is the
    time of adapting as a multiple of the yardstick's in the same run, `flops` the operations of adapting to one task.
    `tried` counts the configurations of this algorithm that its submitter scored on this task. `barred`: never ranked,
    as some of its seeds have no result or its budget was in seconds. `status` is ok, or what became of its rows. `card`
    is its protocol in words.
    """

    label: str
    algorithm: str
    submitter: str
    control: bool
    trust: Trust
    status: str
    reason: str
    seeds: tuple[int, ...]
    table: Floats | None
    quality: Interval | None
    by_class: Interval | None
    relative: Interval | None
    flops: float | None
    times: tuple[Time, ...]
    tried: int
    barred: bool
    runs: tuple[str, ...]
    settings: Mapping[str, str]
    card: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()
    rank: tuple[int, int] | None = None
    group: str = ""

    @property
    def rank_text(self) -> str:
        """'2' or '1-3'; empty where it is not ranked."""
        if self.rank is None:
            return ""
        low, high = self.rank
        return str(low) if low == high else f"{low}–{high}"


@dataclass(frozen=True, eq=False)
class Board:
    """The standings of one protocol, ranked ones first, controls after the others, rows without a result last."""

    number: int
    protocol: Protocol
    standings: tuple[Standing, ...]
    ranking: Ranking | None
    min_seeds: int
    remarks: tuple[str, ...] = ()
    title: str = ""

    @property
    def slug(self) -> str:
        """Its anchor."""
        return f"board-{self.number}"

    @property
    def ranked(self) -> tuple[Standing, ...]:
        """Those that have a rank."""
        return tuple(one for one in self.standings if one.rank)

    @property
    def leaders(self) -> tuple[Standing, ...]:
        """Those whose rank may be the first."""
        return tuple(one for one in self.ranked if one.rank and one.rank[0] == 1)

    @cached_property
    def shown_pairs(self) -> tuple[tuple[Standing, ...], Differences | None]:
        """The standings that can be compared two by two (`COMPARED` at most, controls among them), with differences."""
        able = [one for one in self.standings if one.table is not None]
        controls = [one for one in able if one.control][: COMPARED // 4]
        chosen = [one for one in able if not one.control][: COMPARED - len(controls)] + controls
        if len(chosen) < 2:
            return tuple(chosen), None
        every = tuple(sorted({seed for one in chosen for seed in one.seeds}))
        tables, seeds = [], []
        for one in chosen:
            assert one.table is not None
            spread = one.control and len(one.seeds) == 1  # nothing to train: it stands against every seed
            tables.append(np.repeat(one.table, len(every), axis=0) if spread else one.table)
            seeds.append(every if spread else one.seeds)
        return tuple(chosen), differences(tables, seeds)


COMPARED = 60  # methods of a board that the page can compare pair by pair


def boards(found: Collected, *, min_seeds: int = MIN_SEEDS) -> list[Board]:
    """One board per protocol, in the order of the results. See the module."""
    costs = _by_run(found.costs)
    made: list[Board] = []
    for protocol, scores in _by_protocol(found.scores):
        standings = [_standing(group, protocol, found, costs) for group in _methods(scores)]
        made.append(_board(len(made) + 1, protocol, _labelled(standings), min_seeds))
    names = [board.protocol.title for board in made]
    titles = [_title(board, [b for b in made if names[b.number - 1] == names[board.number - 1]]) for board in made]
    return [
        replace(b, title=f"{t} · episodes {b.protocol.episodes_hash or 'unknown'}" if titles.count(t) > 1 else t)
        for b, t in zip(made, titles, strict=True)
    ]


def _title(board: Board, namesakes: Sequence[Board]) -> str:
    """The task's name, with the parts of the protocol in which boards of that name differ."""
    mine = dict(board.protocol.facts)
    differing = [
        name for name in mine if any(dict(other.protocol.facts).get(name) != mine[name] for other in namesakes)
    ]
    kept = [name for name in differing if name != "episodes hash"]
    return " · ".join([board.protocol.title, *(f"{name} {mine[name]}" for name in kept)])


def _by_protocol(scores: Iterable[Score]) -> list[tuple[Protocol, list[Score]]]:
    """The rows of every board. Rows without training join every way of selecting, controls every mode as well."""
    tasks: dict[tuple[Any, ...], list[Score]] = {}
    lost: list[Score] = []
    for score in scores:
        if score.scores is None:
            lost.append(score)
        else:
            tasks.setdefault((*_task(score), score.episodes_hash, score.pixels), []).append(score)
    for (
        score
    ) in lost:  # its episodes are not known: it belongs to every board of its task and seed, or to one of its own
        homes = [members for key, members in tasks.items() if key[: len(_task(score))] == _task(score)]
        for members in homes or [tasks.setdefault((*_task(score), "", ""), [])]:
            members.append(score)
    made: list[tuple[Protocol, list[Score]]] = []
    for members in tasks.values():
        modes = dict.fromkeys(_mode(s) for s in members if not _joins(s))
        modes = modes or dict.fromkeys((_mode(s)[0], "") for s in members)
        for mode in modes:
            rows = [s for s in members if _mode(s) == mode or _fits(s, mode)]
            made.append((_protocol(rows, mode), rows))
    return made


def _task(score: Score) -> tuple[Any, ...]:
    known = score.coordinates
    shape = tuple(known[name] for name in ("data", "ways", "shots", "queries", "stream"))
    return (score.measure, *shape, score.episode_seed)


def _mode(score: Score) -> tuple[str, str]:
    return score.coordinates["bn_mode"], score.coordinates["selection"]


def _joins(score: Score) -> bool:
    return is_control(score.coordinates["algorithm"]) or not score.coordinates["selection"]


def _fits(score: Score, mode: tuple[str, str]) -> bool:
    return _joins(score) and (is_control(score.coordinates["algorithm"]) or _mode(score)[0] == mode[0])


def _protocol(rows: Sequence[Score], mode: tuple[str, str]) -> Protocol:
    first = next((row for row in rows if row.scores is not None), rows[0])
    known = {name: first.coordinates[name] for name in Protocol.__dataclass_fields__ if name in first.coordinates}
    return Protocol(
        **{
            **known,
            "measure": first.measure,
            "bn_mode": mode[0],
            "selection": mode[1],
            "episodes": None if first.scores is None else len(first.scores),
            "episode_seed": first.episode_seed,
            "episodes_hash": first.episodes_hash,
            "pixels": first.pixels,
        }
    )


def _methods(scores: Iterable[Score]) -> list[list[Score]]:
    """Rows of one method: the same submitter, code and settings; controls are pooled whoever ran them."""
    groups: dict[tuple[Any, ...], list[Score]] = {}
    for score in scores:
        known = score.coordinates
        control = is_control(known["algorithm"])
        who = ("", "") if control else (score.source.submitter, score.code)
        key = tuple(known[name] for name in ("algorithm", "params", "norm", "precision", "train_spec", "selection"))
        groups.setdefault((*who, *key), []).append(score)
    return list(groups.values())


def _standing(
    group: Sequence[Score], protocol: Protocol, found: Collected, costs: Mapping[tuple[Any, ...], list[Cost]]
) -> Standing:
    kept, doubled = _seeds(group)
    good = [score for score in kept if score.scores is not None]
    bad = [score for score in kept if score.scores is None]
    first, known = (good or list(kept))[0], (good or list(kept))[0].coordinates
    control = is_control(known["algorithm"])
    table = np.stack([s.scores for s in good if s.scores is not None]) if good else None
    quality = None if table is None else seeds_interval(table)
    remarks = _remarks(protocol, known, quality, good, bad, doubled, control)
    times = _times(group, costs)
    relative, flops = _relative(group, costs), _flops(group, costs)
    submitter = "" if control else first.source.submitter
    tried = max(found.tried.get(tried_key(s.source.submitter, s.coordinates), 1) for s in group)
    made = Standing(
        label=plain(known["algorithm"], 80),
        algorithm=plain(known["algorithm"], 80),
        submitter=submitter,
        control=control,
        trust=_trust(good or kept),
        status="ok" if good else bad[-1].status,
        reason="" if good else bad[-1].reason,
        seeds=tuple(score.coordinates["seed"] for score in good),
        table=table,
        quality=quality,
        by_class=_by_class(good),
        relative=relative,
        flops=flops,
        times=times,
        tried=tried,
        barred=bool(good and bad) or _in_seconds(known),
        runs=tuple(dict.fromkeys(score.source.name for score in kept)),
        settings=_settings(first),
        card=(),
        remarks=tuple(remarks),
    )
    return replace(made, card=_card(made, first, group, found))


def _seeds(group: Sequence[Score]) -> tuple[list[Score], int]:
    """One row per seed, in the order of seeds, and how many were left out: the earliest result counts, never the best.

    A run of one's own goes before one that was handed in (it can only concern controls, which are pooled).
    """
    by_seed: dict[int, list[Score]] = {}
    for score in group:
        by_seed.setdefault(score.coordinates["seed"], []).append(score)
    kept, left = [], 0
    for _, scores in sorted(by_seed.items()):
        results = [s for s in scores if s.scores is not None]
        kept.append(min(results or scores, key=lambda s: (s.source.submitter != LOCAL, s.at)))
        left += max(0, len(results) - 1)
    return kept, left


def _trust(scores: Sequence[Score]) -> Trust:
    """Of pooled rows the least."""
    order: tuple[Trust, ...] = ("claimed", "recomputed", "re-run")
    return min((score.trust for score in scores), key=order.index)


def _by_class(good: Sequence[Score]) -> Interval | None:
    if not good or not all(score.credit for score in good):
        return None
    queries: dict[int, int] = {}
    credit: dict[int, float] = {}
    for score in good:
        for name, (n, sum_of) in score.credit.items():
            queries[name] = queries.get(name, 0) + n
            credit[name] = credit.get(name, 0.0) + sum_of
    return cluster_interval([credit[name] for name in queries], list(queries.values()))


def _remarks(
    protocol: Protocol,
    known: Mapping[str, Any],
    quality: Interval | None,
    good: Sequence[Score],
    bad: Sequence[Score],
    doubled: int,
    control: bool,
) -> list[str]:
    said = []
    if good and bad:
        said.append(f"{len(bad)} of {len(good) + len(bad)} seeds {bad[-1].status} ({bad[-1].reason}): not ranked")
    if _in_seconds(known):
        said.append("trained for a number of seconds, which repeats on no other machine: not ranked")
    if quality and protocol.chance and not control and quality.value < 2 * protocol.chance:
        said.append(f"under-trained at this budget: below twice chance ({200 * protocol.chance:g} %)")
    if doubled:
        said.append(f"{doubled} repeated results of the same seeds left out: the earliest counts, never the best")
    if quality and quality.sd == 0 and not control and len(good) > 1:
        said.append("no variation between seeds: the interval speaks of episodes alone")
    return said


def _in_seconds(known: Mapping[str, Any]) -> bool:
    return re.search(r"\*[0-9][0-9.e+-]*s$", known["train_spec"]) is not None


def _ranked(one: Standing, min_seeds: int) -> bool:
    return one.table is not None and not one.control and not one.barred and len(one.seeds) >= min_seeds


def _board(number: int, protocol: Protocol, standings: Sequence[Standing], min_seeds: int) -> Board:
    sign = 1 if protocol.higher_is_better else -1
    order = sorted(standings, key=lambda s: _place(s, sign, min_seeds))
    able = [one for one in order if _ranked(one, min_seeds)]
    remarks = []
    ranking = None
    if len(able) > 1:
        tables = [one.table for one in able if one.table is not None]
        found = differences(tables, [one.seeds for one in able])
        ranking = rank(found, higher_is_better=protocol.higher_is_better, min_seeds=min_seeds)
        places = {id(one): n for n, one in enumerate(able)}
        order = [_with_rank(one, ranking, places.get(id(one))) for one in order]
        if ranking.undecided:
            remarks.append(
                f"{len(ranking.undecided)} pairs share fewer than {min_seeds} seeds: neither is called better"
            )
    order = [_why_unranked(one, min_seeds, len(able)) for one in order]
    if not any(one.control for one in order):
        remarks.append("no control (chance, pixel-nn, untrained) was run on this protocol: run the suite with controls")
    return Board(number, protocol, tuple(order), ranking, min_seeds, tuple(remarks))


def _place(one: Standing, sign: int, min_seeds: int) -> tuple[int, float]:
    value = -sign * one.quality.value if one.quality else 0.0
    if one.quality is None:
        return 3, value
    return (2 if one.control else 0 if _ranked(one, min_seeds) else 1), value


def _with_rank(one: Standing, ranking: Ranking, place: int | None) -> Standing:
    if place is None:
        return one
    return replace(one, rank=(ranking.low[place], ranking.high[place]), group=ranking.groups[place])


def _why_unranked(one: Standing, min_seeds: int, able: int) -> Standing:
    if one.rank or one.control or one.table is None or one.barred:
        return one
    if len(one.seeds) < min_seeds:
        have = f"{len(one.seeds)} seed{'s' * (len(one.seeds) != 1)}"
        return replace(one, remarks=(*one.remarks, f"{have}, a rank needs {min_seeds}: not ranked"))
    return replace(one, remarks=(*one.remarks, "nothing to be ranked against: not ranked")) if able < 2 else one


def _labelled(standings: Sequence[Standing]) -> list[Standing]:
    """Each algorithm's name with the settings that tell it from its other rows; who handed it in is a column."""
    named = []
    for one in standings:
        siblings = [s for s in standings if s.algorithm == one.algorithm]
        differing = [key for key, value in one.settings.items() if any(s.settings.get(key) != value for s in siblings)]
        if len({s.submitter for s in siblings}) == len(siblings):
            differing = []  # the submitters tell them apart
        text = " ".join([one.algorithm, *(f"{key}={one.settings[key]}" for key in differing)])
        named.append(replace(one, label=plain(text, 160)))
    return named


def _settings(score: Score) -> dict[str, str]:
    """All that may tell two rows of an algorithm apart, as text."""
    known = score.coordinates
    text = known["params"]
    try:
        params = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        params = {"params": text}
    params = params if isinstance(params, dict) else {"params": text}
    rest = {name: known[name] for name in ("train_spec", "selection", "precision")}
    own = {plain(key, 40): plain(json.dumps(value), 60).strip('"') for key, value in params.items()}
    return {"train": plain(rest["train_spec"]), **own, "precision": rest["precision"], "code": plain(score.code)}


# costs


def _by_run(costs: Iterable[Cost]) -> dict[tuple[Any, ...], list[Cost]]:
    """Costs by what they are of: run, method (without seed), task, measure."""
    found: dict[tuple[Any, ...], list[Cost]] = {}
    for cost in costs:
        found.setdefault(_cost_key(cost.source.run.path, cost.coordinates, cost.measure), []).append(cost)
        known = {**cost.coordinates, "params": "", "norm": "", "train_spec": ""}
        if cost.coordinates["algorithm"] == YARDSTICK:
            found.setdefault(_cost_key(cost.source.run.path, known, cost.measure), []).append(cost)
    return found


METHOD = ("algorithm", "params", "norm", "train_spec", "precision", "device")
TASK = ("data", "ways", "shots", "queries", "stream")


def _cost_key(run: object, known: Mapping[str, Any], measure: str) -> tuple[Any, ...]:
    return (run, measure, *(known[name] for name in (*METHOD, *TASK)))


def _of(group: Iterable[Score], costs: Mapping[tuple[Any, ...], list[Cost]], measure: str) -> list[list[Cost]]:
    """The method's costs, a list for each run and environment."""
    found: dict[tuple[Any, ...], list[Cost]] = {}
    for key in dict.fromkeys(_cost_key(s.source.run.path, s.coordinates, measure) for s in group):
        for cost in costs.get(key, ()):
            found.setdefault((*key, cost.environment), []).append(cost)
    return list(found.values())


def _units(costs: Sequence[Cost]) -> dict[tuple[str, int], float]:
    """Seconds by independent unit: processes where there are several, else seeds."""
    several = [cost for cost in costs if len(cost.values) > 1]
    if several:
        length = min(len(cost.values) for cost in several)
        return {("process", n): float(np.median([cost.values[n] for cost in several])) for n in range(length)}
    return {("seed", cost.coordinates["seed"]): cost.values[0] for cost in costs}


def _times(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> tuple[Time, ...]:
    made = []
    for measure in ("adapt_time", "train_time"):
        by_place: dict[str, list[float]] = {}
        for members in _of(group, costs, measure):
            by_place.setdefault(members[0].environment, []).extend(_units(members).values())
        made += [Time(measure, place, median_interval(values)) for place, values in by_place.items()]
    return tuple(made)


def _relative(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> Interval | None:
    """Time of adapting over the yardstick's in the same run and environment; of several runs, the best known ratio."""
    found: list[Interval] = []
    for members in _of(group, costs, "adapt_time"):
        one = members[0]
        known = {**one.coordinates, "algorithm": YARDSTICK, "params": "", "norm": "", "train_spec": ""}
        others = [
            cost
            for cost in costs.get(_cost_key(one.source.run.path, known, "adapt_time"), ())
            if cost.environment == one.environment
        ]
        others = [cost for cost in others if _config(cost) == _config(others[0])]
        mine, theirs = _units(members), _units(others)
        if shared := sorted(mine.keys() & theirs.keys()):
            found.append(paired_ratio([mine[k] for k in shared], [theirs[k] for k in shared]))
    return max(found, key=lambda interval: interval.n) if found else None


def _config(cost: Cost) -> tuple[Any, ...]:
    return tuple(cost.coordinates[name] for name in METHOD)


def _flops(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> float | None:
    values = [cost.values[0] for members in _of(group, costs, "adapt_flops") for cost in members]
    return float(np.median(values)) if values else None


def _card(one: Standing, first: Score, group: Sequence[Score], found: Collected) -> tuple[tuple[str, str], ...]:
    """Everything that a reader needs to judge the row, or to make it again."""
    known = first.coordinates
    machines = dict.fromkeys(score.environment for score in group if score.environment)
    codes = dict.fromkeys(score.code for score in group)
    entries: list[tuple[str, object]] = [
        ("submitted by", one.submitter or "this board's maintainers"),
        ("trust", one.trust),
        *(("re-run", f"seed {score.coordinates['seed']}: {score.rerun}") for score in group if score.rerun),
        ("runs", ", ".join(one.runs)),
        ("training seeds", ", ".join(map(str, one.seeds))),
        ("parameters", known["params"] if known["params"] not in ("", "{}") else "none"),
        ("backbone", known.get("backbone", "")),
        ("training", known["train_spec"] or "none"),
        ("weights", known["selection"]),
        ("norm", f"{known['norm']} ({known['bn_mode']})"),
        ("precision", f"{known['precision']} on {', '.join(dict.fromkeys(s.coordinates['device'] for s in group))}"),
        (
            "data",
            f"{known['data']}, {known['ways'] or ''} ways, {known['shots'] or ''} shots, {known['queries']} queries",
        ),
        ("episodes hash", first.episodes_hash),
        ("sources", ", ".join(codes)),
        (
            "made by",
            ", ".join(dict.fromkeys(f"metabench {s.source.run.manifest.get('metabench', '?')}" for s in group)),
        ),
        ("configurations tried", one.tried),
        ("machines", "; ".join(f"{name}: {machine(found.environments.get(name, {}))}" for name in machines)),
    ]
    return tuple((name, plain(value, 1000)) for name, value in entries if value not in ("", None))


def machine(facts: Mapping[str, Any]) -> str:
    """An environment in words."""
    if not facts:
        return "not described"
    parts = (
        facts.get("gpu") or facts.get("cpu"),
        f"{facts.get('cores')} cores",
        f"{facts.get('threads')} threads",
        f"torch {facts.get('torch')}",
    )
    return plain(", ".join(str(part) for part in parts if part and "None" not in str(part)))


def by_environment(board: Board, measure: str) -> dict[str, list[tuple[Standing, Interval]]]:
    """The times of a board, one environment at a time: within one they may be compared."""
    found: dict[str, list[tuple[Standing, Interval]]] = {}
    for one in board.standings:
        for time in one.times:
            if time.measure == measure:
                found.setdefault(time.environment, []).append((one, time.seconds))
    return {place: sorted(rows, key=lambda row: row[1].value) for place, rows in found.items()}
