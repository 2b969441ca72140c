"""MAML through higher: innerloop_ctx over an ordinary module, one task after the other."""

from typing import Literal

from torch import Tensor, optim
from torch.nn import functional as F

from metabench.algorithms.plain import Answer, PlainMaml, import_library
from metabench.episodes import Problem

METABENCH = {
    "kind": "algorithm",
    "name": "maml-higher",
    "family": "optimisation",
    "paper": "Finn et al. 2017; higher: Grefenstette et al. 2019",
    "url": "https://github.com/facebookresearch/higher",
    "feeds": "episodes",
    "problems": ["classification"],
    "train": {"tasks": 32},
}


class MamlHigher(PlainMaml):
    """As examples/maml-omniglot.py of higher; in evaluation without higher-order gradients, as there."""

    def learn(self, x: Tensor, y: Tensor, steps: int, *, second_order: bool) -> Answer:
        """See `PlainMaml.learn`."""
        inner = optim.SGD(self.net.parameters(), lr=self.rate)
        context = self.library.innerloop_ctx(
            self.net, inner, copy_initial_weights=False, track_higher_grads=second_order
        )
        with context as (net, steps_through):
            for _ in range(steps):
                steps_through.step(F.cross_entropy(net(x), y))
        answer: Answer = net
        return answer


def build(
    problem: Problem,
    *,
    backbone: Literal["conv4-strided", "conv4"] = "conv4-strided",
    norm: Literal["batch"] = "batch",
    inner_steps: int = 1,
    test_steps: int | None = None,
    inner_lr: float | None = None,
) -> MamlHigher:
    """MAML for `problem` as `maml` builds it with norm=batch and adapt_norm=true.

    Raises:
        Unsupported: higher is not installed.
    """
    del norm  # says whose statistics they are; there is one answer
    library = import_library("higher")
    return MamlHigher(
        problem, library=library, backbone=backbone, inner_steps=inner_steps, test_steps=test_steps, inner_lr=inner_lr
    )
