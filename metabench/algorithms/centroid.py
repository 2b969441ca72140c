"""Nearest centroid: plain classification of all training classes, then class means of centred features of length 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.classification import Classifier
from metabench.algorithms.finetune import Distance, Finetune, LinearHead, nearest
from metabench.algorithms.metric import cosine, negative_sqeuclidean, prototypes, unit
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem, TaskDistribution

METABENCH = {
    "kind": "algorithm",
    "name": "centroid",
    "family": "transfer",
    "paper": "Wang et al. 2019",
    "url": "https://arxiv.org/abs/1911.04623",
    "feeds": "images",
    "control": False,
    "problems": ["classification"],
    "train": {},
}

CHUNK = 256  # images embedded at once
Transform = Literal["none", "l2", "cl2"]


class Centroid(LinearHead, Classifier):
    """SimpleShot (Wang et al. 2019): no fitting at test time; features are centred and scaled to length 1 (`cl2`).

    A query goes to the nearest mean of a class's features. The means are not scaled again and the distance is Euclidean
    (its section 3, and `metric_class_type` of its authors' code); `distance="cosine"` is a variant. With one shot
    both rank alike. The centre is the mean feature of the training images, taken once by `prepare`.
    """

    centre: Tensor

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        transform: Transform,
        distance: Distance,
        centre_images: int,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.transform, self.distance, self.centre_images = transform, distance, centre_images
        self.use(finetune)
        self.register_buffer("centre", torch.zeros(backbone.out_dim))

    @torch.no_grad()
    def prepare(self, train: TaskDistribution) -> None:
        """The mean feature of `centre_images` training images."""
        starts = range(0, self.centre_images, CHUNK)
        images = (train.images(start, min(CHUNK, self.centre_images - start)).x[0] for start in starts)
        self.centre.copy_(torch.cat([self.embed(x.to(self.centre.dtype)) for x in images]).mean(0))

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        centres = self._centres(support)
        score = cosine if self.distance == "cosine" else negative_sqeuclidean
        return lambda x: score(self._transformed(x), centres)

    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """See `LinearHead.linear`."""
        return nearest(self._centres(support), self.distance)

    def see(self, x: Tensor) -> Tensor:
        """See `LinearHead.see`."""
        transformed = self._transformed(x)
        return unit(transformed) if self.distance == "cosine" else transformed

    def _centres(self, support: Batch) -> Tensor:
        return prototypes(replace(support, x=self._transformed(support.x)))

    def _transformed(self, x: Tensor) -> Tensor:
        if self.transform == "none":
            return x
        return unit(x - self.centre if self.transform == "cl2" else x)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    transform: Literal["none", "l2", "cl2"] = "cl2",
    distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean",
    centre_images: int = 2048,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> Centroid:
    """Nearest centroid on pre-trained features; the same pre-training as `baseline`.

    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `metabench.algorithms.finetune`).
    """
    return Centroid(
        problem,
        make_backbone(backbone, problem.shape, norm=norm),
        transform=transform,
        distance=distance,
        centre_images=centre_images,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope),
    )
