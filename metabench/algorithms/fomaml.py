"""First-order MAML: MAML whose outer gradient is that of the query loss at the adapted weights.

Finn, Abbeel and Levine 2017, section 5.2: the inner gradients count as constants. All else, defaults included, is
`maml`'s. The paper has no Omniglot figures of it; Nichol et al. 2018 have.
"""

from __future__ import annotations

from typing import Literal

from metabench.algorithms.maml import Maml, assemble
from metabench.episodes import Problem

METABENCH = {
    "kind": "algorithm",
    "name": "fomaml",
    "family": "optimisation",
    "paper": "Finn et al. 2017",
    "url": "https://arxiv.org/abs/1703.03400",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "regression"],
    "train": {"tasks": 32},
}


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
    """First-order MAML for `problem`; the arguments are those of `metabench.algorithms.maml.build`.

    Raises:
        ConfigError: a backbone that does not fit the inputs.
    """
    return assemble(
        problem,
        second_order=False,
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
