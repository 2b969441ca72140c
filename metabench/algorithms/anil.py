"""ANIL: MAML whose inner loop adapts the linear head only; the body is trained by the outer loop.

Raghu, Raghu, Bengio and Vinyals 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML". Support and query features are computed once per task, which is exact since no inner step changes them; the
gradient of the linear layer is written out, (softmax - y) x, so that all tasks take their steps together. It is second
order as the paper's: the outer gradient also reaches the body through the support features in these steps.
Network, rates and numbers of steps are those of `maml`, since the paper's own per data set could not be verified.
By default the head for classes is not the paper's but a variant: `head_init: tied`, the same weights for every class at
the start of every task, with no weights of its own to learn. `head_init: normal` chooses the paper's, a head that the
outer loop trains from a random start, as in `maml`.
Unlike in `maml`, `norm: running` is offered: the weights of the body never adapt, so that its running averages are
right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.maml import HeadInit, InnerLoss, default_backbone, default_rate, default_steps, make_network
from metabench.algorithms.metric import Embedding, cosine
from metabench.backbones import Network
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "anil",
    "family": "optimisation",
    "paper": "Raghu et al. 2020",
    "url": "https://arxiv.org/abs/1909.09157",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"tasks": 32},
}


class Anil(Embedding):
    """Gradient steps of a linear layer on support features, differentiated through; `tied`: from equal weights."""

    inner_loop = True

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        tied: bool,
        nil: bool,
        steps: tuple[int, int],
        inner_lr: float,
        inner_loss: InnerLoss,
        lr: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(problem, network.backbone, lr=lr, schedule=schedule)
        self.head = None if tied else network.head
        self.nil, self.inner_lr, self.inner_loss = nil, inner_lr, inner_loss
        self.train_steps, self.test_steps = steps

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`: inner steps of the head; with `nil`, in evaluation, no head at all."""
        del seeds  # nothing here is random
        if self.nil and not self.training:
            return lambda x: cosine(x, support.x) @ support.one_hot()
        default = self.train_steps if self.training else self.test_steps
        weight, bias = self._start(support)
        for _ in range(default if steps is None else steps):
            slope = self._slope(linear(support.x, weight, bias), support)
            weight = torch.sub(weight, slope.mT @ support.x, alpha=self.inner_lr)
            bias = torch.sub(bias, slope.sum(1), alpha=self.inner_lr)
        return lambda x: linear(x, weight, bias)

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for, where the head has weights of its own for each class."""
        if self.head is not None and not self.nil and problem.ways != self.problem.ways:
            return f"the head was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def _start(self, support: Batch) -> tuple[Tensor, Tensor]:
        """The weights (T, outputs, d) and biases (T, outputs) that the inner loop starts from."""
        tasks, _, width = support.x.shape
        if self.head is None:
            outputs = support.one_hot().shape[-1]
            return support.x.new_zeros(tasks, outputs, width), support.x.new_zeros(tasks, outputs)
        weight, bias = self.head.weight, self.head.bias
        return weight.expand(tasks, *weight.shape), bias.expand(tasks, *bias.shape)

    def _slope(self, output: Tensor, support: Batch) -> Tensor:
        """The gradient of each task's support loss with respect to its outputs (T, n, outputs)."""
        if self.problem.loss == "mse":
            return (output - support.y) * (2 / output[0].numel())
        scale = output.shape[-1] if self.inner_loss == "per_class_sum" else 1
        return (output.softmax(-1) - support.one_hot()) * (scale / output.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs (T, m, outputs) of x (T, m, d), each task by its own weight (T, outputs, d) and bias (T, outputs)."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "support",
    inner_steps: int = 1,
    test_steps: int | None = None,
    inner_lr: float | None = None,
    inner_loss: Literal["per_class_sum", "mean"] = "per_class_sum",
    head_init: Literal["tied", "zero", "normal"] | None = None,
    nil: bool = False,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
) -> Anil:
    """ANIL for `problem`.

    Args:
        problem: the inputs' shape, and `ways` classes or `outputs` numbers to predict.
        backbone: `auto` is conv4-strided for images and mlp for vectors, as for `maml`.
        norm: whose statistics the batch norm uses (see `metabench.backbones`); `running` mixes support and query
            images in training, as `protonet` does.
        inner_steps: gradient steps in training; by default 1, as `maml`.
        test_steps: gradient steps in evaluation; by default as `maml`: 3 for classification, 10 for regression.
        inner_lr: rate of the inner loop; by default as `maml` (2.0 on the mean loss with `per_class_sum`, 0.4 with
            `mean`, 0.01 for regression).
        inner_loss: how the cross-entropy of a support set is reduced; regression always takes the mean.
        head_init: `tied`, the default for classes, lets all of them start every task from the same weights. A softmax
            does not see what all classes have in common, so that these are zeros and nothing is learned of them: no
            class has a head start, labels are interchangeable, and tasks of any number of ways can be answered. It is
            a variant (of bkj/ezml) and not the paper's. For the paper's choose `normal`: the training starts as that
            of `maml`, from N(0, 1), and gets nowhere if it is short. `zero` starts the training from zero, and learns
            on. For regression `normal`, which there is PyTorch's own initialisation.
        nil: no head in evaluation (the paper's NIL): support labels weighted by the cosines of their features with
            the query's, summed; training is the same.
        lr: rate of the outer Adam.
        schedule: the outer rate over the training: constant, a cosine to 0, or halved every 2000 steps.

    Raises:
        ConfigError: a backbone that does not fit the inputs, or `tied` or `nil` for regression.
    """
    regression = problem.loss == "mse"
    if regression and head_init == "tied":
        raise ConfigError("head_init: tied is for classes, and this is regression: use zero")
    if regression and nil:
        raise ConfigError("nil: it needs classes, and this is regression: leave it false")
    tied = head_init == "tied" or (head_init is None and not regression)
    start: HeadInit = "zero" if head_init == "zero" else "normal"
    return Anil(
        problem,
        make_network(problem, default_backbone(problem, backbone), norm, start),
        tied=tied,
        nil=nil,
        steps=(inner_steps, default_steps(problem, test_steps)),
        inner_lr=inner_lr if inner_lr is not None else default_rate(problem, inner_loss),
        inner_loss=inner_loss,
        lr=lr,
        schedule=schedule,
    )
