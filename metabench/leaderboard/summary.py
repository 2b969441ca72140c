"""Across boards: which method covers what, and one figure over data sets where there are enough of them.

A missing cell stays missing: a method without a result on every board has no aggregate. Tasks from one image source
count as one data set, since the same images behind 5-way and 20-way tasks are one piece of evidence. Streams are a task
unlike episodes, and stand apart; first presentations, whose labels nobody can know, are in no table here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from metabench.leaderboard.boards import Board
from metabench.leaderboard.ranking import MIN_SEEDS
from metabench.leaderboard.source import plain
from metabench.leaderboard.standings import Standing, submitters
from metabench.stats import Floats, Interval, holm, iqm_interval

MIN_SOURCES = 4  # of an aggregate: the interquartile mean of fewer scores is noise
STAR_SOURCES = 6  # of a test over data sets: with five, the smallest two-sided p of the signed-rank test is 2/32
EXACT = 16  # differences whose signs are all tried
IMAGES: Mapping[str, str] = {
    "miniimagenet": "imagenet", "tieredimagenet": "imagenet", "cifarfs": "cifar100", "fc100": "cifar100",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Entry:
    """One method across boards: its standing on each (None: never run there), and its aggregate.

    `covered` counts boards with a result, `sources` the image sources of them. `aggregate` is the interquartile mean of
    its normalised scores (chance 0, perfect 1) over sources and seeds. `star`: better than every other complete entry.
    """

    label: str
    submitter: str
    control: bool
    standings: tuple[Standing | None, ...]
    covered: int
    sources: int
    aggregate: Interval | None = None
    star: bool = False


@dataclass(frozen=True, eq=False)
class Summary:
    """The boards of one kind of task, mode of normalisation and way of selecting weights; `remarks` say the limits."""

    title: str
    boards: tuple[Board, ...]
    entries: tuple[Entry, ...]
    sources: int
    remarks: tuple[str, ...]


def summaries(found: Sequence[Board], images: Mapping[str, str] | None = None) -> list[Summary]:
    """One summary for each kind of task, mode and selection that has two boards of accuracy or more.

    `images` names the image source of a data set where it is not the data set's own name.
    """
    known = {**IMAGES, **(images or {})}
    groups: dict[tuple[str, str, bool], list[Board]] = {}
    for board in found:
        protocol = board.protocol
        if protocol.chance is not None and protocol.measure != "accuracy_at_1":
            groups.setdefault((protocol.bn_mode, protocol.selection, bool(protocol.stream)), []).append(board)
    return [_summary(kind, boards, known) for kind, boards in groups.items() if len(boards) > 1]


def _summary(kind: tuple[str, str, bool], boards: Sequence[Board], images: Mapping[str, str]) -> Summary:
    origin = [images.get(board.protocol.dataset, board.protocol.dataset) for board in boards]
    names = tuple(dict.fromkeys(origin))
    rows = _entries(boards)
    remarks = [f"Tasks from one image source count as one data set: {len(boards)} boards, {len(names)} of them."]
    complete = {key: _normalised(rows[key], boards, origin) for key in rows}
    whole = {key: table for key, table in complete.items() if table is not None}
    enough = len(names) >= MIN_SOURCES and any(_deep(table) for table in whole.values())
    if not enough:
        remarks.append(
            f"No aggregate over data sets: it takes {MIN_SOURCES} of them with {MIN_SEEDS} seeds each, and a result on "
            "every board."
        )
    remarks += _blocking(rows, boards) if len(names) >= MIN_SOURCES else []
    able = {key: table for key, table in whole.items() if not key.control and _deep(table)}
    stars, said = _stars({key: [float(x.mean()) for x in table] for key, table in able.items()}, len(names))
    remarks.append(said)
    entries = []
    for key, standings in rows.items():
        have = [one is not None and one.quality is not None for one in standings]
        table = whole.get(key)
        entries.append(
            Entry(
                label=key.label,
                submitter=submitters(source for one in standings if one for source in one.sources),
                control=key.control,
                standings=tuple(standings),
                covered=sum(have),
                sources=len({name for name, yes in zip(origin, have, strict=True) if yes}),
                aggregate=iqm_interval(table) if enough and table is not None and _deep(table) else None,
                star=key in stars,
            )
        )
    order = sorted(entries, key=_place)
    mode, selection, streams = kind
    chosen = {"val": "weights chosen on validation classes", "last": "last weights"}.get(selection, "no training")
    title = f"{mode}, {chosen}{', streams' if streams else ''}"
    return Summary(title, tuple(boards), tuple(order), len(names), tuple(remarks))


def _blocking(rows: Mapping[_Name, Sequence[Standing | None]], boards: Sequence[Board]) -> list[str]:
    """Which board alone keeps methods from an aggregate; where no method has them all, which one most of them lack."""
    lacking = {
        key: [n for n, one in enumerate(standings) if one is None or one.table is None or one.barred]
        for key, standings in rows.items()
        if not key.control
    }
    alone: dict[int, list[str]] = {}
    for key, numbers in lacking.items():
        if len(numbers) == 1:
            alone.setdefault(numbers[0], []).append(key.label)
    said = [
        f"Without an aggregate only for want of a result that counts on {boards[n].title}: {', '.join(names)}."
        for n, names in sorted(alone.items())
    ]
    if said or not lacking or not all(lacking.values()):
        return said
    counts = [sum(n in numbers for numbers in lacking.values()) for n in range(len(boards))]
    worst = counts.index(max(counts))
    return [
        f"No method has a result that counts on every board: {counts[worst]} of {len(lacking)} lack one on "
        f"{boards[worst].title}."
    ]


def _place(entry: Entry) -> tuple[bool, int, float]:
    """By coverage, then by aggregate, else by the mean of the best ranks: an order for reading, no ranking."""
    ranks = [one.rank[0] for one in entry.standings if one and one.rank]
    value = -entry.aggregate.value if entry.aggregate else float(np.mean(ranks)) if ranks else 1e9
    return entry.control, -entry.covered, value


class _Name(NamedTuple):
    """What makes standings on several boards one method; `settings` are those that tell it apart on any board."""

    submitter: str
    algorithm: str
    control: bool
    settings: tuple[tuple[str, str], ...]
    number: int  # of standings on one board that nothing here tells apart

    @property
    def label(self) -> str:
        return plain(" ".join([self.algorithm, *(f"{name}={value}" for name, value in self.settings if value)]), 160)


def _entries(boards: Sequence[Board]) -> dict[_Name, list[Standing | None]]:
    """Which standings are one method: those of one submitter, algorithm, and settings that differ on any board.

    A submitter with several configurations of an algorithm on some board thus has several entries on all of them: the
    better of them is never picked board by board, and none is torn apart where it stands alone.
    """
    differing: dict[tuple[str, str], set[str]] = {}
    for board in boards:
        siblings: dict[tuple[str, str], list[Standing]] = {}
        for one in board.standings:
            siblings.setdefault(_who(one), []).append(one)
        for who, ones in siblings.items():
            names = {name for one in ones for name in one.settings}
            apart = {name for name in names if len({one.settings.get(name) for one in ones}) > 1}
            differing.setdefault(who, set()).update(apart)
    rows: dict[_Name, list[Standing | None]] = {}
    for place, board in enumerate(boards):
        for one in board.standings:
            told = tuple((name, one.settings.get(name, "")) for name in sorted(differing[_who(one)]))
            able = (_Name(*_who(one), one.control, told, number) for number in count())
            found = (rows.setdefault(name, [None] * len(boards)) for name in able)
            next(row for row in found if row[place] is None)[place] = one
    return rows


def _who(one: Standing) -> tuple[str, str]:
    """Submitter and algorithm; controls are pooled, whoever ran them."""
    return "" if one.control else one.submitter, one.algorithm


def _normalised(
    standings: Sequence[Standing | None], boards: Sequence[Board], origin: Sequence[str]
) -> list[Floats] | None:
    """Per image source the normalised score of each seed, the mean over the source's boards; None where one lacks."""
    by_source: dict[str, list[dict[int, float]]] = {}
    for one, board, name in zip(standings, boards, origin, strict=True):
        chance = board.protocol.chance
        if one is None or one.table is None or chance is None or one.barred:
            return None
        means = (one.table.mean(1) - chance) / (1 - chance)
        by_source.setdefault(name, []).append(dict(zip(one.seeds, means.tolist(), strict=True)))
    found = []
    for tables in by_source.values():
        shared = sorted(set.intersection(*(set(table) for table in tables)))
        if not shared:
            return None
        found.append(np.array([np.mean([table[seed] for table in tables]) for seed in shared]))
    return found


