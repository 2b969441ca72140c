"""The commands compare, check and export: what they print, and the documented exit codes."""

from __future__ import annotations

import json
import logging
import signal
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import metabench
from stored_runs import MACHINE, Stored

from metabench import cli

SCORES = np.random.default_rng(0).uniform(0.5, 1, 200)


@pytest.fixture
def runs(tmp_path):
    """Runs by name: the base, an equal one, one that is worse, and such that cannot be compared."""
    other = {"environment": "e2", "machine": {**MACHINE, "cpu": "Model B"}}
    made = {
        "base": Stored().quality(SCORES).count(10),
        "equal": Stored().quality(SCORES).count(10),
        "worse": Stored().quality(SCORES - 0.1).count(11),
        "failed": Stored()
        .count(10)
        .row(Stored().quality(SCORES).rows[0][0].cell, "accuracy", status="failed", reason="x"),
        "retrained": Stored().quality(SCORES - 0.1, code="new").count(10),
        "suite": Stored("another").quality(SCORES),
        "timed": Stored().time([1.0, 1.1]),
        "elsewhere": Stored(**other).time([1.0, 1.1]),
    }
    return {name: run.at(tmp_path, name) for name, run in made.items()}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: starting one costs a second."""

    def run(*words, **env):
        for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITHUB_ACTIONS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["metabench", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *words, **env: _named(run(*words, **env))
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger().handlers.clear()


def _named(done):
    return SimpleNamespace(returncode=done.returncode, stdout=done.out, stderr=done.err)


@pytest.fixture
def check(command, runs):
    def run(base, candidate, *options, **env):
        return command("check", "--baseline", runs[base], "--candidate", runs[candidate], *options, **env)

    return run


def test_the_gate_s_exit_codes(check, tmp_path):
    assert check("base", "equal").returncode == 0
    done = check("base", "worse", "--junit", tmp_path / "junit.xml")
    assert done.returncode == 1
    assert "2 regressed" in done.stdout
    assert done.stderr.endswith("verdict: regressed\n")
    assert ElementTree.parse(tmp_path / "junit.xml").getroot()[0].get("failures") == "2"
    failed = check("base", "failed")
    assert (failed.returncode, "failed: maml" in failed.stdout) == (3, True)
    assert check("base", "retrained").returncode == 0
    assert check("base", "retrained", "--fail-on", "missing, inconclusive").returncode == 4
    elsewhere = check("timed", "elsewhere")
    assert (elsewhere.returncode, "cpu Model A -> Model B" in " ".join(elsewhere.stdout.split())) == (3, True)
    assert check("timed", "elsewhere", "--fail-on", "incomparable").returncode == 4


def test_bad_input_is_one_message_and_its_code(check, runs, command):
    (runs["worse"] / "measurements.jsonl").write_text('{"cell": 1\n')
    for words, code, said in (
        (("base", "suite"), 2, "compare results of one suite"),
        (("base", "worse"), 2, "measurements.jsonl:1: damaged line"),
        (("base", "equal", "-k", "nosuch"), 3, "no measured row whose"),
        (("base", "timed"), 3, "none in common"),
        (("base", "equal", "--fail-on", "inconclusiv"), 2, "did you mean 'inconclusive'?"),
        (("base", "equal", "--format", "xml"), 2, "no format 'xml'"),
    ):
        done = check(*words)
        assert (done.returncode, said in done.stderr, done.stdout) == (code, True, ""), (words, done.stderr)
        assert done.stderr.count("error:") == 1
    assert command("check", "--baseline", runs["base"]).returncode == 2


def test_github_is_told(check, tmp_path):
    files = {name: str(tmp_path / name) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    done = check("base", "worse", "-f", "json", GITHUB_ACTIONS="true", **files)
    assert json.loads(done.stdout)["comparisons"][0]["verdict"] == "regressed"
    assert [line for line in done.stderr.splitlines() if line.startswith("::error title=metabench")]
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == "verdict=regressed\n"
    assert "**regressed**" in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("base", "equal", "-k", "nosuch"), 3, "no measured row"),
        (("base", "suite"), 2, "compare results of one suite"),
        (("base", "equal", "--fail-on", "inconclusiv"), 2, "did you mean"),
        (("base", "equal", "--format", "xml"), 2, "no format 'xml'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_check_that_ends_in_an_error_tells_github_and_junit_so(check, tmp_path, words, code, said):
    files = {name: str(tmp_path / name) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    done = check(*words, "--junit", tmp_path / "junit.xml", GITHUB_ACTIONS="true", **files)
    assert (done.returncode, said in done.stderr) == (code, True)
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == "verdict=error\n"
    assert "**error**: " in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert [line for line in done.stderr.splitlines() if line.startswith("::error title=metabench%3A error::")]
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("errors"), said in suite[0][0].get("message")) == ("1", "1", True)


def test_a_live_check_that_cannot_start_says_error_too(command, tmp_path):
    done = command("check", "kernels-smoke", "--base", "no-such-revision", GITHUB_OUTPUT=str(tmp_path / "out"))
    assert (done.returncode, (tmp_path / "out").read_text()) == (2, "verdict=error\n")


def test_where_the_error_is_the_file_itself_the_message_stays_one(check, tmp_path):
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file/junit.xml"
    done = check("base", "equal", "--junit", nowhere, GITHUB_OUTPUT=str(tmp_path / "out"))
    assert (done.returncode, done.stderr.count("cannot be written")) == (2, 1)
    assert (tmp_path / "out").read_text() == "verdict=error\n"


def test_only_some_kinds_of_measures_and_several_in_one_family(check, runs, command):
    def measures(done):
        return {row["measure"] for row in json.loads(done.stdout)["comparisons"][0]["rows"]}

    assert measures(check("base", "worse", "-f", "json", "--only", "counts")) == {"adapt_flops"}
    assert measures(check("base", "worse", "-f", "json", "--only", "counts, accuracy")) == {"adapt_flops", "accuracy"}
    assert check("base", "worse", "--only", "mse,time").returncode == 3
    done = check("base", "worse", "--only", "acuracy")
    assert (done.returncode, "did you mean 'accuracy'?" in done.stderr) == (2, True)
    compared = command("compare", runs["base"], runs["worse"], "-f", "json", "--only", "accuracy")
    assert measures(compared) == {"accuracy"}
    live = command("check", "kernels-smoke", "--base", "HEAD", "--only", "counts")
    assert (live.returncode, "--only and --margin are for stored results" in live.stderr) == (2, True)


def test_a_margin_in_the_place_of_the_suite_s(check):
    strict, wide = (("--margin", f"accuracy={size}", "--only", "accuracy") for size in ("0.5 points", "30 points"))
    assert check("base", "worse", *strict).returncode == 1
    done = check("base", "worse", *wide, "-f", "json")
    (found,) = json.loads(done.stdout)["comparisons"]
    assert (done.returncode, found["verdict"], found["rows"][0]["margin"]) == (0, "unchanged", 0.3)
    assert "margins as asked for here: accuracy 30 points" in found["notes"]
    for text, said in (("acuracy=1 point", "did you mean 'accuracy'?"), ("accuracy=1%", "looks like '0.5 points'")):
        done = check("base", "worse", "--margin", text)
        assert (done.returncode, said in done.stderr) == (2, True)


def test_compare_informs_and_never_fails(runs, command):
    done = command("compare", runs["base"], runs["worse"], runs["equal"], "-f", "json")
    assert done.returncode == 0
    assert [one["verdict"] for one in json.loads(done.stdout)["comparisons"]] == ["regressed", "unchanged"]
    wide = command("compare", runs["timed"], runs["elsewhere"], "--across-machines")
    assert "1 inconclusive" in wide.stdout
    assert max(map(len, wide.stdout.splitlines())) <= 80


def test_as_a_process_it_does_the_same(runs):
    done = metabench("check", "--baseline", runs["base"], "--candidate", runs["worse"])
    assert (done.returncode, "2 regressed" in done.stdout) == (1, True)


def test_export_prints_one_file_and_writes_several(runs, command, tmp_path):
    assert "accuracy" in command("export", runs["base"], "--to", "bencher").stdout
    two = command("export", runs["base"], "--to", "github-action-benchmark")
    assert (two.returncode, "name a folder for them with --out" in two.stderr) == (2, True)
    done = command("export", runs["base"], "--to", "github-action-benchmark", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "customBiggerIsBetter.json",
        "customSmallerIsBetter.json",
    ]
    assert len(done.stdout.splitlines()) == 2
    assert command("export", runs["base"], "--to", "pyperf").returncode == 3
    unknown = command("export", runs["base"], "--to", "pyperg")
    assert (unknown.returncode, "did you mean 'pyperf'?" in unknown.stderr) == (2, True)
