"""The parent: plans a suite's rows, has a worker process do what is pending, makes each result durable at once.

Never imports torch. The worker may die at any moment: its rows become `failed` with the reason, and the next job gets
a fresh worker. The parent may die at any moment: the worker notices and stops, and the next run computes only what
is missing, trainings going on from their checkpoints.
"""

from __future__ import annotations

import collections
import shutil
import statistics
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from metabench import environment
from metabench.cells import KERNEL_MEASURES, unsupported
from metabench.costs import Costs
from metabench.errors import ConfigError, Interrupted, NothingRan, WorkerError
from metabench.keptweights import Weights, trains
from metabench.plan import Job, Row, is_done, jobs_of, manifest_of, override, rows_of, select_rows
from metabench.store import FINAL, NOT_HERE, Key, Measurement, Run, Status
from metabench.suite import Suite
from metabench.workers import Worker


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
    keep_weights: bool = False,
    weights: Path | Mapping[str, Path] = MappingProxyType({}),
) -> Outcome:
    """Run what is pending of the suite, in the newest run of it under `out` (or `extend`, or a new one).

    `jobs` trainings run side by side, with the cores shared among them; timings always run alone. With `keep_weights`
    the run's folder keeps every training's weights, and the plug-in algorithms that made them.

    With `weights`, a run that kept them, nothing is trained: they are loaded, and a row whose training it did not keep
    is skipped with the reason. Such a run stands apart from those that train. `weights` may also be files by cell id.

    Raises:
        StoreError: the output folder cannot be written, or is being written by another process.
        ConfigError: `device` cuda on a machine without it; `weights` that are of no training of the suite.
        Interrupted: Ctrl-C or SIGTERM; all finished rows and the training's checkpoint are kept.
    """
    asked = override(suite, seeds=seeds, device=device)
    rows: Sequence[Row] = rows_of(asked)
    if not select_rows(rows, select):
        raise NothingRan(f"no row of {suite.name} holds all of {select!r}; see metabench run {suite.name} --plan")
    loaded = Weights.kept_by(weights, asked, rows) if isinstance(weights, Path) else Weights(weights)
    rows = loaded.on(rows)
    chosen = select_rows(rows, select)
    manifest = manifest_of(asked, rows, None)
    of_weights = {"weights": loaded.source} if loaded.source else {}
    folder = _folder(suite, out, resume, extend, loaded, watch)
    folder = folder or Run.create(out, suite.name, {**manifest, **of_weights})
    with folder.writing():
        done = folder.measurements()
        _tell_stale(chosen, done, watch)
        done = comparable(folder, done, watch)
        partial = seeds is not None or device is not None or extend is not None
        manifest = manifest_of(asked, rows, folder) if partial else manifest
        _tell_dropped(folder.manifest, manifest, watch)
        folder.manifest = {**folder.manifest, **manifest, **of_weights}
        folder.save_manifest()
        left = [row for row in chosen if not is_done(row, done)]
        _tell_lacking(chosen, loaded, watch)
        if keep_weights:
            _keep_plugins(asked, folder)
            _tell_weightless(chosen, done, watch)
        watch.begin(folder, len(chosen), len(chosen) - len(left))
        if left:
            work = _Execution(asked, folder, watch, insist=device, jobs=jobs, keep=keep_weights, weights=loaded)
            work.execute(left)
    finished = folder.measurements()
    bad = [finished[row.key] for row in chosen if finished[row.key].status not in FINAL]
    return Outcome(folder, len(chosen), tuple(bad))


def _folder(suite: Suite, out: Path, resume: bool, extend: Path | None, weights: Weights, watch: Watch) -> Run | None:
    """The run to go on with, or None for a new one: one with loaded weights and one that trains are never the same."""
    if extend is None:
        if not resume:
            return None
        newest = Run.newest(out, suite.name)
        unread = Run.unreadable(out, suite.name)
        if newest is None and unread:
            watch.note(f"{unread}; a new run is started")
        if newest is not None and not goes_on(newest, weights):
            watch.note(f"a new run is started: {newest.name} {_weights_in_words(newest)}")
            return None
        return newest
    folder = Run.open(extend)
    if folder.manifest["suite"] != suite.name:
        raise ConfigError(f"--extend {extend}: a run of suite {folder.manifest['suite']}, not of {suite.name}")
    if not goes_on(folder, weights):
        raise ConfigError(f"--extend {extend}: that run {_weights_in_words(folder)}; the two kinds never mix")
    return folder


def goes_on(folder: Run, weights: Weights) -> bool:
    """Whether rows with these weights may join a run's: only where all of it has them from the same place."""
    return bool(folder.manifest.get("weights", "") == weights.source)


