"""Findings as people and CI systems read them."""

from __future__ import annotations

import csv
import io
import json
import os
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench import verdict_report as out
from metabench.errors import ConfigError
from metabench.verdicts import ORDER, Absent, Control, Findings, Joint, Verdict, conclude

CELL = "maml[inner_steps=5]/omniglot[vinyals]/5w1s15q/support/cpu-float32/seed0"
OUTCOMES = ("unchanged", "improved", "regressed", "incomparable", "inconclusive")


def verdict(outcome="regressed", **more):
    settings = {"cell": CELL, "measure": "adapt_time", "scale": "ratio", "worse": 1, "change": 0.071, "low": 0.05}
    return Verdict(**{"high": 0.093, "detectable": 0.031, "margin": 0.02, **settings, "outcome": outcome, **more})


def findings(*verdicts, **more):
    return Findings(title="new against old", verdicts=verdicts or tuple(map(verdict, OUTCOMES)), **more)


FAILED = Absent(cell=CELL, measure="accuracy", status="failed", reason="out of memory")
MISSING = Absent(cell=CELL, measure="mse", status="missing", reason="the candidate has no such row")


# the gate's word and exit code


@pytest.mark.parametrize(
    ("outcomes", "absent", "fail_on", "expected"),
    [
        (["unchanged", "improved"], [], [], ("improved", 0)),
        (["unchanged", "regressed"], [FAILED], ["inconclusive"], ("regressed", 1)),
        (["unchanged"], [FAILED], [], ("failed", 3)),
        (["unchanged"], [MISSING], [], ("unchanged", 0)),
        (["unchanged"], [MISSING], ["missing"], ("missing", 4)),
        (["unchanged", "inconclusive"], [], [], ("inconclusive", 0)),
        (["unchanged", "inconclusive"], [], ["inconclusive"], ("inconclusive", 4)),
        (["unchanged", "incomparable"], [], ["inconclusive"], ("incomparable", 0)),
        (["unchanged", "incomparable"], [], ["incomparable"], ("incomparable", 4)),
        (["incomparable", "incomparable"], [], [], ("incomparable", 3)),
        (["incomparable"], [], ["incomparable"], ("incomparable", 4)),
    ],
)
def test_the_exit_code_of_a_gate(outcomes, absent, fail_on, expected):
    found = findings(*map(verdict, outcomes), absent=tuple(absent))
    assert conclude([found], fail_on) == expected


def test_moved_controls_are_said_everywhere_and_outweigh_all_but_regressions_and_failures():
    why = "controls moved: matmul by +7.1%"
    live = {"contaminated": why, "controls": (Control("matmul", 0.071, True), Control("python", 0.001, False))}
    found = findings(verdict("inconclusive"), level="99.75 %", **live)
    assert conclude([found], ["inconclusive"]) == ("contaminated", 4)
    assert conclude([findings(verdict("regressed"), **live)]) == ("regressed", 1)
    assert conclude([findings(verdict("unchanged"), absent=(FAILED,), **live)]) == ("failed", 3)
    for text in (out.render([found], "table"), out.as_markdown(found)):
        assert why in " ".join(text.split()) and "matmul +7.1 % MOVED, python +0.1 %" in " ".join(text.split())
    assert "change, 99.75 %" in out.as_markdown(found)
    (told,) = json.loads(out.as_json([found]))["comparisons"]
    assert told["contaminated"] == why and told["level"] == "99.75 %"
    assert told["controls"][0] == {"name": "matmul", "change": 0.071, "moved": True}
    line = out.annotation([found], "contaminated")
    assert line.startswith("::warning ") and "matmul by +7.1%25" in line


def test_nothing_at_all_is_no_pass():
    assert conclude([]) == ("incomparable", 3)


# words


@pytest.mark.parametrize(
    ("settings", "text", "seen"),
    [
        ({}, "+7.1 % [+5.0, +9.3]", "3.1 %"),
        (
            {"scale": "points", "change": -0.012, "low": -0.015, "high": -0.009},
            "-1.20 points [-1.50, -0.90]",
            "3.10 points",
        ),
        ({"scale": "exact", "change": 12.0, "low": None, "detectable": 1.0}, "+12", "1"),
        ({"low": None}, "+7.1 %", "3.1 %"),
        ({"change": None, "detectable": None}, "-", ""),
        ({"high": 300.0}, "+7.1 % [+5.0, >999]", "3.1 %"),
    ],
)
def test_a_change_in_words(settings, text, seen):
    row = verdict(**settings)
    assert (out.change(row), out.could_see(row)) == (text, seen)


