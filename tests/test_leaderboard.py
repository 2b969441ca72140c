"""Leaderboards: what they rank, what they refuse to rank, and what they refuse to read."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import environ, metabench
from hypothesis import given
from hypothesis import strategies as st
from leaderboard_runs import cell_of, edited, rewritten, row, run_of, stated, submitted, trials, unplanned
from scipy import stats as scipy_stats

from metabench import spreadsheet, stats
from metabench.cli.boards import _shortened
from metabench.errors import ConfigError, MetabenchError, NothingRan, StoreError
from metabench.leaderboard import files, leaderboard, pack, pareto, ranking, rawrows, verify
from metabench.leaderboard.boardfile import read_board
from metabench.leaderboard.boards import boards
from metabench.leaderboard.collect import collect
from metabench.leaderboard.source import plain, source_of
from metabench.leaderboard.summary import _signed_rank, summaries
from metabench.store import Run
from metabench.verdict_report import SUMMARY_BYTES


def sources(*paths):
    return [source_of(Run.open(path)) for path in paths]


def made(*paths, **options):
    return boards(collect(sources(*paths)), **options)


def by_name(board):
    return {one.algorithm: one for one in board.standings}


def rows_of(tables, **where):
    """Rows of {algorithm: (S, E) scores}, seeds 0, 1, ..."""
    return [row(name, seed, scores, **where) for name, table in tables.items() for seed, scores in enumerate(table)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ranking


def test_differences_are_those_of_the_paired_interval(rng):
    hard = 0.1 * rng.normal(size=30)
    tables = [trials(rng, 0.5, seeds=s, episodes=30, spread=0.03, hard=hard) for s in (3, 3, 4, 1)]
    seeds = [(0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (7,)]
    found = ranking.differences(tables, seeds)
    half, p = found.half(), found.p_values()
    for i in range(3):
        for j in range(i):
            exact = stats.paired_difference(tables[i][:3], tables[j][:3])
            assert found.value[i, j] == pytest.approx(exact.value)
            assert half[i, j] == pytest.approx(exact.half)
            at_p = stats.paired_difference(tables[i][:3], tables[j][:3], level=1 - p[i, j])
            assert at_p.half == pytest.approx(abs(at_p.value), rel=1e-3)  # the interval at 1 - p just reaches 0
    assert np.isnan(found.value[3, 0]) and np.isnan(p[3, 0])  # no shared seed


def test_one_seed_each_is_the_paired_t_test_over_episodes(rng):
    from scipy import stats as distributions

    a, b = rng.normal(size=(2, 1, 25))
    found = ranking.differences([a, b], [(0,), (0,)])
    assert found.p_values()[0, 1] == pytest.approx(distributions.ttest_rel(a[0], b[0]).pvalue, rel=1e-3)


def test_equal_methods_are_rarely_told_apart():
    """The family-wise error rate of eight equal methods, five seeds: at most 5 % by design (400 families)."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        hard = 0.1 * rng.normal(size=60)
        tables = [0.5 + 0.02 * rng.normal(size=(5, 1)) + hard + 0.05 * rng.normal(size=(5, 60)) for _ in range(8)]
        found = ranking.rank(ranking.differences(tables, [tuple(range(5))] * 8), higher_is_better=True)
        wrong += any(low > 1 for low in found.low)
    assert wrong <= 20 + 3 * 20**0.5  # three standard deviations above 5 %


def test_rank_intervals_count_who_is_significantly_better_and_worse():
    rng = np.random.default_rng(2)
    means = [0.9, 0.895, 0.7, 0.3]
    tables = [m + 0.01 * rng.normal(size=(5, 1)) + 0.02 * rng.normal(size=(5, 100)) for m in means]
    found = ranking.rank(ranking.differences(tables, [tuple(range(5))] * 4), higher_is_better=True)
    assert (found.low, found.high) == ([1, 1, 3, 4], [2, 2, 3, 4])
    assert found.groups == ["a", "a", "b", "c"]
    upside = ranking.rank(ranking.differences(tables, [tuple(range(5))] * 4), higher_is_better=False)
    assert upside.low == [3, 3, 2, 1]
    middle, low, high = found.visible
    assert 0 < low <= middle <= high


def test_the_visible_difference_is_found_with_its_power():
    """A true difference as large as said is found in about 80 % of the trials at Holm's strictest step."""
    rng = np.random.default_rng(3)
    seen, hits = [], 0
    for _ in range(300):
        gap = 0.1
        tables = [shift + 0.02 * rng.normal(size=(5, 1)) + 0.01 * rng.normal(size=(5, 50)) for shift in (0.0, gap)]
        found = ranking.rank(ranking.differences(tables, [tuple(range(5))] * 2), higher_is_better=True)
        seen.append(found.visible[0])
    gap = float(np.median(seen))
    for _ in range(300):
        tables = [shift + 0.02 * rng.normal(size=(5, 1)) + 0.01 * rng.normal(size=(5, 50)) for shift in (0.0, gap)]
        found = ranking.rank(ranking.differences(tables, [tuple(range(5))] * 2), higher_is_better=True)
        hits += found.low != [1, 1]
    assert 0.65 <= hits / 300 <= 0.95


def test_tie_groups_hold_nobody_who_is_told_apart():
    apart = np.zeros((4, 4), bool)
    apart[0, 2] = apart[2, 0] = apart[0, 3] = apart[3, 0] = True
    assert ranking._groups(apart, [0, 1, 2, 3]) == ["a", "ab", "b", "b"]


@given(st.data())
def test_two_methods_share_a_letter_exactly_if_they_are_not_told_apart(data):
    k = data.draw(st.integers(1, 8))
    pairs = list(combinations(range(k), 2))
    apart = np.zeros((k, k), bool)
    for i, j in data.draw(st.sets(st.sampled_from(pairs))) if pairs else ():
        apart[i, j] = apart[j, i] = True
    letters = [
        set(re.findall(r"[a-z]\d*", text)) for text in ranking._groups(apart, data.draw(st.permutations(range(k))))
    ]
    assert all(letters), "each has one"
    assert {(i, j) for i, j in pairs if not letters[i] & letters[j]} == {(i, j) for i, j in pairs if apart[i, j]}


def test_a_method_between_that_is_told_apart_does_not_part_the_letters_of_its_neighbours():
    """The middle one varies little and is told apart from both; the outer two are not from one another."""
    apart = np.zeros((3, 3), bool)
    apart[0, 1] = apart[1, 0] = apart[1, 2] = apart[2, 1] = True
    assert ranking._groups(apart, [0, 1, 2]) == ["a", "b", "a"]


def test_letters_beyond_the_alphabet_can_be_read():
    assert [ranking._letter(n) for n in (0, 25, 26, 51, 52)] == ["a", "z", "a1", "z1", "a2"]


def test_unshared_seeds_are_compared_by_welch_s_test(rng):
    for sizes in ((3, 3), (3, 6)):
        a, b = (0.5 + spread * rng.normal(size=(n, 1)) for n, spread in zip(sizes, (0.02, 0.05), strict=True))
        found = ranking.differences([a, b], [tuple(range(sizes[0])), tuple(range(10, 10 + sizes[1]))])
        wanted = scipy_stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)  # with one episode that is all there is
        assert found.unpaired[0, 1] and found.value[0, 1] == pytest.approx(a.mean() - b.mean())
        assert wanted.df - ranking.DF_STEP <= found.df_seeds[0, 1] <= wanted.df
        assert 0.999 * wanted.pvalue <= found.p_values()[0, 1] <= 1.1 * wanted.pvalue


