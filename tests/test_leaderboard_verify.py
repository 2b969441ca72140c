"""Verifying and packing: whatever is edited is named, and nothing of a submission is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from conftest import metabench
from leaderboard_runs import cell_of, edited, rewritten, row, run_of, trials

from metabench.disk import MAX_UNPACKED
from metabench.errors import ConfigError, MetabenchError, NothingRan, StoreError
from metabench.leaderboard import leaderboard, pack, verify
from metabench.leaderboard.collect import collect
from metabench.leaderboard.source import source_of
from metabench.report import csvfile
from metabench.report.load import load
from metabench.store import Run

DATA, EPISODES = "glyphs[alphabets]", 12


@pytest.fixture(scope="module")
def truth():
    """The real test episodes of 5-way 1-shot tasks on glyphs: their ids, and those of other subsets."""
    from dataclasses import replace

    from metabench.datasets import glyphs

    data = glyphs.build(split="alphabets")
    swapped = replace(data, subsets={"test": data.subsets["train"]})
    found = {}
    for name, one in (("test", data), ("train", swapped)):
        tasks = one.tasks("test", ways=5, shots=1, queries=3, rotations="none", seed=0, device="cpu")
        found[name] = tasks.episodes(0, EPISODES)
        assert len(found[name].ids) == EPISODES
    return found


def answered(folder, episode, scores, name):
    """Predictions that give these scores (multiples of 1/15), of the true labels and classes."""
    labels = episode.query.y.numpy().astype(np.uint16)
    right = np.round(np.asarray(scores) * labels.shape[1]).astype(int)
    ties = (np.arange(labels.shape[1])[None] < right[:, None]).astype(np.uint16)
    predicted = np.where(ties == 1, labels, (labels + 1) % 5).astype(np.uint16)
    folder.mkdir(exist_ok=True)
    classes = episode.classes.astype(np.int32)
    np.savez_compressed(folder / name, predicted=predicted, ties=ties, labels=labels, classes=classes)
    return name


@pytest.fixture
def run(tmp_path, truth):
    return submission(tmp_path, truth["test"])


def submission(out, episode, *, rng=None):
    rng = rng or np.random.default_rng(0)
    rows = []
    names = iter(f"{n:016x}.npz" for n in range(100))
    for algorithm, mean in (("protonet", 0.8), ("maml", 0.6)):
        table = np.round(trials(rng, mean, episodes=EPISODES, spread=0.05) * 15) / 15
        rows += [row(algorithm, s, x, task="5w1s3q", facts={"predictions": next(names)}) for s, x in enumerate(table)]
    path = run_of(out, rows, ids=episode.ids)
    for one in rows:
        answered(path / "predictions", episode, one["scores"], one["facts"]["predictions"])
    data = load([path])
    (path / "results.csv").write_text(csvfile.results(data.rows))
    return path


def problems(path, **options):
    (audit,) = verify([path], **{"episodes": False, **options})
    return [f"{one.where}: {one.what}" for one in audit.problems]


def test_an_honest_run_adds_up_episodes_and_all(run):
    (audit,) = verify([run])
    assert audit.problems == ()
    counts = dict(audit.checked)
    assert counts["test episodes"] == counts["scores"] == 6 * EPISODES
    assert counts["predictions"] == 6 * EPISODES * 15 and counts["lines of results.csv"] == 6
    assert audit.unchecked == ()


def test_episodes_of_the_training_classes_are_found_out(tmp_path, truth):
    path = submission(tmp_path, truth["train"])
    assert problems(path) == []  # it is consistent in itself
    found = problems(path, episodes=True)
    assert len(found) == 6
    assert all("they are those of the train classes" in text for text in found)


@pytest.mark.parametrize("spoil", ["junk", "link", "folder"])
def test_predictions_that_cannot_be_read_are_named_when_episodes_are_made_anew(run, spoil):
    file = next(iter(sorted((run / "predictions").iterdir())))
    file.unlink()
    if spoil == "junk":
        file.write_bytes(b"PK\x03\x04 junk")
    elif spoil == "link":
        file.symlink_to("/etc/hostname")
    else:
        file.mkdir()
    found = problems(run, episodes=True)
    assert any(file.name in text for text in found), found


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("measurements.jsonl", '"value": 0.', '"value": 0.9', "value is stated as"),
        ("measurements.jsonl", '"episodes_hash": "', '"episodes_hash": "f', "episodes_hash is f"),
        ("results.csv", ",fraction,12,0.", ",fraction,12,0.9", "results.csv:2: value is"),
        ("results.csv", "protonet", "protonett", "no such row in measurements.jsonl"),
        ("environment.json", "a cpu", "a fast cpu", "it was edited"),
        ("manifest.json", '"episodes": 12', '"episodes": 1000', "the manifest's protocol 1000"),
    ],
)
def test_an_edit_is_named_with_its_place(run, file, before, after, said):
    edited(run, file, before, after)
    found = problems(run)
    assert any(said in text and str(run) in text for text in found), found


def test_scores_must_follow_from_the_answers(run):
    line, rest = (run / "samples.jsonl").read_text().split("\n", 1)
    record = json.loads(line)
    record["scores"][3], record["scores"][4] = record["scores"][4], record["scores"][3]  # the mean stays
    if record["scores"][3] == record["scores"][4]:
        record["scores"].reverse()
    (run / "samples.jsonl").write_text(json.dumps(record) + "\n" + rest)
    assert any("its answers give" in text for text in problems(run))


STREAMS = """
suite: streams
evaluation: {episodes: 12}
measures: [accuracy_at_1, accuracy_at_2]
controls: false
grid:
  - tasks: [{dataset: glyphs, ways: 5, stream: 20}]
    algorithms: [{name: lstm-baseline, params: {image_size: 20}, train: {steps: 1}}]
