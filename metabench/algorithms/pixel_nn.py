"""Control: the label of the nearest support image, in raw pixels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from metabench.algorithms.base import Learner
from metabench.algorithms.finetune import Distance
from metabench.algorithms.metric import FeatureMethod, best_of_class, cosine, negative_sqeuclidean
from metabench.episodes import Batch, Problem

METABENCH: dict[str, object] = {
    "kind": "algorithm",
    "name": "pixel-nn",
    "family": "control",
    "paper": "Vinyals et al. 2016",
    "url": "https://arxiv.org/abs/1606.04080",
    "feeds": None,
    "control": True,
    "problems": ["classification"],
    "train": {},
}


class PixelNearestNeighbour(FeatureMethod):
    """1-nearest neighbour, Euclidean or by cosine (Vinyals et al. 2016): what no learning at all reaches.

    Equal support images tie.
    """

    feeds = None

    def __init__(self, problem: Problem, distance: Distance) -> None:
        super().__init__(problem)
        self.distance = distance

    @property
    def cacheable(self) -> bool:
        """Pixels depend on the image alone."""
        return True

    def embed(self, x: Tensor) -> Tensor:
        """The pixels (N, d)."""
        return x.flatten(1)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`."""
        decide = self.adapt_features(Batch(support.x.flatten(2), support.y, support.ways), seeds=seeds, steps=steps)
        return lambda x: decide(x.flatten(2))

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`."""
        del seeds, steps
        score = cosine if self.distance == "cosine" else negative_sqeuclidean
        return lambda x: best_of_class(score(x, support.x), support)


def build(problem: Problem, *, distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean") -> PixelNearestNeighbour:
    """The nearest neighbour in pixels."""
    return PixelNearestNeighbour(problem, distance)
