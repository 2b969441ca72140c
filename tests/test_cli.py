"""The command line: bad input gets one clear message, a documented exit code, and loses nothing."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from conftest import environ, metabench, started, write_learner, write_suite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_runs import Stored

from metabench import cli
from metabench import compare as comparison
from metabench.report.model import RESULT_COLUMNS
from metabench.store import Run


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; anything but an exit with a code is a failure."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["metabench", *map(str, arguments)])
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(logging, "raiseExceptions", False)  # pooch's log holds on to a stream of another test
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=said.out, err=said.err)

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def refused(done, *words):
    """Exit code 2, and one message on standard error that has these words."""
    assert done.code == 2, (done.out, done.err)
    text = " ".join(done.err.split())
    assert all(word in text for word in words), done.err
    assert "Traceback" not in done.err
    assert not done.out


# --- suites -----------------------------------------------------------------------------------------------------


def test_a_suite_that_is_not_there(call, tmp_path):
    refused(call("run", "smokee", "--out", tmp_path), "unknown suite: 'smokee' (did you mean 'smoke'?)")
    refused(call("run", tmp_path / "no.yaml", "--out", tmp_path), "no such suite file")
    refused(call("run", "", "--out", tmp_path))
    refused(call("run", "a" * 5000, "--out", tmp_path))
    refused(call("validate", "a/" * 3000 + "b.yaml"))
    assert not list(tmp_path.iterdir())


def test_a_suite_that_is_a_folder(call, tmp_path):
    refused(call("run", tmp_path), str(tmp_path), "is a folder")


def test_a_suite_of_100_megabytes(call, tmp_path):
    file = tmp_path / "huge.yaml"
    with file.open("wb") as handle:
        handle.truncate(100_000_000)
    refused(call("run", file), "100,000,000 bytes")


@pytest.mark.parametrize(
    "text",
    ["", "a", "[", "{a: b", "a: b: c", "\t- x", "- 1\n- 2", "5", "null", "---\n---\n", "&a [*a]", "? [1]: 2", "%YAML 9",
     "suite: ../x\ngrid: {}", "grid: 7", "cells: [[]]", "!!python/object/apply:os.system [ls]", "\x00", "a: !!int x",
     "threads: 100000",
     "suite: x\ngrid: {tasks: [], algorithms: []}", "grid: {tasks: [{dataset: glyphs}], algorithms: [protonet]}"],
)  # fmt: skip
def test_a_broken_suite(call, tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    for command in ("validate", "run"):
        refused(call(command, file), "broken.yaml")


GOOD = """
grid:
  tasks: [{dataset: glyphs, ways: 5, shots: 1, queries: 5}]
  algorithms: [protonet]
