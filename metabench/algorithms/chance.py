"""Control: knows no inputs; equal logits for every class, or the mean support target."""

from __future__ import annotations

from torch import Tensor

from metabench.algorithms.base import Algorithm, Learner
from metabench.episodes import Batch, Problem

METABENCH: dict[str, object] = {
    "kind": "algorithm",
    "name": "chance",
    "family": "control",
    "paper": "",
    "url": "",
    "feeds": None,
    "control": True,
    "problems": ["classification", "regression"],
    "train": {},
}


class Chance(Algorithm):
    """The floor: a tie among all classes scores 1/ways; in regression the best constant the support set offers."""

    feeds = None

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`."""
        del seeds, steps
        ways = support.ways
        if ways is None:
            mean = support.y.mean(1, keepdim=True)
            return lambda x: mean.expand(-1, x.shape[1], -1)
        return lambda x: x.new_zeros(*x.shape[:2], ways)


def build(problem: Problem) -> Chance:
    """The floor of every table."""
    return Chance(problem)
