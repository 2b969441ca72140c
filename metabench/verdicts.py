"""What a comparison says of one row: a verdict, the change with its interval, and what could have been seen.

Plain data that `compare` (stored results) and `gate` (two versions of the code, side by side) both make, and that every
output reads: tables, summaries for CI, exit codes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Outcome = Literal["regressed", "improved", "unchanged", "inconclusive", "incomparable"]
Scale = Literal["ratio", "points", "error", "exact"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one row (a cell and a measure), candidate against base.

    `change` with `low` and `high` is on the row's `scale`: "ratio" is candidate / base - 1 (times, memory), "points"
    the difference of accuracies as a fraction, "error" the relative change of a mean squared error, "exact" the
    difference of counts. `worse` says which sign is bad: +1 where more is worse. `margin` is what was declared to be no
    matter, on the same scale. `detectable` is the smallest change that this comparison would have found with 80 %
    power. `small` marks a regression or gain that is beyond the margin and surely under the bound of "unchanged": small
    but real.
    `reason` says why a row is incomparable or inconclusive, or what a reader must know.
    """

    cell: str
    measure: str
    outcome: Outcome
    scale: Scale
    worse: Literal[-1, 1]
    change: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float = 0.0
    detectable: float | None = None
    small: bool = False
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The row's key."""
        return self.cell, self.measure


def of_counts(made: Verdict, before: float, after: float) -> Verdict:
    """`made` with the outcome of two exact counts; its margin comes as a share of `before`, and leaves as a count."""
    allowed = made.margin * before
    outcome: Outcome = (
        "regressed" if after - before > allowed else "improved" if before - after > allowed else "unchanged"
    )
    return replace(
        made,
        outcome=outcome,
        change=after - before,
        margin=allowed,
        detectable=math.floor(allowed) + 1.0,
        reason=f"{before:.0f} -> {after:.0f}",
    )


@dataclass(frozen=True)
class Control:
    """Fixed work that none of the code takes part in: how it changed (a share), and whether that is a movement."""

    name: str
    change: float
    moved: bool


ORDER: tuple[Outcome, ...] = ("regressed", "inconclusive", "incomparable", "improved", "unchanged")
"""Flagged rows first, as every output lists them."""
SCALES: tuple[Scale, ...] = ("points", "error", "ratio", "exact")
"""Among equal outcomes scores first, then times, then counts."""


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """The gravest outcome of all, by `ORDER`; "incomparable" where there is none."""
    found = {one.outcome for one in verdicts}
    return next((outcome for outcome in ORDER if outcome in found), "incomparable")


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A row without a verdict: `status` missing (only the base has it), new, failed, diverged or timeout; and why."""

    cell: str
    measure: str
    status: str
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is a row that the candidate should have, and that failed there."""
        return self.status not in ("missing", "new")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """What all rows of one algorithm together say: "adapt 7 % faster; accuracy equivalent within 0.5 points"."""

    algorithm: str
    outcome: Outcome
    text: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A whole comparison: what every output shows. `title` names the two sides, `notes` hold for all rows.

    `level` is what the intervals cover. `controls` were timed beside the rows of a live check; `contaminated` says why
    nothing can be told about its times, or is "".
    """

    title: str
    verdicts: tuple[Verdict, ...]
    joint: tuple[Joint, ...] = ()
    absent: tuple[Absent, ...] = ()
    notes: tuple[str, ...] = ()
    level: str = "95 %"
    controls: tuple[Control, ...] = ()
    contaminated: str = ""

    @property
    def failed(self) -> tuple[Absent, ...]:
        """The rows that the candidate should have and that failed there."""
        return tuple(one for one in self.absent if one.failed)

    @property
    def sorted(self) -> tuple[Verdict, ...]:
        """The verdicts, flagged rows first; of these scores before times before counts, the largest change first."""
        return tuple(
            sorted(self.verdicts, key=lambda v: (ORDER.index(v.outcome), SCALES.index(v.scale), -abs(v.change or 0.0)))
        )


ASKED = ("inconclusive", "incomparable", "missing")
"""What fails a gate only where that is asked for."""


def conclude(findings: Sequence[Findings], fail_on: Collection[str] = ()) -> tuple[str, int]:
    """The one word for a gate, and its exit code; `fail_on` holds those of `ASKED` that fail it.

    1 regressed; 3 a row failed in the candidate, or nothing could be compared at all; 4 contaminated, or what
    `fail_on` names; else 0.
    """
    verdicts = [row for one in findings for row in one.verdicts]
    present = {row.outcome for row in verdicts} | {row.status for one in findings for row in one.absent}
    if "regressed" in present:
        return "regressed", 1
    if any(one.failed for one in findings):
        return "failed", 3
    if any(one.contaminated for one in findings):
        return "contaminated", 4
    if found := next((kind for kind in ASKED if kind in fail_on and kind in present), None):
        return found, 4
    grave = overall(verdicts)
    return grave, 3 if all(row.outcome == "incomparable" for row in verdicts) else 0
