"""Who is told apart from whom: paired differences of many methods at once, Holm's procedure, intervals of ranks.

The model is that of `stats.paired_difference` (seeds and test episodes are crossed, two sources of variance, their half
widths added in quadrature), with a p-value in place of an interval and matrix products in place of a loop over pairs:
a thousand methods are half a million pairs. Methods that share too few seeds are compared all the same, or unusual
seeds would put a method beyond reach: their seeds are then two samples (Welch), the episodes paired as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from metabench.stats import Floats, holm

LEVEL = 0.95
POWER = 0.8
MIN_SEEDS = 3
SMALLEST_P = 1e-12  # smaller ones are given as this
DF_STEP = 1 / 32
"""Welch's degrees of freedom are rounded down to it: a little conservative, for few tables of quantiles."""
_GRID = np.logspace(np.log10(SMALLEST_P), 0, 4097)
Pairs = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Differences:
    """mean(row's) - mean(column's) of every pair, (K, L) arrays.

    `se_seeds` and `se_episodes` are the standard errors by source of variance, `df_seeds` the degrees of freedom of the
    first (0 with one seed). `seeds` counts the seeds that a pair is compared on, 0 where its seeds are two samples;
    where a pair cannot be compared, all else is NaN. `episodes` is the number of test episodes.
    """

    value: Floats
    se_seeds: Floats
    se_episodes: Floats
    df_seeds: Floats
    seeds: npt.NDArray[np.int64]
    episodes: int

    @property
    def unpaired(self) -> Pairs:
        """The pairs whose seeds are compared as two samples, (K, L)."""
        found: Pairs = (self.seeds == 0) & ~np.isnan(self.value)
        return found

    def half(self, level: float = LEVEL) -> Floats:
        """Half the width of each interval at `level`; NaN where there is none."""
        tail = np.array([(1 - level) / 2])
        df, which = np.unique(np.nan_to_num(self.df_seeds), return_inverse=True)
        of_seeds = np.concatenate([_quantiles(tail, float(one)) for one in df])[which.reshape(self.df_seeds.shape)]
        return _half(of_seeds, self.se_seeds, _quantiles(tail, self.episodes - 1)[0], self.se_episodes)

    def p_values(self) -> Floats:
        """Two-sided, (K, K): the interval of a pair just reaches 0 at the level 1 - p. NaN without an interval."""
        p = np.full(self.value.shape, np.nan)
        i, j = np.triu_indices(len(p), 1)
        df = self.df_seeds[i, j]
        for one in np.unique(df[~np.isnan(df)]):
            a, b = i[df == one], j[df == one]
            p[a, b] = p[b, a] = self._p_values(a, b, float(one))
        return p

    def _p_values(self, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], df_seeds: float) -> Floats:
        """Those of the pairs i, j, whose seeds all have these degrees of freedom."""
        size, first, second = np.abs(self.value[i, j]), self.se_seeds[i, j], self.se_episodes[i, j]
        tables = _table(df_seeds), _table(self.episodes - 1)
        squares = size**2, first**2, second**2, tables[0] ** 2, tables[1] ** 2

        def short(at: npt.NDArray[np.int64]) -> Pairs:
            return squares[3][at] * squares[1] + squares[4][at] * squares[2] < squares[0]

        low, high = np.zeros(len(i), np.int64), np.full(len(i), len(_GRID) - 1)
        sure = short(low)
        # the half width falls as p rises: find where it crosses the difference
        for _ in range(len(_GRID).bit_length()):
            middle = (low + high) // 2
            beyond = short(middle)
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        wide, narrow = (_half(tables[0][at], first, tables[1][at], second) for at in (low, high))
        share = np.clip((wide - size) / np.where(wide > narrow, wide - narrow, 1.0), 0.0, 1.0)
        p = np.exp((1 - share) * np.log(_GRID[low]) + share * np.log(_GRID[high]))
        p = np.where(sure, SMALLEST_P, p)
        return np.where((first == 0) & (second == 0) & (size == 0), 1.0, p)


