"""The runner with real worker processes: resuming, failing cells, and kills at chosen moments."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import metabench, numbers, results, started, until, write_learner, write_suite

from metabench import plan
from metabench.report.load import load
from metabench.store import Run
from metabench.suite import load_suite

STEPS = 12
SABOTAGE = {
    "raises": "raise RuntimeError('no luck' + chr(0xdcff))",
    "quits": "os._exit(7)",
    "killed": "os.kill(os.getpid(), 9)",
    "nan": "self.embedding.weight.data.mul_(float('nan'))",
    "inf": "if not torch.is_grad_enabled(): return lambda x: torch.full((*x.shape[:2], 3), float('nan'))",
}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def log(folder: Path) -> list[list[str]]:
    """(algorithm, process, step) of every training step so far."""
    file = folder / "steps.log"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


# --- failing cells ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A suite with everything that can go wrong, run; then mended, and run again."""
    folder = tmp_path_factory.mktemp("zoo")
    write_learner(folder, "learner")
    for name, sabotage in SABOTAGE.items():
        write_learner(folder, name, sabotage)
    source = write_learner(folder, "points")
    source.write_text(source.read_text().replace('["classification"]', '["regression"]'))
    suite = write_suite(folder, "zoo", ["learner", *SABOTAGE, "points"])
    run = folder / "out" / "zoo" / "latest"
    first = metabench("run", suite, "--out", folder / "out")
    broken, steps = results(run), log(folder)
    for name in SABOTAGE:
        write_learner(folder, name)
    (folder / "steps.log").unlink()
    second = metabench("run", suite, "--out", folder / "out")
    return SimpleNamespace(
        folder=folder, suite=suite, run=run, first=first, broken=broken, steps=steps, second=second,
        mended=results(run), later=log(folder), third=metabench("run", suite, "--out", folder / "out", "--plan"),
    )  # fmt: skip


def of(rows, name, measure="accuracy"):
    return [row for row in rows.values() if (row["algorithm"], row["measure"]) == (name, measure)]


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("raises", "failed", r"RuntimeError: no luck (raises.py:"),
        ("quits", "failed", "exit code 7"),
        ("killed", "failed", "killed (signal 9)"),
        ("nan", "diverged", "parameters not finite"),
        ("points", "skipped", "does regression, not classification"),
    ],
)
def test_a_failing_cell_is_a_row_with_a_reason(zoo, name, status, reason):
    rows = of(zoo.broken, name)
    assert [row["status"] for row in rows] == [status, status]
    assert all(reason in row["reason"] and row["value"] == "" for row in rows)
    assert f"{status}: {name}" in zoo.first.stderr or status == "skipped"


def test_predictions_that_are_not_finite_are_wrong_and_diverged(zoo):
    rows = of(zoo.broken, "inf")
    assert [(row["status"], float(row["value"])) for row in rows] == [("diverged", 0.0)] * 2
    assert all("were not finite" in row["reason"] for row in rows)


def test_the_suite_goes_on_and_the_exit_code_is_3(zoo):
    assert zoo.first.returncode == 3
    assert [row["status"] for row in of(zoo.broken, "learner")] == ["ok", "ok"]
    assert "learner" in zoo.first.stdout


def test_off_a_terminal_progress_is_plain_lines(zoo):
    assert "\x1b" not in zoo.first.stderr + zoo.first.stdout
    assert "\r" not in zoo.first.stderr
    assert "[1/26]" in zoo.first.stderr


def test_cells_that_share_a_training_train_once(zoo):
    assert [step for name, _, step in zoo.steps if name == "learner"] == [str(n) for n in range(STEPS)]
    trained = {row["training"] for row in of(zoo.broken, "learner")}
    assert len(trained) == 1


