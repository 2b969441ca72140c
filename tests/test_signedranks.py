"""The exact signed-rank test against scipy, against counting, and its interval and power against simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from metabench.signedranks import centre, detectable, p_above, p_below, spread

values = st.lists(st.floats(-5, 5), min_size=1, max_size=14, unique_by=lambda x: round(abs(x), 6))


@given(values, st.floats(-1, 1))
def test_p_values_are_scipys(x, shift):
    x = np.array(x)
    differences = np.abs(x - shift)
    if (differences == 0).any() or len(set(differences)) < len(x):
        return
    for mine, side in ((p_above, "greater"), (p_below, "less")):
        assert mine(x, shift) == pytest.approx(
            scipy_stats.wilcoxon(x - shift, alternative=side, method="exact").pvalue, abs=1e-12
        )


def test_p_value_is_the_share_of_sign_patterns_that_are_as_extreme():
    x = np.array([0.4, -0.1, 0.9, 0.2, 1.4, -0.3])
    ranks = scipy_stats.rankdata(abs(x))
    sums = [sum(r for r, on in zip(ranks, signs, strict=True) if on) for signs in itertools.product((0, 1), repeat=6)]
    assert p_above(x) == np.mean([s >= ranks[x > 0].sum() for s in sums])
    assert p_above([0.1] * 14) == 2.0**-14


def test_ties_and_values_at_the_shift_never_help_to_reject():
    assert p_above([0.0, 0.0, 1.0]) == p_above([-1e-9, -2e-9, 1.0])
    assert p_above([1.0, -1.0, 2.0]) == 3 / 8  # mid-ranks 1.5, 1.5, 3: three of eight patterns of signs give 4.5 or 6
    rng = np.random.default_rng(1)
    for _ in range(200):
        x = rng.integers(-3, 4, 10).astype(float)
        assert p_above(x) >= min(p_above(x + 1e-6 * rng.standard_normal(10)) for _ in range(20)) - 1e-12


@given(values, st.sampled_from([0.1, 0.025, 0.001]))
def test_the_interval_holds_what_the_test_does_not_reject(x, alpha):
    found = centre(x, alpha=alpha)
    if found.high is None:
        assert 2.0 ** -len(x) > alpha
        return
    assert found.low <= found.value <= found.high
    assert p_below(x, found.high + 1e-3) <= alpha and p_above(x, found.low - 1e-3) <= alpha
    assert p_below(x, found.high - 1e-9) > alpha and p_above(x, found.low + 1e-9) > alpha


def test_the_interval_of_a_textbook():
    # Hollander and Wolfe's depression scale factor data (x - y), as R's wilcox.test(conf.int = TRUE) documents it
    x = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
    y = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])
    assert p_above(x - y) == pytest.approx(0.01953125)
    assert centre(x - y).value == pytest.approx(0.46, abs=0.005)


def test_coverage_at_heavy_tails():
    rng = np.random.default_rng(0)
    sets = rng.standard_t(2, (3000, 14))
    out = [(lambda f: (f.high < 0, f.low > 0))(centre(x, alpha=0.025)) for x in sets]
    above, below = np.mean(out, axis=0)
    assert above <= 0.032 and below <= 0.032  # 0.025 and its simulation error (0.003) twice


@pytest.mark.parametrize("n, alpha", [(14, 0.00125), (28, 0.00125), (20, 0.05)])
def test_what_is_detectable_is_found_with_the_power_that_is_said(n, alpha):
    rng = np.random.default_rng(5)
    shift = detectable(n, alpha, 0.8)
    found = np.mean([p_above(rng.standard_normal(n) + shift) <= alpha for _ in range(2000)])
    assert found == pytest.approx(0.8, abs=0.03)
    assert detectable(n, alpha, 0.95) > shift


def test_too_few_values_show_nothing():
    assert detectable(13, 1e-4) is None and detectable(14, 1e-4) is not None
    assert centre([1.0]).high is None and spread([1.0]) is None


def test_the_spread_is_that_of_the_bulk():
    x = np.random.default_rng(0).normal(0, 0.01, 999)
    assert spread(x) == pytest.approx(0.01, rel=0.1)
    assert spread([*x, 50.0, 60.0]) == pytest.approx(spread(x), rel=0.02)


def test_bad_values_are_refused():
    for bad in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            p_above(bad)
