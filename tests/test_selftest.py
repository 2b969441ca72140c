"""What the self-test reports of many trials."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from metabench import selftest, signedranks
from metabench.errors import ConfigError
from metabench.judging import Judgement
from metabench.pairs import Name
from metabench.stats import Interval
from metabench.suite import Gating
from metabench.thresholds import Margin
from metabench.trials import Trial, Trials

ROW, OTHER = Name("cell", "adapt_time"), Name("other", "adapt_time")


def test_the_change_over_any_number_of_trials_is_the_median_of_their_own():
    trials = [SimpleNamespace(ratios={ROW: [n / 1000.0] * 28}) for n in range(101)]
    assert sum(len(trial.ratios[ROW]) for trial in trials) > signedranks.MOST
    assert selftest._usual(ROW, trials) == pytest.approx(math.expm1(0.05))
    assert math.isnan(selftest._usual(ROW, [SimpleNamespace(ratios={})])), "a row that no trial has"


def test_both_sets_of_the_longest_check_that_a_suite_may_ask_for_can_be_judged():
    values = [0.01 + n * 1e-6 for n in range(1000)]
    assert signedranks.p_above(values) < 1e-9 and signedranks.centre(values).low > 0


def trial(*, measured=(ROW,), outcome="unchanged", controls=None):
    """A trial of 28 + 14 pairs: `ROW` took 28 of them, a row beside it as many others."""
    change = Interval(0.001, -0.01, 0.01, 14, None)
    return Trial(
        {name: Judgement(outcome, change) for name in measured},
        {name: [0.001 * (-1) ** n for n in range(28)] for name in measured},
        42,
        controls if controls is not None else {"matmul": [0.0005 * (-1) ** n for n in range(42)]},
    )


def report(trials):
    suite = SimpleNamespace(name="mine", gate=Gating(), thresholds={})
    margins = {ROW: Margin(0.02, 0.05), OTHER: Margin(0.02, 0.05)}
    return selftest._report(suite, margins, (0.0,), trials, SimpleNamespace(faults={}))


def test_a_row_that_a_trial_could_not_measure_is_not_counted_there():
    found = report([trial(measured=(ROW, OTHER)), trial(), trial()])
    assert [(row.cell, row.alarms.trials) for row in found.rows] == [("cell", 3), ("other", 1)]
    assert (found.per_row.trials, found.per_family.trials, found.pairs) == (4, 3, 126)
    assert [row.cell for row in report([trial()]).rows] == ["cell"]


def test_checks_that_a_control_would_have_spoilt_are_counted_where_controls_are_known():
    moved = trial(controls={"matmul": [0.03 + 0.001 * (-1) ** n for n in range(42)], "python": [0.0, 0.001]})
    found = report([trial(), moved, trial(controls={})])
    assert (found.contaminated.hits, found.contaminated.trials) == (1, 2)
    alarm = report([trial(outcome="regressed"), trial()])
    assert (alarm.per_row.hits, alarm.per_family.hits, alarm.contaminated.hits) == (1, 1, 0)


def test_what_is_kept_of_a_trial_is_read_again(tmp_path):
    file, settings = tmp_path / "trials.jsonl", {"suite": "mine", "code": "a"}
    Trials(file, settings).add(trial(measured=(ROW, OTHER)))
    again = Trials(file, settings).earlier
    assert [(one.ratios, one.pairs, one.controls) for one in again] == [
        (trial(measured=(ROW, OTHER)).ratios, 42, trial().controls)
    ]
    with pytest.raises(ConfigError, match="another version of the code that measures and decides: name another file"):
        Trials(file, {"suite": "mine", "code": "b"})
    with pytest.raises(ConfigError, match="holds trials with another suite: name another file"):
        Trials(file, {"suite": "yours", "code": "a"})


def test_a_trial_of_a_file_that_does_not_say_how_many_pairs_it_took_leaves_room_for_all(tmp_path):
    file, settings = tmp_path / "trials.jsonl", {"suite": "mine"}
    Trials(file, settings).add(trial())
    head, line = (json.loads(text) for text in file.read_text().splitlines())
    del line["pairs"], line["controls"]
    file.write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")
    (old,) = Trials(file, settings).earlier
    assert (old.pairs, old.controls) == (56, {})
