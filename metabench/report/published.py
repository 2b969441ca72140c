"""What the papers report: the packaged `data/published.csv`, one headline row per method and task."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

WITHIN = "within-alphabet"  # stands in the file where a split would: Koch's trials


@dataclass(frozen=True)
class Published:
    """One published number.

    `value` and `ci95` (half width) are fractions for accuracies and plain errors for mse. An empty `split` or
    `bn_mode` and a `queries` of None mean that the source does not say. `verified`: read in the source or in a
    second text quoting it; `headline`: the number a table shows for this method and task. `within`: on tasks within
    one alphabet, support and queries by other hands.
    """

    algorithm: str
    dataset: str
    split: str
    ways: int | None
    shots: int | None
    queries: int | None
    bn_mode: str
    measure: str
    value: float
    ci95: float | None
    source: str
    protocol: str
    verified: bool
    headline: bool
    within: bool = False

    @property
    def steps(self) -> int | None:
        """The inner steps before its test, where the source says."""
        found = re.search(r"(one|[0-9]+) adaptation step", self.protocol)
        return None if found is None else 1 if found[1] == "one" else int(found[1])

    @property
    def side(self) -> int | None:
        """The pixels of its square images' side, where the source says."""
        found = re.search(r"\b([0-9]+)x\1\b", self.protocol)
        return None if found is None else int(found[1])

    def deviations(
        self,
        *,
        split: str,
        queries: int | None,
        bn_mode: str,
        within: str = "none",
        steps: int | None = None,
        data: str = "",
        distance: str = "",
    ) -> tuple[str, ...]:
        """What its protocol is known to do differently from a row of ours, in words; empty where nothing is known.

        `steps` are our row's inner steps in evaluation (None: not known), `data` its data set's parameters, `distance`
        how it compares features or pixels.
        """
        said = []
        if self.split and self.split != re.sub("^random[0-9]+$", "random", split):  # random1200 is one such draw
            said.append(f"{self.split} split")
        if self.within and within != "drawer":
            said.append("support and queries by other hands")
        if self.measure == "accuracy" and self.protocol.startswith("streams"):
            said.append("a presentation in streams")
        if self.within and "evaluation alphabets" in self.protocol:  # ours has all twenty of its test half
            said.append("10 test alphabets")
        if self.bn_mode and self.bn_mode != bn_mode:
            said.append(self.bn_mode)
        if self.queries is not None and self.queries != queries:
            said.append(_counted(self.queries, "query", "queries"))
        if None not in (self.steps, steps) and self.steps != steps:
            said.append(_counted(self.steps, "inner step", "inner steps"))
        if self.side is not None and f"size={self.side}" not in data.split(", "):
            said.append(f"{self.side}x{self.side} images")
        if distance and "cosine" in self.protocol and not distance.startswith("cosine"):
            said.append("cosine")
        return tuple(said)


def published(
    algorithm: str,
    dataset: str,
    ways: int | None,
    shots: int | None,
    *,
    measure: str = "accuracy",
    within: bool = False,
    bn_mode: str = "",
) -> Published | None:
    """The headline number of `algorithm` (its registry name) on this task, or None where none is known.

    The paper's own number where there is one; where the same table of the paper has another one for `bn_mode`, that.
    Rows of `accuracy_at_K` carry no shots: pass None.
    """
    found = _headlines().get((algorithm, dataset, ways, shots, measure, within))
    if found is None or not bn_mode or found.bn_mode == bn_mode:
        return found
    asked = replace(found, bn_mode=bn_mode)
    return next((p for p in all_published() if _table_of(p) == _table_of(asked)), found)


@cache
def all_published() -> tuple[Published, ...]:
    """Every row of the packaged file, in its order."""
    text = resources.files("metabench").joinpath("data", "published.csv").read_text(encoding="utf-8")
    return tuple(_row(record) for record in csv.DictReader(text.splitlines()))


def _table_of(p: Published) -> tuple[object, ...]:
    """What numbers of one table have in common that differ in nothing but their value."""
    return p.algorithm, p.dataset, p.ways, p.shots, p.measure, p.within, p.split, p.source, p.bn_mode


@cache
def _headlines() -> dict[tuple[str, str, int | None, int | None, str, bool], Published]:
    return {(p.algorithm, p.dataset, p.ways, p.shots, p.measure, p.within): p for p in all_published() if p.headline}


def _row(record: dict[str, str]) -> Published:
    return Published(
        algorithm=record["algorithm"],
        dataset=record["dataset"],
        split="" if record["split"] == WITHIN else record["split"],
        ways=_count(record["ways"]),
        shots=_count(record["shots"]),
        queries=_count(record["queries"]),
        bn_mode=record["bn_mode"],
        measure=record["measure"],
        value=float(record["value"]),
        ci95=float(record["ci95"]) if record["ci95"] else None,
        source=record["source"],
        protocol=record["protocol"],
        verified=record["verified"] == "yes",
        headline=record["headline"] == "yes",
        within=record["split"] == WITHIN,
    )


def _counted(number: int | None, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _count(text: str) -> int | None:
    return int(text) if text else None
