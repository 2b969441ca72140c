# ruff: noqa: E501 - the golden texts below are as wide as what they show
import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from metabench.errors import ConfigError, StoreError
from metabench.report import FORMATS, KernelReport, RunData, latex, markdown, render, table, tables, wording
from metabench.report.csvfile import episodes as episodes_csv
from metabench.report.model import EPISODE_COLUMNS, RESULT_COLUMNS
from metabench.stats import mean_interval, paired_difference, seeds_interval

EPISODES = 40
HARD = 0.02 * np.sin(np.arange(EPISODES))
"""How much easier each test episode is, for every method alike."""


class Results:
    """A run being made up: rows, episodes and classes of as many methods as a test needs."""

    def __init__(self):
        self.rows, self.episodes, self.classes = [], [], []

    def add(self, algorithm, level, *, seeds=(0, 1, 2), wobble=0.004, failed=(), classes=False, **columns):
        """One method; `level` is its accuracy, or a status instead of one. `columns` override the row's."""
        for seed in seeds:
            base = {
                "run": "r", "suite": "core", "algorithm": algorithm, "params": "{}", "backbone": "conv4", "tasks": 1,
                "dataset": "omniglot", "split": "vinyals", "ways": 5, "shots": 1, "queries": 15, "bn_mode": "inductive",
                "device": "cpu", "precision": "float32", "seed": seed, "environment": "e", "rotations": "none",
                "norm": "running", "selection": "val", "train_spec": "5w1s15q*3000", "train_steps": 3000,
                "measure": "accuracy", "unit": "fraction", "status": "ok", **columns,
            }  # fmt: skip
            keys = ("params", "ways", "shots", "queries", "dataset", "bn_mode", "device", "precision", "rotations")
            named = f"{algorithm}{base['params']}", f"{base['dataset']}[{base['split']}]"
            base["cell"] = "/".join([*named, *(str(base[key]) for key in keys), f"seed{seed}"])
            if isinstance(level, str) or seed in failed:
                status = level if isinstance(level, str) else "diverged"
                self.rows.append({"reason": f"{algorithm} has a reason", **base, "status": status})
            else:
                self._scored(base, level, seed, wobble, classes)
        return self

    def _scored(self, base, level, seed, wobble, classes):
        phase = len(base["algorithm"]) + 7 * seed
        scores = level + HARD + wobble * np.cos(phase * (1 + np.arange(EPISODES))) + wobble * np.sin(phase)
        scores = scores if base["measure"] != "accuracy" else np.clip(scores, 0, 1)
        numbers = {"n": EPISODES, "value": scores.mean()}
        if np.isfinite(scores).all():
            whole = mean_interval(scores)
            numbers |= {"ci_low": whole.low, "ci_high": whole.high, "sd": whole.sd}
        self.rows.append({**base, **numbers})
        cell = {"cell": base["cell"], "seed": seed, "measure": base["measure"]}
        self.episodes += [{**cell, "episode": i, "hash": f"h{i}", "score": s} for i, s in enumerate(scores)]
        if classes:
            share = [level - 0.02, level + 0.01, level + 0.01]
            self.classes += [{**cell, "class": c, "queries": 100, "credit": 100 * s} for c, s in enumerate(share)]

    def time(self, algorithm, measure, value, **columns):
        """A time beside the accuracy rows that this method already has."""
        mine = [r for r in self.rows if r["algorithm"] == algorithm and r["measure"] == "accuracy"]
        numbers = {
            "measure": measure,
            "unit": "s",
            "value": value,
            "ci_low": 0.9 * value,
            "ci_high": 1.2 * value,
            "n": 5,
        }
        self.rows += [{**r, "sd": None, **numbers, **columns} for r in mine if r["status"] == "ok"]
        return self

    def data(self, **options):
        return RunData.of(self.rows, self.episodes, self.classes, **options)


