"""results.csv, episodes.csv, curves.csv: tidy text in a fixed order of columns, same bytes for the same results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from metabench.report.model import CURVE_COLUMNS, EPISODE_COLUMNS, RESULT_COLUMNS

COUNTS = frozenset(
    {"ways", "shots", "queries", "seed", "n", "train_steps", "tasks", "threads", "episode", "step", "images"}
)


def results(rows: pd.DataFrame) -> str:
    """results.csv: one line per cell and measure, RESULT_COLUMNS first and always, empty where there is no value."""
    return _text(rows, RESULT_COLUMNS)


def episodes(scores: pd.DataFrame) -> str:
    """episodes.csv: one line per cell, measure and test episode."""
    return _text(scores, EPISODE_COLUMNS)


def curves(points: pd.DataFrame) -> str:
    """curves.csv: one line per point of a training's learning curve."""
    return _text(points, CURVE_COLUMNS)


def records(found: Sequence[Mapping[str, object]]) -> str:
    """Any records, one line each; nothing where there are none."""
    return pd.DataFrame(found).to_csv(index=False, lineterminator="\n") if found else ""


def _text(frame: pd.DataFrame, columns: tuple[str, ...]) -> str:
    frame = frame.reindex(columns=list(columns))
    whole = {name: frame[name].map(_whole) for name in columns if name in COUNTS}
    return frame.assign(**whole).to_csv(index=False, lineterminator="\n")


def _whole(value: object) -> str:
    """A count without the decimal point pandas gives it beside empty cells."""
    return "" if pd.isna(value) or value == "" else str(int(float(value)))  # type: ignore[call-overload, arg-type]
