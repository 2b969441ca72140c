"""Findings as people and CI systems read them: a table, Markdown, CSV, JSON, JUnit XML, and what GitHub listens to.

Flagged rows come first everywhere. Nothing here decides anything, and nothing is left out silently: where a reader
has a limit, what did not fit is counted.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metabench.errors import ConfigError, did_you_mean
from metabench.spreadsheet import table
from metabench.verdicts import ORDER, Absent, Findings, Outcome, Scale, Verdict, conclude

FORMATS = ("table", "md", "csv", "json")
SCHEMA_VERSION = 1
SUMMARY_BYTES = 1024 * 1024  # GitHub aborts the upload of a longer summary
OUTPUT, SUMMARY = "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"
BRIEF, BRIEF_ROWS = ("inconclusive", "incomparable", "unchanged"), 10  # how many of these a terminal is shown
FIELDS = (
    "outcome", "cell", "measure", "change", "low", "high", "margin", "detectable", "scale", "small", "reason",
)  # fmt: skip
STYLES: Mapping[Outcome, str] = {
    "regressed": "bold red",
    "inconclusive": "yellow",
    "incomparable": "yellow",
    "improved": "green",
    "unchanged": "",
}
_UNPRINTABLE = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def render(findings: Sequence[Findings], format: str, *, width: int = 80, fail_on: Collection[str] = ()) -> str:
    """The findings as text: table (at most `width` columns), md, csv or json, whose verdict minds `fail_on`.

    Raises:
        ConfigError: another format.
    """
    check_format(format)
    if format == "csv":
        return as_csv(findings)
    if format == "json":
        return as_json(findings, fail_on)
    if format == "md":
        return "\n".join(as_markdown(one) for one in findings)
    console = Console(width=width, file=io.StringIO(), highlight=False, emoji=False, color_system=None)
    show(findings, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def check_format(format: str) -> None:
    """Raise ConfigError for what is no format."""
    if format not in FORMATS:
        raise ConfigError(f"no format {format!r}{did_you_mean(format, FORMATS)}")


# for a terminal


def show(findings: Sequence[Findings], console: Console) -> None:
    """Print the findings: counts, joint verdicts, flagged rows, then some of the others."""
    for one in findings:
        console.print(Text(one.title, style="bold"))
        console.print(Text(counted(one)))
        if one.contaminated:
            console.print(Text(f"contaminated: {one.contaminated}", style="bold red"))
        _show_joint(one, console)
        _show_rows(one, console)
        others = [absent for absent in one.absent if not absent.failed]
        for absent in (*one.failed, *others[:BRIEF_ROWS]):
            style = "red" if absent.failed else "dim"
            console.print(Text(f"{absent.status}: {absent.cell} {absent.measure}: {absent.reason}", style=style))
        if len(others) > BRIEF_ROWS:
            console.print(Text(f"... and {len(others) - BRIEF_ROWS} more missing or new rows."))
        for note in notes(one):
            console.print(Text(f"{note}.", style="dim"))
        console.print()


def _show_joint(one: Findings, console: Console) -> None:
    if not one.joint:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=30)
    table.add_column(overflow="fold")
    for joint in sorted(one.joint, key=lambda j: ORDER.index(j.outcome)):
        table.add_row(Text(joint.algorithm, style=STYLES[joint.outcome]), Text(joint.text))
    console.print(table)
    console.print()


def _show_rows(one: Findings, console: Console) -> None:
    """Per row a line of numbers and, below it, the cell and the reason: ids are longer than columns can be."""
    seen: dict[Outcome, int] = {}
    for row in one.sorted:
        seen[row.outcome] = seen.get(row.outcome, 0) + 1
        if row.outcome in BRIEF and seen[row.outcome] > BRIEF_ROWS:
            continue
        line = Text(f"{row.outcome:<13}", style=STYLES[row.outcome])
        line.append(f"{row.measure:<16} {change(row):<26}", style="")
        line.append(f" could see {could_see(row)}" if row.detectable is not None else "", style="dim")
        console.print(line)
        below = f"{row.cell}{': ' if row.reason else ''}{row.reason}{'; small' * row.small}"
        console.print(Text(below, style="dim", overflow="fold"), soft_wrap=False)
    cut = [f"{count - BRIEF_ROWS} more {kind}" for kind, count in seen.items() if kind in BRIEF and count > BRIEF_ROWS]
    if cut:
        console.print(Text(f"... and {', '.join(cut)} rows: --format md or csv has all."))


# wording


def counted(one: Findings) -> str:
    """'2 regressed, 1 inconclusive, 40 unchanged; 1 missing'."""
    outcomes = [row.outcome for row in one.verdicts]
    parts = [f"{outcomes.count(kind)} {kind}" for kind in ORDER if kind in outcomes]
    absent = [row.status for row in one.absent]
    others = [f"{absent.count(status)} {status}" for status in dict.fromkeys(absent)]
    return "; ".join(", ".join(part) for part in (parts, others) if part) or "nothing compared"


def change(row: Verdict) -> str:
    """'+7.1 % [+5.0, +9.3]', '-1.20 points [-1.50, -0.90]', '+12'."""
    if row.change is None:
        return "-"
    if row.scale == "exact":
        return f"{row.change:+.0f}"
    text = _with_unit(row.change, row.scale)
    if row.low is None or row.high is None:
        return text
    return f"{text} [{_hundredths(row.low, row.scale)}, {_hundredths(row.high, row.scale)}]"


def could_see(row: Verdict) -> str:
    """The smallest change that the comparison would have found: '3.1 %', '0.80 points', '1'."""
    if row.detectable is None:
        return ""
    if row.scale == "exact":
        return f"{row.detectable:.0f}"
    return _with_unit(row.detectable, row.scale).lstrip("+")


def _with_unit(value: float, scale: Scale) -> str:
    return f"{_hundredths(value, scale)} {'points' if scale == 'points' else '%'}"


def _hundredths(value: float, scale: Scale) -> str:
    if not math.isfinite(value) or abs(value) >= 10:
        return ">999" if value > 0 else "<-999"
    return f"{100 * value:+.2f}" if scale == "points" else f"{100 * value:+.1f}"


def notes(one: Findings) -> list[str]:
    """What holds for all rows; for a live check also how its controls stood."""
    stood = [f"{c.name} {100 * c.change:+.1f} %{' MOVED' * c.moved}" for c in one.controls]
    return [*one.notes, *([f"controls: {', '.join(stood)}"] if stood else [])]


# files


def as_markdown(one: Findings, limit: int | None = None) -> str:
    """The findings as Markdown of at most `limit` bytes; rows that do not fit are counted."""
    head = [f"## {_escaped(one.title)}", "", counted(one) + ".", ""]
    if one.contaminated:
        head += [f"**contaminated**: {_escaped(one.contaminated)}.", ""]
    if one.joint:
        head += ["| algorithm | together |", "|---|---|"]
        joint = sorted(one.joint, key=lambda j: ORDER.index(j.outcome))
        head += [f"| {_escaped(j.algorithm)} | **{j.outcome}**: {_escaped(j.text)} |" for j in joint]
        head += [""]
    tail = ["", *(f"- {_escaped(note)}." for note in notes(one))]
    absent = [
        f"| {a.status} | {_escaped(a.measure)} | | | `{_code(a.cell)}` {_escaped(a.reason)} |" for a in one.absent
    ]
    failed = [line for line, row in zip(absent, one.absent, strict=True) if row.failed]
    others = [line for line, row in zip(absent, one.absent, strict=True) if not row.failed]
    table = [f"| verdict | measure | change, {one.level} | could see | cell, why |", "|---|---|---|---|---|"]
    rows = [*failed, *map(_markdown_row, one.sorted), *others]
    fitting = rows if limit is None else _fitting(rows, limit - _size([*head, *table, *tail]) - 200)
    if len(fitting) < len(rows):
        tail = ["", f"{len(rows) - len(fitting)} more rows do not fit here; flagged rows come first.", *tail]
    text = "\n".join([*head, *table, *fitting, *tail]).rstrip() + "\n"
    return text if limit is None or len(text.encode()) <= limit else _cut(text, limit)


def _markdown_row(row: Verdict) -> str:
    outcome = f"**{row.outcome}**" if row.outcome in ("regressed", "improved") else row.outcome
    why = f"`{_code(row.cell)}` {_escaped(row.reason)}{' (small)' * row.small}".strip()
    return f"| {outcome} | {_escaped(row.measure)} | {change(row)} | {could_see(row)} | {why} |"


def _fitting(rows: Sequence[str], room: int) -> list[str]:
    kept = []
    for row in rows:
        room -= len(row.encode()) + 1
        if room < 0:
            break
        kept.append(row)
    return kept


def _size(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)


def _cut(text: str, limit: int) -> str:
    said = "\n\nThe rest does not fit here.\n"
    return text.encode()[: max(0, limit - len(said))].decode(errors="ignore") + said


def _escaped(text: str) -> str:
    """Text without a meaning in Markdown or HTML: results come from anywhere."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


