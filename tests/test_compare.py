"""Stored results against stored results: what is called a change, what is not, and why nothing can be said."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from stored_runs import MACHINE, Stored, as_csv

from metabench import compare as comparison
from metabench.compare import ALPHA, compare
from metabench.errors import ConfigError, NothingRan, StoreError
from metabench.sides import Home, Result, Scores
from metabench.stats import mean_interval
from metabench.store import Run
from metabench.thresholds import Margin
from metabench.verdicts import Verdict

REFERENCE = Path(__file__).parent.parent / "results/reference"
EPISODES = 400
RNG = np.random.default_rng(5)
HARD = np.clip(0.9 + 0.06 * RNG.standard_normal(EPISODES), 0, 1)
"""The test episodes' own difficulty: what pairing cancels."""
FIVE = [1.0, 1.01, 0.99, 1.005, 0.995]
"""Seconds of five quiet processes."""


@pytest.fixture
def against(tmp_path):
    """Compare two runs in the making; the findings."""

    def go(base, candidate, **options):
        sides = [[side.at(tmp_path, name)] for name, side in (("base", base), ("candidate", candidate))]
        found = compare(*sides, **options)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        return found

    return go


@pytest.fixture
def verdict(against):
    """The one verdict of a comparison."""

    def go(base, candidate, **options):
        (found,) = against(base, candidate, **options).verdicts
        return found

    return go


def noisy(scores, drop, seed=0, sd=0.02):
    return np.clip(scores - drop + sd * np.random.default_rng(seed).standard_normal(len(scores)), 0, 1)


# accuracy, same weights


def test_a_run_against_itself_is_identical(verdict):
    run = Stored().quality(HARD, predictions=np.zeros((EPISODES, 3), int))
    same = verdict(run, run)
    assert (same.outcome, same.change, same.low, same.high) == ("unchanged", 0.0, 0.0, 0.0)
    assert "identical predictions on 400" in same.reason


def test_one_point_is_found_on_paired_episodes_where_unpaired_intervals_overlap(verdict):
    worse = noisy(HARD, 0.01)
    before, after = mean_interval(HARD), mean_interval(worse)
    assert after.high > before.low, "the test is about intervals that overlap"
    found = verdict(Stored().quality(HARD), Stored().quality(worse))
    assert found.outcome == "regressed"
    assert found.low < -0.01 < found.high < -0.005
    assert found.change == pytest.approx(np.mean(worse - HARD))
    assert 0.005 < found.detectable < 0.01
    assert "adapt gate" in found.reason


def test_the_interval_on_paired_episodes_is_the_paired_t_interval(verdict):
    worse = noisy(HARD, 0.003)
    found = verdict(Stored().quality(HARD), Stored().quality(worse))
    expected = scipy_stats.ttest_rel(worse, HARD).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("drop", "sd", "outcome"),
    [(0.0, 0.02, "unchanged"), (-0.02, 0.02, "improved"), (0.001, 0.2, "inconclusive"), (0.003, 0.01, "unchanged")],
)
def test_outcomes_by_size_and_noise(verdict, drop, sd, outcome):
    flat = np.full(EPISODES, 0.5)
    assert verdict(Stored().quality(flat), Stored().quality(noisy(flat, drop, sd=sd))).outcome == outcome


def test_an_unchanged_row_whose_gain_is_open_says_so(verdict):
    flat = np.full(EPISODES, 0.5)
    found = verdict(Stored().quality(flat), Stored().quality(noisy(flat, -0.005, sd=0.03)))
    assert found.outcome == "unchanged"
    assert "gain is not excluded" in found.reason


@pytest.mark.parametrize(
    "change",
    [
        {"environment": "e2"},
        {"code": "other"},
        {"device": "cuda"},
        {"facts": {"train_steps": 10}},
        {"facts": {"threads": 2}},
        {"facts": {"weights": "b"}},
    ],
    ids=str,
)
def test_other_weights_make_a_single_pair_inconclusive(verdict, change):
    device, facts = change.pop("device", "cpu"), change.pop("facts", {})
    base = Stored().quality(HARD, device=device, facts={"weights": "a"} if "weights" in facts else {})
    environment = change.pop("environment", "e1")
    found = verdict(base, Stored(environment=environment).quality(HARD - 0.1, device=device, facts=facts, **change))
    assert found.outcome == "inconclusive"
    assert "a single retrained pair" in found.reason
    assert found.low is None
    assert found.change == pytest.approx(-0.1)


