"""The store: what a kill, a full disk or a damaged file can do to a run, and what they cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench import store
from metabench.errors import StoreError
from metabench.plan import Row, is_done
from metabench.store import NOT_HERE, Measurement, Run


def manifest(cells=("a", "b"), digest="h1"):
    return {
        "suite": "s",
        "controls": [],
        "cells": {c: {"cell": c, "algorithm": c.upper(), "seed": 0} for c in cells},
        "rows": [{"cell": c, "measure": "accuracy", "hash": digest} for c in cells],
    }


def measured(cell, value, *, status="ok", digest="h1", **more):
    return Measurement(cell=cell, measure="accuracy", status=status, value=value, n=2, hash=digest, **more)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path, "s", manifest())


def filled(folder, values):
    run = Run.create(folder, "s", manifest([f"c{n}" for n in range(len(values))]))
    with run.writing():
        for n, value in enumerate(values):
            run.append(measured(f"c{n}", value), {"scores": [value, value]})
    return run


def test_what_is_appended_is_read_back(run):
    with run.writing():
        first = run.append(measured("a", 0.5), {"scores": [0.25, 0.75]})
        second = run.append(measured("b", None, status="failed", reason="ü 🙂"))
    again = Run.open(run.path)
    assert again.measurements() == {first.key: first, second.key: second}
    assert again.samples(first)["scores"] == [0.25, 0.75]
    assert again.samples(second) == {}


def test_the_last_line_of_a_key_wins_and_only_its_own_hash_is_current(run):
    with run.writing():
        run.append(measured("a", 0.1))
        run.append(measured("a", 0.2))
        run.append(measured("b", 0.3, digest="older"))
    assert {key[0]: m.value for key, m in run.current().items()} == {"a": 0.2}
    assert [row["value"] for row in run.rows()] == [0.2]
    assert set(run.rows()[0]) == set(store.COLUMNS)


def test_a_row_that_this_machine_cannot_measure_is_shown_and_stays_pending(run):
    with run.writing():
        run.append(measured("a", None, status="skipped", reason="no CUDA", digest=NOT_HERE))
    assert [row["reason"] for row in run.rows()] == ["no CUDA"]
    assert not is_done(row("h1"), run.measurements())


@pytest.mark.parametrize(
    ("status", "digest", "expected"),
    [
        ("ok", "h1", False),
        ("skipped", "h1", False),
        ("failed", "h1", True),
        ("diverged", "h1", True),
        ("timeout", "h1", True),
        ("ok", "h2", True),
    ],
)
def test_only_ok_and_skipped_of_the_same_hash_are_final(status, digest, expected):
    done = {("a", "accuracy"): measured("a", 0.1, status=status, digest=digest)}
    assert is_done(row("h1"), done) is not expected


def test_what_was_never_measured_is_pending():
    assert not is_done(row("h1"), {})


def row(digest):
    """The row ("a", accuracy) of a plan."""
    return Row(SimpleNamespace(id="a"), "accuracy", digest, "code")


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    cut=st.floats(0, 1),
    file=st.sampled_from(["measurements.jsonl", "samples.jsonl"]),
)
def test_a_cut_at_any_byte_loses_only_what_it_cut_and_invents_nothing(values, cut, file):
    folder = Path(tempfile.mkdtemp())
    try:
        run = filled(folder, values)
        path = run.path / file
        data = path.read_bytes()
        end = round(cut * len(data))
        os.truncate(path, end)
        whole = data[:end].count(b"\n")
        check(Run.open(run.path), values, whole)
        with Run.open(run.path).writing():
            run.append(measured("c0", 0.125, digest="h2"), {"scores": [0.125, 0.125]})
        after = Run.open(run.path)
        found = after.measurements()
        assert after.samples(found["c0", "accuracy"])["scores"] == [0.125, 0.125]
        check(after, [0.125, *values[1:]], max(whole, 1))
    finally:
        shutil.rmtree(folder)


def check(run, values, whole):
    """The first `whole` rows are there, and whatever is there is right, samples and all."""
    found = run.measurements()
    assert {f"c{n}" for n in range(whole)} == {cell for cell, _ in found}
    for measurement in found.values():
        right = values[int(measurement.cell[1:])]
        assert measurement.value == right
        assert run.samples(measurement)["scores"] == [right, right]
        assert run.samples(measurement)["cell"] == measurement.cell


def test_a_pointer_into_somebody_elses_samples_is_no_measurement(tmp_path):
    run = filled(tmp_path, [0.1, 0.2])
    last = run.measurements()["c1", "accuracy"]
    lines = (run.path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "samples.jsonl").write_bytes(lines[0] + lines[0])
    assert set(run.measurements()) == {("c0", "accuracy")}
    (run.path / "samples.jsonl").unlink()
    assert run.measurements() == {}
    with pytest.raises(StoreError, match="samples"):
        run.samples(last)


@pytest.mark.parametrize("line", ["{", "[]", "5", '{"cell": "a"}', '{"surprise": 1}', "\x00\x00", '"\\ud800"'])
def test_a_damaged_line_is_named(run, line):
    with run.writing():
        run.append(measured("a", 0.1))
    with (run.path / "measurements.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=r"measurements\.jsonl:2"):
        run.measurements()


def test_a_full_disk_leaves_whole_lines_and_says_so(run, monkeypatch):
    with run.writing():
        run.append(measured("a", 0.5), {"scores": [0.5]})
        before = {f.name: f.read_bytes() for f in run.path.glob("*.jsonl")}

        def full(handle, data):
            handle.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(store, "_write_all", full)
        with pytest.raises(StoreError, match="No space left"):
            run.append(measured("b", 0.5), {"scores": [0.5]})
    assert {f.name: f.read_bytes() for f in run.path.glob("*.jsonl")} == before


def test_a_derived_file_is_whole_or_absent(run, monkeypatch):
    run.write("results.csv", "old")

    def full(path, *arguments, **options):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left"):
        run.write("results.csv", "new")
    assert (run.path / "results.csv").read_bytes() == b"old"
    assert not list(run.path.glob(".results*"))


def test_names_that_are_no_unicode_are_kept_as_escapes(run):
    odd = os.fsdecode(b"caf\xe9")
    run.manifest["argv"] = [odd]
    run.save_manifest()
    with run.writing():
        run.append(measured("a", 0.1, reason=odd))
    assert Run.open(run.path).measurements()["a", "accuracy"].reason == odd
    assert Run.open(run.path).manifest["argv"]


def test_two_writers_exclude_each_other(run):
    other = Run.open(run.path)
    with run.writing(), pytest.raises(StoreError, match="another metabench is writing"), other.writing():
        pass
    with Run.open(run.path).writing():
        pass


def test_latest_points_at_the_newest_and_damaged_runs_are_passed_over(tmp_path):
    first = Run.create(tmp_path, "s", manifest())
    assert (tmp_path / "s" / "latest").resolve() == first.path.resolve()
    for name, text in [("29990101T000000Z-abcdef", "{"), ("29990102T000000Z-abcdef", '{"schema_version": 99}')]:
        (tmp_path / "s" / name).mkdir()
        (tmp_path / "s" / name / "manifest.json").write_text(text)
    (tmp_path / "s" / "29990103T000000Z-abcdef").mkdir()
    found = Run.newest(tmp_path, "s")
    assert found is not None
    assert found.path == first.path.resolve()
    assert Run.newest(tmp_path, "nothing") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("7", "damaged"),
        ("{}", "damaged"),
        ("\xff", "damaged"),
        ('{"schema_version": 99}', "schema 99, this metabench reads schema 1"),
        ('{"schema_version": 1}', "lacks cells, controls, rows, suite"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(run, text, said):
    (run.path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=said):
        Run.open(run.path)


def test_a_folder_that_is_no_run_says_what_runs_look_like(tmp_path):
    with pytest.raises(StoreError, match="results/runs/SUITE/latest"):
        Run.open(tmp_path)


def test_a_place_that_cannot_hold_a_folder_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose another folder with --out"):
        Run.create(tmp_path / "file", "s", manifest())


def test_environments_gather_and_damage_is_named(run):
    run.add_environment("e1", {"cpu": "x"})
    run.add_environment("e2", {"cpu": "y"})
    run.add_environment("e1", {"load": 1})
    assert run.environments() == {"e1": {"cpu": "x", "load": 1}, "e2": {"cpu": "y"}}
    (run.path / "environment.json").write_text("{")
    with pytest.raises(StoreError, match=r"environment\.json"):
        run.environments()


def test_numbers_that_json_has_not_are_refused(run):
    with run.writing(), pytest.raises(ValueError, match="JSON"):
        run.append(replace(measured("a", 0.5), value=float("nan")))
    assert json.loads((run.path / "manifest.json").read_text())["schema_version"] == 1
    assert run.measurements() == {}


# what is on the disk, read

SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def outcome(read, text):
    """What reading gives: a value as text (NaN is NaN), or that it is refused."""
    try:
        return repr(read(text))
    except ValueError:
        return "refused"


@given(SHAPES, st.booleans())
def test_json_reads_as_the_standard_library_reads_it(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "backslashreplace")
    assert outcome(store.parsed, text) == outcome(json.loads, text)


@pytest.mark.parametrize("text", [
    b'{"a": "\\ud800"}', b"[1,]", b'"\xff"', b"1" * 5000, b"", b"nan", b'"\x01"', b"\xef\xbb\xbf1", b"01", b"1 2",
    b"[" * 400 + b"]" * 400, b"1e400", b"-0", b'{"a": 1, "a": 2}', b"[1]\x00", b"\x00[\x001\x00]",
])  # fmt: skip
def test_what_another_reader_refuses_is_for_the_standard_library_to_judge(text):
    assert outcome(store.parsed, text) == outcome(json.loads, text)


def line_of(run, text):
    """A measurement whose samples are this line as it stands."""
    (run.path / "samples.jsonl").write_bytes(text)
    return Measurement(cell="a", measure="accuracy", status="ok", samples=0)


@pytest.mark.parametrize("line", [
    b'{"cell": "a", "scores": [0.5, 1], "episodes": ["x", "y"]}\n',
    b'{"episodes": ["x", "y"], "scores": [0.5, 1]}\n',
    b'{"scores": [0.5, 1], "episodes": ["x", "y"], "curve": [1]}\n',
    b'{"scores": [9], "episodes": ["z"], "episodes": ["x", "y"], "scores": [0.5, 1]}\n',
    b'{"cell": "a\\", \\"episodes\\": [\\"z\\"]}", "scores": [0.5, 1], "episodes": ["x", "y"]}\n',
])  # fmt: skip
def test_scores_are_found_wherever_the_line_has_them(run, line):
    assert run.scored(line_of(run, line)) == ([0.5, 1], ("x", "y"))


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"scores": [1]}\n', b'{"episodes": ["x"]}\n', b'{"scores": 1, "episodes": ["x"]}\n']
)
def test_a_line_without_scores_or_episodes_has_none(run, line):
    assert run.scored(line_of(run, line)) is None


@pytest.mark.parametrize("line", [
    b'{"scores": [1], "episodes": [{"x": 1}]}\n',
    b'{"scores": [1], "episodes": "x"}\n', b'{"scores": [1], "episodes": [\n',
    b'[1, "episodes": ["x"]}\n',
])  # fmt: skip
def test_episodes_that_are_no_texts_are_damage(run, line):
    with pytest.raises(StoreError, match="samples of a accuracy are damaged"):
        run.scored(line_of(run, line))


def test_rows_on_the_same_episodes_share_one_list(run):
    with run.writing():
        rows = [run.append(measured(cell, 1.0), {"scores": [1.0], "episodes": ["x"]}) for cell in "ab"]
    first, second = (run.scored(row)[1] for row in rows)
    assert first is second
