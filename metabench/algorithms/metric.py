"""What methods that decide on features share: one embedding pass over all tasks, then distances over the task axis.

Where features do not depend on the support set (`cacheable`), a test set can be embedded once and every episode run on
cached features: `adapt(support)(x)` equals `adapt_features(embedded support)(embedded x)`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm, Learner, Metrics, Schedule, Trainer, schedule
from metabench.backbones import Backbone
from metabench.episodes import Batch, Episode, Problem

UNIT_EPS = 1e-8  # keeps the gradient of a direction finite at the zero vector


class FeatureMethod(Algorithm):
    """A method in two parts: images -> features, then a decision made from features alone."""

    @property
    @abstractmethod
    def cacheable(self) -> bool:
        """Whether (in eval mode) an image's features depend on nothing but the image."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Features (N, d) of images (N, *shape); meaningful one image at a time only where `cacheable`."""

    @abstractmethod
    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """`adapt` on features: support.x (T, n, d); the Learner takes features (T, m, d)."""


class Embedding(FeatureMethod):
    """A `FeatureMethod` whose features come from a trained backbone, normalised as the backbone's `norm` says."""

    def __init__(self, problem: Problem, backbone: Backbone, *, lr: float, schedule: Schedule) -> None:
        super().__init__(problem)
        self.backbone = backbone
        self.lr = lr
        self.schedule: Schedule = schedule

    @property
    def cacheable(self) -> bool:
        """See `FeatureMethod.cacheable`: running averages or the image's own statistics."""
        return self.backbone.norm in ("running", "layer")

    def embed(self, x: Tensor) -> Tensor:
        """See `FeatureMethod.embed`."""
        features: Tensor = self.backbone(x)
        return features

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`; `seeds` and `steps` matter only to methods that fit a head."""
        params = dict(self.backbone.named_parameters())
        features, stats = self.backbone.embed_support(params, support.x)
        decide = self.adapt_features(replace(support, x=features), seeds=seeds, steps=steps)
        return lambda x: decide(self.backbone.embed_query(params, x, support.x, stats))

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """As `Algorithm.loss`, with support and query in one pass: batch statistics mix both (Snell et al. 2017)."""
        if not (isinstance(batch, Episode) and self.cacheable):
            return super().loss(batch)
        support, query = self.embed_episode(batch)
        return self.objective(self.adapt_features(support, seeds=batch.seeds)(query), batch.query)

    def embed_episode(self, batch: Episode) -> tuple[Batch, Tensor]:
        """The support set with features for images, and features (T, m, d) of its queries; as `loss` has them."""
        support = batch.support
        if not self.cacheable:
            params = dict(self.backbone.named_parameters())
            features, stats = self.backbone.embed_support(params, support.x)
            return replace(support, x=features), self.backbone.embed_query(params, batch.query.x, support.x, stats)
        shots = support.x.shape[1]
        x = torch.cat([support.x, batch.query.x], dim=1)
        z = self.embed(x.flatten(0, 1)).reshape(*x.shape[:2], -1)
        return replace(support, x=z[:, :shots]), z[:, shots:]

    def trainer(self, total_steps: int) -> Trainer:
        """Adam."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps))


def prototypes(support: Batch) -> Tensor:
    """The mean (T, ways, d) of each class's features."""
    weights = support.one_hot()
    counts = weights.sum(1).clamp_min(1)
    return weights.mT @ support.x / counts[..., None]


def negative_sqeuclidean(x: Tensor, points: Tensor) -> Tensor:
    """-|x - p|^2 (T, m, k) of x (T, m, d) and points (T, k, d), as one matrix product."""
    squares = x.square().sum(-1)[:, :, None] + points.square().sum(-1)[:, None, :]
    return 2 * (x @ points.mT) - squares


def unit(x: Tensor) -> Tensor:
    """x scaled to length 1 over its last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def cosine(x: Tensor, points: Tensor) -> Tensor:
    """The cosine (T, m, k) of x (T, m, d) and points (T, k, d)."""
    return unit(x) @ unit(points).mT


def best_of_class(scores: Tensor, support: Batch) -> Tensor:
    """The highest score (T, m, ways) of each class; scores (T, m, n) of the n support items."""
    ways = support.one_hot().shape[-1]
    lowest = scores.new_full((*scores.shape[:2], ways), -torch.inf)
    return lowest.scatter_reduce(2, support.y[:, None, :].expand_as(scores), scores, "amax")


def log_mixture(scores: Tensor, support: Batch) -> Tensor:
    """log of the softmax over all support items, summed per class: scores (T, m, n) -> (T, m, ways).

    A log-sum-exp within each class: a class far below the best one keeps a finite value and its gradient.
    """
    best = best_of_class(scores.detach(), support)
    own = best.gather(2, support.y[:, None, :].expand_as(scores))
    total = (scores - own).exp() @ support.one_hot()
    return (total.log() + best).log_softmax(-1)
