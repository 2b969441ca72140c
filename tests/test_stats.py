import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as reference

from metabench.stats import (
    Interval,
    Source,
    cluster_interval,
    half_width,
    holm,
    mean_interval,
    median_interval,
    paired_difference,
    paired_ratio,
    power_law,
    proportion_interval,
    rank_agreement,
    ratio,
    seed_sources,
    seeds_interval,
    smallest_visible_difference,
    tail_probability,
)

scores = hnp.arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(2, 12)), elements=st.floats(0, 1, width=32))


@given(hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(-100, 100, width=32)))
def test_mean_interval_is_scipys_t_interval(x):
    interval = mean_interval(x)
    assert interval.sd == pytest.approx(x.std(ddof=1), abs=1e-9)
    if interval.sd:
        low, high = reference.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=reference.sem(x))
        assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert interval.low <= interval.value <= interval.high


def test_one_value_has_no_bounds_and_constant_values_have_no_width():
    assert mean_interval([0.7]) == Interval(0.7, None, None, 1, None)
    constant = mean_interval([0.1] * 10)
    assert (constant.low, constant.high, constant.sd) == (constant.value, constant.value, 0)
    assert seeds_interval(np.full((3, 7), 0.1)).half == 0
    assert not mean_interval([0.7]).excludes(0)
    assert constant.excludes(0)


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [np.inf]])
def test_empty_and_nonfinite_values_are_refused(bad):
    with pytest.raises(ValueError):
        mean_interval(bad)


def test_seeds_interval_golden():
    x = np.array([[0.9, 0.8, 1.0, 0.7], [0.8, 0.8, 0.9, 0.5], [1.0, 0.7, 0.9, 0.6]])
    interval = seeds_interval(x)
    means, columns = x.mean(1), x.mean(0)
    residual = x - means[:, None] - columns + x.mean()
    of_seeds = means.var(ddof=1) / 3
    of_episodes = columns.var(ddof=1) / 4 - (residual**2).sum() / 6 / 12
    half = np.sqrt(4.302653**2 * of_seeds + 3.182446**2 * of_episodes)
    assert interval.value == pytest.approx(0.8)
    assert interval.half == pytest.approx(half, rel=1e-6)
    assert interval.half == pytest.approx(0.26245, abs=1e-5)
    assert (interval.n, interval.sd) == (3, pytest.approx(means.std(ddof=1)))


@given(scores)
def test_more_sources_never_narrow_the_interval_over_seeds(x):
    assert seeds_interval(x).half >= mean_interval(x.mean(axis=1)).half - 1e-9


@given(scores, st.randoms(use_true_random=False))
def test_the_order_of_seeds_and_episodes_does_not_matter(x, random):
    rows, columns = list(range(x.shape[0])), list(range(x.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    a, b = seeds_interval(x), seeds_interval(x[rows][:, columns])
    assert (b.value, b.half) == (pytest.approx(a.value), pytest.approx(a.half, abs=1e-6))


def test_one_seed_is_the_interval_over_episodes():
    episodes = [0.8, 0.9, 1.0, 0.6]
    assert seeds_interval([episodes]) == mean_interval(episodes)
    assert seeds_interval(np.array([episodes]).T) == mean_interval(episodes)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seed", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("of_episode", [0.0, 1.0])
def test_the_seeds_interval_covers_what_it_says(seeds, of_seed, of_episode):
    generator = np.random.Generator(np.random.Philox(seeds))
    trials, episodes = 800, 200
    x = of_seed * generator.standard_normal((trials, seeds, 1))
    x = x + of_episode * generator.standard_normal((trials, 1, episodes))
    x = x + 0.5 * generator.standard_normal((trials, seeds, episodes))
    missed = sum(seeds_interval(trial).excludes(0) for trial in x)
    # 5 % of 800 is 40, three standard deviations above it 58; there is no lower limit, the interval is conservative
    assert missed <= 58
    if seeds == 5:
        assert missed >= 10


def test_pairing_removes_what_both_methods_share():
    generator = np.random.Generator(np.random.Philox(1))
    hard = generator.standard_normal((1, 300))
    a = hard + 0.05 * generator.standard_normal((3, 300)) + 0.02
    b = hard + 0.05 * generator.standard_normal((3, 300))
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    assert difference.half < seeds_interval(a).half / 5
    reverse = paired_difference(b, a)
    assert (reverse.low, reverse.high) == (pytest.approx(-difference.high), pytest.approx(-difference.low))
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference(a, b[:2])


def test_cluster_interval_golden_with_unequal_clusters():
    # value 0.6; residuals 8 - 6, 4 - 6, 3 - 3 -> squares 8; se = sqrt(3 / 2 * 8) / 25; t(0.975, 2) = 4.302653
    interval = cluster_interval([8, 4, 3], [10, 10, 5])
    assert interval.value == pytest.approx(0.6)
    assert interval.half == pytest.approx(4.302653 * np.sqrt(12) / 25, rel=1e-6)
    assert cluster_interval([3], [5]).low is None
    with pytest.raises(ValueError, match="above 0"):
        cluster_interval([1, 0], [2, 0])


def test_smallest_visible_difference_is_seen_four_times_in_five():
    x = np.random.Generator(np.random.Philox(4)).standard_normal((1, 400))
    interval = seeds_interval(x)
    visible = smallest_visible_difference(interval)
    assert visible == pytest.approx((1.96592 + 0.84281) * x.std(ddof=1) / 20, rel=1e-4)
    generator = np.random.Generator(np.random.Philox(5))
    seen = sum(mean_interval(t).excludes(0) for t in visible + x.std(ddof=1) * generator.standard_normal((600, 400)))
    assert 0.74 < seen / 600 < 0.86
    assert smallest_visible_difference(mean_interval([1.0])) is None


def around(values, half):
    return [Interval(v, v - half, v + half, 3, None) for v in values]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12),
)
def test_tau_is_scipys_tau_b(pairs):
    a, b = zip(*pairs, strict=True)
    expected = reference.kendalltau(a, b).statistic
    tau = rank_agreement(around(a, 0.1), around(b, 0.1), draws=10).tau
    assert tau == pytest.approx(0 if np.isnan(expected) else expected)


