"""What methods cost: times within one environment, multiples of the yardstick's within one run, operations anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from metabench.catalogue import catalogue
from metabench.leaderboard.collect import TIMES, Cost, Score
from metabench.leaderboard.source import plain
from metabench.stats import Interval, median_interval, paired_ratio

YARDSTICK = "protonet"  # costs of unlike machines are compared as multiples of its row in the same run: see `yardstick`
METHOD = ("algorithm", "trained", "params", "norm", "train_spec", "precision", "device")
TASK = ("data", "ways", "shots", "queries", "stream")


@dataclass(frozen=True)
class Time:
    """A time in one environment: seconds, over processes (or seeds, where each took one)."""

    measure: str
    environment: str
    seconds: Interval


@dataclass(frozen=True)
class Relative:
    """A time as a multiple of the yardstick's, and which yardstick that is, in words."""

    ratio: Interval
    yardstick: str


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
    return _key(run, {**known, "algorithm": YARDSTICK, "trained": "", "params": "", "norm": "", "train_spec": ""})


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


def relative(mine: OfMethod, costs: ByRun) -> Relative | None:
    """Time of adapting over the yardstick's in the same run and environment; of several runs, the best known ratio."""
    found: list[Relative] = []
    for members in mine.get("adapt_time", ()):
        one = members[0]
        others = yardstick(
            [
                cost
                for cost in costs.get(_yardstick_key(one.source.run.path, one.coordinates), {}).get("adapt_time", ())
                if cost.environment == one.environment
            ]
        )
        own, theirs = _units(members), _units(others)
        if shared := sorted(own.keys() & theirs.keys()):
            ratio = paired_ratio([own[k] for k in shared], [theirs[k] for k in shared])
            found.append(Relative(ratio, _in_words(others[0])))
    return max(found, key=lambda one: one.ratio.n) if found else None


def yardstick(costs: Sequence[Cost]) -> list[Cost]:
    """Of the costs of several configurations of the yardstick those of one: the default one, or else the only one.

    Which training it had is no matter: adapting costs the same. None where several are there and none is the default,
    for who could choose among them would choose the slowest.
    """
    kinds: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        kinds.setdefault((explicit(cost.coordinates), cost.coordinates["norm"]), []).append(cost)
    if len(kinds) > 1:
        kinds = {kind: members for kind, members in kinds.items() if kind == ("", _default_norm())}
    members = next(iter(kinds.values()), [])
    return [cost for cost in members if cost.coordinates["trained"] == members[0].coordinates["trained"]]


def explicit(known: Mapping[str, Any]) -> str:
    """The parameters in a cell's id, which has those set away from their defaults, by its coordinates."""
    items = str(known["trained"]).partition("[")[2].removesuffix("]").split(",")
    return ",".join(item for item in items if item and not item.startswith("train="))


@cache
def _default_norm() -> object:
    norm = catalogue().algorithm(YARDSTICK).parameter("norm")
    return norm.default if norm else None


def _in_words(cost: Cost) -> str:
    """The yardstick's row: its settings, and the run that it stands in."""
    name = f"{YARDSTICK} with {explicit(cost.coordinates) or 'default parameters'}"
    return plain(f"{name}, norm {cost.coordinates['norm']}, of the same run ({cost.source.name})")


def flops(mine: OfMethod) -> float | None:
    """The operations of adapting to one task; None where they were not counted."""
    values = [cost.values[0] for members in mine.get("adapt_flops", ()) for cost in members]
    return float(np.median(values)) if values else None
