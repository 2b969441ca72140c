"""MAML: an initialisation from which a few gradient steps on the support set solve a task (second order).

Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", and the authors'
code (cbfinn/maml). As there: strided Conv-4 whose batch norm has no gain and an epsilon of 1e-3, convolutions Xavier
uniform, head N(0, 1); the batch norm's shifts are meta-learned but not adapted in the inner loop; outer Adam.
Unlike there, the statistics are the support set's by default (`norm`), since the paper's are transductive: `batch`
gives them. `running` is not offered: running averages mix the statistics of adapted and un-adapted weights, and a MAML
network evaluated with them answers at chance level (Bronskill et al. 2020, Table 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Algorithm, Learner, Schedule, Trainer, schedule
from metabench.backbones import Network, Norm, Stats, make_backbone
from metabench.episodes import Batch, Episode, Problem
from metabench.tasks import WORTH_MEASURING, Choice, Execution, Params, Strategy, choose, fastest, per_task

METABENCH = {
    "kind": "algorithm",
    "name": "maml",
    "family": "optimisation",
    "paper": "Finn et al. 2017",
    "url": "https://arxiv.org/abs/1703.03400",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"tasks": 32},
}

NOT_ADAPTED = ("beta", "gamma", "scale", "offset")  # parameters of normalisation layers
InnerLoss = Literal["per_class_sum", "mean"]
HeadInit = Literal["normal", "xavier", "zero"]
RATE_ON_MEAN = 2.0  # of the paper's inner step, for 5 ways (0.4 on the sum over classes) and 20 (0.1) alike


class Maml(Algorithm):
    """Gradient steps on the support set; the outer loss is differentiated through them (`second_order`) or not."""

    inner_loop = True

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        strategy: Choice,
        second_order: bool,
        steps: tuple[int, int],
        inner_lr: float,
        inner_loss: InnerLoss,
        adapt_norm: bool,
        lr: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(problem)
        self.network, self.strategy, self.second_order = network, strategy, second_order
        self.train_steps, self.test_steps = steps
        self.inner_lr, self.inner_loss = inner_lr, inner_loss
        self.lr, self.schedule = lr, schedule
        names = [name for name, _ in network.named_parameters()]
        self.adapted = tuple(n for n in names if adapt_norm or not n.removeprefix("backbone.").startswith(NOT_ADAPTED))

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Take the inner steps for T tasks: `steps`, or the training's or the evaluation's number by default."""
        del seeds  # nothing here is random
        default = self.train_steps if self.training else self.test_steps
        count = default if steps is None else steps

        execution = self._execution(support.x)

        def learn(x: Tensor, y: Tensor) -> tuple[Params, Stats]:
            return self._learn(execution, x, y, count)

        fast, stats = execution.map(learn, support.x, support.y)

        def answer(fast: Params, stats: Stats, support: Tensor, x: Tensor) -> Tensor:
            return self._answer(fast, stats, support, x, steps=count)

        def predict(x: Tensor) -> Tensor:
            answers: Tensor = self._execution(x).map(answer, fast, stats, support.x, x)
            return answers

        return predict

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for: the head has one output per class."""
        if problem.ways != self.problem.ways:
            return f"the head was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def trainer(self, total_steps: int) -> Trainer:
        """Adam, at a constant rate or with a cosine down to 0 over `total_steps`."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps))

    def tune(self, batch: Episode | Batch) -> None:
        """See `Algorithm.tune`: which convolution is the fastest here, where the training is large enough to care."""
        if not isinstance(batch, Episode) or self.strategy != "auto":
            return
        x, body = batch.support.x, self.network.backbone
        if x.shape[0] * x.shape[1] * body.widest < WORTH_MEASURING:
            return
        rule = self._execution(x)
        few = slice(0, rule.chunk)
        part = Episode(batch.support.pick(few), batch.query.pick(few), batch.seeds[few])
        others: tuple[Strategy, ...] = ("unfold", "grouped", "vmap") if x.is_cuda else ("unfold", "grouped")

        def run(strategy: Strategy) -> None:
            self.settled = strategy
            loss, _ = self.loss(part)
            torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)[0].sum().item()  # waits for a GPU

        self.settled = fastest(run, (rule.strategy, *(other for other in others if other != rule.strategy)))

    def facts(self, support: Batch) -> dict[str, str]:
        """See `Algorithm.facts`."""
        return {"strategy": str(self._execution(support.x))}

    def _execution(self, x: Tensor) -> Execution:
        choice = self.settled if self.training and self.strategy == "auto" else self.strategy
        body = self.network.backbone
        return choose(choice, x, widest=body.widest, stride=body.stride)

    def _learn(self, execution: Execution, x: Tensor, y: Tensor, steps: int) -> tuple[Params, Stats]:
        """Some tasks: their adapted parameters, and the statistics of their support sets under them."""
        *_, fast = self._descend(execution, x, y, steps)
        return fast, self._stats(fast, x, steps)

    def _descend(self, execution: Execution, x: Tensor, y: Tensor, steps: int) -> Iterator[Params]:
        """Some tasks: what is adapted of their parameters, before the first and after each of the inner steps."""
        params: Params = dict(self.network.named_parameters())
        fast = per_task({name: params[name] for name in self.adapted}, len(x))
        yield fast
        for step in range(steps):

            def loss(fast: Params, step: int = step) -> Tensor:
                return self._support_loss(self.network.on_support(self._all(fast, step), x), y)

            gradient = execution.gradient(loss, fast, second_order=self._differentiates())
            fast = {n: self._moved(n, value, gradient[n], step) for n, value in fast.items()}
            yield fast

    def _differentiates(self) -> bool:
        """Whether the outer gradient goes through the inner gradients."""
        return self.second_order

    def _moved(self, name: str, value: Tensor, gradient: Tensor, step: int) -> Tensor:
        """A parameter (T, ...) of some tasks after inner step number `step`."""
        del name, step  # one rate for all
        return torch.sub(value, gradient, alpha=self.inner_lr)

    def _all(self, fast: Params, step: int) -> Params:
        """All parameters of the network in its pass number `step`, from those that are adapted."""
        del step  # the others are the same in every pass
        return dict(self.network.named_parameters()) | fast

    def _stats(self, fast: Params, x: Tensor, steps: int) -> Stats:
        """The statistics of some tasks' support sets x after `steps` inner steps, if queries need them."""
        return self.network.support_stats(self._all(fast, last_pass(steps)), x)

    def _support_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The losses of the tasks' support sets, summed; `per_class_sum` is the cross-entropy's sum over K, ways times
        the mean.

        (The authors' code divides the vector of losses by K and takes the gradient of the vector, which sums it: a
        rate of 0.4 with 5 ways is 2.0 on the mean.)
        """
        if self.problem.loss == "mse":
            return F.mse_loss(output, y, reduction="sum") / output[0].numel()
        scale = output.shape[-1] if self.inner_loss == "per_class_sum" else 1
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum") * (scale / output.shape[1])

    def _answer(self, fast: Params, stats: Stats, support: Tensor, x: Tensor, *, steps: int) -> Tensor:
        """Some tasks: outputs (t, m, ways | d) of their queries x (t, m, *shape) after `steps` inner steps."""
        return self.network.on_query(self._all(fast, last_pass(steps)), x, support, stats)


def last_pass(steps: int) -> int:
    """The pass whose own parameters, where a method has such, also belong to the queries after `steps` steps."""
    return max(steps - 1, 0)


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["support", "each", "tasknorm", "layer", "batch"] = "support",
    inner_steps: int = 1,
    test_steps: int | None = None,
    inner_lr: float | None = None,
    inner_loss: Literal["per_class_sum", "mean"] = "per_class_sum",
    adapt_norm: bool = False,
    head_init: Literal["normal", "zero"] = "normal",
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine"] = "constant",
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> Maml:
    """MAML for `problem`.

    Args:
        problem: the inputs' shape, and `ways` classes or `outputs` numbers to predict.
        backbone: `auto` is conv4-strided for images and mlp for vectors.
        norm: whose statistics the batch norm uses (see `metabench.backbones`).
        inner_steps: gradient steps in training; by default 1, as the paper for 5 ways and regression (20 ways: 5).
        test_steps: gradient steps in evaluation; by default 3 for classification, as the paper for 5 ways (20 ways:
            5), and 10 for regression.
        inner_lr: rate of the inner loop; by default as the paper: 0.4 for 5 ways and 0.1 for 20 with `per_class_sum`
            (2.0 on the mean loss, which other ways get too), 0.01 for regression. With `mean` 0.4, the usual choice
            of reimplementations.
        inner_loss: how the cross-entropy of a support set is reduced; regression always takes the mean.
        adapt_norm: whether the inner loop adapts the parameters of the normalisation layers as well.
        head_init: the linear head starts from N(0, 1) as in the paper's code, or from zero: then the first inner step
            makes it a classifier by support features, no class has a head start, and short trainings get much further.
        lr: rate of the outer Adam.
        schedule: the outer rate over the training: constant (paper) or a cosine to 0.
        strategy: how tasks are executed (see `metabench.tasks`); `auto` is by shapes, in large trainings by a short
            measurement before the first step.

    Raises:
        ConfigError: a backbone that does not fit the inputs.
    """
    return assemble(
        problem,
        second_order=True,
        backbone=backbone,
        norm=norm,
        steps=(inner_steps, test_steps),
        inner_lr=inner_lr,
        inner_loss=inner_loss,
        adapt_norm=adapt_norm,
        head_init=head_init,
        lr=lr,
        schedule=schedule,
        strategy=strategy,
    )


def assemble(
    problem: Problem,
    *,
    second_order: bool,
    backbone: str,
    norm: Norm,
    steps: tuple[int, int | None],
    inner_lr: float | None,
    inner_loss: InnerLoss,
    adapt_norm: bool,
    head_init: HeadInit,
    lr: float,
    schedule: Schedule,
    strategy: Choice,
) -> Maml:
    """What MAML and first-order MAML are both built by: defaults that depend on the problem, and initialisation."""
    return Maml(
        problem,
        make_network(problem, default_backbone(problem, backbone), norm, head_init),
        strategy=strategy,
        second_order=second_order,
        steps=(steps[0], default_steps(problem, steps[1])),
        inner_lr=inner_lr if inner_lr is not None else default_rate(problem, inner_loss),
        inner_loss=inner_loss,
        adapt_norm=adapt_norm,
        lr=lr,
        schedule=schedule,
    )


def default_backbone(problem: Problem, backbone: str, *, images: str = "conv4-strided") -> str:
    """What `auto` stands for: the paper's network for the problem."""
    if backbone != "auto":
        return backbone
    return images if len(problem.shape) == 3 else "mlp"