def test_agreement_counts_the_pairs_that_the_second_side_decides():
    a = around([0.9, 0.8, 0.5], 0.01)
    b = around([0.8, 0.805, 0.4], 0.01)
    agreement = rank_agreement(a, b)
    assert (agreement.pairs, agreement.decided, agreement.alike) == (3, 2, 2)
    assert agreement.tau == pytest.approx(1 / 3)
    assert agreement.low <= agreement.tau <= agreement.high
    turned = rank_agreement(a, around([0.4, 0.6, 0.8], 0.01))
    assert (turned.tau, turned.decided, turned.alike) == (-1, 3, 0)
    assert rank_agreement([*a[:2], Interval(0.5, None, None, 1, None)], b).low is None
    with pytest.raises(ValueError, match="same two or more"):
        rank_agreement(a, b[:2])


# times


def test_median_interval_golden():
    interval = median_interval([1.0, 2.0, 4.0])
    half = 4.302653 * np.log(2) * np.sqrt(np.pi / 6)
    assert (interval.value, interval.n, interval.sd) == (2.0, 3, pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert np.log([interval.low, interval.high]) == pytest.approx([np.log(2) - half, np.log(2) + half], rel=1e-6)
    assert median_interval([0.3]) == Interval(0.3, None, None, 1, None)
    constant = median_interval([0.1] * 5)
    assert (constant.low, constant.value, constant.high, constant.sd) == (0.1, 0.1, 0.1, 0)


@pytest.mark.parametrize("bad", [[], [0.0, 1.0], [-1.0], [np.nan], [[1.0, 2.0]]])
def test_median_interval_refuses_what_is_no_time(bad):
    with pytest.raises(ValueError):
        median_interval(bad)


@given(hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(1e-6, 1e3)), st.floats(1e-3, 1e3))
def test_median_interval_has_no_unit(x, scale):
    a, b = median_interval(x), median_interval(x * scale)
    assert (b.value, b.low, b.high) == pytest.approx((a.value * scale, a.low * scale, a.high * scale), rel=1e-6)
    assert a.low <= a.value <= a.high


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_median_interval_covers_at_its_level_and_the_next_run(n, level):
    times = np.exp(0.1 * np.random.default_rng(n).standard_normal((1500, 2, n)))
    found = [(median_interval(first, level=level), np.median(second)) for first, second in times]
    assert np.mean([i.low <= 1 <= i.high for i, _ in found]) >= level - 0.015
    if level == 0.99:
        assert np.mean([i.low <= second <= i.high for i, second in found]) >= 0.9


def test_ratio_adds_the_half_widths_of_the_logs_in_quadrature():
    found = ratio(Interval(6.0, 3.0, 12.0, 5, None), Interval(2.0, 1.0, 4.0, 3, None))
    spread = np.exp(np.hypot(np.log(2), np.log(2)))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 / spread, 3 * spread))
    assert found.n == 3
    assert ratio(Interval(6.0, None, None, 1, None), Interval(2.0, 1.0, 4.0, 3, None)).low is None
    with pytest.raises(ValueError):
        ratio(Interval(0.0, None, None, 1, None), Interval(2.0, 1.0, 4.0, 3, None))


def test_pairing_by_process_cancels_what_slows_a_process_down():
    rng = np.random.default_rng(3)
    slow = np.exp(0.2 * rng.standard_normal((400, 5)))
    noise = np.exp(0.01 * rng.standard_normal((400, 2, 5)))
    pairs = [(1.5 * s * e[0], s * e[1]) for s, e in zip(slow, noise, strict=True)]
    paired = [paired_ratio(a, b) for a, b in pairs]
    apart = [ratio(median_interval(a), median_interval(b)) for a, b in pairs]
    assert np.mean([i.low <= 1.5 <= i.high for i in paired]) >= 0.935
    assert np.median([i.half for i in paired]) < np.median([i.half for i in apart]) / 10
    with pytest.raises(ValueError, match="same processes"):
        paired_ratio([1.0, 2.0], [1.0])


