"""The parent's side of measuring cost: which kernel is called when, and what its slices come to. Never imports torch.

A shared machine's speed drifts by tens of per cent within seconds, so kernels are not timed one after the other: in
each of several fresh processes every kernel is sampled in short slices, in random order among all kernels, so that
drift hits all alike. Kernels that need another thread count or allocator live in workers of their own, pinned to the
same cores, of which one works while the others wait. The process is the unit: what a process makes of a kernel
(its memory layout, its caches) is constant in it. Two controls, a matrix product and a plain Python loop, are sampled
among the kernels: they tell the machine's drift from a change of ours.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from metabench import environment
from metabench.errors import WorkerError
from metabench.plan import Row, cost_message
from metabench.store import NOT_HERE, Key, Run
from metabench.suite import Suite
from metabench.workers import Worker

CONTROLS = ("matmul", "python")


class Setting(NamedTuple):
    """What a worker process is started with."""

    threads: int
    allocator: str


class Crew(Protocol):
    """Where workers come from, and where results go."""

    def hire(self, threads: int, allocator: str = "kept", *, pinned: bool = False) -> Worker:
        """A fresh worker that said hello."""

    def dismiss(self, worker: Worker) -> None:
        """End a worker."""

    def store(self, row: Row, heard: Mapping[str, Any], place: str, *, digest: str | None = None) -> None:
        """Make a row durable."""

    def job(self, title: str) -> Callable[[int, int], None]:
        """Announce a job; returns what tells its progress: (done, of)."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class _Sampled:
    """A kernel in one process: where it waits, and the slices taken so far."""

    name: Key  # a control's is ("", its name)
    digest: str
    worker: Worker
    number: int
    calls: Mapping[str, int]
    facts: Mapping[str, Any]
    slices: list[dict[str, Any]] = field(default_factory=list)

    def line(self, process: int) -> dict[str, Any]:
        """Its raw samples as samples.jsonl keeps them; `of` is a slice's inner steps, 0 for the kernel's own number."""
        cell, measure = self.name
        columns = ("order", "at", "of", "seconds", *(("device_seconds",) if self.slices[0]["device_seconds"] else ()))
        return {
            "cell": cell,
            "measure": measure,
            "process": process,
            "hash": self.digest,
            "environment": self.worker.environment,
            "calls": self.calls,
            "facts": self.facts,
            "launch_bound": sum(one["launch_bound"] for one in self.slices) / len(self.slices),
            **{column: [one[column] for one in self.slices] for column in columns},
        }