"""


def test_streams_add_up_and_edited_ones_do_not(tmp_path):
    (tmp_path / "streams.yaml").write_text(STREAMS)
    done = metabench("run", tmp_path / "streams.yaml", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    path = (tmp_path / "runs" / "streams" / "latest").resolve()
    (audit,) = verify([path])
    assert audit.problems == () and dict(audit.checked)["predictions"] == 2 * 12 * 20

    for file in (path / "predictions").iterdir():
        kept = dict(np.load(file))
        asked = kept["labels"] < 5
        none = {**kept, "labels": np.where(np.arange(12)[:, None] == 3, 9, kept["labels"])}
        free = {**kept, "ties": np.where(asked, kept["ties"], 1).astype(np.uint16)}
        chosen = kept["labels"].copy()
        chosen[0, np.flatnonzero(~asked[0])[0]] = chosen[0, np.flatnonzero(asked[0])[0]]
        twice = {**kept, "labels": chosen, "ties": (chosen == kept["predicted"]).astype(np.uint16)}
        for spoilt, said in ((none, "no step that counts"), (free, "an answer is credited"), (twice, "comes twice")):
            np.savez_compressed(file, **spoilt)
            assert any(said in text for text in problems(path)), said
        np.savez_compressed(file, **kept)


def test_a_damaged_or_absent_predictions_file_is_named(run):
    names = sorted((run / "predictions").iterdir())
    names[0].write_bytes(b"PK no zip")
    names[1].unlink()
    found = problems(run)
    assert any(names[0].name in text and "damaged" in text for text in found)
    assert any(names[1].name in text and "not there" in text for text in found)


def bomb(file, *, columns, unpacked):
    """Predictions of a few kilobytes: each array claims so many columns, the first holds `unpacked` MiB of zeros."""
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (EPISODES, columns)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for part in ("predicted", "ties", "labels", "classes"):
            with archive.open(f"{part}.npy", "w") as member:
                member.write(header.getvalue())
                for _ in range(unpacked if part == "predicted" else 0):
                    member.write(bytes(2**20))


def test_predictions_that_unpack_to_more_than_a_run_writes_are_not_unpacked(tmp_path, run):
    file = min((run / "predictions").iterdir())
    bomb(file, columns=MAX_UNPACKED // EPISODES, unpacked=MAX_UNPACKED // 2**20 + 1)
    assert file.stat().st_size < 2**20
    assert any(file.name in text and "it unpacks to more than" in text for text in problems(run))
    with pytest.raises(StoreError, match=r"it unpacks to more than .*; delete it to go on without"):
        leaderboard([run], tmp_path / "site")


def test_predictions_that_claim_more_than_memory_holds_are_damaged(tmp_path, run):
    file = min((run / "predictions").iterdir())
    bomb(file, columns=2**44, unpacked=0)
    assert any(file.name in text and "damaged" in text for text in problems(run))
    with pytest.raises(StoreError, match="damaged"):
        leaderboard([run], tmp_path / "site")


def test_a_half_written_line_and_lost_samples_are_named(run):
    with (run / "measurements.jsonl").open("a") as file:
        file.write('{"cell": "protonet')
    assert any("ends in half a line" in text for text in problems(run))
    whole = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(whole[: whole.rstrip(b"\n").rfind(b"\n") + 1])
    assert any("its raw samples are not in samples.jsonl" in text for text in problems(run))


def test_one_training_under_two_seeds_is_found_out(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, table[0]) for s in range(3)])
    assert sum("is no second seed" in text for text in problems(path)) == 2


def renamed_seed(run, target, before, after):
    """A copy of a run that calls one of its seeds another, in every file, and says that it was made later."""
    copied = shutil.copytree(run, target)
    for name in ("manifest.json", "measurements.jsonl", "samples.jsonl", "results.csv"):
        text = (copied / name).read_text().replace(f"seed{before}", f"seed{after}")
        text = text.replace(f'"seed": {before}', f'"seed": {after}').replace("2026-01-01T", "2026-02-01T")
        (copied / name).write_text(text)
    (copied / "results.csv").unlink()
    return copied


def test_a_seed_renamed_in_a_copied_run_is_found_out(tmp_path, run):
    copied = renamed_seed(run, tmp_path / "copied", 0, 9)
    alone = verify([copied], episodes=False)
    assert alone[0].problems == (), "by itself it adds up"
    first, second = verify([run, copied], episodes=False)
    assert first.problems == ()
    again = [one for one in second.problems if "no second seed" in one.what]
    assert len(again) == 2 and all("seed9" in one.where and f"seed0 in {run}" in one.what for one in again)
    with pytest.raises(StoreError, match="no second seed"):
        leaderboard([run, copied], tmp_path / "site")
    done = metabench("leaderboard", "verify", run, copied, "--no-episodes")
    assert done.returncode == 2 and "no second seed" in done.stderr


def test_a_training_longer_than_its_row_says_is_found_out(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, x, facts={"train_steps": 99}) for s, x in enumerate(table)])
    assert any("trained for 99 steps, its cell says 10" in text for text in problems(path))


def test_data_that_is_not_here_is_not_called_verified(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, x, data="mine[only]") for s, x in enumerate(table)])
    (audit,) = verify([path])
    assert audit.problems == () and any("not made anew" in text for text in audit.unchecked)


@pytest.mark.parametrize("wrong", [None, "x", -1, {"a": []}])
@pytest.mark.parametrize("file", ["measurements.jsonl", "samples.jsonl"])
def test_no_value_of_a_line_brings_more_than_a_message(run, file, wrong):
    lines = (run / file).read_text().splitlines()
    record = json.loads(lines[0])
    for name in record:
        changed = [json.dumps({**record, name: wrong}), *lines[1:]]
        (run / file).write_text("\n".join(changed) + "\n")
        for attempt in (lambda: problems(run), lambda: collect([source_of(Run.open(run))])):
            with contextlib.suppress(MetabenchError):
                attempt()


@pytest.mark.parametrize("wrong", [None, "x", [[]], {"a": 1}])
def test_no_value_of_a_manifest_brings_more_than_a_message(run, wrong):
    for file in ("manifest.json", "environment.json"):
        text = (run / file).read_text()
        for name in json.loads(text):
            (run / file).write_text(json.dumps({**json.loads(text), name: wrong}))
            for attempt in (lambda: problems(run), lambda: collect([source_of(Run.open(run))])):
                with contextlib.suppress(MetabenchError):
                    attempt()
        (run / file).write_text(json.dumps(wrong))
        with contextlib.suppress(MetabenchError):
            problems(run)
        (run / file).write_text(text)


def test_a_run_handed_in_twice_is_found_out(tmp_path, run):
    copied = shutil.copytree(run, tmp_path / "copy")
    first, second = verify([run, copied], episodes=False)
    assert first.problems == () and [one.what for one in second.problems] == [
        f"holds results of {run} again: a result counts once"
    ]


def test_an_unknown_schema_and_an_empty_run_are_refused(run, tmp_path):
    empty = run_of(tmp_path, [row("maml", 0, [], status="failed")])
    with pytest.raises(NothingRan):
        verify([empty], episodes=False)
    edited(run, "manifest.json", '"schema_version": 1', '"schema_version": 7')
    with pytest.raises(StoreError, match="schema 7"):
        verify([run], episodes=False)


def test_rows_of_verified_runs_say_so(tmp_path, run):
    claimed = leaderboard([run], tmp_path / "a")
    checked = leaderboard([run], tmp_path / "b", check=True)
    assert {one.trust for board in claimed.boards for one in board.standings} == {"claimed"}
    assert {one.trust for board in checked.boards for one in board.standings} == {"recomputed"}


def test_a_row_under_the_hash_of_a_skipped_one_is_neither_shown_nor_recomputed(tmp_path, run):
    """No check looks at such a row, and none may be taken for checked."""
    first, second = (cell_of("maml", seed, task="5w1s3q") for seed in (0, 1))
    perfect = {"value": 1.0, "sd": 0.0, "ci_low": 1.0, "ci_high": 1.0, "hash": "not-here"}

    def forged(m):
        facts = {"episodes_hash": m["facts"]["episodes_hash"]}
        return {**m, **perfect, "facts": facts} if m["cell"] == first else m

    rewritten(run, "measurements.jsonl", forged)
    (run / "results.csv").unlink()
    (board,) = leaderboard([run], tmp_path / "site", check=True).boards
    maml = next(one for one in board.standings if one.algorithm == "maml")
    assert maml.seeds == (1, 2) and maml.rank is None
    published = (tmp_path / "site/runs" / run.name / "results.csv").read_text()
    assert first not in published and second in published


def test_problems_of_what_is_withdrawn_stop_no_board(tmp_path, run):
    rewritten(run, "measurements.jsonl", lambda m: {**m, "value": 0.99} if m["cell"].startswith("maml") else m)
    with pytest.raises(StoreError, match=r"maml.*value is stated as"):
        leaderboard([run], tmp_path / "site", check=True)
    board = tmp_path / "board.yaml"
    board.write_text(f"withdrawals: [{{run: {run.name}, algorithm: maml, reason: a bug}}]")
    (kept,) = leaderboard([run], tmp_path / "site", check=True, board=board).boards
    assert {one.algorithm: one.trust for one in kept.standings} == {"protonet": "recomputed"}


def test_a_run_in_which_everything_failed_stops_no_board(tmp_path, run):
    empty = run_of(tmp_path, [row("anil", 0, [], status="failed", task="5w1s3q")])
    (board,) = leaderboard([run, empty], tmp_path / "site", check=True).boards
    assert {one.algorithm: one.status for one in board.standings} == {"protonet": "ok", "maml": "ok", "anil": "failed"}


def stating(**changed):
    """A change of a manifest: what it states of maml's first cell."""

    def change(manifest):
        cell = cell_of("maml", 0, task="5w1s3q", more="inner_lr=0.1")
        cells = {**manifest["cells"], cell: {**manifest["cells"][cell], **changed}}
        return {**manifest, "cells": cells}

    return change


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"params": "{}"}, "params has inner_lr as 'None', its id as '0.1'"),
        ({"params": '{"inner_lr": 0.2}'}, "params has inner_lr as '0.2', its id as '0.1'"),
        ({"params": '{"inner_lr": 0.1, "norm": "batch"}'}, "params has norm as 'batch', its id as 'running'"),
        ({"params": "["}, "params is no JSON mapping"),
        ({"selection": "val"}, "selection is 'val', the run's evaluation says 'last'"),
        ({"selection": ""}, "selection is '', the run's evaluation says 'last'"),
        ({"params": ""}, None),  # of a run that states none
        ({"params": '{"inner_lr": 0.1, "norm": "running", "inner_steps": 5}'}, None),
    ],
)
def test_what_the_manifest_states_beside_an_id_is_held_against_it(tmp_path, changed, said):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, x, task="5w1s3q", more="inner_lr=0.1") for s, x in enumerate(table)])
    assert problems(path) == []
    rewritten(path, "manifest.json", stating(**changed))
    found = problems(path)
    assert [said in text and "manifest.json: cell maml" in text for text in found] == ([True] if said else [])