def _deep(table: Sequence[Floats]) -> bool:
    return all(len(seeds) >= MIN_SEEDS for seeds in table)


def _stars(scores: Mapping[Any, Sequence[float]], sources: int) -> tuple[set[Any], str]:
    """The entry that beats every other one over data sets: Wilcoxon's signed-rank test, Holm over all pairs, 5 %."""
    if sources < STAR_SOURCES:
        return set(), (
            f"No stars: a test over data sets needs {STAR_SOURCES} of them (five cannot reach 5 %), there "
            f"{'is' if sources == 1 else 'are'} {sources}."
        )
    names = list(scores)
    pairs = [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    p = [_signed_rank(scores[a], scores[b]) for a, b in pairs]
    beaten: dict[Any, set[Any]] = {name: set() for name in names}
    for (a, b), adjusted in zip(pairs, holm(p), strict=True):
        if adjusted < 0.05:
            better, worse = (a, b) if np.mean(scores[a]) > np.mean(scores[b]) else (b, a)
            beaten[better].add(worse)
    stars = {name for name in names if len(names) > 1 and len(beaten[name]) == len(names) - 1}
    return stars, (
        f"A star: better than every other complete method with {MIN_SEEDS} seeds over data sets (signed-rank test, "
        "Holm, 5 %)."
    )


def _signed_rank(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p of Wilcoxon's signed-rank test, ties and all: each sign of each difference is as likely.

    Equal pairs say nothing and are left out: five others cannot reach 5 %, however many data sets there are.
    """
    from scipy import stats as distributions  # a second to import, and seldom wanted

    gaps = np.subtract(a, b)
    gaps = gaps[gaps != 0]
    if len(gaps) > EXACT:
        return float(distributions.wilcoxon(gaps).pvalue)
    ranks = distributions.rankdata(np.abs(gaps))
    sums = np.zeros(1)
    for rank in ranks:
        sums = np.concatenate([sums - rank, sums + rank])
    return float(np.mean(np.abs(sums) >= abs(float((np.sign(gaps) * ranks).sum())) - 1e-9))
