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


@dataclass(frozen=True)
class Control:
    """Fixed work that none of the code takes part in: how it changed (a share), and whether that is a movement."""

    name: str
    change: float
    moved: bool


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a check came to.

    `identical`: both sides loaded the same code. `contaminated`: why nothing can be said about times, or "".
    `failed`: rows that the candidate could not run, though it should. `pairs`: pairs of processes, confirmation
    included.
    """

    base: str
    candidate: str
    verdicts: tuple[Verdict, ...]
    controls: tuple[Control, ...] = ()
    pairs: int = 0
    identical: bool = False
    contaminated: str = ""
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 regression found, 3 a row failed on the candidate, 4 contaminated, else 0."""
        if any(one.outcome == "regressed" for one in self.verdicts):
            return 1
        return 3 if self.failed else 4 if self.contaminated else 0


ORDER: tuple[Outcome, ...] = ("regressed", "inconclusive", "incomparable", "improved", "unchanged")
"""Flagged rows first, as every output lists them."""


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """The gravest outcome of all, by `ORDER`; "incomparable" where there is none."""
    found = {one.outcome for one in verdicts}
    return next((outcome for outcome in ORDER if outcome in found), "incomparable")