def small():
    """One table that has a bit of everything."""
    run = Results().add("protonet", 0.95, classes=True).add("maml", 0.90, params='{"inner_steps": 5}', norm="support")
    run.add("maml", 0.91, params='{"inner_steps": 10}', norm="support").add("metanet", "failed")
    run.add("maml", 0.93, params='{"inner_steps": 5}', bn_mode="transductive", norm="batch")
    run.add("chance", 0.2, seeds=(0,), wobble=0, train_spec=None, train_steps=None, norm=None)
    return run.time("protonet", "adapt_time", 0.00123).time("protonet", "train_time", 540.0).data()


def only(data, reference=None):
    made = tables(data, reference)
    assert len(made) == 1
    return made[0]


def row(made, method, block=None):
    found = [r for b in made.blocks for r in b.rows if r.method == method and block in (None, b.title)]
    assert len(found) == 1
    return found[0]


# what the table says


def test_quality_difference_and_classes_are_the_intervals_of_stats():
    data = small()
    made = only(data)

    def scores(start):
        mine = data.episodes[
            data.episodes["cell"].str.startswith(start) & data.episodes["cell"].str.contains("/inductive")
        ]
        return mine.pivot(index="seed", columns="episode", values="score").to_numpy()

    proto, maml = scores("protonet"), scores('maml{"inner_steps": 5}')
    assert row(made, "protonet").quality == seeds_interval(proto)
    found = row(made, "maml inner_steps=5").difference
    expected = paired_difference(maml, proto)
    assert (found.value, found.half) == (pytest.approx(expected.value), pytest.approx(expected.half))
    assert row(made, "protonet").by_class.value == pytest.approx(0.95)
    assert row(made, "protonet").by_class.n == 3
    assert row(made, "protonet").is_reference
    assert (row(made, "protonet").adapt_time.value, row(made, "protonet").train_steps) == (0.00123, 3000)


def test_blocks_separate_protocols_and_controls():
    made = only(small())
    assert [block.title for block in made.blocks] == ["inductive", "transductive", "controls"]
    assert row(made, "maml", "transductive").difference is None
    assert row(made, "chance").difference.value == pytest.approx(-0.75, abs=0.01)


@pytest.mark.parametrize("column", ["dataset", "split", "ways", "shots", "queries", "rotations", "device", "precision"])
def test_another_task_or_protocol_is_another_table(column):
    other = {"ways": 20, "shots": 5, "queries": 1}.get(column, "other")
    made = tables(Results().add("protonet", 0.95).add("maml", 0.9, **{column: other}).data())
    assert [[r.method for r in t.rows] for t in made] == [["protonet"], ["maml"]]


def test_the_best_is_marked_only_with_three_seeds_and_an_interval_that_supports_it():
    clear = Results().add("protonet", 0.95).add("maml", 0.90).data()
    assert row(only(clear), "protonet").mark == "best"
    close = only(Results().add("protonet", 0.95, wobble=0.02).add("maml", 0.951, wobble=0.02).data())
    assert {r.mark for r in close.rows} == {""}
    assert "no single best" in close.blocks[0].verdict
    two = only(Results().add("protonet", 0.95, seeds=(0, 1)).add("maml", 0.50, seeds=(0, 1)).data())
    assert row(two, "protonet").mark == "here"
    one_short = only(Results().add("protonet", 0.95).add("maml", 0.50, seeds=(0,)).data())
    assert row(one_short, "protonet").mark == "here"
    assert "needs 3 seeds" in one_short.blocks[0].verdict
    assert {r.mark for r in only(Results().add("protonet", 0.95).data()).rows} == {""}


def test_the_lowest_error_is_best():
    columns = {"dataset": "sinusoid", "measure": "mse", "ways": None, "unit": "error"}
    made = only(Results().add("maml", 0.5, **columns).add("reptile", 1.5, **columns).data())
    assert [(r.method, r.mark) for r in made.rows] == [("maml", "best"), ("reptile", "")]
    assert row(made, "reptile").difference.value == pytest.approx(1, abs=0.01)


