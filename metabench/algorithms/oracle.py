"""Control: knows that the sinusoid task is a sinusoid; least squares on (sin x, cos x) from the support set."""

from __future__ import annotations

import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm, Learner
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

METABENCH: dict[str, object] = {
    "kind": "algorithm",
    "name": "oracle",
    "family": "control",
    "paper": "",
    "url": "",
    "feeds": None,
    "control": True,
    "problems": ["regression"],
    "train": {},
}


class Oracle(Algorithm):
    """A sin(x - phase) is linear in (sin x, cos x): without noise two support points give the task away.

    The error left is rounding; it is the ceiling of the sinusoid table. With one point the smallest amplitude is taken.
    """

    feeds = None

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`."""
        del seeds, steps
        weights = torch.linalg.pinv(_waves(support.x)) @ support.y
        return lambda x: _waves(x) @ weights


def _waves(x: Tensor) -> Tensor:
    """(sin x, cos x) (T, n, 2) of x (T, n, 1)."""
    return torch.cat([x.sin(), x.cos()], dim=-1)


def build(problem: Problem) -> Oracle:
    """The ceiling of the sinusoid problem."""
    if problem.loss != "mse" or problem.shape != (1,):
        raise ConfigError("oracle: knows the sinusoid only (one input number, a regression)")
    return Oracle(problem)