def test_unshared_seeds_keep_the_episodes_paired(rng):
    hard = 0.2 * rng.normal(size=200)
    tables = [mean + hard + 0.004 * rng.normal(size=(3, 1)) + 0.02 * rng.normal(size=(3, 200)) for mean in (0.5, 0.54)]
    apart, together = (ranking.differences(tables, [(0, 1, 2), own]) for own in ((7, 8, 9), (0, 1, 2)))
    assert apart.se_episodes[0, 1] < 0.003 < 0.2 / 200**0.5, "hard episodes are hard for both"
    assert apart.half()[0, 1] == pytest.approx(together.half()[0, 1], rel=1), "and it sees about as much"
    assert apart.p_values()[0, 1] < 0.05


@pytest.mark.parametrize("spreads", [(0.02, 0.02), (0.005, 0.05)])
def test_equal_methods_with_unshared_seeds_are_rarely_told_apart(spreads):
    """66 pairs in each of 60 worlds, three to five seeds each: 5 % by design, and somewhat less by Banerjee's sum."""
    rng, wrong, pairs = np.random.default_rng(5), 0, 0
    for _ in range(60):
        hard = 0.1 * rng.normal(size=40)
        sizes = [3 + n % 3 for n in range(12)]
        tables = [
            0.5 + hard + spreads[n % 2] * rng.normal(size=(size, 1)) + 0.05 * rng.normal(size=(size, 40))
            for n, size in enumerate(sizes)
        ]
        seeds = [tuple(range(10 * n, 10 * n + size)) for n, size in enumerate(sizes)]
        p = ranking.differences(tables, seeds).p_values()[np.triu_indices(12, 1)]
        wrong, pairs = wrong + int((p < 0.05).sum()), pairs + len(p)
    assert 0.01 < wrong / pairs < 0.065, wrong / pairs


def test_a_rank_may_ask_for_more_shared_seeds_than_three(rng):
    tables = [trials(rng, mean, seeds=5) for mean in (0.9, 0.5)]
    seeds = [(0, 1, 2, 3, 4), (0, 1, 2, 8, 9)]
    assert ranking.differences(tables, seeds).seeds[0, 1] == 3
    strict = ranking.differences(tables, seeds, min_seeds=5)
    assert strict.unpaired[0, 1]
    assert ranking.rank(strict, higher_is_better=True, min_seeds=5).low == [1, 2]


def test_iqm_weighs_every_data_set_alike():
    few = [np.array([mean - 0.01, mean, mean + 0.01]) for mean in (0.2, 0.4, 0.6, 0.8)]
    many = [*few[:3], 0.8 + np.linspace(-0.01, 0.01, 30)]
    assert stats.iqm_interval(few).value == pytest.approx(0.5)
    assert stats.iqm_interval(many).value == pytest.approx(0.5, abs=0.01), "not 0.8, where most of the scores are"
    found = stats.iqm_interval(many)
    assert 0.45 < found.low < found.value < found.high < 0.55, "its draws weigh them alike too"


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("sources", [4, 5, 7])
def test_iqm_of_equal_numbers_of_seeds_is_the_trimmed_mean_of_all(rng, runs, sources):
    scores = rng.normal(size=(sources, runs))
    found = stats.iqm_interval(scores)
    assert found.value == pytest.approx(scipy_stats.trim_mean(scores.ravel(), 0.25))
    generator = np.random.Generator(np.random.Philox(0))
    drawn = np.concatenate([x[generator.integers(0, runs, (5000, runs))] for x in scores], axis=1)
    means = scipy_stats.trim_mean(drawn, 0.25, axis=1)
    few = scipy_stats.t.ppf(0.975, sources * (runs - 1) / 2) / scipy_stats.norm.ppf(0.975)
    wanted = found.value + few * (runs / (runs - 1)) ** 0.5 * (np.quantile(means, [0.025, 0.975]) - found.value)
    assert [found.low, found.high] == pytest.approx(list(wanted))


def test_iqm_is_the_middle_half_and_its_interval_covers():
    scores = [
        np.array([0.0, 0.1, 0.2]),
        np.array([0.4, 0.5, 0.6]),
        np.array([0.9, 0.9, 0.9]),
        np.array([0.3, 0.3, 0.9]),
    ]
    pooled = np.sort(np.concatenate(scores))
    found = stats.iqm_interval(scores)
    assert found.value == pytest.approx(pooled[3:9].mean())
    assert found.low < found.value < found.high


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("means", [(0.2, 0.4, 0.6, 0.8), (0.5, 0.52, 0.55, 0.9), (0.5, 0.5, 0.5, 0.5)])
def test_the_interval_of_an_iqm_covers_with_as_few_seeds_as_a_board_takes(runs, means):
    def drawn(rng, size):
        return [m + 0.02 * rng.normal(size=size) for m in means]

    truth = stats.iqm_interval(drawn(np.random.default_rng(1), 40000), draws=1).value
    rng = np.random.default_rng(4)
    found = [stats.iqm_interval(drawn(rng, runs), draws=300) for _ in range(300)]
    hits = sum(one.low <= truth <= one.high for one in found)
    assert hits >= 273  # 95 % would be 285; bare percentiles have about 243 with three runs and 257 with five


def test_one_run_a_data_set_has_no_interval():
    assert stats.iqm_interval([[0.1], [0.2, 0.3]]).low is None


# over data sets


def test_the_signed_rank_test_is_scipy_s_exact_one(rng):
    for size in (2, 5, 6, 9, 16):
        a, b = rng.normal(size=(2, size))
        wanted = scipy_stats.wilcoxon(a, b, method="exact").pvalue
        assert _signed_rank(a, b) == pytest.approx(wanted)


def test_five_differences_cannot_reach_five_per_cent_among_six_data_sets_either():
    assert _signed_rank([0.5] * 6, [0.5, 0.1, 0.2, 0.3, 0.4, 0.45]) == pytest.approx(2 / 32)
    assert _signed_rank([0.5] * 6, [0.4] * 6) == pytest.approx(2 / 64)  # all ties
    assert _signed_rank([0.5] * 6, [0.5] * 6) == 1.0


def test_two_equal_methods_get_a_star_as_seldom_as_promised(rng):
    alarms = [_signed_rank(*np.round(rng.normal(size=(2, 6)), 1)) < 0.05 for _ in range(2000)]
    assert sum(alarms) <= 80  # 2/64 of 2000 are 62, fewer with ties


# boards


def test_different_protocols_are_never_ranked_together(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.7)}
    wheres = [{}, {"norm": "batch"}, {"task": "5w5s15q"}, {"data": "glyphs[alphabets,within=alphabet]"}]
    runs = [run_of(tmp_path, rows_of(tables, **where)) for where in wheres]
    runs.append(run_of(tmp_path, rows_of({k: v[:, :30] for k, v in tables.items()})))  # fewer test episodes
    runs.append(run_of(tmp_path, rows_of(tables), ids=[f"x{i}" for i in range(40)], seed=1))  # other ones
    found = made(*runs)
    assert len(found) == 6
    assert all(len(board.standings) == 2 for board in found)
    assert len({board.title for board in found}) == 6


def test_seeds_of_several_machines_are_pooled_and_the_earliest_of_a_seed_counts(tmp_path, rng):
    table, other = trials(rng, 0.8), trials(rng, 0.6)
    first = run_of(tmp_path, [row("maml", s, table[s]) for s in (0, 1)] + rows_of({"protonet": other}))
    late = "2026-02-01T00:00:00+00:00"
    second = run_of(tmp_path, [row("maml", s, table[s] + 0.1) for s in (1, 2)], at=late, stable={"cpu": "another"})
    (board,) = made(second, first)
    maml = next(one for one in board.standings if one.algorithm == "maml")
    assert maml.seeds == (0, 1, 2) and maml.rank is not None
    assert maml.table[1] == pytest.approx(table[1])  # not the later, better one
    assert any("the earliest counts" in text for text in maml.remarks)