def test_rows_that_cannot_be_ranked_never_decide_the_ranking():
    run = Results().add("protonet", 0.95).add("maml", 0.90)
    run.add("quick", 0.99, train_spec="5w1s15q*75s").add("shaky", 0.98, failed=(1,))
    made = only(run.data())
    assert row(made, "protonet").mark == "best"
    notes = dict(made.notes)
    assert "not ranked" in notes[row(made, "quick").notes[0]]
    assert notes[row(made, "shaky").notes[0]] == "1 of 3 seeds diverged (shaky has a reason): not ranked"
    assert (row(made, "shaky").seeds, row(made, "shaky").failed_seeds) == (2, 1)


def test_under_trained_methods_are_said_to_be_but_controls_are_not():
    made = only(Results().add("protonet", 0.95).add("siamese", 0.39).add("pixel-nn", 0.38).data())
    assert "under-trained" in dict(made.notes)[row(made, "siamese").notes[0]]
    assert row(made, "pixel-nn").notes == ()
    assert row(made, "protonet").notes == ()


def test_a_row_that_does_not_vary_says_of_what_its_interval_speaks():
    run = Results().add("maml", 0.9).add("scratch", 0.6, wobble=0)  # the episodes vary, the seeds do not
    (made,) = tables(run.data())
    (note,) = row(made, "scratch").notes
    assert dict(made.notes)[note] == "no variation between seeds: the interval speaks of episodes alone"
    assert row(made, "scratch").quality.half > 0 and row(made, "maml").notes == ()

    same = [{**one, "value": 1.0, "ci_low": 1.0, "ci_high": 1.0, "sd": 0.0} for one in Results().add("r2d2", 0.9).rows]
    perfect = [{**one, "score": 1.0} for one in Results().add("r2d2", 0.9).episodes]
    (made,) = tables(RunData.of(same, perfect))
    assert "the interval of width 0 is no certainty" in dict(made.notes)[row(made, "r2d2").notes[0]]


def test_a_row_with_another_backbone_than_most_has_a_footnote():
    results = Results().add("protonet", 0.9).add("matching", 0.89)
    results.add("relation", 0.8, backbone="conv4-maps").add("mann", 0.7, backbone="", train_spec="5w1s5q*10")
    results.add("pixel-nn", 0.4, backbone="", train_spec="")
    made = only(results.data())
    said = {r.method: [dict(made.notes)[n] for n in r.notes] for r in made.rows}
    assert said["relation"] == ["backbone conv4-maps; most here have conv4"]
    assert said["mann"] == ["a network of its own; most here have conv4"]
    assert not said["protonet"] and not said["matching"] and not said["pixel-nn"]
    alone = only(Results().add("protonet", 0.9).add("relation", 0.8, backbone="conv4-maps").data())
    assert not alone.notes  # no two share one: there is no common backbone


def test_the_data_that_a_table_is_on_stands_in_its_title():
    made = only(Results().add("protonet", 0.9, measure="val_accuracy").data())
    assert dict(made.protocol)["split"] == "vinyals (validation)" and "validation episodes" in dict(made.protocol)


def test_the_reference_is_the_first_method_of_the_suite_or_the_one_named():
    data = small()
    assert only(data).reference == "protonet"
    assert only(data, "maml").reference == "maml inner_steps=5"
    assert only(data, "maml inner_steps=10").reference == "maml inner_steps=10"
    assert row(only(data, "maml inner_steps=10"), "protonet").difference.value == pytest.approx(0.04, abs=0.01)
    again = RunData.of(data.rows, data.episodes, manifest={"reference": "maml"})
    assert only(again).reference == "maml inner_steps=5"
    assert only(again, "protonet").reference == "protonet"
    assert only(RunData.of(data.rows, data.episodes, manifest={"reference": "metanet"})).reference == "protonet"
    with pytest.raises(ConfigError, match="did you mean 'protonet'"):
        tables(data, "protonett")


