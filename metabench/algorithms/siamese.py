"""Siamese networks: the probability that two images show the same class, learned from pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Learner, Metrics, Schedule, Trainer, schedule, uniform
from metabench.algorithms.distortions import distorted
from metabench.algorithms.finetune import Finetune, Finetuned, linear_scores
from metabench.algorithms.metric import best_of_class
from metabench.backbones import Backbone, Koch, make_backbone
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Params, per_task

METABENCH = {
    "kind": "algorithm",
    "name": "siamese",
    "family": "metric",
    "paper": "Koch et al. 2015",
    "url": "https://www.cs.cmu.edu/~rsalakhu/papers/oneshot1.pdf",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {"ways": 64, "shots": 1, "queries": 1},  # 64 pairs of one class and 64 of two: the paper's batch of 128
}

ROOM = 2**24  # componentwise distances in memory at a time
Pairs = Literal["drawn", "all"]


class Siamese(Finetuned):
    """Koch et al. 2015: two images are of one class with p = sigmoid(sum_j w_j |h1_j - h2_j| + b).

    The offset b is not in the paper's equation, but a fully connected layer has one (its section 3.2 initialises it).

    Trained on pairs of a support and a query image of an episode, which are different drawings, by binary
    cross-entropy; each image is encoded once for all its pairs (exact: the two branches share their weights).
    `pairs="drawn"` is the paper's half and half: for each query one support image of its class and one of another,
    drawn by the task's seed. `pairs="all"` takes every pair, the same ones with half the weight: what the drawn loss
    is on average. With `distort` every image of a training episode is distorted first, as in the paper's section 3.2;
    each step draws anew, where the paper keeps eight copies.

    The Learner's logits are the pair's logits (a probability would round to 1, and tie), over the shots of a class
    their mean or their maximum; the paper has one shot. A network that answers the same for all pairs ties: chance.

    Fine-tuned (see `metabench.algorithms.finetune`; Vinyals et al. 2016 have such a row, without details), the head is
    the pair's weights w and b: the pairs of support images go on to be told apart, by the cross-entropy over the
    classes of each image's answer, and no longer by that over pairs, for with one shot no pair of drawings is of one
    class. An image's pair with itself has distance 0 and moves no weight. No linear head on the features would do: this
    decision is none, so that the first step would leap to another method.
    """

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        pairs: Pairs,
        distort: bool,
        combine: Literal["mean", "max"],
        weight_decay: float,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.use(finetune)
        if weight_decay < 0:
            raise ConfigError(f"siamese: weight_decay must be 0 or more, not {weight_decay}")
        self.pairs, self.distort, self.combine, self.weight_decay = pairs, distort, combine, weight_decay
        self.head = nn.Linear(backbone.out_dim, 1)
        if isinstance(backbone, Koch):  # section 3.2: fully connected layers, all alike
            nn.init.normal_(self.head.weight, 0.0, 0.2)
            nn.init.normal_(self.head.bias, 0.5, 0.01)

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        return self._decision(support, self._score)

    def first(self, support: Batch) -> Params:
        """See `Finetuned.first`: the weights of the pair."""
        return per_task(dict(self.head.named_parameters()), support.tasks)

    def under(self, head: Params, support: Batch) -> Learner:
        """See `Finetuned.under`."""

        def score(distances: Tensor) -> Tensor:
            return linear_scores(head, distances.flatten(1, 2)).reshape(distances.shape[:3])

        return self._decision(support, score)

    def breadth(self, support: Batch) -> int:
        """See `Finetuned.breadth`: every support image has a pair with each."""
        return support.x.shape[1] * self.backbone.out_dim

    def _decision(self, support: Batch, score: Callable[[Tensor], Tensor]) -> Learner:
        """`score` gives the logits (T, m, n) of pairs by their componentwise distances (T, m, n, d)."""
        if self.combine == "max":
            return lambda x: best_of_class(similarities(x, support.x, score), support)
        shares = support.one_hot()
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)

        def means(x: Tensor) -> Tensor:
            logits = similarities(x, support.x, score)
            first = logits[..., :1]  # what all have in common is not rounded once for each class: equal answers tie
            return first + (logits - first) @ shares

        return means

    def _score(self, distances: Tensor) -> Tensor:
        logits: Tensor = self.head(distances)
        return logits.squeeze(-1)

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """Binary cross-entropy over pairs, half of them of one class; `pair_accuracy` is no one-shot accuracy."""
        if not isinstance(batch, Episode):
            raise TypeError("Siamese trains on episodes")
        support, query = self.embed_episode(distorted(batch) if self.distort else batch)
        same = batch.query.y[:, :, None] == support.y[:, None]  # (T, m, n)
        if self.pairs == "all":
            logits = similarities(query, support.x, self._score)
            return _judge(logits[same], logits[~same])
        drawn = draw(same, batch.seeds)
        others = (support.x.take_along_dim(places[..., None], 1) for places in drawn)
        return _judge(*(self._score((query - other).abs()) for other in others))

    def trainer(self, total_steps: int) -> Trainer:
        """Adam in the place of the paper's SGD, whose layer-wise rates, momenta and decays are not published."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps))


def similarities(x: Tensor, others: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits (T, m, n) of all pairs of features x (T, m, d) and others (T, n, d): `score` of their distances."""
    at_once = max(1, ROOM // x.numel())
    parts = [score((x[:, :, None] - part[:, None]).abs()) for part in torch.split(others, at_once, dim=1)]
    return torch.cat(parts, dim=2)


def _judge(alike: Tensor, different: Tensor) -> tuple[Tensor, Metrics]:
    """The loss on logits of pairs of one class and of two, both kinds weighing half."""
    loss = (F.softplus(-alike).mean() + F.softplus(different).mean()) / 2
    accuracy = ((alike.detach() > 0).float().mean() + (different.detach() < 0).float().mean()) / 2
    return loss, {"loss": loss.detach(), "pair_accuracy": accuracy}


def draw(same: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Of n support images one of each query's class and one of another class, uniformly: their places, (T, m) each.

    same (T, m, n) says which support images are of the query's class; a task's draws depend on its own seed only.
    """
    keys = uniform(seeds, 2, *same.shape[1:]).to(same.device)
    return keys[:, 0].masked_fill(~same, -1.0).argmax(-1), keys[:, 1].masked_fill(same, -1.0).argmax(-1)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    pairs: Literal["drawn", "all"] = "drawn",
    distort: bool = False,
    combine: Literal["mean", "max"] = "mean",
    weight_decay: float = 0.0,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> Siamese:
    """Siamese networks; `backbone="koch105"` is the paper's on 105x105 images, "koch35" its reduced form on 35x35.

    With the default backbone it is no network of the paper's but its head and its training on the Conv-4 of the other
    metric methods ("siamese-conv4"). For the paper's networks a known rate is 6e-5 (fangpin/siamese-pytorch, Adam,
    batches of 128); they have no normalisation, so that `norm` must stay as it is. `distort` is how
    the paper's best network was trained.

    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `Siamese`).
    """
    network = make_backbone(backbone, problem.shape, norm=norm)
    if isinstance(network, Koch) and norm != "running":
        raise ConfigError(f"siamese: backbone {backbone} has no normalisation, so norm cannot be {norm}: leave it out")
    return Siamese(
        problem,
        network,
        pairs=pairs,
        distort=distort,
        combine=combine,
        weight_decay=weight_decay,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope),
    )
