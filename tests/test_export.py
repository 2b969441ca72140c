"""Results in other tools' formats; where a tool can be installed, it reads them itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from stored_runs import Stored, as_csv

from metabench.errors import ConfigError, NothingRan
from metabench.export import export, write

CELL = "maml/glyphs[x]/5w1s15q/support/cpu-float32/seed0"
SCORES = [0.5, 0.25, 0.75]


def run(folder, factor=1.0, name="run"):
    made = Stored(machine={"cpu": "Model A", "cores": 2, "system": "Linux x86_64", "python": "3.11.7"})
    times = [factor * seconds for seconds in (0.010, 0.0101, 0.0099, 0.01005, 0.00995)]
    made.time(times).time([1e-4, 2e-4], measure="predict_time").quality(SCORES, "maml").count(10).count(
        4096, "adapt_memory"
    )
    made.row(CELL, "embed_time", status="skipped", reason="no embedding")
    made.row(CELL, "mse", status="failed", reason="out of memory")
    return made.at(folder, name)


@pytest.fixture
def files(tmp_path):
    return lambda to, **options: export([run(tmp_path)], to, **options)


def test_pyperf_gets_one_value_per_process(files):
    content = json.loads(files("pyperf")["pyperf.json"])
    assert content["version"] == "1.0"
    first, second = content["benchmarks"]
    assert first["metadata"]["name"] == f"{CELL} adapt_time"
    assert first["metadata"]["cpu_model_name"] == "Model A"
    assert [one["values"] for one in first["runs"]] == [[0.010], [0.0101], [0.0099], [0.01005], [0.00995]]
    assert len(second["runs"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("pyperf") is None, reason="pyperf is not installed")
def test_pyperf_itself_loads_and_compares_ours(tmp_path):
    import pyperf

    paths = []
    for name, factor in (("base", 1.0), ("slow", 1.25)):
        found = export([run(tmp_path, factor, name)], "pyperf", select="adapt_")
        paths += write(found, "pyperf", tmp_path / f"{name}.json")
    suite = pyperf.BenchmarkSuite.load(str(paths[0]))
    (one,) = suite.get_benchmarks()
    assert (one.get_name(), one.get_nrun(), one.get_unit()) == (f"{CELL} adapt_time", 5, "second")
    assert one.median() == pytest.approx(0.010)
    for words in (
        ["compare_to", *map(str, paths)],
        ["check", str(paths[0])],
        ["hist", str(paths[0])],
        ["stats", str(paths[0])],
    ):
        done = subprocess.run([sys.executable, "-m", "pyperf", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if words[0] == "compare_to":
            assert "1.25x slower" in done.stdout
            assert "10.0 ms" in done.stdout


def test_github_action_benchmark_gets_a_file_per_direction(files):
    found = {name: json.loads(text) for name, text in files("github-action-benchmark").items()}
    assert set(found) == {"customSmallerIsBetter.json", "customBiggerIsBetter.json"}
    (accuracy,) = found["customBiggerIsBetter.json"]
    assert (accuracy["name"], accuracy["unit"], accuracy["value"]) == (f"{CELL} accuracy", "%", 50.0)
    smaller = {entry["name"].rpartition(" ")[2]: entry for entry in found["customSmallerIsBetter.json"]}
    assert set(smaller) == {"adapt_time", "predict_time", "adapt_flops", "adapt_memory"}
    assert (smaller["adapt_time"]["unit"], smaller["adapt_time"]["value"]) == ("s", 0.01)
    assert smaller["adapt_time"]["range"].count("..") == 1
    for entry in (accuracy, *smaller.values()):
        assert isinstance(entry["value"], float | int)
        assert all(isinstance(entry[key], str) for key in ("name", "unit", "extra"))


def test_github_action_benchmark_gets_no_empty_list(files):
    assert list(files("github-action-benchmark", select="accuracy")) == ["customBiggerIsBetter.json"]


@pytest.mark.parametrize("select", ["", "accuracy"])
def test_github_action_benchmark_gets_a_folder_however_many_files_there_are(files, tmp_path, select):
    found = files("github-action-benchmark", select=select)
    places = write(found, "github-action-benchmark", tmp_path / "out")
    assert sorted(places) == sorted(tmp_path / "out" / name for name in found)
    assert all(json.loads(place.read_text()) for place in places)


def test_bencher_gets_latency_in_nanoseconds(files):
    found = json.loads(files("bencher")["bencher.json"])
    assert set(found) == {f"{CELL} adapt", f"{CELL} predict", CELL}
    assert set(found[f"{CELL} adapt"]) == {"latency", "flops", "memory"}
    latency = found[f"{CELL} adapt"]["latency"]
    assert latency["value"] == pytest.approx(1e7)
    assert latency["lower_value"] < latency["value"] < latency["upper_value"]
    assert found[CELL]["accuracy"]["value"] == 0.5
    for measures in found.values():
        for metric in measures.values():
            assert set(metric) <= {"value", "lower_value", "upper_value"}
            assert all(np.isfinite(number) for number in metric.values())


def test_junit_tells_failed_and_skipped_rows(files):
    (suite,) = ElementTree.fromstring(files("junit")["junit.xml"])
    counts = [suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped")]
    assert counts == ["s", "7", "0", "1", "1"]
    assert suite.find("testcase/error").get("message") == "failed: out of memory"


def test_a_csv_can_be_exported_but_not_to_pyperf(tmp_path):
    path = run(tmp_path)
    file = as_csv(path, tmp_path / "csv")
    for to in ("github-action-benchmark", "bencher", "junit"):
        assert export([file], to) == export([path], to)
    with pytest.raises(NothingRan, match="process by process, from a run's folder"):
        export([file], "pyperf")


def test_mistakes(tmp_path):
    path = run(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'bencher'"):
        export([path], "benchr")
    with pytest.raises(NothingRan):
        export([path], "junit", select="nosuch")
    with pytest.raises(ConfigError, match="cannot be written"):
        write({"a": "x"}, "bencher", path / "manifest.json" / "b")
