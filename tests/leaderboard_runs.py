"""Runs for the tests of leaderboards: made-up scores in real run folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from metabench import environment
from metabench.cells import coordinates_of
from metabench.stats import mean_interval
from metabench.store import Measurement, Run

STABLE = {"cpu": "a cpu", "cores": 2, "threads": 1, "torch": "2.0", "gpu": None}


def cell_of(algorithm, seed, *, data="glyphs[alphabets]", task="5w1s15q", norm="running", train="5w1s1q*10", more=""):
    inside = ",".join(part for part in (more, f"train={train}" if train else "") if part)
    name = f"{algorithm}[{inside}]" if inside else algorithm
    return f"{name}/{data}/{task}/{norm}/cpu-float32/seed{seed}"


def row(algorithm, seed, scores, *, measure="accuracy", status="ok", sources="c0ffee000000-2.0", facts=None, **where):
    """One row to be: `scores` per episode (quality), or seconds per process (times)."""
    return {
        "cell": cell_of(algorithm, seed, **where), "measure": measure, "scores": scores, "status": status,
        "sources": sources, "facts": facts or {},
    }  # fmt: skip


def run_of(out, rows, *, ids=None, seed=0, at="2026-01-01T00:00:00+00:00", name=None, stable=None):
    """A run folder of these rows; episodes are named by `ids`, or e0, e1 ..."""
    stable = {**STABLE, **(stable or {})}
    place = environment.name(stable)
    cells = {one["cell"]: {"cell": one["cell"], **stated(one["cell"])} for one in rows}
    listed = [{"cell": o["cell"], "measure": o["measure"], "hash": "h", "sources": o["sources"]} for o in rows]
    episodes = max((len(o["scores"]) for o in rows if o["measure"] == "accuracy"), default=0)
    manifest = {"suite": "s", "controls": [], "cells": cells, "rows": listed, "metabench": "0.1.0", "at": at}
    manifest["evaluation"] = {"episodes": episodes, "seed": seed, "selection": "last"}
    run = Run.create(out, "s", manifest)
    if name:
        run = Run.open(run.path.rename(run.path.with_name(name)))
    run.add_environment(place, {**stable, "readings": {"load": 1}})
    with run.writing():
        for one in rows:
            _append(run, one, ids, place, at)
    return run.path


def stated(cell):
    known = coordinates_of(cell)
    trained = {"selection": "last" if known["train_spec"] else ""}
    keep = {k: v for k, v in known.items() if k not in ("trained", "data", "call")}
    inside = known["trained"].partition("[")[2].rstrip("]").split(",")
    params = {name: value_of(text) for name, text in (i.split("=") for i in inside if "=" in i) if name != "train"}
    return {**keep, **trained, "params": json.dumps(params, sort_keys=True)}


def value_of(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def rewritten(path: Path, file: str, change) -> Path:
    """Put every line of a run's file, or its manifest, through `change`; None leaves a line out."""
    target = path / file
    text = target.read_text(encoding="utf-8")
    if file == "manifest.json":
        target.write_text(json.dumps(change(json.loads(text))))
        return path
    changed = [change(json.loads(line)) for line in text.splitlines()]
    target.write_text("".join(json.dumps(one) + "\n" for one in changed if one is not None))
    return path


def unplanned(path: Path, *cells: str) -> Path:
    """Take these cells out of a run's plan: what was measured of them stays in its lines."""
    return rewritten(path, "manifest.json", lambda m: {**m, "rows": [r for r in m["rows"] if r["cell"] not in cells]})


def submitted(path: Path, name: str) -> Path:
    """Say that somebody handed the run in."""
    (path / "submission.json").write_text(json.dumps({"submitter": name}))
    return path


def _append(run, one, ids, place, at):
    base = {"cell": one["cell"], "measure": one["measure"], "hash": "h", "environment": place, "at": at}
    if one["status"] != "ok":
        run.append(Measurement(**base, status=one["status"], reason="it broke"))
        return
    if "accuracy" not in one["measure"]:
        values = list(one["scores"])
        run.append(
            Measurement(
                **base,
                status="ok",
                unit="s",
                n=len(values),
                value=float(np.median(values)),
                facts={"processes": values, **one["facts"]} if len(values) > 1 else one["facts"],
            )
        )
        return
    import hashlib

    scores = [float(x) for x in one["scores"]]
    names = list(ids or [f"e{i}" for i in range(len(scores))])
    digest = hashlib.sha256("".join(names).encode()).hexdigest()[:12]
    found = mean_interval(scores)
    facts = {"episodes_hash": digest, **one["facts"]}
    measured = Measurement(
        **base, status="ok", unit="fraction", n=found.n, value=found.value, ci_low=found.low, ci_high=found.high,
        sd=found.sd, facts=facts,
    )  # fmt: skip
    run.append(measured, {"scores": scores, "episodes": names})


def edited(path: Path, file: str, before: str, after: str) -> Path:
    """Change one text in a file of a run."""
    target = path / file
    text = target.read_text(encoding="utf-8")
    assert before in text, (file, before)
    target.write_text(text.replace(before, after, 1), encoding="utf-8")
    return path


def trials(rng, mean, *, seeds=3, episodes=40, spread=0.005, hard=None):
    """Scores of `seeds` trainings on the same episodes: a mean, and what seeds and episodes change."""
    hard = np.zeros(episodes) if hard is None else hard
    table = mean + spread * rng.normal(size=(seeds, 1)) + hard + 0.02 * rng.normal(size=(seeds, episodes))
    return np.clip(np.round(table * 75) / 75, 0, 1)