def as_csv(findings: Sequence[Findings]) -> str:
    """One line per row of every comparison: the fields of `Verdict`, rows without a verdict by their status."""
    return table(("comparison", *FIELDS), (record for one in findings for record in _records(one)))


def _records(one: Findings) -> Iterable[dict[str, object]]:
    for row in one.sorted:
        yield {"comparison": one.title, **{field: getattr(row, field) for field in FIELDS}}
    for absent in one.absent:
        yield {"comparison": one.title, "outcome": absent.status, **vars(absent)}


def as_json(findings: Sequence[Findings], fail_on: Collection[str] = ()) -> str:
    """{"schema_version": 1, "comparisons": [{"title", "verdict", "rows", "joint", "absent", "notes", ...}]}.

    The verdict is the gate's word for that comparison, as `conclude` gives it.
    """
    content = [
        {
            "title": one.title,
            "verdict": conclude([one], fail_on)[0],
            "rows": [{field: getattr(row, field) for field in FIELDS} for row in one.sorted],
            "joint": [vars(joint) for joint in one.joint],
            "absent": [vars(absent) for absent in one.absent],
            "notes": list(one.notes),
            "level": one.level,
            "controls": [vars(control) for control in one.controls],
            "contaminated": one.contaminated,
        }
        for one in findings
    ]
    text = {"schema_version": SCHEMA_VERSION, "comparisons": content}
    return json.dumps(_plain(text), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """JSON knows no infinity: it becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_junit(findings: Sequence[Findings]) -> str:
    """JUnit XML: a test suite per comparison, a test case per row.

    A regression is a failure, a row that failed in the candidate an error; what is inconclusive, incomparable or
    missing is skipped.
    """
    return junit({one.title: [*map(_case, one.sorted), *map(_absent_case, one.absent)] for one in findings})


def junit(suites: Mapping[str, Sequence[ElementTree.Element]]) -> str:
    """JUnit XML of test suites by name, each with its cases, as `testcase` makes them."""
    root = ElementTree.Element("testsuites", name="metabench")
    for name, cases in suites.items():
        count = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_printable(name),
            tests=str(len(cases)),
            failures=str(count["failure"]),
            errors=str(count["error"]),
            skipped=str(count["skipped"]),
        )
        suite.extend(cases)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def write_junit(file: Path, findings: Sequence[Findings]) -> None:
    """Write the JUnit XML. Raises ConfigError where the file cannot be written."""
    _write(file, as_junit(findings), "w")


def _write(file: Path, text: str, mode: Literal["w", "a"]) -> None:
    """Write or append. Raises ConfigError where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open(mode, encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror or error})") from error


