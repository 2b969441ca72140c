"""Who is told apart from whom: paired differences of many methods at once, Holm's procedure, intervals of ranks.

The model is that of `stats.paired_difference` (seeds and test episodes are crossed, two sources of variance, their half
widths added in quadrature), with a p-value in place of an interval and matrix products in place of a loop over pairs:
a thousand methods are half a million pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from metabench.stats import Floats, holm

LEVEL = 0.95
POWER = 0.8
MIN_SEEDS = 3
SMALLEST_P = 1e-12  # smaller ones are given as this
_GRID = np.logspace(np.log10(SMALLEST_P), 0, 4097)
Pairs = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Differences:
    """mean(row's) - mean(column's) of every pair, (K, L) arrays.

    `se_seeds` and `se_episodes` are the standard errors by source of variance; `seeds` counts the shared seeds, 0 where
    a pair shares none (the other entries are NaN then); `episodes` is the number of test episodes.
    """

    value: Floats
    se_seeds: Floats
    se_episodes: Floats
    seeds: npt.NDArray[np.int64]
    episodes: int

    def half(self, level: float = LEVEL) -> Floats:
        """Half the width of each interval at `level`; NaN where there is none."""
        tail = np.array([(1 - level) / 2])
        of_seeds = np.concatenate([_quantiles(tail, n - 1) for n in range(int(self.seeds.max()) + 1)])
        return _half(of_seeds[self.seeds], self.se_seeds, _quantiles(tail, self.episodes - 1)[0], self.se_episodes)

    def p_values(self) -> Floats:
        """Two-sided, (K, K): the interval of a pair just reaches 0 at the level 1 - p. NaN without an interval."""
        p = np.full(self.value.shape, np.nan)
        i, j = np.triu_indices(len(p), 1)
        for count in np.unique(self.seeds[i, j]):
            here = (self.seeds[i, j] == count) & ~np.isnan(self.value[i, j])
            a, b = i[here], j[here]
            p[a, b] = p[b, a] = self._p_values(a, b, int(count))
        return p

    def _p_values(self, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], seeds: int) -> Floats:
        """Those of the pairs i, j, which all share `seeds` seeds."""
        size, first, second = np.abs(self.value[i, j]), self.se_seeds[i, j], self.se_episodes[i, j]
        tables = _quantiles(_GRID / 2, seeds - 1), _quantiles(_GRID / 2, self.episodes - 1)

        def width(at: npt.NDArray[np.int64]) -> Floats:
            return _half(tables[0][at], first, tables[1][at], second)

        low, high = np.zeros(len(i), np.int64), np.full(len(i), len(_GRID) - 1)
        sure = width(low) < size
        for _ in range(
            len(_GRID).bit_length()
        ):  # the half width falls as p rises: find where it crosses the difference
            middle = (low + high) // 2
            beyond = width(middle) < size
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        wide, narrow = width(low), width(high)
        share = np.clip((wide - size) / np.where(wide > narrow, wide - narrow, 1.0), 0.0, 1.0)
        p = np.exp((1 - share) * np.log(_GRID[low]) + share * np.log(_GRID[high]))
        p = np.where(sure, SMALLEST_P, p)
        return np.where((first == 0) & (second == 0) & (size == 0), 1.0, p)


def differences(tables: Sequence[Floats], seeds: Sequence[tuple[int, ...]]) -> Differences:
    """All pairs of `tables`, each (S, E): a row per seed of `seeds`, on the same E episodes in the same order.

    A pair is compared on the seeds that both have, as one seed fixes the order of the training tasks for both. With
    one shared seed the difference is between two trained models, and its variance is over episodes alone.
    """
    k, episodes = len(tables), tables[0].shape[1]
    value, by_seed, by_episode = (np.full((k, k), np.nan) for _ in range(3))
    shared = np.zeros((k, k), dtype=np.int64)
    kinds: dict[tuple[int, ...], list[int]] = {}
    for number, have in enumerate(seeds):
        kinds.setdefault(have, []).append(number)
    for mine, rows in kinds.items():
        for theirs, columns in kinds.items():
            common = sorted(set(mine) & set(theirs))
            if not common:
                continue
            a = _stack(tables, seeds, rows, common)
            b = a if rows == columns else _stack(tables, seeds, columns, common)
            at = np.ix_(rows, columns)
            value[at], by_seed[at], by_episode[at] = _differences(a, b)
            shared[at] = len(common)
    return Differences(value, by_seed, by_episode, shared, episodes)


def _stack(
    tables: Sequence[Floats], seeds: Sequence[tuple[int, ...]], numbers: Sequence[int], common: Sequence[int]
) -> Floats:
    return np.stack([tables[n][[seeds[n].index(seed) for seed in common]] for n in numbers])


def _differences(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean and the two standard errors of a[i] - b[j], from (K, S, E) and (L, S, E)."""
    s, e = a.shape[1:]
    value = a.mean((1, 2))[:, None] - b.mean((1, 2))[None]
    over_seeds = _squares(a.mean(2), None if a is b else b.mean(2))
    over_episodes = _squares(a.mean(1), None if a is b else b.mean(1))
    if s == 1:
        return value, np.zeros_like(value), (over_episodes / max(e - 1, 1) / e) ** 0.5
    if e == 1:
        return value, (over_seeds / (s - 1) / s) ** 0.5, np.zeros_like(value)
    every = _squares(a.reshape(len(a), -1), None if a is b else b.reshape(len(b), -1))
    residual = np.maximum(every - e * over_seeds - s * over_episodes, 0.0) / ((s - 1) * (e - 1))
    of_episodes = np.maximum(over_episodes / (e - 1) / e - residual / (s * e), 0.0)
    return value, (over_seeds / (s - 1) / s) ** 0.5, of_episodes**0.5


