"""The board as one page that works from a file: no network, no script but its own, every text of others escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from metabench.leaderboard import files, pareto
from metabench.leaderboard.boards import Board, by_environment
from metabench.leaderboard.pareto import Axis
from metabench.leaderboard.source import Source, plain
from metabench.leaderboard.standings import Standing, machine
from metabench.leaderboard.summary import Summary
from metabench.report import wording
from metabench.stats import Interval

TEMPLATES = Path(__file__).parent / "templates"
WHISKER, RANKS = 132.0, 72.0  # widths of the small drawings in tables
MAX_ROWS_DRAWN = 400  # beyond that the page is for machines: see leaderboard.csv


def page(
    *,
    title: str,
    description: str,
    boards: Sequence[Board],
    summaries: Sequence[Summary],
    runs: Sequence[tuple[Source, str]],
    withdrawals: Sequence[tuple[str, str, str]],
    environments: Mapping[str, Mapping[str, Any]],
    remarks: Sequence[str] = (),
) -> str:
    """The HTML of the whole site; `runs` come with the way from the page to their raw rows, `remarks` are on them."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    folders = {id(source): folder for source, folder in runs}
    loader = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return loader.get_template("page.html").render(
        title=plain(title),
        description=plain(description, 2000),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        boards=[_board(board, folders, environments) for board in boards],
        summaries=[_summary(one) for one in summaries],
        runs=[
            {"name": source.name, "folder": folder, "submitter": source.submitter, "trust": source.trust,
             "suite": plain(source.run.manifest["suite"]), "at": plain(source.run.manifest.get("at", ""))}
            for source, folder in runs
        ],
        remarks=[plain(text, 1000) for text in remarks],
        withdrawals=[tuple(plain(part, 1000) for part in one) for one in withdrawals],
        counts={
            "boards": len(boards),
            "methods": len({(s.submitter, s.algorithm) for b in boards for s in b.standings if not s.control}),
            "runs": len(runs),
        },
        data=Markup(_embedded({board.slug: _pairs(board) for board in boards})),
    )  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins another."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "title": summary.title,
        "boards": [{"title": board.title, "slug": board.slug} for board in summary.boards],
        "remarks": summary.remarks,
        "aggregate": any(entry.aggregate for entry in summary.entries),
        "entries": [
            {
                "label": entry.label,
                "submitter": entry.submitter,
                "control": entry.control,
                "star": entry.star,
                "coverage": f"{entry.covered}/{len(entry.standings)}",
                "covered": entry.covered,
                "aggregate": files.aggregate_text(entry),
                "value": entry.aggregate.value if entry.aggregate else "",
                "cells": [
                    {
                        "text": files.cell_text(one, board),
                        "value": one.quality.value if one and one.quality else "",
                        "rank": one.rank_text if one else "",
                        "missing": one is None or one.quality is None,
                    }
                    for one, board in zip(entry.standings, summary.boards, strict=True)
                ],
            }
            for entry in summary.entries
        ],
    }


