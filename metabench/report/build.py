"""The one pure function behind every format: results in, comparative tables out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pandas as pd

from metabench.errors import ConfigError, did_you_mean
from metabench.report import kernels
from metabench.report.methods import TASK, Method, count, difference, first, methods, with_data
from metabench.report.model import Block, Mark, Row, RunData, Table
from metabench.report.published import Published, published
from metabench.stats import Interval, smallest_visible_difference

RANKING_SEEDS = 3
WITHIN = {"alphabet": "within one alphabet", "drawer": "within one alphabet, support and queries by other hands"}
QUALITIES = ("accuracy", "val_accuracy", "mse")
THREADED = (("training", "train_time"), ("adaptation", "adapt_time"))
COSTS = ("adapt_time", "predict_time", "train_time")


def tables(data: RunData, reference: str | None = None, *, presentations: bool = False) -> list[Table]:
    """One comparative table per task and quality measure, in the order of the results; of a stream the last
    presentation, or with `presentations` each.

    A task is (dataset with its parameters, split, ways, shots, queries or a stream's length, rotations, device,
    precision). `reference` is
    an algorithm's name or a row's own label; without one it is the suite's own, and where that has no result the first
    method that is no control. Rows of kernels stand in tables of their own (`kernels.kernel_report`). Raises
    ConfigError where a reference asked for is in no table of either kind.
    """
    seen = kernels.names(data) if reference is not None else set()
    data = kernels.ordinary(data)
    made: list[Table] = []
    for _, rows in with_data(data.rows).groupby([*TASK, "stream"], sort=False, dropna=False):
        for measure in measures(rows, presentations=presentations):
            found = methods(rows, measure, data)
            seen |= {name for m in found for name in (m.label, m.algorithm)}
            made.append(_table(found, data, _reference(found, data, reference)))
    if reference is not None and made and reference not in seen:
        raise ConfigError(f"no row is called {reference!r}{did_you_mean(reference, seen)}")
    return made


def _data_parameters(task: pd.Series) -> str:
    """Those parameters of the data set that have no column of their own: 'size=105'."""
    inside = str(task["data"]).partition("[")[2].rstrip("]").split(",")
    return ", ".join(item for item in inside if "=" in item and not item.startswith(("rotations=", "within=")))


def measures(rows: pd.DataFrame, *, presentations: bool = False) -> list[str]:
    """What gets a table: accuracy or mse, else the last (or each) accuracy_at_K, else "" for times only."""
    present = set(rows["measure"].dropna())
    main = [name for name in QUALITIES if name in present]
    if main:
        return main
    of_stream = sorted((m for m in present if m.startswith("accuracy_at_")), key=lambda m: int(m.split("_")[-1]))
    return of_stream[0 if presentations else -1 :] or [""]


def _reference(found: Sequence[Method], data: RunData, asked: str | None) -> Method | None:
    """The first method with a score that carries the name; without a name asked for, the suite's or any."""
    scored = [m for m in found if m.quality is not None]
    name = asked or data.manifest.get("reference")
    named = [m for m in scored if name in (m.label, m.algorithm)]
    if asked is None:
        named += [m for m in scored if not m.control]
    return named[0] if named else None


def _table(found: Sequence[Method], data: RunData, reference: Method | None) -> Table:
    notes, shared = _Notes(), _shared_backbone(found)
    rows = {id(m): _row(m, data, reference, shared, notes) for m in found}
    blocks, grouped = [], _grouped(found)
    for title, members in grouped.items():
        marks, verdict = _ranking([] if title == "controls" else members)
        verdict = f"{title}: {verdict}" if verdict and len(grouped) > 1 else verdict
        shown = [replace(rows[id(m)], mark=marks.get(m.label, "")) for m in members]
        blocks.append(Block(title, tuple(sorted(shown, key=_order(found[0].measure))), verdict))
    task = found[0].rows.iloc[0]
    return Table(
        title=_title(task),
        measure=found[0].measure,
        protocol=_protocol(found, task),
        blocks=tuple(blocks),
        reference=reference.label if reference else None,
        visible=_visible(row for block in blocks if block.title != "controls" for row in block.rows),
        details=_details(found),
        notes=notes.listed(),
        footer=_footer(found, data),
    )


def _grouped(found: Sequence[Method]) -> dict[str, list[Method]]:
    """Methods by block: one per bn_mode (never ranked together), the controls last."""
    blocks: dict[str, list[Method]] = {}
    for m in found:
        blocks.setdefault("controls" if m.control else m.bn_mode or "no normalisation", []).append(m)
    order = ["inductive", "transductive", "no normalisation", "controls"]
    return {title: blocks[title] for title in [*order, *sorted(set(blocks) - set(order))] if title in blocks}


def _shared_backbone(found: Sequence[Method]) -> str:
    """The backbone that most trained methods have; empty where no two share one."""
    named = Counter(first(m.rows, "backbone") for m in found if not m.control)
    named.pop("", None)
    return next((name for name, count in named.most_common(1) if count > 1), "")


