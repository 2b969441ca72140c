"""One method on one board: its seeds and scores, its cost, how far it is trusted, and what a reader must know of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metabench.cells import in_seconds
from metabench.leaderboard.collect import Collected, Score
from metabench.leaderboard.costs import ByRun, Time, explicit, flops, of_method, relative, times
from metabench.leaderboard.protocols import Protocol
from metabench.leaderboard.source import LOCAL, MAINTAINERS, Source, Trust, is_control, plain
from metabench.leaderboard.tried import Unlisted, tried_key, unlisted_key
from metabench.stats import Floats, Interval, cluster_interval, seeds_interval
from metabench.store import FINAL


@dataclass(frozen=True, eq=False)
class Standing:
    """One method on one board.

    `table` (S, E) are its scores by seed of `seeds` and test episode. `rank` is the interval of its rank and `group`
    its tie groups, where it is ranked; `remarks` say why it is not, and what else a reader must know. `relative` is the
    time of adapting as a multiple of the yardstick's in the same run, `flops` the operations of adapting to one task.
    `tried` counts the configurations of this algorithm that its submitter scored on this task. `barred`: never ranked,
    as some of its seeds have no result, its budget was in seconds, or it is a copy. `status` is ok, or what became of
    its rows. `card` is its protocol in words. `submitter` is who handed it in, of a control all who did; empty where
    that was whoever builds the board.
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
    sources: tuple[Source, ...]
    settings: Mapping[str, str]
    card: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()
    rank: tuple[int, int] | None = None
    group: str = ""

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of the runs that it comes from."""
        return tuple(dict.fromkeys(source.name for source in self.sources))

    @property
    def rank_text(self) -> str:
        """'2' or '1-3'; empty where it is not ranked."""
        if self.rank is None:
            return ""
        low, high = self.rank
        return str(low) if low == high else f"{low}–{high}"


def methods(scores: Iterable[Score]) -> list[list[Score]]:
    """Rows of one method: the same submitter, code and settings; controls are pooled whoever ran them.

    Settings are those of the cell's id as well as those that the manifest states: who states two ids' alike would have
    the seeds of two methods in one row.
    """
    groups: dict[tuple[Any, ...], list[Score]] = {}
    for score in scores:
        known = score.coordinates
        control = is_control(known["algorithm"])
        who = ("", "") if control else (score.source.submitter, score.code)
        key = tuple(known[name] for name in ("trained", "params", "norm", "precision", "selection"))
        groups.setdefault((*who, *key), []).append(score)
    return list(groups.values())


def standing(group: Sequence[Score], protocol: Protocol, found: Collected, costs: ByRun) -> Standing:
    """One method's standing on a board, before any ranking: its rows pooled over seeds."""
    kept, doubled = _seeds(group)
    good = [score for score in kept if score.scores is not None]
    bad = [score for score in kept if score.scores is None]
    first, known = (good or list(kept))[0], (good or list(kept))[0].coordinates
    control = is_control(known["algorithm"])
    table = np.stack([s.scores for s in good if s.scores is not None]) if good else None
    quality = None if table is None else seeds_interval(table)
    unlisted = [] if control else _unlisted(group, kept, found)
    copied = list(dict.fromkeys(score.copied for score in good if score.copied))
    remarks = [*_remarks(protocol, known, quality, good, bad, doubled, control), *_left_out(unlisted), *copied]
    mine = of_method(group, costs)
    cost = relative(mine, costs)
    tried = max(found.tried.get(tried_key(s.source.submitter, s.coordinates), 1) for s in group)
    made = Standing(
        label=plain(known["algorithm"], 80),
        algorithm=plain(known["algorithm"], 80),
        submitter=submitters(score.source for score in kept),
        control=control,
        trust=_trust(good or kept),
        status="ok" if good else bad[-1].status,
        reason="" if good else bad[-1].reason,
        seeds=tuple(score.coordinates["seed"] for score in good),
        table=table,
        quality=quality,
        by_class=_by_class(good),
        relative=cost.ratio if cost else None,
        flops=flops(mine),
        times=times(mine),
        tried=tried,
        barred=bool(good and bad) or in_seconds(known["train_spec"]) or bool(copied) or any(map(_failed, unlisted)),
        sources=tuple(dict.fromkeys(score.source for score in kept)),
        settings=_settings(first),
        card=(),
        remarks=(*remarks, *_doubts(good)),
    )
    return replace(made, card=_card(made, first, group, found, cost.yardstick if cost else ""))


def submitters(sources: Iterable[Source]) -> str:
    """Who handed these runs in: one name, or of a control, which is pooled, several; empty where it was we alone."""
    names = dict.fromkeys(source.submitter for source in sources)
    return "" if not any(names) else ", ".join(name or MAINTAINERS for name in names)


