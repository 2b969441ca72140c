"""What a side of a comparison refuses: every damaged, doubled or foreign result, by file and line."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from stored_runs import Stored, as_csv

from metabench.compare import compare
from metabench.errors import MetabenchError, StoreError
from metabench.sides import load


@pytest.fixture
def run(tmp_path):
    return Stored().quality([0.5, 0.25, 0.75]).count(10).time([1.0, 2.0]).at(tmp_path)


@pytest.fixture
def table(run, tmp_path):
    return as_csv(run, tmp_path / "csv")


def edit(file, *swaps):
    text = file.read_text()
    for old, new in swaps:
        assert old in text, f"{old!r} is not in {file}"
        text = text.replace(old, new, 1)
    file.write_text(text)


def refused(path):
    with pytest.raises(StoreError) as error:
        load([path])
        for row in load([path]).rows.values():
            row.scores()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_and_its_csv_hold_the_same(run, table):
    a, b = load([run]).rows, load([table]).rows
    assert list(a) == list(b)
    for key, row in a.items():
        names = ("status", "reason", "n", "value", "ci_low", "ci_high", "seed", "environment")
        assert [getattr(row, name) for name in names] == [getattr(b[key], name) for name in names]
        assert (row.scores() is None) == (b[key].scores() is None)
    quality = next(key for key in a if key[1] == "accuracy")
    assert a[quality].scores().episodes == b[quality].scores().episodes == ("h0", "h1", "h2")
    assert list(b[quality].scores().scores) == [0.5, 0.25, 0.75]
    assert b[quality].machine()["cpu"] == "Model A"


def test_a_file_of_another_schema(run, table):
    edit(run / "manifest.json", ('"schema_version": 1', '"schema_version": 7'))
    assert "a run of schema 7, this metabench reads schema 1" in refused(run)
    edit(table, ("environment", "machine"))
    assert "lacks the column environment" in refused(table)
    table.write_text("")
    assert "not a results.csv of schema 1" in refused(table)


def test_half_a_line(run, table):
    with (run / "measurements.jsonl").open("a") as file:
        file.write('{"cell": "torn')
    assert len(load([run]).rows) == 3, "a torn last line was never a row"
    edit(run / "measurements.jsonl", ('"measure": "adapt_flops"', '"measure": '))
    assert "measurements.jsonl:2: damaged line" in refused(run)
    text = table.read_text()
    table.write_text(text[: len(text) - 40])
    assert f"{table}:4: half a line" in refused(table)


def test_numbers_that_are_none(run, table, tmp_path):
    edit(run / "measurements.jsonl", ('"value": 10', '"value": NaN'))
    assert "adapt_flops: value is nan" in refused(run)
    edit(run / "measurements.jsonl", ('"value": NaN', '"value": "ten"'))
    assert "adapt_flops: value is 'ten'" in refused(run)
    edit(table, (",10.0,", ",inf,"))
    assert f"{table}:3: value is inf" in refused(table)
    edit(table, (",inf,", ",ten,"))
    assert "value is 'ten', not a number" in refused(table)
    edit(table, (",ten,", ",,"))
    assert "ok, but without a value" in refused(table)


def test_scores_that_are_none(run, table):
    edit(run / "samples.jsonl", ("0.25", "NaN"))
    assert "a score is not finite" in refused(run)
    edit(run / "samples.jsonl", ("NaN, 0.75", "0.25, 0.75, 0.5"))
    assert "3 episodes but 4 scores" in refused(run)
    edit(table.parent / "episodes.csv", ("0.25", "nan"))
    assert "episodes.csv:3: score is nan" in refused(table)


def test_a_mean_that_is_not_its_episodes_was_edited(run, table):
    edit(table, (",0.5,", ",0.6,"))
    assert "its value is 0.6, its episodes give 0.5" in refused(table)
    edit(run / "measurements.jsonl", ('"value": 0.5,', '"value": 0.6,'))
    assert "its value is 0.6, its episodes give 0.5" in refused(run)


@pytest.mark.parametrize("name", ["manifest.json", "environment.json", "measurements.jsonl"])
def test_what_is_nested_to_break_the_reader_is_damage(run, table, name):
    (run / name).write_text("[" * 100_000 + "]" * 100_000 + "\n")
    assert "nested too deeply" in refused(run)
    (table.parent / "environment.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused(table)


def test_samples_in_another_order_are_the_same(run):
    edit(
        run / "samples.jsonl",
        (
            '"scores": [0.5, 0.25, 0.75], "episodes": ["h0", "h1", "h2"]',
            '"episodes": ["h0", "h1", "h2"], "scores": [0.5, 0.25, 0.75]',
        ),
    )
    (found,) = load([run], select="accuracy").rows.values()
    assert (found.scores().episodes, found.scores().scores.tolist()) == (("h0", "h1", "h2"), [0.5, 0.25, 0.75])
    edit(run / "samples.jsonl", ('"h2"], "scores', '"h2", "scores'))
    assert "are damaged" in refused(run)


def test_doubled_cells(table):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[2]]) + "\n")
    assert f"{table}:5: maml/glyphs" in refused(table)
    assert "stands on line 3 already; keep one" in refused(table)


def test_an_unknown_status(table):
    edit(table, (",ok,", ",okay,"))
    assert "unknown status 'okay' (did you mean 'ok'?)" in refused(table)


@pytest.mark.parametrize("name", ["nosuch", "nosuch.csv"])
def test_what_is_not_there(tmp_path, name):
    assert "no such run or file" in refused(tmp_path / name)
    assert "no results here" in refused(tmp_path)


def test_what_is_no_text(tmp_path):
    file = tmp_path / "results.csv"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as CSV" in refused(file)


def test_damaged_machines(run, table):
    for folder in (run, table.parent):
        (folder / "environment.json").write_text("{")
    assert "environment.json: damaged" in refused(run)
    assert "environment.json: damaged" in refused(table)


def test_a_manifest_of_another_shape(run):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "rows": [{"measure": "accuracy"}]}))
    assert "manifest.json: damaged" in refused(run)


def test_only_rows_that_hold_the_words_are_read(run):
    assert [key[1] for key in load([run], select="maml adapt_").rows] == ["adapt_flops", "adapt_time"]


def test_a_failure_never_hides_an_earlier_result(tmp_path):
    good = Stored().count(10).at(tmp_path, "a")
    bad = Stored().row("maml/glyphs[x]/5w1s15q/support/cpu-float32/seed0", "adapt_flops", status="failed", reason="x")
    (row,) = load([good, bad.at(tmp_path, "b")]).rows.values()
    assert (row.status, row.value) == ("ok", 10)


def dated(run, at):
    """The same run, whose manifest says that it was made then."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "at": at}))
    return run


OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"


def test_the_date_in_the_manifest_says_which_run_is_the_newest(tmp_path):
    old = dated(Stored(thresholds={"time": "9%"}).count(10).at(tmp_path, "runs"), OLD)
    new = dated(Stored(thresholds={"time": "3%"}).count(12).at(tmp_path, "runs"), NEW)
    old, new = old.rename(old.with_name("z")), new.rename(new.with_name("a"))
    (old.parent / "latest").unlink()
    for paths in ([old, new], [new, old], [old.parent]):
        side = load(paths)
        assert [row.value for row in side.rows.values()] == [12]
        assert side.thresholds == {"s": {"time": "3%"}}
        (note,) = side.notes
        assert note.startswith("1 rows of ") and note.endswith(" stand in several runs: the newest finished one counts")


def test_a_csv_has_no_date_and_is_older_than_any_run(tmp_path):
    file = as_csv(Stored().count(10).at(tmp_path, "a"), tmp_path / "csv")
    run = dated(Stored().count(12).at(tmp_path, "b"), OLD)
    for paths in ([file, run], [run, file]):
        assert [row.value for row in load(paths).rows.values()] == [12]


def test_an_earlier_result_is_not_called_the_newest_where_a_later_run_failed(tmp_path):
    good = dated(Stored().count(10).at(tmp_path, "b"), OLD)
    cell = "maml/glyphs[x]/5w1s15q/support/cpu-float32/seed0"
    bad = dated(Stored().row(cell, "adapt_flops", status="failed", reason="x").at(tmp_path, "a"), NEW)
    side = load([bad, good])
    assert [(row.status, row.value) for row in side.rows.values()] == [("ok", 10)]
    assert any("1 rows" in note and "no result in a newer run: the earlier one counts" in note for note in side.notes)


def test_each_suite_of_a_side_has_its_own_thresholds(tmp_path):
    one = Stored("one", thresholds={"time": "9%"}).count(10).at(tmp_path, "a")
    two = Stored("two").count(10, "adapt_bytes").at(tmp_path, "b")
    manifest = json.loads((two / "manifest.json").read_text())
    (two / "manifest.json").write_text(json.dumps({**manifest, "thresholds": {}}))  # as every run without any has it
    assert load([one, two]).thresholds == {"one": {"time": "9%"}, "two": {}}


FIELDS = (
    "cell",
    "measure",
    "status",
    "reason",
    "unit",
    "n",
    "value",
    "ci_low",
    "hash",
    "environment",
    "facts",
    "samples",
)
ODD = (None, True, -1, 1e308, "x", "", [], [1], {}, {"a": []}, float("nan"))


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_a_field_holds_there_is_no_traceback(run, field):
    file = run / "measurements.jsonl"
    lines = file.read_text().splitlines()
    for value in ODD:
        broken = [json.dumps({**json.loads(line), field: value}) for line in lines]
        file.write_text("\n".join(broken) + "\n")
        with contextlib.suppress(MetabenchError):
            compare([run], [run])


@pytest.mark.parametrize("key", ["suite", "cells", "rows", "thresholds", "schema_version"])
def test_whatever_a_manifest_holds_there_is_no_traceback(run, key):
    manifest = json.loads((run / "manifest.json").read_text())
    cell = next(iter(manifest["cells"]))
    for value in (*ODD, [{}], [{"cell": cell}], {cell: 3}, {cell: {"seed": "x"}}):
        (run / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with contextlib.suppress(MetabenchError):
            compare([run], [run])


def test_whatever_a_machine_holds_there_is_no_traceback(run):
    for value in (*ODD, {"matmul": []}, {"matmul": ["x"]}, {"matmul": [0]}, {"matmul": 1}):
        (run / "environment.json").write_text(json.dumps({"e1": {"controls": value, "cpu": value}}))
        assert compare([run], [run]).verdicts
        (run / "environment.json").write_text(json.dumps({"e1": value}))
        assert compare([run], [run]).verdicts


def test_predictions_are_looked_for_in_their_folder_only(run):
    (row,) = load([run], select="accuracy").rows.values()
    assert replace(row, columns={"predictions": "../samples.jsonl"}).predictions() is None
