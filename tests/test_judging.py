"""How the gate decides, by simulation: false alarms under the declared rate, power where the spread permits it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metabench.judging import CONTROL_LEVEL, Family, confirmed, confirming, findings, moved, pairs_needed
from metabench.stats import proportion_interval
from metabench.suite import Gating
from metabench.thresholds import Margin

RULES = Gating()
USUAL = Margin(margin=0.02, unchanged=0.05)
ROWS = 4


def noise(rng, rows, sd):
    """ln-ratios of one pair of identical code as they were measured: a layout per pair, heavy tails, wild pairs.

    One wild pair in fifty slows one side of one row down by a half.
    """
    of_rows = sd * rng.standard_t(4, rows) / math.sqrt(2)  # variance of t with four degrees of freedom is 2
    wild = np.where(rng.random(rows) < 0.02, rng.choice([-1, 1], rows) * math.log(1.5), 0.0)
    return of_rows + wild


def family_of(names, rules=RULES):
    return Family(dict.fromkeys(names, USUAL), rules)


def decide(rng, truth, sd, rules=RULES):
    """One whole check: looks, early stops, confirmation; (judgements, pairs)."""
    names = list(range(len(truth)))

    def measure(family):
        while family.open:
            drawn = truth + noise(rng, len(truth), sd)
            family.add({name: drawn[name] for name in family.open})
        return family

    first = measure(family_of(names, rules))
    if not findings(first.judgements()):
        return first.judgements(), first
    return confirmed(first, measure(confirming(first))), first


def outcomes(seed, change, sd, checks, rules=RULES):
    rng = np.random.default_rng(seed)
    truth = np.full(ROWS, math.log1p(change))
    return [decide(rng, truth, sd, rules)[0].values() for _ in range(checks)]


@pytest.mark.parametrize("sd", [0.005, 0.02, 0.06])
def test_identical_code_raises_no_alarm(sd):
    found = [one.outcome for check in outcomes(1, 0.0, sd, 150) for one in check]
    assert found.count("regressed") == found.count("improved") == 0
    assert proportion_interval(0, len(found))[1] < 0.01
    if sd < 0.05:
        assert found.count("unchanged") / len(found) > 0.97


def test_at_the_margin_itself_the_rate_of_the_first_set_is_the_declared_one():
    """The hardest case, a true change as large as the margin, before any confirmation."""
    rng, alarms, rules = np.random.default_rng(2), 0, Gating(alpha=0.1)
    truth = np.full(ROWS, math.log1p(USUAL.margin))
    checks = 600
    for _ in range(checks):
        family = family_of(range(ROWS), rules)
        while family.open:
            family.add(dict(enumerate(truth + noise(rng, ROWS, 0.01))))
        alarms += any(one.outcome == "regressed" for one in family.judgements().values())
    low, _ = proportion_interval(alarms, checks)
    assert low <= rules.alpha, f"{alarms} of {checks} families"
    assert alarms > 0, "a rate of nothing would be a test that never rejects"


def test_a_changing_row_among_steady_ones_does_not_raise_their_rate():
    rng, false = np.random.default_rng(3), 0
    truth = np.array([math.log(1.2), math.log(1.2), math.log1p(0.02), math.log1p(0.02)])
    rules = Gating(alpha=0.1)
    for _ in range(300):
        found, _ = decide(rng, truth, 0.01, rules)
        false += any(found[name].outcome == "regressed" for name in (2, 3))
    assert proportion_interval(false, 300)[0] <= rules.alpha


@pytest.mark.parametrize("sd", [0.005, 0.01, 0.02])
def test_a_slowdown_of_five_per_cent_is_found(sd):
    found = [one.outcome for check in outcomes(4, 0.05, sd, 60) for one in check]
    assert found.count("regressed") / len(found) >= 57 / 60


def test_a_slowdown_of_five_per_cent_in_much_noise_is_inconclusive_and_not_passed():
    found = [one.outcome for check in outcomes(5, 0.055, 0.08, 60) for one in check]
    assert found.count("unchanged") / len(found) < 0.01
    assert found.count("inconclusive") > 0.5 * len(found)


def test_ten_per_cent_is_always_found_and_a_gain_is_an_improvement():
    assert {one.outcome for check in outcomes(6, 0.10, 0.02, 60) for one in check} == {"regressed"}
    assert {one.outcome for check in outcomes(7, -0.10, 0.01, 40) for one in check} == {"improved"}


def test_small_but_real():
    found = [one for check in outcomes(8, 0.035, 0.002, 40) for one in check if one.outcome == "regressed"]
    assert len(found) > 120 and sum(one.small for one in found) > 0.8 * len(found)  # but for wild pairs
    assert not any(one.small for check in outcomes(9, 0.10, 0.01, 20) for one in check)


def test_one_wild_pair_blinds_nobody():
    for wild in (-0.6, 0.6):
        rng = np.random.default_rng(10)
        family = family_of(range(ROWS))
        while family.open:
            drawn = math.log1p(0.05) + 0.008 * rng.standard_normal(ROWS)
            if family.pairs == 3:
                drawn[0] += wild
            family.add(dict(enumerate(drawn)))
        assert family.judgements()[0].outcome == "regressed"


def test_rows_stop_when_decided_and_the_rest_goes_on():
    rng = np.random.default_rng(11)
    family = family_of(["quiet", "noisy"])
    seen = []
    while family.open:
        seen.append(list(family.open))
        drawn = {"quiet": 0.003 * rng.standard_normal(), "noisy": 0.3 * rng.standard_normal()}
        family.add({name: drawn[name] for name in family.open})
    assert seen[13] == ["quiet", "noisy"] and seen[14] == ["noisy"] and len(seen) == 28
    quiet, noisy = family.judgements().values()
    assert quiet.change.n == 14 and quiet.outcome == "unchanged"
    assert noisy.change.n == 28 and noisy.outcome == "inconclusive" and noisy.detectable > 0.05


@pytest.mark.parametrize("seed", range(40))
def test_a_row_is_unchanged_where_and_only_where_its_upper_bound_is_low_enough(seed):
    rng = np.random.default_rng(seed)
    family = family_of(range(3))
    sds, bound = rng.uniform(0.005, 0.08, 3), math.log1p(USUAL.unchanged)
    while family.open:
        family.add(dict(enumerate(sds * rng.standard_normal(3))))
    for one in family.judgements().values():
        low_enough = one.change.high is not None and one.change.high < bound
        assert (one.outcome == "unchanged") == low_enough, one


def test_an_alarm_that_does_not_come_back_is_taken_back():
    first = family_of(["row"])
    for n in range(14):
        first.add({"row": 0.11 + 0.001 * n})
    assert first.judgements()["row"].outcome == "regressed"
    again = confirming(first)
    for n in range(14):
        again.add({"row": 0.001 * (-1) ** n * n})
    found = confirmed(first, again)["row"]
    assert found.outcome == "inconclusive" and "not confirmed" in found.reason and found.change.n == 28
    assert not again.open, "the second set says that it is unchanged, and that is enough"


def test_the_detectable_change_is_found_four_times_in_five():
    rng = np.random.default_rng(12)
    trials, found, said = 300, 0, []
    rules = Gating(looks=(28,))
    for _ in range(trials):
        family = family_of(["row"], rules)
        for _ in range(28):
            family.add({"row": 0.03 * rng.standard_normal()})
        said.append(family.judgements()["row"].detectable)
    true = float(np.median(said))
    for _ in range(trials):
        family = family_of(["row"], rules)
        for _ in range(28):
            family.add({"row": true + 0.03 * rng.standard_normal()})
        found += family.judgements()["row"].outcome == "regressed"
    assert found / trials == pytest.approx(0.8, abs=0.08)


def test_a_row_that_is_dropped_leaves_the_others_as_they_were():
    family = family_of(["a", "b"])
    family.drop("b")
    for n in range(14):
        family.add({"a": 0.2 + 0.001 * n})
    assert family.judgements()["a"].outcome == "regressed" and family.judgements()["b"].outcome == "incomparable"
    assert family.level == RULES.alpha / 2 / 2


def test_a_pair_without_a_number_for_a_row_is_one_value_less_and_no_more():
    family = family_of(["whole", "holes", "empty"], Gating(alpha=0.05, looks=(14,)))
    rng = np.random.default_rng(0)
    for pair in range(14):
        ratios = {name: math.log(1.1) + 0.001 * rng.standard_normal() for name in ("whole", "holes")}
        if pair % 5 == 0:
            del ratios["holes"]
        family.add(ratios)
    found = family.judgements()
    assert [found[name].outcome for name in ("whole", "holes", "empty")] == ["regressed", "regressed", "inconclusive"]
    assert [found[name].change.n for name in ("whole", "holes", "empty")] == [14, 11, 0]


def test_controls_move_only_when_they_move():
    rng = np.random.default_rng(13)
    still = [moved(noise(rng, 14, 0.01), 0.02) for _ in range(500)]
    assert proportion_interval(sum(one is not None for one in still), 500)[0] <= CONTROL_LEVEL
    assert sum(one is not None for one in still) <= 5
    assert sum(moved(0.05 + noise(rng, 14, 0.01), 0.02) is not None for _ in range(50)) > 40
    noisy = sum(moved(noise(rng, 14, 0.15), 0.02) is not None for _ in range(500))
    assert proportion_interval(noisy, 500)[0] <= CONTROL_LEVEL, "far off, but by chance"
    assert moved([0.004 + 0.0001 * n for n in range(14)], 0.02) is None, "sure, but no matter"


def test_pairs_needed_are_enough_and_no_more():
    needed = pairs_needed(0.02, 0.05, 0.00125, 0.02)
    assert 14 < needed < 28
    assert pairs_needed(0.01, 0.05, 0.00125, 0.02) < needed < pairs_needed(0.03, 0.05, 0.00125, 0.02)
    assert pairs_needed(0.3, 0.05, 0.00125, 0.02) is None and pairs_needed(0.001, 0.01, 0.00125, 0.02) is None


def test_each_row_is_judged_by_its_own_margin():
    margins = {"strict": USUAL, "lenient": Margin(margin=0.2, unchanged=0.3)}
    family = Family(margins, RULES)
    for n in range(14):
        family.add(dict.fromkeys(margins, 0.11 + 0.001 * n))
    found = family.judgements()
    assert (found["strict"].outcome, found["lenient"].outcome) == ("regressed", "unchanged")
    assert list(confirming(family).margins.items()) == [("strict", USUAL)]


def test_a_confirmed_regression_is_small_only_where_the_interval_that_is_shown_says_so():
    def confirmed_after(first_change):
        first = family_of(["row"])
        for n in range(14):
            first.add({"row": first_change + 0.0001 * n})
        again = confirming(first)
        while again.open:
            again.add({"row": 0.03 + 0.0001 * again.pairs})
        assert again.judgements()["row"].small, "the second set alone would always say so"
        return confirmed(first, again)["row"]

    wide, narrow = confirmed_after(0.11), confirmed_after(0.03)
    assert wide.outcome == narrow.outcome == "regressed"
    assert wide.change.high > math.log1p(USUAL.unchanged) > narrow.change.high
    assert narrow.small and not wide.small
