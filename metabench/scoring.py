"""Scoring adapted learners on fixed episodes: what a prediction is worth, per query and per episode."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabench.algorithms.base import Learner
from metabench.disk import write_whole
from metabench.episodes import Batch, Stream, TaskDistribution

NOT_ASKED = 2**16 - 1  # the label of a query that does not count: beyond any number of ways
IMAGES_PER_CALL = 3000  # about this many inputs per call: fits the memory, fills the cores


class Stopped(Exception):
    """The parent asked for a stop; what can be kept is on disk."""


@dataclass(frozen=True)
class Credit:
    """What each query was answered, (E, m) uint16 arrays, and the classes (E, ways) behind the labels.

    `ties` is 0 for a wrong answer, else the number of tied maxima among which the label was: it scores 1/ties. What
    does not count has the label NOT_ASKED.
    """

    predicted: np.ndarray
    ties: np.ndarray
    labels: np.ndarray
    classes: np.ndarray

    def scores(self) -> np.ndarray:
        """What each answer scores (E, m)."""
        found: np.ndarray = np.where(self.ties > 0, 1.0 / np.maximum(self.ties, 1), 0.0)
        return found

    def only(self, asked: np.ndarray) -> Credit:
        """The same, nothing but the queries `asked` (E, m) counting."""
        labels = np.where(asked, self.labels, NOT_ASKED).astype(self.labels.dtype)
        return replace(self, predicted=self.predicted * asked, ties=self.ties * asked, labels=labels)

    @classmethod
    def joined(cls, parts: list[Credit]) -> Credit:
        """The parts one after another."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))

    def save(self, folder: Path, name: str) -> str:
        """Write as `<name>.npz` in one move, queries in the order of their labels; returns the file's name.

        In that order labels compress to nothing, and right answers nearly so.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file, buffer = folder / f"{name}.npz", io.BytesIO()
        order = np.argsort(self.labels, axis=1, kind="stable")
        parts = (np.take_along_axis(part, order, axis=1) for part in (self.predicted, self.ties, self.labels))
        predicted, ties, labels = (part.astype(np.min_scalar_type(part.max(initial=0))) for part in parts)
        np.savez_compressed(buffer, predicted=predicted, ties=ties, labels=labels, classes=self.classes)
        write_whole(file, buffer.getvalue())
        return file.name


@dataclass(frozen=True)
class Scores:
    """One score per episode (accuracy, or mean squared error), the episodes' hashes, and each query's credit."""

    scores: list[float]
    ids: list[str]
    credit: Credit | None
    not_finite: int

    @property
    def samples(self) -> dict[str, list[Any]]:
        """The raw samples that are kept: each episode's score and hash."""
        return {"scores": self.scores, "episodes": self.ids}

    @property
    def episodes_hash(self) -> str:
        """One hash over all episodes: equal hashes mean identical test episodes."""
        return hashlib.sha256("".join(self.ids).encode()).hexdigest()[:12]


def score_episodes(
    adapt: Callable[..., Learner],
    test: TaskDistribution,
    count: int,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> Scores:
    """Adapt to and score episodes 0 .. count-1, many tasks a call; a score does not depend on how many.

    `adapt(support, seeds=)` is an algorithm's `adapt` or `initial`, or `adapt_features` where `test` holds features.

    Raises:
        Stopped: `stopping()` became true.
    """
    probe = test.episodes(0, 1)
    at_once = max(1, IMAGES_PER_CALL // (probe.support.x.shape[1] + probe.query.x.shape[1]))
    scores: list[np.ndarray] = []
    ids: list[str] = []
    credits: list[Credit] = []
    not_finite = 0
    for start in range(0, count, at_once):
        if stopping():
            raise Stopped
        episode = test.episodes(start, min(at_once, count - start))
        with torch.no_grad():
            output = adapt(episode.support, seeds=episode.seeds)(episode.query.x)
        if episode.query.ways is None:
            errors = (output.double() - episode.query.y.double()).square().mean((1, 2))
            not_finite += int((~torch.isfinite(errors)).sum())
            scores.append(errors.cpu().numpy())
        else:
            not_finite += int((~torch.isfinite(output)).any(-1).sum())
            credit = _credit(output, episode.query, episode.classes)
            credits.append(credit)
            scores.append(credit.scores().mean(1))
        ids.extend(episode.ids)
    # an error that is not finite is counted above; JSON cannot hold it
    values = np.nan_to_num(np.concatenate(scores), nan=0.0, posinf=0.0, neginf=0.0)
    return Scores([float(v) for v in values], ids, Credit.joined(credits) if credits else None, not_finite)


@dataclass(frozen=True)
class Followed:
    """Streams answered: each step's credit, which presentation of its class it was (E, L), and the streams' hashes."""

    credit: Credit
    presentations: np.ndarray
    ids: list[str]
    not_finite: int

    def at(self, k: int) -> Scores:
        """Each stream's accuracy at k-th presentations, over those of its classes that come k times (one at least)."""
        return self._over(self.presentations == k)

    def everywhere(self) -> Scores:
        """Each stream's accuracy over all its steps, first presentations included: what training learns."""
        return self._over(np.ones_like(self.presentations, dtype=bool))

    def _over(self, steps: np.ndarray) -> Scores:
        scores = (self.credit.scores() * steps).sum(1) / steps.sum(1)
        return Scores([float(v) for v in scores], self.ids, self.credit.only(steps), self.not_finite)


def follow_streams(
    follow: Callable[[Stream], Tensor],
    test: TaskDistribution,
    count: int,
    length: int,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> Followed:
    """Answer streams 0 .. count-1 of `length` images, many a call; `follow` is an algorithm's.

    Raises:
        Stopped: `stopping()` became true.
    """
    at_once = max(1, IMAGES_PER_CALL // length)
    parts: list[Credit] = []
    presentations: list[np.ndarray] = []
    ids: list[str] = []
    not_finite = 0
    for start in range(0, count, at_once):
        if stopping():
            raise Stopped
        stream = test.streams(start, min(at_once, count - start), length)
        with torch.no_grad():
            logits = follow(stream)
        not_finite += int((~torch.isfinite(logits)).any(-1).sum())
        parts.append(_credit(logits, stream, stream.classes))
        presentations.append(stream.presentations().cpu().numpy())
        ids.extend(stream.ids)
    return Followed(Credit.joined(parts), np.concatenate(presentations), ids, not_finite)


def _credit(logits: Tensor, query: Batch, classes: np.ndarray | None) -> Credit:
    """logits (T, m, ways) against the labels: a tie among k maxima scores 1/k, a non-finite row is wrong."""
    finite = torch.isfinite(logits).all(-1)
    top = logits.max(-1, keepdim=True)
    tied = logits == top.values
    hit = tied.gather(-1, query.y[..., None])[..., 0] & finite
    ties = torch.where(hit, tied.sum(-1), 0)
    if classes is None:
        classes = np.zeros((query.tasks, query.ways or 0))
    return Credit(
        predicted=top.indices[..., 0].cpu().numpy().astype(np.uint16),
        ties=ties.cpu().numpy().astype(np.uint16),
        labels=query.y.cpu().numpy().astype(np.uint16),
        classes=classes.astype(np.int32),
    )
