"""Tables of kernels: made-up run folders through the store, into every format."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from kernel_runs import KernelRun, kernels_run, scaling_run
from test_report import small

from metabench.environment import Reading, disturbance
from metabench.errors import ConfigError, StoreError
from metabench.report import FORMATS, RunData, kernel_report, render, tables, wording
from metabench.report.load import load
from metabench.stats import Interval, median_interval, paired_ratio, ratio


def loaded(run, tmp_path):
    return load([run.write(tmp_path)])


def only(data, reference=None):
    (table,) = kernel_report(data, reference).tables
    return table


def cell(table, method, kernel):
    (row,) = [row for row in table.rows if row.method == method]
    return row.cell(kernel)


MAML = "maml[backbone=conv4,inner_steps=5]"


def test_times_and_paired_ratios_are_those_of_stats(tmp_path):
    run = kernels_run()
    medians = {m.cell.partition("/")[0]: seconds for m, seconds in run.found if m.measure == "adapt_time"}
    table = only(loaded(run, tmp_path))
    found, expected = cell(table, MAML, "adapt"), median_interval(medians[MAML])
    assert (found.time.value, found.time.low, found.time.n) == (expected.value, expected.low, 5)
    gap = paired_ratio(medians[MAML], medians["protonet"])
    assert found.paired
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == pytest.approx((gap.value, gap.low, gap.high))
    assert table.kernels == ("adapt", "inner_step", "predict", "meta_step", "episode")
    assert table.reference == "protonet"
    assert cell(table, "protonet", "adapt").ratio is None


def test_rows_of_other_processes_are_not_paired(tmp_path):
    run = kernels_run()
    whole = run.write(tmp_path)
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    for line in lines:  # the reference was timed at another time: equal process numbers mean nothing then
        line["at"] = [t + 1e6 for t in line["at"]] if line["cell"].startswith("protonet") else line["at"]
    run.found = [(m, None) for m, _ in run.found]
    apart = run.write(tmp_path)
    (apart / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = cell(only(load([apart])), MAML, "adapt")
    expected = ratio(found.time, cell(only(load([apart])), "protonet", "adapt").time)
    assert not found.paired
    assert (found.ratio.value, found.ratio.low) == pytest.approx((expected.value, expected.low))
    assert found.ratio.half > 2 * cell(only(load([whole])), MAML, "adapt").ratio.half


def test_stale_raw_samples_are_not_taken_for_a_rows_own(tmp_path):
    path = kernels_run().write(tmp_path)
    text = (path / "samples.jsonl").read_text()
    doubled = [json.loads(line) for line in text.splitlines()]
    for line in doubled:
        line["seconds"] = [2 * s for s in line["seconds"]]
    with (path / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in doubled)
    data = load([path])
    assert data.timings.empty
    assert not cell(only(data), MAML, "adapt").paired


def test_damaged_raw_samples_are_named(tmp_path):
    path = kernels_run().write(tmp_path)
    with (path / "samples.jsonl").open("a") as file:
        file.write('{"cell": "a", "measure": "b", "process": 0\n')
    with pytest.raises(StoreError, match=r"samples.jsonl: damaged at byte \d+"):
        load([path])


def test_missing_kernels_are_dashes_with_their_reason(tmp_path):
    data = loaded(kernels_run(), tmp_path)
    table = only(data)
    key = dict(cell(table, "protonet", "inner_step").missing)["time"]
    assert dict(table.notes)[key] == "skipped: protonet has no inner steps"
    failed = dict(cell(table, "pixel-nn", "meta_step").missing)["time"]
    assert "out of memory" in dict(table.notes)[failed]
    assert "launches" not in table.counts  # skipped everywhere: no column, and no note about it
    assert not any("launches" in text for _, text in table.notes)
    for format in ("table", "md", "latex", "json"):
        assert "the worker ran out of memory" in " ".join(render(data, format).split())


def test_the_roof_that_binds_is_the_nearer_one(tmp_path):
    run = KernelRun(noise=0, drift=0)
    for name, flops, moved in (("computes", 5e9, 1.2e8), ("moves", 1e9, 9.6e8)):
        a = run.cell(name)
        run.time(a, "embed", 0.1).count(a, "embed", flops=flops, bytes=moved)
    a = run.cell("unknown", precision="float64")
    run.time(a, "embed", 0.1).count(a, "embed", flops=1e9)
    first, second = kernel_report(loaded(run, tmp_path)).tables
    one, two = cell(first, "computes", "embed"), cell(first, "moves", "embed")
    assert (one.rate, one.share, one.bound) == (pytest.approx(5e10), pytest.approx(0.5), "compute")
    assert (two.rate, two.share, two.bound) == (pytest.approx(1e10), pytest.approx(0.8), "memory")
    none = cell(second, "unknown", "embed")
    assert (none.rate, none.share) == (pytest.approx(1e10), None)


def test_another_device_has_no_share_of_this_roof(tmp_path):
    run = KernelRun()
    a = run.cell("protonet", device="cuda")
    run.time(a, "embed", 0.1).count(a, "embed", flops=1e9, bytes=1e9)
    assert cell(only(loaded(run, tmp_path)), "protonet", "embed").share is None


@pytest.mark.parametrize(
    "call",
    [
        {"tasks": 8}, {"threads_asked": 1}, {"allocator": "default"}, {"layout": "contiguous"}, {"compile": True},
        {"ways": 20},
    ],
)  # fmt: skip
def test_another_call_is_another_table(tmp_path, call):
    run = KernelRun()
    run.time(run.cell("protonet"), "adapt", 0.1).time(run.cell("protonet", **call), "adapt", 0.2)
    first, second = kernel_report(loaded(run, tmp_path)).tables
    assert (first.title, first.protocol) != (second.title, second.protocol)


def test_inner_steps_and_seeds_are_rows_of_their_own(tmp_path):
    run = KernelRun()
    run.time(run.cell("maml", steps=1), "adapt", 0.1).time(run.cell("maml", "lr=0.1", steps=5), "adapt", 0.5)
    run.time(run.cell("protonet"), "adapt", 0.1).time(run.cell("protonet", seed=1), "adapt", 0.1)
    names = [row.method for row in only(loaded(run, tmp_path)).rows]
    assert names == ["maml[steps=1]", "maml[lr=0.1,steps=5]", "protonet[seed=0]", "protonet[seed=1]"]


def test_the_reference_is_the_suites_or_the_one_named(tmp_path):
    data = loaded(kernels_run(reference="matching"), tmp_path)
    assert only(data).reference == "matching"
    assert only(data, "fomaml").reference == "fomaml"
    assert only(data, MAML).reference == MAML
    assert only(data, "maml").reference == MAML
    with pytest.raises(ConfigError, match="did you mean 'fomaml'"):
        render(data, "table", "fomamll")
    alone = loaded(kernels_run(reference=None), tmp_path)
    assert only(alone).reference == "protonet"


def test_no_ratio_across_machines(tmp_path):
    here, there = KernelRun(), KernelRun()
    here.time(here.cell("protonet"), "adapt", 0.1)
    there.time(there.cell("maml"), "adapt", 0.1)
    there.found = [(type(m)(**{**m.__dict__, "environment": "e2"}), s) for m, s in there.found]
    data = load([here.write(tmp_path), there.write(tmp_path)])
    assert cell(only(data), "maml", "adapt").ratio is None
    assert any("do not compare" in text for text in kernel_report(data).footer)


# what is said of the machine


def warnings(run, tmp_path):
    return " ".join(kernel_report(loaded(run, tmp_path)).footer)


def test_a_quiet_machine_gets_no_warning(tmp_path):
    said = warnings(kernels_run(drift=0.01), tmp_path)
    assert "Environment e1: AMD EPYC, 2 cores" in said and "float32 100 GFLOP/s" in said
    assert "Control rows, sd over 5 processes: matmul" in said
    assert "Wide" not in said and "load" not in said and "One process" not in said


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"controls": {"matmul": [1, 1.2, 1.3], "python": [1, 1.2, 1.3]}}, "so the machine did.*quiet"),
        ({"controls": {"matmul": [1, 1.2, 1.3], "python": [1, 1, 1]}}, "another job takes one of the cores"),
        ({"controls": {"matmul": [1, 1, 1], "python": [1, 1, 1]}}, "held still.*one thread"),
        ({"controls": {}}, "without control rows"),
        ({"variables": {"OMP_WAIT_POLICY": "ACTIVE"}}, "OMP_WAIT_POLICY=ACTIVE.*set it to PASSIVE"),
    ],
)
def test_a_wide_spread_names_its_cause_and_the_remedy(tmp_path, environment, words):
    said = warnings(kernels_run(noise=0.3, environment=environment), tmp_path)
    assert re.search(f"Wide spread over processes .*{words}", said)


def test_load_noise_within_processes_and_single_processes_are_said(tmp_path):
    quiet = disturbance(Reading(0, 0, 0, 0, {}, None, 0), Reading(10, 20, 0, 19.5, {}, None, 0))
    loaded_twice = [{**quiet, "other_load": 0.5}, {**quiet, "other_load": 1.2}, quiet]
    said = warnings(kernels_run(environment={"disturbances": loaded_twice}), tmp_path)
    assert "On e1 other processes kept 1.2 of" in said and "kept 0.5" not in said
    run = KernelRun()
    run.time(run.cell("maml"), "adapt", 0.1, iqr=0.4)
    assert "Wide spread within processes (interquartile range above 15 %): maml adapt 40 %" in warnings(run, tmp_path)
    assert "One process: no intervals" in warnings(kernels_run(processes=1), tmp_path)


# beside ordinary tables


def test_tables_of_quality_stay_as_they_are(tmp_path):
    quality = small()
    assert kernel_report(quality).tables == ()
    kernels = loaded(kernels_run(), tmp_path)
    both = RunData.of(
        [*quality.rows.to_dict("records"), *kernels.rows.to_dict("records")],
        quality.episodes,
        quality.by_class,
        facts=kernels.facts,
        timings=kernels.timings,
    )
    assert tables(both) == tables(quality)
    assert len(kernel_report(both).tables) == 1
    assert tables(both, "fomaml")[0].reference is None  # a name that only a table of kernels has
    with pytest.raises(ConfigError, match="did you mean 'fomaml'"):
        tables(both, "fomamll")
    text = render(both, "table")
    assert text.startswith(render(quality, "table").rstrip("\n")) and "Kernels: omniglot" in text


def test_adaptation_times_beside_scores_make_no_table_of_kernels():
    rows = small().rows
    cell = "chance/omniglot[vinyals]/5w1s15q/none/cpu-float32/seed0"
    controls = rows[rows["algorithm"] == "chance"].assign(cell=cell, measure="adapt_time", value=0.1)
    only_times = RunData.of([*rows[rows["measure"] == "adapt_time"].to_dict("records"), *controls.to_dict("records")])
    assert kernel_report(only_times).tables == ()
    assert len(tables(only_times)) == 1


# formats


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("make", [kernels_run, scaling_run])
def test_the_tables_keep_to_their_width(tmp_path, width, make):
    lines = render(loaded(make(), tmp_path), "table", width=width).splitlines()
    assert max(map(len, lines)) <= max(width, 80)
    assert any(len(line) > min(width, 80) - 30 for line in lines)


def test_very_long_names_fold(tmp_path):
    run = KernelRun()
    run.time(run.cell("an-algorithm-from-a-plug-in", "backbone=a-very-long-name-of-a-backbone,x=1"), "adapt", 0.1)
    text = render(loaded(run, tmp_path), "table")
    body = [line for line in text.splitlines() if "100" in line or "back" in line or "long" in line]
    assert max(map(len, text.splitlines())) <= 80
    assert "".join(line.split("  ")[0].strip() for line in body).startswith("an-algorithm-from-a-plug-in"[:20])


def test_terminal_golden(tmp_path):
    run = KernelRun(drift=0.02)
    for name, seconds in (("protonet", 0.0032), ("maml", 0.0415)):
        a = run.cell(name, tasks=8)
        run.time(a, "adapt", seconds).count(a, "adapt", flops=1.1e8, bytes=6e6, nodes=0)
    run.time(run.cell("maml", tasks=8), "inner_step", 0.0071, intercept=0.001)
    run.missing(run.cell("protonet", tasks=8), "inner_step_time", "skipped", "protonet has no inner steps")
    assert render(loaded(run, tmp_path), "table") == GOLDEN


def test_json_and_csv_carry_everything(tmp_path):
    data = loaded(kernels_run(), tmp_path)
    content = json.loads(render(data, "json"))
    (table,) = content["kernels"]["tables"]
    row = next(r for r in table["rows"] if r["method"] == MAML)
    adapt = next(c for c in row["cells"] if c["kernel"] == "adapt")
    assert adapt["time"]["value"] == cell(only(data), MAML, "adapt").time.value
    assert (adapt["paired"], adapt["bound"]) == (True, "compute")
    assert adapt["counts"]["flops"] == pytest.approx(1.1e8 * 14)
    assert content["kernels"]["footer"][0].startswith("Environment e1")
    lines = list(csv.DictReader(io.StringIO(render(data, "csv"))))
    assert {"adapt_time", "meta_step_flops", "inner_step_time"} <= {line["measure"] for line in lines}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_takes_every_run(tmp_path, format):
    for run in (kernels_run(), kernels_run(processes=1), kernels_run(processes=2), scaling_run()):
        assert render(loaded(run, tmp_path), format)


def test_markdown_rows_have_as_many_cells_as_heads(tmp_path):
    text = render(loaded(kernels_run(), tmp_path), "md")
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) <= 1
    assert "<br>×14.1 \\[" in text


@pytest.mark.parametrize(
    ("low", "value", "high", "text", "bounds"),
    [
        (0.0119, 0.0123, 0.0127, "12.3 ±0.4 ms", "12.3 [11.9, 12.7] ms"),
        (0.012296, 0.0123, 0.012304, "12.30 ±0.00 ms", "12.30 [12.30, 12.30] ms"),
        (0.00098, 0.00099, 0.001, "990 ±10 us", "990 [980, 1000] us"),
        (0.001, 0.01, 0.1, "10.0 ±>100 % ms", "10.0 [1.0, 100.0] ms"),
        (None, 9.6, None, "9.60 s", "9.60 s"),
    ],
)
def test_times_with_intervals(low, value, high, text, bounds):
    time = Interval(value, low, high, 5, None)
    assert wording.timing(time, bounds=False) == text
    assert wording.timing(time, bounds=True) == bounds


def test_amounts():
    shown = [wording.amount(x) for x in (0, 812, 9999, 12345, 4.1e7, 1.234e9, 5e12)]
    assert shown == ["0", "812", "9999", "12.3 k", "41.0 M", "1.23 G", "5.00 T"]
    assert [wording.digits(x) for x in (0.0313, 0.85, 9.996, 14.1, 1234.0, np.float64(0))] == [
        "0.0313", "0.85", "10.0", "14.1", "1234", "0.00"
    ]  # fmt: skip


GOLDEN = """\
Kernels: omniglot 5-way 1-shot
tasks per call 8 · queries 15 · device cpu float32 · threads 2 · environment e1
· ratios to protonet
method            adapt     inner step
──────────────────────────────────────
protonet  3.21 ±0.06 ms            – a
                     ×1
maml       41.5 ±0.5 ms  7.09 ±0.08 ms
             ×12.9 ±0.1   once 1.00 ms
──────────────────────────────────────
                          bytes  graph  GFLOP       share
method    kernel   FLOP   moved  nodes     /s     of roof
─────────────────────────────────────────────────────────
protonet  adapt   110 M  6.00 M      0   34.2   34 % comp
maml      adapt   110 M  6.00 M      0   2.65  2.7 % comp
─────────────────────────────────────────────────────────
a  skipped: protonet has no inner steps

Environment e1: AMD EPYC, 2 cores, torch 2.13.0+cpu, python 3.11.7. Its roofs on
2 threads: float32 100 GFLOP/s, bf16 250 GFLOP/s, copy 12 GB/s.
Control rows, sd over 5 processes: matmul 0.6 %, python 0.2 %.
Times are the median over processes, per call.
An inner step's time is the slope over step counts; once: what a call costs
beside its steps.
Intervals are at 95 %, over processes.
× is the time relative to the reference's in the same column, paired by process:
below 1 is faster.
Roof: the least time that the machine's peak rate (comp) or its copy bandwidth
(mem) allows, as a share of the time. Bytes are those of every operation's
operands, so caches can bring it above 100 %.
"""