def test_a_checkpoint_s_digest_is_enough_for_the_adapt_gate(verdict):
    base = Stored().quality(HARD, facts={"weights": "a"})
    changed = Stored(environment="e2").quality(noisy(HARD, 0.02), facts={"weights": "a"}, code="other")
    assert verdict(base, changed).outcome == "regressed"


def test_what_is_never_trained_is_paired_whatever_its_code(verdict):
    settings = {"name": "pixel-nn", "facts": {"backbone": ""}}
    found = verdict(Stored().quality(HARD, **settings), Stored().quality(noisy(HARD, 0.02), code="new", **settings))
    assert (found.outcome, "adapt gate" in found.reason) == ("regressed", True)
    drawn = {"name": "untrained"}  # its random network is another training seed where the code changed
    found = verdict(Stored().quality(HARD, **drawn), Stored().quality(noisy(HARD, 0.02), code="new", **drawn))
    assert found.outcome == "inconclusive"


def test_identical_predictions_are_unchanged_even_of_a_single_retrained_pair(verdict):
    base, other = (Stored().quality(HARD, code=code, predictions=np.ones((EPISODES, 2), int)) for code in "ab")
    assert verdict(base, other).outcome == "unchanged"
    changed = Stored().quality(HARD, code="b", predictions=np.arange(2 * EPISODES).reshape(EPISODES, 2))
    found = verdict(base, changed)
    assert found.outcome == "inconclusive", "equal scores of other predictions are no proof of equal weights"


# accuracy, trained anew


def seeds(means, code, sd=0.03, **more):
    run = Stored(**more)
    for seed, mean in enumerate(means):
        run.quality(noisy(HARD, HARD.mean() - mean, seed=100 * ord(code) + seed, sd=sd), seed=seed, code=code)
    return run


def test_five_seeds_a_side_decide_and_four_do_not(verdict):
    means = np.array([0.9, 0.901, 0.899, 0.9, 0.9005])
    found = verdict(seeds(means, "a"), seeds(means - 0.03, "b"))
    assert (found.outcome, "5 seeds" in found.reason) == ("regressed", True)
    assert found.cell.endswith("/seeds0-4")
    found = verdict(seeds(means[:4], "a"), seeds(means[:4] - 0.03, "b"))
    assert (found.outcome, "4 retrained pairs" in found.reason) == ("inconclusive", True)
    assert found.low < found.change < found.high


def test_only_seeds_of_both_sides_count(verdict):
    means = np.full(6, 0.9)
    found = verdict(seeds(means, "a"), seeds(means[:4], "b"))
    assert (found.outcome, "4 retrained pairs" in found.reason) == ("inconclusive", True)


def judged(old, new, margin=0.005):
    """The verdict on made-up scores (S, E) of two trainings, without a disk."""
    home = Home(path=None, environments={})
    columns = {"training": "t", "device": "cuda", "environment": "e"}
    row = Result(
        cell="m/d/t/n/cuda-float32/seed0", measure="accuracy", status="ok", reason="", n=1, value=0.5, ci_low=None,
        ci_high=None, seed=0, columns=columns, home=home,
    )  # fmt: skip
    made = Verdict(cell="c", measure="accuracy", outcome="inconclusive", scale="points", worse=-1, margin=margin)
    tested = comparison._on_episodes(made, [(row, row)] * len(old), old, new, Margin(margin, margin))
    return comparison.decide([tested])[0].outcome


def trained(rng, mean, sd, n=5):
    """Scores (S, E): seeds of one method, each with its own mean and its own luck on each of the shared episodes."""
    return mean + sd * rng.standard_normal((n, 1)) + HARD + 0.04 * rng.standard_normal((n, EPISODES))


def test_false_alarms_stay_at_one_per_cent_when_only_the_training_seed_differs():
    rng, trials = np.random.default_rng(11), 1500
    same = [judged(trained(rng, 0, 0.01), trained(rng, 0, 0.01)) for _ in range(trials)]
    assert same.count("regressed") + same.count("improved") <= ALPHA * trials
    edge = [judged(trained(rng, 0, 0.01), trained(rng, -0.005, 0.01)) for _ in range(trials)]
    # a drop of just the margin is the hardest case: alarms at the nominal rate, within chance, and not none at all
    assert 1 <= edge.count("regressed") <= scipy_stats.binom.ppf(0.999, trials, ALPHA)


def test_a_clear_drop_of_every_seed_is_found():
    rng = np.random.default_rng(3)
    found = [judged(trained(rng, 0, 0.003), trained(rng, -0.03, 0.003)) for _ in range(100)]
    assert found.count("regressed") >= 99


