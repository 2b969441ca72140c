"""What was tried besides what is shown: configurations, and results that a run's plan lists no more.

Who tries many settings, or many seeds, and shows the luckiest has a result that says less than it seems to. So what a
run wrote counts here, whether or not its manifest still lists the row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metabench.errors import ConfigError, StoreError
from metabench.leaderboard.source import ONE_METHOD, Source, loaded, parsed_id, plain, quality
from metabench.store import Key

# by `tried_key` and settings, for each row the hashes it was scored under
_Tried = dict[tuple[str, str, str], dict[tuple[str, str], dict[Key, set[str]]]]


@dataclass(frozen=True)
class Unlisted:
    """A result that was measured and that its run's plan lists no more: which seed it was, and what became of it."""

    seed: int
    status: str


def count_tried(sources: Iterable[Source], besides: Iterable[Source]) -> dict[tuple[str, str, str], int]:
    """How many configurations were scored, by `tried_key`: settings, each as often as it has versions.

    Every line counts, whether or not the manifest still lists its row. Versions of code and protocol are told apart by
    the hashes of one and the same row, since a hash covers the seed too.
    """
    hashes: _Tried = {}
    for source in sources:
        _note_tried(hashes, source)
    for source in besides:
        with contextlib.suppress(StoreError):  # it was taken back, perhaps for this very damage
            _note_tried(hashes, source)
    return {
        who: sum(max(map(len, versions.values())) for versions in settings.values()) for who, settings in hashes.items()
    }


def _note_tried(hashes: _Tried, source: Source) -> None:
    trained = not loaded(source.run)
    for line in source.records:
        key = str(line.get("cell")), str(line.get("measure"))
        known = _known(key[0]) if quality(key[1]) and line.get("status") == "ok" else None
        if known is None or (known["train_spec"] and not trained):
            continue
        settings = hashes.setdefault(tried_key(source.submitter, known), {})
        versions = settings.setdefault((str(known["trained"]), str(known["norm"])), {})
        versions.setdefault(key, set()).add(str(line.get("hash")))


def _known(cell: str) -> Mapping[str, Any] | None:
    """The coordinates in a cell's id; None for what is no id, in lines that the plan does not list."""
    try:
        return parsed_id(cell)
    except ConfigError:
        return None


def tried_key(submitter: str, known: Mapping[str, Any]) -> tuple[str, str, str]:
    """The key of `Collected.tried` for a cell's coordinates."""
    task = f"{known['data']} {known['ways']} {known['shots']} {known['queries']} {known['stream']}"
    return submitter, str(known["algorithm"]), task


def unlisted_key(submitter: str, known: Mapping[str, Any], measure: str) -> tuple[Any, ...]:
    """The key of `Collected.unlisted` for a cell's coordinates: whose seeds of one method on one task they are."""
    return (submitter, *(known[name] for name in ONE_METHOD), measure)


def unlisted_of(source: Source) -> Iterator[tuple[tuple[Any, ...], Unlisted]]:
    """Results of quality that were measured, and that the plan lists no more."""
    planned = {(row["cell"], row["measure"]) for row in source.run.manifest["rows"]}
    for key, one in source.measured.items():
        known = _known(key[0]) if key not in planned and quality(key[1]) and one.status != "skipped" else None
        if known is not None:
            yield unlisted_key(source.submitter, known, key[1]), Unlisted(known["seed"], plain(one.status, 40))
