"""Rows of timed and counted kernels into tables: one per task and call, methods by kernels, relative to a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from metabench.errors import ConfigError, did_you_mean
from metabench.report.machine import footer
from metabench.report.methods import TASK, count, number, with_data
from metabench.report.model import COUNTS, KERNELS, KernelCell, KernelReport, KernelRow, KernelTable, RunData
from metabench.roofline import bound
from metabench.stats import Interval, paired_ratio, ratio

CALL = ("tasks", "threads_asked", "allocator", "layout", "compile")
ASPECTS = ("time", *COUNTS)
DEFAULTS = {"allocator": "kept", "layout": "channels_last", "compile": False}
MEASURES = {f"{kernel}_{aspect}": (kernel, aspect) for kernel in KERNELS for aspect in ASPECTS}


def kernel_report(data: RunData, reference: str | None = None) -> KernelReport:
    """One table per task and call with rows of kernels, in the order of the results; empty where there are none.

    A call is (tasks per call, threads, allocator, memory layout, compiled or not). `reference` is an algorithm's name
    or a row's label; without one it is the suite's own, and where that has no time the first method that is no control.
    Raises ConfigError where a reference asked for is in no table, ordinary ones included.
    """
    rows = kernel_rows(data)
    if reference is not None and len(rows) == len(data.rows) > 0 and reference not in (known := names(data)):
        raise ConfigError(f"no row is called {reference!r}{did_you_mean(reference, known)}")
    groups = [group for _, group in rows.groupby([*TASK, "stream", *CALL], sort=False, dropna=False)]
    nowhere = [group for group in groups if _reason_of_all(group)]
    tables = [_table(group, data, reference) for group in groups if not _reason_of_all(group)]
    said = tuple(f"{_title(group.iloc[0])} on {group.iloc[0]['device']}: {_reason_of_all(group)}." for group in nowhere)
    return KernelReport(tuple(tables), (*dict.fromkeys(said), *footer(rows, data)))


def _reason_of_all(rows: pd.DataFrame) -> str:
    """Why no row of a table was measured, if they share one reason; a table of dashes says no more."""
    reasons = set(rows["reason"])
    return str(reasons.pop()) if (rows["status"] == "skipped").all() and len(reasons) == 1 else ""


def names(data: RunData) -> set[str]:
    """What a reference may be called in the tables of kernels."""
    rows = kernel_rows(data)
    return {*rows["algorithm"], *(row.method for row in _named(rows))}


def ordinary(data: RunData) -> RunData:
    """The results without those rows that tables of kernels show."""
    return replace(data, rows=data.rows[~_is_kernel(data)].reset_index(drop=True))


def kernel_rows(data: RunData) -> pd.DataFrame:
    """The rows for tables of kernels with their facts, what `with_data` adds, `kernel` and `aspect`."""
    rows = data.rows[_is_kernel(data)].merge(data.facts, on=["cell", "measure"], how="left")
    pairs = [MEASURES[measure] for measure in rows["measure"]]
    rows = with_data(rows).assign(kernel=[k for k, _ in pairs], aspect=[a for _, a in pairs])
    return rows.assign(tasks=rows["tasks"].astype(float).fillna(1.0))


def _is_kernel(data: RunData) -> pd.Series:
    """Which rows belong in tables of kernels: all of kernels but the adapt_time that a table of quality shows.

    That is the adapt_time of a cell with other measures or a training, or of one beside such cells (a control).
    """
    rows = data.rows.assign(data=_segment(data.rows, 1))
    kernel = rows["measure"].isin(set(MEASURES))
    trained = ~kernel | (rows["train_spec"].notna() & (rows["train_spec"] != ""))
    plain = trained.groupby(rows["cell"]).transform("any").astype(bool)
    only = (rows["measure"] == "adapt_time").groupby(rows["cell"]).transform("all").astype(bool)
    beside = plain.groupby([rows[name] for name in TASK], dropna=False).transform("any").astype(bool)
    call = rows["cell"].astype(str).str.count("/") > 5  # the default call has no segment
    return kernel & ~((rows["measure"] == "adapt_time") & (plain | (only & beside & ~call)))


def _segment(rows: pd.DataFrame, index: int) -> pd.Series:
    return rows["cell"].astype(str).str.split("/").str[index]


@dataclass(frozen=True)
class Named:
    """The rows of one method in one table, and its label there."""

    method: str
    rows: pd.DataFrame

    def timed(self, kernel: str) -> pd.Series | None:
        """Its row of a kernel's time; None without a value."""
        mine = self.rows[(self.rows["kernel"] == kernel) & (self.rows["aspect"] == "time")]
        fine = mine[(mine["status"] == "ok") & mine["value"].notna()]
        return None if fine.empty else fine.iloc[-1]