def test_what_could_be_seen_is_found_four_times_in_five():
    rng, sd = np.random.default_rng(4), 0.02
    flat = np.full((1, EPISODES), 0.5)
    row = {"cell": "c", "measure": "accuracy", "scale": "points", "worse": -1, "outcome": "inconclusive"}

    def test(drop):
        scores = flat - drop + sd * rng.standard_normal((1, EPISODES))
        difference = (scores - flat)[0]
        source = comparison._episode_source(difference)
        made = Verdict(**row, margin=0.005)
        worse_by = -float(difference.mean())
        tested = comparison.Tested(verdict=made, worse_by=worse_by, margin=0.005, bound=0.005, sources=source)
        return comparison.decide([tested])[0]

    seen = float(np.mean([test(0.0).detectable for _ in range(50)]))
    power = np.mean([test(seen).outcome == "regressed" for _ in range(1000)])
    assert power == pytest.approx(0.8, abs=0.04)


# what cannot be compared


@pytest.mark.parametrize(
    ("base", "other", "reason"),
    [
        ({}, {"episodes": [f"other{i}" for i in range(EPISODES)]}, "no test episode in common"),
        ({"facts": {"pixels": "a"}}, {"facts": {"pixels": "b"}}, "images of the data set differ"),
        ({"name": "m[train=1w1s1q*75s]"}, {"name": "m[train=1w1s1q*75s]"}, "wall time"),
    ],
)
def test_scores_that_answer_different_questions_are_incomparable(verdict, base, other, reason):
    found = verdict(Stored().quality(HARD, **base), Stored().quality(HARD, **other))
    assert (found.outcome, reason in found.reason) == ("incomparable", True)


def test_weights_that_were_selected_differently_are_incomparable(verdict):
    base, other = Stored().quality(HARD), Stored().quality(HARD)
    for cell in other.cells.values():
        cell["selection"] = "val"
    assert verdict(base, other).outcome == "incomparable"


