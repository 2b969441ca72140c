"""A run on disk: append-only lines that a kill cannot lose, read back as rows.

`samples.jsonl` takes the raw samples, then `measurements.jsonl` the summary with a pointer to them; each line is
flushed to the disk before the next is begun. A torn last line (a kill while writing) is cut off on the next
append and ignored on reading. Everything else in the folder is derived or moved into place when complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import IO, Any, Literal

from pydantic_core import from_json

from metabench.cells import KERNEL_MEASURES
from metabench.disk import write_whole
from metabench.errors import StoreError

SCHEMA_VERSION = 1
SAMPLES_BUFFER = 2**18  # bytes: rows are read mostly in the order in which they were written
MANIFEST_KEYS = frozenset({"suite", "cells", "rows", "controls"})  # what reading a run relies on
Status = Literal["ok", "skipped", "failed", "timeout", "diverged"]
FINAL: frozenset[str] = frozenset({"ok", "skipped"})  # the others are pending again on the next run
NOT_HERE = "not-here"  # the hash of a row that this machine cannot measure: shown, and pending on another machine
Key = tuple[str, str]  # (cell id, measure)

COLUMNS = (
    "run", "suite", "cell", "algorithm", "params", "backbone", "dataset", "split", "ways", "shots", "queries",
    "bn_mode", "device", "precision", "seed", "measure", "unit", "n", "value", "ci_low", "ci_high", "sd", "status",
    "reason", "environment", "rotations", "norm", "selection", "train_spec", "train_steps", "tasks", "threads",
    "kernel", "episodes_hash", "training", "code", "within", "stream",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One finished row: a summary with a pointer into the raw samples, or a status with its reason.

    `hash` covers all that determines the number; `facts` is what only the worker knew (backbone, steps, threads).
    """

    cell: str
    measure: str
    status: Status
    reason: str = ""
    unit: str = ""
    n: int | None = None
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    sd: float | None = None
    hash: str = ""
    environment: str = ""
    at: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None  # byte offset of its line in samples.jsonl

    @property
    def key(self) -> Key:
        """What identifies the row in a run."""
        return self.cell, self.measure


