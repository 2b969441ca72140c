"""Prototypical networks with a learned scale on the distances: an example of a plug-in."""

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Algorithm, Learner
from metabench.backbones import make_backbone
from metabench.episodes import Batch, Problem

METABENCH = {
    "kind": "algorithm",
    "name": "scaled-protonet",
    "family": "metric",
    "paper": "an example",
    "feeds": "episodes",
    "problems": ["classification"],
}


class ScaledProtoNet(Algorithm):
    def __init__(self, problem: Problem, scale: float) -> None:
        super().__init__(problem)
        self.backbone = make_backbone("conv4", problem.shape, norm="running")
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        params = dict(self.backbone.named_parameters())
        z, stats = self.backbone.embed_support(params, support.x)  # (T, n, d)
        weights = support.one_hot()  # (T, n, ways)
        centres = weights.mT @ z / weights.sum(1)[..., None]  # (T, ways, d)

        def learner(x: Tensor) -> Tensor:
            q = self.backbone.embed_query(params, x, support.x, stats)
            return -self.log_scale.exp() * torch.cdist(q, centres) ** 2

        return learner


def build(problem: Problem, *, scale: float = 1.0) -> ScaledProtoNet:
    return ScaledProtoNet(problem, scale)
