"""Matching networks: attention over the support items, a weighted vote of their labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.finetune import Finetune, Finetuned, nearest
from metabench.algorithms.metric import cosine, log_mixture, negative_sqeuclidean, unit
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "matching",
    "family": "metric",
    "paper": "Vinyals et al. 2016",
    "url": "https://arxiv.org/abs/1606.04080",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {},
}

Similarity = Literal["cosine", "cosine_unnormalised_query", "sqeuclidean"]


class MatchingNet(Finetuned):
    """Vinyals et al. 2016, eq. 1, without full context embeddings.

    P(y | x, S) = sum_i a(x, x_i) [y_i = y], with a the softmax over all support items of the similarity; the loss is
    -log P (not cross-entropy on summed similarities). The Learner's logits are log P.
    """

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        similarity: Similarity,
        temperature: float,
        learn_temperature: bool,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.use(finetune)
        self.similarity = similarity
        if temperature <= 0:
            raise ConfigError(f"matching: temperature must be above 0, not {temperature}")
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature and similarity == "cosine":
            self.log_temperature = nn.Parameter(log_temperature)  # a logarithm: stays positive
        else:
            self.register_buffer("log_temperature", log_temperature)

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        return lambda x: log_mixture(self._scores(x, support.x), support)

    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """See `Finetuned.linear`: one output per support item, what fine-tuning moves is what attention looks for."""
        if self.similarity == "sqeuclidean":
            return nearest(support.x, "sqeuclidean")
        keys, bias = nearest(support.x, "cosine")
        return (self.log_temperature.exp() * keys if self.similarity == "cosine" else keys), bias

    def see(self, x: Tensor) -> Tensor:
        """See `Finetuned.see`."""
        return unit(x) if self.similarity == "cosine" else x

    def read(self, scores: Tensor, support: Batch) -> Tensor:
        """See `Finetuned.read`."""
        return log_mixture(scores, support)

    def _scores(self, x: Tensor, keys: Tensor) -> Tensor:
        if self.similarity == "cosine":
            return self.log_temperature.exp() * cosine(x, keys)
        if self.similarity == "cosine_unnormalised_query":
            return x @ unit(keys).mT
        return negative_sqeuclidean(x, keys)


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    similarity: Literal["cosine", "cosine_unnormalised_query", "sqeuclidean"] = "cosine",
    temperature: float = 10.0,
    learn_temperature: bool = True,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> MatchingNet:
    """Matching networks; `temperature` multiplies the cosine (the two other similarities have a scale of their own).

    The paper's literal form is temperature=1, learn_temperature=false: a raw cosine cannot saturate (with 5 support
    items P <= 0.65, with 20 P <= 0.28), so it stalls; hence the learned temperature as default.
    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `metabench.algorithms.finetune`).
    """
    return MatchingNet(
        problem,
        make_backbone(backbone, problem.shape, norm=norm),
        similarity=similarity,
        temperature=temperature,
        learn_temperature=learn_temperature,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope),
    )
