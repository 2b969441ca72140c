"""Fine-tuning at test time: once a method has adapted, a few gradient steps on the support set.

What is tuned is the decision: the parameters, here the head, that turn features into answers. A method may write its
decision as a linear head on its features (the nearest of squared Euclidean prototypes c is W = 2c, b = -|c|^2, but for
what all classes share), or bring parameters that were learned for it (the weights of a siamese pair, a relation
module, the output layer of MANN or of a meta network). Without steps the head answers as the method does. Then
full-batch gradient descent lowers the loss of the adapted method's answers on its own support set, each support
example asked about like a query: the mean cross-entropy, but for `relation`, which goes on with the loss it was trained
with. It moves the head, or with the scope `all` the backbone as well. Training never fine-tunes. In grad mode the
result is differentiable to the first order: the descent counts as a constant shift.

Vinyals et al. 2016 have rows of fine-tuned methods in their tables; of how they tune we know no details but that it is
on the support set. So this is the plainest form of it, the same for all methods.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import Algorithm, Learner
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


class FineTuning(Algorithm):
    """An algorithm that, in evaluation and if asked to, takes gradient steps on the support set once it has adapted."""

    finetune = Finetune()

    def use(self, finetune: Finetune) -> None:
        """Fine-tune in evaluation as said."""
        self.finetune, self.inner_loop = finetune, finetune.steps > 0

    def tuning_steps(self, steps: int | None) -> int:
        """How many steps to take now; `steps` stands for `finetune_steps` where that is above 0."""
        if self.training or self.finetune.steps == 0:
            return 0
        return self.finetune.steps if steps is None else steps

    def tuned(self, support: Batch, head: Params, answer: Callable[[Params], Tensor], steps: int) -> Params:
        """The parameters `head` (T, ...) after so many steps; `answer` gives their logits (T, n, ways) on `support`."""
        together = Execution("grouped", support.tasks)
        return descend(together, lambda p: self.support_loss(answer(p), support), head, self.finetune, steps)

    def support_loss(self, logits: Tensor, support: Batch) -> Tensor:
        """The losses of T support sets, summed: the mean cross-entropy of each."""
        return F.cross_entropy(logits.flatten(0, 1), support.y.flatten(), reduction="sum") / logits.shape[1]


class Finetuned(FineTuning, Embedding):
    """An `Embedding` whose decision on features has parameters, its head: `under(first(s), s)` decides as `decide(s)`.

    Attributes:
        compares: whether `under` looks at the support set's features, not at its labels alone.
    """

    compares: ClassVar[bool] = True

    @abstractmethod
    def decide(self, support: Batch) -> Learner:
        """The method's own decision on features: support.x (T, n, d)."""

    @abstractmethod
    def first(self, support: Batch) -> Params:
        """The head's parameters (T, ...) before the first step."""

    @abstractmethod
    def under(self, head: Params, support: Batch) -> Learner:
        """The decision on features by such parameters, equal in its probabilities."""

    def breadth(self, support: Batch) -> int:
        """The largest number of activations of the decision, for one support example."""
        del support
        return self.backbone.out_dim

    @property
    def cacheable(self) -> bool:
        """See `FeatureMethod.cacheable`: not if a task moves the backbone."""
        return super().cacheable and not (self.finetune.scope == "all" and self.tuning_steps(None) > 0)

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`; `steps` stands for `finetune_steps` where that is above 0."""
        del seeds
        count = self.tuning_steps(steps)
        if count == 0:
            return self.decide(support)
        return self.under(self.tuned_head(support, self.first(support), count), support)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`; `steps` stands for `finetune_steps` where that is above 0."""
        count = self.tuning_steps(steps)
        if count == 0 or self.finetune.scope == "head":
            return super().adapt(support, seeds=seeds, steps=steps)
        return self._tune_all(support, count)

    def tuned_head(self, support: Batch, head: Params, steps: int) -> Params:
        """The head after so many steps on features that stay: support.x (T, n, d)."""
        execution = choose("grouped", support.x, widest=self.breadth(support), stride=1)

        def learn(x: Tensor, y: Tensor, head: Params) -> Params:
            part = Batch(x, y, support.ways)
            return self.tuned(part, head, lambda p: self.under(p, part)(x), steps)

        moved: Params = execution.chunks(learn, support.x.detach(), support.y, head)
        return moved

    def _tune_all(self, support: Batch, steps: int) -> Learner:
        """Steps of the head and the backbone on images: support.x (T, n, *shape)."""
        body = self.backbone
        widest = max(body.widest, self.breadth(support))
        execution = choose("auto", support.x, widest=widest, stride=body.stride)

        def learn(x: Tensor, y: Tensor) -> tuple[Params, Tensor, Stats]:
            part = Batch(x, y, support.ways)
            start = {BODY + name: p for name, p in per_task(dict(body.named_parameters()), len(x)).items()}

            def output(params: Params) -> Tensor:
                features = _features(body, params, x)
                return self.under(_head(params), replace(part, x=features))(features)

            features = execution.map(lambda p, x: _features(body, p, x), start, x)
            start |= self.first(replace(part, x=features))
            fast = descend(execution, lambda p: self.support_loss(output(p), part), start, self.finetune, steps)
            return fast, *execution.map(self._settle, fast, x)

        fast, features, stats = execution.chunks(learn, support.x, support.y)

        def answer(p: Params, stats: Stats, x: Tensor, shown: Tensor, features: Tensor, y: Tensor) -> Tensor:
            queries = _query_features(body, p, stats, x, shown)
            return self.under(_head(p), Batch(features, y, support.ways))(queries)

        def predict(x: Tensor) -> Tensor:
            work = choose("auto", x, widest=widest, stride=body.stride)
            answers: Tensor = work.map(answer, fast, stats, x, support.x, features, support.y)
            return answers

        return predict

    def _settle(self, params: Params, x: Tensor) -> tuple[Tensor, Stats]:
        """Of support images the features, if they are compared with, and the statistics, if queries need them."""
        if self.backbone.norm in ("support", "tasknorm"):
            return self.backbone.apply_to(_body(params), x)
        return _features(self.backbone, params, x) if self.compares else x, ()


class LinearHead(Finetuned):
    """A `Finetuned` method whose head is linear.

    With `W, b = linear(support)` the logits `read(see(x) W' + b, support)` give the probabilities of `decide(support)`.
    """

    compares = False

    @abstractmethod
    def linear(self, support: Batch) -> tuple[Tensor, Tensor]:
        """The decision as a linear head of k outputs: weights (T, k, d) and biases (T, k)."""

    def see(self, x: Tensor) -> Tensor:
        """What the linear head is given of features x (T, m, d)."""
        return x

    def read(self, scores: Tensor, support: Batch) -> Tensor:
        """Logits (T, m, ways) of the head's outputs (T, m, k)."""
        del support
        return scores

    def first(self, support: Batch) -> Params:
        """See `Finetuned.first`."""
        return dict(zip(("weight", "bias"), self.linear(support), strict=True))

    def under(self, head: Params, support: Batch) -> Learner:
        """See `Finetuned.under`."""
        return lambda x: self.read(linear_scores(head, self.see(x)), support)