def test_every_format_lists_flagged_rows_first_and_says_what_is_absent():
    found = findings(
        absent=(FAILED, MISSING),
        notes=("a note",),
        joint=(Joint(algorithm="maml", outcome="regressed", text="adapt 7 % slower"),),
    )
    for format in ("table", "md"):
        text = out.render([found], format)
        places = [text.index(f"{outcome}") for outcome in ORDER]
        assert min(places) == places[0]
        for word in ("out of memory", "a note", "adapt 7 % slower", "1 regressed", "1 missing"):
            assert word in text, (format, word)
    assert max(map(len, out.render([found], "table").splitlines())) <= 80
    rows = list(csv.DictReader(io.StringIO(out.render([found], "csv"))))
    assert [row["outcome"] for row in rows] == [*ORDER, "failed", "missing"]
    assert rows[0]["change"] == "0.071"
    content = json.loads(out.render([found], "json"))["comparisons"][0]
    assert (content["verdict"], content["rows"][0]["detectable"], len(content["absent"])) == ("regressed", 0.031, 2)


@pytest.mark.parametrize(
    ("outcome", "more", "fail_on", "word"),
    [
        ("unchanged", {"absent": (FAILED,)}, (), "failed"),
        ("unchanged", {"contaminated": "controls moved"}, (), "contaminated"),
        ("improved", {"absent": (MISSING,)}, ("missing",), "missing"),
        ("improved", {"absent": (MISSING,)}, (), "improved"),
        ("regressed", {"absent": (FAILED,)}, (), "regressed"),
    ],
)
def test_the_verdict_in_json_is_the_gate_s_word(outcome, more, fail_on, word):
    found = findings(verdict(outcome), **more)
    assert conclude([found], fail_on)[0] == word
    (told,) = json.loads(out.render([found], "json", fail_on=fail_on))["comparisons"]
    assert told["verdict"] == word


def test_scores_come_before_times_and_times_before_counts():
    scales = ("exact", "ratio", "points", "error", "ratio")
    found = findings(*(verdict("unchanged", scale=scale, change=0.01 * n) for n, scale in enumerate(scales)))
    assert [row.scale for row in found.sorted] == ["points", "error", "ratio", "ratio", "exact"]
    assert [row.change for row in found.sorted][2:4] == [0.04, 0.01], "the largest change first"


def test_no_text_of_a_result_becomes_a_formula():
    (row, absent) = csv.DictReader(io.StringIO(out.as_csv([findings(verdict(cell="=1+1"), absent=(FAILED,))])))
    assert row["cell"] == "'=1+1" and row["change"] == "0.071"
    assert (absent["outcome"], absent["change"], absent["reason"]) == ("failed", "", "out of memory")


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="no format 'xml'"):
        out.render([findings()], "xml")


def test_infinite_numbers_are_null_in_json():
    content = json.loads(out.render([findings(verdict(high=float("inf")))], "json"))
    assert content["comparisons"][0]["rows"][0]["high"] is None


def test_a_terminal_is_not_flooded():
    found = findings(*(verdict("unchanged") for _ in range(60)), *(verdict("regressed") for _ in range(30)))
    text = out.render([found], "table")
    assert text.count("regressed    ") == 30
    assert "... and 50 more unchanged rows" in " ".join(text.split())


# Markdown


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.integers(500, 40_000))
def test_markdown_keeps_its_cap_and_says_what_it_left_out(rows, limit):
    found = findings(*(verdict(OUTCOMES[n % 5], cell=f"{CELL}/ü{n}") for n in range(rows)), absent=(FAILED,))
    text = out.as_markdown(found, limit=limit)
    assert len(text.encode()) <= limit
    whole = out.as_markdown(found)
    if text != whole:
        assert "do not fit here" in text or "does not fit here" in text
        kept, every = (t.count("| **regressed** |") for t in (text, whole))
        assert kept == every or "| unchanged |" not in text, "flagged rows come first"


def test_markdown_escapes_what_comes_from_results():
    found = findings(verdict(reason="<img src=x> | [x](y) `z`", cell="a|b`c"))
    text = out.as_markdown(found)
    assert "<img" not in text
    row = next(line for line in text.splitlines() if "regressed**" in line)
    assert row.replace("\\|", "").count("|") == 6
    assert "\\[x\\]" in row


# CI