def test_ids_that_state_the_same_parameters_are_not_one_method(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, x, more="inner_lr=0.1" if s else "") for s, x in enumerate(table)])
    same = {"params": '{"inner_lr": 0.1}'}
    rewritten(path, "manifest.json", lambda m: {**m, "cells": {k: {**v, **same} for k, v in m["cells"].items()}})
    (board,) = leaderboard([path], tmp_path / "site").boards
    assert sorted(one.seeds for one in board.standings) == [(0,), (1, 2)]


def test_rows_whose_episodes_could_not_be_made_anew_stay_claimed(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(tmp_path, [row("maml", s, x, data="mine[only]") for s, x in enumerate(table)])
    (board,) = leaderboard([path], tmp_path / "site", check=True).boards
    assert [one.trust for one in board.standings] == ["claimed"]
    assert any("not made anew" in text for text in board.standings[0].remarks)


def without_predictions(path, algorithm):
    """The same run, the answers of an algorithm's rows not handed in and not named."""
    file = path / "measurements.jsonl"
    kept = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if record["cell"].startswith(algorithm):
            (path / "predictions" / record["facts"].pop("predictions")).unlink()
        kept.append(json.dumps(record))
    file.write_text("\n".join(kept) + "\n")
    return path


def test_scores_whose_answers_were_not_handed_in_stay_claimed_and_it_is_said(tmp_path, run):
    without_predictions(run, "maml")
    (audit,) = verify([run])
    assert audit.problems == () and {key[0].partition("[")[0] for key in audit.doubts} == {"maml"}
    built = leaderboard([run], tmp_path / "site", check=True)
    (board,) = built.boards
    assert {one.algorithm: one.trust for one in board.standings} == {"protonet": "recomputed", "maml": "claimed"}
    why = "claimed, not recomputed: what its queries were answered was not handed in"
    assert [one.remarks.count(why) for one in board.standings] == [0, 1]
    assert why in built.page.read_text() and f"maml: {why}" in built.markdown
    assert '<span class="trust claimed">claimed</span></td>' in built.page.read_text()


def test_a_board_of_verified_runs_takes_none_that_does_not_add_up(tmp_path):
    table = trials(np.random.default_rng(0), 0.7)
    path = run_of(
        tmp_path, [row("maml", s, x, data="mine[only]", facts={"train_steps": 9}) for s, x in enumerate(table)]
    )
    with pytest.raises(StoreError, match="trained for 9 steps"):
        leaderboard([path], tmp_path / "site", check=True)


def test_a_bundle_has_the_same_bytes_and_reads_like_its_run(tmp_path, run):
    one = pack(run, tmp_path / "one", submitter="Ada")
    two = pack(run, tmp_path / "two", submitter="Ada")
    assert one.read_bytes() == two.read_bytes()
    (audit,) = verify([one], episodes=False)
    assert audit.problems == ()
    built = leaderboard([one], tmp_path / "site")
    assert {s.submitter for b in built.boards for s in b.standings} == {"Ada"}


def test_nothing_that_does_not_add_up_is_packed(tmp_path, run):
    edited(run, "measurements.jsonl", '"value": 0.', '"value": 0.9')
    with pytest.raises(StoreError, match="value is stated"):
        pack(run, tmp_path, submitter="Ada")


def test_a_folder_whose_name_no_bundle_can_have_is_named(tmp_path, run):
    moved = run.rename(run.with_name("my run (copy)"))
    with pytest.raises(StoreError, match=r"letters, digits and \. _ - alone: rename 'my run \(copy\)'"):
        pack(moved, tmp_path, submitter="Ada")


def test_a_bundle_names_who_hands_it_in(tmp_path, run):
    with pytest.raises(ConfigError, match="--submitter"):
        pack(run, tmp_path, submitter=" ")


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", "run/../../evil", "run/extra.py", "other/manifest.json"])
def test_a_bundle_cannot_write_outside_or_bring_other_files(tmp_path, run, name):
    good = pack(run, tmp_path, submitter="Ada")
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(StoreError, match=r"does not belong|holds one run"):
        verify([good], episodes=False)


def test_a_bundle_whose_rows_are_larger_than_memory_should_hold_is_not_unpacked(tmp_path, run, monkeypatch):
    good = pack(run, tmp_path, submitter="Ada")
    monkeypatch.setattr("metabench.leaderboard.bundle.MAX_TEXT", 1000)
    with pytest.raises(StoreError, match="more than 1,000 bytes that is no weights"):
        verify([good], episodes=False)


def test_a_changed_member_is_found_by_its_hash(tmp_path, run):
    good = pack(run, tmp_path, submitter="Ada")
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data + b" " if member.filename.endswith("results.csv") else data)
    with pytest.raises(StoreError, match=r"results.csv is not what submission.json says"):
        verify([bad], episodes=False)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(StoreError, match="no bundle that can be read"):
        verify([tmp_path / "text.zip"], episodes=False)


