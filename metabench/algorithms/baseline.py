"""Baseline: plain classification of all training classes, then a fresh linear head per task on frozen features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.classification import Classifier
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem

METABENCH = {
    "kind": "algorithm",
    "name": "baseline",
    "family": "transfer",
    "paper": "Chen et al. 2019",
    "url": "https://arxiv.org/abs/1904.04232",
    "feeds": "images",
    "control": False,
    "problems": ["classification"],
    "train": {},
}


@dataclass(frozen=True)
class Fit:
    """How a task's head is fitted: `epochs` of mini-batch SGD."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    epochs: int
    batch_size: int


class Baseline(Classifier):
    """Chen et al. 2019: frozen features; per task a new linear layer, fitted with mini-batch SGD on the support set.

    The gradient of a softmax layer is written out, (p - y) x, so that all tasks take their steps together. The
    head's initial weights (as nn.Linear's) and the order of its mini-batches come from the task's own seed.
    """

    def __init__(self, problem: Problem, backbone: Backbone, *, fit: Fit, lr: float, schedule: Schedule) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.fit = fit

    @torch.no_grad()
    def _fit(self, support: Batch, seeds: Tensor, steps: int) -> Tensor:
        """Heads (T, ways, d + 1) after `steps` mini-batches of SGD as torch.optim.SGD takes them."""
        per_epoch = math.ceil(support.x.shape[1] / self.fit.batch_size)
        x, y = self._inputs(support.x), support.one_hot()
        like, epochs = with_bias(support.x), math.ceil(steps / per_epoch)
        head, orders = draw(seeds, like=like, ways=y.shape[-1], epochs=epochs)
        head = self._start(head)
        velocity = torch.zeros_like(head)
        for step in range(steps):
            epoch, i = divmod(step, per_epoch)
            picked = orders[:, epoch, i * self.fit.batch_size : (i + 1) * self.fit.batch_size, None]
            inputs, targets = x.take_along_dim(picked, 1), y.take_along_dim(picked, 1)
            error = self._logits(head, inputs).softmax(-1).sub_(targets).div_(picked.shape[1])
            gradient = self._gradient(head, inputs, error).add_(head, alpha=self.fit.weight_decay)
            # as torch's SGD: the velocity starts at the first gradient, undamped; dampening needs momentum
            share = 1 - self.fit.dampening if step > 0 and self.fit.momentum > 0 else 1.0
            velocity.mul_(self.fit.momentum).add_(gradient, alpha=share)
            head.sub_(velocity, alpha=self.fit.lr)
        return head

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`; `steps` counts mini-batches, None: all epochs."""
        if steps is None:
            steps = self.fit.epochs * math.ceil(support.x.shape[1] / self.fit.batch_size)
        head = self._fit(support, seeds, steps)
        return lambda x: self._logits(head, self._inputs(x))

    # the kind of the head: a linear layer, its bias in the last column

    def _start(self, drawn: Tensor) -> Tensor:
        """The head (T, ways, d + 1) to begin with, of what `draw` gives."""
        return drawn

    def _inputs(self, x: Tensor) -> Tensor:
        """What the head sees of features x (T, n, d)."""
        return with_bias(x)

    def _logits(self, head: Tensor, inputs: Tensor) -> Tensor:
        """Logits (T, n, ways) of inputs."""
        return inputs @ head.mT

    def _gradient(self, head: Tensor, inputs: Tensor, error: Tensor) -> Tensor:
        """The loss's gradient by the head, `error` (T, n, ways) being that by the logits."""
        del head
        return error.mT @ inputs


def with_bias(x: Tensor) -> Tensor:
    """x (T, n, d) with a last feature of ones: the bias becomes a weight."""
    return torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=-1)


def draw(seeds: Tensor, *, like: Tensor, ways: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Initial heads (T, ways, d + 1), uniform as nn.Linear's, and item orders (T, epochs, n), for `like` (T, n, d + 1).

    A task's draws depend on its own seed only, never on the tasks that share the call.
    """
    bound = 1 / math.sqrt(like.shape[-1] - 1)
    heads, orders = [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        heads.append(torch.rand(ways, like.shape[-1], generator=generator, dtype=torch.float64))
        orders.append(torch.rand(epochs, like.shape[1], generator=generator, dtype=torch.float64).argsort(-1))
    return (torch.stack(heads).to(like) * 2 - 1) * bound, torch.stack(orders).to(like.device)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    head_lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 1e-3,
    epochs: int = 100,
    batch_size: int = 4,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
) -> Baseline:
    """The transfer baseline; `lr` and `schedule` belong to the pre-training, the rest to the head of a task."""
    fit = Fit(
        lr=head_lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
    )
    return Baseline(problem, make_backbone(backbone, problem.shape, norm=norm), fit=fit, lr=lr, schedule=schedule)
