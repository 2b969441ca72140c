"""Rows of cost with real workers: what is measured, in which order, and what a failing kernel or a kill leaves."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from conftest import metabench, results, started, until, write_learner, write_suite

from metabench.cells import ASPECTS, KERNEL_MEASURES, KERNELS, MEASURES
from metabench.costs import CONTROLS, _of_process
from metabench.kernels import KERNELS as MADE
from metabench.store import Run

TIMING = "timing: {processes: 2, slices: 3}\n"


def cost_suite(folder, name, algorithms, measures, *, calls="{tasks: 1}", timing=TIMING, tasks="shots: 1, queries: 2"):
    write_suite(folder, name, ["unused"])
    plugins = ", ".join(sorted(file.name for file in folder.glob("*.py")))
    file = folder / f"{name}.yaml"
    file.write_text(
        f"plugins: [{plugins}]\n{timing}threads: 1\ncontrols: false\n"
        f"grid:\n  tasks:\n    - {{dataset: dots, ways: 3, {tasks}}}\n"
        f"  algorithms: [{', '.join(algorithms)}]\n  calls:\n    - {calls}\n  measures: [{', '.join(measures)}]\n"
    )
    return file


def lines_of(run):
    """samples.jsonl's lines by process and key."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return {(line["process"], line["cell"], line["measure"]): line for line in lines if "process" in line}


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A kernel suite, run."""
    folder = tmp_path_factory.mktemp("timed")
    write_learner(folder, "learner")
    wanted = [f"{kernel}_time" for kernel in KERNELS] + ["meta_step_flops", "meta_step_bytes", "meta_step_nodes"]
    wanted += ["adapt_memory", "inner_step_flops", "adapt_nodes", "adapt_launches"]
    suite = cost_suite(folder, "timed", ["learner", "pixel-nn"], wanted, calls="{tasks: [1, 4]}")
    done = metabench("run", suite, "--out", folder / "out")
    run = folder / "out" / "timed" / "latest"
    return SimpleNamespace(folder=folder, suite=suite, run=run, done=done, rows=results(run), lines=lines_of(run))


def test_the_names_of_kernels_are_those_that_can_be_made():
    assert set(MADE) == set(KERNELS)
    assert set(KERNEL_MEASURES) == {f"{k}_{a}" for k in KERNELS for a in ASPECTS} <= set(MEASURES)


def test_times_are_over_processes_and_their_raw_samples_are_kept(timed):
    assert timed.done.returncode == 0, timed.done.stderr
    learner = {key: row for key, row in timed.rows.items() if row["algorithm"] == "learner"}
    ok = [row for row in learner.values() if row["status"] == "ok" and row["measure"].endswith("_time")]
    assert Counter(row["kernel"] for row in ok) == {"adapt": 2, "predict": 2, "meta_step": 2, "episode": 2}
    for row in ok:
        assert (row["n"], row["unit"], row["threads"]) == ("2", "s", "1")
        assert 0 < float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"])
        for process in (0, 1):
            line = timed.lines[process, row["cell"], row["measure"]]
            assert len(line["seconds"]) == len(line["at"]) == len(line["order"]) == 3 and min(line["seconds"]) > 0
    assert {row["tasks"] for row in ok} == {"1", "4"}
    assert {row["train_spec"] for row in timed.rows.values()} == {""}, "the cost of a kernel needs no training"


def test_kernels_and_controls_are_interleaved_round_by_round(timed):
    for process in (0, 1):
        lines = {key: line for key, line in timed.lines.items() if key[0] == process}
        assert {("", name) for name in CONTROLS} <= {key[1:] for key in lines}
        taken = sorted((order, key) for key, line in lines.items() for order in line["order"])
        assert [order for order, _ in taken] == list(range(3 * len(lines)))
        rounds = [[key for _, key in taken[n : n + len(lines)]] for n in range(0, len(taken), len(lines))]
        assert all(set(one) == set(lines) for one in rounds), "each round holds every kernel once"
        assert rounds[0] != rounds[1] or rounds[1] != rounds[2], "each in an order of its own"
        moments = [
            at
            for _, at in sorted(
                (o, a) for line in lines.values() for o, a in zip(line["order"], line["at"], strict=True)
            )
        ]
        assert all(a < b for a, b in pairwise(moments)), "the order told is the order taken"
    first, second = ({key[1:]: line["order"] for key, line in timed.lines.items() if key[0] == p} for p in (0, 1))
    assert first != second


def test_slices_have_equally_many_calls_in_every_process(timed):
    for (process, *key), line in timed.lines.items():
        if process and key[0]:
            assert line["calls"] == timed.lines[0, *key]["calls"]


def test_counts_are_exact_and_scale_with_the_tasks(timed):
    counted = {(r["measure"], r["tasks"]): float(r["value"]) for r in timed.rows.values() if r["n"] == "1"}
    assert counted["meta_step_flops", "4"] == 4 * counted["meta_step_flops", "1"] > 0
    assert counted["meta_step_bytes", "4"] > counted["meta_step_bytes", "1"] > 0
    assert counted["meta_step_nodes", "1"] == int(counted["meta_step_nodes", "1"]) > 0
    assert all(math.isfinite(value) for value in counted.values())
    assert ("adapt_memory", "1") in counted


def test_a_kernel_that_an_algorithm_does_not_have_is_skipped_with_the_reason(timed):
    reasons = {(r["algorithm"], r["measure"]): r["reason"] for r in timed.rows.values() if r["status"] == "skipped"}
    assert reasons["learner", "inner_step_time"] == reasons["learner", "inner_step_flops"] == "it has no inner loop"
    assert reasons["learner", "embed_time"] == "it has no embedding of its own"
    assert reasons["pixel-nn", "meta_step_time"] == "there is nothing to train"
    assert "meta_step" in reasons["learner", "adapt_nodes"]
    assert "CUDA" in reasons["learner", "adapt_launches"]


def test_the_environment_keeps_roofs_controls_and_what_disturbed(timed):
    found = [facts for facts in Run.open(timed.run).environments().values() if facts.get("controls", {}).get("matmul")]
    assert len(found) == 1
    assert all(len(found[0]["controls"][name]) == 2 for name in CONTROLS)
    assert len(found[0]["disturbances"]) == 2 and found[0]["disturbances"][0]["cores"] > 0
    assert any("roofs" in facts for facts in Run.open(timed.run).environments().values())


def test_streams_cost_what_following_them_takes(tmp_path):
    """From the first image to the last, and a training step on them; each length has a table of its own."""
    algorithms = ["{name: lstm-baseline, params: {units: 4, finetune_steps: [0, 1]}}"]
    wanted = ["adapt_time", "predict_time", "meta_step_time", "episode_time", "predict_flops", "inner_step_flops"]
    both = "stream: 6}\n    - {dataset: dots, ways: 3, stream: 9"
    suite = cost_suite(tmp_path, "streams", algorithms, wanted, calls="{tasks: 2}", tasks=both)
    done = metabench("run", suite, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "streams" / "latest"
    rows = results(run)
    tuned = [row for row in rows.values() if "finetune_steps=1" in row["cell"]]
    plain = {(int(row["stream"]), row["measure"]): row for row in rows.values() if row not in tuned}
    assert len(tuned) == 8 and all("no support set to fine-tune on" in row["reason"] for row in tuned)
    assert {measure for _, measure in plain} == {"predict_time", "meta_step_time", "episode_time", "predict_flops"}
    for (length, measure), row in plain.items():
        assert row["status"] == "ok" and float(row["value"]) > 0
        if measure == "predict_flops":  # two streams: the gates by image, label and state, and the output
            assert float(row["value"]) == 2 * length * 2 * ((144 + 3) * 16 + 4 * 16 + 4 * 3)
    said = metabench("report", run).stdout
    assert "3-way streams of 6" in said and "3-way streams of 9" in said


def test_a_finished_suite_has_nothing_to_do(timed):
    again = metabench("run", timed.suite, "--out", timed.folder / "out")
    assert again.returncode == 0 and "process 1" not in again.stderr
    assert lines_of(timed.run) == timed.lines


def test_times_of_another_machine_are_taken_again_and_counts_stay(tmp_path):
    write_learner(tmp_path, "learner")
    timing = "timing: {processes: 1, slices: 3}\n"
    suite = cost_suite(tmp_path, "moved", ["learner"], ["adapt_flops", "adapt_time"], timing=timing)
    metabench("run", suite, "--out", tmp_path / "out")
    file = tmp_path / "out" / "moved" / "latest" / "environment.json"
    file.write_text(json.dumps({name: {**facts, "cpu": "Z80"} for name, facts in json.loads(file.read_text()).items()}))
    plan = metabench("run", suite, "--out", tmp_path / "out", "--plan").stdout.splitlines()
    assert [line.split()[0] for line in plan] == ["done", "to"]
    again = metabench("run", suite, "--out", tmp_path / "out")
    assert again.returncode == 0 and "1 times are measured again" in again.stderr


def test_the_time_of_an_inner_step_is_the_slope_over_step_counts():
    seconds = {1: [0.3, 0.31, 0.9], 3: [0.5, 0.51, 0.52], 5: [0.7, 0.71, 0.69]}
    line = {"of": [k for k in seconds for _ in range(3)], "seconds": [s for v in seconds.values() for s in v]}
    found = _of_process(line)
    assert found.seconds == pytest.approx((0.7 - 0.31) / 4)
    assert found.intercept == pytest.approx((0.31 + 0.51 + 0.7) / 3 - 3 * found.seconds)


FAILING = {
    "quits": "import os as _o; _o._exit(7)",
    "hungry": "torch.empty(2**50)",
    "fine": "pass",
    "late": "type(self).n = getattr(type(self), 'n', 0) + 1\n        if self.n > 9: os._exit(3)",
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    for name, sabotage in FAILING.items():
        write_learner(folder, name, sabotage)
    suite = cost_suite(folder, "failing", list(FAILING), ["adapt_time", "predict_time", "adapt_flops", "adapt_memory"])
    done = metabench("run", suite, "--out", folder / "out")
    return done, {
        (row["algorithm"], row["measure"]): row for row in results(folder / "out" / "failing" / "latest").values()
    }


def test_a_worker_that_dies_costs_one_row_and_the_others_go_on(failing):
    done, rows = failing
    assert done.returncode == 3
    assert {rows["quits", measure]["status"] for measure in ("adapt_time", "adapt_flops", "adapt_memory")} == {"failed"}
    assert "exit code 7" in rows["quits", "adapt_time"]["reason"]
    assert rows["late", "adapt_time"]["status"] == "failed" and "exit code 3" in rows["late", "adapt_time"]["reason"]
    for measure in ("adapt_time", "predict_time", "adapt_flops"):
        assert rows["fine", measure]["status"] == "ok", rows["fine", measure]["reason"]
    assert rows["fine", "adapt_time"]["n"] == "2"


def test_out_of_memory_is_a_row(failing):
    _, rows = failing
    assert rows["hungry", "adapt_time"]["status"] == "failed"
    assert "memory" in rows["hungry", "adapt_time"]["reason"]


def test_threads_that_are_not_there_are_a_skipped_row_that_another_machine_may_measure(tmp_path):
    write_learner(tmp_path, "learner")
    suite = cost_suite(tmp_path, "wide", ["learner"], ["adapt_time"], calls="{threads: [1, 1000]}", timing="")
    suite.write_text(suite.read_text() + "timing: {processes: 1, slices: 3}\n")
    assert metabench("run", suite, "--out", tmp_path / "out").returncode == 0
    rows = {row["cell"].endswith("threads=1000"): row for row in results(tmp_path / "out" / "wide" / "latest").values()}
    assert rows[True]["status"] == "skipped" and "1000 threads asked for" in rows[True]["reason"]
    assert rows[False]["status"] == "ok" and rows[False]["n"] == "1" and rows[False]["ci_low"] == ""
    plan = metabench("run", suite, "--out", tmp_path / "out", "--plan").stdout.splitlines()
    assert [line.split()[0] for line in plan] == ["done", "to"]


def test_a_killed_timing_goes_on_with_the_process_that_was_not_done(tmp_path):
    write_learner(tmp_path, "learner")
    suite = cost_suite(tmp_path, "long", ["learner"], ["adapt_time"], timing="timing: {processes: 3, slices: 3}\n")
    with started("run", suite, "--out", tmp_path / "out") as process:
        samples = tmp_path / "out" / "long" / "latest" / "samples.jsonl"
        until(lambda: samples.exists() and '"process": 0' in samples.read_text(), "the first process")
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = lines_of(samples.parent)
    assert metabench("run", suite, "--out", tmp_path / "out").returncode == 0
    after = lines_of(samples.parent)
    assert kept.items() <= after.items() and len(after) > len(kept), "what was sampled is not sampled again"
    (row,) = results(samples.parent).values()
    assert row["n"] == "3"


def test_ctrl_c_while_timing_keeps_what_is_measured(tmp_path):
    write_learner(tmp_path, "learner")
    suite = cost_suite(
        tmp_path, "slow", ["learner"], ["adapt_flops", "adapt_time"], timing="timing: {processes: 50, slices: 9}\n"
    )
    with started("run", suite, "--out", tmp_path / "out") as process:
        samples = tmp_path / "out" / "slow" / "latest" / "samples.jsonl"
        until(lambda: samples.exists() and '"process": 0' in samples.read_text(), "the first process")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in said and "goes on from here" in said
    kept = Run.open(samples.parent).measurements()
    assert {measure: row.status for (_, measure), row in kept.items()} == {"adapt_flops": "ok"}
