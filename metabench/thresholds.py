"""What change is no matter: margins per kind of measure, per measure and per cell, as a suite declares them.

A suite's `thresholds` are text with a unit ("2%", "0.5 points"), so that nobody has to guess whether 0.5 means points
or a half. What is not said stays as in `DEFAULTS`; `overrides` lie over the suite's, the later over the earlier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metabench.errors import ConfigError, did_you_mean

Kind = Literal["time", "accuracy", "mse", "memory", "counts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULTS: Mapping[str, str] = {
    "time": "2%",
    "unchanged": "5%",
    "accuracy": "0.5 points",
    "mse": "5%",
    "memory": "5%",
    "counts": "0%",
}
PERCENT, POINTS = r"[0-9]+(\.[0-9]+)? ?%", r"[0-9]+(\.[0-9]+)? ?points?"
_EXACT = ("flops", "bytes", "nodes", "launches")


@dataclass(frozen=True)
class Margin:
    """`margin` is what is no matter; a change surely under `unchanged` counts as none. Fractions, both."""

    margin: float
    unchanged: float


@dataclass(frozen=True)
class Thresholds:
    """The margins of a suite: `suite` by kind or measure, and `overrides`, each with where it holds."""

    suite: Mapping[str, str]
    overrides: Sequence[tuple[Mapping[str, str], Mapping[str, str]]] = ()

    @classmethod
    def of(cls, declared: Mapping[str, Any]) -> Thresholds:
        """From the plain data of a suite or a manifest: kinds, `measures` (by name), and `overrides`, a list.

        Raises:
            ConfigError: not thresholds, or one without its unit.
        """
        try:
            overrides = [
                ({key: one[key] for key in ("algorithm", "match") if one.get(key)}, _flat(one))
                for one in declared.get("overrides") or ()
            ]
            return cls(_flat(declared), overrides)
        except (AttributeError, TypeError) as error:
            raise ConfigError(f"the thresholds cannot be read ({error}); see docs/ci.md") from error

    def under(self, margins: Mapping[str, str]) -> Thresholds:
        """These thresholds with margins by kind laid over all of them.

        Raises:
            ConfigError: no such kind, or a margin without its unit.
        """
        check_kinds(margins)
        return Thresholds(self.suite, [*self.overrides, ({}, _flat(margins))]) if margins else self

    def margin(self, cell: str, algorithm: str, measure: str) -> Margin:
        """The margin of one row: the measure's own before its kind's, the most special place before the suite."""
        kind = kind_of(measure)
        found = dict(DEFAULTS)
        for given in (self.suite, *(given for where, given in self.overrides if _holds(where, cell, algorithm))):
            if kind in given:
                found.pop(measure, None)  # a kind that is said here goes before a measure said further out
            found |= given
        margin = parse(found.get(measure, found[kind]), kind)
        return Margin(margin, max(margin, parse(found["unchanged"], "unchanged")) if kind == "time" else margin)


def kind_of(measure: str) -> Kind:
    """The kind of a measure: what unit and default its margin has."""
    if "accuracy" in measure:
        return "accuracy"
    if measure.startswith("mse"):
        return "mse"
    aspect = measure.rpartition("_")[2]
    return "counts" if aspect in _EXACT else "memory" if aspect == "memory" else "time"


def check_kinds(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no kind of measure."""
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"{name}: no such kind of measure{did_you_mean(name, KINDS)}")


def parse(text: object, kind: str) -> float:
    """'2%' as 0.02, '0.5 points' as 0.005.

    Raises:
        ConfigError: another unit than the kind's, or none.
    """
    wanted, example = (POINTS, "0.5 points") if kind == "accuracy" else (PERCENT, "2%")
    if not isinstance(text, str) or not re.fullmatch(wanted, text):
        raise ConfigError(f"a margin of {kind} looks like {example!r}, not {text!r}")
    return float(text.rstrip("% points")) / 100


def _flat(given: Mapping[str, Any]) -> dict[str, str]:
    kinds = {key: value for key, value in given.items() if key in DEFAULTS and value is not None}
    flat = {**kinds, **(given.get("measures") or {})}
    for name, value in flat.items():
        parse(value, name if name in DEFAULTS else kind_of(name))
    return flat


def _holds(where: Mapping[str, str], cell: str, algorithm: str) -> bool:
    return where.get("algorithm", algorithm) == algorithm and all(w in cell for w in where.get("match", "").split())
