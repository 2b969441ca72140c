"""What a comparison says of one row: a verdict, the change with its interval, and what could have been seen.

Plain data that `compare` (stored results) and `gate` (two versions of the code, side by side) both make, and that every
output reads: tables, summaries for CI, exit codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


ORDER: tuple[Outcome, ...] = ("regressed", "inconclusive", "incomparable", "improved", "unchanged")
"""Flagged rows first, as every output lists them."""


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """The gravest outcome of all, by `ORDER`; "incomparable" where there is none."""
    found = {one.outcome for one in verdicts}
    return next((outcome for outcome in ORDER if outcome in found), "incomparable")
