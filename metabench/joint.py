"""What all rows of one algorithm say together: "adapt 7 % faster; accuracy equivalent within 0.5 points (paired)"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from metabench.thresholds import Kind, kind_of
from metabench.verdicts import Joint, Verdict, overall

UNITS: Mapping[Kind, str] = {"accuracy": " points", "counts": "", "time": " %", "memory": " %", "mse": " %"}


def method_of(cell: str) -> str:
    """The algorithm with its parameters, as in a cell's id, without the training."""
    name, _, inside = cell.partition("/")[0].partition("[")
    items = [item for item in inside.removesuffix("]").split(",") if item and not item.startswith("train=")]
    return f"{name}[{','.join(items)}]" if items else name


def faster(verdicts: Iterable[Verdict]) -> set[str]:
    """The methods that became faster anywhere."""
    return {method_of(one.cell) for one in verdicts if one.outcome == "improved" and kind_of(one.measure) == "time"}


def join(verdicts: Iterable[Verdict], warnings: Mapping[str, str]) -> list[Joint]:
    """The joint verdict of each method, `warnings` by method added; the gravest outcome of its rows is its own."""
    methods: dict[str, dict[str, list[Verdict]]] = {}
    for one in verdicts:
        methods.setdefault(method_of(one.cell), {}).setdefault(one.measure, []).append(one)
    return [_join(name, measures, warnings.get(name, "")) for name, measures in methods.items()]


def _join(method: str, measures: Mapping[str, Sequence[Verdict]], warning: str) -> Joint:
    said: list[str] = []
    alike: dict[str, list[str]] = {"equal": [], "unchanged": [], "undecided": [], "not comparable": []}
    for measure, rows in measures.items():
        outcome, kind = overall(rows), kind_of(measure)
        if outcome in ("regressed", "improved"):
            said.append(_moved(measure, [one for one in rows if one.outcome == outcome], len(rows)))
        elif outcome == "inconclusive":
            alike["undecided"].append(measure)
        elif outcome == "incomparable":
            alike["not comparable"].append(measure)
        elif kind in ("accuracy", "mse"):
            said.append(_equivalent(measure, rows))
        else:
            alike["equal" if all(one.change == 0 for one in rows) else "unchanged"].append(measure)
    said += [f"{', '.join(_short(names, measures))} {word}" for word, names in alike.items() if names]
    every = [one for rows in measures.values() for one in rows]
    return Joint(algorithm=method, outcome=overall(every), text="; ".join([*said, *([warning] if warning else [])]))


def _short(names: Sequence[str], measures: Iterable[str]) -> list[str]:
    """The measures in words; "times" or "counts" where several are meant, and all of that kind."""
    out: list[str] = []
    for kind, word in (("time", "times"), ("counts", "counts")):
        mine = [name for name in names if kind_of(name) == kind]
        every = [name for name in measures if kind_of(name) == kind]
        out += [word] if len(mine) > 1 and len(mine) == len(every) else map(_name, mine)
    return [*(_name(name) for name in names if kind_of(name) not in ("time", "counts")), *out]


def _moved(measure: str, rows: Sequence[Verdict], of: int) -> str:
    """'adapt 7.0 % faster', 'accuracy 1.2-1.5 points lower in 2 of 4 cells (paired)'."""
    kind = kind_of(measure)
    sizes = sorted((abs(one.change or 0.0), one.change or 0.0) for one in rows)
    least, most = _size(sizes[0][0], kind), _size(sizes[-1][0], kind)
    up = sizes[-1][1] > 0
    word = ("slower" if up else "faster") if kind == "time" else "higher" if up else "lower"
    name = _name(measure).removesuffix(" time")
    share = f" in {len(rows)} of {of} cells" if of > 1 else ""
    small = " (small)" if all(one.small for one in rows) else ""
    size = least if least == most else f"{least}-{most}"
    return f"{name} {size}{UNITS[kind]} {word}{share}{small}{_paired(kind)}"


def _equivalent(measure: str, rows: Sequence[Verdict]) -> str:
    if all(one.low == one.high == 0.0 for one in rows):
        return f"{_name(measure)} identical"
    kind, margin = kind_of(measure), max(one.margin for one in rows)
    bounds = [(one.low, one.high) for one in rows]
    within = all(low is not None and high is not None and -margin < low and high < margin for low, high in bounds)
    how = "equivalent within" if within else "not worse by"
    return f"{_name(measure)} {how} {100 * margin:g}{UNITS[kind]}{_paired(kind)}"


def _name(measure: str) -> str:
    return measure.replace("_", " ")


def _paired(kind: Kind) -> str:
    return " (paired)" if kind in ("accuracy", "mse") else ""


def _size(change: float, kind: Kind) -> str:
    if kind == "counts":
        return f"{change:.0f}"
    return (
        f"{100 * change:.2f}"
        if kind == "accuracy"
        else f"{100 * change:.1f}"
        if change < 0.1
        else f"{100 * change:.0f}"
    )
