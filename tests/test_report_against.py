import csv
import io
import json

import pytest

from metabench.errors import ConfigError
from metabench.report import RunData, render_against, tables
from metabench.report.against import comparisons

EPISODES = 50


def run(**levels):
    """A run on Omniglot 5-way 1-shot: each method's mean accuracy; every episode's is that or 0.02 away."""
    rows, episodes = [], []
    for name, level in levels.items():
        algorithm = name.replace("_", "-")
        for seed in range(2):
            cell = f"{algorithm}/omniglot[vinyals]/5w1s15q/running/cpu-float32/seed{seed}"
            shift = 0.02 if seed else -0.02
            rows.append({
                "cell": cell, "run": "r", "suite": "s", "algorithm": algorithm, "params": "{}", "dataset": "omniglot",
                "split": "vinyals", "ways": 5, "shots": 1, "queries": 15, "bn_mode": "inductive", "device": "cpu",
                "precision": "float32", "seed": seed, "measure": "accuracy", "unit": "fraction", "status": "ok",
                "n": EPISODES, "value": level + shift, "environment": "e",
            })  # fmt: skip
            episodes += [
                {
                    "cell": cell,
                    "seed": seed,
                    "measure": "accuracy",
                    "episode": e,
                    "hash": f"h{e}",
                    "score": level + shift,
                }
                for e in range(EPISODES)
            ]
    return RunData.of(rows, episodes)


def test_ours_and_theirs_stand_side_by_side():
    text = render_against(run(protonet=0.9, maml=0.95, lstm_metalearner=0.5, chance=0.2), "table")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["protonet"][1] == "90.00" and lines["protonet"][3] == "98.8"  # Snell et al. 2017, Table 1
    assert lines["protonet"][4] == "-8.80"
    assert lines["maml"][3:5] == ["98.7~", "0.40"]  # Finn et al. 2017: transductive, random split
    assert lines["lstm-metalearner"][3] == "–"  # the paper has no Omniglot numbers: shown, with nothing beside it
    assert "chance" not in lines  # a control that nobody published
    assert "unlike this table: random split, transductive, 1 query" in " ".join(text.split())


def test_the_interval_of_the_difference_joins_both():
    found = {one.row.algorithm: one for one in comparisons(tables(run(protonet=0.9, maml=0.95))[0])}
    ours = found["maml"].row.quality.half
    assert found["maml"].gap.half == pytest.approx((ours**2 + 0.004**2) ** 0.5)
    assert found["protonet"].gap.half == pytest.approx(found["protonet"].row.quality.half)
    assert found["maml"].agrees and found["maml"].gap.value == pytest.approx(-0.037)


def test_what_is_set_away_from_defaults_is_told():
    rows = run(protonet=0.9).rows
    rows["cell"] = rows["cell"].str.replace("protonet/", "protonet[lr=0.003,schedule=cosine,train=60w1s5q*4000]/")
    records = json.loads(render_against(RunData.of(rows), "json"))["comparisons"]
    assert [one["settings"] for one in records] == ["lr=0.003 schedule=cosine"]


def test_records_hold_what_the_table_shows():
    data = run(protonet=0.9, lstm_metalearner=0.5)
    records = json.loads(render_against(data, "json"))["comparisons"]
    rows = list(csv.DictReader(io.StringIO(render_against(data, "csv"))))
    assert [row["method"] for row in rows] == [one["method"] for one in records] == ["protonet", "lstm-metalearner"]
    assert records[0]["published"] == 0.988 and records[0]["difference"] == pytest.approx(-0.088)
    assert records[1]["published"] is None and rows[1]["published"] == ""
    assert records[0]["split"] == "vinyals (test)" and rows[0]["block"] == "inductive"


@pytest.mark.parametrize("format", ["table", "md", "latex"])
def test_a_run_without_published_numbers_says_so(format):
    assert "Nothing here has a published number" in render_against(run(lstm_metalearner=0.5), format)


def test_every_presentation_of_a_stream_stands_beside_the_published_one():
    rows = [
        {
            "cell": f"mann/omniglot[random1200]/5w50t/none/cpu-float32/seed{seed}", "run": "r", "suite": "s",
            "algorithm": "mann", "params": "{}", "dataset": "omniglot", "split": "random1200", "ways": 5, "stream": 50,
            "bn_mode": "inductive", "device": "cpu", "precision": "float32", "seed": seed, "unit": "fraction",
            "measure": f"accuracy_at_{k}", "status": "ok", "n": EPISODES, "value": 0.1 * k,
        }
        for k in (1, 10, 2)
        for seed in range(2)
    ]  # fmt: skip
    records = json.loads(render_against(RunData.of(rows), "json"))["comparisons"]
    found = {one["measure"]: (one["value"], one["published"]) for one in records}
    assert {name: theirs for name, (_, theirs) in found.items()} == {
        "accuracy_at_1": 0.364, "accuracy_at_2": 0.828, "accuracy_at_10": 0.981,
    }  # fmt: skip
    assert found["accuracy_at_10"][0] == pytest.approx(1.0)
    assert "accuracy at presentation 2" in render_against(RunData.of(rows), "table")
    assert [table.measure for table in tables(RunData.of(rows))] == ["accuracy_at_10"]  # elsewhere one table is enough


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match=r"'tabel' \(did you mean 'table'"):
        render_against(run(protonet=0.9), "tabel")