def test_visible_difference_says_what_the_rows_could_have_shown():
    made = only(small())
    low, high = made.visible
    halves = [r.difference.half for b in made.blocks[:1] for r in b.rows if r.difference]
    assert min(halves) < low <= high
    assert "Smallest visible difference to protonet" in render(small(), "table")


def test_published_numbers_stand_beside_ours_with_what_differs():
    made = only(Results().add("protonet", 0.95).add("maml", 0.9).add("baseline++", 0.8).add("mine", 0.7).data())
    assert wording.paper(row(made, "protonet")) == "98.8"
    assert wording.paper(row(made, "maml")) == "98.7~"
    assert wording.paper(row(made, "baseline++")) == "95.41?"
    assert row(made, "mine").published is None
    assert row(made, "maml").deviations == ("random split", "transductive", "1 query")


def test_one_seed_has_an_interval_over_episodes_and_says_so():
    made = only(Results().add("protonet", 0.95, seeds=(4,)).add("maml", 0.9, seeds=(4,)).data())
    assert row(made, "protonet").quality.n == EPISODES
    assert "One seed" in made.footer[0]
    assert "one   " in render(Results().add("protonet", 0.95, seeds=(4,)).data(), "table") + "one   "


def test_without_episode_records_the_rows_own_numbers_are_used():
    run = Results().add("protonet", 0.95).add("maml", 0.9, seeds=(0,))
    made = only(RunData.of(run.rows))
    values = [r["value"] for r in run.rows if r["algorithm"] == "protonet"]
    assert row(made, "protonet").quality == mean_interval(values)
    assert "no shared episode records" in dict(made.notes)[row(made, "protonet").notes[0]]
    maml = row(made, "maml")
    assert (maml.quality.low, maml.quality.n) == (run.rows[-1]["ci_low"], EPISODES)
    assert (maml.difference.low, maml.mark) == (None, "")


def test_methods_that_saw_other_episodes_are_not_paired():
    run = Results().add("protonet", 0.95).add("maml", 0.5)
    for record in run.episodes:
        record["hash"] += "x" if record["cell"].startswith("maml") else ""
    made = only(run.data())
    assert row(made, "maml").difference.low is None
    assert {r.mark for r in made.rows} == {""}


def test_an_error_that_is_not_finite_has_no_interval():
    columns = {"dataset": "sinusoid", "measure": "mse", "ways": None}
    run = Results().add("maml", 0.5, **columns).add("reptile", np.inf, **columns)
    made = only(run.data())
    assert row(made, "reptile").quality.half is None
    for format in FORMATS:
        assert render(run.data(), format)


def test_the_last_of_equal_rows_counts():
    run = Results().add("protonet", "failed", seeds=(0,)).add("protonet", 0.95, seeds=(0,))
    made = only(run.data())
    assert (row(made, "protonet").status, row(made, "protonet").seeds) == ("ok", 1)


def test_further_measures_are_listed_below():
    run = Results().add("mann", 0.9)
    for k, value in ((1, 0.364), (2, 0.828)):
        run.rows += [
            {**r, "measure": f"accuracy_at_{k}", "value": value} for r in list(run.rows) if r["measure"] == "accuracy"
        ]
    text = render(run.data(), "table")
    assert "Accuracy at presentation 2: mann 82.80." in text
    presentations = [r for r in run.rows if r["measure"] != "accuracy"]
    alone = only(RunData.of([{**r, "shots": None} for r in presentations]))
    assert (alone.measure, alone.rows[0].published.value) == ("accuracy_at_2", 0.828)


def test_adaptation_is_per_task_and_times_of_two_machines_are_cautioned():
    run = Results().add("protonet", 0.95).add("maml", 0.9)
    run.time("protonet", "adapt_time", 0.016, tasks=8).time("maml", "adapt_time", 0.1, environment="other")
    made = only(run.data())
    assert row(made, "protonet").adapt_time.value == pytest.approx(0.002)
    assert any("different environments" in text for text in made.footer)


