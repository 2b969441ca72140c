"""The raw rows that a page links to: copies beside it, of which only our own are removed, or the run folders.

What a build copies it notes in `written.json`, with hashes. A run that is no longer shown leaves the site with the next
build; a file that is not noted there, or was changed since, is somebody else's and stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import quote

from metabench.errors import StoreError
from metabench.leaderboard.bundle import write
from metabench.leaderboard.source import Source, regular
from metabench.report.model import RESULT_COLUMNS
from metabench.spreadsheet import table

RECORD, FOLDER = "written.json", "runs"
TABLE = "results.csv"
RAW = ("manifest.json", "environment.json", "measurements.jsonl", "samples.jsonl")
SCHEMA = 1  # of written.json
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
Written = Mapping[str, Mapping[str, str]]  # by folder in runs/, the SHA-256 of each file that was written


def copies(sources: Sequence[Source]) -> dict[int, str]:
    """Where beside the page each run's copy will lie, by the source's id: harmless names, each once."""
    names: dict[int, str] = {}
    for source in sources:
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in source.run.name).lstrip(".")
        name = safe[:100] or "run"
        tries = (name if number == 1 else f"{name}-{number}" for number in count(1))
        names[id(source)] = next(one for one in tries if one not in names.values())
    return {key: f"{FOLDER}/{name}" for key, name in names.items()}


def links(sources: Sequence[Source], out: Path) -> dict[int, str]:
    """The way from the page in `out` to each run's own folder, by the source's id."""
    paths = {id(one): os.path.relpath(one.run.path.resolve(), out.resolve()) for one in sources}
    return {key: quote(os.fsencode(path)) for key, path in paths.items()}


def publish(sources: Sequence[Source], out: Path, places: Mapping[int, str], before: Written) -> None:
    """Copy these runs to their places in `out`, and remove what an earlier build copied and this one does not show.

    `before` is what `noted` found in `out`. Raises StoreError where the disk refuses.
    """
    names = {id(one): Path(places[id(one)]).name for one in sources}
    for name in sorted(before.keys() - set(names.values())):
        _remove(out / FOLDER / name, before[name])
    written = {names[id(one)]: _copy(one, out / places[id(one)]) for one in sources}
    note = {"schema_version": SCHEMA, FOLDER: written}
    write(out / RECORD, json.dumps(note, indent=1, sort_keys=True) + "\n")


def _copy(source: Source, folder: Path) -> dict[str, str]:
    """The raw rows, and results.csv made anew with formulas defused; the hash of each."""
    rows = source.run.rows(source.counted)
    write(folder / TABLE, table(RESULT_COLUMNS, rows))
    for name in RAW:
        if (file := regular(source.run, name)) is not None:
            try:
                shutil.copyfile(file, folder / name)
            except OSError as error:
                raise StoreError(f"{folder / name}: cannot be written ({error.strerror or error})") from error
    return {name: digest for name in (TABLE, *RAW) if (digest := _sha256(folder / name))}


def _remove(folder: Path, files: Mapping[str, str]) -> None:
    """Remove these files where they are as they were written, and the folder if nothing else is in it."""
    if folder.is_symlink() or folder.parent.is_symlink():
        return
    for name, digest in files.items():
        if _sha256(folder / name) == digest:
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sha256(file: Path) -> str | None:
    """A plain file's hash; None for anything else."""
    if file.is_symlink() or not file.is_file():
        return None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def noted(out: Path) -> Written:
    """What the last build copied into `out`; nothing where it left no note. Raises StoreError for one that is not ours.

    It is read before anything is written: a build that cannot go on leaves the site as it is.
    """
    file = out / RECORD
    if not file.exists():
        return {}
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return dict(_entries(note[FOLDER]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{file}: cannot be read ({error}); delete it to keep whatever is in {FOLDER}/, or build elsewhere"
        ) from error


def _entries(noted: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for folder, files in noted.items():
        if not _NAME.fullmatch(folder) or not set(files) <= {TABLE, *RAW}:
            raise ValueError(f"{folder!r} is nothing that a build writes")
        yield folder, files
