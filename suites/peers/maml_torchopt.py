"""MAML through TorchOpt: MetaSGD on an ordinary module, whose state is put back after each task."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.plain import Answer, PlainMaml
from metabench.episodes import Problem
from metabench.errors import Unsupported

METABENCH = {
    "kind": "algorithm",
    "name": "maml-torchopt",
    "family": "optimisation",
    "paper": "Finn et al. 2017; TorchOpt: Ren et al. 2023",
    "url": "https://github.com/metaopt/torchopt",
    "feeds": "episodes",
    "problems": ["classification"],
    "train": {"tasks": 32},
}


class MamlTorchOpt(PlainMaml):
    """As examples/few-shot/maml_omniglot.py of TorchOpt; its MetaSGD builds the second-order graph always."""

    def learn(self, x: Tensor, y: Tensor, steps: int, *, second_order: bool) -> Answer:
        """See `PlainMaml.learn`."""
        import torchopt

        del second_order  # MetaSGD does not ask
        inner = torchopt.MetaSGD(self.net, lr=self.rate)
        initial = torchopt.extract_state_dict(self.net, by="reference")
        for _ in range(steps):
            inner.step(F.cross_entropy(self.net(x), y))
        adapted = torchopt.extract_state_dict(self.net, by="reference")
        torchopt.recover_state_dict(self.net, initial)

        def answer(queries: Tensor) -> Tensor:
            torchopt.recover_state_dict(self.net, adapted)
            logits: Tensor = self.net(queries)
            torchopt.recover_state_dict(self.net, initial)
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
) -> MamlTorchOpt:
    """MAML for `problem` as `maml` builds it with norm=batch and adapt_norm=true.

    Raises:
        Unsupported: TorchOpt is not installed.
    """
    del norm  # says whose statistics they are; there is one answer
    try:
        import torchopt  # noqa: F401
    except ImportError as error:
        raise Unsupported(f"needs torchopt ({error}): pip install 'metabench[peers]'") from error
    return MamlTorchOpt(problem, backbone=backbone, inner_steps=inner_steps, test_steps=test_steps, inner_lr=inner_lr)
