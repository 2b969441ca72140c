"""Sequences of floats in, floats out: the intervals and tests behind every claim metabench makes.

All intervals are two-sided at `level` (95 % unless said otherwise). A bound is None where the data cannot give one
(one observation); an interval of width zero means that the observations did not vary at all, not that the value is
exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Scores = npt.ArrayLike
_ROUNDING = 1e-9  # of a sum of weights
_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    `value` the estimate; `low`, `high` its bounds, both None where there is none; `n` the independent units
    behind it (episodes, seeds, classes or processes); `sd` the standard deviation over those units (ddof 1),
    None for one unit; `se` the standard error and `df` its degrees of freedom, where the interval rests on Student's t.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    sd: float | None
    se: float | None = None
    df: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width; None without bounds."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the bounds; False without bounds, since nothing is known then."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True)
class Source:
    """One source of variance of an estimate: its standard error and the degrees of freedom of that."""

    se: float
    df: float


@dataclass(frozen=True)
class Agreement:
    """How alike two data sets order the same algorithms.

    `tau` Kendall's tau-b of the two lists of means, with the interval `low`..`high`; of `pairs` pairs of
    algorithms, the second data set tells `decided` apart, and the first orders `alike` of those the same way.
    """

    tau: float
    low: float | None
    high: float | None
    pairs: int
    decided: int
    alike: int


@dataclass(frozen=True)
class PowerLaw:
    """y = `factor` x^`exponent`; `worst` is the largest factor (1 or more) by which a point's mean log is off it."""

    exponent: Interval
    factor: float
    worst: float


def mean_interval(values: Scores, *, level: float = 0.95) -> Interval:
    """Student's t-interval of the mean of `values` (n,). One value has no bounds.

    Raises ValueError for no values or for values that are not finite.
    """
    x = _finite(values, ndim=1)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Interval(mean, None, None, 1, None)
    sd = _sd(x, mean)
    return _student(mean, sd / n**0.5, n - 1, n, sd, level)


def seeds_interval(scores: Scores, *, level: float = 0.95) -> Interval:
    """The interval of a method's mean score from `scores` (S seeds, E episodes), all seeds on the same episodes.

    Seeds and episodes are crossed random effects: the variance of the grand mean is MS_seed / (S E), with S - 1
    degrees of freedom, plus max(MS_episode - MS_residual, 0) / (S E), with E - 1. Their two half widths, each with its
    own t quantile, are added in quadrature (Banerjee 1960), which is conservative; Satterthwaite's single quantile
    covered as little as 88 % with two seeds and 93 % with three (simulated, 200 episodes).

    With one seed this is the t-interval over episodes, a statement on that one trained model (n is then E); with one
    episode it is the t-interval over seeds. Raises ValueError for an empty or non-finite array.
    """
    x = _finite(scores, ndim=2)
    if min(x.shape) == 1:
        return mean_interval(x.ravel(), level=level)
    mean, of_seeds, of_episodes, sd = _crossed(x)
    return _two_sources(mean, (of_seeds, x.shape[0]), (of_episodes, x.shape[1]), sd, level)


def seed_sources(scores: Scores) -> tuple[Source, ...]:
    """What the mean of `scores` (S seeds, E episodes) varies by, as `seeds_interval` has it; S and E are 2 or more."""
    x = _finite(scores, ndim=2)
    if min(x.shape) == 1:
        raise ValueError(f"two seeds and two episodes are the least, got shape {x.shape}")
    _, of_seeds, of_episodes, _ = _crossed(x)
    return Source(of_seeds**0.5, x.shape[0] - 1), Source(of_episodes**0.5, x.shape[1] - 1)


def _crossed(x: Floats) -> tuple[float, float, float, float]:
    """Of (S seeds, E episodes): the mean, its variance by seeds and by episodes, and the sd over seeds."""
    (n_seeds, n_episodes), mean = x.shape, float(x.mean())
    by_seed, by_episode = x.mean(axis=1), x.mean(axis=0)
    residual = x - by_seed[:, None] - by_episode[None, :] + mean
    ms_residual = _snap(float((residual**2).sum()), x) / ((n_seeds - 1) * (n_episodes - 1))
    sd = _sd(by_seed)
    of_seeds = sd**2 / n_seeds
    of_episodes = max(_sd(by_episode) ** 2 / n_episodes - ms_residual / x.size, 0.0)
    return mean, of_seeds, of_episodes, sd


