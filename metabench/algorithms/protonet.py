"""Prototypical networks: the nearest class mean in an embedding trained for exactly that."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.metric import Embedding, cosine, negative_sqeuclidean, prototypes
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem

METABENCH = {
    "kind": "algorithm",
    "name": "protonet",
    "family": "metric",
    "paper": "Snell et al. 2017",
    "url": "https://arxiv.org/abs/1703.05175",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {},
}


class ProtoNet(Embedding):
    """Snell, Swersky, Zemel 2017: logits are minus the squared Euclidean distance to the mean support feature.

    The distance is squared and summed over features, not divided by their number.
    """

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        distance: Literal["sqeuclidean", "cosine"],
        lr: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.distance = distance

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`."""
        del seeds, steps
        centres = prototypes(support)
        score = negative_sqeuclidean if self.distance == "sqeuclidean" else cosine
        return lambda x: score(x, centres)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean",
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
) -> ProtoNet:
    """Prototypical networks; the paper halves the learning rate every 2000 episodes (`schedule="halving"`)."""
    network = make_backbone(backbone, problem.shape, norm=norm)
    return ProtoNet(problem, network, distance=distance, lr=lr, schedule=schedule)
