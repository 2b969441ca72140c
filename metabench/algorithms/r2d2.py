"""R2-D2: ridge regression on the support features in closed form, an embedding trained through the solver.

Bertinetto, Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers": a task's head is
W = E' (E E' + lambda I)^-1 Y with E the support features (n, d) and Y one-hot, the Woodbury form of the normal
equations: the system has the size of the support set. Logits are scale * e(x) W + bias; scale, bias and lambda are
learned with the embedding, by cross-entropy on the queries.
Defaults as LibFewShot's r2d2.py (after MetaOptNet's code): lambda 50, scale 1, bias 0, and no column of ones in E.
Settled otherwise than in the authors' code (bertinetto/r2d2): that adds the column, divides E and Y by sqrt(n), so that
its lambda (50, not learned) counts n times, starts from a scale of 1e-4 and trains at 5e-3, halved every 2000 episodes
(`lr`, `schedule`), on a wider network. The network here is metabench's own, so that only the head differs from
`protonet`'s. lambda is learned as its logarithm and stays positive. The bias is one number for all classes, as in the
paper: it moves no class probability, and its gradient is zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.finetune import Finetune, LinearHead
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "r2d2",
    "family": "optimisation",
    "paper": "Bertinetto et al. 2019",
    "url": "https://arxiv.org/abs/1805.08136",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {},
}


class R2D2(LinearHead):
    """A ridge-regression head per task; everything is differentiated through its linear system."""

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        ridge: float,
        scale: float,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.use(finetune)
        for name, value in (("ridge", ridge), ("scale", scale)):
            if value <= 0:
                raise ConfigError(f"r2d2: {name} must be above 0, not {value}")
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))  # a logarithm: stays positive
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.zeros(()))

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        weights = ridge_weights(support, self.log_ridge.exp())
        return lambda x: self.scale * (x @ weights) + self.bias

    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """See `LinearHead.linear`."""
        weights = self.scale * ridge_weights(support, self.log_ridge.exp()).mT
        return weights, self.bias.expand(weights.shape[:2])


def ridge_weights(support: Batch, ridge: Tensor) -> Tensor:
    """Weights (T, d, ways) that minimise |E W - Y|^2 + ridge |W|^2 on support features E (T, n, d)."""
    gram = support.x @ support.x.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    dual: Tensor = torch.linalg.solve(gram + ridge * eye, support.one_hot())
    return support.x.mT @ dual


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    ridge: float = 50.0,
    scale: float = 1.0,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> R2D2:
    """R2-D2 for `problem`.

    Args:
        problem: the inputs' shape and the ways; other ways may be tested.
        backbone: any of metabench's.
        norm: whose statistics the batch norm uses (see `metabench.backbones`).
        ridge: lambda at the start of the training.
        scale: of the logits, at the start. Ridge answers lie within 0 and 1, so that at 1 the cross-entropy cannot
            become small (5 ways: P <= 0.4) and Adam moves it by `lr` a step: short trainings do well to start higher.
        lr: rate of Adam.
        schedule: how it moves (see `metabench.algorithms.base.schedule`).
        finetune_steps: gradient steps on the support set in evaluation, from the ridge solution; not the paper's.
        finetune_lr: their size.
        finetune_scope: what they move (see `metabench.algorithms.finetune`).

    Raises:
        ConfigError: ridge or scale not above 0, or a backbone that does not fit the inputs.
    """
    network = make_backbone(backbone, problem.shape, norm=norm)
    finetune = Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope)
    return R2D2(problem, network, ridge=ridge, scale=scale, lr=lr, schedule=schedule, finetune=finetune)
