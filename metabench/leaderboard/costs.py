"""What methods cost: times within one environment, multiples of the yardstick's within one run, operations anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metabench.leaderboard.collect import TIMES, Cost, Score
from metabench.stats import Interval, median_interval, paired_ratio

YARDSTICK = "protonet"  # costs of unlike machines are compared as multiples of its row in the same run
METHOD = ("algorithm", "params", "norm", "train_spec", "precision", "device")
TASK = ("data", "ways", "shots", "queries", "stream")


@dataclass(frozen=True)
class Time:
    """A time in one environment: seconds, over processes (or seeds, where each took one)."""

    measure: str
    environment: str
    seconds: Interval


ByRun = Mapping[tuple[Any, ...], Mapping[str, Sequence[Cost]]]  # by run, method (without seed) and task; by measure
OfMethod = Mapping[str, Sequence[Sequence[Cost]]]  # by measure, a list for each run and environment


def by_run(costs: Iterable[Cost]) -> ByRun:
    """Costs by what they are of; the yardstick's also under the key of any method in its place."""
    found: dict[tuple[Any, ...], dict[str, list[Cost]]] = {}
    for cost in costs:
        run, known = cost.source.run.path, cost.coordinates
        found.setdefault(_key(run, known), {}).setdefault(cost.measure, []).append(cost)
        if known["algorithm"] == YARDSTICK:
            found.setdefault(_yardstick_key(run, known), {}).setdefault(cost.measure, []).append(cost)
    return found


def _key(run: object, known: Mapping[str, Any]) -> tuple[Any, ...]:
    return (run, *[known[name] for name in (*METHOD, *TASK)])


def _yardstick_key(run: object, known: Mapping[str, Any]) -> tuple[Any, ...]:
    return _key(run, {**known, "algorithm": YARDSTICK, "params": "", "norm": "", "train_spec": ""})


def of_method(group: Iterable[Score], costs: ByRun) -> OfMethod:
    """The costs of a method, given its rows of quality."""
    found: dict[str, dict[tuple[Any, ...], list[Cost]]] = {}
    for key in dict.fromkeys(_key(score.source.run.path, score.coordinates) for score in group):
        for measure, every in costs.get(key, {}).items():
            for cost in every:
                found.setdefault(measure, {}).setdefault((*key, cost.environment), []).append(cost)
    return {measure: list(places.values()) for measure, places in found.items()}


def _units(costs: Sequence[Cost]) -> dict[tuple[str, int], float]:
    """Seconds by independent unit: processes where there are several, else seeds."""
    several = [cost for cost in costs if len(cost.values) > 1]
    if several:
        length = min(len(cost.values) for cost in several)
        return {("process", n): float(np.median([cost.values[n] for cost in several])) for n in range(length)}
    return {("seed", cost.coordinates["seed"]): cost.values[0] for cost in costs}


def times(mine: OfMethod) -> tuple[Time, ...]:
    """Every time of a method, one environment at a time."""
    made = []
    for measure in TIMES:
        by_place: dict[str, list[float]] = {}
        for members in mine.get(measure, ()):
            by_place.setdefault(members[0].environment, []).extend(_units(members).values())
        made += [Time(measure, place, median_interval(values)) for place, values in by_place.items()]
    return tuple(made)


def relative(mine: OfMethod, costs: ByRun) -> Interval | None:
    """Time of adapting over the yardstick's in the same run and environment; of several runs, the best known ratio."""
    found: list[Interval] = []
    for members in mine.get("adapt_time", ()):
        one = members[0]
        others = [
            cost
            for cost in costs.get(_yardstick_key(one.source.run.path, one.coordinates), {}).get("adapt_time", ())
            if cost.environment == one.environment
        ]
        others = [cost for cost in others if _config(cost) == _config(others[0])]
        own, theirs = _units(members), _units(others)
        if shared := sorted(own.keys() & theirs.keys()):
            found.append(paired_ratio([own[k] for k in shared], [theirs[k] for k in shared]))
    return max(found, key=lambda interval: interval.n) if found else None


def _config(cost: Cost) -> tuple[Any, ...]:
    return tuple(cost.coordinates[name] for name in METHOD)


def flops(mine: OfMethod) -> float | None:
    """The operations of adapting to one task; None where they were not counted."""
    values = [cost.values[0] for members in mine.get("adapt_flops", ()) for cost in members]
    return float(np.median(values)) if values else None