def test_other_code_or_another_submitter_is_another_row(tmp_path, rng):
    table = trials(rng, 0.8, seeds=6)
    one = run_of(tmp_path, [row("maml", s, table[s]) for s in range(3)])
    two = run_of(tmp_path, [row("maml", s, table[3 + s], sources="badc0de00000-2.0") for s in range(3)])
    three = run_of(tmp_path, [row("maml", s, 0.9 * table[s]) for s in range(3)])
    (three / "submission.json").write_text(json.dumps({"submitter": "Ada"}))
    (board,) = made(one, two, three)
    assert [s.seeds for s in board.standings] == [(0, 1, 2)] * 3
    assert {s.submitter for s in board.standings} == {"", "Ada"}
    assert any("badc0de00000" in s.label for s in board.standings)


def test_fewer_than_three_seeds_are_shown_and_not_ranked(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8), "reptile": trials(rng, 0.95, seeds=2)}
    (board,) = made(run_of(tmp_path, rows_of(tables)))
    reptile = next(one for one in board.standings if one.algorithm == "reptile")
    assert reptile.rank is None and reptile.quality is not None
    assert reptile.remarks == ("2 seeds, a rank needs 3: not ranked",)
    assert {one.algorithm for one in board.ranked} == {"protonet", "maml"}
    (strict,) = made(run_of(tmp_path, rows_of(tables)), min_seeds=5)
    assert strict.ranking is None and not strict.ranked


def test_failed_seeds_seconds_and_controls_are_never_ranked(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    rows = rows_of(tables) + rows_of({"chance": trials(rng, 0.2)}, train="")
    rows += rows_of({"anil": trials(rng, 0.99)}, train="5w1s1q*75s")
    rows += [row("reptile", s, trials(rng, 0.99)[0]) for s in (0, 1, 2)] + [row("reptile", 3, [], status="failed")]
    (board,) = made(run_of(tmp_path, rows))
    assert {one.algorithm for one in board.ranked} == {"protonet", "maml"}
    said = {one.algorithm: " ".join(one.remarks) for one in board.standings}
    assert "seconds" in said["anil"] and "1 of 4 seeds failed" in said["reptile"]
    assert [one.control for one in board.standings][-1] is True


def test_a_method_that_failed_altogether_is_shown_with_its_reason(tmp_path, rng):
    rows = [*rows_of({"protonet": trials(rng, 0.9)}), row("maml", 0, [], status="diverged")]
    (board,) = made(run_of(tmp_path, rows))
    maml = board.standings[-1]
    assert (maml.status, maml.reason, maml.quality) == ("diverged", "it broke", None)
    assert "| diverged |" in files.leaderboard_md("t", [board], [])


def test_unusual_seeds_put_no_method_beyond_reach(tmp_path, rng):
    rows = [row("protonet", s, x) for s, x in zip((0, 1, 2), trials(rng, 0.9), strict=True)]
    rows += [row("maml", s, x) for s, x in zip((5, 6, 7), trials(rng, 0.3), strict=True)]
    (board,) = made(run_of(tmp_path, rows))
    assert [one.rank for one in board.ranked] == [(1, 1), (2, 2)]
    assert "1 of 1 pairs share fewer than 3 seeds: theirs are compared as two samples" in " ".join(board.remarks)


def test_seeds_that_left_the_plan_are_named(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8, seeds=5)}
    path = unplanned(run_of(tmp_path, rows_of(tables)), cell_of("maml", 3), cell_of("maml", 4))
    (board,) = made(path)
    maml = by_name(board)["maml"]
    assert maml.seeds == (0, 1, 2) and maml.rank is not None
    assert maml.remarks == ("measured, and in the run's plan no more: seeds 3, 4",)
    assert by_name(board)["protonet"].remarks == ()
    other = run_of(tmp_path, [row("maml", s, tables["maml"][s]) for s in (3, 4)], at="2026-02-01T00:00:00+00:00")
    (board,) = made(path, other)
    assert by_name(board)["maml"].seeds == (0, 1, 2, 3, 4) and by_name(board)["maml"].remarks == ()


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_failed_seed_that_left_the_plan_bars_its_method(tmp_path, rng, status):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8), "anil": trials(rng, 0.7)}
    path = run_of(tmp_path, [*rows_of(tables), row("maml", 3, [], status=status)])
    (board,) = made(unplanned(path, cell_of("maml", 3)))
    assert {one.algorithm for one in board.ranked} == {"protonet", "anil"}
    said = f"measured, and in the run's plan no more: seed 3; seed 3 {status}: not ranked"
    assert by_name(board)["maml"].remarks == (said,)


def test_configurations_tried_are_counted_even_when_the_plan_forgot_them(tmp_path, rng):
    table = trials(rng, 0.8, seeds=5)
    rows = [row("maml", 0, table[n], more=f"inner_lr=0.{n + 1}") for n in range(5)]
    path = run_of(tmp_path, [*rows, *rows_of({"protonet": trials(rng, 0.9)})])
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["rows"] = [one for one in manifest["rows"] if "0.1" in one["cell"] or "protonet" in one["cell"]]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (board,) = made(path)
    assert {one.algorithm: one.tried for one in board.standings} == {"maml": 5, "protonet": 1}


def test_versions_of_a_row_count_as_tried_and_its_seeds_do_not(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    path = run_of(tmp_path, rows_of(tables))
    lines = (path / "measurements.jsonl").read_text().splitlines()
    older = [line.replace('"hash": "h"', '"hash": "before"') for line in lines if '"maml' in line]
    (path / "measurements.jsonl").write_text("\n".join([*older, *lines]) + "\n")
    (board,) = made(path)
    assert {one.algorithm: one.tried for one in board.standings} == {"protonet": 1, "maml": 2}


def test_only_a_skipped_row_may_have_the_hash_of_one(tmp_path, rng):
    """A number under that hash was made nobody knows how: it is as good as never measured."""
    path = run_of(tmp_path, [*rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})])
    skipped = run_of(tmp_path, [row("anil", 0, [], status="skipped")])
    for run in (path, skipped):
        rewritten(run, "measurements.jsonl", lambda m: m if "protonet" in m["cell"] else {**m, "hash": "not-here"})
    (board,) = made(path, skipped)
    assert {one.algorithm: one.status for one in board.standings} == {"protonet": "ok", "anil": "skipped"}
    assert "declared, and not measured yet: maml" in board.remarks


def test_what_was_not_shown_to_be_recomputed_is_claimed(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9)}))
    (source,) = sources(path)
    assert {one.trust for one in collect([source]).scores} == {"claimed"} == {source.trust}
    one = replace(source, recomputed=frozenset({(cell_of("protonet", 0), "accuracy")}))
    assert [score.trust for score in collect([one]).scores] == ["recomputed", "claimed", "claimed"]
    assert one.trust == "claimed", "and no run more than its rows"


# runs that loaded weights


def test_what_was_loaded_is_no_training(tmp_path, rng):
    rows = rows_of({"protonet": trials(rng, 0.9)}) + rows_of({"nearest": trials(rng, 0.5)}, train="")
    path = rewritten(run_of(tmp_path, rows), "manifest.json", lambda m: {**m, "weights": "the-run-that-trained"})
    own = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}))
    built = leaderboard([path, own], tmp_path / "site")
    (board,) = built.boards
    assert {one.algorithm: one.tried for one in board.standings} == {"maml": 1, "nearest": 1}
    said = "its weights are those of the-run-that-trained, loaded (metabench run --weights)"
    assert said in built.page.read_text() and said in " ".join(built.lines) and "the-run-that-trained" in built.markdown
    (audit,) = verify([path], episodes=False)
    assert any(said in text and "name the-run-that-trained instead" in text for text in audit.unchecked)
    with pytest.raises(ConfigError, match="name the-run-that-trained instead"):
        pack(path, tmp_path, submitter="Ada")
    trained = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9)}))
    rewritten(trained, "manifest.json", lambda m: {**m, "weights": "the-run-that-trained"})
    with pytest.raises(NothingRan, match="name the-run-that-trained instead"):
        leaderboard([trained], tmp_path / "site")
    (trained / "environment.json").write_text("[]")
    with pytest.raises(StoreError, match="must be a mapping of machines"):
        leaderboard([trained], tmp_path / "site")