def _case(row: Verdict) -> ElementTree.Element:
    said = f"{change(row)}; could see {could_see(row)}; {row.reason}"
    kind = {"regressed": "failure", "inconclusive": "skipped", "incomparable": "skipped"}.get(row.outcome, "")
    return testcase(row.cell, row.measure, kind, f"{row.outcome}: {said}")


def _absent_case(row: Absent) -> ElementTree.Element:
    kind = {"missing": "skipped", "new": ""}.get(row.status, "error")
    return testcase(row.cell, row.measure, kind, f"{row.status}: {row.reason}")


def testcase(cell: str, measure: str, kind: str, message: str) -> ElementTree.Element:
    """A row as a test case; `kind` is failure, error, skipped, or '' for one that passed."""
    case = ElementTree.Element("testcase", classname=_printable(cell), name=_printable(measure), time="0")
    if kind:
        ElementTree.SubElement(case, kind, message=_printable(message))
    else:
        ElementTree.SubElement(case, "system-out").text = _printable(message)
    return case


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("?", text)


# what GitHub listens to


class Told(NamedTuple):
    """How a CI system was told: the one annotation line to print, if there is one, and what could not be written."""

    annotation: str | None
    unwritten: tuple[str, ...] = ()


def check_places(junit_file: Path | None, *, environ: Mapping[str, str] = os.environ) -> None:
    """Try the files that `publish` writes, before anything is measured in vain.

    Raises:
        ConfigError: one cannot be written.
    """
    for file in (junit_file, *(Path(environ[name]) for name in (OUTPUT, SUMMARY) if environ.get(name))):
        # a pipe is left alone: its reader would take the end of the trial for the end
        if file is not None and not (file.is_fifo() or file.is_char_device()):
            _write(file, "", "a")