train: {steps: 3}
evaluation: {episodes: 5}
"""
ODD = ["-1", "0", "1.5", "1e400", ".nan", ".inf", "''", "[]", "{}", "~", "true", "9" * 40, "[1, [2]]", "{a: 1}", "ü"]


@pytest.mark.parametrize(
    "key", ["ways: 5", "shots: 1", "queries: 5", "steps: 3", "episodes: 5", "[protonet]", "glyphs"]
)
def test_odd_values_are_told_with_the_line(call, tmp_path, key):
    file = tmp_path / "odd.yaml"
    file.write_text(GOOD)
    assert call("validate", file).code == 0
    for value in ODD:
        name, _, _ = key.rpartition(" ")
        file.write_text(GOOD.replace(key, f"{name} {value}" if name else value))
        done = call("validate", file)
        assert done.code in (0, 2), done.err
        assert done.code == 0 or "odd.yaml:" in done.err


def test_several_suites_are_checked_to_the_last(call, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "odd.yaml").write_text(GOOD.replace("ways: 5", "ways: -1"))
    done = call("validate", tmp_path / "odd.yaml", "nosuch", tmp_path / "good.yaml")
    assert done.code == 2 and "good.yaml: good;" in done.out
    assert "odd.yaml:" in done.err and "nosuch" in done.err


def test_every_mistake_at_once(call, tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text(GOOD.replace("protonet", "protonett").replace("steps", "stepps").replace("ways", "wayz"))
    done = call("run", file, "--out", tmp_path)
    refused(done, "m.yaml:3", "m.yaml:4", "m.yaml:5", "did you mean 'protonet'", "did you mean 'steps'")


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "smoke", "--device", "tpu"], "choose auto, cpu or cuda"),
        (["run", "smoke", "--seeds", ""], "--seeds"),
        (["run", "smoke", "--seeds", "0,"], "--seeds"),
        (["run", "smoke", "--seeds", "1,1"], "each once"),
        (["run", "smoke", "--seeds", "-1"], "0 or more"),
        (["run", "smoke", "--seeds", "9" * 5000], "--seeds"),
        (["run", "smoke", "--seeds", str(2**63)], "below 2**63"),
        (["run", "smoke", "--jobs", "0"], "--jobs"),
        (["run", "smoke", "smoke", "--extend", "x"], "--extend"),
        (["run", "--nope"], "--nope"),
        (["nope"], "nope"),
        (["ls", "algorithm"], "did you mean 'algorithms'"),
        (["validate"], "name a suite"),
        (["report", "nowhere"], "not a run folder"),
        (["report"], "RUN"),
        (["data", "fetch", "nope"], "unknown data set"),
        (["data", "fetch", "glyphs"], "embedded"),
        (["data", "verify", "sinusoid"], "embedded"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(call, arguments, word):
    refused(call(*arguments), word)


WORDS = ["run", "ls", "validate", "report", "data", "verify", "smoke", "--plan", "-k", "--seeds", "--json", "-f"]
WORDS += ["--schema", "--extend", "--device", "cpu", "all"]
WORDS += ["", "0", "-1", "--", "[red]", "é", "/dev/null", "."]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_no_words_bring_a_traceback(call, words):
    plan = ["--plan"] if words[:1] == ["run"] else []  # nothing is to be run here
    done = call(*words[:1], *plan, *words[1:])
    assert done.code in (0, 2, 3), (words, done.err)
    assert "Traceback" not in done.err


def test_names_that_are_no_unicode(tmp_path):
    odd = os.fsdecode(b"\xff")
    for arguments in (["run", odd], ["report", odd], ["ls", odd], [odd], ["run", "smoke", "--plan", "--out", odd]):
        done = metabench(*arguments, cwd=tmp_path)
        assert done.returncode == (0 if "--plan" in arguments else 2), done.stderr


def test_no_arguments_show_the_commands(call):
    done = call()
    assert "validate" in done.out + done.err


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "file/below", "/dev/null", "/dev/full", "/proc/nothing"])
def test_an_output_folder_that_cannot_be(call, tmp_path, where):
    (tmp_path / "file").touch()
    refused(call("run", "smoke", "--out", where if where.startswith("/") else tmp_path / where), "--out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(call, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o500)
    refused(call("run", "smoke", "--out", folder), "Permission denied", "--out")
    folder.chmod(0)
    refused(call("run", "smoke", "--out", folder))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
@pytest.mark.parametrize("arguments", [["ls"], ["run", "smoke", "--plan"], ["validate", "smoke"]], ids=" ".join)
def test_standard_output_on_a_full_disk(arguments):
    command = [sys.executable, "-m", "metabench", *arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ(), check=False)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_is_no_failure():
    command = [sys.executable, "-m", "metabench", "run", "smoke", "--plan"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environ(), check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_run_whose_progress_nobody_reads_goes_on(tmp_path):
    command = [sys.executable, "-m", "metabench", "run", "smoke", "-k", "chance", "--out", tmp_path]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=write, text=True, env=environ(), check=False)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "smoke" / "latest" / "results.csv").read_text().count(",chance,") == 5


def test_an_ascii_terminal_gets_escapes():
    done = metabench("ls", "algorithms", env=environ(PYTHONIOENCODING="ascii", COLUMNS="60"))
    assert done.returncode == 0
    assert done.stdout.isascii()


# --- run folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    manifest = {"suite": "smoke", "controls": [], "cells": {}, "rows": [], "evaluation": {}, "reference": None}
    return Run.create(tmp_path, "smoke", manifest).path


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "damaged"), ("[]", "damaged"), ('{"schema_version": 2}', "schema 2"), ('{"schema_version": 1}', "lacks")],
)
def test_a_run_of_another_schema_or_damaged(call, folder, text, word):
    (folder / "manifest.json").write_text(text)
    refused(call("report", folder), word)
    refused(call("run", "smoke", "--extend", folder), word)
    assert (folder / "manifest.json").read_text() == text
    done = call("run", "smoke", "--out", folder.parent.parent, "--plan")  # it is passed over, not written to
    assert done.code == 0


def test_a_damaged_line_in_a_run(call, folder):
    (folder / "measurements.jsonl").write_text('{"x": 1}\n')
    refused(call("report", folder), "measurements.jsonl:1")
    refused(call("run", "smoke", "--extend", folder, "--plan"), "measurements.jsonl:1")


def test_two_runs_at_once(call, folder):
    with Run.open(folder).writing():
        refused(call("run", "smoke", "--out", folder.parent.parent), "another metabench is writing this run")


def test_an_unknown_format_and_reference(call, folder):
    refused(call("report", folder, "-f", "mdd"), "did you mean 'md'")


def test_a_report_of_an_empty_run_is_a_header(call, folder):
    done = call("report", folder, "-f", "csv")
    assert done.code == 0
    assert done.out.splitlines() == [",".join(RESULT_COLUMNS)]


# --- verdicts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sides(tmp_path):
    """Runs of counts by name: the base, an equal one, one that is worse, one of accuracies alone."""
    made = {"base": Stored().count(10), "equal": Stored().count(10), "worse": Stored().count(11)}
    made["scores"] = Stored().quality([0.5, 0.25, 0.75])
    return {name: run.at(tmp_path, name) for name, run in made.items()}


def question(sides, candidate, *more):
    """A check of stored results, in words."""
    return ["check", "--baseline", sides["base"], "--candidate", sides[candidate], *more]


@pytest.mark.parametrize(("candidate", "code"), [("worse", 1), ("equal", 0)])
@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"]], ids=" and ".join)
def test_a_check_whose_reader_has_enough_keeps_its_verdict(sides, tmp_path, candidate, code, closed):
    told = {"GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    command = [sys.executable, "-m", "metabench", *question(sides, candidate, "--junit", tmp_path / "junit.xml")]
    read, write = os.pipe()
    os.close(read)
    streams = {"stderr": subprocess.PIPE, **dict.fromkeys(closed, write)}
    done = subprocess.run([*map(str, command)], **streams, text=True, env=environ(**told), check=False)
    os.close(write)
    assert done.returncode == code, done.stderr
    verdict = "regressed" if code else "unchanged"
    assert (tmp_path / "output").read_text() == f"verdict={verdict}\n"
    assert verdict in (tmp_path / "summary").read_text()
    assert f'failures="{code}"' in (tmp_path / "junit.xml").read_text()
    assert done.stderr is None or done.stderr.endswith(f"verdict: {verdict}\n")


def test_compare_whose_reader_has_enough_is_no_failure(sides):
    command = [sys.executable, "-m", "metabench", "compare", str(sides["base"]), str(sides["worse"])]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environ(), check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("wrong", ["5 per cent", "-1", "5%,5%"])
def test_a_slowdown_that_is_none_is_refused_before_anything_is_measured(call, wrong):
    refused(call("selftest", "kernels-smoke", "--inject", wrong), f"--inject {wrong}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
@pytest.mark.parametrize(("candidate", "code"), [("worse", 1), ("equal", 2)])
def test_a_verdict_that_cannot_be_printed_stands_and_a_pass_is_an_error(sides, tmp_path, candidate, code):
    command = [sys.executable, "-m", "metabench", *map(str, question(sides, candidate))]
    told = environ(GITHUB_OUTPUT=str(tmp_path / "output"))
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=told, check=False)
    assert done.returncode == code, done.stderr
    assert "No space left" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "output").read_text() == f"verdict={'regressed' if code == 1 else 'unchanged'}\n"


@pytest.mark.parametrize("name", ["GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"])
def test_a_file_that_cannot_be_written_is_found_before_the_check(call, sides, tmp_path, monkeypatch, name):
    compared = []
    monkeypatch.setattr("metabench.compare.compare", lambda *sides, **options: compared.append(sides))
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file" / "below"))
    refused(call(*question(sides, "worse")), "below: cannot be written")
    assert not compared


@pytest.mark.parametrize(("candidate", "code"), [("worse", 1), ("equal", 2)])
def test_a_file_that_cannot_be_written_in_the_end_leaves_a_verdict_s_code(
    call, sides, tmp_path, monkeypatch, candidate, code
):
    junit, output = tmp_path / "reports/junit.xml", tmp_path / "output"
    compare = comparison.compare

    def and_spoil(*sides, **options):
        junit.unlink()
        junit.mkdir()
        return compare(*sides, **options)

    monkeypatch.setattr(comparison, "compare", and_spoil)
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    done = call(*question(sides, candidate, "--junit", junit))
    verdict = "regressed" if code == 1 else "unchanged"
    assert (done.code, output.read_text()) == (code, f"verdict={verdict}\n")
    assert verdict in done.out
    assert "error: " in done.err and "junit.xml: cannot be written" in done.err
    assert done.err.endswith(f"verdict: {verdict}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure-identical"], "--measure-identical: for a live check"),
        (["--data-root", "."], "--data-root: for a live check"),
        (["--measure-identical", "--data-root", "."], "--measure-identical and --data-root: for a live check"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_a_live_check_minds_is_refused_for_stored_results(call, sides, words, said):
    refused(call(*question(sides, "equal", *words)), said)


def test_a_folder_with_data_from_the_environment_is_for_all_commands(call, sides, monkeypatch):
    monkeypatch.setenv("METABENCH_DATA", "somewhere")
    assert call(*question(sides, "equal")).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "HEAD", "--base-python", "python"], "--base and --base-python ask for two comparisons"),
        (["--base", "HEAD", "--fail-on", "inconclusive,missing"], "--fail-on missing is for stored results"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_live_check_cannot_mind_is_refused(call, words, said):
    refused(call("check", "kernels-smoke", *words), said)


def test_the_verdict_in_json_minds_fail_on(call, sides):
    done = call(*question(sides, "scores", "-f", "json"))
    assert done.code == 3  # nothing in common
    done = call(*question(sides, "equal", "-f", "json"))
    assert json.loads(done.out)["comparisons"][0]["verdict"] == "unchanged"
    both = call("check", "--baseline", sides["base"], "--baseline", sides["scores"], *question(sides, "equal")[3:],
                "-f", "json", "--fail-on", "missing")  # fmt: skip
    assert (both.code, json.loads(both.out)["comparisons"][0]["verdict"]) == (4, "missing")


def test_a_folder_is_a_folder_for_one_file_too(call, sides, tmp_path):
    done = call("export", sides["scores"], "--to", "github-action-benchmark", "--out", tmp_path / "out")
    assert done.code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["customBiggerIsBetter.json"]
    again = call("export", sides["base"], "--to", "github-action-benchmark", "--out", tmp_path / "out")
    assert (again.code, len([*(tmp_path / "out").iterdir()])) == (0, 2)
    refused(call("export", sides["scores"], "--to", "github-action-benchmark"), "name a folder for them with --out")


# --- data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("METABENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METABENCH_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody there: no network
    (tmp_path / "data").mkdir()
    return tmp_path


def test_a_data_root_without_data_says_what_to_run(no_data, call):
    done = call("data", "ls")
    assert done.code == 0
    assert "missing" in done.out
    refused(call("data", "verify", "omniglot"), "metabench data fetch omniglot")
    done = call("data", "ls", "--data-root", no_data / "nowhere")
    assert done.code == 0


def test_without_a_network_a_download_is_one_message(no_data, call):
    refused(call("data", "fetch", "omniglot"), "omniglot")


def archives(folder, spoil):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("images_background/A/character01/0001_01.png", b"no picture")
    for name in ("images_background.zip", "images_evaluation.zip"):
        target = folder / "data" / "omniglot" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(spoil(content.getvalue()))


@pytest.mark.parametrize(
    "spoil", [lambda b: b, lambda b: b[: len(b) // 2], lambda b: b""], ids=["altered", "cut", "empty"]
)
def test_an_archive_that_is_not_the_real_one(no_data, call, spoil):
    archives(no_data, spoil)
    for verb in ("fetch", "verify"):
        refused(call("data", verb, "omniglot"), "images_background.zip")


def test_cells_without_their_data_are_rows_that_say_what_to_run(no_data):
    suite = no_data / "needs.yaml"
    text = GOOD.replace("glyphs", "omniglot").replace("[protonet]", "[chance]") + "measures: [accuracy]\n"
    suite.write_text(text + "controls: false\n")
    done = metabench("run", suite, "--out", no_data / "out")
    assert done.returncode == 3
    (row,) = Run.open(no_data / "out" / "needs" / "latest").measurements().values()
    assert row.status == "failed"
    assert "metabench data fetch omniglot" in row.reason
    assert "metabench data fetch omniglot" in done.stderr


# --- signals and terminals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_outside_training_is_130(tmp_path, number):
    write_learner(tmp_path, "slow")
    (tmp_path / "slow.py").write_text((tmp_path / "slow.py").read_text() + "\ntime.sleep(0.3)\n")
    suite = write_suite(tmp_path, "s", ["slow"])
    with started("run", suite, "--out", tmp_path / "out") as process:
        assert "rows" in process.stderr.readline()  # the worker is only starting
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err


def test_on_a_terminal_there_are_bars_with_what_is_left(tmp_path):
    write_learner(tmp_path, "learner")
    suite = write_suite(tmp_path, "s", ["learner"], "\nmeasures: [accuracy]\n")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "metabench", "run", str(suite), "--out", str(tmp_path / "out")]
    variables = environ(TERM="xterm", CI="", NO_COLOR="1")
    variables.pop("CI")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=variables)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        seen += part
        if not part:
            break
    os.close(ours)
    assert process.wait(30) == 0
    text = seen.decode(errors="replace")
    assert "rows" in text
    assert "0/2" in text
    assert ":" in text.partition("0/2")[2][:30]  # the time that is left, or --:--
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_the_summary_for_continuous_integration(tmp_path, monkeypatch, call, folder):
    from metabench.cli.runs import _derive

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    _derive(Run.open(folder))
    assert (tmp_path / "summary.md").read_text() == (folder / "report.md").read_text()


def test_algorithms_are_listed_by_family_with_their_papers(call):
    lines = call("ls", "algorithms").out.splitlines()
    families = [line.strip() for line in lines if line[1] != " "]
    assert families == ["metric", "model", "optimisation", "transfer", "control"]
    found = json.loads(call("ls", "algorithms", "--json").out)["algorithms"]
    shown = {line.split()[0] for line in lines if line[1] == " "}
    assert shown == {one["name"] for one in found}
    under = {line.split()[0]: line for line in lines[lines.index(" model") : lines.index(" optimisation")]}
    assert "(Santoro et al. 2016)" in under["mann"]


def test_listings_for_machines(call):
    found = json.loads(call("ls", "--json").out)
    assert {"algorithms", "datasets", "backbones", "suites"} <= found.keys()
    assert json.loads(call("validate", "--schema").out)["$schema"]
    assert call("--version").out.startswith("metabench ")
