"""Prototypical networks: the nearest class mean in an embedding trained for exactly that."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.finetune import Distance, Finetune, LinearHead, nearest
from metabench.algorithms.metric import cosine, negative_sqeuclidean, prototypes, unit
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


class ProtoNet(LinearHead):
    """Snell, Swersky, Zemel 2017: logits are minus the squared Euclidean distance to the mean support feature.

    The distance is squared and summed over features, not divided by their number.
    """

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        distance: Distance,
        lr: float,
        schedule: Schedule,
        finetune: Finetune | None = None,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.distance = distance
        self.use(finetune or Finetune())

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        centres = prototypes(support)
        score = negative_sqeuclidean if self.distance == "sqeuclidean" else cosine
        return lambda x: score(x, centres)

    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """See `LinearHead.linear`."""
        return nearest(prototypes(support), self.distance)

    def see(self, x: Tensor) -> Tensor:
        """See `LinearHead.see`."""
        return x if self.distance == "sqeuclidean" else unit(x)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean",
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> ProtoNet:
    """Prototypical networks; the paper halves the learning rate every 2000 episodes (`schedule="halving"`: steps).

    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `metabench.algorithms.finetune`).
    """
    network = make_backbone(backbone, problem.shape, norm=norm)
    finetune = Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope)
    return ProtoNet(problem, network, distance=distance, lr=lr, schedule=schedule, finetune=finetune)
