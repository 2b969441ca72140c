"""Margins: units, inheritance, and what a suite file may say about them."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabench import plan
from metabench.errors import ConfigError
from metabench.suite import load_suite
from metabench.thresholds import Margin, Thresholds, kind_of, parse

CELL = "maml[inner_steps=5]/glyphs[x]/5w1s15q/support/cuda-float32/seed0"


def margin(declared, measure="adapt_time", algorithm="maml", cell=CELL):
    return Thresholds.of(declared).margin(cell, algorithm, measure)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("adapt_time", Margin(0.02, 0.05)),
        ("train_time", Margin(0.02, 0.05)),
        ("accuracy", Margin(0.005, 0.005)),
        ("accuracy_at_5", Margin(0.005, 0.005)),
        ("mse", Margin(0.05, 0.05)),
        ("meta_step_memory", Margin(0.05, 0.05)),
        ("inner_step_flops", Margin(0, 0)),
        ("adapt_launches", Margin(0, 0)),
    ],
)
def test_defaults(measure, expected):
    assert margin({}, measure) == expected


def test_the_most_special_place_wins():
    declared = {
        "time": "3%",
        "measures": {"adapt_time": "4%"},
        "overrides": [
            {"algorithm": "maml", "time": "6%"},
            {"match": "cuda /5w1s", "measures": {"adapt_time": "8%"}},
            {"algorithm": "protonet", "time": "50%"},
            {"match": "nosuch", "time": "60%"},
        ],
    }
    assert margin(declared).margin == 0.08
    assert margin(declared, "predict_time").margin == 0.06
    assert margin(declared, cell=CELL.replace("cuda", "cpu")).margin == 0.06, "the kind goes before an outer measure"
    assert margin(declared, algorithm="reptile", cell="reptile/x").margin == 0.04
    assert margin(declared, "predict_time", "reptile", "reptile/x").margin == 0.03


def test_unchanged_is_never_narrower_than_the_margin():
    assert margin({"time": "10%"}) == Margin(0.1, 0.1)
    assert margin({"unchanged": "3%"}) == Margin(0.02, 0.03)


@given(st.integers(0, 10**6), st.sampled_from(["", " "]))
def test_units(hundredths, space):
    text = f"{hundredths / 100:.2f}{space}"
    assert parse(f"{text}%", "time") == pytest.approx(hundredths / 1e4)
    assert parse(f"{text}points", "accuracy") == pytest.approx(hundredths / 1e4)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("2", "time"),
        (2, "time"),
        ("0.02", "time"),
        ("2 points", "time"),
        ("-2%", "time"),
        ("1%", "accuracy"),
        ("", "mse"),
    ],
)
def test_no_unit_no_margin(text, kind):
    with pytest.raises(ConfigError, match=f"a margin of {kind} looks like"):
        parse(text, kind)


@pytest.mark.parametrize("declared", [[], {"overrides": 3}, {"overrides": ["x"]}, {"measures": 3}, {"time": 3}])
def test_a_damaged_manifest_is_one_message(declared):
    with pytest.raises(ConfigError):
        Thresholds.of(declared)


def test_kinds():
    assert [kind_of(m) for m in ("val_accuracy", "embed_time", "adapt_bytes")] == ["accuracy", "time", "counts"]


def suite(folder, text):
    file = folder / "mine.yaml"
    head = "grid: {tasks: [{dataset: glyphs, ways: 5, shots: 1, queries: 5}], algorithms: [chance]}\n"
    file.write_text(head + "controls: false\n" + textwrap.dedent(text))
    return file


def test_a_suite_declares_and_the_manifest_keeps(tmp_path):
    text = """
        thresholds:
          time: 3%
          accuracy: 1 point
          measures: {adapt_time: 4%}
          overrides:
            - {algorithm: chance, accuracy: 2 points}
    """
    found = load_suite(suite(tmp_path, text))
    kept = plan.manifest_of(found, plan.rows_of(found), None)["thresholds"]
    assert kept == {
        "time": "3%",
        "accuracy": "1 point",
        "measures": {"adapt_time": "4%"},
        "overrides": [{"algorithm": "chance", "accuracy": "2 points"}],
    }
    assert Thresholds.of(kept).margin("chance/x", "chance", "accuracy").margin == 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thresholds: {time: 2}", "thresholds.time: a margin of time looks like '2%', not 2"),
        ("thresholds: {accuracy: 1%}", "a margin of accuracy looks like '0.5 points', not '1%'"),
        ("thresholds: {tme: 2%}", "unknown key 'tme' (did you mean 'time'?)"),
        ("thresholds: {measures: {adapt_tim: 2%}}", "'adapt_tim' is no measure (did you mean 'adapt_time'?)"),
        ("thresholds: {measures: {accuracy: 2%}}", "a margin of accuracy looks like '0.5 points', not '2%'"),
        ("thresholds: {overrides: [{algoritm: maml}]}", "unknown key 'algoritm' (did you mean 'algorithm'?)"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_suite(suite(tmp_path, text))
    assert message in str(error.value)
    assert "mine.yaml:3: " in str(error.value)


def test_margins_that_are_asked_for_lie_over_everything_declared():
    declared = {"accuracy": "1 point", "measures": {"accuracy": "2 points"}, "overrides": [{"accuracy": "3 points"}]}
    found = Thresholds.of(declared).under({"accuracy": "4 points"})
    assert found.margin("c", "a", "accuracy").margin == 0.04
    assert Thresholds.of(declared).under({}).margin("c", "a", "accuracy").margin == 0.03
