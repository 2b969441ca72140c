"""From rows of results to methods: which rows belong together, what the method is called, what it scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from metabench.cells import in_seconds
from metabench.report.model import RunData
from metabench.stats import Interval, cluster_interval, mean_interval, paired_difference, seeds_interval

TASK = ("data", "dataset", "split", "ways", "shots", "queries", "rotations", "device", "precision")
IDENTITY = ("algorithm", "params", "bn_mode", "train_spec", "selection")


@dataclass(frozen=True)
class Method:
    """The rows of one method on one task, all seeds and measures, and its scores of one quality measure.

    `scores` has a row per seed and a column per test episode that all its seeds saw; None without episode records.
    """

    label: str
    algorithm: str
    control: bool
    rows: pd.DataFrame
    measure: str
    scores: pd.DataFrame | None

    @property
    def bn_mode(self) -> str:
        """inductive or transductive; empty where the method has no normalisation."""
        return first(self.rows, "bn_mode")

    @property
    def settings(self) -> str:
        """What its suite sets away from its defaults, as its cells' ids have it: 'lr=0.003 schedule=cosine'."""
        inside = first(self.rows, "cell").partition("/")[0].partition("[")[2].rstrip("]")
        return " ".join(item for item in inside.split(",") if item and not item.startswith("train="))

    def of(self, measure: str) -> pd.DataFrame:
        """Its finished rows of one measure."""
        rows = self.rows[(self.rows["measure"] == measure) & (self.rows["status"] == "ok")]
        return rows[rows["value"].notna()]

    @property
    def unfinished(self) -> pd.DataFrame:
        """Its rows of the quality measure without a value; of any measure where it has no row of that one."""
        rows = self.rows[self.rows["measure"] == self.measure]
        rows = self.rows if rows.empty else rows
        return rows[rows["status"] != "ok"]

    @property
    def budget_in_seconds(self) -> bool:
        """Whether training ended by the clock (a train_spec such as 5w1s15q*75s): never ranked."""
        return in_seconds(first(self.rows, "train_spec"))

    @cached_property
    def quality(self) -> Interval | None:
        """The mean score with its interval: over seeds and shared episodes, over episodes for a single seed."""
        if self.scores is not None:
            return seeds_interval(self.scores.to_numpy())
        rows = self.of(self.measure)
        values = rows["value"].to_numpy(dtype=float)
        if len(values) == 0:
            return None
        if not np.isfinite(values).all():
            return Interval(float(values.mean()), None, None, len(values), None)
        if len(values) > 1:
            return mean_interval(values)
        low, high, n, sd = (number(rows.iloc[0][name]) for name in ("ci_low", "ci_high", "n", "sd"))
        return Interval(float(values[0]), low, high, int(n or 1), sd)

    def cost(self, measure: str) -> Interval | None:
        """The median over seeds of a time, bounds spanning those of the seeds; adapt_time per task, in seconds."""
        rows = self.of(measure)
        if rows.empty:
            return None
        tasks = rows["tasks"].astype(float).fillna(1).clip(lower=1) if measure == "adapt_time" else 1
        value, low, high = (rows[name].astype(float) / tasks for name in ("value", "ci_low", "ci_high"))
        n = int(rows["n"].astype(float).fillna(1).sum())
        return Interval(float(value.median()), number(low.min()), number(high.max()), n, None)

    def by_class(self, data: RunData) -> Interval | None:
        """The interval over classes, the seeds' answers pooled; None without class records."""
        mine = data.by_class[
            data.by_class["cell"].isin(self.of(self.measure)["cell"]) & (data.by_class["measure"] == self.measure)
        ]
        if mine.empty:
            return None
        totals = mine.groupby("class")[["credit", "queries"]].sum().astype(float)
        totals = totals[totals["queries"] > 0]
        return cluster_interval(totals["credit"].to_numpy(), totals["queries"].to_numpy())


