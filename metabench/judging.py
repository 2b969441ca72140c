"""From paired log ratios to verdicts: planned looks, correction for many rows, independent confirmation.

Plain sequences of numbers in, verdicts out; nothing here runs anything, so that simulation can feed it. The process
pair is the unit: one number per row and pair, ln(candidate's time / base's time).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from metabench import signedranks
from metabench.stats import Interval, holm
from metabench.suite import Gating
from metabench.thresholds import Margin
from metabench.verdicts import Outcome

Name = TypeVar("Name", bound=Hashable)

CONFIRMING = 0.05  # the level of the second set: its job is to refuse what was a quirk of the first, at little loss
CONTROL_LEVEL = 0.01  # two-sided
MOST_PAIRS = 120  # nobody waits longer


@dataclass(frozen=True)
class Judgement:
    """What the pairs say of one row; all on the scale of ln(candidate / base).

    `change` is the estimate with the interval that the decision used (each bound at the level of one row of the
    family and one look). `small`: beyond the margin, and surely within what counts as unchanged. `detectable` is the
    true change that so many pairs, as noisy as these, would have called beyond the margin with 80 % power.
    """

    outcome: Outcome
    change: Interval
    small: bool = False
    detectable: float | None = None
    reason: str = ""


class Family(Generic[Name]):
    """The rows of one check, each with its margin and its bound of "unchanged", while pairs come in.

    At every planned look each row still open is judged, Holm's correction over all rows of the family (also those
    decided: which ones are still open is itself chance), `alpha` shared among the looks by Bonferroni. So the chance
    that any row is called regressed whose true change is within the margin is `alpha` at most; the same holds for
    "improved", and for "unchanged" of rows that are slower by more than their bound. The last is corrected by
    Bonferroni alone: a row is unchanged where, and only where, the upper bound of its interval is below that.
    """

    def __init__(self, margins: Mapping[Name, Margin], rules: Gating) -> None:
        self.rules = rules
        self.margins = dict(margins)
        self.ratios: dict[Name, list[float]] = {name: [] for name in margins}
        self.decided: dict[Name, Judgement] = {}
        self.pairs = 0

    @property
    def open(self) -> list[Name]:
        """Rows that want more pairs; none after the last look."""
        if self.pairs >= self.rules.looks[-1]:
            return []
        return [name for name in self.ratios if name not in self.decided]

    def add(self, ratios: Mapping[Name, float]) -> None:
        """Take the log ratios of one pair for the open rows that it has one of; where a look is due, judge."""
        for name in self.open:
            if name in ratios:
                self.ratios[name].append(ratios[name])
        self.pairs += 1
        if self.pairs in self.rules.looks:
            self._look()

    def drop(self, name: Name) -> None:
        """A row that cannot be measured any more; the correction stays as if it were there."""
        self.decided[name] = Judgement("incomparable", Interval(math.nan, None, None, 0, None))

    def judgements(self) -> dict[Name, Judgement]:
        """Every row's judgement as things stand; what is not decided is inconclusive."""
        left = {name: self._describe(name, "inconclusive") for name in self.ratios if name not in self.decided}
        return {name: self.decided.get(name) or left[name] for name in self.ratios}

    @property
    def level(self) -> float:
        """Of one row and one look."""
        return self.rules.alpha / len(self.rules.looks) / max(len(self.ratios), 1)

    def _look(self) -> None:
        margin = {name: math.log1p(one.margin) for name, one in self.margins.items()}
        bound = {name: math.log1p(one.unchanged) for name, one in self.margins.items()}
        alpha = self.rules.alpha / len(self.rules.looks)
        slower = self._rejected(alpha, "regressed", {n: signedranks.p_above(x, margin[n]) for n, x in self._data()})
        faster = self._rejected(alpha, "improved", {n: signedranks.p_below(x, -margin[n]) for n, x in self._data()})
        not_slower = {n for n, x in self._data() if signedranks.p_below(x, bound[n]) <= self.level}
        not_faster = {n for n, x in self._data() if signedranks.p_above(x, -bound[n]) <= self.level}
        for name in list(self.ratios):
            if name in self.decided:
                continue
            if name in slower:
                self.decided[name] = self._describe(name, "regressed", small=name in not_slower)
            elif name in faster:
                self.decided[name] = self._describe(name, "improved", small=name in not_faster)
            elif name in not_slower:
                self.decided[name] = self._describe(name, "unchanged")

    def _data(self) -> list[tuple[Name, Sequence[float]]]:
        return [(name, x) for name, x in self.ratios.items() if x and name not in self.decided]

    def _rejected(self, alpha: float, outcome: str, p_values: dict[Name, float]) -> set[Name]:
        """Holm over the whole family: a row decided earlier was rejected then, or counts as never to be."""
        known = {name: float(one.outcome != outcome) for name, one in self.decided.items()}
        everything = {**dict.fromkeys(self.ratios, 1.0), **known, **p_values}
        adjusted = dict(zip(everything, holm(list(everything.values())), strict=True))
        return {name for name in p_values if adjusted[name] <= alpha}

    def _describe(self, name: Name, outcome: Outcome, *, small: bool = False) -> Judgement:
        return describe(self.ratios[name], outcome, level=self.level, margin=self.margins[name].margin, small=small)


