"""One run as it was handed in, and how far it is trusted: whatever reads a result file for a board reads it by this.

Result files come from anybody. What is read is of the type it should be, lies inside the run's folder, and text is
text, whatever it holds. What stands in a cell's id is taken from there and must agree with the manifest.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from metabench.cells import coordinates_of
from metabench.errors import ConfigError, StoreError
from metabench.report.model import CONTROLS
from metabench.store import NOT_HERE, Key, Measurement, Run

Trust = Literal["claimed", "recomputed", "re-run"]
SUBMISSION = "submission.json"
LOCAL = ""  # the submitter of a run without a submission file: whoever builds the board
MAINTAINERS = "this board's maintainers"  # that submitter in words: nobody else may take the name
STATED = ("cell", "algorithm", "dataset", "split", "rotations", "within", "ways", "shots", "queries", "stream", "norm",
          "bn_mode", "device", "precision", "seed", "train_spec")  # fmt: skip
ONE_METHOD = ("trained", "data", "ways", "shots", "queries", "stream", "norm", "precision")
"""What the rows of one method on one task have in common, whatever their seed and device."""
TEXTS = ("cell", "measure", "status", "reason", "unit", "hash", "environment", "at")
NUMBERS = ("n", "value", "ci_low", "ci_high", "sd", "samples")


@dataclass(frozen=True, eq=False)
class Source:
    """One run as it was handed in: its folder, who sent it, and what became of verifying it.

    `recomputed` are the results that were shown to follow from answers and test episodes: no other result is called
    so. `doubts` are results of a verified run that were not, each with the reason.
    """

    run: Run
    submitter: str
    recomputed: frozenset[Key] = frozenset()
    doubts: Mapping[Key, str] = field(default_factory=dict)

    @property
    def trust(self) -> Trust:
        """How far the run as a whole is trusted: no further than any of its results."""
        results = [key for key, one in self.counted.items() if one.status == "ok" and quality(key[1])]
        return "recomputed" if results and self.recomputed.issuperset(results) else "claimed"

    @property
    def name(self) -> str:
        """The run's name as shown."""
        return plain(self.run.name)

    @cached_property
    def records(self) -> list[Mapping[str, Any]]:
        """Every whole line of its measurements, read once. Raises StoreError if one is damaged."""
        return self.run.records()

    @cached_property
    def measured(self) -> dict[Key, Measurement]:
        """Those that are the last of their row. Raises StoreError, naming the row, for a field of a wrong type."""
        return measured(self.run, self.records)

    @cached_property
    def counted(self) -> dict[Key, Measurement]:
        """Of those the ones that count: see the function of that name."""
        return counted(self.run, self.measured)

    @cached_property
    def environments(self) -> dict[str, Mapping[str, Any]]:
        """Its machines by name, those that are described. Raises StoreError for a file that lists none."""
        return environments(self.run)


def plain(text: object, limit: int = 300) -> str:
    """Text of others as one line that plays no tricks: no control characters, none that turn the writing around."""
    shown = str(text)
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(" " if c in "\n\t\r" else c if _harmless(c) else "\ufffd" for c in shown)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _harmless(char: str) -> bool:
    return char.isprintable() and unicodedata.category(char) != "Cf"


def source_of(run: Run) -> Source:
    """A run as a source. Raises StoreError where its manifest does not hold together or a file of it is a link."""
    for name in ("manifest.json", "measurements.jsonl", "samples.jsonl", "environment.json"):
        regular(run, name)
    check_manifest(run)
    return Source(run, submitter_of(run))


def regular(run: Run, name: str) -> Path | None:
    """The file of that name inside the run's folder, or None where there is none.

    Raises StoreError for a link or anything else that is no plain file inside it: a run folder of others must not make
    us read, or publish, our own files.
    """
    file = run.path / name
    if not file.exists() and not file.is_symlink():
        return None
    if file.is_symlink() or not file.is_file() or run.path not in file.resolve().parents:
        raise StoreError(f"{file}: not a plain file of the run; links are not followed")
    return file


def submitter_of(run: Run) -> str:
    """Who handed the run in, as its submission file says; empty for a run of our own. Raises StoreError if damaged."""
    file = regular(run, SUBMISSION)
    if file is None:
        return LOCAL
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["submitter"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{file}: cannot be read ({error}); make the bundle again") from error
    if not isinstance(name, str) or not name.strip():
        raise StoreError(f"{file}: the submitter must be a name")
    if reserved(name):
        raise StoreError(f"{file}: the submitter {plain(name.strip(), 80)!r} is reserved for whoever builds a board")
    return plain(name.strip(), 80)


def reserved(submitter: str) -> bool:
    """Whether a name reads like the one that stands for whoever builds a board."""
    words = unicodedata.normalize("NFKC", submitter).casefold().replace("\u2019", "'").split()
    return " ".join(words) == MAINTAINERS


def loaded(run: Run) -> str:
    """What to say of a run that loaded another's weights, as its manifest has it; empty for one that trained."""
    origin = run.manifest.get("weights")
    if not origin:
        return ""
    name = plain(origin, 100)
    return (
        f"its weights are those of {name}, loaded (metabench run --weights): nothing was trained, and a training "
        f"counts once; name {name} instead"
    )


def check_manifest(run: Run) -> None:
    """Raise StoreError, naming the place, where a manifest's cells and rows are not what reading relies on."""
    file = run.path / "manifest.json"
    cells, rows = run.manifest["cells"], run.manifest["rows"]
    if not isinstance(cells, dict) or not isinstance(rows, list):
        raise StoreError(f"{file}: cells must be a mapping and rows a list; the run is damaged")
    seen: set[Key] = set()
    for number, row in enumerate(rows):
        where = f"{file}: rows[{number}]"
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("cell", "measure", "hash")):
            raise StoreError(f"{where}: a row has a cell, a measure and a hash, all text; the run is damaged")
        key = row["cell"], row["measure"]
        if key in seen:
            raise StoreError(f"{where}: {key[0]} {key[1]} is listed twice; keep one of the rows")
        if not isinstance(cells.get(key[0]), dict):
            raise StoreError(f"{where}: its cell {plain(key[0])} is not among the manifest's cells")
        seen.add(key)


