"""MAML through learn2learn: clone the module, adapt the clone, one task after the other."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.plain import Answer, PlainMaml, import_part
from metabench.episodes import Problem

METABENCH = {
    "kind": "algorithm",
    "name": "maml-learn2learn",
    "family": "optimisation",
    "paper": "Finn et al. 2017; learn2learn: Arnold et al. 2020",
    "url": "https://github.com/learnables/learn2learn",
    "feeds": "episodes",
    "problems": ["classification"],
    "train": {"tasks": 32},
}

FIX = (
    "pip cannot build learn2learn 0.2.0 for Python 3.11 or newer; unpack its source distribution and put the folder on "
    "PYTHONPATH (see docs/peers.md), or compare with maml-clone, which works the same way"
)


class MamlLearn2Learn(PlainMaml):
    """As examples/vision/maml_omniglot.py of learn2learn, but first order in evaluation: the same answers for less."""

    def learn(self, x: Tensor, y: Tensor, steps: int, *, second_order: bool) -> Answer:
        """See `PlainMaml.learn`."""
        learner = self.library.MAML(self.net, lr=self.rate).clone(first_order=not second_order)
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        answer: Answer = learner
        return answer


def build(
    problem: Problem,
    *,
    backbone: Literal["conv4-strided", "conv4"] = "conv4-strided",
    norm: Literal["batch"] = "batch",
    inner_steps: int = 1,
    test_steps: int | None = None,
    inner_lr: float | None = None,
) -> MamlLearn2Learn:
    """MAML for `problem` as `maml` builds it with norm=batch and adapt_norm=true.

    Raises:
        Unsupported: learn2learn is not there.
    """
    del norm  # says whose statistics they are; there is one answer
    library = import_part("learn2learn.algorithms.maml", fix=FIX)
    return MamlLearn2Learn(
        problem, library=library, backbone=backbone, inner_steps=inner_steps, test_steps=test_steps, inner_lr=inner_lr
    )