def paired_difference(a: Scores, b: Scores, *, level: float = 0.95) -> Interval:
    """The interval of mean(a) - mean(b), both (S seeds, E episodes), on the same episodes in the same order.

    The differences of each (seed, episode) go through `seeds_interval`, so what the two methods share (hard
    episodes) cancels. Seeds are paired by position: a seed fixes the order of the training tasks for both.
    Raises ValueError where the shapes differ.
    """
    x, y = _finite(a, ndim=2), _finite(b, ndim=2)
    if x.shape != y.shape:
        raise ValueError(f"paired scores need the same seeds and episodes, got shapes {x.shape} and {y.shape}")
    return seeds_interval(x - y, level=level)


def cluster_interval(sums: Scores, counts: Scores, *, level: float = 0.95) -> Interval:
    """The interval of sum(sums) / sum(counts): the cluster-robust variance of a ratio, t with C - 1 df.

    `sums` (C,) the credit of each cluster (class), `counts` (C,) its queries, all above 0. `sd` is over the
    clusters' own means.
    """
    s, n = _finite(sums, ndim=1), _finite(counts, ndim=1)
    if s.shape != n.shape or (n <= 0).any():
        raise ValueError("every cluster needs a sum and a count above 0")
    clusters, value = len(s), float(s.sum() / n.sum())
    if clusters == 1:
        return Interval(value, None, None, 1, None)
    spread = _snap(float(((s - value * n) ** 2).sum()), s)
    se = (clusters / (clusters - 1) * spread) ** 0.5 / float(n.sum())
    return _student(value, se, clusters - 1, clusters, _sd(s / n), level)


def median_interval(process_medians: Scores, *, level: float = 0.95) -> Interval:
    """The interval of a time: the median of `process_medians` (n,), one value above 0 per process.

    Student's t on the logs, since machines slow down by factors: median x exp(+-t(n - 1) s_log sqrt(pi / 2n)).
    sqrt(pi / 2) is how much wider the median of many normal values scatters than their mean; for the few processes of
    a timing it is a little too much, which keeps the interval conservative: normal logs, simulated, n = 3, 5, 10: the
    95 % interval covers 96.5-97 %, the 99 % interval 99.4-99.6 %, and the median of a second run of as many
    processes falls into the 99 % interval in 96.7-98.5 %. `sd` is in the values' own unit. One value has no bounds.

    Raises ValueError for no values or for values that are not finite and above 0.
    """
    x = _positive(process_medians)
    value = float(np.median(x))
    if len(x) == 1:
        return Interval(value, None, None, 1, None)
    se = _sd(np.log(x)) * (np.pi / 2 / len(x)) ** 0.5
    spread = float(np.exp(float(special.stdtrit(len(x) - 1, (1 + level) / 2)) * se))
    return Interval(value, value / spread, value * spread, len(x), _sd(x))


def ratio(a: Interval, b: Interval) -> Interval:
    """The interval of a / b, two independent intervals on a log scale such as `median_interval` gives.

    Their half widths on the log scale are added in quadrature (Banerjee 1960, as in `seeds_interval`). No bounds where
    one has none; `n` is the smaller of the two. Raises ValueError for values or bounds that are not above 0.
    """
    value, n = float((_positive([a.value]) / _positive([b.value]))[0]), min(a.n, b.n)
    halves = [_log_half(side) for side in (a, b)]
    if halves[0] is None or halves[1] is None:
        return Interval(value, None, None, n, None)
    spread = float(np.exp(np.hypot(halves[0], halves[1])))
    return Interval(value, value / spread, value * spread, n, None)


