"""From scores to boards: who stands where on one protocol, and what the numbers do not support.

A board holds rows of one protocol and nothing else: the same data, split, test episodes (by their hash), ways, shots,
queries, rotations, mode of normalisation, way of selecting weights, and measure. Scores are accuracy on those episodes,
wherever they were computed; times are never compared between environments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from metabench.leaderboard.collect import MISSING, Collected, Score
from metabench.leaderboard.copies import marked
from metabench.leaderboard.costs import by_run
from metabench.leaderboard.protocols import Protocol, by_protocol
from metabench.leaderboard.ranking import MIN_SEEDS, Differences, Ranking, differences, rank
from metabench.leaderboard.source import plain
from metabench.leaderboard.standings import Standing, labelled, methods, standing
from metabench.stats import Interval

COMPARED = 60  # methods of a board that the page can compare pair by pair


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

    @cached_property
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
        return tuple(chosen), differences(tables, seeds, min_seeds=self.min_seeds)


def boards(found: Collected, *, min_seeds: int = MIN_SEEDS) -> list[Board]:
    """One board per protocol that anything was tried on, in the order of the results. See the module."""
    costs = by_run(found.costs)
    made: list[Board] = []
    for protocol, scores in by_protocol(marked(found.scores)):
        tried, waiting = _apart(methods(scores))
        if tried:
            standings = [standing(group, protocol, found, costs) for group in tried]
            board = _board(len(made) + 1, protocol, labelled(standings), min_seeds)
            made.append(replace(board, remarks=(*board.remarks, *_waiting(waiting))))
    names = [board.protocol.title for board in made]
    titles = [_title(board, [b for b in made if names[b.number - 1] == names[board.number - 1]]) for board in made]
    return [
        replace(b, title=f"{t} · episodes {b.protocol.episodes_hash or 'unknown'}" if titles.count(t) > 1 else t)
        for b, t in zip(made, titles, strict=True)
    ]


def _apart(groups: Iterable[list[Score]]) -> tuple[list[list[Score]], list[list[Score]]]:
    """Methods with a result or a failure, and those that a run only declares: nobody has tried these yet."""
    tried: list[list[Score]] = []
    waiting: list[list[Score]] = []
    for group in groups:
        (waiting if all(score.status == MISSING for score in group) else tried).append(group)
    return tried, waiting


def _waiting(groups: Sequence[Sequence[Score]]) -> list[str]:
    names = dict.fromkeys(plain(group[0].coordinates["algorithm"], 80) for group in groups)
    return [f"declared, and not measured yet: {', '.join(names)}"] if names else []


def _title(board: Board, namesakes: Sequence[Board]) -> str:
    """The task's name, with the parts of the protocol in which boards of that name differ."""
    mine = dict(board.protocol.facts)
    differing = [
        name for name in mine if any(dict(other.protocol.facts).get(name) != mine[name] for other in namesakes)
    ]
    kept = [name for name in differing if not name.endswith(" hash")]
    return " · ".join([board.protocol.title, *(f"{name} {mine[name]}" for name in kept)])


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
        found = differences(tables, [one.seeds for one in able], min_seeds=min_seeds)
        ranking = rank(found, higher_is_better=protocol.higher_is_better, min_seeds=min_seeds)
        places = {id(one): n for n, one in enumerate(able)}
        order = [_with_rank(one, ranking, places.get(id(one))) for one in order]
        if ranking.unpaired:
            remarks.append(
                f"{ranking.unpaired} of {ranking.pairs} pairs share fewer than {min_seeds} seeds: "
                "theirs are compared as two samples, on the same episodes"
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
        alone = "; its interval speaks of test episodes alone" if len(one.seeds) == 1 else ""
        return replace(one, remarks=(*one.remarks, f"{have}, a rank needs {min_seeds}: not ranked{alone}"))
    return replace(one, remarks=(*one.remarks, "nothing to be ranked against: not ranked")) if able < 2 else one


def by_environment(board: Board, measure: str) -> dict[str, list[tuple[Standing, Interval]]]:
    """The times of a board, one environment at a time: within one they may be compared."""
    found: dict[str, list[tuple[Standing, Interval]]] = {}
    for one in board.standings:
        for time in one.times:
            if time.measure == measure:
                found.setdefault(time.environment, []).append((one, time.seconds))
    return {place: sorted(rows, key=lambda row: row[1].value) for place, rows in found.items()}