def _row(m: Method, data: RunData, reference: Method | None, backbone: str, notes: _Notes) -> Row:
    quality, finished, unfinished = m.quality, m.of(m.measure), m.unfinished
    fine = quality is not None or unfinished.empty or (not m.measure and any(len(m.of(name)) for name in COSTS))
    status, reason = ("ok", "") if fine else _outcome(unfinished)
    row = Row(m.label, m.algorithm, status, reason, len(finished), len(unfinished), quality)
    if status != "ok":
        return row
    task = m.rows.iloc[0]
    shape = (count(task["ways"]), _shots(task, m.measure))
    within = task["within"] != "none"
    paper = published(m.algorithm, str(task["dataset"]), *shape, measure=m.measure, within=within, bn_mode=m.bn_mode)
    gap, shared = _to_reference(m, reference)
    remarks = _remarks(m, quality)
    own = first(m.rows, "backbone")
    if backbone and own != backbone and first(m.rows, "train_spec"):
        remarks.append(f"{f'backbone {own}' if own else 'a network of its own'}; most here have {backbone}")
    if reference is not None and gap and 0 < shared < min(len(finished), len(reference.of(reference.measure))):
        remarks.append(f"the difference is on the {shared} seeds that both have")
    return replace(
        row,
        by_class=m.by_class(data),
        difference=gap,
        is_reference=m is reference,
        published=paper,
        deviations=_deviations(paper, m) if paper else (),
        settings=m.settings,
        adapt_time=m.cost("adapt_time"),
        train_time=m.cost("train_time"),
        train_steps=_steps(m),
        notes=tuple(notes.add(text) for text in remarks),
    )


def _deviations(paper: Published, m: Method) -> tuple[str, ...]:
    task, params = m.rows.iloc[0], json.loads(first(m.rows, "params") or "{}")
    return paper.deviations(
        split=first(m.rows, "split"),
        queries=count(task["queries"]),
        bn_mode=m.bn_mode,
        within=first(m.rows, "within"),
        steps=params.get("test_steps"),
        data=_data_parameters(task),
        # what came before the parameter was there was Euclidean
        distance=params.get("similarity", params.get("distance", "sqeuclidean" if m.algorithm == "pixel-nn" else "")),
    )


def _remarks(m: Method, quality: Interval | None) -> list[str]:
    """What a reader must know before using this row."""
    said = []
    ways = count(m.rows.iloc[0]["ways"])
    if quality and ways and not m.control and m.measure == "accuracy" and quality.value < 2 / ways:
        said.append(f"under-trained at this budget: below twice chance ({200 / ways:g} %)")
    if m.budget_in_seconds:
        said.append("trained for a number of seconds, which repeats on no other machine: not ranked")
    if quality and len(m.unfinished):
        status, reason = _outcome(m.unfinished)
        seeds = len(m.unfinished) + len(m.of(m.measure))
        said.append(f"{len(m.unfinished)} of {seeds} seeds {status} ({reason}): not ranked")
    if quality and quality.sd == 0 and not m.control:
        still = "episodes or seeds: the interval of width 0 is no certainty"
        said.append(f"no variation between {'seeds: the interval speaks of episodes alone' if quality.half else still}")
    if quality and m.scores is None and len(m.of(m.measure)) > 1:
        said.append("no shared episode records: the interval is over seeds alone")
    return said


def _outcome(unfinished: pd.DataFrame) -> tuple[str, str]:
    """The gravest status and its reason; skipped only where nothing worse happened."""
    worse = unfinished[unfinished["status"] != "skipped"]
    last = (worse if len(worse) else unfinished).iloc[-1]
    return str(last["status"]), "no reason recorded" if pd.isna(last["reason"]) else str(last["reason"])


def _to_reference(m: Method, reference: Method | None) -> tuple[Interval | None, int]:
    """The difference to the reference, and the seeds it is on; none across protocols, controls excepted."""
    if reference is None or m is reference or (m.bn_mode != reference.bn_mode and not m.control):
        return None, 0
    return difference(m, reference)


def _ranking(members: Sequence[Method]) -> tuple[dict[str, Mark], str]:
    """The mark of the best of one block and the sentence that says what the paired differences support."""
    ranked = [m for m in members if m.quality and not m.budget_in_seconds and m.unfinished.empty]
    if len(ranked) < 2:
        return {}, ""
    sign = -1 if ranked[0].measure.startswith("mse") else 1
    values = [sign * q.value for m in ranked if (q := m.quality)]
    top = ranked[values.index(max(values))]
    pairs = [(m, *difference(top, m)) for m in ranked if m is not top]
    open_pairs = [m.label for m, d, _ in pairs if d is None or not d.excludes(0)]
    if open_pairs:
        return {}, f"no single best; {top.label} leads, but the interval against {', '.join(open_pairs)} includes 0"
    if min(seeds for _, _, seeds in pairs) >= RANKING_SEEDS:
        return {top.label: "best"}, f"best is {top.label}; its paired difference to every other ranked row excludes 0"
    return {top.label: "here"}, f"best on these episodes is {top.label}; a ranking needs {RANKING_SEEDS} seeds of each"