def descend(
    execution: Execution, loss: Callable[[Params], Tensor], start: Params, finetune: Finetune, steps: int
) -> Params:
    """Parameters (T, ...) after so many steps from `start`; the gradient passes as if they were none."""
    moved = {name: value.detach() for name, value in start.items()}
    for _ in range(steps):
        gradient = execution.gradient(loss, moved, second_order=False)
        moved = {name: torch.sub(value, gradient[name], alpha=finetune.lr) for name, value in moved.items()}
    return {name: value + (moved[name] - value).detach() for name, value in start.items()}


def nearest(centres: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """The nearest of the points `centres` (T, k, d) as a linear head; for the cosine, of unit features."""
    if distance == "cosine":
        return unit(centres), centres.new_zeros(centres.shape[:2])
    return 2 * centres, -centres.square().sum(-1)


def linear_scores(head: Params, x: Tensor) -> Tensor:
    """x (T, m, d) through the linear layers `head` (`weight` (T, k, d), `bias` (T, k)): (T, m, k)."""
    return x @ head["weight"].mT + head["bias"][:, None]


def _body(params: Params) -> Params:
    return {name.removeprefix(BODY): value for name, value in params.items() if name.startswith(BODY)}


def _head(params: Params) -> Params:
    return {name: value for name, value in params.items() if not name.startswith(BODY)}


def _features(body: Backbone, params: Params, x: Tensor) -> Tensor:
    """Features (T, n, d) of support images under a task's own parameters."""
    averages = body.averages(len(x))
    own = _body(params)
    return body.features(own, x) if averages is None else body.apply_to(own, x, averages)[0]


def _query_features(body: Backbone, params: Params, stats: Stats, x: Tensor, support: Tensor) -> Tensor:
    if body.norm == "running":  # `embed_query` would take the backbone's own parameters
        return _features(body, params, x)
    return body.embed_query(_body(params), x, support, stats)