def _weights_in_words(folder: Run) -> str:
    source = folder.manifest.get("weights")
    return f"loaded the weights of {source}" if source else "trained weights of its own"


def comparable(folder: Run, done: Mapping[Key, Measurement], watch: Watch | None = None) -> dict[Key, Measurement]:
    """The measurements without the times of kernels that another machine took: such times never mix."""
    places = {name for name, facts in folder.environments().items() if not environment.here(facts)}
    elsewhere = {key for key, row in done.items() if key[1] in KERNEL_MEASURES and row.environment in places}
    elsewhere = {key for key in elsewhere if key[1].endswith("_time")}
    if elsewhere and watch is not None:
        watch.note(f"{len(elsewhere)} times are measured again: they were taken on another machine or software")
    return {key: row for key, row in done.items() if key not in elsewhere}


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


def _keep_plugins(suite: Suite, folder: Run) -> None:
    """Copy the algorithms that came as files of their own: without them nobody can run the weights again."""
    plugins = {suite.catalogue.algorithm(cell.algorithm) for cell in suite.points}
    for plugin in sorted((one for one in plugins if one.module is None), key=lambda one: one.name):
        target = folder.path / "plugins" / plugin.file.name
        same = [one.name for one in plugins if one.module is None and one.file.name == plugin.file.name]
        if len(same) > 1:
            raise ConfigError(f"--keep-weights: the plug-ins {' and '.join(sorted(same))} are both {target.name}")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(plugin.file, target)


def _tell_lacking(rows: Iterable[Row], weights: Weights, watch: Watch) -> None:
    lacking = [row for row in rows if trains(row) and row.cell.id in weights.lacking]
    if lacking:
        names = ", ".join(sorted({row.cell.algorithm for row in lacking}))
        watch.note(f"{len(lacking)} rows are not measured, and not trained anew: no weights of theirs ({names})")


def _tell_weightless(rows: Iterable[Row], done: Mapping[Key, Measurement], watch: Watch) -> None:
    old = [done[row.key] for row in rows if row.cell.train and is_done(row, done) and not row.kernel]
    old = [one for one in old if one.status == "ok" and not one.facts.get("weights")]
    if old:
        watch.note(f"{len(old)} finished rows keep no weights: add --no-resume to measure them anew, with weights")