def _unlisted(group: Sequence[Score], kept: Sequence[Score], found: Collected) -> list[Unlisted]:
    """Other seeds of the method that were measured and that no plan lists any more, each once; a failure goes first."""
    keys = dict.fromkeys(unlisted_key(s.source.submitter, s.coordinates, s.measure) for s in group)
    seeds = {score.coordinates["seed"] for score in kept}
    others = [one for key in keys for one in found.unlisted.get(key, ()) if one.seed not in seeds]
    first: dict[int, Unlisted] = {}
    for one in sorted(others, key=lambda one: (one.seed, not _failed(one))):
        first.setdefault(one.seed, one)
    return list(first.values())


def _failed(one: Unlisted) -> bool:
    return one.status not in FINAL


def _left_out(unlisted: Sequence[Unlisted]) -> list[str]:
    """What to say of seeds that were measured and are not shown: who may choose among seeds has the luckiest."""
    if not unlisted:
        return []
    names = ", ".join(str(one.seed) for one in unlisted)
    failed = ", ".join(f"seed {one.seed} {one.status}" for one in unlisted if _failed(one))
    said = f"measured, and in the run's plan no more: seed{'s' * (len(unlisted) > 1)} {names}"
    return [f"{said}; {failed}: not ranked" if failed else said]


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
    if in_seconds(known["train_spec"]):
        said.append("trained for a number of seconds, which repeats on no other machine: not ranked")
    blind = protocol.measure == "accuracy_at_1"  # no label of a class is known at its first presentation
    if quality and protocol.chance and not (control or blind) and quality.value < 2 * protocol.chance:
        said.append(f"under-trained at this budget: below twice chance ({200 * protocol.chance:g} %)")
    if doubled:
        said.append(f"{doubled} repeated results of the same seeds left out: the earliest counts, never the best")
    if quality and quality.sd == 0 and not control and len(good) > 1:
        said.append("no variation between seeds: the interval speaks of episodes alone")
    return said


def _doubts(good: Iterable[Score]) -> list[str]:
    """Why a verified run's rows stay claimed."""
    reasons = dict.fromkeys(score.doubt for score in good if score.doubt and not score.rerun)
    return [f"claimed, not recomputed: {reason}" for reason in reasons]


def labelled(standings: Sequence[Standing]) -> list[Standing]:
    """Each algorithm's name with the settings that tell it from its other rows; who handed it in is a column."""
    by_name: dict[str, list[Standing]] = {}
    for one in standings:
        by_name.setdefault(one.algorithm, []).append(one)
    differing = {name: _differing(siblings) for name, siblings in by_name.items()}
    named = []
    for one in standings:
        told = [f"{key}={value}" for key, value in one.settings.items() if key in differing[one.algorithm]]
        named.append(replace(one, label=plain(" ".join([one.algorithm, *told]), 160)))
    return named


def _differing(siblings: Sequence[Standing]) -> set[str]:
    """The settings that tell rows of one algorithm apart; none where the submitters do."""
    if len({s.submitter for s in siblings}) == len(siblings):
        return set()
    names = {name for one in siblings for name in one.settings}
    return {name for name in names if len({one.settings.get(name) for one in siblings}) > 1}


def _settings(score: Score) -> dict[str, str]:
    """All that may tell two rows of an algorithm apart, as text."""
    known = score.coordinates
    text = known["params"] or json.dumps({"parameters": explicit(known) or "default"})
    try:
        params = json.loads(text)
    except (ValueError, RecursionError):
        params = {"params": text}
    params = params if isinstance(params, dict) else {"params": text}
    own = {plain(key, 40): plain(json.dumps(value), 60).strip('"') for key, value in params.items()}
    ours = {"train": plain(known["train_spec"]), "precision": known["precision"], "code": plain(score.code)}
    return {"train": "", **own, **ours}


def _card(
    one: Standing, first: Score, group: Sequence[Score], found: Collected, yardstick: str
) -> tuple[tuple[str, str], ...]:
    """Everything that a reader needs to judge the row, or to make it again; `yardstick` is what its cost is over."""
    known = first.coordinates
    machines = dict.fromkeys(score.environment for score in group if score.environment)
    codes = dict.fromkeys(score.code for score in group)
    entries: list[tuple[str, object]] = [
        ("submitted by", one.submitter or MAINTAINERS),
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
        ("data", f"{known['data']}, {_task(known)}"),
        ("episodes hash", first.episodes_hash),
        ("sources", ", ".join(codes)),
        (
            "made by",
            ", ".join(dict.fromkeys(f"metabench {s.source.run.manifest.get('metabench', '?')}" for s in group)),
        ),
        ("configurations tried", one.tried),
        ("cost is over", yardstick),
        ("machines", "; ".join(f"{name}: {machine(found.environments.get(name, {}))}" for name in machines)),
    ]
    return tuple((name, plain(value, 1000)) for name, value in entries if value not in ("", None))


def _task(known: Mapping[str, Any]) -> str:
    """What a task is made of, in words; regression has no ways, a stream neither shots nor queries."""
    parts = {"ways": "ways", "shots": "shots", "queries": "queries", "stream": "images in a stream"}
    return ", ".join(f"{known[name]} {word}" for name, word in parts.items() if known[name])


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
