"""What must be said of the machines that times come from: their roofs, how still they held, what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from metabench.environment import explain
from metabench.report.model import RunData

BETWEEN = 0.05  # sd over processes / value: from here on a row is called noisy
WITHIN = 0.15  # relative interquartile range of the slices of a process
STILL = 0.03  # control rows that vary less held still
NAMED = 4


def footer(rows: pd.DataFrame, data: RunData) -> tuple[str, ...]:
    """The sentences below tables of kernels; `rows` are those of `kernels.kernel_rows`."""
    times = rows[(rows["aspect"] == "time") & (rows["status"] == "ok")]
    said: list[str] = []
    used = [name for name in dict.fromkeys(rows["environment"].dropna()) if name]
    for name in used:
        facts = data.environment.get(name, {})
        said += [_machine(name, facts), *_controls(facts)]
        said += _warnings(times[times["environment"] == name], name, facts)
    if len(used) > 1:
        said.append("Times of different environments do not compare; no ratio is taken between them.")
    return tuple(text for text in said if text)


def _machine(name: str, facts: Mapping[str, Any]) -> str:
    known = [
        str(facts.get("gpu") or facts.get("cpu") or ""),
        f"{facts['cores']} cores" if "cores" in facts else "",
        f"torch {facts['torch']}" if "torch" in facts else "",
        f"python {facts['python']}" if "python" in facts else "",
    ]
    roofs = facts.get("roofs", {})
    peaks = [f"{key.removesuffix('_flops')} {roofs[key] / 1e9:.3g} GFLOP/s" for key in roofs if key.endswith("_flops")]
    peaks += [f"copy {roofs['bytes'] / 1e9:.3g} GB/s"] if "bytes" in roofs else []
    threads = f" on {int(roofs['threads'])} threads" if "threads" in roofs else ""
    roof = f" Its roofs{threads}: {', '.join(peaks)}." if peaks else ""
    return f"Environment {name}: {', '.join(text for text in known if text)}.{roof}"


def control_spread(facts: Mapping[str, Any]) -> dict[str, float]:
    """The sd over processes of each control row, relative to its median; only those of two or more processes."""
    found = {}
    for name, seconds in facts.get("controls", {}).items():
        if len(seconds) > 1:
            found[name] = float(np.std(seconds, ddof=1) / np.median(seconds))
    return found


def _controls(facts: Mapping[str, Any]) -> Iterator[str]:
    spread = control_spread(facts)
    if spread:
        n = max(len(seconds) for seconds in facts["controls"].values())
        rows = ", ".join(f"{name} {100 * value:.1f} %" for name, value in spread.items())
        yield f"Control rows, sd over {n} processes: {rows}."


def _warnings(times: pd.DataFrame, name: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """Each with its cause and the remedy."""
    yield from _disturbed(facts, name)
    if len(times) and (times["n"].astype(float) <= 1).all():
        yield "One process: no intervals. Measure in five processes to know how far the times can be trusted."
    between = _worst(times, (times["sd"] / times["value"]).astype(float), BETWEEN)
    within = _worst(times, times["iqr"].astype(float), WITHIN)
    if between:
        yield f"Wide spread over processes (sd above {100 * BETWEEN:g} %): {between}. {_cause(facts)}"
    if within:
        yield (
            f"Wide spread within processes (interquartile range above {100 * WITHIN:g} %): {within}. {_cause(facts)}"
        )


def _disturbed(facts: Mapping[str, Any], name: str) -> Iterator[str]:
    """What disturbed the timing processes of an environment: one sentence for each kind of thing, of the worst."""
    moments = sorted(facts.get("disturbances", ()), key=lambda what: -what["other_load"] - what["steal"])
    said = {tuple(text.split()[:2]): text for what in reversed(moments) for text in explain(what, 0.0)}
    for text in said.values():
        yield f"On {name} {text}."


def _worst(times: pd.DataFrame, spread: pd.Series, limit: float) -> str:
    """The rows above the limit, the widest first, at most `NAMED` by name."""
    wide = times.assign(spread=spread)[spread > limit].sort_values("spread", ascending=False)
    shown = [
        f"{algorithm} {kernel} {100 * value:.0f} %"
        for algorithm, kernel, value in wide.head(NAMED)[["algorithm", "kernel", "spread"]].itertuples(index=False)
    ]
    more = f" and {len(wide) - NAMED} more" if len(wide) > NAMED else ""
    return ", ".join(shown) + more


def _cause(facts: Mapping[str, Any]) -> str:
    policy = facts.get("variables", {}).get("OMP_WAIT_POLICY")
    if policy is not None and policy != "PASSIVE":
        return (
            f"Cause: OMP_WAIT_POLICY={policy} lets threads spin while they wait, which costs many times beside other "
            "work; set it to PASSIVE."
        )
    spread = control_spread(facts)
    if not spread:
        return "Cause unknown without control rows: measure again in more processes."
    moved = [name for name, value in spread.items() if value > STILL]
    if not moved:
        return (
            "The control rows held still, so the cause lies in these kernels (memory placement, threads that share a "
            "core): try one thread, or more processes."
        )
    if moved == ["matmul"]:
        return (
            "Cause: the control row on several threads moved, the plain loop did not: another job takes one of the "
            "cores. Stop it, or measure with fewer threads."
        )
    return (
        f"Cause: the control rows moved too ({', '.join(moved)}), so the machine did: a shared host, its clock "
        "frequency or heat. Measure again when it is quiet, or in more processes."
    )