def difference(a: Method, b: Method) -> tuple[Interval | None, int]:
    """mean(a) - mean(b) on the seeds and episodes they share, and the number of those seeds.

    A control with one seed has nothing to train, so it stands against every seed of the other. Without shared
    episodes the difference of the means comes without bounds.
    """
    x, y = a.scores, b.scores
    if x is not None and y is not None:
        x, y = _spread(a, x, y), _spread(b, y, x)
        seeds, episodes = x.index.intersection(y.index), x.columns.intersection(y.columns)
        if len(seeds) and len(episodes):
            pair = [frame.loc[seeds, episodes].to_numpy() for frame in (x, y)]
            return paired_difference(*pair), len(seeds)
    p, q = a.quality, b.quality
    if p is None or q is None:
        return None, 0
    return Interval(p.value - q.value, None, None, 1, None), 0


def methods(rows: pd.DataFrame, measure: str, data: RunData) -> list[Method]:
    """The methods of one task's `rows`, in their order, scored by `measure`."""
    groups = [group for _, group in rows.groupby(list(IDENTITY), sort=False, dropna=False)]
    labels = _labels(groups)
    return [
        Method(
            label,
            str(group["algorithm"].iloc[0]),
            first(group, "algorithm") in data.controls,
            group,
            measure,
            _scores(group, measure, data),
        )
        for label, group in zip(labels, groups, strict=True)
    ]


def with_data(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with what cell ids tell (results.csv of old has fewer columns): the data segment with the data set's
    parameters, a stream's length, what the classes of an episode have in common.
    """
    parts = rows["cell"].astype(str).str.split("/")
    stream = parts.str[2].str.extract(r"^[0-9]+w([0-9]+)t$", expand=False).astype(float)
    within = parts.str[1].str.extract(r"[\[,]within=(\w+)", expand=False).fillna("none")
    return rows.assign(data=parts.str[1], stream=stream, within=within)


def first(rows: pd.DataFrame, column: str) -> str:
    """The first value of a column that is filled, as text; empty where none is."""
    filled = rows[column].dropna()
    return str(filled.iloc[0]) if len(filled) else ""


def number(value: Any) -> float | None:
    """A float, or None for an empty cell."""
    return None if pd.isna(value) else float(value)


def count(value: Any) -> int | None:
    """An int, or None for an empty cell."""
    return None if pd.isna(value) or value == "" else int(float(value))


def _scores(group: pd.DataFrame, measure: str, data: RunData) -> pd.DataFrame | None:
    cells = group[(group["measure"] == measure) & (group["status"] == "ok")]
    mine = data.episodes[(data.episodes["measure"] == measure) & data.episodes["cell"].isin(cells["cell"])]
    if mine.empty:
        return None
    seeds = cells.set_index("cell")["seed"].fillna(0).astype(int)
    table = mine.assign(seed=mine["cell"].map(seeds)).pivot_table(
        index="seed", columns=["episode", "hash"], values="score", aggfunc="last"
    )
    table = table.astype(float).dropna(axis=1)
    whole = set(seeds) == set(table.index) and np.isfinite(table.to_numpy()).all()
    return table if whole and table.shape[1] else None


def _spread(method: Method, scores: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    if not method.control or len(scores) != 1 or len(other) <= 1:
        return scores
    return pd.concat([scores] * len(other)).set_axis(other.index)


def _labels(groups: Sequence[pd.DataFrame]) -> list[str]:
    """The algorithm's name, with those settings appended that tell it from its other rows of the same bn_mode."""
    settings = [_settings(group) for group in groups]
    names = [(first(group, "algorithm"), first(group, "bn_mode")) for group in groups]
    labels = []
    for name, mine in zip(names, settings, strict=True):
        siblings = [s for n, s in zip(names, settings, strict=True) if n == name]
        differing = [key for key in mine if any(s.get(key) != mine[key] for s in siblings)]
        labels.append(" ".join([name[0], *(f"{key}={_plain(mine[key])}" for key in differing)]))
    return labels


def _settings(group: pd.DataFrame) -> dict[str, str]:
    """All that may tell two rows of a bn_mode apart, as text: the training and the parameters (backbone among them)."""
    text = first(group, "params")
    try:
        params = json.loads(text) if text else {}
    except json.JSONDecodeError:
        params = {"params": text}
    protocol = {"train": first(group, "train_spec"), "selection": first(group, "selection")}
    return {**protocol, **{key: json.dumps(value) for key, value in params.items()}}


def _plain(value: str) -> str:
    return value.strip('"') or "none"
