"""Run folders into reports: several runs together, and what belongs to which."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from metabench.errors import StoreError
from metabench.report import tables
from metabench.report.load import load
from metabench.scoring import Credit
from metabench.store import Measurement, Run


def made(out, scores, *, cell="protonet/glyphs[alphabets]/5w1s15q/running/cpu-float32/seed0", status="ok", **where):
    """A run of one accuracy row with these episode scores."""
    coordinates = {
        "cell": cell, "algorithm": "protonet", "params": "{}", "dataset": "glyphs", "split": "alphabets", "ways": 5,
        "shots": 1, "queries": 15, "bn_mode": "inductive", "device": "cpu", "precision": "float32", "seed": 0,
        "rotations": "none", "norm": "running", "selection": "last", "train_spec": "5w1s1q*1", **where,
    }  # fmt: skip
    rows = [{"cell": cell, "measure": "accuracy", "hash": "h"}]
    run = Run.create(out, "s", {"suite": "s", "controls": [], "cells": {cell: coordinates}, "rows": rows})
    samples = {"scores": list(scores), "episodes": [f"e{i}" for i in range(len(scores))]} if status == "ok" else None
    value = float(np.mean(scores)) if status == "ok" else None
    facts = {"predictions": credit(run, len(scores))} if status == "ok" else {}
    with run.writing():
        row = Measurement(cell, "accuracy", status, "why", "fraction", len(scores), value, hash="h", facts=facts)
        run.append(row, samples)
    return run.path


def credit(run, episodes):
    """Two queries an episode, of classes 300 and 7: the first right, the second wrong, of three tied maxima once."""
    ties = np.tile([1, 0], (episodes, 1)).astype(np.uint16)
    ties[0, 1] = 3
    labels = np.tile([0, 1], (episodes, 1)).astype(np.uint16)
    classes = np.tile([300, 7], (episodes, 1)).astype(np.int32)
    return Credit(labels, ties, labels, classes).save(run.path / "predictions", "p")


def test_of_rows_that_runs_share_the_last_one_brings_its_own_episodes(tmp_path):
    first, second = made(tmp_path, [0.9] * 10), made(tmp_path, [0.5] * 4)
    data = load([first, second])
    assert data.rows["value"].tolist() == [0.5]
    assert data.episodes["score"].tolist() == [0.5] * 4  # and none of the first run's ten
    (table,) = tables(data)
    assert table.blocks[0].rows[0].quality.value == 0.5


def test_a_failure_never_hides_an_earlier_result(tmp_path):
    good, bad = made(tmp_path, [0.9] * 10), made(tmp_path, [0.9] * 10, status="failed")
    assert load([good, bad]).rows["status"].tolist() == ["ok"]
    assert load([bad, good]).rows["status"].tolist() == ["ok"]


def test_the_steps_of_a_stream_that_are_not_asked_about_do_not_count(tmp_path, monkeypatch):
    """Two streams: all of three classes are asked about, right but for one; of the other one alone, wrong."""

    def answered(run, episodes):
        labels = np.array([[0, 1, 2, 0, 1], [1, 1, 2, 0, 0]], dtype=np.uint16)
        ties = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], dtype=np.uint16)
        classes = np.array([[5, 6, 7], [5, 6, 8]], dtype=np.int32)
        asked = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=bool)
        return Credit(labels, ties, labels, classes).only(asked).save(run.path / "predictions", "p")

    monkeypatch.setattr("test_load.credit", answered)
    by_class = load([made(tmp_path, [2 / 3, 0.0])]).by_class.set_index("class")
    # 4 queries, 2 a stream: those of the first weigh 2/3 each, that of the second 2, so that streams count alike
    assert by_class["queries"].to_dict() == pytest.approx({5: 2 / 3, 6: 2 / 3 + 2, 7: 2 / 3})
    assert by_class["credit"].to_dict() == pytest.approx({5: 2 / 3, 6: 2 / 3, 7: 0.0})
    assert by_class["credit"].sum() / by_class["queries"].sum() == pytest.approx((2 / 3 + 0) / 2)


def test_parameters_of_the_data_set_make_tables_of_their_own(tmp_path):
    small = made(tmp_path, [0.9] * 10)
    large = made(tmp_path, [0.5] * 10, cell="protonet/glyphs[alphabets,size=105]/5w1s15q/running/cpu-float32/seed0")
    found = tables(load([small, large]))
    assert [t.blocks[0].rows[0].seeds for t in found] == [1, 1]
    assert ("data", "size=105") in found[1].protocol and "data" not in dict(found[0].protocol)


def test_another_selection_is_another_row(tmp_path):
    last = made(tmp_path, [0.9] * 10)
    other = "protonet/glyphs[alphabets]/5w1s15q/running/cpu-float32/seed1"
    best = made(tmp_path, [0.5] * 10, cell=other, selection="val", seed=1)
    (table,) = tables(load([last, best]))
    assert {row.method for row in table.rows} == {"protonet selection=last", "protonet selection=val"}


def test_credit_per_class_is_read_from_the_predictions(tmp_path):
    by_class = load([made(tmp_path, [0.5] * 10)]).by_class.set_index("class")
    assert by_class["queries"].to_dict() == {7: 10, 300: 10}
    assert by_class["credit"].to_dict() == pytest.approx({7: 1 / 3, 300: 10})


def damaged(path, **parts):
    file = path / "predictions" / "p.npz"
    with np.load(file) as kept:
        whole = dict(kept)
    np.savez_compressed(file, **{**whole, **parts})
    return file


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"labels": np.zeros((10, 2))}, "labels is no table of whole numbers"),
        ({"labels": np.zeros(20, dtype=np.uint8)}, "labels is no table of whole numbers"),
        ({"classes": np.zeros((10, 0), dtype=np.int32)}, "classes is no table of whole numbers"),
        ({"classes": np.full((10, 2), -1)}, "classes holds a number out of range"),
        ({"ties": np.full((10, 2), 2**64 - 1, dtype=np.uint64)}, "ties holds a number out of range"),
        ({"ties": np.zeros((10, 3), dtype=np.uint8)}, "not of one shape"),
        ({"classes": np.zeros((9, 2), dtype=np.int32)}, "not of one shape"),
        ({"labels": np.array([{}])}, "pickle"),
        ({"classes": np.full((10, 2), 2**40)}, "a class number is out of range"),
    ],
)
def test_predictions_that_no_run_writes_are_damaged_and_the_message_says_how_to_go_on(tmp_path, parts, said):
    path = made(tmp_path, [0.5] * 10)
    file = damaged(path, **parts)
    with pytest.raises(StoreError) as raised:
        load([path])
    assert str(raised.value).startswith(f"{file}: damaged (") and said in str(raised.value)
    assert str(raised.value).endswith("; delete it to go on without intervals by class")


def test_predictions_packed_in_a_way_that_no_run_uses_are_damaged(tmp_path):
    path = made(tmp_path, [0.5] * 10)
    file = path / "predictions" / "p.npz"
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(StoreError, match="packed in a way that no run uses"):
        load([path])
