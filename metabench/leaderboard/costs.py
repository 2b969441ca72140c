"""What methods cost: times within one environment, multiples of the yardstick's within one run, operations anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metabench.leaderboard.collect import Cost, Score
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


def by_run(costs: Iterable[Cost]) -> dict[tuple[Any, ...], list[Cost]]:
    """Costs by what they are of: run, method (without seed), task, measure."""
    found: dict[tuple[Any, ...], list[Cost]] = {}
    for cost in costs:
        found.setdefault(_cost_key(cost.source.run.path, cost.coordinates, cost.measure), []).append(cost)
        known = {**cost.coordinates, "params": "", "norm": "", "train_spec": ""}
        if cost.coordinates["algorithm"] == YARDSTICK:
            found.setdefault(_cost_key(cost.source.run.path, known, cost.measure), []).append(cost)
    return found


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


def times(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> tuple[Time, ...]:
    """Every time of a method's rows, one environment at a time."""
    made = []
    for measure in ("adapt_time", "train_time"):
        by_place: dict[str, list[float]] = {}
        for members in _of(group, costs, measure):
            by_place.setdefault(members[0].environment, []).extend(_units(members).values())
        made += [Time(measure, place, median_interval(values)) for place, values in by_place.items()]
    return tuple(made)


def relative(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> Interval | None:
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


def flops(group: Sequence[Score], costs: Mapping[tuple[Any, ...], list[Cost]]) -> float | None:
    """The operations of adapting to one task; None where they were not counted."""
    values = [cost.values[0] for members in _of(group, costs, "adapt_flops") for cost in members]
    return float(np.median(values)) if values else None