def differences(
    tables: Sequence[Floats], seeds: Sequence[tuple[int, ...]], *, min_seeds: int = MIN_SEEDS
) -> Differences:
    """All pairs of `tables`, each (S, E): a row per seed of `seeds`, on the same E episodes in the same order.

    A pair is compared on the seeds that both have, as one seed fixes the order of the training tasks for both. With
    one shared seed the difference is between two trained models, and its variance is over episodes alone. Where both
    have `min_seeds` seeds and share fewer, all of their seeds are compared, as two samples.
    """
    k, episodes = len(tables), tables[0].shape[1]
    value, by_seed, by_episode, df = (np.full((k, k), np.nan) for _ in range(4))
    shared = np.zeros((k, k), dtype=np.int64)
    kinds: dict[tuple[int, ...], list[int]] = {}
    for number, have in enumerate(seeds):
        kinds.setdefault(have, []).append(number)
    for mine, rows in kinds.items():
        for theirs, columns in kinds.items():
            common = sorted(set(mine) & set(theirs))
            if not common or len(common) < min_seeds <= min(len(mine), len(theirs)):
                continue
            a = _stack(tables, seeds, rows, common)
            b = a if rows == columns else _stack(tables, seeds, columns, common)
            at = np.ix_(rows, columns)
            value[at], by_seed[at], by_episode[at] = _differences(a, b)
            shared[at], df[at] = len(common), len(common) - 1
    if (apart := shared == 0).any():
        for part, as_samples in zip((value, by_seed, by_episode, df), _unpaired(tables, min_seeds), strict=True):
            part[apart] = as_samples[apart]
    return Differences(value, by_seed, by_episode, df, shared, episodes)


