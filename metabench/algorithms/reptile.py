"""Reptile: move the initialisation towards the weights that plain training on each task ends with.

Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", and the authors' code
(openai/supervised-reptile). As there: strided Conv-4 flattened to 256 features, Glorot initialisation, gain and shift
of the batch norm adapted too (epsilon 1e-3); the inner loop is Adam with beta1 = 0 on mini-batches that cycle through
reshuffled data without replacement, straddling epochs; its second moments are never reset in training, but flow from
task to task, and every evaluation starts from a copy of them; the outer step falls linearly from 1 to 0.
There is no query set in training: support and query sets of a training episode are one set of shots + queries examples
per class (10 in the paper, of which 9 + 1 is the default here).
Unlike there, queries are normalised by the support set's statistics at the adapted weights by default (`norm`);
`each` is the paper's non-transductive mode and `batch` its transductive one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import Algorithm, Learner, Metrics, Trainer
from metabench.backbones import Network, Stats, make_backbone
from metabench.episodes import Batch, Episode, Problem, philox_key, words
from metabench.tasks import Choice, Execution, Params, choose

METABENCH = {
    "kind": "algorithm",
    "name": "reptile",
    "family": "optimisation",
    "paper": "Nichol et al. 2018",
    "url": "https://arxiv.org/abs/1803.02999",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"shots": 9, "queries": 1, "tasks": 5},
}

BETA2 = 0.999  # of the inner Adam; its beta1 is 0
EPSILON = 1e-8


def mini_batches(seeds: Tensor, examples: int, batch: int, steps: int) -> Tensor:
    """Which examples each step sees: (T, steps, batch) positions, a pure function of each task's seed.

    One reshuffled pass over all examples follows the other; a batch may straddle two of them.
    """
    passes = max(1, -(-steps * batch // examples))
    keys = [words(philox_key("reptile", int(seed)), 0, passes, examples) for seed in seeds]
    order = np.argsort(np.stack(keys), axis=-1, kind="stable").reshape(len(keys), -1)
    return torch.from_numpy(order[:, : steps * batch].reshape(len(keys), steps, batch))


MANY_WAYS = 10  # above it the paper's settings for 20 ways, up to it those for 5


class Reptile(Algorithm):
    """Adam on a task's mini-batches; `Trainer.step` moves the initialisation towards where that ends."""

    updates: Tensor

    inner_loop = True

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        strategy: Choice,
        steps: tuple[int, int],
        batches: tuple[int, int],
        inner_lr: float,
    ) -> None:
        super().__init__(problem)
        self.network, self.strategy, self.inner_lr = network, strategy, inner_lr
        self.train_steps, self.test_steps = steps
        self.train_batch, self.test_batch = batches
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # Adam steps so far, over all tasks
        for name, value in network.named_parameters():
            self.register_buffer(_moment(name), torch.zeros_like(value))

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Train on T support sets: `steps` Adam steps, or the training's or the evaluation's number by default.

        The Learner's gradient is first-order: that of its loss at the adapted weights.
        """
        default, size = (self.train_steps, self.train_batch) if self.training else (self.test_steps, self.test_batch)
        count = default if steps is None else steps
        order = mini_batches(seeds, support.x.shape[1], size, count)
        execution = self._execution(support.x)

        def learn(x: Tensor, y: Tensor, order: Tensor) -> tuple[Params, Stats]:
            return self._learn(execution, Batch(x, y, support.ways), order)

        fast, stats = execution.chunks(learn, support.x, support.y, order)

        def predict(x: Tensor) -> Tensor:
            answers: Tensor = self._execution(x).map(self.network.on_query, fast, x, support.x, stats)
            return answers

        return predict

    def _learn(self, execution: Execution, support: Batch, order: Tensor) -> tuple[Params, Stats]:
        """Some tasks: their adapted parameters, and the statistics of their support sets under them."""
        start: Params = dict(self.network.named_parameters())
        moments = {name: value.expand(support.tasks, *value.shape).clone() for name, value in self.moments().items()}
        moved = self.descend(support, moments, order=order)
        # the start plus a constant: equal to the end of the descent in value, differentiable in the start
        fast = {name: start[name] + (moved[name] - start[name]).detach() for name in start}
        return fast, execution.map(self.network.support_stats, fast, support.x)

    def descend(self, data: Batch, moments: Params, *, order: Tensor) -> Params:
        """Weights (T, ...) after Adam steps from the initialisation on T data sets; `moments` (T, ...) move as well.

        Step s of a task sees its examples `order[task, s]`.
        """
        order = order.to(data.x.device)
        row = torch.arange(data.tasks, device=data.x.device)[:, None]
        fast = {n: p.detach().expand(data.tasks, *p.shape).clone() for n, p in self.network.named_parameters()}
        before = int(self.updates)
        for step, at in enumerate(order.unbind(1)):
            gradient = self._gradient(fast, data.x[row, at], data.y[row, at])
            self._adam(fast, moments, gradient, before + step + 1)
        return fast

    def moments(self) -> Params:
        """Adam's second moments by parameter, as the training has left them."""
        return {name: self.get_buffer(_moment(name)) for name, _ in self.network.named_parameters()}

    def trainer(self, total_steps: int) -> Trainer:
        """Plain steps of a size that falls linearly from 1 to 0 over `total_steps`."""
        return ReptileTrainer(self, total_steps)

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for: the head has one output per class."""
        if problem.ways != self.problem.ways:
            return f"the head was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def facts(self, support: Batch) -> dict[str, str]:
        """See `Algorithm.facts`: how gradients of mini-batches are taken; in training one task follows the other."""
        tasks, batch = (1, self.train_batch) if self.training else (self._execution(support.x).chunk, self.test_batch)
        some = support.x[:tasks, :1]
        return {"strategy": str(self._execution(some.expand(-1, batch, *some.shape[2:])))}

    def _execution(self, x: Tensor) -> Execution:
        body = self.network.backbone
        return choose(self.strategy, x, widest=body.widest, stride=body.stride)

    def _gradient(self, fast: Params, x: Tensor, y: Tensor) -> Params:
        """The gradients (T, ...) of T mini-batches' losses at weights `fast` (T, ...)."""
        execution = self._execution(x)

        def gradient(fast: Params, x: Tensor, y: Tensor) -> Params:
            return execution.gradient(lambda p: self._batch_loss(p, x, y), fast, second_order=False)

        gradients: Params = execution.map(gradient, fast, x, y)
        return gradients

    def _batch_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The mean losses (of t tasks' mini-batches), summed."""
        output = self.network.on_support(params, x)
        if self.problem.loss == "mse":
            return F.mse_loss(output, y, reduction="sum") / output[0].numel()
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum") / output.shape[1]

    def _adam(self, fast: Params, moments: Params, gradient: Params, count: int) -> None:
        """Adam's step number `count` with beta1 = 0, in place; the bias correction goes into rate and epsilon."""
        correction = (1 - BETA2**count) ** 0.5
        for name, value in fast.items():
            g = gradient[name]
            moments[name].mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            value.addcdiv_(g, moments[name].sqrt().add_(EPSILON * correction), value=-self.inner_lr * correction)


class ReptileTrainer(Trainer):
    """The outer loop: phi <- phi + eps * mean over tasks of (theta - phi), as SGD at rate eps on phi - mean(theta)."""

    def __init__(self, algorithm: Reptile, total_steps: int) -> None:
        optimizer = torch.optim.SGD(algorithm.parameters(), lr=1.0)
        left = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / max(total_steps, 1)))
        super().__init__(algorithm, optimizer, schedule=left)
        self.reptile = algorithm

    def step(self, batch: Episode | Batch) -> Metrics:
        """One meta-step over the batch's tasks, one after the other since Adam's moments flow from task to task."""
        if not isinstance(batch, Episode):
            raise TypeError("Reptile trains on episodes")
        reptile, tasks = self.reptile, batch.support.tasks
        total = {name: torch.zeros_like(p) for name, p in reptile.network.named_parameters()}
        moments = {name: value[None] for name, value in reptile.moments().items()}  # views: training keeps them
        for task in range(tasks):
            data = _merged(batch, task)
            order = mini_batches(
                batch.seeds[task : task + 1], data.x.shape[1], reptile.train_batch, reptile.train_steps
            )
            ends = reptile.descend(data, moments, order=order)
            reptile.updates += reptile.train_steps
            for name, value in ends.items():
                total[name] += value[0]
        size = sum((p.detach() - total[n] / tasks).square().sum() for n, p in reptile.network.named_parameters())
        for name, parameter in reptile.network.named_parameters():
            parameter.grad = parameter.detach() - total[name] / tasks
        self.optimizer.step()
        assert self.schedule is not None
        self.schedule.step()
        return {"distance": torch.as_tensor(size).sqrt()}