def paired_ratio(a: Scores, b: Scores, *, level: float = 0.95) -> Interval:
    """`median_interval` of a[i] / b[i]: both (n,) in the same processes, so that what slows a process down cancels.

    Raises ValueError for unequal lengths, or what `median_interval` raises it for.
    """
    x, y = _positive(a), _positive(b)
    if x.shape != y.shape:
        raise ValueError(f"paired times need the same processes, got {len(x)} and {len(y)}")
    return median_interval(x / y, level=level)


def power_law(x: Scores, y: Scores, *, level: float = 0.95) -> PowerLaw:
    """Fit y = factor x^exponent by least squares on the logs; `x` (k,), `y` (k,) or (P processes, k), all above 0.

    With two or more processes each gives its exponent, and the interval is Student's t over processes: it says how
    well the exponent of these points is known. With one it is the t-interval of the regression (k - 2 degrees of
    freedom): how well the points lie on a line; none for two points. Where fixed costs bend the line, `worst` shows
    it, not the interval. Raises ValueError for fewer than two different x.
    """
    logs_x, table = np.log(_positive(x)), np.atleast_2d(np.asarray(y, dtype=np.float64))
    logs_y = np.log(np.stack([_positive(row) for row in table]))
    if logs_y.shape[1:] != logs_x.shape or np.ptp(logs_x) == 0:
        raise ValueError("a power law needs as many y as x, and two different x")
    centred = logs_x - logs_x.mean()
    slopes = logs_y @ centred / (centred @ centred)
    mean = logs_y.mean(axis=0)
    exponent = mean_interval(slopes, level=level)
    residual = mean - mean.mean() - exponent.value * centred
    if len(slopes) == 1 and len(logs_x) > 2:
        sd = (_snap(float(residual @ residual), mean) / (len(logs_x) - 2)) ** 0.5
        se = sd / float(centred @ centred) ** 0.5
        exponent = _student(exponent.value, se, len(logs_x) - 2, len(logs_x), sd, level)
    factor = float(np.exp(mean.mean() - exponent.value * logs_x.mean()))
    return PowerLaw(exponent, factor, float(np.exp(np.abs(residual).max())))


def smallest_visible_difference(difference: Interval, *, power: float = 0.8) -> float | None:
    """The true difference that an interval as wide as `difference`'s would exclude zero for with probability `power`.

    half width + t(power, df) x standard error, which for a plain t-interval is (t(0.975) + t(0.80)) x
    standard error (about 2.8 standard errors with many episodes). None where there is no interval.
    """
    if difference.half is None or difference.se is None or difference.df is None:
        return None
    return difference.half + float(special.stdtrit(difference.df, power)) * difference.se


def half_width(sources: Sequence[Source], *, tail: float) -> float:
    """How far an estimate reaches to one side with the probability `tail` (0 to 0.5) of error.

    The sources' own half widths, each with its t quantile, added in quadrature (Banerjee 1960): exact for one source,
    conservative for more.
    """
    return float(np.sqrt(sum((float(special.stdtrit(one.df, tail)) * one.se) ** 2 for one in sources)))


def tail_probability(distance: float, sources: Sequence[Source]) -> float:
    """One-sided p: the `tail` at which `half_width` is as wide as `distance`; 1 where that is not above 0.

    The p-value of a mean that lies so far beyond the null hypothesis' bound. 0 where nothing varies.
    """
    if distance <= 0:
        return 1.0
    low, high = -200.0, float(np.log(0.5))  # of the logarithm; further out, t's quantiles overflow
    if half_width(sources, tail=float(np.exp(low))) < distance:
        return float(np.exp(low)) if any(one.se > 0 for one in sources) else 0.0
    for _ in range(60):
        middle = (low + high) / 2
        wide = half_width(sources, tail=float(np.exp(middle))) > distance
        low, high = (middle, high) if wide else (low, middle)
    return float(np.exp((low + high) / 2))