def _table(rows: pd.DataFrame, data: RunData, reference: str | None) -> KernelTable:
    found = _named(rows)
    kernels = tuple(kernel for kernel in KERNELS if (rows["kernel"] == kernel).any())
    worse = rows[~rows["status"].isin(["skipped"])]
    counts = tuple(aspect for aspect in COUNTS if (worse["aspect"] == aspect).any())
    chosen = _reference(found, data, reference)
    notes = Notes()
    return KernelTable(
        title=_title(rows.iloc[0]),
        protocol=_protocol(rows),
        kernels=kernels,
        counts=counts,
        rows=tuple(_row(one, chosen, ("time", *counts), data, notes) for one in found),
        reference=chosen.method if chosen else None,
        notes=notes.listed(),
    )


def _named(rows: pd.DataFrame) -> list[Named]:
    """The methods of a table in their order, told apart by their parameters, inner steps, norm and seed."""
    rows = rows.assign(base=[base_label(cell) for cell in rows["cell"]])
    keys = ["base", "steps", "norm", "seed"]
    groups = [group for _, group in rows.groupby(keys, sort=False, dropna=False)]
    found = []
    for group in groups:
        mine = group.iloc[0]
        siblings = rows[rows["base"] == mine["base"]]
        tells = [key for key in keys[1:] if siblings[key].nunique(dropna=False) > 1 or key == "steps"]
        found.append(Named(_label(mine["base"], {key: mine[key] for key in tells}), group))
    return found


def base_label(cell: str) -> str:
    """A cell's algorithm with its parameters, without its training: protonet[backbone=resnet12]."""
    name, _, inside = cell.partition("/")[0].partition("[")
    items = [item for item in inside.rstrip("]").split(",") if item and not item.startswith("train=")]
    return f"{name}[{','.join(items)}]" if items else name


def _label(base: str, settings: Mapping[str, Any]) -> str:
    extra = [f"{key}={_whole(value)}" for key, value in settings.items() if not pd.isna(value)]
    if not extra:
        return base
    return f"{base[:-1]},{','.join(extra)}]" if base.endswith("]") else f"{base}[{','.join(extra)}]"


def _whole(value: Any) -> str:
    return str(int(value)) if isinstance(value, int | float | np.number) else str(value)


def _reference(found: Sequence[Named], data: RunData, asked: str | None) -> Named | None:
    timed = [m for m in found if any(m.timed(kernel) is not None for kernel in KERNELS)]
    name = asked or data.manifest.get("reference")
    chosen = [m for m in timed if name in (m.method, m.rows["algorithm"].iloc[0])]
    if asked is None:
        chosen += [m for m in timed if m.rows["algorithm"].iloc[0] not in data.controls]
    return chosen[0] if chosen else None


def _row(mine: Named, reference: Named | None, aspects: Sequence[str], data: RunData, notes: Notes) -> KernelRow:
    first = mine.rows.iloc[0]
    kernels = [kernel for kernel in KERNELS if (mine.rows["kernel"] == kernel).any()]
    backbones = mine.rows["backbone"].dropna()
    return KernelRow(
        mine.method,
        str(first["algorithm"]),
        str(backbones.iloc[0]) if len(backbones) else "",
        str(first["algorithm"]) in data.controls,
        mine is reference,
        tuple(_cell(mine, kernel, reference, aspects, data, notes) for kernel in kernels),
    )


def _cell(
    mine: Named, kernel: str, reference: Named | None, aspects: Sequence[str], data: RunData, notes: Notes
) -> KernelCell:
    rows = {row["aspect"]: row for _, row in mine.rows[mine.rows["kernel"] == kernel].iterrows()}
    values = {a: number(row["value"]) if row["status"] == "ok" else None for a, row in rows.items()}
    timed, other = mine.timed(kernel), reference.timed(kernel) if reference and reference is not mine else None
    gap, paired = (None, False) if timed is None or other is None else _ratio(timed, other, data)
    cell = KernelCell(
        kernel,
        time=None if timed is None else interval(timed),
        ratio=gap,
        paired=paired,
        intercept=None if timed is None else number(timed["intercept"]),
        counts={aspect: value for aspect in aspects[1:] if (value := values.get(aspect)) is not None},
        missing=tuple(
            (aspect, notes.add(_outcome(rows[aspect]))) for aspect in aspects if values.get(aspect, 0.0) is None
        ),
    )
    return cell if timed is None else _against_roof(cell, timed, data.environment)


