"""Weights that a run kept, in the place of trainings: which file stands for which cell, and why one cannot.

Plain data and files: nothing here loads a tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from metabench.errors import ConfigError
from metabench.plan import Row
from metabench.store import Run, Status
from metabench.suite import Suite

_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Weights:
    """Weights in the place of trainings: `files` by cell id, and `lacking`, by cell id the status and reason without.

    `source` is the run that kept them, "" where files were named one by one; what has neither is trained.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    lacking: Mapping[str, tuple[Status, str]] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def kept_by(cls, path: Path, suite: Suite, rows: Iterable[Row]) -> Weights:
        """What a run (its folder, or a folder of runs: the newest) kept of these rows' trainings, every file checked.

        Raises:
            StoreError: not a run, or a damaged one.
            ConfigError: it kept nothing of any of them.
        """
        kept = Run.open(path) if (path / "manifest.json").is_file() else Run.newest(path.parent, path.name)
        kept = kept or Run.open(path)  # whose message says what it is not
        names = _names_of_weights(kept)
        found: dict[str, Path] = {}
        lacking: dict[str, tuple[Status, str]] = {}
        for cell in {row.cell.id: row.cell for row in rows if trains(row)}.values():
            name, selection = names.get(cell.id) or names.get(cell.training_id, ("", ""))
            if problem := _problem(kept, name, selection, suite):
                lacking[cell.id] = problem
            else:
                found[cell.id] = kept.path / "weights" / name
        if lacking and not found and all(status == "skipped" for status, _ in lacking.values()):
            raise ConfigError(
                f"--weights {path}: none of {suite.name} can be loaded: {next(iter(lacking.values()))[1]}; "
                f"make such a run with: metabench run {suite.name} --keep-weights"
            )
        return cls(found, lacking, kept.name)

    def on(self, rows: Iterable[Row]) -> list[Row]:
        """The rows, their hashes covering the weights of a run: one that was trained is never taken for one of these.

        Files that were named one by one leave the hash alone: a re-run is compared with the claim by it.
        """
        return [
            replace(row, hash=hashlib.sha256(f"{row.hash} {file.name}".encode()).hexdigest()[:12])
            if self.source and trains(row) and (file := self.files.get(row.cell.id))
            else row
            for row in rows
        ]

    def refusal(self, row: Row) -> tuple[Status, str] | None:
        """The status and reason of a row that these weights cannot give, or None."""
        if not trains(row):
            return None
        if row.measure == "train_time" and row.cell.id in self.files:
            return "skipped", "nothing was trained: its weights were loaded"
        return self.lacking.get(row.cell.id)


def trains(row: Row) -> bool:
    """Whether the row's number needs a training; costs are taken before any."""
    return row.cell.train is not None and not row.kernel


def _names_of_weights(kept: Run) -> dict[str, tuple[str, str]]:
    """(file's name, how the weights were selected) by cell id, and by training for cells that the run does not have."""
    names: dict[str, tuple[str, str]] = {}
    for row in kept.current().values():
        if row.status == "ok" and row.facts.get("weights"):
            cell = kept.manifest["cells"][row.cell]
            names[row.cell] = str(row.facts["weights"]), str(cell.get("selection", ""))
            names.setdefault(str(cell.get("training", "")), names[row.cell])
    return names


def _problem(kept: Run, name: str, selection: str, suite: Suite) -> tuple[Status, str] | None:
    """Why weights of that name cannot stand for a training of the suite: a row's status and reason; None: they can.

    The name is what a file of rows says, whoever wrote it: with a path in it, it could lead anywhere.
    """
    named, file = _NAME.fullmatch(name), kept.path / "weights" / name
    if named is None and name:
        return "failed", f"{kept.name} names weights {name[:100]!r}, which is no name that a run gives them"
    if named is None:
        return "skipped", f"{kept.name} keeps no weights of its training"
    if selection != suite.evaluation.selection:
        wanted = suite.evaluation.selection
        return "skipped", f"{kept.name} selected its weights by {selection or 'nothing'}, this suite by {wanted}"
    if file.is_symlink() or not file.is_file():
        return "skipped", f"{kept.name} names weights that are not there: {file}"
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return None if digest == named[1] else ("failed", f"{file} is damaged: its hash is not its name")
