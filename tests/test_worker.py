"""The worker and its line to the parent, as a process and in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import environ, until, write_learner, write_suite

from metabench import environment, plan, training
from metabench.catalogue import catalogue
from metabench.measure import Workshop, reason_of, run_job
from metabench.scoring import Stopped
from metabench.suite import load_suite
from metabench.workers import Worker

MEASURES = ("accuracy", "val_accuracy")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("CHECKPOINT_SECONDS", "PROGRESS_SECONDS"):  # the plug-in sets them; here that must not last
        monkeypatch.setattr(training, name, getattr(training, name))
    write_learner(tmp_path, "good")
    write_learner(tmp_path, "bad", "raise ValueError('one\\n  two')")
    return tmp_path


def job(folder, name, more=""):
    """The message for an algorithm's job, as the runner makes it."""
    suite = load_suite(write_suite(folder, "s", [name], more))
    rows = [row for row in plan.rows_of(suite) if row.cell.algorithm == name]
    (made,) = plan.jobs_of(rows)
    return json.loads(json.dumps(made.message(1, suite, folder / "run"))), suite


def perform(folder, name, *, stopping=lambda: False, emit=None, more=""):
    """Do a job in this process; returns what is said."""
    message, suite = job(folder, name, more)
    known = catalogue(suite.plugins)
    load = {"algorithm": lambda n: known.algorithm(n).load(), "dataset": lambda n: known.dataset(n).load()}
    said = []

    def keep(kind, **content):
        said.append({"kind": kind, **json.loads(json.dumps(content, allow_nan=False))})

    run_job(message, Workshop(load=lambda kind, n: load[kind](n), emit=emit or keep, stopping=stopping))
    return message, said


def test_every_row_of_a_job_is_answered_exactly_once(folder):
    message, said = perform(folder, "good")
    wanted = sorted((cell["id"], m) for cell in message["cells"] for m in cell["measures"])
    assert sorted((s["cell"], s["measure"]) for s in said if s["kind"] == "result") == wanted
    assert {s["status"] for s in said if s["kind"] == "result"} == {"ok"}
    scores = [s for s in said if s.get("measure") == "accuracy"]
    assert all(len(s["samples"]["scores"]) == len(s["samples"]["episodes"]) == 40 for s in scores)
    assert (folder / "run" / "predictions" / scores[0]["facts"]["predictions"]).is_file()


def test_an_error_is_one_line_that_says_where(folder):
    _, said = perform(folder, "bad")
    reasons = {s["reason"] for s in said if s["kind"] == "result"}
    assert len(reasons) == 1
    (reason,) = reasons
    assert reason.startswith("ValueError: one two (bad.py:")
    assert any("Traceback" in s["text"] for s in said if s["kind"] == "log")


def test_a_result_that_cannot_be_sent_is_a_failed_row(folder):
    said = []

    def emit(kind, **content):
        if content.get("status") == "ok":
            raise ValueError("not JSON compliant")
        said.append({"kind": kind, **content})

    message, _ = perform(folder, "good", emit=emit)
    failed = [s for s in said if s["kind"] == "result"]
    assert len(failed) == sum(len(cell["measures"]) for cell in message["cells"])
    assert {s["status"] for s in failed} == {"failed"}


def test_a_stop_leaves_rows_pending(folder):
    with pytest.raises(Stopped):
        perform(folder, "good", stopping=lambda: True)
    assert list((folder / "run" / "checkpoints").glob("*.pt"))


def test_selection_on_validation_names_its_step(folder):
    _, said = perform(folder, "good", more="\nevaluation: {episodes: 20, selection: val}\n")
    assert {s["facts"]["selected_step"] for s in said if s["kind"] == "result"} <= set(range(1, 13))