def test_mended_plugins_are_measured_again_and_nothing_else(zoo):
    assert zoo.second.returncode == 0
    assert {row["status"] for row in zoo.mended.values()} == {"ok", "skipped"}
    assert {name for name, _, _ in zoo.later} == set(SABOTAGE)
    lines = [json.loads(line) for line in (zoo.run / "measurements.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["cell"].startswith("learner")]) == 4  # each of its rows once
    assert "measured again" in zoo.second.stderr
    assert "note" in zoo.second.stderr
    for name in ("raises", "quits"):  # as good as the learner, whose source is the same
        assert [row["value"] for row in of(zoo.mended, name)] == [row["value"] for row in of(zoo.mended, "learner")]


def test_a_finished_suite_has_nothing_to_do(zoo):
    assert zoo.third.returncode == 0
    assert "0 to do" in zoo.third.stderr
    assert all(line.startswith("done") for line in zoo.third.stdout.splitlines())
    assert not list((zoo.run / "checkpoints").iterdir())


def test_editing_a_plugin_stales_its_own_rows_only(zoo):
    def hashes():
        plan.source_hash.cache_clear()
        return {row.key: row.hash for row in plan.rows_of(load_suite(zoo.suite))}

    before = hashes()
    file = zoo.folder / "raises.py"
    text = file.read_text()
    try:
        file.write_text(text.replace("0.5 * noise", "0.4 * noise"))
        changed = {key for key, digest in hashes().items() if before[key] != digest}
    finally:
        file.write_text(text)
    assert changed == {key for key in before if key[0].startswith("raises")}
    file.write_bytes(text.replace("\n", "\r\n").encode())
    assert hashes() == before  # line ends are no change
    file.write_text(text)


def test_the_hash_covers_protocol_and_coordinates(zoo, tmp_path):
    def hashes(more):
        (tmp_path / "learner.py").write_text((zoo.folder / "learner.py").read_text())
        return {row.hash for row in plan.rows_of(load_suite(write_suite(tmp_path, "s", ["learner"], more)))}

    base = hashes("")
    assert len(base) == 4
    assert not base & hashes("\nevaluation: {episodes: 40, seed: 1}\n")
    assert len(base & hashes("\nevaluation: {episodes: 41}\n")) == 2  # scores only: times see no test episodes
    assert not base & hashes("\ntrain: {ways: 3, shots: 1, queries: 2, steps: 13}\n")
    assert base == hashes("\ndescription: Another\n")


def test_seeds_and_filters_extend_a_run(zoo, tmp_path):
    shutil.copytree(zoo.folder / "out", tmp_path / "out", symlinks=True)
    run = tmp_path / "out" / "zoo" / "latest"
    grown = metabench("run", zoo.suite, "--out", tmp_path / "out", "--seeds", "1,2", "-k", "learner/ 3w1s3q accuracy")
    assert grown.returncode == 3  # this filter fits nothing: ids have brackets
    assert "no row" in grown.stderr
    grown = metabench("run", zoo.suite, "--out", tmp_path / "out", "--seeds", "1", "-k", "learner 3w1s3q accuracy")
    assert grown.returncode == 0, grown.stderr
    found = results(run)
    assert {row["seed"] for row in of(found, "learner")} == {"0", "1"}
    assert {key: found[key] for key in zoo.mended} == zoo.mended  # not one of the others has changed


# --- kills ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One training, interrupted by Ctrl-C, by killing the parent, by killing the worker; and one left in peace."""
    folder = tmp_path_factory.mktemp("killed")
    write_learner(folder, "learner")
    suite = write_suite(folder, "kill", ["learner"])
    metabench("run", suite, "--out", folder / "peace")
    (folder / "steps.log").unlink()
    found = SimpleNamespace(folder=folder, peace=numbers(folder / "peace/kill/latest"))
    found.interrupt = _cut(folder, suite, 3, lambda parent, worker: parent.send_signal(signal.SIGINT))
    found.kept = list((folder / "out/kill/latest/checkpoints").glob("*.pt"))
    found.parent = _cut(folder, suite, 6, lambda parent, worker: parent.send_signal(signal.SIGKILL))
    found.worker = _cut(folder, suite, 9, lambda parent, worker: os.kill(worker, signal.SIGKILL))
    found.failed = results(folder / "out/kill/latest")
    found.last = metabench("run", suite, "--out", folder / "out")
    found.final, found.log = numbers(folder / "out/kill/latest"), log(folder)
    found.rows = results(folder / "out/kill/latest")
    return found


def _cut(folder, suite, step, end):
    """Run until training step `step`, which waits; do `end`; let the step go; wait for both processes' end."""
    hold = folder / "hold"
    hold.write_text(str(step))
    with started("run", suite, "--out", folder / "out") as parent:
        until(lambda: log(folder)[-1:] and log(folder)[-1][2] == str(step), f"step {step}")
        worker = int(log(folder)[-1][1])
        assert alive(worker)
        end(parent, worker)
        if step == 3:  # the worker must have heard of the stop before the step ends
            until(lambda: "stopping" in parent.stderr.readline(), "the note about stopping")
        elif step == 6:
            parent.wait()
        hold.unlink()
        until(lambda: not alive(worker), "the worker's end", seconds=20)
        out, err = parent.communicate(timeout=60)
        assert "Traceback" not in err
        return SimpleNamespace(code=parent.returncode, err=err, out=out)


def test_a_second_ctrl_c_gives_the_checkpoint_up(tmp_path):
    write_learner(tmp_path, "learner")
    suite = write_suite(tmp_path, "s", ["learner"])
    (tmp_path / "hold").write_text("1")  # a step without end
    with started("run", suite, "--out", tmp_path / "out", "--jobs", "2") as parent:
        until(lambda: len(log(tmp_path)) == 2, "step 1")
        parent.send_signal(signal.SIGINT)
        until(lambda: "stopping" in parent.stderr.readline(), "the note about stopping")
        parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert "Traceback" not in err
    until(lambda: not alive(int(log(tmp_path)[0][1])), "the worker's end", seconds=5)


def test_ctrl_c_in_training_exits_130_and_keeps_the_checkpoint(killed):
    assert killed.interrupt.code == 130
    assert "the same command goes on from here" in killed.interrupt.err
    assert len(killed.kept) == 1


def test_a_killed_parent_takes_its_worker_along(killed):
    assert killed.parent.code == -signal.SIGKILL


def test_a_killed_worker_is_rows_with_a_reason_and_exit_3(killed):
    assert killed.worker.code == 3
    assert {row["status"] for row in killed.failed.values()} == {"failed"}
    assert all("signal 9" in row["reason"] for row in killed.failed.values())


def test_after_all_kills_the_numbers_are_those_of_a_run_left_in_peace(killed):
    assert killed.last.returncode == 0
    assert killed.final == killed.peace
    assert {row["status"] for row in killed.rows.values()} == {"ok"}


def test_no_step_was_trained_twice_but_the_ones_under_way(killed):
    steps = [int(step) for _, _, step in killed.log]
    assert sorted(set(steps)) == list(range(STEPS))
    assert len(steps) <= STEPS + 3  # each kill lost the step it fell into, at most
    assert steps == sorted(steps)


def test_checkpoints_and_their_torn_remains_go_when_the_rows_are_there(killed):
    assert not list((killed.folder / "out/kill/latest/checkpoints").iterdir())


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(tmp_path):
    write_learner(tmp_path, "learner")
    more = "\nevaluation: {episodes: 500}\nmeasures: [accuracy]\n"
    suite = write_suite(tmp_path, "full", ["pixel-nn", "chance"], more)
    limit = 30_000  # of a file: 500 episodes are 17 kB
    full = metabench(
        "run", suite, "--out", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert full.returncode == 2, full.stderr
    assert "cannot write here" in full.stderr
    assert "Rows already measured are kept" in full.stderr
    (run,) = (p for p in (tmp_path / "full").iterdir() if not p.is_symlink())
    kept = Run.open(run).measurements()
    assert 0 < len(kept) < 4
    assert (run / "samples.jsonl").read_bytes().endswith(b"\n")
    again = metabench("run", suite, "--out", tmp_path)
    assert again.returncode == 0
    assert f"{len(kept)} of them already measured" in again.stderr
    assert len(Run.open(run).measurements()) == 4


def test_a_folder_that_is_being_written_is_left_alone(zoo):
    folder = Run.open(zoo.run)
    before = (zoo.run / "measurements.jsonl").read_bytes()
    with folder.writing():
        second = metabench("run", zoo.suite, "--extend", folder.path)
    assert second.returncode == 2
    assert "another metabench is writing this run" in second.stderr
    assert (zoo.run / "measurements.jsonl").read_bytes() == before


# --- devices ----------------------------------------------------------------------------------------------------


def test_cuda_where_there_is_none(tmp_path):
    write_learner(tmp_path, "learner")
    suite = write_suite(tmp_path, "gpu", ["chance"], "\nmeasures: [accuracy]\n")
    forced = metabench("run", suite, "--out", tmp_path, "--device", "cuda", env=_blind())
    assert forced.returncode == 2
    assert "no CUDA device" in forced.stderr
    text = suite.read_text().replace("algorithms:", "devices: [cpu, cuda]\n  algorithms:")
    suite.write_text(text)
    both = metabench("run", suite, "--out", tmp_path, "--no-resume", env=_blind())
    assert both.returncode == 0, both.stderr
    found = results(tmp_path / "gpu" / "latest")
    assert sorted((row["device"], row["status"]) for row in found.values()) == [
        ("cpu", "ok"), ("cpu", "ok"), ("cuda", "skipped"), ("cuda", "skipped")
    ]  # fmt: skip
    assert {row["reason"] for row in found.values() if row["device"] == "cuda"} == {"no CUDA device on this machine"}
    plan = metabench("run", suite, "--out", tmp_path, "--plan", env=_blind())
    assert "2 to do" in plan.stderr  # on a machine that has one


def _blind():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}


# --- streams ----------------------------------------------------------------------------------------------------


def test_a_training_within_one_alphabet_is_drawn_there(tmp_path):
    write_learner(tmp_path, "learner")
    both = [f"{{name: learner, train: {{ways: {ways}, within: alphabet}}}}" for ways in (3, 4)]
    done = metabench("run", write_suite(tmp_path, "inside", both), "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    rows = of(results(tmp_path / "out" / "inside" / "latest"), "learner")
    good = [row for row in rows if row["train_spec"] == "3w1s2q@alphabet*12"]
    bad = [row for row in rows if row["train_spec"] == "4w1s2q@alphabet*12"]  # each alphabet has three classes
    assert [row["status"] for row in good] == ["ok", "ok"] and len(bad) == 2
    assert all("4 ways within one alphabet, but the largest" in row["reason"] for row in bad)


def test_streams_are_trained_on_selected_by_and_judged_by_presentation(tmp_path):
    """With an interval by class around each presentation's score; what would fine-tune on a stream is skipped."""
    suite = write_suite(tmp_path, "streams", ["{name: lstm-baseline, params: {units: 4, finetune_steps: [0, 1]}}"])
    text = suite.read_text().replace("shots: [1, 2], queries: 3", "stream: 7")
    text = text.replace("episodes: 40", "episodes: 40, selection: val")
    text = text.replace("{ways: 3, shots: 1, queries: 2, steps: 12}", "{steps: 4}")
    suite.write_text(text.replace("[accuracy,", "[accuracy_at_1, accuracy_at_2,"))
    done = metabench("run", suite, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "streams" / "latest"
    rows = {("finetune_steps=1" in cell, measure): row for (cell, measure), row in results(run).items()}
    assert {row["status"] for (tuned, _), row in rows.items() if tuned} == {"skipped"}
    data = load([run])
    for measure in ("accuracy_at_1", "accuracy_at_2"):
        row, of_class = rows[False, measure], data.by_class[data.by_class["measure"] == measure]
        assert row["status"] == "ok" and of_class["class"].between(10, 14).all() and len(of_class) == 5
        ratio = of_class["credit"].sum() / of_class["queries"].sum()
        assert ratio == pytest.approx(float(row["value"]), rel=1e-12)
    questions = data.by_class.groupby("measure")["queries"].sum()
    assert questions["accuracy_at_1"] <= 3 * 40 and questions["accuracy_at_2"] < questions["accuracy_at_1"]