def measured(run: Run, records: Iterable[Mapping[str, Any]]) -> dict[Key, Measurement]:
    """The run's measurements, from its lines. Raises StoreError, naming the row, for a field of a wrong type."""
    file = run.path / "measurements.jsonl"
    try:
        found = run.measurements(records)
    except (TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"{file}: damaged: a row's pointer into samples.jsonl is no position ({error})") from error
    for one in found.values():
        wrong = [f"{name} is of a wrong type" for name in TEXTS if not isinstance(getattr(one, name), str)]
        wrong += [f"{name} is no finite number" for name in NUMBERS if not _optional_number(getattr(one, name))]
        wrong += [] if isinstance(one.facts, dict) else ["facts is of a wrong type"]
        if wrong:
            raise StoreError(f"{file}: {plain(one.cell)} {plain(one.measure)}: {wrong[0]}")
    environments(run)  # rows name them
    return found


def environments(run: Run) -> dict[str, Mapping[str, Any]]:
    """The run's machines by name, those that are described. Raises StoreError for a file that lists none."""
    found: object = run.environments()
    if not isinstance(found, dict):
        raise StoreError(f"{run.path / 'environment.json'}: must be a mapping of machines; the run is damaged")
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def counted(run: Run, last: Mapping[Key, Measurement]) -> dict[Key, Measurement]:
    """Of each row of the plan its measurement in `last`, if it was made as the plan says (by its hash).

    A row that was skipped for want of a device has a hash of its own. Nothing else may have it: a number under that
    hash was made nobody knows how.
    """
    found: dict[Key, Measurement] = {}
    for row in run.manifest["rows"]:
        one = last.get((row["cell"], row["measure"]))
        if one and (one.hash == row["hash"] or (one.hash == NOT_HERE and one.status == "skipped")):
            found[one.key] = one
    return found


def algorithm_of(cell: str) -> str:
    """The algorithm's name in a cell's id, or in whatever stands in its place."""
    return re.split(r"[\[/]", cell, maxsplit=1)[0]


def is_control(algorithm: str) -> bool:
    """Whether a method is one of ours that only gives the scale; what a result file says of it does not count."""
    return algorithm in CONTROLS


def quality(measure: str) -> bool:
    """Whether a measure may head a board: accuracy, that at a presentation, or the error; never that on validation."""
    return measure in ("accuracy", "mse") or measure.startswith("accuracy_at_")


def finite(value: object) -> float | None:
    """A number as a float; None for what is no number, is not finite, or is larger than any float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _optional_number(value: object) -> bool:
    return value is None or finite(value) is not None


def coordinates(run: Run, cell: str) -> dict[str, Any]:
    """A cell's coordinates: from its id, with what only the manifest knows. Raises StoreError where they disagree."""
    stated = run.manifest["cells"][cell]
    try:
        found = {"cell": cell, **parsed_id(cell)}
    except ConfigError as error:
        raise StoreError(f"{run.path / 'manifest.json'}: {error}") from error
    for name in STATED:
        # a run of an earlier version states fewer of them, and a stream's shots and queries as none
        if name in stated and stated[name] != found[name] and _unlike(stated[name], found[name]):
            raise StoreError(
                f"{run.path / 'manifest.json'}: cell {plain(cell)}: {name} is {plain(stated[name])!r} there, "
                f"{found[name]!r} in the cell's id"
            )
    if found["ways"] == 1:
        raise StoreError(
            f"{run.path / 'manifest.json'}: cell {plain(cell)}: a task of one way has nothing to tell apart: "
            "ways are 2 or more"
        )
    known = {name: stated.get(name) or "" for name in ("params", "selection")}
    if not all(isinstance(value, str) for value in known.values()):
        raise StoreError(f"{run.path / 'manifest.json'}: cell {plain(cell)}: params and selection must be text")
    return {**found, **known}


@lru_cache(maxsize=16384)
def parsed_id(cell: str) -> Mapping[str, Any]:
    """The coordinates in a cell's id, which many runs have; never to be changed."""
    return coordinates_of(cell)


def _unlike(stated: object, found: object) -> bool:
    return (stated or None) != (found or None) and not (stated == 0 and found == 0)