def test_only_shared_episodes_count_in_whatever_order(verdict):
    names = [f"h{i}" for i in range(EPISODES)]
    order = RNG.permutation(EPISODES)[: EPISODES // 2]
    worse = noisy(HARD, 0.02)
    shuffled = Stored().quality(worse[order], episodes=[names[i] for i in order])
    found = verdict(Stored().quality(HARD), shuffled)
    assert found.change == pytest.approx(float(np.mean(worse[order] - HARD[order])))
    assert "200 paired episodes" in found.reason


def test_a_column_is_one_episode_in_every_seed(verdict):
    names = [f"h{i}" for i in range(EPISODES)]
    base, other, straight = Stored(), Stored(), Stored()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(EPISODES)
        scores = noisy(HARD, 0.03, seed)
        base.quality(noisy(HARD, 0, 50 + seed), seed=seed, code="a")
        straight.quality(scores, seed=seed, code="b")
        other.quality(scores[order], seed=seed, code="b", episodes=[names[i] for i in order])
    found, expected = verdict(base, other), verdict(base, straight)
    assert (found.change, found.low, found.high) == pytest.approx((expected.change, expected.low, expected.high))


def test_an_episode_that_was_drawn_twice_is_paired_twice(verdict):
    names = ["a", "b", "a", "c"]
    found = verdict(
        Stored().quality([0.1, 0.2, 0.3, 0.4], episodes=names),
        Stored().quality([0.4, 0.3, 0.1, 0.2], episodes=["c", "a", "a", "b"]),
    )
    assert found.change == pytest.approx(0.0)
    assert "4 paired" in found.reason


# errors


def test_an_error_changes_relatively_and_its_interval_is_that_of_a_ratio(verdict):
    rng = np.random.default_rng(2)
    old = rng.gamma(2.0, 0.5, EPISODES)
    new = 2 * old * np.exp(0.1 * rng.standard_normal(EPISODES))
    settings = {"measure": "mse", "name": "maml[train=10s10q*9]"}
    found = verdict(Stored().quality(old, **settings), Stored().quality(new, **settings))
    assert (found.outcome, found.scale) == ("regressed", "error")
    assert found.change == pytest.approx(new.mean() / old.mean() - 1)
    draws = rng.integers(EPISODES, size=(4000, EPISODES))
    ratios = new[draws].mean(1) / old[draws].mean(1) - 1
    assert (found.low, found.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.005)


def test_the_error_before_adaptation_is_no_result(against):
    runs = [Stored().quality(HARD + shift, measure="mse_before", name="m").quality(HARD) for shift in (0, 5)]
    assert [v.measure for v in against(*runs).verdicts] == ["accuracy"]


# times


@pytest.mark.parametrize(
    ("factor", "outcome", "small"),
    [
        (1.2, "regressed", False),
        (1.0, "unchanged", False),
        (0.8, "improved", False),
        (1.04, "inconclusive", False),
        (1.03, "unchanged", False),
    ],
)
def test_times_on_a_still_machine(verdict, factor, outcome, small):
    found = verdict(Stored().time(FIVE), Stored().time([factor * s for s in reversed(FIVE)]))
    assert (found.outcome, found.small) == (outcome, small)
    assert found.change == pytest.approx(factor - 1)
    assert found.low < found.change < found.high


def test_a_small_regression_is_beyond_the_margin_and_surely_under_the_bound(verdict):
    many = np.exp(0.003 * np.random.default_rng(0).standard_normal(40))
    found = verdict(Stored().time(many), Stored().time(1.035 * many[::-1]))
    assert (found.outcome, found.small) == ("regressed", True)


@pytest.mark.parametrize(
    ("options", "outcome", "reason"),
    [
        ({"environment": "e2", "machine": {**MACHINE, "cpu": "Model B"}}, "incomparable", "cpu Model A -> Model B"),
        (
            {"environment": "e2", "machine": {**MACHINE, "packages": {"torch": "3"}}},
            "incomparable",
            "torch 2.13.0 -> 3",
        ),
        ({"controls": None}, "inconclusive", "no control rows"),
        ({"controls": {"python": [2.2, 2.2, 2.2]}}, "inconclusive", "contaminated: the control python itself moved"),
    ],
    ids=["cpu", "torch", "no controls", "moved"],
)
def test_times_need_one_machine_that_held_still(verdict, options, outcome, reason):
    found = verdict(Stored().time(FIVE), Stored(**options).time([2 * s for s in FIVE]))
    assert (found.outcome, reason in found.reason) == (outcome, True), found.reason


def test_times_of_two_machines_are_compared_where_that_is_asked_for(verdict):
    other = Stored(environment="e2", machine={**MACHINE, "cpu": "Model B"})
    found = verdict(Stored().time(FIVE), other.time([2 * s for s in FIVE]), across_machines=True)
    assert (found.outcome, "Model B" in found.reason) == ("regressed", True)


def test_one_process_gives_no_interval_and_no_verdict(verdict):
    found = verdict(Stored().time([1.0]), Stored().time([2.0]))
    assert (found.outcome, found.change, found.low) == ("inconclusive", 1.0, None)


def test_the_time_of_trainings_is_taken_over_their_seeds(verdict):
    runs = []
    for factor in (1.0, 2.0):
        run = Stored()
        for seed, s in enumerate(FIVE):
            run.time([factor * s], "maml[train=1w1s1q*9]", measure="train_time", seed=seed)
        runs.append(run)
    found = verdict(*runs)
    assert (found.outcome, found.change) == ("regressed", pytest.approx(1.0))
    assert found.cell.endswith("seeds0-4")


def test_one_seed_s_machine_that_moved_holds_them_all(tmp_path):
    sides = []
    for factor, moved in ((1.0, 1.0), (2.0, 1.2)):
        folder = tmp_path / f"{factor}"
        for seed, seconds in enumerate(FIVE):
            still = {"python": [moved if seed == 3 else 1.0] * 3}
            run = Stored(controls=still).time([factor * seconds], "maml", measure="train_time", seed=seed)
            run.at(tmp_path / "made").rename((folder.mkdir(exist_ok=True), folder / f"{seed}")[1])
        sides.append(folder)
    (found,) = compare([sides[0]], [sides[1]]).verdicts
    assert (found.outcome, "moved by +20.0%" in found.reason) == ("inconclusive", True), found.reason


def test_the_interval_of_a_ratio_of_times_covers(verdict):
    rng = np.random.default_rng(8)
    inside = 0
    for _ in range(300):
        a, b = (np.exp(0.05 * rng.standard_normal(5)) for _ in range(2))
        rows = [_timed(values) for values in (a, b)]
        made = Verdict(cell="c", measure="adapt_time", outcome="inconclusive", scale="ratio", worse=1, margin=0.02)
        (found,) = comparison.decide([comparison._time(made, [tuple(rows)], Margin(0.02, 0.05), False)])
        inside += found.low <= 0.0 <= found.high
    assert inside >= 280


def _timed(values):
    from metabench.stats import median_interval

    found = median_interval(values)
    home = Home(path=None, environments={"e": {"controls": {"python": [1.0]}}})
    return Result(
        cell="c", measure="adapt_time", status="ok", reason="", n=5, value=found.value, ci_low=found.low,
        ci_high=found.high, seed=0, columns={"environment": "e"}, home=home,
    )  # fmt: skip


# counts and memory


@pytest.mark.parametrize(("new", "outcome"), [(1000, "unchanged"), (1001, "regressed"), (999, "improved")])
def test_counts_are_exact_on_any_machine(verdict, new, outcome):
    found = verdict(Stored().count(1000), Stored(environment="e2").count(new))
    assert (found.outcome, found.change, found.detectable) == (outcome, new - 1000, 1.0)
    assert ("another machine" in found.reason) == (new != 1000)


@pytest.mark.parametrize(
    ("old", "new", "device", "outcome"),
    [
        (100e6, 104e6, "cpu", "unchanged"),
        (100e6, 106e6, "cpu", "regressed"),
        (100e6, 90e6, "cpu", "improved"),
        (5e6, 5.9e6, "cpu", "unchanged"),  # pages and arenas: below a mebibyte nothing is said
        (5e6, 5.9e6, "cuda", "regressed"),
    ],
)
def test_memory_has_a_margin_and_a_grain(verdict, old, new, device, outcome):
    runs = [Stored().count(value, "meta_step_memory", device=device) for value in (old, new)]
    assert verdict(*runs).outcome == outcome


# the whole


def test_holm_over_all_rows_asks_more_of_each(against):
    noise = 0.02 * np.random.default_rng(0).standard_normal(EPISODES)
    worse = HARD - 0.008 + noise - noise.mean()  # three standard errors beyond the margin

    def of(rows):
        runs = Stored(), Stored()
        for run, scores in zip(runs, (HARD, worse), strict=True):
            run.quality(scores)
            for n in range(rows):
                run.quality(HARD if run is runs[0] else noisy(HARD, 0, seed=n), f"other{n}[train=1w1s1q*9]")
        return next(v for v in against(*runs).verdicts if v.cell.startswith("maml"))

    alone, among = of(0), of(60)
    assert (alone.outcome, among.outcome) == ("regressed", "inconclusive")
    assert alone.detectable < among.detectable
    assert (alone.low, alone.high) == (among.low, among.high)


def test_missing_new_and_failed_rows_are_listed(against):
    base = Stored().quality(HARD).count(1).count(5, "adapt_bytes").count(7, "adapt_nodes")
    failed = {"status": "failed", "reason": "out of memory"}
    other = Stored().quality(HARD).row(base.rows[2][0].cell, "adapt_bytes", **failed).time(FIVE)
    other.row(base.rows[3][0].cell, "adapt_nodes", status="skipped", reason="no CUDA")
    found = against(base, other)
    absent = {(row.measure, row.status, row.reason) for row in found.absent}
    assert absent == {
        ("adapt_flops", "missing", "the candidate has no such row"),
        ("adapt_bytes", "failed", "out of memory"),
        ("adapt_nodes", "missing", "no CUDA"),
        ("adapt_time", "new", "only the candidate has it"),
    }
    assert [row.measure for row in found.failed] == ["adapt_bytes"]


def test_what_fails_on_both_sides_is_no_news(against):
    run = Stored().quality(HARD).row("m/d/t/n/cpu-float32/seed0", "accuracy", status="failed", reason="x")
    found = against(run, run)
    assert found.absent == ()
    assert "1 rows have no result on either side" in found.notes


@pytest.mark.parametrize("status", ["failed", "diverged", "timeout"])
def test_what_the_baseline_skipped_and_the_candidate_failed_is_told(against, status):
    cell = "m/d/t/n/cpu-float32/seed0"
    base = Stored().quality(HARD).row(cell, "accuracy", status="skipped", reason="no CUDA")
    found = against(base, Stored().quality(HARD).row(cell, "accuracy", status=status, reason="x"))
    assert [(row.cell, row.status, row.reason) for row in found.failed] == [(cell, status, "x")]
    assert not any("on either side" in note for note in found.notes)


def test_nothing_in_common_is_said(against):
    with pytest.raises(NothingRan, match="none in common"):
        against(Stored().quality(HARD), Stored().count(1))
    with pytest.raises(NothingRan, match="no measured row whose 'cell/measure' holds all of 'nosuch'"):
        against(Stored().quality(HARD), Stored().quality(HARD), select="nosuch")


def test_where_all_failed_the_failures_are_listed(against):
    base = Stored().count(1)
    cell = base.rows[0][0].cell
    found = against(base, Stored().row(cell, "adapt_flops", status="failed", reason="out of memory"))
    assert found.verdicts == ()
    assert [row.reason for row in found.failed] == ["out of memory"]


def test_two_suites_are_refused(against):
    with pytest.raises(ConfigError, match=r"of suite one, .* of two"):
        against(Stored("one").quality(HARD), Stored("two").quality(HARD))


def test_margins_come_from_the_candidate_s_suite(against):
    declared = {"accuracy": "5 points", "overrides": [{"algorithm": "maml", "accuracy": "1 point"}]}
    runs = []
    for drop, thresholds in ((0, None), (0.03, declared)):
        run = Stored(thresholds=thresholds)
        for name in ("maml", "protonet"):
            run.quality(noisy(HARD, drop, sd=0.01) if drop else HARD, f"{name}[train=1w1s1q*9]")
        runs.append(run)
    found = against(*runs)
    assert {v.cell.partition("[")[0]: (v.outcome, v.margin) for v in found.verdicts} == {
        "maml": ("regressed", 0.01),
        "protonet": ("unchanged", 0.05),
    }
    assert any("different thresholds" in note for note in found.notes)


def test_with_several_suites_on_a_side_each_row_has_the_margins_of_its_own(tmp_path):
    declared = {"one": {"counts": "50%"}, "two": None}
    made = {}
    for name, value in (("base", 100), ("candidate", 110)):
        made[name] = []
        for suite, measure in (("one", "adapt_flops"), ("two", "adapt_bytes")):
            run = Stored(suite, thresholds=declared[suite]).count(value, measure).at(tmp_path, f"{name}-{suite}")
            manifest = json.loads((run / "manifest.json").read_text())
            (run / "manifest.json").write_text(json.dumps({"thresholds": {}, **manifest}))  # as `run` writes it
            made[name].append(run)
    expected = {"adapt_flops": ("unchanged", 50.0), "adapt_bytes": ("regressed", 0.0)}
    for candidate in (made["candidate"], made["candidate"][::-1]):
        found = compare(made["base"], candidate)
        assert {v.measure: (v.outcome, v.margin) for v in found.verdicts} == expected
        assert not any("different thresholds" in note for note in found.notes)
    found = compare(made["base"], made["candidate"], margins={"counts": "20%"})
    assert {v.outcome for v in found.verdicts} == {"unchanged"}


def test_a_csv_says_what_its_run_says(tmp_path):
    base = Stored().quality(HARD).time(FIVE).count(10).quality(HARD, measure="mse", name="m[train=1s1q*9]")
    other = Stored().quality(noisy(HARD, 0.02)).time([2 * s for s in FIVE]).count(11)
    other.quality(noisy(HARD, 0.02), measure="mse", name="m[train=1s1q*9]")
    runs = [side.at(tmp_path, name) for name, side in (("b", base), ("c", other))]
    files = [as_csv(run, tmp_path / f"csv{n}") for n, run in enumerate(runs)]
    whole, thin = compare(runs[:1], runs[1:]), compare(files[:1], files[1:])
    outcomes = {v.key: v.outcome for v in whole.verdicts}
    assert sorted(outcomes.values()) == ["regressed", "regressed", "regressed", "unchanged"]
    assert {v.key: v.outcome for v in thin.verdicts} == outcomes
    for a, b in zip(whole.verdicts, thin.verdicts, strict=True):
        assert (a.change, a.low, a.high) == pytest.approx((b.change, b.low, b.high))


def test_a_csv_without_episodes_leaves_accuracy_open(tmp_path):
    file = as_csv(Stored().quality(HARD).count(10).at(tmp_path), tmp_path / "csv")
    file.with_name("episodes.csv").unlink()
    found = {v.measure: v for v in compare([file], [file]).verdicts}
    assert (found["accuracy"].outcome, found["adapt_flops"].outcome) == ("inconclusive", "unchanged")
    assert "episodes.csv" in found["accuracy"].reason


def test_runs_of_one_side_are_merged_and_the_newest_row_counts(tmp_path):
    old = Stored().quality(HARD).count(10).at(tmp_path, "a")
    (tmp_path / "s").mkdir()
    shutil.move(old, tmp_path / "s/20260101T000000Z-000000")
    new = Stored().count(12).at(tmp_path, "b")
    shutil.move(new, tmp_path / "s/20260102T000000Z-000000")
    base = Stored().quality(HARD).count(10).at(tmp_path, "base")
    found = compare([base], [tmp_path / "s"])
    assert {v.measure: v.change for v in found.verdicts} == {"accuracy": 0.0, "adapt_flops": 2.0}
    assert any("stand in several runs" in note for note in found.notes)


# joint verdicts


def test_faster_and_as_good_is_said_in_one_line(against):
    many = np.exp(0.004 * np.random.default_rng(0).standard_normal(20))
    base = Stored().time(many).quality(HARD).count(10)
    other = Stored().time(0.8 * many).quality(noisy(HARD, 0, sd=0.01)).count(10)
    (joint,) = against(base, other).joint
    assert joint.algorithm == "maml"
    assert joint.outcome == "improved"
    assert joint.text == ("adapt 20 % faster; accuracy equivalent within 0.5 points (paired); adapt flops equal")


def test_a_speed_up_that_changes_predictions_is_pointed_out(against):
    labels = np.zeros((EPISODES, 3), int)
    changed = labels.copy()
    changed[:37, 1] = 1
    base = Stored().time(FIVE).quality(HARD, predictions=labels)
    other = Stored().time([0.5 * s for s in FIVE]).quality(HARD, predictions=changed, code="new")
    (joint,) = against(base, other).joint
    assert "mind: its predictions changed in 37 of 400 episodes" in joint.text
    same = Stored().time([0.5 * s for s in FIVE]).quality(HARD, predictions=labels, code="new")
    assert "mind" not in against(base, same).joint[0].text
    as_fast = Stored().time(FIVE).quality(HARD, predictions=changed, code="new")
    assert "mind" not in against(base, as_fast).joint[0].text


def test_the_order_in_which_a_file_keeps_its_queries_is_no_change(tmp_path):
    labels = np.tile([1, 0, 2], (4, 1))
    parts = {"predicted": labels * [1, 1, 0], "ties": np.tile([1, 2, 0], (4, 1)), "labels": labels}
    files = [tmp_path / "as_asked.npz", tmp_path / "by_label.npz"]
    for file, order in zip(files, ([0, 1, 2], [1, 0, 2]), strict=True):
        np.savez_compressed(file, **{name: part[:, order] for name, part in parts.items()})
    before, after = (SimpleNamespace(predictions=lambda file=file: file) for file in files)
    scores = Scores(episodes=tuple("abcd"), scores=np.ones(4))
    assert comparison._changed_predictions(before, after, scores, scores) == (0, 4)


def test_the_gravest_row_names_the_joint_verdict(against):
    base = Stored().quality(HARD).quality(HARD, task="20w1s15q")
    other = Stored().quality(noisy(HARD, 0.03)).quality(HARD, task="20w1s15q")
    (joint,) = against(base, other).joint
    assert joint.outcome == "regressed"
    assert "points lower in 1 of 2 cells (paired)" in joint.text


def test_predictions_are_paired_by_the_episode_s_hash_and_not_by_its_place(against):
    names = [f"h{i}" for i in range(EPISODES)]
    labels = np.arange(3 * EPISODES).reshape(EPISODES, 3) % 5
    flat, order = np.full(EPISODES, 0.5), np.random.default_rng(0).permutation(EPISODES)[:300]
    base = Stored().time(FIVE).quality(flat, predictions=labels, episodes=names)

    def candidate(answers):
        run = Stored().time([0.5 * s for s in FIVE])
        shuffled = [names[i] for i in order]
        return run.quality(flat[order], predictions=answers[order], episodes=shuffled, code="new")

    same = against(base, candidate(labels))
    row = next(v for v in same.verdicts if v.measure == "accuracy")
    assert (row.outcome, row.reason) == ("unchanged", "identical predictions on 300 episodes")
    assert "mind" not in same.joint[0].text
    changed = labels.copy()
    changed[order[:7], 1] += 1
    found = against(base, candidate(changed))
    assert "mind: its predictions changed in 7 of 300 episodes" in found.joint[0].text


def test_equal_files_of_other_episodes_are_no_identical_predictions(against):
    labels = np.arange(2 * EPISODES).reshape(EPISODES, 2) % 5
    flat, names = np.full(EPISODES, 0.5), [f"h{i}" for i in range(EPISODES)]
    base = Stored().quality(flat, predictions=labels, episodes=names)
    (row,) = against(base, Stored().quality(flat, predictions=labels, episodes=names[::-1], code="new")).verdicts
    assert (row.outcome, "a single retrained pair" in row.reason) == ("inconclusive", True)


def damaged(folder, write):
    """Two runs with equal scores; what `write` does to the file of the second's predictions."""
    labels = np.arange(2 * EPISODES).reshape(EPISODES, 2) % 5
    runs = [Stored().quality(HARD, predictions=labels, code=code).at(folder, code) for code in ("a", "b")]
    write(runs[1] / "predictions/0.npz")
    return runs


def bomb(file):
    """Less than a megabyte that unpacks to more than a row may have."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("predicted", "ties", "labels"):
            with archive.open(f"{name}.npy", "w") as member:
                shape = (EPISODES, 120_000)
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for _ in range(EPISODES):
                    member.write(bytes(120_000))


def of_unlike_length(file):
    short = np.ones((EPISODES - 1, 2), int)
    np.savez_compressed(file, predicted=short, ties=short, labels=short, classes=short)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (bomb, "unpacks to more than"),
        (of_unlike_length, f"answers of {EPISODES - 1} episodes, scores of {EPISODES}"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "damaged"),
    ],
    ids=["bomb", "length", "cut"],
)
def test_predictions_that_no_run_writes_are_one_message(tmp_path, write, said):
    base, other = damaged(tmp_path, write)
    with pytest.raises(StoreError, match=f"0.npz.*{said}.*delete it to compare by scores alone"):
        compare([base], [other])


# noise in the predictions


def noised(run, cell, share, folder):
    """A copy of one row of a run in which a share of all its answers, right ones, are wrong; its scores follow."""
    old = Run.open(run)
    row = old.measurements()[cell, "accuracy"]
    listed = [one for one in old.manifest["rows"] if (one["cell"], one["measure"]) == row.key]
    new = Run.create(folder, old.manifest["suite"], {**old.manifest, "rows": listed})
    new.add_environment(row.environment, old.environments()[row.environment])
    with np.load(old.path / "predictions" / row.facts["predictions"]) as kept:
        parts = dict(kept)
    right = np.argwhere(parts["ties"] == 1)
    count = round(share * parts["ties"].size)
    at = tuple(np.random.default_rng(0).choice(right, count, replace=False).T)
    parts["predicted"][at] = (parts["labels"][at] + 1) % parts["classes"].shape[1]
    parts["ties"][at] = 0
    (new.path / "predictions").mkdir()
    np.savez_compressed(new.path / "predictions" / row.facts["predictions"], **parts)
    scores = np.where(parts["ties"] > 0, 1 / np.maximum(parts["ties"], 1), 0.0).mean(1)
    found = mean_interval(scores)
    numbers = {"value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}
    with new.writing():
        new.append(replace(row, **numbers), {**old.samples(row), "scores": [float(score) for score in scores]})
    return new.path


def test_one_answer_in_a_hundred_that_turns_wrong_is_found_where_unpaired_intervals_overlap(tmp_path):
    """On a real run, with the noise in its stored answers: scores follow from them, as `verify` would have it."""
    run = next(iter(sorted(REFERENCE.glob("omniglot-fair/2*"))))
    known = Run.open(run).current().values()
    row = next(m for m in known if m.measure == "accuracy" and (m.n or 0) >= 600 and 0.5 < (m.value or 0) < 0.93)
    same, worse = (noised(run, row.cell, share, tmp_path / str(share)) for share in (0.0, 0.01))
    before, after = (Run.open(one).measurements()[row.key] for one in (same, worse))
    assert before.value == pytest.approx(row.value), "the scores are those of the stored answers"
    assert after.value == pytest.approx(before.value - 0.01, abs=1e-4)
    assert after.ci_high > before.ci_low, "the test is about intervals that overlap"
    (found,) = compare([run], [worse], select=row.cell, kinds=["accuracy"]).verdicts
    assert (found.outcome, found.margin) == ("regressed", 0.005)
    assert found.change == pytest.approx(-0.01, abs=1e-4)
    assert f"adapt gate: same weights, {row.n} paired episodes" in found.reason
    (found,) = compare([run], [same], select=row.cell, kinds=["accuracy"]).verdicts
    assert found.outcome == "unchanged"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12),
    st.floats(-0.5, 0.5, allow_subnormal=False),
    st.sampled_from([1, -1]),
)
def test_swapping_the_sides_swaps_the_verdict(scores, shift, worse):
    old = np.array(scores)
    new = old + shift + 0.01 * np.sin(np.arange(len(old)))
    swap = {"regressed": "improved", "improved": "regressed"}

    def outcome(a, b):
        made = Verdict(cell="c", measure="m", outcome="inconclusive", scale="points", worse=worse, margin=0.005)
        source = comparison._episode_source(b - a)
        by = worse * float((b - a).mean())
        (found,) = comparison.decide(
            [comparison.Tested(verdict=made, worse_by=by, margin=0.005, bound=0.005, sources=source)]
        )
        return found

    there, back = outcome(old, new), outcome(new, old)
    if there.outcome in swap or back.outcome in swap:
        assert back.outcome == swap[there.outcome]
    assert there.low == pytest.approx(-back.high)