class _Died(Exception):
    """A worker died while it worked on a row or a control."""

    def __init__(self, name: Key, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


class Costs:
    """The rows of cost of one run."""

    def __init__(self, suite: Suite, folder: Run, crew: Crew) -> None:
        self.suite, self.folder, self.crew = suite, folder, crew
        self.cores = environment.cores()
        self.numbers = itertools.count()
        self.calls: dict[Key, Mapping[str, int]] = {}  # of a slice, found in the first process and used in all
        self.places: dict[Setting, str] = {}  # the environment of each setting's workers
        self.moments: list[dict[str, Any]] = []  # what disturbed each process

    def measure(self, rows: Sequence[Row]) -> None:
        """Measure the rows: counts, then memory, then times while nothing else of ours runs."""
        rows = [row for row in rows if self._fits(row)]
        self._count([row for row in rows if row.aspect not in ("time", "memory")])
        self._weigh([row for row in rows if row.aspect == "memory"])
        self._time([row for row in rows if row.aspect == "time"])

    def jobs(self, rows: Iterable[Row]) -> int:
        """How many jobs `measure` will announce."""
        kinds = {row.aspect if row.aspect in ("time", "memory") else "count" for row in rows}
        return len(kinds - {"time"}) + self.suite.timing.processes * ("time" in kinds)

    def _setting(self, row: Row) -> Setting:
        return Setting(row.cell.call.threads or self.suite.threads or self.cores, row.cell.call.allocator)

    def _fits(self, row: Row) -> bool:
        """Whether this machine has the threads a row asks for; else the row is stored as skipped."""
        asked = row.cell.call.threads or 1
        if asked <= self.cores:
            return True
        reason = f"{asked} threads asked for, metabench may use {self.cores} cores here"
        self.crew.store(row, {"status": "skipped", "reason": reason}, "", digest=NOT_HERE)
        return False

    def _count(self, rows: Sequence[Row]) -> None:
        """Counts do not depend on time: one worker, one row after the other."""
        if not rows:
            return
        tell = self.crew.job(f"counting the work of {_kernels(rows)}")
        worker: Worker | None = None
        for number, row in enumerate(rows, 1):
            worker = worker or self.crew.hire(self.cores)
            if not self._ask_value(row, worker):
                worker = None
            tell(number, len(rows))
        if worker:
            self._ask_roofs(worker)
            self.crew.dismiss(worker)

    def _weigh(self, rows: Sequence[Row]) -> None:
        """Memory: a fresh process for each row, which gives freed memory back at once: kept, it would count as well."""
        tell = self.crew.job(f"memory of {_kernels(rows)}, a fresh process each") if rows else None
        for number, row in enumerate(rows, 1):
            worker = self.crew.hire(self._setting(row).threads, "returned")
            self._ask_value(row, worker)
            self.crew.dismiss(worker)
            if tell:
                tell(number, len(rows))

    def _ask_value(self, row: Row, worker: Worker) -> bool:
        """Have one count made and stored; returns whether the worker lives."""
        try:
            heard = worker.ask({"kind": "count", "id": next(self.numbers), **cost_message(row)})
        except WorkerError as error:
            self.crew.store(row, {"status": "failed", "reason": str(error)}, worker.environment)
            return False
        self.crew.store(row, heard, worker.environment)
        return True

    def _ask_roofs(self, worker: Worker) -> None:
        """Measure what the machine could do at best, once per environment."""
        if "roofs" not in self.folder.environments()[worker.environment]:
            heard = worker.ask({"kind": "roofs", "id": next(self.numbers), "device": "cpu"})
            if heard["status"] == "ok":
                self.folder.add_environment(worker.environment, {"roofs": heard["roofs"]})

    def _time(self, rows: Sequence[Row]) -> None:
        """Process after process samples the rows; then each is summed up over them."""
        if not rows:
            return
        left = list(rows)
        for process in range(self.suite.timing.processes):
            tell = self.crew.job(f"timing {_kernels(left)}, process {process + 1} of {self.suite.timing.processes}")
            while not self._attempt(process, left, tell):
                pass  # without the row that it died of
        lines = self.folder.slices()
        for row in left:
            self._sum_up(row, self._lines(lines, row))
        self._sum_up_controls(lines)
        self._warn()

    def _attempt(self, process: int, left: list[Row], tell: Callable[[int, int], None]) -> bool:
        """Sample all rows in one fresh set of workers; False if one died: the row it died of is stored and out."""
        crew = {one: self.crew.hire(*one, pinned=True) for one in dict.fromkeys(map(self._setting, left))}
        self.places |= {one: worker.environment for one, worker in crew.items()}
        try:
            sampled = self._prepare_all(process, left, crew)
            pids = [worker.pid for worker in crew.values()]
            before = environment.read(pids)
            self._sample(sampled, random.Random(f"{self.folder.name}/{process}"), tell)
            self.moments.append(environment.disturbance(before, environment.read(pids)))
        except _Died as death:
            dead = [row for row in left if row.key == death.name]
            for row in dead:
                self.crew.store(row, {"status": "failed", "reason": death.reason}, self.places[self._setting(row)])
                left.remove(row)
            if not dead:
                raise WorkerError(f"the control {death.name[1]} could not be timed: {death.reason}") from None
            return False
        finally:
            for worker in crew.values():
                self.crew.dismiss(worker)
        for one in sampled:
            self.folder.append_slices(one.line(process))
        return True

    def _prepare_all(self, process: int, left: list[Row], crew: Mapping[Setting, Worker]) -> list[_Sampled]:
        """Make every row ready that this process is still to sample, and the controls; rows that cannot be are out."""
        kept = self.folder.slices()
        todo = [row for row in left if len(self._lines(kept, row)) <= process]
        ready = []
        for row in todo:
            worker = crew[self._setting(row)]
            message = {"kind": "prepare", **cost_message(row), "calls": self.calls.get(row.key)}
            heard = self._ask(worker, message, row.key)
            if heard["status"] != "ok":
                self.crew.store(row, heard, worker.environment)
                left.remove(row)
                continue
            self.calls.setdefault(row.key, heard["calls"])
            ready.append(_Sampled(row.key, row.hash, worker, heard["id"], heard["calls"], heard["facts"]))
        for worker in {one.worker: None for one in ready}:
            for name in CONTROLS:
                heard = self._ask(worker, {"kind": "control", "name": name, "device": "cpu"}, ("", name))
                ready.append(_Sampled(("", name), "", worker, heard["id"], heard["calls"], {}))
        return ready

    def _sample(self, sampled: Sequence[_Sampled], chance: random.Random, tell: Callable[[int, int], None]) -> None:
        """Slices of all kernels, round by round, each round in an order of its own."""
        parts = [(one, part) for one in sampled for part in one.calls]
        of = len(parts) * self.suite.timing.slices
        tell(0, of)
        for order in range(of):
            if order % len(parts) == 0:
                chance.shuffle(parts)
            one, part = parts[order % len(parts)]
            heard = self._ask(one.worker, {"kind": "slice", "of": one.number, "part": int(part)}, one.name)
            if heard["status"] != "ok":
                raise _Died(one.name, heard["reason"])
            one.slices.append({**heard, "order": order, "of": int(part)})
            tell(order + 1, of)

    def _ask(self, worker: Worker, message: Mapping[str, Any], name: Key) -> dict[str, Any]:
        try:
            return worker.ask({"id": next(self.numbers), **message})
        except WorkerError as error:
            raise _Died(name, str(error)) from error

    def _lines(self, kept: Mapping[Key, Sequence[dict[str, Any]]], row: Row) -> list[dict[str, Any]]:
        """The row's samples by processes of this machine and of what its hash covers."""
        place = self.places[self._setting(row)]
        return [one for one in kept.get(row.key, ()) if one["hash"] == row.hash and one["environment"] == place]

    def _sum_up(self, row: Row, lines: Sequence[Mapping[str, Any]]) -> None:
        """Store a row's time over its processes, or why there is none."""
        place = self.places[self._setting(row)]
        found = [_of_process(line) for line in lines]
        if not all(0 < one.seconds < math.inf for one in found):
            reason = "the slope over inner steps is not above 0: a step costs less than the noise of this machine"
            self.crew.store(row, {"status": "failed", "reason": reason}, place)
            return
        seconds = [one.seconds for one in found]
        facts = {**lines[-1]["facts"], "processes": seconds, "iqr": statistics.median(one.iqr for one in found)}
        if intercepts := [one.intercept for one in found if one.intercept is not None]:
            facts["intercept"] = statistics.median(intercepts)
        if device := [one.device for one in found if one.device is not None]:
            facts["device_seconds"] = statistics.median(device)
            facts["launch_bound"] = statistics.median(line["launch_bound"] for line in lines) > 0.5
        heard = {"status": "ok", "unit": "s", "processes": seconds, "facts": facts, "offset": lines[-1]["offset"]}
        self.crew.store(row, heard, place)

    def _sum_up_controls(self, lines: Mapping[Key, Sequence[Mapping[str, Any]]]) -> None:
        """Per environment, each control's seconds in each process."""
        for place in dict.fromkeys(self.places.values()):
            own = {name: [one for one in lines.get(("", name), ()) if one["environment"] == place] for name in CONTROLS}
            medians = {name: [_of_process(one).seconds for one in found] for name, found in own.items()}
            self.folder.add_environment(place, {"controls": medians})

    def _warn(self) -> None:
        """Say what disturbed the timing, and what to do about it; how wide rows spread, and why, is the report's."""
        for place in dict.fromkeys(self.places.values()):
            self.folder.add_environment(place, {"disturbances": self.moments})
        for text in dict.fromkeys(text for moment in self.moments for text in environment.explain(moment, 0.0)):
            self.crew.note(text)


class _OfProcess(NamedTuple):
    """What one process says of a kernel: seconds a call, relative interquartile range of its slices."""

    seconds: float
    iqr: float
    intercept: float | None
    device: float | None


def _of_process(line: Mapping[str, Any]) -> _OfProcess:
    """The median over slices; where slices are of several numbers of inner steps, the slope over these."""
    by_part: dict[int, list[float]] = {}
    for part, seconds in zip(line["of"], line["seconds"], strict=True):
        by_part.setdefault(part, []).append(seconds)
    medians = {part: statistics.median(seconds) for part, seconds in by_part.items()}
    iqr = statistics.median(_iqr(seconds) / medians[part] for part, seconds in by_part.items())
    if len(by_part) > 1:
        slope, intercept = statistics.linear_regression(list(medians), list(medians.values()))
        return _OfProcess(slope, iqr, intercept, None)
    device = statistics.median(line["device_seconds"]) if "device_seconds" in line else None
    return _OfProcess(next(iter(medians.values())), iqr, None, device)


def _iqr(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _kernels(rows: Sequence[Row]) -> str:
    return f"{len(rows)} kernel{'s' * (len(rows) != 1)}"