def test_times_of_several_seeds_are_their_median():
    run = Results().add("protonet", 0.95).time("protonet", "train_time", 100.0)
    run.rows[-1]["value"], run.rows[-1]["ci_high"] = 400.0, 500.0
    found = row(only(run.data()), "protonet").train_time
    assert (found.value, found.low, found.high, found.n) == (100, 90, 500, 15)


def test_a_seed_that_failed_before_it_had_a_backbone_belongs_to_its_method():
    run = Results().add("protonet", 0.95, seeds=(0, 1)).add("protonet", "failed", seeds=(2,), backbone=None)
    found = row(only(run.data()), "protonet")
    assert (found.seeds, found.failed_seeds, found.mark) == (2, 1, "")


def test_a_suite_of_times_only_gets_a_table_of_times():
    run = Results().add("protonet", 0.95).add("maml", 0.9)
    run.time("protonet", "adapt_time", 0.002).time("maml", "adapt_time", 0.1)
    timed = [r for r in run.rows if r["measure"] == "adapt_time"]
    made = only(RunData.of(timed))
    assert (made.measure, row(made, "maml").adapt_time.value) == ("", 0.1)
    for format in FORMATS:
        assert "100 ms" in render(RunData.of(timed), format) or format in ("json", "csv")


def test_failed_rows_are_shown_with_their_reason_in_full():
    reason = "the worker ran out of memory while it adapted task 12 of 16 at 20 ways; use fewer tasks per call"
    data = Results().add("protonet", 0.95).add("metanet", "timeout", reason=reason).data()
    text = render(data, "table")
    assert re.search(r"^metanet\s+timeout: the worker ran out of memory.*…$", text, re.MULTILINE)
    assert render(data, "table", width=140).count(reason) == 1
    assert reason in " ".join(text.split())
    for format in ("md", "latex", "json"):
        assert reason in render(data, format)


def test_only_failed_rows_still_make_a_table():
    data = Results().add("protonet", "failed").add("maml", "skipped").data()
    made = only(data)
    assert (made.reference, made.visible) == (None, None)
    for format in FORMATS:
        text = render(data, format)
        assert "maml has a reason" in text and "protonet has a reason" in text


@pytest.mark.parametrize("format", FORMATS)
def test_no_results_at_all(format):
    text = render(RunData.of([]), format)
    assert text.endswith("\n")
    expected = {
        "csv": ",".join(RESULT_COLUMNS) + "\n",
        "json": '{\n "schema_version": 1,\n "tables": [],\n "kernels": {\n  "tables": [],\n  "footer": []\n }\n}\n',
    }
    assert text == expected.get(format, text)
    assert format in expected or "No results" in text


def test_missing_columns_and_unknown_formats_are_named():
    with pytest.raises(StoreError, match="no column 'measure', 'status'"):
        RunData.of([{"cell": "a", "algorithm": "b", "dataset": "c", "value": 1.0}])
    with pytest.raises(ConfigError, match="did you mean 'latex'"):
        render(small(), "latx")


# how the formats say it


def test_table_golden():
    assert render(small(), "table") == TABLE


def test_wide_table_golden():
    assert render(small(), "table", width=140).splitlines()[:8] == WIDE.splitlines()


def test_markdown_golden():
    assert render(small(), "md") == MARKDOWN


def test_latex_golden():
    assert render(small(), "latex") == LATEX


def test_json_carries_the_whole_structure():
    data = small()
    content = json.loads(render(data, "json"))
    first = content["tables"][0]
    assert content["schema_version"] == 1
    assert first["protocol"]["split"] == "vinyals (test)"
    shown = {r["method"]: r for r in first["blocks"][0]["rows"]}
    assert shown["protonet"]["quality"]["value"] == row(only(data), "protonet").quality.value
    assert shown["metanet"]["quality"] is None