def _merged(batch: Episode, task: int) -> Batch:
    """The support and query set of one task as one training set, T = 1."""
    support, query = batch.support.pick(slice(task, task + 1)), batch.query.pick(slice(task, task + 1))
    return Batch(torch.cat([support.x, query.x], 1), torch.cat([support.y, query.y], 1), support.ways)


def _moment(name: str) -> str:
    return "moment_" + name.replace(".", "_")


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["support", "each", "layer", "batch"] = "support",
    inner_steps: int | None = None,
    test_steps: int = 50,
    inner_batch: int | None = None,
    eval_batch: int | None = None,
    inner_lr: float | None = None,
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> Reptile:
    """Reptile for `problem`; the defaults are the paper's: one set for 5 ways, one for 20 (here: for more than 10).

    Args:
        problem: the inputs' shape, and `ways` classes or `outputs` numbers to predict.
        backbone: `auto` is conv4-strided-flat for images and mlp64 for vectors.
        norm: whose statistics the batch norm uses for queries; in the inner loop always the mini-batch's. (TaskNorm is
            not offered: its blend depends on the size of the set, which differs between mini-batch and support set.)
        inner_steps: Adam steps per task in training; by default 5, for 20 ways 10.
        test_steps: Adam steps per task in evaluation.
        inner_batch: examples per step in training; by default 10, for 20 ways 20.
        eval_batch: examples per step in evaluation; by default 5, for 20 ways 10.
        inner_lr: rate of the inner Adam; by default 1e-3, for 20 ways 5e-4, and 1e-2 for regression (ours: on
            sinusoids 1e-3 learnt more slowly).
        strategy: how tasks are executed; `auto` is by shapes (see `metabench.tasks.choose`), and serial in training,
            where one task follows the other.

    Raises:
        ConfigError: a backbone that does not fit the inputs.
    """
    if backbone == "auto":
        backbone = "conv4-strided-flat" if len(problem.shape) == 3 else "mlp64"
    body = make_backbone(backbone, problem.shape, norm=norm, eps=1e-3, glorot=True)
    network = Network(body, problem.ways if problem.ways is not None else problem.outputs)
    torch.nn.init.xavier_uniform_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    many = problem.ways is not None and problem.ways > MANY_WAYS
    rate = 1e-2 if problem.loss == "mse" else 5e-4 if many else 1e-3
    return Reptile(
        problem,
        network,
        strategy=strategy,
        steps=(inner_steps or (10 if many else 5), test_steps),
        batches=(inner_batch or (20 if many else 10), eval_batch or (10 if many else 5)),
        inner_lr=inner_lr if inner_lr is not None else rate,
    )