def holm(p_values: Scores) -> list[float]:
    """Holm's adjusted p-values of a family, in the same order: below alpha, its test holds at that family-wise rate.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    found: list[float] = adjusted.tolist()
    return found


def proportion_interval(hits: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a rate seen `hits` times in `trials`.

    Raises:
        ValueError: no trials, or hits outside 0..trials.
    """
    from scipy import stats as distributions  # a second to import, and wanted here alone

    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits in {trials} trials")
    interval = distributions.binomtest(hits, trials).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def iqm_interval(scores: Sequence[Scores], *, level: float = 0.95, draws: int = 5000, seed: int = 0) -> Interval:
    """The interquartile mean of the scores of several data sets, each an array (runs,), with its bootstrap interval.

    The mean of the middle half of all scores (Agarwal et al. 2021, "Deep reinforcement learning at the edge of the
    statistical precipice"), each data set weighing the same, whatever its number of runs: a score weighs 1 / runs, and
    whole scores are cut from both ends as long as they weigh a quarter of all or less.

    Stratified percentile bootstrap: the runs of each data set are drawn again, so the interval
    speaks of other trainings on these data sets, not of other data sets. The draws of a few runs scatter too little:
    their percentiles are moved away from the estimate by sqrt(n / (n - 1)), n the runs of the smallest data set, and by
    Student's quantile over the normal one (degrees of freedom: half of all runs - 1, since the estimate rests on the
    middle half). Simulated with three runs on each of four data sets, it covers 93 to 98 %, bare percentiles 80 to
    86 %. No bounds where a data set has one run. `n` counts the scores.

    Raises ValueError where a data set has no score.
    """
    strata = [_finite(one, ndim=1) for one in scores]
    pooled = np.concatenate(strata)
    weights = np.concatenate([np.full(len(x), 1 / len(x) / len(strata)) for x in strata])
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = np.concatenate([x[generator.integers(0, len(x), (draws, len(x)))] for x in strata], axis=1)
    means = _middle_half(drawn, weights)
    value, least = float(_middle_half(pooled[None], weights)[0]), min(map(len, strata))
    sd = _sd(pooled) if len(pooled) > 1 else None
    if least == 1:
        return Interval(value, None, None, len(pooled), sd)
    few = _t((1 + level) / 2, (len(pooled) - len(strata)) / 2) / float(special.ndtri((1 + level) / 2))
    low, high = value + few * (least / (least - 1)) ** 0.5 * (
        np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) - value
    )
    return Interval(value, float(low), float(high), len(pooled), sd)


def _middle_half(rows: Floats, weights: Floats) -> Floats:
    """The mean of the middle half of each of `rows` (R, n), its columns of `weights` (n,) that sum to 1.

    With equal weights it is the trimmed mean that cuts floor(n / 4) scores from each end.
    """
    order = np.argsort(rows, axis=1, kind="stable")
    x, w = np.take_along_axis(rows, order, axis=1), weights[order]
    until = w.cumsum(axis=1)
    kept = w * ((until > 0.25 + _ROUNDING) & (1 - until + w > 0.25 + _ROUNDING))
    found: Floats = (kept * x).sum(axis=1) / kept.sum(axis=1)
    return found