def test_results_csv_has_its_columns_and_reads_back():
    run = (
        Results()
        .add("protonet", 0.95, classes=True)
        .add("maml", "failed", reason='said "no", then\nstopped', ways=None)
    )
    text = render(run.data(), "csv")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert tuple(lines[0]) == RESULT_COLUMNS
    assert [line["ways"] for line in lines] == ["5"] * 3 + [""] * 3
    assert (lines[0]["seed"], lines[0]["n"], lines[5]["n"]) == ("0", "40", "")
    assert lines[3]["reason"] == 'said "no", then\nstopped'
    assert float(lines[0]["value"]) == run.rows[0]["value"]
    again = RunData.of(pd.read_csv(io.StringIO(text)), run.episodes, run.classes)
    assert render(again, "csv") == text
    assert render(again, "table") == render(run.data(), "table")


def test_episodes_csv():
    lines = episodes_csv(Results().add("protonet", 0.95, seeds=(0,)).data().episodes).splitlines()
    assert lines[0] == ",".join(EPISODE_COLUMNS)
    assert len(lines) == EPISODES + 1
    assert lines[2].split(",")[-3:-1] == ["1", "h1"]


@pytest.mark.parametrize("width", [80, 100, 140, 200])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_table_keeps_to_its_width(width, seeds):
    run = Results()
    for i, name in enumerate(["protonet", "matching", "a-plug-in-with-quite-a-long-name", "baseline++"]):
        run.add(name, 0.9 - i / 10, seeds=seeds, classes=True)
        run.time(name, "adapt_time", 0.0123).time(name, "train_time", 5400)
    run.add("maml", 0.3, seeds=seeds, params='{"inner_steps": 10}').add("maml", "failed", params='{"inner_steps": 5}')
    lines = render(run.data(), "table", width=width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert any(len(line) > 70 for line in lines)


def test_the_terminal_gets_no_colour_where_none_is_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    piped, terminal = io.StringIO(), io.StringIO()
    table.show(tables(small()), KernelReport(), Console(file=piped, width=80, force_terminal=False))
    assert [line.rstrip() for line in piped.getvalue().splitlines()] == TABLE.splitlines()
    table.show(tables(small()), KernelReport(), Console(file=terminal, width=80, force_terminal=True))
    assert "\x1b[" in terminal.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.getvalue())


AWKWARD = st.text(st.sampled_from("ab|_&%<>$#{}~^\\*[]` "), min_size=1, max_size=12).map(lambda s: "x" + s.strip())


@given(AWKWARD)
@settings(max_examples=25, deadline=None)
def test_markdown_escapes_names(name):
    text = render(Results().add(name, 0.9, seeds=(0,)).data(), "md")
    line = next(line for line in text.splitlines() if line.startswith("| x"))
    cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
    head = next(line for line in text.splitlines() if line.startswith("| method"))
    assert len(cells) == len(re.split(r"(?<!\\)\|", head))
    plain = re.sub(r"\\(.)", r"\1", markdown.escape(name)).replace("&lt;", "<")
    assert plain == name


