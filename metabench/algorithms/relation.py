"""Relation networks: a learned comparison of feature maps, instead of a distance."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Learner, Metrics, Schedule, Trainer, schedule
from metabench.algorithms.finetune import Finetune, Finetuned
from metabench.backbones import MOMENTUM, Conv4, make_backbone
from metabench.convolution import batch_norm, convolve, max_pool
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError
from metabench.tasks import Params, per_task

METABENCH = {
    "kind": "algorithm",
    "name": "relation",
    "family": "metric",
    "paper": "Sung et al. 2018",
    "url": "https://arxiv.org/abs/1711.06025",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {},
}

ROOM = 2**23  # activations of the pairs' first layer in memory at a time, where no batch statistics tie pairs together
HIDDEN = 8  # units of the layer before the score


class RelationModule(nn.Module):
    """How alike two maps are: two blocks of 3x3 convolution, norm, ReLU and 2x2 max-pooling, then two linear layers.

    The first convolution is linear in the pair's concatenated maps, conv([s; q]) = A s + B q + b: each map meets its
    half of the weights once, and a pair is a sum (the gradients are those of the concatenation, too). A map of one
    pixel is not pooled, so that images below 28x28 will do.

    `norm` running: batch statistics over all pairs in training, running averages in evaluation; batch: each task's own
    statistics over its pairs of query and class, which makes it transductive.

    Its methods take the `weights` to work with, all parameters with an axis S first: those of each task (S = T), or
    one set of them for all (S = 1; see `shared`).
    """

    def __init__(self, shape: tuple[int, int, int], *, norm: Literal["running", "batch"]) -> None:
        super().__init__()
        self.norm, self.tracking, self.eps = norm, False, 1e-5
        channels, side, _ = shape
        for i, inputs in enumerate((2 * channels, channels)):
            self.register_parameter(f"conv{i}", nn.Parameter(torch.empty(channels, inputs, 3, 3)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(channels)))
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.ones(channels)))
            self.register_parameter(f"beta{i}", nn.Parameter(torch.zeros(channels)))
            if norm == "running":
                self.register_buffer(f"mean{i}", torch.zeros(channels))
                self.register_buffer(f"var{i}", torch.ones(channels))
            side = max(side // 2, 1)
        self.hidden = nn.Linear(channels * side * side, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)

    @property
    def averaged(self) -> bool:
        """Whether it normalises by its running averages, now."""
        return self.norm == "running" and not self.training

    def shared(self) -> Params:
        """Its own parameters as one set of weights."""
        return {name: value[None] for name, value in self.named_parameters()}

    def project(self, maps: Tensor, side: Literal["support", "query"], weights: Params) -> Tensor:
        """What one side of a pair adds to the first convolution; maps and result (T, k, H, W, C)."""
        weight, bias = self._convolution(0, weights)
        first, second = weight.chunk(2, dim=2)
        weight, bias = (first, bias) if side == "support" else (second, torch.zeros_like(bias))
        sets = torch.unflatten(maps.flatten(0, 1), 0, (len(weight), -1))
        return convolve(sets, weight, bias, stride=1).reshape(maps.shape)

    def forward(self, classes: Tensor, queries: Tensor, weights: Params) -> Tensor:
        """Scores (T, m, N), before the sigmoid, of m queries for N classes; both are projected."""
        pairs = queries[:, :, None] + classes[:, None]  # (T, m, N, H, W, C)
        weight, bias = self._convolution(1, weights)
        sets = torch.unflatten(pairs.flatten(0, 2), 0, (len(weight), -1))
        h = self._shrink(sets, 0, len(pairs), weights)
        h = self._shrink(convolve(h, weight, bias, stride=1), 1, len(pairs), weights)
        h = F.relu(_linear("hidden", h.permute(0, 1, 4, 2, 3).flatten(2), weights))
        return _linear("score", h, weights).reshape(pairs.shape[:3])

    def _convolution(self, i: int, weights: Params) -> tuple[Tensor, Tensor]:
        """Weights and biases of a convolution, with its norm where that is known: a pass less over the pairs."""
        weight, bias, gamma, beta = (weights[f"{name}{i}"] for name in ("conv", "bias", "gamma", "beta"))
        if not self.averaged:
            return weight, bias
        scale = gamma * torch.rsqrt(self.get_buffer(f"var{i}") + self.eps)
        return weight * scale[:, :, None, None, None], (bias - self.get_buffer(f"mean{i}")) * scale + beta

    def _shrink(self, y: Tensor, i: int, tasks: int, weights: Params) -> Tensor:
        """Norm, if it is not done, pooling and ReLU of y (S, P, H, W, C), the pairs of all tasks."""
        h = y if self.averaged else self._normalised(y, i, tasks, weights)
        return F.relu(max_pool(h) if min(h.shape[2:4]) > 1 else h)

    def _normalised(self, y: Tensor, i: int, tasks: int, weights: Params) -> Tensor:
        gamma, beta = weights[f"gamma{i}"], weights[f"beta{i}"]
        if self.norm == "batch":
            sets = torch.unflatten(y, 1, (tasks // len(y), -1))
            return batch_norm(sets, gamma, beta, self.eps).flatten(1, 2)
        averages = (self.get_buffer(f"mean{i}"), self.get_buffer(f"var{i}")) if self.tracking else (None, None)
        images = y.squeeze(0).permute(0, 3, 1, 2)
        z = F.batch_norm(images, averages[0], averages[1], gamma[0], beta[0], True, MOMENTUM, self.eps)
        return z.permute(0, 2, 3, 1).unsqueeze(0)


def _linear(name: str, h: Tensor, weights: Params) -> Tensor:
    """The linear layer called `name` on h (S, P, d)."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if len(weight) == 1:
        return F.linear(h.squeeze(0), weight[0], bias[0]).unsqueeze(0)
    return torch.baddbmm(bias[:, None], h, weight.mT)