def _unpaired(tables: Sequence[Floats], min_seeds: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean, the two standard errors and Welch's degrees of freedom of all pairs, their seeds being two samples.

    (K, K) each, NaN where one has fewer than `min_seeds` seeds. What varies from seed to seed is each method's own
    variance of its seeds' means; the episodes are the same for both, so that only the difference of their means varies
    over them, less what the noise of single scores adds to it: as in `stats.seeds_interval`.
    """
    sizes, episodes = np.array([len(table) for table in tables]), tables[0].shape[1]
    by_episode = np.stack([table.mean(0) for table in tables])
    of_seeds, noise = (np.array(part) for part in zip(*map(_own, tables), strict=True))
    value = by_episode.mean(1)[:, None] - by_episode.mean(1)[None]
    variance = of_seeds[:, None] + of_seeds[None]
    free = np.maximum(sizes - 1, 1)
    shares = (of_seeds**2 / free)[:, None] + (of_seeds**2 / free)[None]
    both = (free[:, None] + free[None]).astype(float)
    df = np.where(shares > 0, variance**2 / np.where(shares > 0, shares, 1.0), both)
    of_episodes = _squares(by_episode, None) / max(episodes - 1, 1) / episodes - noise[:, None] - noise[None]
    few = (sizes < max(min_seeds, 2))[:, None] | (sizes < max(min_seeds, 2))[None]
    found = value, variance**0.5, np.maximum(of_episodes, 0.0) ** 0.5, np.floor(df / DF_STEP) * DF_STEP
    value, by_seed, by_episodes, df = (np.where(few, np.nan, part) for part in found)
    return value, by_seed, by_episodes, df


def _own(table: Floats) -> tuple[float, float]:
    """Of one method's (S, E) scores, the variance of its mean by seeds, and what the noise of single scores adds."""
    if len(table) < 2:
        return 0.0, 0.0
    seeds, episodes = table.shape
    by_seed, by_episode, mean = table.mean(1), table.mean(0), float(table.mean())
    rest = table - by_seed[:, None] - by_episode[None] + mean
    noise = float((rest**2).sum()) / ((seeds - 1) * max(episodes - 1, 1)) / table.size
    spread = float(by_seed.var(ddof=1))
    return (spread if spread > (1e-13 * abs(mean)) ** 2 else 0.0) / seeds, noise  # rounding is no variance


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


def _quantiles(tail: Floats, df: float) -> Floats:
    """Student's quantiles with `tail` outside on one side; 0 without degrees of freedom: the source is not known."""
    if df <= 0:
        return np.zeros(len(tail))
    return np.asarray(-special.stdtrit(df, tail), dtype=np.float64)


@lru_cache(maxsize=512)
def _table(df: float) -> Floats:
    """The quantiles for every p of the grid, two-sided; never to be changed."""
    return _quantiles(_GRID / 2, df)


def _half(first: Floats, se_first: Floats, second: Floats | float, se_second: Floats) -> Floats:
    """Half the width: Banerjee's sum of both sources in quadrature, each with its own quantile."""
    found: Floats = np.hypot(first * se_first, second * se_second)
    return found


@dataclass(frozen=True)
class Ranking:
    """What the differences of K methods support; all lists are in the order of the methods given.

    `low` and `high` bound each rank: 1 + the methods that are significantly better, K - those significantly worse.
    `groups` are letters, best first: two methods share one exactly if they are not told apart. `adjusted` (K, K) are
    Holm's p-values: NaN for pairs that were not tested, of which none is told apart. `unpaired` counts pairs whose
    seeds were compared as two samples. `visible` is the median and the range over pairs of the smallest difference
    that would be found with 80 % power at Holm's strictest step.
    """

    low: list[int]
    high: list[int]
    groups: list[str]
    adjusted: Floats
    pairs: int
    unpaired: int
    visible: tuple[float, float, float] | None


def rank(found: Differences, *, higher_is_better: bool, min_seeds: int = MIN_SEEDS) -> Ranking:
    """Rank K methods by their differences, two-sided at a family-wise error rate of 5 % over all pairs.

    Pairs compared on fewer than `min_seeds` seeds, or not at all, are not tested: neither is better.
    """
    k = len(found.value)
    i, j = np.triu_indices(k, 1)
    fit = (found.seeds[i, j] >= min_seeds) | found.unpaired[i, j]
    adjusted = np.full((k, k), np.nan)
    adjusted[i, j] = adjusted[j, i] = np.where(fit, holm(np.where(fit, found.p_values()[i, j], 1.0)), np.nan)
    sign = 1 if higher_is_better else -1
    better = (adjusted < 1 - LEVEL) & (sign * np.nan_to_num(found.value) > 0)  # [i, j]: i is better than j
    low, high = 1 + better.sum(0), k - better.sum(1)
    return Ranking(
        low=low.tolist(),
        high=high.tolist(),
        groups=_groups(better | better.T, _order(found.value, sign)),
        adjusted=adjusted,
        pairs=len(i),
        unpaired=int(found.unpaired[i, j].sum()),
        visible=_visible(found, i[fit], j[fit], len(i)),
    )


def _order(value: Floats, sign: int) -> list[int]:
    """Methods from the best mean to the worst: by how many each one's mean is above."""
    return [int(n) for n in np.argsort(-(sign * np.nan_to_num(value)).mean(1), kind="stable")]


def _groups(apart: Pairs, order: Sequence[int]) -> list[str]:
    """The letters of each method: a compact letter display (Piepho 2004), two share a letter iff they are not apart.

    A letter is a set of methods no two of which are apart, as large as it can be. Piepho's insert-and-absorb lists all
    such sets, which may be more than any memory holds; here one is made only for a pair that shares no letter yet.
    Sets of methods are whole numbers, a bit for each in `order`.
    """
    rows = np.packbits(~apart[np.ix_(order, order)], axis=1, bitorder="little")
    alike = [int.from_bytes(row.tobytes(), "little") & ~(1 << n) for n, row in enumerate(rows)]
    joined = [0] * len(order)  # whom each shares a letter with
    letters = [""] * len(order)
    count = 0
    for start, others in enumerate(alike):
        while (left := others & ~joined[start]) or not letters[order[start]]:
            group = _grown(start, left, alike)
            letter = _letter(count)
            for place in _bits(group):
                joined[place] |= group
                letters[order[place]] += letter
            count += 1
    return letters


def _grown(start: int, left: int, alike: Sequence[int]) -> int:
    """A largest set around `start` of methods none of which are apart; those in `left` are taken before others."""
    group, able = 1 << start, alike[start]
    while able:
        first = able & left or able
        nearest = first & -first
        group, able = group | nearest, able & alike[nearest.bit_length() - 1]
    return group


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _letter(number: int) -> str:
    """a to z, a1 to z1, a2 ...: one after the other they can still be told apart."""
    return f"{chr(ord('a') + number % 26)}{number // 26 or ''}"


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
    a, b, total = variances[0][moving], variances[1][moving], total[moving]
    df = total**2 / (a**2 / found.df_seeds[i, j][moving] + b**2 / max(found.episodes - 1, 1))
    half = found.half(1 - (1 - LEVEL) / pairs)[i, j][moving]
    seen = half + special.stdtrit(df, POWER) * total**0.5
    return float(np.median(seen)), float(seen.min()), float(seen.max())