# copies


def test_a_copy_under_another_submitter_is_shown_and_not_ranked(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    first = submitted(run_of(tmp_path, rows_of(tables)), "Ada")
    later = "2026-02-01T00:00:00+00:00"
    copy = submitted(run_of(tmp_path, rows_of({"protonet": tables["protonet"]}), at=later, name="copied"), "Bob")
    (board,) = made(copy, first)
    assert {(one.submitter, one.algorithm) for one in board.ranked} == {("Ada", "protonet"), ("Ada", "maml")}
    bobs = next(one for one in board.standings if one.submitter == "Bob")
    said = f"the same score on every episode as protonet by Ada (run {first.name}), which is earlier: not ranked"
    assert bobs.quality is not None and bobs.remarks == (said,)


def test_a_copy_under_another_algorithm_s_name_is_not_ranked(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    first = run_of(tmp_path, rows_of(tables))
    later = run_of(tmp_path, rows_of({"mynet": tables["protonet"]}), at="2026-02-01T00:00:00+00:00")
    (board,) = made(later, first)
    assert {one.algorithm for one in board.ranked} == {"protonet", "maml"}
    assert "the same score on every episode as protonet (run" in " ".join(by_name(board)["mynet"].remarks)


def test_weights_of_another_submitter_are_a_copy_and_those_of_one_s_own_are_not(tmp_path, rng):
    def rows(name, mean):
        return [row(name, s, x, facts={"weights": f"{s}.safetensors"}) for s, x in enumerate(trials(rng, mean))]

    later = "2026-02-01T00:00:00+00:00"
    first = submitted(run_of(tmp_path, rows("baseline", 0.9)), "Ada")
    own = submitted(run_of(tmp_path, rows("linear-probe", 0.8), at=later), "Ada")  # learns alike, and adapts otherwise
    (board,) = made(first, own)
    assert len(board.ranked) == 2
    other = submitted(run_of(tmp_path, rows("fancy", 0.95), at=later), "Bob")
    (board,) = made(other, own, first)
    assert {one.submitter for one in board.ranked} == {"Ada"}
    assert "the same weights as baseline by Ada" in " ".join(by_name(board)["fancy"].remarks)


def test_equal_scores_that_say_nothing_are_no_copies(tmp_path, rng):
    later, table = "2026-02-01T00:00:00+00:00", trials(rng, 0.3)
    for where, scores in (({}, np.full((3, 40), 1.0)), ({"train": ""}, table)):
        first = submitted(run_of(tmp_path, rows_of({"protonet": scores}, **where)), "Ada")
        second = submitted(run_of(tmp_path, rows_of({"maml": scores}, **where), at=later), "Bob")
        (board,) = made(first, second)
        assert len(board.ranked) == 2, where


# who handed it in


def test_a_control_of_a_stranger_is_the_stranger_s(tmp_path, rng):
    table = trials(rng, 0.2)
    ada = submitted(run_of(tmp_path, [row("chance", 0, table[0], train="")]), "Ada")
    (board,) = made(ada)
    assert board.standings[0].submitter == dict(board.standings[0].card)["submitted by"] == "Ada"
    ours = run_of(tmp_path, [row("chance", 1, table[1], train="")], at="2026-02-01T00:00:00+00:00")
    (board,) = made(ada, ours)
    assert dict(board.standings[0].card)["submitted by"] == "Ada, this board's maintainers"
    assert made(ours)[0].standings[0].submitter == ""


def test_nobody_hands_in_as_the_maintainers(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9)}))
    names = ("This board's maintainers", "this  board\u2019s Maintainers")
    for name in names:
        with pytest.raises(ConfigError, match="stands for whoever builds a board"):
            pack(path, tmp_path, submitter=name)
    for name in names:
        with pytest.raises(StoreError, match="is reserved for whoever builds a board"):
            made(submitted(path, name))


def test_others_have_their_name_in_the_picture_and_rows_of_runs_of_one_name_their_own_files(tmp_path, rng):
    runs = []
    for number, who in enumerate(("Ada", "Bob")):
        rows = rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})
        rows += [
            row(name, 0, [0.1 * n, 0.11 * n], measure="adapt_time") for n, name in enumerate(("protonet", "maml"), 1)
        ]
        rows += rows_of({"anil": trials(rng, 0.7)})
        runs.append(submitted(run_of(tmp_path / who, rows, name="run", at=f"2026-0{number + 1}"), who))
    built = leaderboard(runs, tmp_path / "site")
    plot = pareto.relative(built.boards[0])
    assert {"protonet (Ada)", "protonet (Bob)", "maml (Ada)", "maml (Bob)"} == {point.label for point in plot.points}
    assert set(plot.left_out) == {"anil (Ada)", "anil (Bob)"}
    cards = built.page.read_text().split('role="dialog"')[1:]
    links = [set(re.findall(r'href="(runs/[^/]*)/', card.partition("</dl>")[0])) for card in cards]
    assert sorted(map(sorted, links)) == [["runs/run"]] * 3 + [["runs/run-2"]] * 3