def test_val_accuracy_is_of_validation_classes(folder):
    _, said = perform(folder, "good", more="\nmeasures: [accuracy, val_accuracy]\n")
    results = [s for s in said if s["kind"] == "result"]
    assert {(s["status"], s["unit"]) for s in results} == {("ok", "fraction")}
    seen = {name: {e for s in results if s["measure"] == name for e in s["samples"]["episodes"]} for name in MEASURES}
    assert not seen["accuracy"] & seen["val_accuracy"] and len(seen["val_accuracy"]) == len(seen["accuracy"]) == 80


def test_a_cell_whose_alphabets_are_too_small_fails_alone(folder):
    more = """
grid:
  tasks:
    - {dataset: dots, ways: [3, 4], shots: 1, queries: 3, within: alphabet}
  algorithms: [good]
"""
    _, said = perform(folder, "good", more=more)
    results = {(s["cell"].split("/")[2], s["measure"]): s for s in said if s["kind"] == "result"}
    assert {key: s["status"] for key, s in results.items()} == {
        ("3w1s3q", "accuracy"): "ok", ("3w1s3q", "train_time"): "ok",
        ("4w1s3q", "accuracy"): "failed", ("4w1s3q", "train_time"): "failed",
    }  # fmt: skip
    reason = results["4w1s3q", "accuracy"]["reason"]
    assert reason == "4 ways within one alphabet, but the largest of dots here has 3 classes"


def test_reasons_of_our_own_errors_are_their_message():
    from metabench.errors import DataError

    assert reason_of(DataError("run metabench data fetch omniglot")) == "run metabench data fetch omniglot"


def test_reasons_are_one_printable_line():
    try:
        raise ValueError("a\n\tb \x00\x1b[31m \udcff é")
    except ValueError as error:
        reason = reason_of(error)
    assert reason.startswith("ValueError: a b [31m é (test_worker.py:")
    assert reason.isprintable()


@pytest.fixture
def worker(folder):
    message, suite = job(folder, "good")
    variables = environ(OMP_NUM_THREADS="1", METABENCH_PLUGINS=json.dumps([str(p) for p in suite.plugins]))
    process = subprocess.Popen(
        [sys.executable, "-m", "metabench.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables, text=True,
    )  # fmt: skip
    yield process, message
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_the_protocol_as_a_process_and_the_end_of_an_orphan(worker, folder):
    process, message = worker
    source = folder / "good.py"
    source.write_text(source.read_text() + "\nprint('a stray print')\nos.write(1, b'a stray write\\n')\n")
    hello = json.loads(process.stdout.readline())
    assert hello["kind"] == "hello"
    assert hello["v"] == environment.PROTOCOL
    assert hello["threads"] == 1
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    said = []
    while not said or said[-1]["kind"] != "done":
        said.append(json.loads(process.stdout.readline()))  # every line is JSON, whatever plug-ins print
    assert said[-1]["job"] == 1
    assert any(s["kind"] == "progress" for s in said)
    (folder / "hold").write_text("2")  # a second training waits in its step 2, and its parent goes
    message["checkpoint"] += ".other.pt"
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    until(lambda: len((folder / "steps.log").read_text().splitlines()) == 12 + 3, "the second training's step 2")
    process.stdin.close()
    time.sleep(0.2)
    assert process.poll() is None  # it is in the middle of a step
    (folder / "hold").unlink()
    assert process.wait(10) == 0
    assert os.path.exists(message["checkpoint"])  # noqa: PTH110
    assert "a stray print" in process.stderr.read()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_a_pinned_worker_keeps_all_its_threads_on_as_many_cores(tmp_path):
    worker = Worker(1, [], tmp_path / "log")
    try:
        worker.hello()
        assert os.sched_getaffinity(worker.pid) == os.sched_getaffinity(0), "it may start on all"
        worker.pin()
        first = {min(os.sched_getaffinity(0))}
        threads = psutil.Process(worker.pid).threads()
        assert threads and all(os.sched_getaffinity(one.id) == first for one in threads)
    finally:
        worker.close()
    worker.pin()  # of one that is gone: nothing to do
