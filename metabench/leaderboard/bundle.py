"""A run as one file to hand in, and such a file as a run again: every member named and hashed, nothing outside it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metabench.disk import write_whole
from metabench.errors import ConfigError, MetabenchError, StoreError
from metabench.leaderboard.source import SUBMISSION, plain, regular, reserved
from metabench.store import Run

SCHEMA = 1  # of submission.json
FILES = ("manifest.json", "environment.json", "measurements.jsonl", "samples.jsonl", "results.csv")
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MEMBER = re.compile(
    rf"(?P<run>{FOLDER.pattern})/"
    rf"(?P<name>{'|'.join(map(re.escape, (*FILES, SUBMISSION)))}|predictions/[0-9a-f]{{16}}\.npz|"
    r"weights/[0-9a-f]{64}\.safetensors|plugins/[A-Za-z0-9_][A-Za-z0-9_.+-]*\.py)"
)
MAX_BYTES, MAX_MEMBERS = 4 * 2**30, 100_000
MAX_TEXT = 2**29  # of one file of rows, which is read into memory: many times what a large run writes
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever a run is packed


def pack(run: Run, out: Path, submitter: str, *, weights: bool = False) -> Path:
    """Write `<out>/<run>.zip`: the run's files and a submission.json with their hashes. The same run, the same bytes.

    Derived tables, logs and checkpoints stay behind; weights and plug-in algorithms come with it where `weights` says
    so. Raises StoreError for files that are links or cannot be read, or weights that were not kept; ConfigError without
    a submitter.
    """
    if not submitter.strip() or plain(submitter.strip(), 80) != submitter.strip():
        raise ConfigError("--submitter: give a name of 1 to 80 printable characters, e.g. --submitter 'Ada Lovelace'")
    if reserved(submitter):
        raise ConfigError(f"--submitter: {submitter.strip()!r} stands for whoever builds a board: give your own name")
    files = {name: file.read_bytes() for name, file in _files(run, weights).items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    record = {"schema_version": SCHEMA, "submitter": submitter.strip(), "run": run.name, "files": hashes}
    files[SUBMISSION] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(f"{run.name}/{name}", EPOCH)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, files[name])
    target = out / f"{run.name}.zip"
    write(target, buffer.getvalue())
    return target


def _files(run: Run, weights: bool) -> dict[str, Path]:
    """What belongs to a submission: raw rows, and the predictions (and weights) that they name."""
    found = {name: file for name in FILES if (file := regular(run, name))}
    for measurement in run.current().values():
        name = measurement.facts.get("predictions")
        if name and (file := regular(run, f"predictions/{Path(str(name)).name}")):
            found[f"predictions/{file.name}"] = file
    found |= _learned(run) if weights else {}
    if not FOLDER.fullmatch(run.name):
        raise StoreError(
            f"{run.path}: a run that is handed in has a folder named with letters, digits and . _ - alone: rename "
            f"{plain(run.name)!r}"
        )
    if strange := [name for name in found if not MEMBER.fullmatch(f"{run.name}/{name}")]:
        raise StoreError(f"{run.path}: {plain(strange[0])} is no name that a run writes; it cannot be packed")
    return found


def _learned(run: Run) -> dict[str, Path]:
    """The weights that rows name, and the plug-in algorithms beside them."""
    trained = [one for one in run.current().values() if one.status == "ok" and "train=" in one.cell.partition("/")[0]]
    names = {Path(str(one.facts["weights"])).name for one in trained if one.facts.get("weights")}
    files = {f"weights/{name}": regular(run, f"weights/{name}") for name in sorted(names)}
    if lost := [name for name, file in files.items() if file is None]:
        raise StoreError(f"{run.path / plain(lost[0])}: a row names these weights, and they are not there")
    if trained and not names:
        raise StoreError(
            f"{run.path}: holds no weights, for none were kept: measure it anew with metabench run --keep-weights "
            "--no-resume, or pack it without --weights"
        )
    plugins = [f"plugins/{file.name}" for file in sorted((run.path / "plugins").glob("*.py"))]
    return {name: file for name, file in (*files.items(), *((p, regular(run, p)) for p in plugins)) if file}


def write(file: Path, data: bytes | str) -> None:
    """Write a file in one move; of text, what is no Unicode becomes an escape. StoreError where the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StoreError(f"{file}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Run]:
    """A run folder, or a bundle unpacked for as long as it is read.

    Raises:
        StoreError: neither; a bundle that is damaged, holds a file that its hashes do not name, or is too large; JSON
            that is nested to break us, which is damage like any other.
    """
    try:
        if not path.is_file():
            yield Run.open(path)
            return
        with tempfile.TemporaryDirectory(prefix="metabench-") as folder:
            try:
                yield Run.open(_unpack(path, Path(folder)))
            except MetabenchError as error:
                raise type(error)(str(error).replace(folder, str(path))) from error
    except RecursionError as error:
        raise StoreError(f"{path}: damaged: nested too deeply") from error


def named(text: str, run: Run, path: Path) -> str:
    """What is said of a run that was read from `path`: a bundle's files by the bundle, not where they were unpacked."""
    return text.replace(str(run.path.parent), str(path)) if path.is_file() else text


def _unpack(path: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            name = _check(path, members)
            for member in members:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, target.open("wb") as out:
                    shutil.copyfileobj(packed, out, 2**20)  # zipfile stops at the size that was checked
    # zipfile's ways to say: damaged, cut short, compressed in a way it does not know, encrypted
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{path}: no run folder and no bundle that can be read ({error})") from error
    _check_hashes(path, folder / name)
    return folder / name


def _check(path: Path, members: list[zipfile.ZipInfo]) -> str:
    """The run's name. Raises StoreError for a member that a bundle does not have, before anything is unpacked."""
    found = [MEMBER.fullmatch(member.filename) for member in members]
    for member, match in zip(members, found, strict=True):
        if match is None or member.is_dir():
            raise StoreError(
                f"{path}: {plain(member.filename)} does not belong in a bundle; make it with leaderboard pack"
            )
    names = {match["run"] for match in found if match}
    if len(names) != 1 or len({m.filename for m in members}) != len(members):
        raise StoreError(f"{path}: a bundle holds one run, and each file once")
    if sum(member.file_size for member in members) > MAX_BYTES or len(members) > MAX_MEMBERS:
        raise StoreError(f"{path}: a bundle of more than {MAX_BYTES:,} bytes or {MAX_MEMBERS:,} files is not read")
    if any(member.file_size > MAX_TEXT for member in members if not member.filename.endswith(".safetensors")):
        raise StoreError(f"{path}: a file of more than {MAX_TEXT:,} bytes that is no weights is not read")
    return names.pop()


def _check_hashes(path: Path, run: Path) -> None:
    record = submission(run)
    found = {
        file.relative_to(run).as_posix(): _sha256(file)
        for file in sorted(run.rglob("*"))
        if file.is_file() and file.name != SUBMISSION
    }
    for name in sorted({*found, *record["files"]}):
        if found.get(name) != record["files"].get(name):
            raise StoreError(f"{path}: {plain(name)} is not what {SUBMISSION} says: it was changed, added or lost")


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def submission(run: Path) -> dict[str, Any]:
    """A bundle's submission.json. Raises StoreError where there is none that can be read."""
    file = run / SUBMISSION
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["schema_version"] != SCHEMA or not isinstance(record["files"], dict):
            raise StoreError(f"{file}: of schema {plain(record['schema_version'])}, this metabench reads {SCHEMA}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{file}: cannot be read ({error}); make the bundle again") from error
    found: dict[str, Any] = record
    return found
