"""MAML++: MAML with a multi-step loss, annealed derivatives, and rates and batch norm of their own for each step.

Antoniou, Edwards and Storkey 2019, "How to Train Your MAML", and the authors' code
(AntreasAntoniou/HowToTrainYourMAMLPytorch). Each of its additions can be switched off; with all off it is `maml`:
- `multi_step` (MSL): a query loss after every inner step. All weigh the same at first; all but the last step's fall
  linearly, down to 0.03 of that, and after this share of the training the last step's alone is left (10 of the 100
  epochs of the code's Omniglot settings; 0: off).
- `first_order` (DA): this share of the training takes the inner gradients for constants (50 of 100 epochs in the paper;
  the authors' released settings have it off, which is 0).
- `step_norm` (BNRS, BNWB): gain and shift of the batch norm for each inner step; queries take those of the step before
  them. The code also keeps running statistics for each step, but never uses them, for its batch norm is always in
  training mode: here too statistics are those of a batch, and `norm` says whose.
- `learned_rates` (LSLR): a learned inner rate for each tensor of parameters and each step.
- `schedule: cosine` (CA): the outer rate falls along a cosine, to a hundredth (1e-3 to 1e-5).
- `adapt_norm: false`: parameters of the batch norm are not adapted in the inner loop.
Epochs of the paper are shares of the training here, and move with every step. As there: max-pool Conv-4 with leaky ReLU
(slope 0.01), Xavier initialisation, mean cross-entropy, inner rate 0.1 (mini-ImageNet: 0.01), 5 inner steps in training
and evaluation, 8 tasks a step. Unlike there: epsilon 1e-3 as in `maml`; statistics of the support set by default,
since the paper's are transductive (`batch` gives them); no ensemble of the five best checkpoints in evaluation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Metrics, Schedule, Trainer, query_loss, schedule
from metabench.algorithms.maml import (
    InnerLoss,
    Maml,
    default_backbone,
    flat,
    make_network,
)
from metabench.backbones import Network
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Choice, Params

METABENCH = {
    "kind": "algorithm",
    "name": "maml++",
    "family": "optimisation",
    "paper": "Antoniou et al. 2019",
    "url": "https://arxiv.org/abs/1810.09502",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"tasks": 8},
}

FLOOR = 0.03  # of the equal weight, below which no step's query loss falls while the multi-step loss lasts
COSINE_END = 0.01  # of the first outer rate
PER_STEP = ("gamma", "beta")


class MamlPlusPlus(Maml):
    """MAML that knows how far its training has come: `done` of `total` steps, moved by the trainer alone."""

    done: Tensor
    total: Tensor

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        strategy: Choice,
        steps: tuple[int, int],
        inner_lr: float,
        inner_loss: InnerLoss,
        adapt_norm: bool,
        step_norm: bool,
        learned_rates: bool,
        multi_step: float,
        first_order: float,
        lr: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(
            problem,
            network,
            strategy=strategy,
            second_order=True,
            steps=steps,
            inner_lr=inner_lr,
            inner_loss=inner_loss,
            adapt_norm=adapt_norm,
            lr=lr,
            schedule=schedule,
        )
        self.multi_step, self.first_order = multi_step, first_order
        self.own = steps[0]  # steps with rates and batch norm of their own; later ones take the last one's
        self.rates: nn.ParameterDict | None = None
        if learned_rates:
            start = {flat(name): torch.full((self.own,), inner_lr) for name in self.adapted}
            self.rates = nn.ParameterDict(start)
        self.per_step = frozenset(_repeat(network, self.own) if step_norm else ())
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """The query losses after each inner step, weighted as the training stands; figures are the last step's."""
        weights = self.weights()
        if not self.training or len(weights) == 1 or not isinstance(batch, Episode):
            return super().loss(batch)
        support, query = batch.support, batch.query
        execution = self._execution(max(support.x, query.x, key=lambda x: x.shape[1]))

        def answers(x: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
            _, *path = self._descend(execution, x, y, self.train_steps)
            return tuple(
                self._answer(fast, self._stats(fast, x, steps), x, queries, steps=steps)
                for steps, fast in enumerate(path, 1)
            )

        outputs = execution.map(answers, support.x, support.y, query.x)
        parts = [query_loss(self.problem, output, query) for output in outputs]
        total = torch.stack([weight * loss for weight, (loss, _) in zip(weights, parts, strict=True)]).sum()
        return total, parts[-1][1]

    def weights(self) -> list[float]:
        """Of the query losses after each inner step; one if the last step's alone counts."""
        progress, steps = self.progress(), self.train_steps
        if progress >= self.multi_step or steps < 2:
            return [1.0]
        other = max(1 - progress / self.multi_step, FLOOR) / steps
        return [other] * (steps - 1) + [1 - other * (steps - 1)]

    def progress(self) -> float:
        """The share of its training that is done."""
        total = int(self.total)
        return int(self.done) / total if total else 0.0

    def trainer(self, total_steps: int) -> Trainer:
        """Adam that counts its steps."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        end = schedule(optimizer, self.schedule, total_steps, floor=COSINE_END)
        return AnnealingTrainer(self, optimizer, total_steps, schedule=end)

    def _differentiates(self) -> bool:
        """See `Maml`: not yet in the first-order share of a training."""
        return not self.training or self.progress() >= self.first_order

    def _moved(self, name: str, value: Tensor, gradient: Tensor, step: int) -> Tensor:
        """See `Maml`."""
        if self.rates is None:
            return super()._moved(name, value, gradient, step)
        return torch.addcmul(value, gradient, self.rates[flat(name)][min(step, self.own - 1)], value=-1)

    def _all(self, fast: Params, step: int) -> Params:
        """See `Maml`: of the parameters with a row (..., steps, C) for each step, that step's."""
        row = min(step, self.own - 1)
        params = super()._all(fast, step)
        return {name: value.select(-2, row) if name in self.per_step else value for name, value in params.items()}


class AnnealingTrainer(Trainer):
    """A trainer whose algorithm knows how far it has come; the algorithm's own state keeps it."""

    def __init__(
        self,
        algorithm: MamlPlusPlus,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> None:
        super().__init__(algorithm, optimizer, schedule=schedule)
        self.counts, self.total_steps = algorithm, total_steps

    def step(self, batch: Episode | Batch) -> Metrics:
        """See `Trainer.step`."""
        self.counts.total.fill_(self.total_steps)
        metrics = super().step(batch)
        self.counts.done += 1
        return metrics


def _repeat(network: Network, steps: int) -> list[str]:
    """Give each gain and shift (C,) of the batch norm a row for each step, (steps, C); returns their names."""
    body, names = network.backbone, []
    for name, value in list(body.named_parameters()):
        if name.startswith(PER_STEP):
            body.register_parameter(name, nn.Parameter(value.detach().repeat(steps, 1)))
            names.append(f"backbone.{name}")
    return names


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["support", "each", "tasknorm", "layer", "batch"] = "support",
    inner_steps: int = 5,
    test_steps: int = 5,
    inner_lr: float | None = None,
    inner_loss: Literal["per_class_sum", "mean"] = "mean",
    head_init: Literal["normal", "xavier", "zero"] = "xavier",
    slope: float = 0.01,
    multi_step: float = 0.1,
    first_order: float = 0.5,
    step_norm: bool = True,
    learned_rates: bool = True,
    adapt_norm: bool = False,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine"] = "cosine",
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> MamlPlusPlus:
    """MAML++ for `problem`; the paper's additions are described at the top of this file.

    Args:
        problem: the inputs' shape, and `ways` classes or `outputs` numbers to predict.
        backbone: `auto` is conv4 for images and mlp for vectors.
        norm: whose statistics the batch norm uses (see `metabench.backbones`).
        inner_steps: gradient steps in training.
        test_steps: gradient steps in evaluation; beyond those of the training, each is as the last one.
        inner_lr: the inner rate, where learned rates start; by default 0.1, for regression 0.01.
        inner_loss: how the cross-entropy of a support set is reduced; regression always takes the mean.
        head_init: Xavier uniform (paper), or as in `maml`.
        slope: of the (leaky) ReLU below zero.
        multi_step: the share of the training with the multi-step loss; 0: none.
        first_order: the share of the training, from its start, with first-order gradients; 0: none.
        step_norm: whether gain and shift of the batch norm are each step's own; else there is one shift, and no gain.
        learned_rates: whether inner rates are learned.
        adapt_norm: whether the inner loop adapts the parameters of the normalisation layers as well.
        lr: rate of the outer Adam, at first.
        schedule: the outer rate over the training: a cosine down to a hundredth, or constant.
        strategy: how tasks are executed (see `metabench.tasks`).

    Raises:
        ConfigError: a backbone that does not fit the inputs, no inner step, or a share outside 0..1.
    """
    for name, share in (("multi_step", multi_step), ("first_order", first_order)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is a share of the training, from 0 to 1, not {share}")
    if inner_steps < 1:
        raise ConfigError(f"inner_steps must be at least 1, not {inner_steps}: rates and batch norm belong to steps")
    body = default_backbone(problem, backbone, images="conv4")
    return MamlPlusPlus(
        problem,
        make_network(problem, body, norm, head_init, gamma=step_norm, slope=slope),
        strategy=strategy,
        steps=(inner_steps, test_steps),
        inner_lr=inner_lr if inner_lr is not None else 0.01 if problem.loss == "mse" else 0.1,
        inner_loss=inner_loss,
        adapt_norm=adapt_norm,
        step_norm=step_norm,
        learned_rates=learned_rates,
        multi_step=multi_step,
        first_order=first_order,
        lr=lr,
        schedule=schedule,
    )
