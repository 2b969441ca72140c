"""The verdicts of a gate as a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metabench.verdicts import Gate, Verdict

COLOURS = {"regressed": "red", "improved": "green", "inconclusive": "yellow", "incomparable": "yellow"}


def show(gate: Gate, console: Console) -> None:
    """Every row with its change, interval and what could have been seen; then controls and what was found."""
    console.print(Text(f"{gate.candidate} against {gate.base}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("row", "change", "interval", "could see", "verdict"):
        table.add_column(name, justify="left" if name in ("row", "verdict") else "right", overflow="fold")
    for one in gate.verdicts:
        table.add_row(*_cells(one))
    console.print(table)
    for control in gate.controls:
        console.print(Text(f"control {control.name}: {control.change:+.1%}{' MOVED' if control.moved else ''}"))
    counted = ", ".join(f"{n} {outcome}" for outcome, n in _count(gate.verdicts).items())
    console.print(Text(f"{gate.pairs} pairs of processes; {counted or 'no rows'}"))
    if gate.identical:
        console.print("identical code on both sides")
    if gate.contaminated:
        console.print(Text(f"contaminated: {gate.contaminated}", style="red"), soft_wrap=True)


def _cells(one: Verdict) -> list[Text]:
    ratio = one.scale == "ratio"
    change = "" if one.change is None else f"{one.change:+.1%}" if ratio else f"{one.change:+.0f}"
    interval = "" if one.low is None or one.high is None or not ratio else f"{one.low:+.1%} {one.high:+.1%}"
    seen = "" if one.detectable is None or not ratio else f"{one.detectable:+.1%}"
    outcome = Text(f"{'small, ' if one.small else ''}{one.outcome}", style=COLOURS.get(one.outcome, ""))
    if one.reason:
        outcome.append(f" ({one.reason})", style="dim")
    return [Text(f"{one.cell} {one.measure}"), Text(change), Text(interval), Text(seen), outcome]


def _count(verdicts: Iterable[Verdict]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in verdicts:
        found[one.outcome] = found.get(one.outcome, 0) + 1
    return found