def _board(board: Board, folders: Mapping[int, str], environments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    protocol = board.protocol
    shown = board.standings[:MAX_ROWS_DRAWN]
    scale = _scale(board)
    compared = board.shown_pairs[0]
    return {
        "slug": board.slug,
        "title": board.title,
        "measure": "accuracy" if "accuracy" in protocol.measure else protocol.measure,
        "unit": wording.unit(protocol.measure),
        "facts": protocol.facts,
        "sentences": files.sentences(board),
        "remarks": files.row_remarks(board),
        "rows": [_row(board, one, f"{board.slug}-row-{n}", scale, folders) for n, one in enumerate(shown)],
        "left_out": len(board.standings) - len(shown),
        "relative": any(one.relative for one in shown),
        "flops": any(one.flops for one in shown),
        "submitters": any(one.submitter for one in shown),
        "chance": None if protocol.chance is None or scale is None else _inside(scale, protocol.chance),
        "plots": [plot for plot in (pareto.relative(board), pareto.flops(board)) if plot],
        "order": _order(board, shown),
        "compared": [files.name_of(one) for one in compared],
        "not_compared": sum(one.table is not None for one in board.standings) - len(compared),
        "times": [
            {
                "measure": name,
                "place": place,
                "machine": machine(environments.get(place, {})),
                "rows": [
                    {"label": files.name_of(one), "text": wording.timing(time, bounds=True), "value": time.value}
                    for one, time in rows
                ],
            }
            for measure, name in (("adapt_time", "adapting to a task"), ("train_time", "training"))
            for place, rows in by_environment(board, measure).items()
        ],
    }


def _order(board: Board, shown: Sequence[Standing]) -> str:
    """In what order of scores the rows come, as the table's head says it: unranked rows and controls may break it."""
    values = [one.quality.value for one in shown if one.quality]
    down = board.protocol.higher_is_better
    return ("descending" if down else "ascending") if values == sorted(values, reverse=down) else ""


def _scale(board: Board) -> Axis | None:
    """The axis of the small interval drawings: all scores of the board that are no controls."""
    drawn = [one.quality for one in board.standings if one.quality and not one.control]
    drawn = drawn or [one.quality for one in board.standings if one.quality]
    if not drawn:
        return None
    bounds = [edge for interval in drawn for edge in (interval.low, interval.high, interval.value) if edge is not None]
    return pareto.linear(min(bounds), max(bounds), WHISKER)


def _inside(scale: Axis, value: float) -> float | None:
    return scale.at(value) if 0 <= scale.at(value) <= WHISKER else None


def _row(board: Board, one: Standing, name: str, scale: Axis | None, folders: Mapping[int, str]) -> dict[str, Any]:
    measure = board.protocol.measure
    quality = one.quality
    times = [
        (f"{'adapting' if time.measure == 'adapt_time' else 'training'} in {time.environment}",
         wording.timing(time.seconds, bounds=True))
        for time in one.times
    ]  # fmt: skip
    return {
        "id": name,
        "label": one.label,
        "submitter": one.submitter,
        "control": one.control,
        "trust": one.trust,
        "status": one.status,
        "reason": one.reason,
        "rank": one.rank_text,
        "rank_value": sum(one.rank) / 2 if one.rank else "",
        "rank_bar": _rank_bar(board, one),
        "group": one.group,
        "score": wording.score(quality.value, measure) if quality else "",
        "value": quality.value if quality else "",
        "bounds": wording.bounds(quality, measure),
        "whisker": _whisker(quality, scale),
        "class_whisker": _whisker(one.by_class, scale),
        "relative": files.ratio_text(one.relative),
        "relative_value": one.relative.value if one.relative else "",
        "flops": wording.amount(one.flops) if one.flops else "",
        "flops_value": one.flops or "",
        "seeds": len(one.seeds),
        "tried": one.tried,
        "remarks": one.remarks,
        "card": [
            *([("95 % over seeds", wording.bounds(quality, measure))] if quality and quality.low is not None else []),
            *([("95 % by class", wording.bounds(one.by_class, measure))] if one.by_class else []),
            *one.card,
            *times,
        ],
        "folders": [folders[id(source)] for source in one.sources],
    }


def _whisker(interval: Interval | None, scale: Axis | None) -> dict[str, float] | None:
    """Where an interval's ends and its estimate lie, cut off at the edges; None for what lies outside altogether."""
    if interval is None or scale is None:
        return None
    low, high = (interval.value if edge is None else edge for edge in (interval.low, interval.high))
    ends = [min(max(scale.at(edge), 0.0), WHISKER) for edge in (low, high)]
    middle = scale.at(interval.value)
    if not 0 <= middle <= WHISKER:
        return None
    return {"low": round(ends[0], 1), "high": round(max(ends[1], ends[0] + 0.5), 1), "at": round(middle, 1)}


def _rank_bar(board: Board, one: Standing) -> dict[str, float] | None:
    if one.rank is None:
        return None
    step = RANKS / max(len(board.ranked), 1)
    return {
        "x": round((one.rank[0] - 1) * step, 1),
        "width": round(max((one.rank[1] - one.rank[0] + 1) * step, 2.0), 1),
    }


def _pairs(board: Board) -> dict[str, Any]:
    """What the page needs to compare any two of the board's first methods: episode means, differences, p-values."""
    chosen, found = board.shown_pairs
    accuracy = "accuracy" in board.protocol.measure
    methods = [
        {"few": not one.control and len(one.seeds) < board.min_seeds, "scores": _packed(one.table.mean(0))}
        for one in chosen
        if one.table is not None
    ]
    if found is None:
        return {"accuracy": accuracy, "methods": methods, "pairs": []}
    half = found.half()
    places = {id(one): n for n, one in enumerate(board.ranked)}
    pairs = []
    for i, one in enumerate(chosen):
        for j, other in enumerate(chosen[:i]):
            at = places.get(id(one)), places.get(id(other))
            p = math.nan
            if board.ranking is not None and at[0] is not None and at[1] is not None:
                p = float(f"{board.ranking.adjusted[at[0], at[1]]:.3g}")
            width, value = float(half[i, j]), float(found.value[i, j])
            pairs.append([
                None if math.isnan(value) else round(value, 7),
                round(width, 7) if math.isfinite(width) else None,
                int(found.seeds[i, j]),
                None if math.isnan(p) else p,
            ])  # fmt: skip
    return {
        "accuracy": accuracy,
        "higher": board.protocol.higher_is_better,
        "methods": methods,
        "pairs": pairs,
        "count": board.ranking.pairs if board.ranking else 0,
    }


def _packed(values: Any) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