def publish(
    findings: Sequence[Findings],
    verdict: str,
    junit_file: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Told:
    """Tell the CI system what was found, the verdict first: what cannot be written keeps nothing else from it.

    Appends `verdict=` to GITHUB_OUTPUT, and Markdown to GITHUB_STEP_SUMMARY as much as its cap leaves room for; writes
    the JUnit file. `verdict` is one of the outcomes, "failed", "contaminated" or "missing"; see `publish_error` for
    "error". There is an annotation in GitHub Actions alone, and none where all is well.
    """
    unwritten: list[str] = []
    with _noting(unwritten):
        _set_verdict(verdict, environ)
    with _noting(unwritten):
        if junit_file is not None:
            write_junit(junit_file, findings)
    with _noting(unwritten):
        _summarize(findings, environ)
    line = annotation(findings, verdict) if environ.get("GITHUB_ACTIONS") == "true" else None
    return Told(line, tuple(unwritten))


def publish_error(message: str, junit_file: Path | None, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """`publish` for a check that ended in an error, so that no workflow reads an empty verdict: it is "error".

    The JUnit file has one test case, an error. What cannot be written is left: the error itself is told on standard
    error anyhow. Returns the annotation line, or None outside GitHub Actions.
    """
    with contextlib.suppress(ConfigError):
        _set_verdict("error", environ)
    with contextlib.suppress(ConfigError):
        if junit_file is not None:
            _write(junit_file, junit({"metabench check": [testcase("metabench", "check", "error", message)]}), "w")
    with contextlib.suppress(ConfigError):
        if summary := environ.get(SUMMARY):
            _write(Path(summary), f"## metabench check\n\n**error**: {_escaped(message)}\n", "a")
    line = f"::error title=metabench%3A error::{_workflow(message)}"
    return line if environ.get("GITHUB_ACTIONS") == "true" else None


@contextlib.contextmanager
def _noting(unwritten: list[str]) -> Iterator[None]:
    try:
        yield
    except (ConfigError, OSError) as error:
        unwritten.append(str(error))


def _set_verdict(verdict: str, environ: Mapping[str, str]) -> None:
    if output := environ.get(OUTPUT):
        _write(Path(output), f"verdict={verdict}\n", "a")


def _summarize(findings: Sequence[Findings], environ: Mapping[str, str]) -> None:
    if not (summary := environ.get(SUMMARY)):
        return
    file = Path(summary)
    room = SUMMARY_BYTES - (file.stat().st_size if file.is_file() else 0)
    for one in findings:
        text = as_markdown(one, limit=room - 1) if room > 1000 else ""
        room -= len(text.encode())
        _write(file, text, "a")


def annotation(findings: Sequence[Findings], verdict: str) -> str | None:
    """One workflow command for all rows (GitHub shows ten of a step at most); None where all is well."""
    level: Literal["error", "warning"] = "error" if verdict in ("regressed", "failed") else "warning"
    if verdict in ("unchanged", "improved"):
        return None
    rows = [row for one in findings for row in one.sorted if row.outcome == verdict]
    failed = [row for one in findings for row in one.failed] if verdict == "failed" else []
    named = [f"{row.cell} {row.measure} {change(row)}" for row in rows[:3]]
    named += [f"{row.cell} {row.measure}: {row.reason}" for row in failed[:3]]
    more = len(rows) + len(failed) - len(named)
    why = [one.contaminated for one in findings if one.contaminated]
    text = "\n".join(
        [*(counted(one) for one in findings), *why, *named, *([f"... and {more} more"] if more > 0 else [])]
    )
    return f"::{level} title=metabench%3A {verdict}::{_workflow(text)}"


def _workflow(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