def _squares(x: Floats, other: Floats | None) -> Floats:
    """The sum of squares of x[i] - other[j], each centred (None: x itself); rounding is no variance."""
    x = x - x.mean(1, keepdims=True)
    y = x if other is None else other - other.mean(1, keepdims=True)
    own = (x**2).sum(1)[:, None] + (y**2).sum(1)[None]
    found = own - 2 * (x @ y.T)
    kept: Floats = np.where(found > 1e-13 * own, found, 0.0)
    return kept


def _quantiles(tail: Floats, df: int) -> Floats:
    """Student's quantiles with `tail` outside on one side; 0 without degrees of freedom: the source is not known."""
    found: Floats = -special.stdtrit(df, tail) if df > 0 else np.zeros(len(tail))
    return found


def _half(first: Floats, se_first: Floats, second: Floats | float, se_second: Floats) -> Floats:
    """Half the width: Banerjee's sum of both sources in quadrature, each with its own quantile."""
    found: Floats = np.hypot(first * se_first, second * se_second)
    return found


@dataclass(frozen=True)
class Ranking:
    """What the differences of K methods support; all lists are in the order of the methods given.

    `low` and `high` bound each rank: 1 + the methods that are significantly better, K - those significantly worse.
    `groups` are tie groups: letters, best group first; no two methods of a group are told apart. `adjusted` (K, K) are
    Holm's p-values, 1 where a pair could not be compared; `undecided` lists such pairs. `visible` is the median and the
    range over pairs of the smallest difference that would be found with 80 % power at Holm's strictest step.
    """

    low: list[int]
    high: list[int]
    groups: list[str]
    adjusted: Floats
    pairs: int
    visible: tuple[float, float, float] | None
    undecided: list[tuple[int, int]]


def rank(found: Differences, *, higher_is_better: bool, min_seeds: int = MIN_SEEDS) -> Ranking:
    """Rank K methods by their differences, two-sided at a family-wise error rate of 5 % over all pairs.

    Pairs that share fewer than `min_seeds` seeds are undecided: neither is better.
    """
    k = len(found.value)
    i, j = np.triu_indices(k, 1)
    fit = found.seeds[i, j] >= min_seeds
    p = np.where(fit, found.p_values()[i, j], 1.0)
    adjusted = np.ones((k, k))
    adjusted[i, j] = adjusted[j, i] = holm(p)
    sign = 1 if higher_is_better else -1
    better = (adjusted < 1 - LEVEL) & (sign * np.nan_to_num(found.value) > 0)  # [i, j]: i is better than j
    low, high = 1 + better.sum(0), k - better.sum(1)
    order = _order(found.value, sign)
    return Ranking(
        low=low.tolist(),
        high=high.tolist(),
        groups=_groups(better | better.T, order),
        adjusted=adjusted,
        pairs=len(i),
        visible=_visible(found, i[fit], j[fit], len(i)),
        undecided=[(int(a), int(b)) for a, b in zip(i[~fit], j[~fit], strict=True)],
    )


def _order(value: Floats, sign: int) -> list[int]:
    """Methods from the best mean to the worst: by how many each one's mean is above."""
    return [int(n) for n in np.argsort(-(sign * np.nan_to_num(value)).mean(1), kind="stable")]


def _groups(apart: Pairs, order: Sequence[int]) -> list[str]:
    """The letters of each method: runs of neighbours by mean of which no two are told apart, as long as they can be."""
    apart = apart[np.ix_(order, order)]
    letters: list[str] = [""] * len(order)
    end, count = 0, 0
    for start in range(len(order)):
        stop = max(end, start + 1)
        while stop < len(order) and not apart[start:stop, stop].any():
            stop += 1
        if stop > end:  # else it lies inside the group before
            name = _letter(count)
            for place in range(start, stop):
                letters[order[place]] += name
            count, end = count + 1, stop
    return letters


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _visible(
    found: Differences, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64], pairs: int
) -> tuple[float, float, float] | None:
    """Median and range of half width + t(power) x standard error, at Holm's strictest level (Satterthwaite's df)."""
    if not len(i):
        return None
    variances = found.se_seeds[i, j] ** 2, found.se_episodes[i, j] ** 2
    total = variances[0] + variances[1]
    moving = total > 0
    if not moving.any():
        return None
    seeds, episodes = found.seeds[i, j][moving] - 1, found.episodes - 1
    a, b, total = variances[0][moving], variances[1][moving], total[moving]
    df = total**2 / (a**2 / seeds + b**2 / max(episodes, 1))
    half = found.half(1 - (1 - LEVEL) / pairs)[i, j][moving]
    seen = half + special.stdtrit(df, POWER) * total**0.5
    return float(np.median(seen)), float(seen.min()), float(seen.max())
