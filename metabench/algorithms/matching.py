"""Matching networks: attention over the support items, a weighted vote of their labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Learner, Schedule, uniform
from metabench.algorithms.finetune import Finetune, LinearHead, nearest
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


class Context(nn.Module):
    """Full context embeddings (Vinyals et al. 2016, appendix A): features that know the whole support set.

    Support items are read in both directions, g_i = forward_i + backward_i + x_i. A query x attends to them in `steps`
    rounds, beginning with h = x: the read r = sum_i softmax_i(h . g_i) g_i and x enter an LSTM cell, and its output
    plus x is the next h. The paper gives the cell [h, r] for a hidden state; here, as in the code of Chen et al. 2019
    and others, r stands in the input, [x, r], and the hidden state is h.
    """

    def __init__(self, features: int, *, steps: int) -> None:
        super().__init__()
        self.steps = steps
        # cells: cuDNN's LSTM has no gradient in evaluation mode
        self.onwards, self.backwards = nn.LSTMCell(features, features), nn.LSTMCell(features, features)
        self.cell = nn.LSTMCell(2 * features, features)

    def support(self, x: Tensor, order: Tensor) -> Tensor:
        """Support features x (T, n, d) in the context of each other, read in the `order` (T, n) of their places."""
        places = order[..., None]
        sequence = x.take_along_dim(places, 1)
        context = states(self.onwards, sequence) + states(self.backwards, sequence.flip(1)).flip(1)
        return x + context.take_along_dim(places.argsort(1), 1)  # each item's own, at its own place

    def query(self, x: Tensor, support: Tensor) -> Tensor:
        """Query features x (T, m, d) in the context of support features (T, n, d) that have theirs."""
        h, inputs = x, x.flatten(0, 1)
        c = torch.zeros_like(inputs)
        for _ in range(self.steps):
            read = (h @ support.mT).softmax(-1) @ support
            out, c = self.cell(torch.cat([inputs, read.flatten(0, 1)], -1), (h.flatten(0, 1), c))
            h = out.reshape(x.shape) + x
        return h


def states(cell: nn.LSTMCell, sequence: Tensor) -> Tensor:
    """The hidden states (T, n, d) of an LSTM that reads a sequence (T, n, d), from zero."""
    h = c = torch.zeros_like(sequence[:, 0])
    found = []
    for item in sequence.unbind(1):
        h, c = cell(item, (h, c))
        found.append(h)
    return torch.stack(found, 1)


class MatchingNet(LinearHead):
    """Vinyals et al. 2016, eq. 1, with or without full context embeddings (see `Context`).

    P(y | x, S) = sum_i a(x, x_i) [y_i = y], with a the softmax over all support items of the similarity; the loss is
    -log P (not cross-entropy on summed similarities). The Learner's logits are log P. Features are those of an image
    alone: their context is added in `adapt_features`.
    """

    def __init__(
        self,
        problem: Problem,
        backbone: Backbone,
        *,
        similarity: Similarity,
        temperature: float,
        learn_temperature: bool,
        fce: bool,
        fce_steps: int,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        self.use(finetune)
        if fce and finetune.steps > 0:
            raise ConfigError("matching: a linear head knows no context: set finetune_steps=0 or fce=false")
        self.similarity = similarity
        if fce_steps < 1:
            raise ConfigError(f"matching: fce_steps must be at least 1, not {fce_steps}; without context: fce=false")
        self.context = Context(backbone.out_dim, steps=fce_steps) if fce else None
        if temperature <= 0:
            raise ConfigError(f"matching: temperature must be above 0, not {temperature}")
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature and similarity == "cosine":
            self.log_temperature = nn.Parameter(log_temperature)  # a logarithm: stays positive
        else:
            self.register_buffer("log_temperature", log_temperature)

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`; the order in which a context is read is the task's seed's."""
        context = self.context
        if context is None:
            return super().adapt_features(support, seeds=seeds, steps=steps)
        order = uniform(seeds, support.x.shape[1]).argsort(-1)
        keys = context.support(support.x, order.to(support.x.device))
        return lambda x: log_mixture(self._scores(context.query(x, keys), keys), support)

    def decide(self, support: Batch) -> Learner:
        """See `Finetuned.decide`."""
        return lambda x: log_mixture(self._scores(x, support.x), support)

    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """See `LinearHead.linear`: one output per support item, what fine-tuning moves is what attention looks for."""
        if self.similarity == "sqeuclidean":
            return nearest(support.x, "sqeuclidean")
        keys, bias = nearest(support.x, "cosine")
        return (self.log_temperature.exp() * keys if self.similarity == "cosine" else keys), bias

    def see(self, x: Tensor) -> Tensor:
        """See `LinearHead.see`."""
        return unit(x) if self.similarity == "cosine" else x

    def read(self, scores: Tensor, support: Batch) -> Tensor:
        """See `LinearHead.read`."""
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
    fce: bool = False,
    fce_steps: int = 5,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
    finetune_scope: Literal["head", "all"] = "head",
) -> MatchingNet:
    """Matching networks; `temperature` multiplies the cosine (the two other similarities have a scale of their own).

    The paper's literal form is temperature=1, learn_temperature=false: a raw cosine cannot saturate (with 5 support
    items P <= 0.65, with 20 P <= 0.28), so it stalls; hence the learned temperature as default.

    `fce` adds full context embeddings, which gave the paper nothing on Omniglot. Its number of attention steps is not
    known to us; implementations take from 2 to the number of support items, AntreasAntoniou/MatchingNetworks 5.
    `finetune_*`: gradient steps on support sets in evaluation, not in the paper (see `metabench.algorithms.finetune`).
    """
    return MatchingNet(
        problem,
        make_backbone(backbone, problem.shape, norm=norm),
        similarity=similarity,
        temperature=temperature,
        learn_temperature=learn_temperature,
        fce=fce,
        fce_steps=fce_steps,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr, scope=finetune_scope),
    )
