"""What goes into a report (RunData) and what every format renders (Table): plain frozen data, no formatting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from metabench.errors import StoreError
from metabench.report.published import Published
from metabench.stats import Interval
from metabench.store import COLUMNS

RESULT_COLUMNS = COLUMNS
EPISODE_COLUMNS = ("cell", "seed", "measure", "episode", "hash", "score")
CLASS_COLUMNS = ("cell", "seed", "measure", "class", "queries", "credit")
FACT_COLUMNS = (
    "cell", "measure", "steps", "threads_asked", "allocator", "layout", "compile", "images", "iqr", "intercept",
    "strategy", "device_seconds",
)  # fmt: skip
CURVE_COLUMNS = ("training", "seed", "step", "images", "seconds", "loss", "accuracy", "validation")
TIMING_COLUMNS = ("cell", "measure", "process", "seconds", "begin", "end")
KERNELS = ("adapt", "inner_step", "predict", "embed", "meta_step", "episode")  # in the order shown
COUNTS = ("flops", "bytes", "memory", "nodes", "launches")
CONTROLS = frozenset({"chance", "pixel-nn", "untrained", "oracle"})
NEEDED = ("cell", "algorithm", "dataset", "measure", "status")

Mark = Literal["", "best", "here"]
Frame = pd.DataFrame | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RunData:
    """Everything a report reads, of one run or several together.

    `rows` holds RESULT_COLUMNS, one row per cell and measure. `episodes` holds EPISODE_COLUMNS, one row per cell,
    measure and test episode; `hash` is the episode's content hash, which pairs methods and seeds. `by_class` holds
    CLASS_COLUMNS, per cell, measure and class the number of queries and the sum of their credit (1 for a right
    answer). Without the last two the report has fewer columns. `facts` holds FACT_COLUMNS, what results.csv has no
    column for: the call that was timed, and what only the worker knew. `timings` holds TIMING_COLUMNS, per timed row
    and process the median of its samples and when they were taken. `curves` holds CURVE_COLUMNS, the learning curve of
    every training: the mean loss and accuracy on training tasks since its last point, or the score on validation
    episodes. `controls` names the algorithms shown apart,
    `families` the family of each algorithm (metric, optimisation ...). Make it with `RunData.of`.
    """

    rows: pd.DataFrame
    episodes: pd.DataFrame
    by_class: pd.DataFrame
    facts: pd.DataFrame
    timings: pd.DataFrame
    curves: pd.DataFrame
    manifest: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    controls: frozenset[str] = CONTROLS
    families: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Frame,
        episodes: Frame | None = None,
        by_class: Frame | None = None,
        *,
        facts: Frame | None = None,
        timings: Frame | None = None,
        curves: Frame | None = None,
        manifest: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        controls: Iterable[str] = CONTROLS,
        families: Mapping[str, str] | None = None,
    ) -> RunData:
        """Build from frames or lists of dicts; absent columns become empty, the last of equal row keys wins.

        Raises StoreError where a column is missing without which no row can be read.
        """
        return cls(
            _latest(_frame(rows, RESULT_COLUMNS, NEEDED), ["cell", "measure"]),
            _latest(_frame(episodes, EPISODE_COLUMNS, EPISODE_COLUMNS), ["cell", "measure", "episode", "hash"]),
            _latest(_frame(by_class, CLASS_COLUMNS, CLASS_COLUMNS), ["cell", "measure", "class"]),
            _latest(_frame(facts, FACT_COLUMNS, FACT_COLUMNS[:2]), ["cell", "measure"]),
            _latest(_frame(timings, TIMING_COLUMNS, TIMING_COLUMNS), ["cell", "measure", "process"]),
            _frame(curves, CURVE_COLUMNS, ("training", "step")),
            manifest or {},
            environment or {},
            frozenset(controls),
            families or {},
        )


@dataclass(frozen=True)
class Row:
    """One method in one table; None wherever there is nothing to show.

    `quality` is an interval over seeds (`seeds` >= 2) or over episodes; `difference` is to the table's reference on
    the same episodes. `adapt_time` is in seconds per task, `train_time` in seconds. `mark` is "best" where the
    intervals support it, "here" where they do so for these trainings only. `is_reference`: the row others differ
    from. `status` is ok, or what became of the cells, with `reason`; a row may be ok with some `failed_seeds`.
    `settings` are the parameters set away from the method's defaults. `notes` are keys of the table's notes.
    """

    method: str
    algorithm: str
    status: str
    reason: str = ""
    seeds: int = 0
    failed_seeds: int = 0
    quality: Interval | None = None
    by_class: Interval | None = None
    difference: Interval | None = None
    is_reference: bool = False
    published: Published | None = None
    deviations: tuple[str, ...] = ()
    settings: str = ""
    adapt_time: Interval | None = None
    train_time: Interval | None = None
    train_steps: int | None = None
    mark: Mark = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Rows that may be ranked together: one bn_mode, or the controls. `verdict` says what the ranking supports."""

    title: str
    rows: tuple[Row, ...]
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """One task: its protocol, its blocks of rows, and what has to be said below them.

    `measure` is accuracy, mse, accuracy_at_K, or empty for a table of times only. `visible` is the smallest and the
    largest of the differences to the reference that the rows' intervals would show with 80 % power. `details` are
    further measures: (method, measure, value). `footer` are sentences that hold for the whole table.
    """

    title: str
    measure: str
    protocol: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    reference: str | None = None
    visible: tuple[float, float] | None = None
    details: tuple[tuple[str, str, float], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    footer: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in the order shown."""
        return tuple(row for block in self.blocks for row in block.rows)


@dataclass(frozen=True)
class KernelCell:
    """What one row measured of one kernel; None wherever there is nothing.

    `time` is in seconds per call (inner_step: per inner step), its interval over processes; `ratio` is to the
    reference's, `paired` where both were timed in the same processes. `counts` holds what was counted, by COUNTS:
    operations, bytes moved, peak bytes of memory, autograd nodes, kernel launches. `rate` is operations per second,
    `share` the part of the machine's roof that the time amounts to, `bound` which of the roofs is the nearer
    (compute, memory; empty where only one is known). `missing` are pairs of an aspect without a value (time, or one of
    COUNTS) and the key of the note with the reason.
    """

    kernel: str
    time: Interval | None = None
    ratio: Interval | None = None
    paired: bool = False
    intercept: float | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    rate: float | None = None
    share: float | None = None
    bound: str = ""
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KernelRow:
    """One method in a table of kernels; `cells` has one entry for each kernel that it has rows of."""

    method: str
    algorithm: str
    backbone: str
    control: bool
    is_reference: bool
    cells: tuple[KernelCell, ...]

    def cell(self, kernel: str) -> KernelCell | None:
        """Its entry for a kernel, or None."""
        return next((cell for cell in self.cells if cell.kernel == kernel), None)


@dataclass(frozen=True)
class KernelTable:
    """One task and one call: which `kernels` were timed, which of COUNTS were counted, and a row for each method.

    `reference` is the method that ratios are taken to; `notes` as in `Table`.
    """

    title: str
    protocol: tuple[tuple[str, str], ...]
    kernels: tuple[str, ...]
    counts: tuple[str, ...]
    rows: tuple[KernelRow, ...]
    reference: str | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KernelReport:
    """All tables of kernels, and the sentences that hold for all: machines, control rows, warnings with a remedy."""

    tables: tuple[KernelTable, ...] = ()
    footer: tuple[str, ...] = ()


def _frame(given: Frame | None, columns: tuple[str, ...], needed: tuple[str, ...]) -> pd.DataFrame:
    if given is None:
        return pd.DataFrame(columns=list(columns))
    frame = given if isinstance(given, pd.DataFrame) else pd.DataFrame(list(given))
    if frame.empty:
        return pd.DataFrame(columns=list(columns))
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise StoreError(
            f"the results have no column {', '.join(map(repr, missing))}; rebuild them from the run's folder"
        )
    return frame.reindex(columns=list(columns)).reset_index(drop=True)


def _latest(frame: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    return frame.drop_duplicates(key, keep="last").reset_index(drop=True)