class Run:
    """A run's folder. `Run.open` reads; `writing` adds the right to append (one process at a time)."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._samples: IO[bytes] | None = None  # open from the first row that is read: a run has thousands

    @classmethod
    def create(cls, out: Path, suite: str, manifest: Mapping[str, Any]) -> Run:
        """A new folder `<out>/<suite>/<UTC stamp>-<short id>` with its manifest, and `latest` pointing at it.

        Raises:
            StoreError: the folder cannot be made.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = out / suite / f"{stamp}-{secrets.token_hex(3)}"
        with _disk(path):
            path.mkdir(parents=True)
            run = cls(path, {"schema_version": SCHEMA_VERSION, **manifest})
            run.save_manifest()
            latest = path.parent / "latest"
            temporary = path.parent / f".latest-{path.name}"
            temporary.symlink_to(path.name)
            temporary.replace(latest)
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            StoreError: no manifest there, a damaged one, or one of another schema.
        """
        file = path / "manifest.json"
        if not file.is_file():
            raise StoreError(f"{path}: not a run folder (no manifest.json); runs look like results/runs/SUITE/latest")
        try:
            manifest = parsed(file.read_bytes())
            version = manifest["schema_version"]
            missing = MANIFEST_KEYS - manifest.keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{file}: cannot be read as a run's manifest ({error}); the run is damaged") from error
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: a run of schema {version}, this metabench reads schema {SCHEMA_VERSION}; "
                "use the metabench version that made it, or run the suite again"
            )
        if missing:
            raise StoreError(f"{file}: lacks {', '.join(sorted(missing))}; the run is damaged")
        return cls(path.resolve(), manifest)

    @classmethod
    def newest(cls, out: Path, suite: str) -> Run | None:
        """The newest run of `suite` under `out` that this version can read, or None."""
        stamped = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
        folder = out / suite
        names = (
            sorted((p.name for p in folder.iterdir() if stamped.fullmatch(p.name)), reverse=True)
            if folder.is_dir()
            else []
        )
        for name in names:
            with contextlib.suppress(StoreError):
                return cls.open(folder / name)
        return None

    @classmethod
    def unreadable(cls, out: Path, suite: str) -> str | None:
        """Why the run that `latest` names cannot be gone on with, or None."""
        latest = out / suite / "latest"
        if not latest.is_dir():
            return None
        try:
            cls.open(latest)
        except StoreError as error:
            return str(error)
        return None

    @property
    def name(self) -> str:
        """The run's own name, its folder's."""
        return self.path.name

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock; cut off lines that a kill left torn.

        Raises:
            StoreError: another process is writing this run, or the folder cannot be written.
        """
        with _disk(self.path):
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"{self.path}: another metabench is writing this run; wait for it or stop it"
                ) from error
            except OSError as error:
                raise StoreError(f"{self.path}: cannot be locked ({error}); use a local folder with --out") from error
            with _disk(self.path):
                for name in ("samples.jsonl", "measurements.jsonl"):
                    _cut_torn_line(self.path / name)
            yield

    def append(self, measurement: Measurement, samples: Mapping[str, Any] | None = None) -> Measurement:
        """Make a measurement durable, its raw samples first. Returns it with its pointer.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        record = asdict(measurement)
        with _disk(self.path):
            if samples is not None:
                line = {"cell": measurement.cell, "measure": measurement.measure, **samples}
                record["samples"] = _append_line(self.path / "samples.jsonl", line)
            _append_line(self.path / "measurements.jsonl", record)
        return Measurement(**record)

    def append_slices(self, slices: Mapping[str, Any]) -> int:
        """Make the raw samples of one process of a time durable; they begin with its cell, measure and process.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        with _disk(self.path):
            return _append_line(self.path / "samples.jsonl", slices)

    def slices(self) -> dict[Key, list[dict[str, Any]]]:
        """The raw samples of every time, a line per process in the order measured; the key's `offset` is the line's."""
        found: dict[Key, list[dict[str, Any]]] = {}
        for offset, line in _raw_lines(self.path / "samples.jsonl", b'"process": '):
            found.setdefault((line["cell"], line["measure"]), []).append({**line, "offset": offset})
        return found

    def records(self) -> list[Mapping[str, Any]]:
        """Every whole line of measurements.jsonl as it stands there, also of earlier measurements.

        Raises:
            StoreError: a line is no JSON, or no mapping.
        """
        return list(_lines(self.path / "measurements.jsonl"))

    def measurements(self, records: Iterable[Mapping[str, Any]] | None = None) -> dict[Key, Measurement]:
        """The last measurement of every key, whatever its status or hash; one whose raw samples are lost is none.

        `records`: the run's lines, where they have been read already.

        Raises:
            StoreError: a line is no measurement.
        """
        file = self.path / "measurements.jsonl"
        found: dict[Key, Measurement] = {}
        with _reading(self.path / "samples.jsonl") as samples:
            end = _end_of_lines(samples)
            for number, record in enumerate(_lines(file) if records is None else records, 1):
                try:
                    measurement = Measurement(**record)
                    if not all(isinstance(part, str) for part in measurement.key):
                        raise TypeError("a key that is no text")
                    if not isinstance(measurement.samples, int | None):
                        raise TypeError("a pointer that is no number")
                except TypeError as error:
                    raise StoreError(f"{file}:{number}: not a measurement; delete that line to go on") from error
                if measurement.samples is None or _is_of(measurement, samples, end):
                    found[measurement.key] = measurement
        return found

    def samples(self, measurement: Measurement) -> dict[str, Any]:
        """The raw samples of a measurement (empty when it has none)."""
        text = self.samples_line(measurement)
        try:
            line: dict[str, Any] = parsed(text) if text else {}
        except ValueError as error:
            raise self._damaged(measurement) from error
        return line

    def scored(self, measurement: Measurement) -> tuple[list[Any], tuple[str, ...]] | None:
        """The raw scores of a measurement and its episodes' hashes; None where it has no such list.

        The scores are as they stand on the disk: of any type and number. Equal lists of episodes are one tuple.

        Raises:
            StoreError: the line is damaged, or an episode's hash is no text.
        """
        scores, key, names = self.samples_line(measurement).partition(b', "episodes": ')
        try:
            if key and names.endswith(b"]}\n"):  # the same in many rows, and half of the text: read once
                return _scored(parsed(scores + b"}").get("scores"), _episodes(names[:-2]))
        except ValueError:
            pass  # some other order of the line's parts, or damaged
        line = self.samples(measurement)
        try:
            return _scored(line.get("scores"), _texts(line.get("episodes")))
        except ValueError as error:
            raise self._damaged(measurement) from error

    def samples_line(self, measurement: Measurement) -> bytes:
        """The raw samples of a measurement as the JSON text on the disk (empty when it has none)."""
        if measurement.samples is None:
            return b""
        try:
            if self._samples is None:
                self._samples = (self.path / "samples.jsonl").open("rb", buffering=SAMPLES_BUFFER)
                weakref.finalize(self, self._samples.close)
            self._samples.seek(measurement.samples)
            return self._samples.readline()
        except OSError as error:
            raise self._damaged(measurement) from error

    def _damaged(self, measurement: Measurement) -> StoreError:
        return StoreError(
            f"{self.path / 'samples.jsonl'}: the samples of {measurement.cell} {measurement.measure} are damaged"
        )

    def current(self, last: Mapping[Key, Measurement] | None = None) -> dict[Key, Measurement]:
        """The valid measurement of each of the manifest's rows: the last one, if its hash is the row's.

        `last`: the run's measurements, where they have been read already.
        """
        last = self.measurements() if last is None else last
        rows = {(row["cell"], row["measure"]): row["hash"] for row in self.manifest["rows"]}
        return {key: last[key] for key, digest in rows.items() if key in last and last[key].hash in (digest, NOT_HERE)}

    def rows(self, last: Mapping[Key, Measurement] | None = None) -> list[dict[str, Any]]:
        """The rows of results.csv, in the manifest's order; a row that was never measured is missing. See `current`."""
        current = self.current(last)
        cells = self.manifest["cells"]
        return [
            _row(self, cells[row["cell"]], current[row["cell"], row["measure"]])
            for row in self.manifest["rows"]
            if (row["cell"], row["measure"]) in current
        ]

    def save_manifest(self) -> None:
        """Write manifest.json in one move."""
        self.write("manifest.json", json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Write a derived file in one move, never half of it.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        target = self.path / name
        with _disk(self.path):
            write_whole(target, text.encode("utf-8", "backslashreplace"))
        return target

    def environments(self) -> dict[str, Any]:
        """The machines that made this run's rows, by id."""
        file = self.path / "environment.json"
        try:
            found: dict[str, Any] = parsed(file.read_bytes()) if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise StoreError(f"{file}: damaged ({error}); delete it to go on") from error
        return found

    def add_environment(self, name: str, fingerprint: Mapping[str, Any]) -> None:
        """Remember the machine `name`; rows point at it."""
        known = self.environments()
        known[name] = {**known.get(name, {}), **fingerprint}
        self.write("environment.json", json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def _row(run: Run, cell: Mapping[str, Any], m: Measurement) -> dict[str, Any]:
    cost = m.measure in KERNEL_MEASURES
    known = {
        "run": run.name,
        "suite": run.manifest["suite"],
        **cell,
        "tasks": cell.get("tasks", 1) if cost else None,  # quality does not depend on how many share a call
        **m.facts,
        "kernel": m.measure.rpartition("_")[0] if cost else "",
        "code": m.hash,
        **{k: getattr(m, k) for k in ("cell", "measure", "unit", "n", "value", "ci_low", "ci_high", "sd")},
        **{k: getattr(m, k) for k in ("status", "reason", "environment")},
    }
    return {column: known.get(column) for column in COLUMNS}


def parsed(text: bytes) -> Any:
    """JSON as the standard library reads it, a list of scores in a fifth of its time.

    Raises ValueError for what is no JSON, and for what is nested to break the reader.
    """
    try:
        return from_json(text)
    except ValueError:  # what it refuses, a half of a surrogate pair for one, is for the standard library to judge
        pass
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@functools.lru_cache(maxsize=256)
def _episodes(text: bytes) -> tuple[str, ...] | None:
    return _texts(parsed(text))


def _texts(found: object) -> tuple[str, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("not a list of texts")
    return tuple(found)


def _scored(scores: object, episodes: tuple[str, ...] | None) -> tuple[list[Any], tuple[str, ...]] | None:
    return (scores, episodes) if isinstance(scores, list) and episodes is not None else None


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn the disk's refusals into one clear message."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: cannot write here ({error.strerror or error}); free space or choose another folder with --out. "
            "Rows already measured are kept"
        ) from error


def _append_line(file: Path, record: Mapping[str, Any]) -> int:
    # a name that is no Unicode becomes a JSON escape
    data = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
    # unbuffered: a buffer would try again, and fail again, on truncating and on closing
    with file.open("ab", buffering=0) as handle:
        offset = handle.seek(0, os.SEEK_END)
        try:
            _write_all(handle, data)
        except OSError:
            handle.truncate(offset)  # a full disk must not leave half a line
            raise
    return offset


def _write_all(handle: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[handle.write(rest) :]
    os.fsync(handle.fileno())


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[IO[bytes] | None]:
    if not file.exists():
        yield None
        return
    with file.open("rb") as handle:
        yield handle


def _end_of_lines(samples: IO[bytes] | None) -> int:
    """Where the last whole line ends: what comes after it a kill left torn."""
    if samples is None:
        return 0
    end = samples.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        samples.seek(start)
        found = samples.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_of(measurement: Measurement, samples: IO[bytes] | None, end: int) -> bool:
    """Whether the pointer leads to the measurement's own samples: not so in a folder that was copied in the middle."""
    if samples is None or measurement.samples is None or not 0 <= measurement.samples < end:
        return False
    begin = json.dumps({"cell": measurement.cell, "measure": measurement.measure}, ensure_ascii=False)[:-1]
    wanted = begin.encode("utf-8", "backslashreplace")
    samples.seek(measurement.samples)
    return samples.read(len(wanted)) == wanted


def _cut_torn_line(file: Path) -> None:
    if not file.exists():
        return
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


def _raw_lines(file: Path, word: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines that hold `word`, each with its offset."""
    if not file.exists():
        return
    offset = 0
    with file.open("rb") as handle:
        for line in handle:
            if word in line and line.endswith(b"\n"):
                try:
                    yield offset, parsed(line)
                except ValueError as error:
                    raise StoreError(
                        f"{file}: damaged at byte {offset} ({error}); delete that line to go on"
                    ) from error
            offset += len(line)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                return  # torn by a kill: the row was never finished
            try:
                record = parsed(line)
                if not isinstance(record, dict):
                    raise ValueError("no mapping")
            except ValueError as error:
                raise StoreError(f"{file}:{number}: damaged line ({error}); delete that line to go on") from error
            yield record
