"""Across boards: which method covers what, and one figure over data sets where there are enough of them.

A missing cell stays missing: a method without a result on every board has no aggregate. Tasks from one image source
count as one data set, since the same images behind 5-way and 20-way tasks are one piece of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metabench.leaderboard.boards import Board
from metabench.leaderboard.standings import Standing
from metabench.stats import Floats, Interval, holm, iqm_interval

MIN_SOURCES, MIN_SEEDS = 4, 3  # of an aggregate: the interquartile mean of fewer scores is noise
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
    """The boards of one mode of normalisation and one way of selecting weights; `remarks` say the limits."""

    title: str
    boards: tuple[Board, ...]
    entries: tuple[Entry, ...]
    sources: int
    remarks: tuple[str, ...]


def summaries(found: Sequence[Board], images: Mapping[str, str] | None = None) -> list[Summary]:
    """One summary for each mode and selection that has two boards of accuracy or more.

    `images` names the image source of a data set where it is not the data set's own name.
    """
    known = {**IMAGES, **(images or {})}
    groups: dict[tuple[str, str], list[Board]] = {}
    for board in found:
        if board.protocol.chance is not None:
            groups.setdefault((board.protocol.bn_mode, board.protocol.selection), []).append(board)
    return [_summary(mode, boards, known) for mode, boards in groups.items() if len(boards) > 1]


def _summary(mode: tuple[str, str], boards: Sequence[Board], images: Mapping[str, str]) -> Summary:
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
    stars, said = _stars({key: [float(x.mean()) for x in whole[key]] for key in whole if not key[2]}, len(names))
    remarks.append(said)
    entries = []
    for key, standings in rows.items():
        have = [one is not None and one.quality is not None for one in standings]
        table = whole.get(key)
        entries.append(
            Entry(
                label=key[1],
                submitter=key[0],
                control=key[2],
                standings=tuple(standings),
                covered=sum(have),
                sources=len({name for name, yes in zip(origin, have, strict=True) if yes}),
                aggregate=iqm_interval(table) if enough and table is not None and _deep(table) else None,
                star=key in stars,
            )
        )
    order = sorted(entries, key=_place)
    title = {"val": "weights chosen on validation classes", "last": "last weights"}.get(mode[1], "no training")
    return Summary(f"{mode[0]}, {title}", tuple(boards), tuple(order), len(names), tuple(remarks))


def _place(entry: Entry) -> tuple[bool, int, float]:
    """By coverage, then by aggregate, else by the mean of the best ranks: an order for reading, no ranking."""
    ranks = [one.rank[0] for one in entry.standings if one and one.rank]
    value = -entry.aggregate.value if entry.aggregate else float(np.mean(ranks)) if ranks else 1e9
    return entry.control, -entry.covered, value


def _entries(boards: Sequence[Board]) -> dict[tuple[str, str, bool], list[Standing | None]]:
    """Which standings are one method: by submitter and algorithm where each board has one such row, else by label too.

    A submitter with several configurations of an algorithm on a board thus has several entries: the better of them
    is never picked board by board.
    """
    single: dict[tuple[str, str], bool] = {}
    for board in boards:
        seen: dict[tuple[str, str], int] = {}
        for one in board.standings:
            seen[one.submitter, one.algorithm] = seen.get((one.submitter, one.algorithm), 0) + 1
        for who, count in seen.items():
            single[who] = single.get(who, True) and count == 1
    rows: dict[tuple[str, str, bool], list[Standing | None]] = {}
    for number, board in enumerate(boards):
        for one in board.standings:
            name = one.algorithm if single[one.submitter, one.algorithm] else one.label
            rows.setdefault((one.submitter, name, one.control), [None] * len(boards))[number] = one
    return rows


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
    return stars, "A star: better than every other complete method over data sets (signed-rank test, Holm, 5 %)."


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