class _Execution:
    """One run's work: `jobs` workers side by side train and score; then one worker alone takes the times."""

    def __init__(
        self,
        suite: Suite,
        folder: Run,
        watch: Watch,
        *,
        insist: str | None,
        jobs: int,
        keep: bool,
        weights: Weights,
    ) -> None:
        self.suite, self.folder, self.watch, self.insist, self.lanes = suite, folder, watch, insist, jobs
        self.keep_weights, self.weights = keep, weights
        self.hired: set[Worker] = set()
        self.stopping = False
        self.cuda = False
        self.announced = self.total = 0  # jobs
        self.lock = threading.RLock()  # one line at a time into the store and onto the screen

    def execute(self, rows: Sequence[Row]) -> None:
        """Do the rows.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
        """
        cores = environment.cores()
        threads = min(self.suite.threads or cores, max(1, cores // self.lanes))
        try:
            first = self.hire(threads)
            if self.insist == "cuda" and not self.cuda:
                raise ConfigError("--device cuda: this machine has no CUDA device that torch can use; drop --device")
            rows = [row for row in rows if not self._skip(row, first)]
            jobs, priced = jobs_of(rows, self.weights.files), [row for row in rows if row.kernel]
            costs = Costs(self.suite, self.folder, self)
            self.total = len(jobs) + costs.jobs(priced)
            self._spread(jobs, self.lanes, threads, first)
            first.close()
            costs.measure(priced)  # last, and alone: nothing else of ours runs then
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted("interrupted; finished rows are kept, the same command goes on from here") from None
        finally:
            for worker in self.hired:
                worker.close()

    def _spread(self, jobs: Sequence[Job], lanes: int, threads: int, first: Worker) -> None:
        """Do the jobs in `lanes` lanes, each with a worker of its own; the first error of a lane ends them all."""
        todo = collections.deque(enumerate(jobs, 1))
        lanes = min(lanes, len(jobs))
        with ThreadPoolExecutor(max(lanes, 1)) as pool:
            started = [pool.submit(self._lane, todo, threads, first if n == 0 else None) for n in range(lanes)]
            try:
                for lane in as_completed(started):
                    lane.result()
            except BaseException:
                todo.clear()
                self._stop()
                raise

    def _lane(self, todo: collections.deque[tuple[int, Job]], threads: int, worker: Worker | None) -> None:
        while not self.stopping:
            try:
                number, job = todo.popleft()
            except IndexError:
                break
            with self.lock:
                self.announced = max(self.announced, number)
                self.watch.job(number, job.title, self.total)
            worker = self._do(job, number, worker, threads)
        if worker:
            worker.close()

    def hire(self, threads: int, allocator: str = "kept", *, pinned: bool = False) -> Worker:
        """A live worker, and what it says about this machine."""
        log = self.folder.path / "worker.log"
        worker = Worker(threads, self.suite.plugins, log, allocator=allocator)
        self.hired.add(worker)
        if self.stopping:
            worker.ask_to_stop()
        hello = worker.hello()
        if pinned:
            worker.pin()
        self.cuda = bool(hello["cuda"])
        facts = environment.stable({k: hello[k] for k in ("torch", "gpu", "threads")}, allocator=allocator)
        worker.environment = environment.name(facts)
        with self.lock:
            self.folder.add_environment(worker.environment, {**facts, "readings": environment.volatile()})
        return worker

    def dismiss(self, worker: Worker) -> None:
        """End a worker."""
        worker.close()
        self.hired.discard(worker)

    def job(self, title: str) -> Callable[[int, int], None]:
        """Announce a job that is no training; returns what tells its progress."""
        self.announced += 1
        number = self.announced
        self.watch.job(number, title, self.total)
        return lambda done, of: self.watch.progress(number, done, of, {})

    def note(self, text: str) -> None:
        """Pass on what the user should know."""
        self.watch.note(text)

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
        status: Status = "skipped"
        digest, file = row.hash, self.weights.files.get(row.cell.id)
        if reason is None and row.cell.device == "cuda" and not self.cuda:
            reason, digest = "no CUDA device on this machine", NOT_HERE
        elif reason is None and (refused := self.weights.refusal(row)):
            status, reason = refused
            digest = row.hash if file else NOT_HERE  # that run may yet keep them
        if reason is None:
            return False
        facts = {"weights": file.name} if file else {}
        said = {"status": status, "reason": reason, "facts": facts}
        self.store(row, said, worker.environment, digest=digest)
        return True

    def _do(self, job: Job, number: int, worker: Worker | None, threads: int) -> Worker | None:
        """Do one job; returns the worker for the next one, or None if it died."""
        left = {row.key: row for row in job.rows}
        message = job.message(number, self.suite, self.folder.path, keep_weights=self.keep_weights)
        place = worker.environment if worker else ""
        final = True
        try:
            worker = worker or self.hire(threads)
            place = worker.environment
            worker.send(message)
            for heard in worker.messages():
                if heard["kind"] == "progress":
                    with self.lock:
                        self.watch.progress(number, heard["step"], heard["steps"], heard["metrics"])
                elif heard["kind"] == "result":
                    final &= heard["status"] in (*FINAL, "diverged")
                    self.store(left.pop((heard["cell"], heard["measure"])), heard, place)
                elif heard["kind"] == "log":
                    worker.log(heard["text"])
                elif heard["kind"] == "done":
                    break
        except WorkerError as error:
            worker = None
            if not self.stopping:
                for row in left.values():
                    self.store(row, {"status": "failed", "reason": str(error)}, place)
        except BaseException:
            if worker:
                worker.kill()  # nobody hears it any more: it would wait for ever at a full pipe
            raise
        if final and not left:  # a failed row goes on from the checkpoint
            checkpoint = Path(message["checkpoint"])
            for file in checkpoint.parent.glob(f"{checkpoint.stem}.*"):  # and what a kill left half written
                file.unlink(missing_ok=True)
        return worker

    def store(self, row: Row, heard: Mapping[str, Any], place: str, *, digest: str | None = None) -> None:
        """Make a row durable: what a worker said of it, or what `Costs` made of its slices."""
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
            samples=heard.get("offset"),
            **_summary(heard),
        )
        with self.lock:
            self.watch.row(self.folder.append(measurement, samples))


def _summary(heard: Mapping[str, Any]) -> dict[str, Any]:
    """n, value, interval and sd: over episodes for scores, over processes for times; a count is what it is."""
    from metabench import stats

    if "value" in heard:
        return {"n": 1, "value": heard["value"]}
    if "processes" in heard:
        found = stats.median_interval(heard["processes"])
    elif samples := heard.get("samples"):
        if "seconds" in samples:
            return {"n": 1, "value": statistics.median(samples["seconds"])}
        found = stats.mean_interval(samples["scores"])
    else:
        return {}
    return {"n": found.n, "value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}
