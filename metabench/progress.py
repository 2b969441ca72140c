"""What a run shows while it works: live bars with an ETA on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from metabench.store import Measurement, Run

QUIET_SECONDS = 30.0  # off a terminal a long training says where it is about this often


class Show:
    """A `runner.Watch` on standard error."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[more]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._rows: TaskID | None = None
        self._trainings: dict[int, TaskID] = {}
        self._began: dict[int, float] = {}
        self._said: dict[int, float] = {}
        self._first: dict[int, int] = {}
        self._count = self._total = 0
        self._skipped: collections.Counter[str] = collections.Counter()
        self.run: Run | None = None

    def __enter__(self) -> Show:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()
        for reason, times in self._skipped.items():
            if times > 1:
                self._line(f"{times} rows skipped: {reason}", style="dim")

    def begin(self, run: Run, rows: int, done: int) -> None:
        """Say where the run is kept and how much of it is there."""
        self.run = run
        kept = f", {done} of them already measured" if done else ""
        self._line(f"{run.manifest['suite']}: {rows} rows{kept} -> {_short(run)}")
        self._count, self._total = done, rows
        self._rows = self._bars.add_task("rows", total=rows, completed=done, more="")

    def job(self, number: int, title: str, jobs: int) -> None:
        """Name the job."""
        self._began[number] = self._said[number] = time.monotonic()
        self._line(f"({number}/{jobs}) {title}", style="dim")

    def progress(self, job: int, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Move the training's bar; off a terminal say a line now and then."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        if job not in self._trainings:  # what came before (loading, warm-up) says nothing of what is left
            self._first[job], self._began[job] = step, time.monotonic()
            self._trainings[job] = self._bars.add_task(f"job {job}", total=steps, completed=step, more=shown)
        self._bars.update(self._trainings[job], completed=step, total=steps, more=shown, visible=step < steps)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said[job] > QUIET_SECONDS:
            self._said[job] = now
            done = step - self._first[job]  # a resumed training starts further on
            left = (now - self._began[job]) / max(done, 1) * (steps - step)
            self._line(f"    ({job}) step {step}/{steps}, about {left:.0f} s left  {shown}", style="dim")

    def row(self, row: Measurement) -> None:
        """Say a finished row."""
        self._count += 1
        if self._rows is not None:
            self._bars.update(self._rows, completed=self._count)
        if row.status == "skipped":
            self._skipped[row.reason] += 1
            if self._skipped[row.reason] > 1:
                return  # the first says it; how many there were is said at the end
        good = row.status == "ok"
        said = _value(row) if good else f"{row.status}: {row.reason}"
        style = None if good or row.status == "skipped" else "red"
        self._line(f"[{self._count}/{self._total}] {row.cell} {row.measure}: {said}", style=style)

    def note(self, text: str) -> None:
        """Say something the user should know."""
        self._line(f"note: {text}", style="yellow")

    def _line(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(text), style=style, soft_wrap=True, highlight=False)


class ShowPairs:
    """A `gate.Watch` on standard error: a line per pair on a terminal, elsewhere one now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said = self._began = 0.0

    def pair(self, stage: str, number: int, of: int, rows: int) -> None:
        """Say where the check is."""
        now = time.monotonic()
        self._began = now if number == 1 else self._began
        if number > 1 and now - self._said < QUIET_SECONDS and not self.console.is_terminal:
            return
        self._said = now
        where = f"{stage} {number}, next decision after {of}" if of else stage
        left = (now - self._began) / (number - 1) * (of - number + 1) if number > 1 else 0.0
        when = f", about {left:.0f} s" if left else ""
        kernels = f"{rows} kernel{'s' * (rows != 1)}"
        self.console.print(f"{where}{when}: {kernels}", style="dim", highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Say something the user should know."""
        self.console.print(f"note: {text}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def _short(run: Run) -> str:
    path = run.path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _value(row: Measurement) -> str:
    if row.value is None:
        return "-"
    if row.unit == "s":
        return f"{row.value * 1e3:.2f} ms" if row.value < 1 else f"{row.value:.1f} s"
    half = "" if row.ci_low is None or row.ci_high is None else f" ± {100 * (row.ci_high - row.ci_low) / 2:.2f}"
    if row.unit == "fraction":
        return f"{100 * row.value:.2f} %{half}"
    half = "" if row.ci_low is None or row.ci_high is None else f" ± {(row.ci_high - row.ci_low) / 2:.3g}"
    return f"{row.value:.4g}{half}"
