"""Baseline++: as baseline, with heads that decide by the cosine, in pre-training and per task.

Chen et al. 2019, "A Closer Look at Few-shot Classification", and the authors' code (distLinear of
wyharveychen/CloserLookFewShot): scores are s * g_c * (v_c / |v_c|) . (x / (|x| + 1e-5)). The code gives every class a
learnable length g_c (weight normalisation, at the start g_c = |v_c|), so that it is no pure cosine, and so is this. The
factor s is 2 for up to 200 classes and 10 above, in the pre-training (Omniglot: 10) as for a task's head (2). The
head's fit is `baseline`'s: mini-batch SGD on v and g, both with weight decay.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Schedule
from metabench.algorithms.baseline import Baseline, Fit
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "baseline++",
    "family": "transfer",
    "paper": "Chen et al. 2019",
    "url": "https://arxiv.org/abs/1904.04232",
    "feeds": "images",
    "control": False,
    "problems": ["classification"],
    "train": {},
}

MANY_CLASSES = 200  # above it the larger factor
NO_LENGTH = 1e-5  # added to the features' length


class BaselinePlusPlus(Baseline):
    """A task's head (T, ways, d + 1) holds the directions v and, in its last column, the lengths g."""

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        scale: float | None,
        fit: Fit,
        lr: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(problem, backbone, fit=fit, lr=lr, schedule=schedule)
        if scale is not None and scale <= 0:
            raise ConfigError(f"baseline++: scale must be above 0, not {scale} (null: 2, and 10 above 200 classes)")
        assert problem.classes is not None
        self.scale = scale
        self.output = CosineLinear(backbone.out_dim, problem.classes, scale=self._factor(problem.classes))

    def _factor(self, classes: int) -> float:
        return self.scale if self.scale is not None else 10.0 if classes > MANY_CLASSES else 2.0

    def _start(self, drawn: Tensor) -> Tensor:
        directions = drawn[..., :-1]
        return torch.cat([directions, directions.norm(dim=-1, keepdim=True)], dim=-1)

    def _inputs(self, x: Tensor) -> Tensor:
        return directed(x)

    def _logits(self, head: Tensor, inputs: Tensor) -> Tensor:
        return inputs @ weights(head, self._factor(head.shape[1])).mT

    def _gradient(self, head: Tensor, inputs: Tensor, error: Tensor) -> Tensor:
        """By the chain rule: of u = v / |v|, the part of a gradient along v is the length's, the rest turns v."""
        by_weight = self._factor(head.shape[1]) * (error.mT @ inputs)
        size = head[..., :-1].norm(dim=-1, keepdim=True)
        u = head[..., :-1] / size
        along = (by_weight * u).sum(-1, keepdim=True)
        return torch.cat([head[..., -1:] / size * (by_weight - along * u), along], dim=-1)


class CosineLinear(nn.Module):
    """The same head as a layer of the pre-training: features (n, d) -> logits (n, classes)."""

    def __init__(self, features: int, classes: int, *, scale: float) -> None:
        super().__init__()
        drawn = nn.Linear(features, classes, bias=False).weight.detach()
        self.scale = scale
        self.directions = nn.Parameter(drawn)
        self.lengths = nn.Parameter(drawn.norm(dim=-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features x."""
        return directed(x) @ weights(torch.cat([self.directions, self.lengths], dim=-1), self.scale).mT


def weights(head: Tensor, scale: float) -> Tensor:
    """scale * g * v / |v| (..., d) of a head (..., d + 1)."""
    v, g = head[..., :-1], head[..., -1:]
    result: Tensor = scale * g * v / v.norm(dim=-1, keepdim=True)
    return result


def directed(x: Tensor) -> Tensor:
    """x / (|x| + 1e-5) over the last axis; the gradient is finite at zero."""
    result: Tensor = x / (x.norm(dim=-1, keepdim=True) + NO_LENGTH)
    return result


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    scale: float | None = None,
    head_lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 1e-3,
    epochs: int = 100,
    batch_size: int = 4,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
) -> BaselinePlusPlus:
    """Baseline++; `scale` is the factor s, by default the paper's; all else as in `baseline`.

    Raises:
        ConfigError: scale not above 0, a problem without training classes, or a backbone that does not fit the inputs.
    """
    fit = Fit(
        lr=head_lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
    )
    network = make_backbone(backbone, problem.shape, norm=norm)
    return BaselinePlusPlus(problem, network, scale=scale, fit=fit, lr=lr, schedule=schedule)
