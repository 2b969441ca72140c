"""What the rows of a board have in common, and which rows those are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from metabench.leaderboard.collect import Score
from metabench.leaderboard.source import is_control, plain
from metabench.report.build import WITHIN


@dataclass(frozen=True)
class Protocol:
    """What all rows of a board have in common. `episodes` counts test episodes, `pixels` is the hash of the images."""

    measure: str
    dataset: str
    data: str
    split: str
    rotations: str
    within: str
    ways: int | None
    shots: int | None
    queries: int | None
    stream: int | None
    bn_mode: str
    selection: str
    episodes: int | None
    episode_seed: int | None
    episodes_hash: str
    pixels: str

    @property
    def title(self) -> str:
        """The task, as in reports, and the mode of normalisation."""
        extra = re.sub(r"^[^\[]*\[[^,\]]*,?|\]$", "", self.data)
        extra = ", ".join(p for p in extra.split(",") if p and not p.startswith(("rotations=", "within=")))
        parts = (
            self.dataset + (f" ({extra})" if extra else ""),
            f"{self.ways}-way" if self.ways else "",
            f"streams of {self.stream}" if self.stream else f"{self.shots}-shot" if self.shots else "",
            WITHIN.get(self.within, ""),
        )
        return plain(" ".join(part for part in parts if part))

    @property
    def chance(self) -> float | None:
        """The score of guessing; None for errors."""
        return 1 / self.ways if self.ways and "accuracy" in self.measure else None

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better: not so for errors."""
        return not self.measure.startswith("mse")

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """The protocol in words, without what is empty."""
        shown = {
            "measure": self.measure.replace("_", " "),
            "split": f"{self.split}, test classes",
            "queries per class": self.queries or "",
            "rotations": self.rotations,
            "normalisation": self.bn_mode,
            "weights": {"last": "the last", "val": "best on validation classes"}.get(self.selection, "no training"),
            "test episodes": f"{self.episodes}" if self.episodes else "",
            "episode seed": "" if self.episode_seed is None else self.episode_seed,
            "episodes hash": self.episodes_hash,
            "pixels hash": self.pixels,
        }
        return tuple((name, plain(value)) for name, value in shown.items() if value != "")


def by_protocol(scores: Iterable[Score]) -> list[tuple[Protocol, list[Score]]]:
    """The rows of every board. Rows without training join every way of selecting, controls every mode as well."""
    tasks: dict[tuple[Any, ...], list[Score]] = {}
    lost: list[Score] = []
    for score in scores:
        if score.scores is None:
            lost.append(score)
        else:
            episodes = len(score.scores), score.episodes_hash  # the hash is of the names joined: it sees no empty one
            tasks.setdefault((*_task(score), *episodes, score.pixels), []).append(score)
    # without known episodes it belongs to every board of its task and seed, or to one of its own
    for score in lost:
        homes = [members for key, members in tasks.items() if key[: len(_task(score))] == _task(score)]
        for members in homes or [tasks.setdefault((*_task(score), 0, "", ""), [])]:
            members.append(score)
    made: list[tuple[Protocol, list[Score]]] = []
    for members in tasks.values():
        modes = dict.fromkeys(_mode(s) for s in members if not _joins(s))
        modes = modes or dict.fromkeys((_mode(s)[0], "") for s in members)
        for mode in modes:
            rows = [s for s in members if _mode(s) == mode or _fits(s, mode)]
            made.append((_protocol(rows, mode), rows))
    return made


def _task(score: Score) -> tuple[Any, ...]:
    known = score.coordinates
    shape = tuple(known[name] for name in ("data", "ways", "shots", "queries", "stream"))
    return (score.measure, *shape, score.episode_seed)


def _mode(score: Score) -> tuple[str, str]:
    return score.coordinates["bn_mode"], score.coordinates["selection"]


def _joins(score: Score) -> bool:
    return is_control(score.coordinates["algorithm"]) or not score.coordinates["selection"]


def _fits(score: Score, mode: tuple[str, str]) -> bool:
    return _joins(score) and (is_control(score.coordinates["algorithm"]) or _mode(score)[0] == mode[0])


def _protocol(rows: Sequence[Score], mode: tuple[str, str]) -> Protocol:
    first = next((row for row in rows if row.scores is not None), rows[0])
    known = {name: first.coordinates[name] for name in Protocol.__dataclass_fields__ if name in first.coordinates}
    return Protocol(
        **{
            **known,
            "measure": first.measure,
            "bn_mode": mode[0],
            "selection": mode[1],
            "episodes": None if first.scores is None else len(first.scores),
            "episode_seed": first.episode_seed,
            "episodes_hash": first.episodes_hash,
            "pixels": first.pixels,
        }
    )