def _order(measure: str) -> Callable[[Row], tuple[bool, float]]:
    def key(row: Row) -> tuple[bool, float]:
        value = row.quality.value if row.quality else 0.0
        return row.quality is None, value if measure.startswith("mse") else -value

    return key


def _visible(rows: Iterable[Row]) -> tuple[float, float] | None:
    whole = [row.difference for row in rows if row.difference and not row.failed_seeds]
    found = [smallest_visible_difference(interval) for interval in whole]
    known = [value for value in found if value]
    return (min(known), max(known)) if known else None


def _details(found: Sequence[Method]) -> tuple[tuple[str, str, float], ...]:
    """Further measures of quality: mse before adaptation, accuracy by presentation; means over seeds."""
    extra = [
        (m.label, name, float(m.of(name)["value"].astype(float).mean()))
        for m in found
        for name in dict.fromkeys(m.rows["measure"])
        if name != m.measure and (str(name).startswith("accuracy_at_") or name == "mse_before") and len(m.of(name))
    ]
    return tuple(extra)


def _footer(found: Sequence[Method], data: RunData) -> tuple[str, ...]:
    said = []
    scored = [m for m in found if len(m.of(m.measure))]
    if scored and all(len(m.of(m.measure)) == 1 for m in scored):
        said.append("One seed: intervals are over episodes and say nothing about another training.")
    if any(pd.concat([m.of(name) for m in found])["environment"].nunique() > 1 for name in COSTS):
        said.append(
            "Times come from different environments (machine, threads or torch): do not compare them between rows."
        )
    hashes = pd.concat([m.of(m.measure) for m in found])["episodes_hash"].dropna()
    if hashes.nunique() > 1:
        said.append("Not all rows saw the same set of test episodes: differences are taken on those they share.")
    return tuple(said)


def _protocol(found: Sequence[Method], task: pd.Series) -> tuple[tuple[str, str], ...]:
    trained = [m for m in found if not m.control]
    scored = pd.concat([m.of(m.measure) for m in found])
    seeds = [len(m.of(m.measure)) for m in trained if len(m.of(m.measure))]
    subset = "validation" if found[0].measure == "val_accuracy" else "test"
    entries = [
        ("queries", _text(count(task["queries"]))),
        ("split", f"{task['split']} ({subset})" if not pd.isna(task["split"]) else ""),
        (f"{subset} episodes", _span(scored["n"].dropna().astype(int))),
        ("seeds", _span(pd.Series(seeds, dtype=int))),
        ("data", _data_parameters(task)),
        ("rotations", "" if pd.isna(task["rotations"]) else str(task["rotations"])),
        ("norm", _shared([m for m in trained if m.bn_mode != "transductive"], "norm")),
        ("selection", _shared(trained, "selection")),
        ("training", _shared(trained, "train_spec")),
        ("device", " ".join(str(task[c]) for c in ("device", "precision") if not pd.isna(task[c]))),
        ("threads", _threads(found)),
        ("tasks per call", _span(pd.concat([m.of("adapt_time") for m in found])["tasks"].dropna().astype(int))),
    ]
    return tuple((name, value) for name, value in entries if value)


def _threads(found: Sequence[Method]) -> str:
    """The threads of trainings and of timings, which are not the same when trainings ran side by side."""
    spans = [(name, pd.concat([m.of(measure) for m in found])["threads"].dropna()) for name, measure in THREADED]
    texts = [f"{name} {_span(values.astype(int))}" for name, values in spans if len(values)]
    return ", ".join(texts)


def _shared(found: Sequence[Method], column: str) -> str:
    """The commonest value, then each other one with its algorithms: "running; support: maml, reptile"."""
    by_value: dict[str, list[str]] = {}
    for m in found:
        if value := first(m.rows, column):
            by_value.setdefault(value, []).append(m.algorithm)
    common, *others = sorted(by_value, key=lambda value: -len(by_value[value])) or [""]
    return "; ".join([common, *(f"{value}: {', '.join(dict.fromkeys(by_value[value]))}" for value in others)])


def _title(task: pd.Series) -> str:
    ways, shots = count(task["ways"]), count(task["shots"])
    stream = count(task["stream"])
    parts = (
        f"{ways}-way" if ways else "",
        f"{shots}-shot" if shots else "",
        f"streams of {stream}" if stream else "",
        WITHIN.get(str(task["within"]), ""),
    )
    return " ".join(text for text in (str(task["dataset"]), *parts) if text)


def _shots(task: pd.Series, measure: str) -> int | None:
    return None if measure.startswith("accuracy_at_") else count(task["shots"])


def _steps(m: Method) -> int | None:
    steps = m.rows["train_steps"].dropna()
    return count(steps.iloc[0]) if len(steps) else None


def _span(values: pd.Series) -> str:
    if values.empty:
        return ""
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}-{high}"


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


class _Notes:
    """Remarks in order of first use, each with a letter; equal texts share one."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def add(self, text: str) -> str:
        return self._letters.setdefault(text, chr(ord("a") + len(self._letters)))

    def listed(self) -> tuple[tuple[str, str], ...]:
        return tuple((letter, text) for text, letter in self._letters.items())