def default_steps(problem: Problem, steps: int | None) -> int:
    """The inner steps in evaluation: what was asked for, or the paper's."""
    if steps is not None:
        return steps
    return 10 if problem.loss == "mse" else 3


def default_rate(problem: Problem, inner_loss: InnerLoss) -> float:
    """The paper's inner rate for the problem."""
    if problem.ways is None:
        return 0.01
    return RATE_ON_MEAN / problem.ways if inner_loss == "per_class_sum" else 0.4


def make_network(
    problem: Problem, backbone: str, norm: Norm, head_init: HeadInit, *, gamma: bool = False, slope: float = 0.0
) -> Network:
    """The paper's network for `problem`, initialised as its code does (vectors: as PyTorch does)."""
    body = make_backbone(backbone, problem.shape, norm=norm, eps=1e-3, gamma=gamma, glorot=True, slope=slope)
    network = Network(body, problem.ways if problem.ways is not None else problem.outputs)
    if len(problem.shape) == 3:
        nn.init.normal_(network.head.weight)
        nn.init.zeros_(network.head.bias)
    if head_init == "zero":
        nn.init.zeros_(network.head.weight)
    if head_init == "xavier":
        nn.init.xavier_uniform_(network.head.weight)
    return network


def flat(name: str) -> str:
    """A parameter's name as one that PyTorch takes for a parameter of its own."""
    return name.replace(".", "_")