def test_github_gets_a_summary_a_verdict_and_one_annotation(tmp_path):
    files = {name: tmp_path / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    environ = {**{name: str(file) for name, file in files.items()}, "GITHUB_ACTIONS": "true"}
    files["GITHUB_STEP_SUMMARY"].write_text("before\n")
    many = findings(*(verdict("regressed", cell=f"{CELL}/{n}") for n in range(5)))
    line, unwritten = out.publish([many], "regressed", environ=environ)
    assert not unwritten
    assert files["GITHUB_OUTPUT"].read_text() == "verdict=regressed\n"
    assert files["GITHUB_STEP_SUMMARY"].read_text().startswith("before\n## new against old\n")
    assert line.startswith("::error title=metabench%3A regressed::5 regressed%0A")
    assert "\n" not in line
    assert "+7.1 %25" in line
    assert line.endswith("... and 2 more")


@pytest.mark.parametrize(
    ("verdict_", "start"),
    [
        ("failed", "::error "),
        ("inconclusive", "::warning "),
        ("contaminated", "::warning "),
        ("unchanged", None),
        ("improved", None),
    ],
)
def test_the_level_of_the_annotation(verdict_, start):
    line = out.annotation([findings(absent=(FAILED,))], verdict_)
    assert (line or "").startswith(start or "") and (line is None) == (start is None)


def test_outside_ci_nothing_is_written(tmp_path):
    assert out.publish([findings()], "regressed", environ={}) == (None, ())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_keeps_nothing_else_from_being_told(tmp_path):
    (tmp_path / "file").touch()
    places = {"GITHUB_OUTPUT": tmp_path / "output", "GITHUB_STEP_SUMMARY": tmp_path / "summary"}
    for broken in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "junit"):
        files = {**places, "junit": tmp_path / "junit.xml"}
        for file in files.values():
            file.unlink(missing_ok=True)
        files[broken] = tmp_path / "file" / "below"
        environ = {"GITHUB_ACTIONS": "true", **{name: str(file) for name, file in files.items() if name != "junit"}}
        with pytest.raises(ConfigError, match="below: cannot be written"):
            out.check_places(files["junit"], environ=environ)
        told = out.publish([findings()], "regressed", files["junit"], environ=environ)
        assert told.annotation.startswith("::error ")
        assert len(told.unwritten) == 1 and "below: cannot be written" in told.unwritten[0]
        assert all(file.stat().st_size for name, file in files.items() if name != broken)
        assert out.publish_error("no", files["junit"], environ=environ).startswith("::error ")


def test_a_trial_leaves_what_is_written_already_and_no_pipe_is_opened(tmp_path):
    summary = tmp_path / "summary"
    summary.write_text("before\n")
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for a reader
    out.check_places(tmp_path / "pipe", environ={"GITHUB_STEP_SUMMARY": str(summary)})
    assert summary.read_text() == "before\n"


def test_the_summary_never_outgrows_github_s_cap(tmp_path):
    file = tmp_path / "summary"
    file.write_text("x" * (out.SUMMARY_BYTES - 5000))
    many = findings(*(verdict("unchanged", cell=f"{CELL}/{n}") for n in range(200)), verdict("regressed"))
    out.publish([many, many], "regressed", environ={"GITHUB_STEP_SUMMARY": str(file)})
    text = file.read_text()
    assert out.SUMMARY_BYTES - 3000 < len(text.encode()) <= out.SUMMARY_BYTES
    assert "| **regressed** |" in text
    assert "more rows do not fit here" in text


def test_junit_has_a_case_per_row():
    found = findings(absent=(FAILED, MISSING, Absent(cell=CELL, measure="x", status="new")))
    root = ElementTree.fromstring(out.as_junit([found]))
    (suite,) = root
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "8", "failures": "1", "errors": "1", "skipped": "3"}
    kinds = [case[0].tag for case in suite]
    assert kinds == ["failure", "skipped", "skipped", "system-out", "system-out", "error", "skipped", "system-out"]
    assert suite[0].get("classname") == CELL
    assert "+7.1 %" in suite[0][0].get("message")


def test_junit_holds_only_what_xml_can(tmp_path):
    file = tmp_path / "deep/report.xml"
    out.write_junit(file, [findings(verdict(reason="\x1b[31m<&>\x00", cell="ü\x07"))])
    root = ElementTree.parse(file).getroot()
    assert root[0][0].get("classname") == "ü?"
    with pytest.raises(ConfigError, match="cannot be written"):
        out.write_junit(tmp_path, [findings()])
