"""MAML by cloning the weights and adapting the clones, one task after the other, in plain PyTorch."""

from typing import Literal

from torch import Tensor, autograd
from torch.func import functional_call
from torch.nn import functional as F

from metabench.algorithms.plain import Answer, PlainMaml
from metabench.episodes import Problem

METABENCH = {
    "kind": "algorithm",
    "name": "maml-clone",
    "family": "optimisation",
    "paper": "Finn et al. 2017",
    "url": "https://arxiv.org/abs/1703.03400",
    "feeds": "episodes",
    "problems": ["classification"],
    "train": {"tasks": 32},
}


class MamlClone(PlainMaml):
    """What learn2learn does, without it: the loop that is written where no library is used."""

    def learn(self, x: Tensor, y: Tensor, steps: int, *, second_order: bool) -> Answer:
        """See `PlainMaml.learn`."""
        clone = {name: value.clone() for name, value in self.net.named_parameters()}
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(self.net, clone, (x,)), y)
            gradients = autograd.grad(loss, list(clone.values()), create_graph=second_order)
            clone = {name: clone[name] - self.rate * g for name, g in zip(clone, gradients, strict=True)}

        def answer(queries: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.net, clone, (queries,))
            return logits

        return answer


def build(
    problem: Problem,
    *,
    backbone: Literal["conv4-strided", "conv4"] = "conv4-strided",
    norm: Literal["batch"] = "batch",
    inner_steps: int = 1,
    test_steps: int | None = None,
    inner_lr: float | None = None,
) -> MamlClone:
    """MAML for `problem` as `maml` builds it with norm=batch and adapt_norm=true."""
    del norm  # says whose statistics they are; there is one answer
    return MamlClone(problem, backbone=backbone, inner_steps=inner_steps, test_steps=test_steps, inner_lr=inner_lr)
