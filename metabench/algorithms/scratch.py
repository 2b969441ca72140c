"""Training from scratch: a fresh network per task, trained on its support set alone; nothing is learned before.

What meta-learning is compared with: the same kind of network, without what it learned. A task's network is the one that
PyTorch draws (Conv2d's and Linear's own initialisation) from the task's seed; all its parameters take full-batch steps
of Adam (beta1 = 0.9, beta2 = 0.999). Queries are normalised by the support set's statistics at the trained weights by
default. `running` is not offered: there is nothing to average.
No paper fixes such a baseline. The number of steps and their rate are ours, by validation tasks: 10 of 0.01 gave 46 %
on 5-way 1-shot Omniglot and 73 % with 5 shots; 30 to 100 steps, and rates of 0.001 and 0.003, up to 4 points less. On
the sinusoid the error still falls between 50 and 200.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import Algorithm, Learner
from metabench.backbones import Backbone, Network, Stats, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError
from metabench.tasks import Choice, Execution, Params, choose

METABENCH: dict[str, object] = {
    "kind": "algorithm",
    "name": "scratch",
    "family": "optimisation",
    "paper": "",
    "url": "",
    "feeds": None,
    "control": False,
    "problems": ["classification", "regression"],
    "train": {},
}


class Scratch(Algorithm):
    """`network` lends its functions only; it holds no parameters, for none outlive a task."""

    feeds = None
    inner_loop = True

    def __init__(
        self, problem: Problem, body: Callable[[], Backbone], *, strategy: Choice, steps: int, inner_lr: float
    ) -> None:
        super().__init__(problem)
        if steps < 0:
            raise ConfigError(f"scratch: test_steps must not be negative, but is {steps}")
        if inner_lr <= 0:
            raise ConfigError(f"scratch: inner_lr must be above 0, not {inner_lr}")
        self.body, self.strategy, self.steps, self.inner_lr = body, strategy, steps, inner_lr
        self.network = Network(body(), problem.ways or problem.outputs)
        for module in self.network.modules():
            for name in list(module._parameters):
                module.register_parameter(name, None)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Train T fresh networks by `steps` steps of Adam, `test_steps` by default."""
        count = self.steps if steps is None else steps
        start = self.draw(seeds, like=support.x, outputs=support.ways or support.y.shape[-1])
        execution = self._execution(support.x)

        def learn(x: Tensor, y: Tensor, start: Params) -> tuple[Params, Stats]:
            fast = self._train(execution, x, y, start, count)
            return fast, execution.map(self.network.support_stats, fast, x)

        with torch.no_grad():
            fast, stats = execution.chunks(learn, support.x, support.y, start)

        def predict(x: Tensor) -> Tensor:
            answers: Tensor = self._execution(x).map(self.network.on_query, fast, x, support.x, stats)
            return answers

        return predict

    def draw(self, seeds: Tensor, *, like: Tensor, outputs: int) -> Params:
        """Parameters (T, ...) of fresh networks: those that `torch.manual_seed(seed)` would bring about."""
        drawn = []
        with torch.random.fork_rng(devices=[]):  # the generator is the caller's, and gets its state back
            for seed in seeds.tolist():
                torch.default_generator.manual_seed(seed)
                network = Network(self.body(), outputs)
                drawn.append({name: value.detach() for name, value in network.named_parameters()})
        return {name: torch.stack([one[name] for one in drawn]).to(like) for name in drawn[0]}

    def facts(self, support: Batch) -> dict[str, str]:
        """See `Algorithm.facts`."""
        return {"strategy": str(self._execution(support.x))}

    def _execution(self, x: Tensor) -> Execution:
        return choose(self.strategy, x, widest=self.network.backbone.widest, stride=self.network.backbone.stride)

    def _train(self, execution: Execution, x: Tensor, y: Tensor, start: Params, steps: int) -> Params:
        """Some tasks: their parameters after the steps; Adam works number by number, so one serves all tasks."""
        fast = {name: value.clone() for name, value in start.items()}
        adam = torch.optim.Adam(fast.values(), lr=self.inner_lr)

        def gradient(fast: Params, x: Tensor, y: Tensor) -> Params:
            return execution.gradient(lambda p: self._loss(p, x, y), fast, second_order=False)

        for _ in range(steps):
            for name, value in execution.map(gradient, fast, x, y).items():
                fast[name].grad = value
            adam.step()
        return {name: value.detach() for name, value in fast.items()}

    def _loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The mean losses of the tasks' support sets, summed."""
        output = self.network.on_support(params, x)
        if self.problem.loss == "mse":
            return F.mse_loss(output, y, reduction="sum") / output[0].numel()
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum") / output.shape[1]


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["support", "each", "tasknorm", "layer", "batch"] = "support",
    test_steps: int | None = None,
    inner_lr: float = 0.01,
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> Scratch:
    """Training from scratch on tasks of `problem`, of whatever ways.

    Args:
        problem: the inputs' shape and the loss.
        backbone: `auto` is conv4-strided for images and mlp for vectors, as in `maml`.
        norm: whose statistics the batch norm uses for queries; the training always takes the support set's.
        test_steps: steps of Adam per task; by default 10, and 200 for regression.
        inner_lr: their rate.
        strategy: how tasks are executed; `auto` is by shapes (see `metabench.tasks.choose`).

    Raises:
        ConfigError: a negative number of steps, a rate not above 0, or a backbone that does not fit the inputs.
    """
    name = backbone if backbone != "auto" else "conv4-strided" if len(problem.shape) == 3 else "mlp"
    return Scratch(
        problem,
        lambda: make_backbone(name, problem.shape, norm=norm),
        strategy=strategy,
        steps=test_steps if test_steps is not None else 200 if problem.loss == "mse" else 10,
        inner_lr=inner_lr,
    )
