"""Sinusoid regression: y = A sin(x - phi) from 5 or 10 points, each task with an amplitude and a phase of its own.

Finn et al. 2017 (`maml`): A ~ U(0.1, 5), phi ~ U(0, pi), x ~ U(-5, 5). Nichol et al. 2018 (`reptile`): phi ~
U(0, 2 pi); the loss that paper integrates over [-5, 5] is estimated by queries drawn uniformly from there.
Nothing is stored: the three subsets are different random streams of the same distribution.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from metabench.episodes import Batch, Episode, Problem, Rotations, Stream, Subset, philox_key, task_seeds, words
from metabench.errors import ConfigError

METABENCH = {
    "kind": "dataset",
    "name": "sinusoid",
    "problem": "regression",
    "paper": "Finn et al. 2017",
    "url": "https://arxiv.org/abs/1703.03400",
    "splits": {"maml": {}, "reptile": {}},
    "shape": [1],
}

VERSION = "1"
AMPLITUDES = (0.1, 5.0)
INPUTS = (-5.0, 5.0)
PROBLEM = Problem(shape=(1,), loss="mse", outputs=1)


@dataclass(frozen=True)
class Sinusoids:
    """All sinusoids with a phase below `phases`."""

    split: str
    phases: float

    def tasks(
        self,
        subset: Subset,
        *,
        ways: int | None,
        shots: int,
        queries: int,
        rotations: Rotations,
        seed: int,
        device: str,
    ) -> SinusoidTasks:
        """Tasks of `shots` labelled points and `queries` points to predict.

        Raises:
            ConfigError: ways or rotations asked of a regression problem.
        """
        if ways is not None:
            raise ConfigError(f"sinusoid is a regression problem: leave ways out (got {ways})")
        if rotations != "none":
            raise ConfigError(f"sinusoid has no images to rotate: rotations must be none (got {rotations})")
        key = philox_key("sinusoid", VERSION, self.split, subset, shots, queries, seed)
        return SinusoidTasks(key, self.phases, shots, queries, device)


@dataclass(frozen=True)
class SinusoidTasks:
    """Sinusoid tasks with all bound (see `TaskDistribution`); x and y are (T, n, 1) float32."""

    key: int
    phases: float
    shots: int
    queries: int
    device: str
    problem: Problem = PROBLEM

    def episodes(self, start: int, tasks: int) -> Episode:
        """Tasks start .. start+tasks-1; task i is the same whatever `start` and `tasks` are."""
        raw = words(self.key, start, tasks, 3 + self.shots + self.queries)
        amplitude = _between(raw[:, 1:2], *AMPLITUDES)
        phase = _between(raw[:, 2:3], 0.0, self.phases)
        x = _between(raw[:, 3:], *INPUTS)
        y = amplitude * np.sin(x - phase)
        return Episode(
            support=self._batch(x[:, : self.shots], y[:, : self.shots]),
            query=self._batch(x[:, self.shots :], y[:, self.shots :]),
            seeds=torch.from_numpy(task_seeds(raw[:, 0])),
            ids=tuple(self._id(row) for row in raw[:, 1:]),
        )

    def images(self, start: int, n: int) -> Batch:
        """Not for a regression problem: it has no classes.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("sinusoid has no classes, so there is no stream of labelled images to train on")

    def streams(self, start: int, tasks: int, length: int) -> Stream:
        """Not for a regression problem: it has no classes.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("sinusoid has no classes, so there are no streams of labelled images")

    def _batch(self, x: np.ndarray, y: np.ndarray) -> Batch:
        inputs, targets = (torch.from_numpy(v.astype(np.float32))[:, :, None].to(self.device) for v in (x, y))
        return Batch(inputs, targets, ways=None)

    def _id(self, row: np.ndarray) -> str:
        """A content hash of a task: the words behind amplitude, phase and inputs, not the rounding of any sine."""
        content = f"sinusoid\x1f{VERSION}\x1f{self.phases:.3f}\x1f{self.shots}\x1f".encode()
        return hashlib.sha256(content + row.astype("<u8").tobytes()).hexdigest()[:16]


def _between(word: np.ndarray, low: float, high: float) -> np.ndarray:
    """Words to numbers in [low, high)."""
    return low + (high - low) * ((word >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def build(*, split: Literal["maml", "reptile"] = "maml") -> Sinusoids:
    """The sinusoids of the MAML paper (phases below pi) or of the Reptile paper (below 2 pi)."""
    return Sinusoids(split, math.pi if split == "maml" else 2 * math.pi)