def interval(row: pd.Series) -> Interval:
    """The value of a time with its interval over processes, as the row has it."""
    low, high, sd = (number(row[name]) for name in ("ci_low", "ci_high", "sd"))
    return Interval(float(row["value"]), low, high, count(row["n"]) or 1, sd)


def _outcome(row: pd.Series) -> str:
    """What became of a row, and why, as a note: equal reasons share a note."""
    return f"{row['status']}: {'no reason recorded' if pd.isna(row['reason']) else row['reason']}"


def _ratio(mine: pd.Series, other: pd.Series, data: RunData) -> tuple[Interval | None, bool]:
    """How many times the other's time, and whether it is paired by process; None across machines."""
    if mine["environment"] != other["environment"]:
        return None, False
    a, b = (by_process(data, row) for row in (mine, other))
    shared = a.index.intersection(b.index)
    a, b = a.loc[shared], b.loc[shared]
    together = (a["begin"] <= b["end"]) & (b["begin"] <= a["end"])  # else the numbers of two launches coincide
    if len(shared) > 1 and bool(together.all()):
        return paired_ratio(a["seconds"].to_numpy(), b["seconds"].to_numpy()), True
    return ratio(interval(mine), interval(other)), False


def by_process(data: RunData, row: pd.Series) -> pd.DataFrame:
    """The row's `seconds`, `begin` and `end`, indexed by process; empty without raw samples."""
    mine = data.timings[(data.timings["cell"] == row["cell"]) & (data.timings["measure"] == row["measure"])]
    return pd.DataFrame(mine.set_index("process")[["seconds", "begin", "end"]], dtype=float)


def _against_roof(cell: KernelCell, row: pd.Series, environments: Mapping[str, Any]) -> KernelCell:
    """With the achieved rate and the share of the roof (Williams 2009), where it was measured for the row's device."""
    if cell.time is None or "flops" not in cell.counts:
        return cell
    seconds = cell.time.value
    cell = replace(cell, rate=cell.counts["flops"] / seconds)
    roofs = environments.get(str(row["environment"]), {}).get("roofs", {})
    if roofs.get("device", "cpu") != row["device"]:
        return cell
    if f"{row['precision']}_flops" not in roofs:
        return cell
    least, limit = bound(cell.counts["flops"], cell.counts.get("bytes", 0.0), roofs, row["precision"])
    return replace(cell, share=least / seconds, bound=limit if "bytes" in cell.counts else "")


def _title(row: pd.Series) -> str:
    ways, shots, stream = (count(row[name]) for name in ("ways", "shots", "stream"))
    shape = ((ways, f"{ways}-way"), (shots, f"{shots}-shot"), (stream, f"streams of {stream}"))
    size = " ".join(text for number, text in shape if number)
    return f"Kernels: {row['dataset']} {size}".strip()


def _protocol(rows: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    row = rows.iloc[0]
    inside = str(row["data"]).partition("[")[2].rstrip("]").split(",")
    entries = [
        ("tasks per call", _text(row["tasks"])),
        ("queries", _text(row["queries"])),
        ("images per embed call", _span(rows.loc[rows["kernel"] == "embed", "images"])),
        ("device", f"{row['device']} {row['precision']}"),
        ("threads", _span(rows["threads"])),
        ("data", ", ".join(item for item in inside if "=" in item)),
        *((name, _setting(row[name])) for name, usual in DEFAULTS.items() if row[name] != usual),
        ("environment", ", ".join(sorted(set(rows["environment"].dropna()) - {""}))),
    ]
    return tuple((name, value) for name, value in entries if value)


def _setting(value: Any) -> str:
    return "" if pd.isna(value) else {True: "yes", False: "no"}.get(value, str(value))


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(int(value))


def _span(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in sorted({int(v) for v in values if not pd.isna(v)}))


class Notes:
    """Remarks in order of first use, each with a key (a, b, ... aa); equal texts share one."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def add(self, text: str) -> str:
        """The key of a text."""
        n = len(self._keys)
        return self._keys.setdefault(text, (chr(96 + n // 26) if n >= 26 else "") + chr(97 + n % 26))

    def listed(self) -> tuple[tuple[str, str], ...]:
        """(key, text) of all."""
        return tuple((key, text) for text, key in self._keys.items())
