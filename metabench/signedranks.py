"""Wilcoxon's signed ranks: the exact test, the estimate and interval that belong to it, and what it can see.

A rank bounds what one value can do: of 14 pairs of processes one wild pair of +53 % left a test on the mean blind to a
true 5 % (measured). All rests on the differences being symmetric about their centre, which the random order within
a pair makes them where nothing changed (Wilcoxon 1945; Hodges and Lehmann 1963; Hollander et al. 2014, 3.1-3.3).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from metabench.stats import Interval

Floats = npt.NDArray[np.float64]
MOST = 1000  # values: two sets of as many pairs of processes as a suite may ask for, 500
DRAWS = 4000  # of normal samples, for the power of the test: a power of 80 % is known to 0.6 points


def p_above(values: npt.ArrayLike, shift: float = 0.0) -> float:
    """The one-sided p-value of "the centre of `values` (n,) is not above `shift`"; 2^-n at the least.

    Exact for differences without ties; where there are any, conservative: a value equal to `shift` counts against
    rejecting, and a sum of mid-ranks is rounded down. Raises ValueError for no values or any that is not finite.
    """
    x = _checked(values) - shift
    ranks = distributions.rankdata(np.abs(x))
    return float(_tail(len(x))[int(np.floor(ranks[x > 0].sum()))])


def p_below(values: npt.ArrayLike, shift: float = 0.0) -> float:
    """`p_above` of the other side."""
    return p_above(-_checked(values), -shift)


def centre(values: npt.ArrayLike, *, alpha: float = 0.025) -> Interval:
    """Hodges and Lehmann's estimate, the median of all averages of two values, and the interval inverting the test.

    Each bound is wrong with probability `alpha` at most: `high` is below a number only where `p_below` of that number
    is `alpha` or less. No bounds where so few values cannot give that. `sd` is `spread`'s.
    """
    x = _checked(values)
    n = len(x)
    averages = np.sort(((x[:, None] + x) / 2)[np.triu_indices(n)])
    value = float(np.median(averages))
    # the largest c with P(W <= c) <= alpha, which by symmetry is P(W >= M - c)
    within = int(np.searchsorted(-_tail(n), -alpha))  # the least w with P(W >= w) <= alpha
    if within > len(averages):
        return Interval(value, None, None, n, spread(x))
    cut = len(averages) - within
    return Interval(value, float(averages[cut]), float(averages[-1 - cut]), n, spread(x))


def spread(values: npt.ArrayLike) -> float | None:
    """The standard deviation of normal values, from their median absolute deviation: a wild one does not count.

    With the correction for few values, n / (n - 0.8), of Croux and Rousseeuw (1992). None for one value.
    """
    x = _checked(values)
    if len(x) == 1:
        return None
    deviation = float(np.median(np.abs(x - np.median(x)))) / float(distributions.norm.ppf(0.75))
    return deviation * len(x) / (len(x) - 0.8)


@functools.cache
def detectable(n: int, alpha: float, power: float = 0.8) -> float | None:
    """The shift, in standard deviations of normal values, that n of them show at level `alpha` with that power.

    By simulation with fixed draws (the exact test has no closed form of its power); None where n values can never
    reach `alpha`.
    """
    tail = _tail(n)
    needed = int(np.searchsorted(-tail, -alpha))  # the least sum of ranks that rejects
    if needed >= len(tail):
        return None
    noise = np.random.default_rng(0).standard_normal((DRAWS, n))

    def seen(shift: float) -> float:
        x = noise + shift
        ranks = np.abs(x).argsort(axis=1).argsort(axis=1) + 1
        return float(((ranks * (x > 0)).sum(axis=1) >= needed).mean())

    low, high = 0.0, 1.0
    while seen(high) < power:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) >= power else (middle, high)
    return high


@functools.cache
def _tail(n: int) -> Floats:
    """P(W >= w) for w = 0 .. n(n+1)/2, of the sum W of the ranks 1..n that get a positive sign by a fair coin each."""
    if n > MOST:
        raise ValueError(f"{n} values: the exact test is for {MOST} at most")
    chances = np.ones(1)
    for rank in range(1, n + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return np.asarray(chances[::-1].cumsum()[::-1], dtype=np.float64)


def _checked(values: npt.ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"expected finite values in one dimension, got {x.shape}")
    return x