def test_costs_cross_machines_only_as_multiples_of_the_yardstick_in_the_same_run(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    times = [row("protonet", 0, [0.010, 0.011, 0.012], measure="adapt_time"),
             row("maml", 0, [0.030, 0.033, 0.036], measure="adapt_time")]  # fmt: skip
    flops = [row("maml", 0, [5e6], measure="adapt_flops")]
    first = run_of(tmp_path, rows_of(tables) + times + flops)
    alone = run_of(
        tmp_path,
        [*rows_of({"reptile": trials(rng, 0.7)}), row("reptile", 0, [0.5, 0.6], measure="adapt_time")],
        stable={"cpu": "fast"},
    )
    (board,) = made(first, alone)
    by = {one.algorithm: one for one in board.standings}
    assert by["maml"].relative.value == pytest.approx(3) and by["maml"].relative.half == pytest.approx(0, abs=1e-9)
    assert by["protonet"].relative.value == 1 and by["maml"].flops == 5e6
    assert by["reptile"].relative is None  # its run has no yardstick: seconds of another machine say nothing
    assert len({time.environment for one in board.standings for time in one.times}) == 2


def timed(rng, *protonets):
    """Rows of maml, and of yardsticks: (more, norm, how slow)."""
    rows = rows_of({"maml": trials(rng, 0.8)})
    rows.append(row("maml", 0, [0.04, 0.04, 0.04], measure="adapt_time"))
    for more, norm, slow in protonets:
        rows.append(row("protonet", 0, [0.01 * slow] * 3, measure="adapt_time", more=more, norm=norm))
    return rows


@pytest.mark.parametrize(
    ("protonets", "wanted"),
    [
        ([("distance=cosine", "running", 4), ("", "running", 1)], 4),
        ([("", "batch", 4), ("", "running", 1)], 4),  # running is the default norm
        ([("distance=cosine", "running", 2)], 2),  # the only one
        ([("distance=cosine", "running", 2), ("lr=0.1", "running", 1)], None),
    ],
)
def test_the_yardstick_is_the_default_one_or_the_only_one(tmp_path, rng, protonets, wanted):
    (board,) = made(run_of(tmp_path, timed(rng, *protonets)))
    maml = by_name(board)["maml"]
    assert (maml.relative and maml.relative.value) == (wanted and pytest.approx(wanted))
    settings = "default parameters" if wanted == 4 else "distance=cosine"
    told = dict(maml.card).get("cost is over", "")
    assert told.startswith(f"protonet with {settings}, norm running, of the same run") if wanted else told == ""


def test_configurations_whose_parameters_were_not_stated_are_kept_apart(tmp_path, rng):
    rows = []
    for more, seconds in (("lr=0.1", 1.0), ("lr=0.2", 9.0)):
        rows += rows_of({"maml": trials(rng, 0.8)}, more=more)
        rows.append(row("maml", 0, [seconds, seconds], measure="adapt_time", more=more))
    path = run_of(tmp_path, rows)
    rewritten(path, "manifest.json", lambda m: {**m, "cells": {k: {**v, "params": ""} for k, v in m["cells"].items()}})
    (board,) = made(path)
    assert {one.label: one.times[0].seconds.value for one in board.standings} == {
        "maml parameters=lr=0.1": 1.0,
        "maml parameters=lr=0.2": 9.0,
    }


def test_a_card_says_what_a_stream_is(tmp_path, rng):
    streams = rows_of({"mann": trials(rng, 0.6)}, measure="accuracy_at_2", task="5w50t", norm="none")
    (board,) = made(run_of(tmp_path, streams))
    assert dict(board.standings[0].card)["data"] == "glyphs[alphabets], 5 ways, 50 images in a stream"


def test_a_time_of_another_call_is_no_cost_of_the_row(tmp_path, rng):
    rows = rows_of({"protonet": trials(rng, 0.9)})
    timed = row("protonet", 0, [0.5, 0.6], measure="adapt_time")
    timed["cell"] += "/tasks=8"
    (board,) = made(run_of(tmp_path, [*rows, timed]))
    assert board.standings[0].times == ()


# across boards


def many(tmp_path, rng, names, datasets, *, missing=()):
    rows = []
    for number, data in enumerate(datasets):
        for place, name in enumerate(names):
            if (name, data) not in missing:
                rows += rows_of({name: trials(rng, 0.8 - 0.1 * place + 0.01 * number)}, data=f"{data}[s]")
    return made(run_of(tmp_path, rows))


def test_what_is_only_declared_is_named_and_takes_no_row(tmp_path, rng):
    rows = [row("protonet", n, scores) for n, scores in enumerate(trials(rng, 0.9))]
    path = run_of(tmp_path, rows)
    manifest = json.loads((path / "manifest.json").read_text())
    for cell in (cell_of("maml", 0), cell_of("maml", 0, task="20w1s15q"), cell_of("protonet", 3)):
        manifest["cells"][cell] = {"cell": cell, **stated(cell)}
        manifest["rows"].append({"cell": cell, "measure": "accuracy", "hash": "h", "sources": rows[0]["sources"]})
    (path / "manifest.json").write_text(json.dumps(manifest))
    (board,) = boards(collect([source_of(Run.open(path))]))
    assert "declared, and not measured yet: maml" in board.remarks, "and there is no board of the untried task"
    assert [one.algorithm for one in board.standings].count("maml") == 0
    assert len([one for one in board.standings if one.algorithm == "protonet"]) >= 1


def test_first_presentations_near_chance_are_no_lack_of_training(tmp_path, rng):
    table = trials(rng, 0.3)
    rows = [r for k in (1, 2) for r in rows_of({"mann": table}, measure=f"accuracy_at_{k}", task="5w50t", norm="none")]
    found = made(run_of(tmp_path, rows))
    said = {board.protocol.measure: " ".join(board.standings[0].remarks) for board in found}
    assert "under-trained" in said["accuracy_at_2"] and "under-trained" not in said["accuracy_at_1"]


def test_a_run_that_is_no_longer_shown_leaves_the_site_and_nothing_else_does(tmp_path, rng):
    names = ("protonet", "maml", "anil")
    first, second, third = (run_of(tmp_path / name, rows_of({name: trials(rng, 0.9)}), name=name) for name in names)
    site = tmp_path / "site" / "runs"
    for name in ("empty", "mine"):
        (site / name).mkdir(parents=True)
    (site / "mine" / "results.csv").write_text("of my own, under a name that a build writes")
    leaderboard([first, second, third], tmp_path / "site")
    (site / "maml" / "notes.txt").write_text("beside what was built")
    (site / "anil" / "samples.jsonl").write_text("changed by hand")
    leaderboard([first], tmp_path / "site")
    assert {one.relative_to(site).as_posix() for one in site.rglob("*") if one.is_file()} == {
        *(f"protonet/{name}" for name in (*rawrows.RAW, "results.csv")),
        "mine/results.csv", "maml/notes.txt", "anil/samples.jsonl",
    }  # fmt: skip
    assert (site / "empty").is_dir()


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": {"../x": {}}}', '{"runs": {"a": {"../x": "0"}}}', '{"runs": 3}'])
def test_a_note_of_what_was_written_that_is_not_ours_removes_nothing(tmp_path, rng, text):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "written.json").write_text(text)
    with pytest.raises(StoreError, match=r"written\.json: cannot be read"):
        leaderboard([path], tmp_path / "site")
    assert [file.name for file in (tmp_path / "site").iterdir()] == ["written.json"], "and replaces nothing"


def test_a_site_can_link_to_the_run_folders_in_place_of_copying_them(tmp_path, rng):
    path = run_of(tmp_path / "the runs", rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}))
    leaderboard([path], tmp_path / "site")
    page = leaderboard([path], tmp_path / "site", link=True).page
    assert f'href="../the%20runs/s/{path.name}/samples.jsonl"' in page.read_text()
    assert not (tmp_path / "site" / "runs" / path.name).exists(), "the copy of the build before is gone"
    done = metabench("leaderboard", pack(path, tmp_path, submitter="Ada"), "--out", tmp_path / "site", "--link")
    assert done.returncode == 2 and "a bundle has no folder to link to" in done.stderr


def test_the_summary_of_a_step_holds_what_its_cap_leaves_room_for(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}))
    summary = tmp_path / "summary.md"
    before = {"room": 0, "little": SUMMARY_BYTES - 300, "none": SUMMARY_BYTES - 20}
    for name, size in before.items():
        summary.write_bytes(b"x" * size)
        command = ("leaderboard", path, "--out", tmp_path / "site")
        assert metabench(*command, env=environ(GITHUB_STEP_SUMMARY=str(summary))).returncode == 0
        added = summary.read_bytes()[size:].decode()
        assert summary.stat().st_size <= SUMMARY_BYTES
        assert added[:2] == {"room": "##", "little": "- ", "none": ""}[name]


def test_a_shortened_summary_counts_the_boards_that_it_leaves_out():
    lines = [f"board {n}" for n in range(30)]
    text = _shortened(lines, 200)
    assert len(text.encode()) <= 200 and text.startswith("- board 0\n")
    assert text.splitlines()[-1] == f"- {30 - text.count('- board')} more boards do not fit here"
    assert _shortened(lines, 10) == "" and _shortened(lines[:2], 200).splitlines() == ["- board 0", "- board 1"]


def test_a_missing_cell_is_shown_and_never_averaged_away(tmp_path, rng):
    found = many(tmp_path, rng, ["protonet", "maml"], ["d1", "d2", "d3", "d4"], missing={("maml", "d2")})
    (summary,) = summaries(found)
    entries = {entry.label: entry for entry in summary.entries}
    assert entries["protonet"].covered == 4 and entries["protonet"].aggregate is not None
    assert entries["maml"].covered == 3 and entries["maml"].aggregate is None
    text = files.leaderboard_md("t", found, [summary])
    assert "| maml | 3/4 |" in text and "| missing |" in text


def test_a_method_is_one_entry_where_another_configuration_stands_on_one_board_alone(tmp_path, rng):
    first = {"more": "inner_lr=0.1"}
    rows = rows_of({"maml": trials(rng, 0.8)}, **first) + rows_of({"maml": trials(rng, 0.7)}, task="5w5s15q", **first)
    rows += rows_of({"maml": trials(rng, 0.6)}, task="5w5s15q", more="inner_lr=0.2")
    (summary,) = summaries(made(run_of(tmp_path, rows)))
    assert {entry.label: entry.covered for entry in summary.entries} == {"maml inner_lr=0.1": 2, "maml inner_lr=0.2": 1}