def describe(
    ratios: Sequence[float], outcome: Outcome, *, level: float, margin: float, small: bool = False, reason: str = ""
) -> Judgement:
    """A judgement with the estimate, its interval, and what these pairs could have seen."""
    if not ratios:
        return Judgement(outcome, Interval(math.nan, None, None, 0, None), small, None, reason)
    change = signedranks.centre(ratios, alpha=level)
    shift = signedranks.detectable(len(ratios), level)
    detectable = None if shift is None or change.sd is None else math.log1p(margin) + shift * change.sd
    return Judgement(outcome, change, small, detectable, reason)


def findings(judgements: Mapping[Name, Judgement]) -> list[Name]:
    """The rows that are called slower or faster: what a second set of pairs must confirm."""
    return [name for name, one in judgements.items() if one.outcome in ("regressed", "improved")]


def confirming(first: Family[Name]) -> Family[Name]:
    """The second, independent set for what the first found: the same looks, at `CONFIRMING`, corrected over these."""
    rules = replace(first.rules, alpha=max(first.rules.alpha, CONFIRMING))
    return Family({name: first.margins[name] for name in findings(first.judgements())}, rules)


def confirmed(first: Family[Name], second: Family[Name]) -> dict[Name, Judgement]:
    """The first set's judgements; each finding is confirmed (with the estimate of both sets) or taken back."""
    out = first.judgements()
    for name, again in second.judgements().items():
        margin = first.margins[name].margin
        both = [*first.ratios[name], *second.ratios[name]]
        if again.outcome == "incomparable":
            out[name] = again
        elif again.outcome == out[name].outcome:
            shown = describe(both, again.outcome, level=first.level, margin=margin)
            out[name] = replace(shown, small=_within(shown.change, first.margins[name].unchanged, again.outcome))
        else:
            seen, then = (math.expm1(one.change.value) for one in (out[name], again))
            reason = f"{seen:+.1%} in a first set of pairs, {then:+.1%} in a second: not confirmed"
            out[name] = describe(both, "inconclusive", level=first.level, margin=margin, reason=reason)
    return out


def _within(change: Interval, bound: float, outcome: Outcome) -> bool:
    """Whether the interval that is shown lies within the share `bound` on the side of the outcome."""
    end = change.high if outcome == "regressed" else change.low
    return end is not None and abs(end) <= math.log1p(bound)


def moved(ratios: Sequence[float], margin: float) -> Interval | None:
    """The change of a control that moved: beyond the margin, and surely not by chance; None for one that stood still.

    A control runs no code that differs, so nothing but the machine, or unequal treatment of the sides, can move it.
    """
    change = signedranks.centre(ratios, alpha=CONTROL_LEVEL / 2)
    sure = min(signedranks.p_above(ratios), signedranks.p_below(ratios)) <= CONTROL_LEVEL / 2
    return change if sure and abs(change.value) > math.log1p(margin) else None


def pairs_needed(sd: float, change: float, level: float, margin: float, *, power: float = 0.95) -> int | None:
    """The pairs after which a true change (a share) is called beyond the margin with `power`; None: too many."""
    room = math.log1p(change) - math.log1p(margin)
    if room <= 0:
        return None
    low, high = 4, MOST_PAIRS
    if not _shows(high, sd, room, level, power):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _shows(middle, sd, room, level, power) else (middle + 1, high)
    return high


def _shows(n: int, sd: float, room: float, level: float, power: float) -> bool:
    shift = signedranks.detectable(n, level, power)
    return shift is not None and shift * sd <= room
