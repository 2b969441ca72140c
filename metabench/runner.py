"""The parent: plans a suite's rows, has a worker process do what is pending, makes each result durable at once.

Never imports torch. The worker may die at any moment: its rows become `failed` with the reason, and the next job gets
a fresh worker. The parent may die at any moment: the worker notices and stops, and the next run computes only what
is missing, trainings going on from their checkpoints.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from metabench import environment
from metabench.cells import unsupported
from metabench.errors import ConfigError, Interrupted, NothingRan, WorkerError
from metabench.plan import Job, Row, is_done, jobs_of, manifest_of, override, rows_of, select_rows
from metabench.store import FINAL, NOT_HERE, Key, Measurement, Run
from metabench.suite import Suite


class Watch(Protocol):
    """Is told what happens during a run; the runner itself never formats."""

    def begin(self, run: Run, rows: int, done: int) -> None:
        """The run starts: `done` of `rows` rows need no work."""

    def job(self, number: int, title: str, jobs: int) -> None:
        """Job `number` of `jobs` starts: a training with its cells."""

    def progress(self, job: int, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """The training of a job is at `step` of `steps`."""

    def row(self, row: Measurement) -> None:
        """A row is finished and durable."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its folder, the rows asked for, and those of them that are not ok or skipped."""

    run: Run
    rows: int
    bad: tuple[Measurement, ...]

    @property
    def exit_code(self) -> int:
        """0 good, 3 a cell failed."""
        return 3 if self.bad else 0


def run(
    suite: Suite,
    *,
    out: Path,
    watch: Watch,
    select: str = "",
    device: str | None = None,
    seeds: Sequence[int] | None = None,
    resume: bool = True,
    extend: Path | None = None,
    jobs: int = 1,
) -> Outcome:
    """Run what is pending of the suite, in the newest run of it under `out` (or `extend`, or a new one).

    `jobs` trainings run side by side, with the cores shared among them; timings always run alone.

    Raises:
        StoreError: the output folder cannot be written, or is being written by another process.
        ConfigError: `device` cuda on a machine without it.
        Interrupted: Ctrl-C or SIGTERM; all finished rows and the training's checkpoint are kept.
    """
    asked = override(suite, seeds=seeds, device=device)
    rows = rows_of(asked)
    chosen = select_rows(rows, select)
    if not chosen:
        raise NothingRan(f"no row of {suite.name} holds all of {select!r}; see metabench run {suite.name} --plan")
    folder = _folder(suite, out, resume, extend, watch) or Run.create(out, suite.name, manifest_of(asked, rows, None))
    with folder.writing():
        done = folder.measurements()
        _tell_stale(chosen, done, watch)
        partial = seeds is not None or device is not None or extend is not None
        manifest = manifest_of(asked, rows, folder if partial else None)
        _tell_dropped(folder.manifest, manifest, watch)
        folder.manifest = {**folder.manifest, **manifest}
        folder.save_manifest()
        left = [row for row in chosen if not is_done(row, done)]
        watch.begin(folder, len(chosen), len(chosen) - len(left))
        if left:
            _Execution(asked, folder, watch, insist=device, jobs=jobs).execute(left)
    finished = folder.measurements()
    bad = [finished[row.key] for row in chosen if finished[row.key].status not in FINAL]
    return Outcome(folder, len(chosen), tuple(bad))


def _folder(suite: Suite, out: Path, resume: bool, extend: Path | None, watch: Watch) -> Run | None:
    """The run to go on with, or None for a new one."""
    if extend is None:
        if not resume:
            return None
        newest = Run.newest(out, suite.name)
        unread = Run.unreadable(out, suite.name)
        if newest is None and unread:
            watch.note(f"{unread}; a new run is started")
        return newest
    folder = Run.open(extend)
    if folder.manifest["suite"] != suite.name:
        raise ConfigError(f"--extend {extend}: a run of suite {folder.manifest['suite']}, not of {suite.name}")
    return folder


def _tell_stale(rows: Iterable[Row], done: Mapping[Key, Measurement], watch: Watch) -> None:
    stale = [row for row in rows if row.key in done and done[row.key].hash not in (row.hash, NOT_HERE)]
    if stale:
        names = ", ".join(sorted({row.cell.algorithm for row in stale}))
        watch.note(f"{len(stale)} rows are measured again: their code, protocol or torch changed ({names})")