class RelationNet(Finetuned):
    """Sung et al. 2018: the score of a class is a small network's answer to (the class's map, the query's map).

    A class's map is the sum of its support maps (`combine="mean"`, as Chen et al. 2019 have it: then training and test
    may differ in shots). Loss: the squared error between sigmoid(score) and the one-hot label, meaned over queries and
    classes; `loss="ce"`, cross-entropy on the scores, is a variant. The Learner's logits are the scores before the
    sigmoid, which orders them alike and would round to ties.

    From the authors' code (floodsung/LearningToCompare_FSL): the initialisation, N(0, 2 / (9 filters)) convolutions
    with biases 0, N(0, 0.01^2) linear layers with biases 1; Adam at 1e-3 for encoder and module, halved every 100,000
    episodes; the gradient's norm clipped to 0.5, that of encoder and module apart. Two Adams with one rate are one.
    The code never evaluates with running averages: its numbers are transductive (`norm="batch"`). `norm="running"` is
    not its own; training then encodes support and query in one pass. The code's pixels are black on white, normalised
    by a mean of 0.92 and a deviation of 0.08; here the background is 0.

    Fine-tuned (see `metabench.algorithms.finetune`), the head is the whole relation module, which is what learned to
    compare: each task has one of its own, tuned by the loss of the training on the support images, each compared with
    the classes' maps, of which it is a part. Running averages stay. A linear head from prototypes would be another
    method, and with `combine="sum"` there are none.
    """

    slow_start = 5  # scores begin all alike (linear weights of 0.01, biases of 1): a plateau, with either loss

    def __init__(
        self,
        problem: Problem,
        backbone: Conv4,
        *,
        loss: Literal["mse", "ce"],
        combine: Literal["sum", "mean"],
        clip: float,
        lr: float,
        schedule: Schedule,
        halve_every: int,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.use(finetune)
        if clip <= 0:
            raise ConfigError(f"relation: clip must be above 0, not {clip}")
        if halve_every < 1:
            raise ConfigError(f"relation: halve_every must be at least 1 step, not {halve_every}")
        self.map = backbone.map
        self.kind, self.combine, self.clip, self.halve_every = loss, combine, clip, halve_every
        self.module = RelationModule(backbone.map, norm="batch" if backbone.norm == "batch" else "running")
        initialise(backbone)
        initialise(self.module)

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`; features are flattened maps."""
        return self.under(self.module.shared(), support)

    def first(self, support: Batch) -> Params:
        """See `Finetuned.first`: the relation module."""
        return per_task(dict(self.module.named_parameters()), support.tasks)

    def breadth(self, support: Batch) -> int:
        """See `Finetuned.breadth`: every support image has a pair with each class."""
        return (support.ways or 1) * self.backbone.out_dim

    def under(self, head: Params, support: Batch) -> Learner:
        """See `Finetuned.under`."""
        members = support.one_hot()
        if self.combine == "mean":
            members = members / members.sum(1, keepdim=True).clamp_min(1)
        classes = self.module.project(self._maps(members.mT @ support.x), "support", head)

        def scores(x: Tensor) -> Tensor:
            queries = self.module.project(self._maps(x), "query", head)
            # batch statistics are of all pairs together
            at_once = max(1, ROOM // classes.numel()) if self.module.averaged else queries.shape[1]
            parts = torch.split(queries, at_once, dim=1)
            return torch.cat([self.module(classes, part, head) for part in parts], dim=1)

        return scores

    def _maps(self, features: Tensor) -> Tensor:
        """Features (T, k, d) as maps (T, k, H, W, C)."""
        return torch.unflatten(features, 2, self.map).permute(0, 1, 3, 4, 2)

    def objective(self, output: Tensor, query: Batch) -> tuple[Tensor, Metrics]:
        """See `Algorithm.objective`."""
        loss, metrics = super().objective(output, query)
        if self.kind == "mse":
            loss = F.mse_loss(output.sigmoid(), query.one_hot())
        return loss, {**metrics, "loss": loss.detach()}

    def support_loss(self, logits: Tensor, support: Batch) -> Tensor:
        """See `FineTuning.support_loss`: the means of the training's loss."""
        if self.kind == "ce":
            return super().support_loss(logits, support)
        return F.mse_loss(logits.sigmoid(), support.one_hot(), reduction="sum") / logits[0].numel()

    def trainer(self, total_steps: int) -> Trainer:
        """Adam, the gradients of encoder and relation module clipped apart."""
        groups = [{"params": list(part.parameters())} for part in (self.backbone, self.module)]
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        plan = schedule(optimizer, self.schedule, total_steps, halve_every=self.halve_every)
        return Trainer(self, optimizer, schedule=plan, clip=self.clip)


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """The initialisation of the authors' code, in place; norms are as they should be already."""
    for name, parameter in network.named_parameters():
        if name.startswith("conv"):
            filters, _, height, width = parameter.shape
            nn.init.normal_(parameter, 0.0, math.sqrt(2 / (height * width * filters)))
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, 0.0, 0.01)
        elif name.endswith("bias"):
            nn.init.ones_(parameter)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4-maps",
    norm: Literal["running", "batch"] = "running",
    loss: Literal["mse", "ce"] = "mse",
    combine: Literal["sum", "mean"] = "sum",
    clip: float = 0.5,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "halving",
    halve_every: int = 100_000,
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> RelationNet:
    """Relation networks; the module's norm follows the encoder's (its pairs have no support set to normalise by).

    The running averages move by 0.1 a step: with the authors' momentum of 1 they would be the last batch's statistics.
    `halve_every` counts training steps, which are single episodes in the paper.
    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `RelationNet`).
    """
    network = make_backbone(backbone, problem.shape, norm=norm)
    if not isinstance(network, Conv4) or network.average:
        raise ConfigError(f"relation: backbone {backbone} has no feature maps to compare: use conv4-maps")
    return RelationNet(
        problem,
        network,
        loss=loss,
        combine=combine,
        clip=clip,
        lr=lr,
        schedule=schedule,
        halve_every=halve_every,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope),
    )