def test_streams_and_first_presentations_take_no_aggregate_from_episodes(tmp_path, rng):
    rows = [r for n in range(4) for r in rows_of({"protonet": trials(rng, 0.8)}, data=f"d{n}[s]")]
    for k in (1, 2):
        rows += rows_of({"mann": trials(rng, 0.6)}, measure=f"accuracy_at_{k}", task="5w50t", norm="none")
        rows += rows_of({"mann": trials(rng, 0.6)}, measure=f"accuracy_at_{k}", task="5w30t", norm="none")
    episodes, streams = summaries(made(run_of(tmp_path, rows)))
    assert [entry.aggregate is not None for entry in episodes.entries] == [True] and len(episodes.boards) == 4
    assert streams.title.endswith(", streams")
    assert {board.protocol.measure for board in streams.boards} == {"accuracy_at_2"}


def test_the_board_that_blocks_an_aggregate_is_named(tmp_path, rng):
    found = many(tmp_path, rng, ["protonet", "maml"], ["d1", "d2", "d3", "d4"], missing={("maml", "d2")})
    (summary,) = summaries(found)
    said = "Without an aggregate only for want of a result that counts on d2 5-way 1-shot: maml."
    assert said in summary.remarks
    names, gone = ["protonet", "maml", "anil"], {("maml", "d2"), ("maml", "d3"), ("protonet", "d1"), ("protonet", "d2")}
    (summary,) = summaries(many(tmp_path, rng, names, ["d1", "d2", "d3", "d4"], missing=gone))
    assert "for want" not in " ".join(summary.remarks), "anil has them all"
    gone |= {("anil", "d3"), ("anil", "d4")}
    (summary,) = summaries(many(tmp_path, rng, names, ["d1", "d2", "d3", "d4"], missing=gone))
    assert "No method has a result that counts on every board: 2 of 3 lack one on d2 5-way 1-shot." in summary.remarks


def test_a_star_takes_three_seeds(tmp_path, rng):
    rows = []
    for n in range(6):
        for place, name in enumerate(("protonet", "maml")):
            rows += rows_of({name: trials(rng, 0.8 - 0.1 * place + 0.01 * n, seeds=2)}, data=f"d{n}[s]")
    (summary,) = summaries(made(run_of(tmp_path, rows)))
    assert [entry.covered for entry in summary.entries] == [6, 6]
    assert not any(entry.star for entry in summary.entries)


def test_an_aggregate_needs_four_image_sources_and_three_seeds(tmp_path, rng):
    one_source = [f"{name}" for name in ("miniimagenet", "tieredimagenet", "d1", "d2")]
    (summary,) = summaries(many(tmp_path, rng, ["protonet", "maml"], one_source))
    assert summary.sources == 3 and not any(entry.aggregate for entry in summary.entries)
    assert "No aggregate" in " ".join(summary.remarks)
    (summary,) = summaries(many(tmp_path, rng, ["protonet"], ["d1", "d2", "d3", "d4"]), {"d4": "d1"})
    assert summary.sources == 3


def test_the_aggregate_puts_chance_at_nought(tmp_path, rng):
    found = many(tmp_path, rng, ["protonet"], ["d1", "d2", "d3", "d4"])
    (summary,) = summaries(found)
    entry = summary.entries[0]
    means = [(one.table.mean(1) - 0.2) / 0.8 for one in entry.standings]
    assert entry.aggregate.value == pytest.approx(stats.iqm_interval(means).value)


def test_stars_only_from_six_data_sets(tmp_path, rng):
    five = [f"d{n}" for n in range(5)]
    (summary,) = summaries(many(tmp_path, rng, ["protonet", "maml"], five))
    assert not any(entry.star for entry in summary.entries) and "No stars" in " ".join(summary.remarks)
    (summary,) = summaries(many(tmp_path, rng, ["protonet", "maml"], [*five, "d5"]))
    assert [entry.label for entry in summary.entries if entry.star] == ["protonet"]


# files


def test_text_of_others_is_never_code(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}))
    (path / "submission.json").write_text(
        json.dumps({"submitter": '=HYPERLINK("x")</script><img src=x onerror=alert(1)>'})
    )
    out = tmp_path / "site"
    leaderboard([path], out)
    page = (out / "index.html").read_text()
    assert "<img src=x" not in page and page.count("</script>") == 2
    with (out / "leaderboard.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {line["submitter"][:2] for line in found} == {"'="}
    assert float(found[0]["value"]) > 0.8  # figures stay figures


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx", "  =1", "\n=1", "\uff1d1", "\uff201"])
def test_formulas_are_defused(text):
    assert spreadsheet.defused(text).startswith("'")
    assert spreadsheet.defused(-1.5) == -1.5 and spreadsheet.defused("maml") == "maml"


def test_text_cannot_turn_the_writing_around():
    assert plain("a\u202eb\x00c\nd") == "a\ufffdb\ufffdc d"


def test_the_site_holds_all_its_files(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}), name="we rd é")
    out = tmp_path / "site"
    built = leaderboard([path], out)
    for name in ("index.html", "leaderboard.csv", "leaderboard.md", "badge.svg", "runs/we-rd--/results.csv"):
        assert (out / name).stat().st_size, name
    assert (out / "runs/we-rd--/samples.jsonl").read_bytes() == (path / "samples.jsonl").read_bytes()
    assert "1 board, 2 ranked methods" in (out / "badge.svg").read_text()
    assert built.lines == ["glyphs 5-way 1-shot: Best of 2: protonet, better than every other ranked method."]
    again = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    leaderboard([path], out)
    assert again == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}  # the same runs, the same bytes


# the board file


def test_a_board_file_chooses_protocols_and_withdraws_with_a_reason(tmp_path, rng):
    one = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}), name="one")
    two = run_of(tmp_path, rows_of({"reptile": trials(rng, 0.7)}, task="5w5s15q"), name="two")
    three = run_of(tmp_path, rows_of({"anil": trials(rng, 0.99)}), name="three")
    file = tmp_path / "board.yaml"
    file.write_text(
        "title: Ours\nprotocols: [{dataset: glyphs, shots: 1}]\n"
        "withdrawals: [{run: three, reason: trained on test classes}, {run: one, algorithm: maml, reason: a bug}]\n"
    )
    built = leaderboard([one, two, three], tmp_path / "site", board=file)
    assert [one.algorithm for board in built.boards for one in board.standings] == ["protonet"]
    page = (tmp_path / "site/index.html").read_text()
    assert "trained on test classes" in page and "<title>Ours</title>" in page
    assert not (tmp_path / "site/runs/three").exists()


def test_a_board_file_is_read_strictly_with_lines(tmp_path):
    file = tmp_path / "board.yaml"
    file.write_text("titel: x\nmin_seeds: 2\nwithdrawals:\n  - run: a\n    because: b\n")
    with pytest.raises(ConfigError) as raised:
        read_board(file)
    said = str(raised.value)
    assert f"{file}:1: unknown key 'titel' (did you mean 'title'?)" in said
    assert f"{file}:2: min_seeds must be at least 3" in said
    assert f"{file}:5: unknown key 'because'" in said and "reason is missing" in said
    file.write_text("- a")
    with pytest.raises(ConfigError, match=r"board\.yaml:1: a board file must be a mapping, not \['a'\]"):
        read_board(file)