@given(AWKWARD)
@settings(max_examples=25, deadline=None)
def test_latex_escapes_names(name):
    text = latex.escape(name)
    for command in latex.SPECIAL.values():
        text = text.replace(command, "")
    assert not re.search(r"[\\&%$#_{}~^<>|\[]", text)
    lines = render(Results().add(name, 0.9, seeds=(0,)).data(), "latex").splitlines()
    line = next(line for line in lines if line.startswith(latex.escape(name)))
    assert len(re.findall(r"(?<!\\)&", line)) == len(re.findall(r"(?<!\\)&", lines[lines.index(r"\toprule") + 1]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00000123, "1.23 us"), (0.0123, "12.3 ms"), (0.85, "850 ms"), (1.5, "1.50 s"), (119.0, "119 s"),
        (540, "9.00 min"), (7300, "2.03 h"), (0.00085, "850 us"), (0, "0.00 us"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert wording.duration(seconds) == text
    assert wording.duration(None) == ""


TABLE = """\
omniglot 5-way 1-shot
queries 15 · split vinyals (test) · test episodes 40 · seeds 3 · rotations none
· norm running; support: maml · selection val · training 5w1s15q*3000 · device
cpu float32 · tasks per call 1
                  accuracy  ± over   ± by    difference  paper    adapt    train
method                   %   seeds  class   to protonet      %    /task     time
────────────────────────────────────────────────────────────────────────────────
inductive
protonet            95.27*    0.68   4.30     reference   98.8  1.23 ms  9.0 min
maml                90.72     0.48          -4.55 ±0.55  98.7~
 inner_steps=10
maml                89.72     0.48          -5.55 ±0.55  98.7~
 inner_steps=5
metanet           failed: metanet has a reason
transductive
maml                92.72     0.48                       98.7~
controls
chance              20.06     0.46         -75.21 ±0.50
────────────────────────────────────────────────────────────────────────────────
Inductive: best is protonet; its paired difference to every other ranked row
excludes 0.
Smallest visible difference to protonet (80 % power): 0.68 points.
~ Published under another protocol. maml: random split, transductive, 1 query.

Intervals are at 95 %: over seeds, with the shared test episodes as second
source of variance.
A row with one seed has its interval over test episodes alone.
By class: queries clustered by their class; the distractors they met are not
counted.
Differences are paired on the same episodes, each at 95 %, not corrected for
their number.
* best, supported by every paired difference.
Published numbers come from the papers' own, longer trainings; ~ marks a known
difference of protocol.
"""

WIDE = """\
omniglot 5-way 1-shot
queries 15 · split vinyals (test) · test episodes 40 · seeds 3 · rotations none · norm running; support: maml · selection val · training
5w1s15q*3000 · device cpu float32 · tasks per call 1
                     accuracy       95 % over         95 % by               difference  paper    adapt    train  training
method                      %           seeds           class              to protonet      %    /task     time     steps  seeds
────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
inductive
protonet               95.27*  [94.59, 95.95]  [90.70, 99.30]                reference   98.8  1.23 ms  9.0 min      3000      3
"""

MARKDOWN = """\
### omniglot 5-way 1-shot

queries 15 · split vinyals (test) · test episodes 40 · seeds 3 · rotations none · norm running; support: maml · selection val · training 5w1s15q\\*3000 · device cpu float32 · tasks per call 1

| method | accuracy % | 95 % over seeds | 95 % by class | difference to protonet | published | adaptation per task | training | steps | seeds |
| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
| *inductive* |  |  |  |  |  |  |  |  |  |
| protonet | **95.27** \\* | [94.59, 95.95] | [90.70, 99.30] | reference | 98.8 [1] | 1.23 ms | 9.0 min | 3000 | 3 |
| maml inner\\_steps=10 | 90.72 | [90.24, 91.20] |  | -4.55 [-5.10, -4.00] | 98.7\\~ [2] |  |  | 3000 | 3 |
| maml inner\\_steps=5 | 89.72 | [89.24, 90.20] |  | -5.55 [-6.10, -5.00] | 98.7\\~ [2] |  |  | 3000 | 3 |
| metanet | failed |  |  |  |  |  |  |  |  |
| *transductive* |  |  |  |  |  |  |  |  |  |
| maml | 92.72 | [92.24, 93.20] |  |  | 98.7\\~ [3] |  |  | 3000 | 3 |
| *controls* |  |  |  |  |  |  |  |  |  |
| chance | 20.06 | [19.60, 20.51] |  | -75.21 [-75.71, -74.71] |  |  |  |  | 1 |

- Inductive: best is protonet; its paired difference to every other ranked row excludes 0.
- Smallest visible difference to protonet (80 % power): 0.68 points.
- metanet failed: metanet has a reason
- [1] protonet as published in Prototypical Networks for Few-shot Learning, 2017, Table 1; vinyals split; 60-way training; squared Euclidean; 1000 test episodes
- [2] maml as published in Model-Agnostic Meta-Learning, 2017, Table 1; random split; transductive BN; 600 tasks; unlike this table: random split, transductive, 1 query
- [3] maml as published in Model-Agnostic Meta-Learning, 2017, Table 1; random split; transductive BN; 600 tasks; unlike this table: random split, 1 query

Intervals are at 95 %: over seeds, with the shared test episodes as second source of variance. A row with one seed has its interval over test episodes alone. By class: queries clustered by their class; the distractors they met are not counted. Differences are paired on the same episodes, each at 95 %, not corrected for their number. \\* best, supported by every paired difference. Published numbers come from the papers' own, longer trainings; \\~ marks a known difference of protocol.
"""

LATEX = """\
\\begin{table}
\\centering
\\begin{threeparttable}
\\caption{omniglot 5-way 1-shot: queries 15, split vinyals (test), test episodes 40, seeds 3, rotations none, norm running; support: maml, selection val, training 5w1s15q*3000, device cpu float32, tasks per call 1.}
\\begin{tabular}{lrrrrrr}
\\toprule
method & accuracy (\\%) & by class & difference to protonet & published & adapt & train \\\\
\\midrule
\\multicolumn{7}{l}{\\emph{inductive}} \\\\
protonet & \\textbf{95.27}\\,$\\pm$\\,0.68 & $\\pm$\\,4.30 & reference & 98.8\\tnote{1} & 1.23 ms & 9.0 min \\\\
maml inner\\_steps=10 & 90.72\\,$\\pm$\\,0.48 &  & $-4.55$\\,$\\pm$\\,0.55 & 98.7\\textasciitilde{}\\tnote{2} &  &  \\\\
maml inner\\_steps=5 & 89.72\\,$\\pm$\\,0.48 &  & $-5.55$\\,$\\pm$\\,0.55 & 98.7\\textasciitilde{}\\tnote{2} &  &  \\\\
metanet & failed &  &  &  &  &  \\\\
\\midrule
\\multicolumn{7}{l}{\\emph{transductive}} \\\\
maml & 92.72\\,$\\pm$\\,0.48 &  &  & 98.7\\textasciitilde{}\\tnote{3} &  &  \\\\
\\midrule
\\multicolumn{7}{l}{\\emph{controls}} \\\\
chance & 20.06\\,$\\pm$\\,0.46 &  & $-75.21$\\,$\\pm$\\,0.50 &  &  &  \\\\
\\bottomrule
\\end{tabular}
\\begin{tablenotes}\\footnotesize
\\item[1] protonet as published in Prototypical Networks for Few-shot Learning, 2017, Table 1; vinyals split; 60-way training; squared Euclidean; 1000 test episodes
\\item[2] maml as published in Model-Agnostic Meta-Learning, 2017, Table 1; random split; transductive BN; 600 tasks; unlike this table: random split, transductive, 1 query
\\item[3] maml as published in Model-Agnostic Meta-Learning, 2017, Table 1; random split; transductive BN; 600 tasks; unlike this table: random split, 1 query
\\item Inductive: best is protonet; its paired difference to every other ranked row excludes 0.
\\item Smallest visible difference to protonet (80 \\% power): 0.68 points.
\\item Intervals are at 95 \\%: over seeds, with the shared test episodes as second source of variance.
\\item A row with one seed has its interval over test episodes alone.
\\item By class: queries clustered by their class; the distractors they met are not counted.
\\item Differences are paired on the same episodes, each at 95 \\%, not corrected for their number.
\\item Bold: best, supported by every paired difference.
\\item Published numbers come from the papers' own, longer trainings; \\textasciitilde{} marks a known difference of protocol.
\\item metanet failed: metanet has a reason.
\\end{tablenotes}
\\end{threeparttable}
\\end{table}
"""
