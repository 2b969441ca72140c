"""Prototypical networks through easyfsl: its PrototypicalNetworks on an ordinary module, with the distance squared."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metabench.algorithms import protonet
from metabench.algorithms.base import Algorithm, Learner, Metrics, Trainer, query_loss
from metabench.algorithms.plain import SerialTrainer, import_part, plain_conv4
from metabench.backbones import Conv4
from metabench.episodes import Batch, Episode, Problem

METABENCH = {
    "kind": "algorithm",
    "name": "protonet-easyfsl",
    "family": "metric",
    "paper": "Snell et al. 2017; easyfsl: Bennequin 2021",
    "url": "https://github.com/sicara/easy-few-shot-learning",
    "feeds": "episodes",
    "problems": ["classification"],
}


class ProtoNetEasyFsl(Algorithm):
    """easyfsl's calls (process_support_set, forward, cross-entropy) on the network and weights of `protonet`.

    With norm=batch as easyfsl's tutorial trains: support and queries in two passes, each with its own statistics. With
    norm=running, as `protonet` and the paper: one pass, batch statistics over both, and easyfsl takes the features.
    """

    def __init__(self, problem: Problem, library: Any, twin: protonet.ProtoNet) -> None:
        super().__init__(problem)
        assert isinstance(twin.backbone, Conv4)
        self.one_pass, self.lr = twin.backbone.norm == "running", twin.lr
        method = squared(library.PrototypicalNetworks)
        self.on_images, self.on_features = method(backbone=plain_conv4(twin.backbone)), method()

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`: the tasks one after the other."""
        del seeds, steps
        prototypes = []
        for x, y in zip(support.x, support.y, strict=True):
            self.on_images.process_support_set(x, y)
            prototypes.append(self.on_images.prototypes)

        def predict(x: Tensor) -> Tensor:
            answers = []
            for self.on_images.prototypes, queries in zip(prototypes, x, strict=True):
                answers.append(self.on_images(queries))
            return torch.stack(answers)

        return predict

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """As `protonet`'s: where there are running averages to keep, support and queries in one pass."""
        if not (isinstance(batch, Episode) and self.one_pass):
            return super().loss(batch)
        scores = []
        for support, y, queries in zip(batch.support.x, batch.support.y, batch.query.x, strict=True):
            features = self.on_images.backbone(torch.cat([support, queries]))
            self.on_features.process_support_set(features[: len(support)], y)
            scores.append(self.on_features(features[len(support) :]))
        return query_loss(self.problem, torch.stack(scores), batch.query)

    def trainer(self, total_steps: int) -> Trainer:
        """Adam, one task after the other."""
        del total_steps
        return SerialTrainer(self, torch.optim.Adam(self.parameters(), lr=self.lr))


def squared(method: Any) -> Any:
    """easyfsl's class with logits as in the paper: minus the squared distance, where easyfsl takes the distance."""

    class Squared(method):  # type: ignore[misc]
        def l2_distance_to_prototypes(self, samples: Tensor) -> Tensor:
            scores: Tensor = super().l2_distance_to_prototypes(samples)
            return -scores.square()

    made: type[nn.Module] = Squared
    return made


def build(problem: Problem, *, norm: Literal["running", "batch"] = "running", lr: float = 1e-3) -> ProtoNetEasyFsl:
    """Prototypical networks for `problem` as `protonet` builds them.

    Raises:
        Unsupported: easyfsl is not installed.
    """
    library = import_part("easyfsl.methods.prototypical_networks", fix="pip install 'metabench[peers]'")
    return ProtoNetEasyFsl(problem, library, protonet.build(problem, norm=norm, lr=lr))
