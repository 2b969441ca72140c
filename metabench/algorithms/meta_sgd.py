"""Meta-SGD: MAML in one step, with a learned rate of the inner loop for every single parameter.

Li, Zhou, Chen and Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning": theta = phi - a * gradient,
where a has phi's shape, is trained with phi by the query loss, and may become negative (a direction of its own, not
only a size). Network, batch norm and outer Adam are those of `maml`; gradients are of second order.
Where the rates start could not be verified: U(0.005, 0.1) is what the reference sheet has from general knowledge, and
learn2learn starts from a constant (`rate_low` = `rate_high`). The support loss is the mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metabench.algorithms.base import Schedule, Trainer, schedule
from metabench.algorithms.maml import InnerLoss, Maml, default_backbone, flat, make_network
from metabench.backbones import Network
from metabench.episodes import Problem
from metabench.errors import ConfigError
from metabench.tasks import Choice

METABENCH = {
    "kind": "algorithm",
    "name": "meta-sgd",
    "family": "optimisation",
    "paper": "Li et al. 2017",
    "url": "https://arxiv.org/abs/1707.09835",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"tasks": 32},
}


class MetaSgd(Maml):
    """MAML whose inner rates are parameters; `rates` holds them by the (flattened) names of what they move."""

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        strategy: Choice,
        test_steps: int,
        rates: tuple[float, float],
        inner_loss: InnerLoss,
        adapt_norm: bool,
        lr: float,
        weight_decay: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(
            problem,
            network,
            strategy=strategy,
            second_order=True,
            steps=(1, test_steps),
            inner_lr=sum(rates) / 2,
            inner_loss=inner_loss,
            adapt_norm=adapt_norm,
            lr=lr,
            schedule=schedule,
        )
        self.weight_decay = weight_decay
        adapted = {name: value for name, value in network.named_parameters() if name in self.adapted}
        self.rates = nn.ParameterDict({flat(n): torch.empty_like(v).uniform_(*rates) for n, v in adapted.items()})

    def _moved(self, name: str, value: Tensor, gradient: Tensor, step: int) -> Tensor:
        """See `Maml`: every coordinate by its own rate, the same in every step."""
        del step
        return torch.addcmul(value, gradient, self.rates[flat(name)], value=-1)

    def trainer(self, total_steps: int) -> Trainer:
        """Adam on the initialisation and the rates; a weight decay never touches the rates."""
        groups = [
            {"params": list(self.network.parameters()), "weight_decay": self.weight_decay},
            {"params": list(self.rates.parameters()), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps))


def build(
    problem: Problem,
    *,
    backbone: Literal["auto", "conv4", "conv4-strided", "conv4-strided-flat", "mlp", "mlp64"] = "auto",
    norm: Literal["support", "each", "tasknorm", "layer", "batch"] = "support",
    test_steps: int = 1,
    rate_low: float = 0.005,
    rate_high: float = 0.1,
    inner_loss: Literal["per_class_sum", "mean"] = "mean",
    adapt_norm: bool = False,
    head_init: Literal["normal", "zero"] = "normal",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Literal["constant", "cosine"] = "constant",
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> MetaSgd:
    """Meta-SGD for `problem`; what is not named here is as in `metabench.algorithms.maml.build`.

    Args:
        problem: the inputs' shape, and `ways` classes or `outputs` numbers to predict.
        test_steps: gradient steps in evaluation, all with the same rates; in training it is one, as in the paper.
        rate_low: the rates start uniformly between this
        rate_high: and this.
        weight_decay: of the outer Adam, on the initialisation alone.

    Raises:
        ConfigError: a backbone that does not fit the inputs, or rates that start nowhere.
    """
    if not rate_low <= rate_high:
        raise ConfigError(f"rate_low is {rate_low} and rate_high {rate_high}: swap them")
    return MetaSgd(
        problem,
        make_network(problem, default_backbone(problem, backbone), norm, head_init),
        strategy=strategy,
        test_steps=test_steps,
        rates=(rate_low, rate_high),
        inner_loss=inner_loss,
        adapt_norm=adapt_norm,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
    )