def test_a_withdrawal_of_a_run_that_is_not_named_is_listed(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9)}))
    (tmp_path / "b.yaml").write_text("withdrawals: [{run: gone, reason: trained on test classes}]")
    built = leaderboard([path], tmp_path / "site", board=tmp_path / "b.yaml")
    assert "<li>gone (not among these runs), all rows: trained on test classes</li>" in built.page.read_text()
    assert "withdrawn, and not among these runs: gone" in built.lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "withdrawals: [{run: one, algorithm: mmal, reason: x}]",
            r"withdrawals\[0\]: one has no row of 'mmal' .*'maml'",
        ),
        (
            "protocols: [{shots: 1}, {dataset: glyph}]",
            r"protocols\[1\]: .* dataset 'glyph' \(did you mean 'glyphs'\?\)",
        ),
        ("protocols: [{dataset: glyphs, bn_mode: transductive}]", "no run has a result with bn_mode 'transductive'"),
        ("protocols: [{shots: 5, ways: 5}]", "no run has a result with all of ways 5, shots 5"),
    ],
)
def test_what_a_board_file_names_in_vain_is_a_mistake(tmp_path, rng, text, said):
    rows = rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})
    rows += rows_of({"protonet": trials(rng, 0.9)}, task="20w5s15q")
    path = run_of(tmp_path, rows, name="one")
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        leaderboard([path], tmp_path / "site", board=tmp_path / "b.yaml")
    assert not (tmp_path / "site").exists()


def test_what_was_withdrawn_was_tried(tmp_path, rng):
    one = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}, more="inner_lr=0.1"), name="one")
    two = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}, more="inner_lr=0.2"), name="two")
    edited(two, "measurements.jsonl", '"value": 0.', '"value": 0.9')  # perhaps it was withdrawn for this
    (tmp_path / "b.yaml").write_text("withdrawals: [{run: two, reason: x}]")
    (board,) = leaderboard([one, two], tmp_path / "site", board=tmp_path / "b.yaml").boards
    assert [standing.tried for standing in board.standings] == [2]


# bad input


def test_a_run_counts_once(tmp_path, rng):
    import shutil

    path = run_of(tmp_path, rows_of({"maml": trials(rng, 0.9)}))
    copied = shutil.copytree(path, tmp_path / "copy")
    with pytest.raises(StoreError, match="counts once"):
        made(path, copied)


def test_a_training_does_not_become_a_second_seed_in_another_run(tmp_path, rng):
    table = trials(rng, 0.8)
    first = run_of(tmp_path, [row("maml", 0, table[0])])
    later = "2026-02-01T00:00:00+00:00"
    for norm, ids in (("running", None), ("running", [f"x{i}" for i in range(40)])):
        again = run_of(tmp_path, [row("maml", 1, table[0], norm=norm)], at=later, ids=ids, stable={"cpu": "another"})
        with pytest.raises(StoreError, match=r"seed1 accuracy: the same scores as .*seed0 in .*no second seed"):
            made(first, again)
    honest = run_of(tmp_path, [row("maml", 1, table[1])], at=later)
    (board,) = made(first, honest)
    assert board.standings[0].seeds == (0, 1)


def test_a_training_of_one_device_is_no_second_seed_on_another(tmp_path, rng):
    table = trials(rng, 0.8)
    other = row("maml", 1, table[0])
    other["cell"] = other["cell"].replace("cpu-", "cuda-")
    with pytest.raises(StoreError, match="no second seed"):
        made(run_of(tmp_path, [row("maml", 0, table[0])]), run_of(tmp_path, [other]))


def test_what_no_seed_can_change_may_be_the_same_in_every_run(tmp_path, rng):
    table = trials(rng, 0.8)
    for where in (
        {"train": ""},  # nothing was trained
        {"measure": "accuracy_at_1", "task": "5w50t", "norm": "none"},  # no label is known yet
    ):
        made(*(run_of(tmp_path, [row("mine", seed, table[0], **where)], at=f"2026-0{seed + 1}") for seed in range(3)))
    controls = (run_of(tmp_path, [row("untrained", s, table[0])], at=f"2026-0{s + 1}") for s in range(3))
    made(*controls)
    same = np.full(40, 0.2)
    made(*(run_of(tmp_path, [row("maml", s, same)], at=f"2026-0{s + 1}") for s in range(3)))  # chance, all of it


def test_the_same_seed_reached_twice_is_no_forgery(tmp_path, rng):
    table = trials(rng, 0.8)
    runs = [run_of(tmp_path, rows_of({"maml": table}), at=f"2026-0{n}") for n in (1, 2)]
    (board,) = made(*runs)
    assert board.standings[0].seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("measurements.jsonl", '"value": 0.', '"value": 0.9', "value is stated as"),
        ("measurements.jsonl", '"value": 0.', '"value": NaN, "x": 0.', "not a measurement"),
        ("measurements.jsonl", '"sd": 0.', '"sd": 1.', "sd is stated as"),
        ("measurements.jsonl", '"n": 40', '"n": 41', "n is 41"),
        ("measurements.jsonl", '"episodes_hash": "', '"episodes_hash": "f', "episodes_hash is"),
        ("samples.jsonl", '"scores": [0.', '"scores": [NaN, 0.', "scores for 40 episodes"),
        ("samples.jsonl", '"scores": [0.', '"scores": [-0.', "out of range"),
        ("samples.jsonl", '"e1"', '"e0"', "stands twice"),
        ("manifest.json", '"ways": 5', '"ways": 20', "ways is '20' there"),
        ("manifest.json", '"schema_version": 1', '"schema_version": 99', "schema 99"),
        ("manifest.json", '"measure": "accuracy"', '"measure": 3', "all text"),
    ],
)
def test_what_does_not_add_up_is_refused_with_its_place(tmp_path, rng, file, before, after, said):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.8), "maml": trials(rng, 0.7)}))
    edited(path, file, before, after)
    with pytest.raises(StoreError, match=said) as raised:
        leaderboard([path], tmp_path / "site")
    assert str(path) in str(raised.value)
    assert not (tmp_path / "site").exists()


HUGE = int("9" * 400)  # larger than any float


def with_line(file, change):
    return lambda out, rows: rewritten(run_of(out, rows), file, change)


def renamed_cell(before, after):
    def make(out, rows):
        path = run_of(out, rows)
        for name in ("manifest.json", "measurements.jsonl", "samples.jsonl"):
            (path / name).write_text((path / name).read_text().replace(before, after))
        return path

    return make


def one_more_episode(out, rows):
    rows = [{**r, "scores": [*r["scores"], 0.5]} if r["measure"] == "accuracy" else r for r in rows]
    return run_of(out, rows, ids=[*(f"e{n}" for n in range(40)), ""])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        *((with_line("measurements.jsonl", lambda m, name=name: {**m, name: HUGE}), rf"{name} is no finite number")
          for name in ("n", "value", "ci_low", "sd")),
        (with_line("samples.jsonl", lambda m: {**m, "scores": [HUGE, *m["scores"][1:]]}), "a raw score is no number"),
        (with_line("measurements.jsonl", lambda m: {**m, "facts": {"processes": [HUGE, 1.0]}}
                   if "time" in m["measure"] else m), "must be a finite number above 0"),
        (with_line("manifest.json", lambda m: {**m, "evaluation": {"seed": HUGE, "episodes": HUGE}}), ""),
        (with_line("measurements.jsonl", lambda m: {**m, "facts": {**m["facts"], "train_steps": HUGE}}), ""),
        (renamed_cell("seed0", f"seed{'9' * 5000}"), "not a cell id"),
        (renamed_cell("5w1s15q", f"{'9' * 400}w1s15q"), "ways is"),
        (lambda out, rows: run_of(out, rows_of({"maml": np.full((3, 40), 0.5)}, task=f"{HUGE}w1s15q")), ""),
        (one_more_episode, "an episode has an empty name"),
        (lambda out, rows: run_of(out, rows_of({"maml": np.full((3, 40), 0.5)}, task="1w1s15q")), "ways are 2 or more"),
        (lambda out, rows: run_of(out, rows_of({"maml": np.full((3, 40), 0.5)}, data="gl\ud800phs[al\ud800]")), ""),
        (with_line("measurements.jsonl", lambda m: {**m, "reason": "\ud800", "environment": "\ud800"}), ""),
        (with_line("manifest.json", lambda m: {**m, "suite": "\ud800", "metabench": "\ud800"}), ""),
    ],
)  # fmt: skip
def test_numbers_and_text_made_to_break_us_are_messages_or_text(tmp_path, rng, make, said):
    rows = rows_of({"protonet": trials(rng, 0.8), "maml": trials(rng, 0.7)})
    path = make(tmp_path, [*rows, row("maml", 0, [0.1, 0.2], measure="adapt_time")])
    (path / "results.csv").write_text("cell,measure\n")
    with contextlib.suppress(MetabenchError):
        verify([path], episodes=False)
    if not said:
        leaderboard([path], tmp_path / "site")
        return
    with pytest.raises(StoreError, match=said):
        leaderboard([path], tmp_path / "site")


