"""Fine-tuning at test time: after a metric method has adapted, a few gradient steps on the support set.

The method's decision is written as a linear head on its features (the nearest of squared Euclidean prototypes c is
W = 2c, b = -|c|^2, but for what all classes share), so that without steps the head answers as the method does. Then
full-batch gradient descent on the mean cross-entropy of the support set moves the head, or with the scope `all` the
backbone as well. Training never fine-tunes. In grad mode the result is differentiable to the first order: the descent
counts as a constant shift.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import Learner
from metabench.algorithms.metric import Embedding, unit
from metabench.backbones import Backbone, Stats
from metabench.episodes import Batch
from metabench.errors import ConfigError
from metabench.tasks import Execution, Params, choose, per_task

Scope = Literal["head", "all"]
Distance = Literal["sqeuclidean", "cosine"]
BODY = "backbone."  # before the names of the backbone's parameters


@dataclass(frozen=True)
class Finetune:
    """How many gradient steps of which size (0: none), and what they move.

    Raises:
        ConfigError: a negative number of steps, or a size that is not above 0.
    """

    steps: int = 0
    lr: float = 0.01
    scope: Scope = "head"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"finetune_steps must not be negative, but is {self.steps}: 0 switches fine-tuning off")
        if self.lr <= 0:
            raise ConfigError(f"finetune_lr must be above 0, not {self.lr}: finetune_steps=0 switches fine-tuning off")


class Finetuned(Embedding):
    """An `Embedding` with a decision of its own, which it can also write as a linear head and fine-tune.

    With `W, b = linear(support)` the logits `read(see(x) W' + b, support)` give the probabilities of `decide(support)`.
    """

    finetune = Finetune()

    def use(self, finetune: Finetune) -> None:
        """Fine-tune in evaluation as said."""
        self.finetune, self.inner_loop = finetune, finetune.steps > 0

    @abstractmethod
    def decide(self, support: Batch) -> Learner:
        """The method's own decision on features: support.x (T, n, d)."""

    @abstractmethod
    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """The same as a linear head of k outputs: weights (T, k, d) and biases (T, k)."""

    def see(self, x: Tensor) -> Tensor:
        """What the linear head is given of features x (T, m, d)."""
        return x

    def read(self, scores: Tensor, support: Batch) -> Tensor:
        """Logits (T, m, ways) of the head's outputs (T, m, k)."""
        del support
        return scores

    @property
    def cacheable(self) -> bool:
        """See `FeatureMethod.cacheable`: not if a task moves the backbone."""
        return super().cacheable and not (self.finetune.scope == "all" and self._count(None) > 0)

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`; `steps` stands for `finetune_steps` where that is above 0."""
        del seeds
        count = self._count(steps)
        return self.decide(support) if count == 0 else self._tune_head(support, self.linear(support), count)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`; `steps` stands for `finetune_steps` where that is above 0."""
        count = self._count(steps)
        if count == 0 or self.finetune.scope == "head":
            return super().adapt(support, seeds=seeds, steps=steps)
        return self._tune_all(support, count)

    def _count(self, steps: int | None) -> int:
        if self.training or self.finetune.steps == 0:
            return 0
        return self.finetune.steps if steps is None else steps

    def _tune_head(self, support: Batch, start: tuple[Tensor, Tensor], steps: int) -> Learner:
        """Steps of a head on features that stay: support.x (T, n, d)."""
        head = self.tuned(support, start, steps)
        return lambda x: self.read(_scores(head, self.see(x)), support)

    def tuned(self, support: Batch, start: tuple[Tensor, Tensor], steps: int) -> Params:
        """The head (`weight`, `bias`) after so many steps from `start` on support.x (T, n, d)."""
        seen = self.see(support.x).detach()

        def loss(head: Params) -> Tensor:
            return support_loss(self.read(_scores(head, seen), support), support)

        together = Execution("grouped", support.tasks)
        return descend(together, loss, dict(zip(("weight", "bias"), start, strict=True)), self.finetune, steps)

    def _tune_all(self, support: Batch, steps: int) -> Learner:
        """Steps of the head and the backbone on images: support.x (T, n, *shape)."""
        body = self.backbone
        execution = choose("auto", support.x, widest=body.widest, stride=body.stride)

        def learn(x: Tensor, y: Tensor) -> tuple[Params, Stats]:
            part = Batch(x, y, support.ways)
            start = {BODY + name: p for name, p in per_task(dict(body.named_parameters()), len(x)).items()}

            def output(params: Params) -> Tensor:
                return self.read(_scores(params, self.see(_features(body, params, x))), part)

            features = execution.map(lambda p, x: _features(body, p, x), start, x)
            start["weight"], start["bias"] = self.linear(replace(part, x=features))
            fast = descend(execution, lambda p: support_loss(output(p), part), start, self.finetune, steps)
            return fast, execution.map(lambda p, x: _stats(body, p, x), fast, x)

        fast, stats = execution.chunks(learn, support.x, support.y)

        def answer(params: Params, stats: Stats, x: Tensor, shown: Tensor, y: Tensor) -> Tensor:
            features = _query_features(body, params, stats, x, shown)
            return self.read(_scores(params, self.see(features)), Batch(shown, y, support.ways))

        def predict(x: Tensor) -> Tensor:
            work = choose("auto", x, widest=body.widest, stride=body.stride)
            answers: Tensor = work.map(answer, fast, stats, x, support.x, support.y)
            return answers

        return predict


def descend(
    execution: Execution, loss: Callable[[Params], Tensor], start: Params, finetune: Finetune, steps: int
) -> Params:
    """Parameters (T, ...) after so many steps from `start`; the gradient passes as if they were none."""
    moved = {name: value.detach() for name, value in start.items()}
    for _ in range(steps):
        gradient = execution.gradient(loss, moved, second_order=False)
        moved = {name: torch.sub(value, gradient[name], alpha=finetune.lr) for name, value in moved.items()}
    return {name: value + (moved[name] - value).detach() for name, value in start.items()}


def support_loss(logits: Tensor, support: Batch) -> Tensor:
    """The mean cross-entropies of T support sets, summed."""
    return F.cross_entropy(logits.flatten(0, 1), support.y.flatten(), reduction="sum") / logits.shape[1]


def nearest(centres: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """The nearest of the points `centres` (T, k, d) as a linear head; for the cosine, of unit features."""
    if distance == "cosine":
        return unit(centres), centres.new_zeros(centres.shape[:2])
    return 2 * centres, -centres.square().sum(-1)


def _scores(head: Params, x: Tensor) -> Tensor:
    return x @ head["weight"].mT + head["bias"][:, None]


def _body(params: Params) -> Params:
    return {name.removeprefix(BODY): value for name, value in params.items() if name.startswith(BODY)}


def _features(body: Backbone, params: Params, x: Tensor) -> Tensor:
    """Features (T, n, d) of support images under a task's own parameters."""
    averages = body.averages(len(x))
    own = _body(params)
    return body.features(own, x) if averages is None else body.apply_to(own, x, averages)[0]


def _stats(body: Backbone, params: Params, x: Tensor) -> Stats:
    """The statistics of support images, if queries are normalised with them."""
    return body.apply_to(_body(params), x)[1] if body.norm in ("support", "tasknorm") else ()


def _query_features(body: Backbone, params: Params, stats: Stats, x: Tensor, support: Tensor) -> Tensor:
    if body.norm == "running":  # `embed_query` would take the backbone's own parameters
        return _features(body, params, x)
    return body.embed_query(_body(params), x, support, stats)
