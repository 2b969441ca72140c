"""Stored results in the formats of other tools: pyperf, github-action-benchmark, bencher, JUnit.

What those tools make of the numbers is theirs: they know no episodes, no seeds and no control rows.

- pyperf: https://pyperf.readthedocs.io/en/latest/api.html, file format 1.0
- github-action-benchmark: "customSmallerIsBetter" and "customBiggerIsBetter" of its README, a file each
- bencher: https://bencher.dev/docs/reference/bencher-metric-format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from metabench.errors import ConfigError, NothingRan, did_you_mean
from metabench.sides import Result, Side, load
from metabench.verdict_report import junit, testcase

SMALLER, BIGGER = "customSmallerIsBetter.json", "customBiggerIsBetter.json"
NANOSECONDS = 1e9  # bencher's own unit of latency


@dataclass(frozen=True)
class Format:
    """What another tool reads: `make` gives the files' text by name, none where there is nothing for it.

    `folder`: it may be several files, so they always go into a folder. `needs` says what it takes that a side may lack.
    """

    make: Callable[[Side], dict[str, str]]
    folder: bool = False
    needs: str = ""


def export(paths: Sequence[Path], to: str, *, select: str = "") -> dict[str, str]:
    """The files for a tool, text by name: results of run folders (or a results.csv) whose rows hold all of `select`.

    Raises:
        ConfigError: no such format.
        StoreError: no results there, or damaged ones.
        NothingRan: nothing among them that the format can hold.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: no such format{did_you_mean(to, FORMATS)}")
    side = load(paths, select=select)
    files = FORMATS[to].make(side)
    if not files:
        raise NothingRan(f"{side.name}: nothing that {to} could hold{FORMATS[to].needs}")
    return files


def write(files: Mapping[str, str], to: str, out: Path) -> list[Path]:
    """Write the files for a tool to `out`, a file, or a folder where the format is one; where they are.

    Raises:
        ConfigError: that cannot be written.
    """
    places = {out / name if FORMATS[to].folder else out: text for name, text in files.items()}
    try:
        for place, text in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return list(places)


def _ok(side: Side) -> Iterable[tuple[Result, float]]:
    return ((row, row.value) for row in side.rows.values() if row.status == "ok" and row.value is not None)


# pyperf


def _pyperf(side: Side) -> dict[str, str]:
    """Times of kernels, a pyperf run per process with one value, the process's own.

    A process's slices are not independent; pyperf would pool them as if they were.
    """
    benchmarks: list[dict[str, Any]] = []
    for row, _ in _ok(side):
        processes = row.columns.get("processes")
        if not row.measure.endswith("_time") or not isinstance(processes, list):
            continue
        at = row.measurement.at[:19].replace("T", " ") if row.measurement else ""
        when = {"date": at} if at else {}
        runs = [{"metadata": when, "values": [float(seconds)]} for seconds in processes]
        named: dict[str, Any] = {"name": f"{row.cell} {row.measure}", "unit": "second"}
        benchmarks.append({"metadata": {**named, **_machine(row)}, "runs": runs})
    return {"pyperf.json": _json({"version": "1.0", "benchmarks": benchmarks})} if benchmarks else {}


def _machine(row: Result) -> dict[str, Any]:
    """The machine in pyperf's words."""
    found = row.machine()
    known = {
        "cpu_model_name": found.get("cpu"),
        "cpu_count": found.get("cores"),
        "platform": found.get("system"),
        "python_version": found.get("python"),
    }
    return {name: value for name, value in known.items() if value}


# github-action-benchmark


def _github_action_benchmark(side: Side) -> dict[str, str]:
    entries: dict[str, list[dict[str, Any]]] = {SMALLER: [], BIGGER: []}
    for row, value in _ok(side):
        scale, unit = _unit(row)
        entry: dict[str, Any] = {"name": f"{row.cell} {row.measure}", "unit": unit, "value": scale * value}
        if row.ci_low is not None and row.ci_high is not None:
            entry["range"] = f"{scale * row.ci_low:.6g} .. {scale * row.ci_high:.6g}"
        entry["extra"] = f"n = {row.n or 1}\nenvironment {row.environment or 'unknown'}\ncode {row.text('code')}"
        entries[BIGGER if "accuracy" in row.measure else SMALLER].append(entry)
    return {name: _json(found) for name, found in entries.items() if found}  # an empty list is an error there


def _unit(row: Result) -> tuple[float, str]:
    """(factor, unit): per cent for accuracies, else the row's own."""
    return (100.0, "%") if "accuracy" in row.measure else (1.0, row.text("unit") or "1")


# bencher


def _bencher(side: Side) -> dict[str, str]:
    """Per cell, and per kernel of it, its measures: latency in nanoseconds, the others as they are."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, value in _ok(side):
        kernel, _, aspect = row.measure.rpartition("_")
        timed = aspect == "time"
        costs = timed or aspect in ("flops", "bytes", "memory", "nodes", "launches")
        name, measure = (f"{row.cell} {kernel}", "latency" if timed else aspect) if costs else (row.cell, row.measure)
        scale = NANOSECONDS if timed else 1.0
        metric = {"value": scale * value}
        if row.ci_low is not None and row.ci_high is not None:
            metric |= {"lower_value": scale * row.ci_low, "upper_value": scale * row.ci_high}
        found.setdefault(name, {})[measure.replace("_", "-")] = metric
    return {"bencher.json": _json(found)} if found else {}


# JUnit


def _junit(side: Side) -> dict[str, str]:
    """A test case per row: a failed row is an error, a skipped one skipped."""
    cases = [_case(row) for row in side.rows.values()]
    return {"junit.xml": junit({", ".join(side.suites): cases})} if cases else {}


def _case(row: Result) -> ElementTree.Element:
    kind = "" if row.status == "ok" else "skipped" if row.status == "skipped" else "error"
    said = f"{row.value:.6g} {row.text('unit')}" if row.value is not None else f"{row.status}: {row.reason}"
    return testcase(row.cell, row.measure, kind, said)


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: Mapping[str, Format] = {
    "pyperf": Format(_pyperf, needs=": it takes the times of kernels, process by process, from a run's folder"),
    "github-action-benchmark": Format(_github_action_benchmark, folder=True),
    "bencher": Format(_bencher),
    "junit": Format(_junit),
}