def test_what_is_wrong_in_a_bundle_is_named_by_the_bundle(tmp_path, run):
    good = pack(run, tmp_path, submitter="Ada")
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        files = {name: old.read(name) for name in old.namelist()}
        rows, record = f"{run.name}/measurements.jsonl", f"{run.name}/submission.json"
        files[rows] = files[rows].replace(b'"value": 0.', b'"value": 0.9', 1)
        said = json.loads(files[record])
        said["files"]["measurements.jsonl"] = hashlib.sha256(files[rows]).hexdigest()
        files[record] = json.dumps(said).encode()
        for name, data in files.items():
            new.writestr(name, data)
    (audit,) = verify([bad], episodes=False)
    assert audit.run == f"{bad}/{run.name}"
    assert {one.where.startswith(f"{bad}/{run.name}/") for one in audit.problems} == {True}
    with pytest.raises(StoreError, match=re.escape(f"{bad}/{rows}: ")):
        leaderboard([good, bad], tmp_path / "site")


def test_the_commands(tmp_path, run):
    done = metabench("leaderboard", "verify", run, "--no-episodes")
    assert done.returncode == 0 and ": good; recomputed" in done.stdout and "not checked" in done.stdout
    packed = metabench("leaderboard", "pack", run, "--submitter", "Ada", "--out", tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert (tmp_path / f"{run.name}.zip").is_file()
    edited(run, "results.csv", ",fraction,12,0.", ",fraction,12,0.9")
    bad = metabench("leaderboard", "verify", run, "--no-episodes")
    assert bad.returncode == 2 and "does not add up" in bad.stdout and "results.csv:2" in bad.stderr