def test_unpaired_ratios_of_independent_processes_cover():
    times = np.exp(0.1 * np.random.default_rng(4).standard_normal((1500, 2, 5)))
    found = [ratio(median_interval(a), median_interval(b)) for a, b in times]
    assert np.mean([i.low <= 1 <= i.high for i in found]) >= 0.935


def test_power_law_is_least_squares_on_logs():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    y = np.array([3.0, 5.0, 13.0, 21.0])
    found, line = power_law(x, y), reference.linregress(np.log(x), np.log(y))
    half = reference.t.ppf(0.975, 2) * line.stderr
    assert (found.exponent.value, found.exponent.half) == pytest.approx((line.slope, half))
    assert found.factor == pytest.approx(np.exp(line.intercept))
    assert found.worst == pytest.approx(np.exp(np.abs(np.log(y) - line.intercept - line.slope * np.log(x)).max()))
    exact = power_law(x, 0.5 * x**0.75)
    assert (exact.exponent.value, exact.factor, exact.worst) == pytest.approx((0.75, 0.5, 1.0))
    assert exact.exponent.half == pytest.approx(0, abs=1e-9)
    assert power_law([1, 2], [1, 4]).exponent == Interval(2.0, None, None, 1, None)


def test_the_interval_of_an_exponent_is_over_processes():
    x, rng = np.array([1.0, 2.0, 4.0, 8.0]), np.random.default_rng(5)
    drift = np.exp(0.2 * rng.standard_normal((800, 5, 1)))  # of a whole process: no matter to the exponent
    times = drift * (0.1 + x) * np.exp(0.02 * rng.standard_normal((800, 5, 4)))  # bent by a fixed cost
    found = [power_law(x, y) for y in times]
    truth = power_law(x, 0.1 + x).exponent.value
    assert np.mean([f.exponent.low <= truth <= f.exponent.high for f in found]) >= 0.93
    assert np.median([f.exponent.half for f in found]) < 0.03


@pytest.mark.parametrize(("x", "y"), [([1, 1], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2], [0, 1]), ([-1, 2], [1, 1])])
def test_a_power_law_refuses_what_has_none(x, y):
    with pytest.raises(ValueError):
        power_law(x, y)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_steps_reject(p_values):
    adjusted = holm(p_values)
    for alpha in (0.01, 0.05, 0.2):
        ordered = sorted(range(len(p_values)), key=lambda i: p_values[i])
        rejected = set()
        for rank, i in enumerate(ordered):  # step down until the first that is not rejected
            if (len(p_values) - rank) * p_values[i] >= alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < alpha} == rejected


def test_proportion_interval_is_the_exact_one():
    """No alarm in 300 rows bounds the rate at 1 %, one-sided (1 - 0.05^(1/300)); two-sided a little above."""
    assert proportion_interval(0, 300, level=0.9) == (0, pytest.approx(1 - 0.05 ** (1 / 300)))
    low, high = proportion_interval(57, 60)
    assert low == pytest.approx(reference.beta.ppf(0.025, 57, 4)) and high == pytest.approx(
        reference.beta.ppf(0.975, 58, 3)
    )
    for wrong in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="trials"):
            proportion_interval(*wrong)


def test_a_tail_probability_of_one_source_is_student_s():
    rng = np.random.default_rng(0)
    for n in (2, 3, 12, 400):
        x = rng.normal(0.2, 1, n)
        source = Source(float(x.std(ddof=1)) / n**0.5, n - 1)
        for bound in (-0.3, 0.0, 0.1):
            expected = reference.ttest_1samp(x, bound, alternative="greater")
            found = tail_probability(float(x.mean()) - bound, [source])
            assert found == (1.0 if expected.statistic <= 0 else pytest.approx(expected.pvalue, rel=1e-6))


def test_a_tail_probability_inverts_the_half_width():
    sources = [Source(0.3, 4), Source(0.1, 599)]
    for tail in (0.4, 0.025, 1e-4, 1e-9):
        assert tail_probability(half_width(sources, tail=tail), sources) == pytest.approx(tail)
    assert tail_probability(0.1, [Source(0.0, 4)]) == 0.0
    assert tail_probability(0.0, [Source(0.0, 4)]) == 1.0
    assert 0 < tail_probability(1e30, [Source(1e-9, 2)]) < 1e-50


def test_seed_sources_are_those_of_the_interval():
    scores = np.random.default_rng(1).normal(0.9, 0.1, (5, 40)) + np.random.default_rng(2).normal(0, 0.1, (5, 1))
    sources, whole = seed_sources(scores), seeds_interval(scores)
    assert half_width(sources, tail=0.025) == pytest.approx(whole.half)
    with pytest.raises(ValueError, match="two seeds"):
        seed_sources(scores[:1])
