"""MAML through TorchOpt: MetaSGD on an ordinary module, whose state is put back after each task."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.plain import Answer, PlainMaml, import_library
from metabench.episodes import Problem

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
        del second_order  # MetaSGD does not ask
        inner = self.library.MetaSGD(self.net, lr=self.rate)
        initial = self.library.extract_state_dict(self.net, by="reference")
        for _ in range(steps):
            inner.step(F.cross_entropy(self.net(x), y))
        adapted = self.library.extract_state_dict(self.net, by="reference")
        self.library.recover_state_dict(self.net, initial)

        def answer(queries: Tensor) -> Tensor:
            self.library.recover_state_dict(self.net, adapted)
            logits: Tensor = self.net(queries)
            self.library.recover_state_dict(self.net, initial)
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
    library = import_library("torchopt")
    return MamlTorchOpt(
        problem, library=library, backbone=backbone, inner_steps=inner_steps, test_steps=test_steps, inner_lr=inner_lr
    )