def _tell_dropped(old: Mapping[str, Any], new: Mapping[str, Any], watch: Watch) -> None:
    listed = {(row["cell"], row["measure"]) for row in new["rows"]}
    dropped = [row for row in old["rows"] if (row["cell"], row["measure"]) not in listed]
    if dropped:
        watch.note(f"{len(dropped)} earlier rows leave the tables: they are not in this plan, or their code changed")


class _Execution:
    """One run's work: `jobs` workers side by side train and score; then one worker alone takes the times."""

    def __init__(self, suite: Suite, folder: Run, watch: Watch, *, insist: str | None, jobs: int) -> None:
        self.suite, self.folder, self.watch, self.insist, self.lanes = suite, folder, watch, insist, jobs
        self.hired: set[Worker] = set()
        self.stopping = False
        self.cuda = False
        self.lock = threading.RLock()  # one line at a time into the store and onto the screen

    def execute(self, rows: Sequence[Row]) -> None:
        """Do the rows.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
        """
        cores = environment.cores()
        threads = min(self.suite.threads or cores, max(1, cores // self.lanes))
        try:
            first = self._hire(threads)
            if self.insist == "cuda" and not self.cuda:
                raise ConfigError("--device cuda: this machine has no CUDA device that torch can use; drop --device")
            jobs = jobs_of([row for row in rows if not self._skip(row, first)])
            trainings = [job for job in jobs if job.mode == "train"]
            self._spread(trainings, self.lanes, threads, first)
            self._spread(jobs[len(trainings) :], 1, self.suite.threads or cores, None)
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted("interrupted; finished rows are kept, the same command goes on from here") from None
        finally:
            for worker in self.hired:
                worker.close()

    def _spread(self, jobs: Sequence[Job], lanes: int, threads: int, first: Worker | None) -> None:
        """Do the jobs in `lanes` lanes, each with a worker of its own; the first error of a lane ends them all."""
        todo = collections.deque(enumerate(jobs, 1))
        lanes = min(lanes, len(jobs))
        with ThreadPoolExecutor(max(lanes, 1)) as pool:
            started = [
                pool.submit(self._lane, todo, len(jobs), threads, first if n == 0 else None) for n in range(lanes)
            ]
            try:
                for lane in as_completed(started):
                    lane.result()
            except BaseException:
                todo.clear()
                self._stop()
                raise

    def _lane(self, todo: collections.deque[tuple[int, Job]], total: int, threads: int, worker: Worker | None) -> None:
        while not self.stopping:
            try:
                number, job = todo.popleft()
            except IndexError:
                break
            if job.mode == "train":
                with self.lock:
                    self.watch.job(number, job.title, total)
            worker = self._do(job, number, worker, threads)
        if worker:
            worker.close()

    def _hire(self, threads: int) -> Worker:
        """A live worker, and what it says about this machine."""
        worker = Worker(threads, self.suite.plugins, self.folder.path / "worker.log")
        self.hired.add(worker)
        if self.stopping:
            worker.ask_to_stop()
        hello = worker.hello()
        self.cuda = bool(hello["cuda"])
        facts = environment.stable({k: hello[k] for k in ("torch", "gpu", "threads")})
        worker.environment = environment.name(facts)
        with self.lock:
            self.folder.add_environment(worker.environment, {**facts, "readings": environment.volatile()})
        return worker

    def _stop(self) -> None:
        """Ask all workers to save and end, and wait for them; a second Ctrl-C ends them at once."""
        if not self.stopping:
            self.stopping = True
            self.watch.note("stopping: checkpoints are being written (Ctrl-C again to give them up)")
            hired = list(self.hired)  # a lane may be hiring
            try:
                for worker in hired:
                    worker.ask_to_stop()
                for worker in hired:
                    worker.wait()
            except KeyboardInterrupt:
                for worker in hired:
                    worker.kill()

    def _skip(self, row: Row, worker: Worker) -> bool:
        """Store rows that cannot run here or at all, with the reason."""
        reason = unsupported(row.cell, self.suite.catalogue)
        digest = row.hash
        if reason is None and row.cell.device == "cuda" and not self.cuda:
            reason, digest = "no CUDA device on this machine", NOT_HERE
        if reason is None:
            return False
        self._store(row, {"status": "skipped", "reason": reason}, worker.environment, digest=digest)
        return True

    def _do(self, job: Job, number: int, worker: Worker | None, threads: int) -> Worker | None:
        """Do one job; returns the worker for the next one, or None if it died."""
        left = {row.key: row for row in job.rows}
        message = job.message(number, self.suite, self.folder.path)
        place = worker.environment if worker else ""
        final = True
        try:
            worker = worker or self._hire(threads)
            place = worker.environment
            worker.send(message)
            for heard in worker.messages():
                if heard["kind"] == "progress":
                    with self.lock:
                        self.watch.progress(number, heard["step"], heard["steps"], heard["metrics"])
                elif heard["kind"] == "result":
                    final &= heard["status"] in (*FINAL, "diverged")
                    self._store(left.pop((heard["cell"], heard["measure"])), heard, place)
                elif heard["kind"] == "log":
                    worker.log(heard["text"])
                elif heard["kind"] == "done":
                    break
        except WorkerError as error:
            worker = None
            if not self.stopping:
                for row in left.values():
                    self._store(row, {"status": "failed", "reason": str(error)}, place)
        except BaseException:
            if worker:
                worker.kill()  # nobody hears it any more: it would wait for ever at a full pipe
            raise
        if job.mode == "train" and final and not left:  # a failed row goes on from the checkpoint
            checkpoint = Path(message["checkpoint"])
            for file in checkpoint.parent.glob(f"{checkpoint.stem}.*"):  # and what a kill left half written
                file.unlink(missing_ok=True)
        return worker

    def _store(self, row: Row, heard: Mapping[str, Any], place: str, *, digest: str | None = None) -> None:
        samples = heard.get("samples")
        measurement = Measurement(
            cell=row.cell.id,
            measure=row.measure,
            status=heard["status"],
            reason=heard.get("reason", ""),
            unit=heard.get("unit", ""),
            hash=digest or row.hash,
            environment=place,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            facts=heard.get("facts", {}),
            **(_summary(samples) if samples else {}),
        )
        with self.lock:
            self.watch.row(self.folder.append(measurement, samples))


def _summary(samples: Mapping[str, Any]) -> dict[str, Any]:
    """n, value, interval and sd: over episodes for scores; for times the median, n counts processes."""
    from metabench import stats

    if "seconds" in samples:
        return {"n": 1, "value": statistics.median(samples["seconds"])}
    found = stats.mean_interval(samples["scores"])
    return {"n": found.n, "value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}


class Worker:
    """The worker process as its parent sees it."""

    def __init__(self, threads: int, plugins: Sequence[Path], log: Path) -> None:
        self.environment = ""
        variables = environment.worker_environment(threads)
        variables["METABENCH_PLUGINS"] = json.dumps([str(p) for p in plugins])
        self._log = log.open("a", encoding="utf-8", errors="backslashreplace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "metabench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=variables,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then asks for a stop
        )

    def hello(self) -> dict[str, Any]:
        """The worker's first message: torch, devices, threads."""
        try:
            hello = next(self.messages())
            if hello["v"] != environment.PROTOCOL:
                raise WorkerError(f"it speaks protocol {hello['v']}, not {environment.PROTOCOL}; reinstall metabench")

            return hello
        except WorkerError as error:
            raise WorkerError(f"{self._log.name}: at its start, {error}") from error

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._death()) from None

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the worker says, until it dies.

        Raises:
            WorkerError: it died; the message says how.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it died while saying it
                yield json.loads(line)
        raise WorkerError(self._death())

    def log(self, text: str) -> None:
        """Keep a text beside what the worker printed."""
        self._log.write(text + "\n")
        self._log.flush()

    def ask_to_stop(self) -> None:
        """Ask it to save its checkpoint and end."""
        if self._process.poll() is None:
            with contextlib.suppress(WorkerError):
                self.send({"kind": "stop"})

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it at once, and close all that leads to it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()

    def _death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the worker was killed (signal 9): often the machine ran out of memory; see worker.log"
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the worker ended {how}; its last words are in worker.log"