def test_lists_of_other_lengths_are_other_boards_whatever_their_hash(tmp_path, rng):
    """Names that are joined to one text have one hash."""
    short = run_of(tmp_path, rows_of({"mine": trials(rng, 0.8, episodes=2)}, train=""), ids=["ab", "c"])
    long = run_of(tmp_path, rows_of({"yours": trials(rng, 0.8, episodes=3)}, train=""), ids=["a", "b", "c"])
    assert [[one.algorithm for one in board.standings] for board in made(short, long)] == [["mine"], ["yours"]]


def test_a_row_listed_twice_is_refused(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["rows"].append(manifest["rows"][0])
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"rows\[3\].*listed twice"):
        made(path)


def test_links_are_not_followed(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}))
    (path / "environment.json").unlink()
    (path / "environment.json").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="links are not followed"):
        leaderboard([path], tmp_path / "site")


def test_nothing_to_show_is_said(tmp_path, rng):
    only = run_of(tmp_path, [row("maml", 0, [0.1, 0.2], measure="adapt_time")])
    with pytest.raises(NothingRan, match="no run has a result"):
        leaderboard([only], tmp_path / "site")
    path = run_of(tmp_path, rows_of({"maml": trials(rng, 0.8)}))
    (tmp_path / "b.yaml").write_text(f"withdrawals: [{{run: {path.name}, reason: x}}]")
    with pytest.raises(NothingRan):
        leaderboard([path], tmp_path / "site", board=tmp_path / "b.yaml")


def test_the_command_line(tmp_path, rng):
    path = run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}))
    done = metabench("leaderboard", path, "--out", tmp_path / "site")
    assert done.returncode == 0 and "Best of 2: protonet" in done.stdout and "index.html" in done.stdout
    wrong = metabench("leaderboard", tmp_path / "nothing", "--out", tmp_path / "site")
    assert wrong.returncode == 2 and "not a run folder" in wrong.stderr
    empty = run_of(tmp_path, [row("maml", 0, [], status="failed")])
    assert metabench("leaderboard", "--out", tmp_path / "site", empty).returncode == 3
    assert "verify" in metabench("leaderboard", "--help").stdout


def test_making_and_verifying_a_board_never_loads_torch(tmp_path, rng):
    from test_imports import loaded

    path = str(run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})))
    commands = [
        ["leaderboard", path, "--out", str(tmp_path / "site")], ["leaderboard", "verify", path, "--no-episodes"],
    ]  # fmt: skip
    assert set(loaded(commands, {"torch"}).values()) == {"]"}


def test_cells_in_other_words_have_other_ids():
    assert cell_of("maml", 0) == "maml[train=5w1s1q*10]/glyphs[alphabets]/5w1s15q/running/cpu-float32/seed0"


def test_every_run_has_a_folder_of_its_own(tmp_path, rng):
    paths = []
    for number, name in enumerate(("a", "a", "a-2", "a b", "a-b", "...")):
        rows = rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})
        paths.append(run_of(tmp_path / str(number), rows, name=name, at=f"2026-01-0{number + 1}T00:00:00+00:00"))
    leaderboard(paths, tmp_path / "site")
    folders = sorted(path.name for path in (tmp_path / "site" / "runs").iterdir())
    assert folders == ["a", "a-2", "a-2-2", "a-b", "a-b-2", "run"]
    raw = {(path / "samples.jsonl").read_bytes() for path in (tmp_path / "site" / "runs").iterdir()}
    assert raw == {(path / "samples.jsonl").read_bytes() for path in paths}


def test_a_method_that_adapts_without_an_operation_stops_no_board(tmp_path, rng):
    rows = rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)})
    path = run_of(tmp_path, [*rows, row("maml", 0, [0.0], measure="adapt_flops")])
    (board,) = made(path)
    assert {one.flops for one in board.standings} == {None}


def test_one_seed_s_interval_is_said_to_be_over_episodes(tmp_path, rng):
    (board,) = made(run_of(tmp_path, rows_of({"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8, seeds=1)})))
    said = {one.label: " ".join(one.remarks) for one in board.standings}
    assert "1 seed, a rank needs 3: not ranked; its interval speaks of test episodes alone" in said["maml"]


# what the page says


def colours(text):
    """The custom properties of each scheme."""
    return [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    ]


def contrast(a, b):
    """The contrast ratio of WCAG 2."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_what_is_behind_them():
    assert contrast("#fff", "#000000") == pytest.approx(21)
    light, dark = colours((Path(files.__file__).parent / "templates" / "style.css").read_text())
    for scheme in (light, {**light, **dark}):
        for behind in ("bg", "soft", "raised"):
            for drawn in ("bar", "chance", "accent"):
                assert contrast(scheme[drawn], scheme[behind]) >= 3, (drawn, behind, scheme[drawn])
            for written in ("text", "quiet", "accent", "warn", "good"):
                assert contrast(scheme[written], scheme[behind]) >= 4.5, (written, behind, scheme[written])


def heads(page):
    return re.findall(r'<th scope="col"[^>]*aria-sort="(\w+)"[^>]*><button type="button">([^<]*)<', page.read_text())


def test_the_table_claims_the_order_that_it_has(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8)}
    path = run_of(tmp_path, rows_of(tables))
    assert heads(leaderboard([path], tmp_path / "a").page) == [("descending", "accuracy %")]
    few = run_of(tmp_path, [*rows_of(tables), row("anil", 0, trials(rng, 0.99)[0])])  # best of all, and not ranked
    assert heads(leaderboard([few], tmp_path / "b").page) == []


def test_pairs_that_were_not_tested_are_not_called_alike(tmp_path, rng):
    tables = {"protonet": trials(rng, 0.9), "maml": trials(rng, 0.8), "anil": trials(rng, 0.7, seeds=2)}
    page = leaderboard([run_of(tmp_path, rows_of(tables))], tmp_path / "site").page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["board-1"]
    assert [method["few"] for method in data["methods"]] == [False, False, True]
    assert [pair[3] is None for pair in data["pairs"]] == [False, True, True]


def test_nothing_is_said_by_a_tooltip_alone_and_no_drawing_repeats_its_text(tmp_path, rng):
    rows = []
    for n in range(6):
        for place, name in enumerate(("protonet", "maml")):
            rows += rows_of({name: trials(rng, 0.8 - 0.1 * place + 0.01 * n)}, data=f"d{n}[s]")
    page = leaderboard([run_of(tmp_path, rows)], tmp_path / "site").page.read_text()
    assert 'title="' not in page
    assert '<span class="unseen">better than every other over data sets:</span>' in page
    assert '<span class="unseen">rank </span>1' in page
    assert page.count('class="whisker" viewBox="0 0 132 22" aria-hidden="true"') == 12