def rank_agreement(
    a: Sequence[Interval], b: Sequence[Interval], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Agreement:
    """How alike A, a stand-in, and B, the real thing, order the same algorithms: `a[i]` and `b[i]` are i's means.

    tau-b (Kendall 1945) is of the means. Its interval is a parametric bootstrap: every mean is redrawn from a
    normal with its own standard error (half width / normal quantile), so it says how far measurement noise
    could move tau; it has no bounds where a mean has none. A pair is decided when its means on B lie further
    apart than their half widths added in quadrature; what counts then is the order of its means on A. Raises
    ValueError for unequal lists or fewer than two algorithms.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"rank agreement needs the same two or more algorithms on both sides, got {len(a)} and {len(b)}"
        )
    means = [np.array([i.value for i in side]) for side in (a, b)]
    tau = float(_tau_b(means[0][None], means[1][None])[0])
    halves = [np.array([np.nan if i.half is None else i.half for i in side]) for side in (a, b)]
    order, real = _decided(means[0], np.zeros_like(means[0])), _decided(means[1], halves[1])
    decided = real != 0
    low, high = _tau_bounds(means, halves, level, draws, seed)
    return Agreement(tau, low, high, len(real), int(decided.sum()), int((order == real)[decided].sum()))


def _tau_bounds(
    means: list[Floats], halves: list[Floats], level: float, draws: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    if not all(np.isfinite(h).all() for h in halves):
        return None, None
    generator = np.random.Generator(np.random.Philox(seed))
    z = float(special.ndtri((1 + level) / 2))
    drawn = [m + h / z * generator.standard_normal((draws, len(m))) for m, h in zip(means, halves, strict=True)]
    low, high = np.quantile(_tau_b(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _tau_b(a: Floats, b: Floats) -> Floats:
    """Kendall's tau-b of each row of `a` and `b` (draws, k); 0 where one side is all ties."""
    i, j = np.triu_indices(a.shape[1], 1)
    x, y = np.sign(a[:, i] - a[:, j]), np.sign(b[:, i] - b[:, j])
    scale = np.sqrt((x != 0).sum(axis=1) * (y != 0).sum(axis=1))
    tau: Floats = (x * y).sum(axis=1) / np.where(scale == 0, 1, scale)
    return tau


def _decided(means: Floats, halves: Floats) -> npt.NDArray[np.int8]:
    """+1 or -1 for each pair (i < j) whose means lie further apart than their intervals allow, else 0."""
    i, j = np.triu_indices(len(means), 1)
    gap = means[i] - means[j]
    return np.where(np.abs(gap) > np.hypot(halves[i], halves[j]), np.sign(gap), 0).astype(np.int8)


@functools.lru_cache(maxsize=1024)
def _t(probability: float, df: float) -> float:
    """Student's quantile, kept: a leaderboard asks for the same few ten thousand times."""
    return float(special.stdtrit(df, probability))


def _student(value: float, se: float, df: float, n: int, sd: float, level: float) -> Interval:
    half = _t((1 + level) / 2, df) * se
    return Interval(value, value - half, value + half, n, sd, se, df)


def _two_sources(
    value: float, first: tuple[float, int], second: tuple[float, int], sd: float, level: float
) -> Interval:
    """Join two (variance, units) of one mean: Banerjee's half width; `se` and Satterthwaite's `df` beside it."""
    variance = first[0] + second[0]
    if variance == 0:
        return Interval(value, value, value, first[1], sd, 0.0, float(first[1] - 1))
    quantiles = [_t((1 + level) / 2, units - 1) for _, units in (first, second)]
    half = float(np.hypot(quantiles[0] * first[0] ** 0.5, quantiles[1] * second[0] ** 0.5))
    df = variance**2 / (first[0] ** 2 / (first[1] - 1) + second[0] ** 2 / (second[1] - 1))
    return Interval(value, value - half, value + half, first[1], sd, variance**0.5, df)


def _sd(x: Floats, mean: float | None = None) -> float:
    """Standard deviation (ddof 1), exactly 0 where nothing varies; `mean` where it is known already."""
    rest = x - (x.mean() if mean is None else mean)
    return math.sqrt(_snap(float((rest**2).sum()), x) / (len(x) - 1))


def _snap(squares: float, x: Floats) -> float:
    """A sum of squares, 0 where it is no more than rounding of the numbers in `x`: constant scores then have sd 0."""
    rounding = x.size * (8 * _EPSILON * float(np.abs(x).max())) ** 2
    return 0.0 if squares <= rounding else squares


def _log_half(interval: Interval) -> float | None:
    if interval.low is None or interval.high is None:
        return None
    low, high = np.log(_positive([interval.low, interval.high]))
    return float(high - low) / 2


def _positive(values: Scores) -> Floats:
    x = _finite(values, ndim=1)
    if (x <= 0).any():
        raise ValueError("times and counts on a log scale must be above 0")
    return x


def _finite(values: Scores, *, ndim: int) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != ndim or x.size == 0:
        raise ValueError(f"expected a filled array of {ndim} dimension(s), got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("scores must be finite; a row that diverged has no interval")
    return x
