"""Plain classification of all training classes at once: what the transfer methods pre-train their backbone with."""

from __future__ import annotations

from torch import Tensor, nn

from metabench.algorithms.base import Metrics, Schedule, query_loss
from metabench.algorithms.metric import Embedding
from metabench.backbones import Backbone
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError


class Classifier(Embedding):
    """Backbone and a layer (`output`, linear) over every class of the training subset, trained on images with Adam.

    As Chen et al. 2019 but for what our data sets and backbones settle (their code: wyharveychen/CloserLookFewShot):
    images are drawn with replacement and not in epochs, have 28x28 pixels with a background of 0 (theirs are cropped
    from 32x32, not inverted, and normalised), and weights begin as torch's layers do (theirs: convolutions from
    N(0, 2 / (9 filters)), biases of the classifier at 0).
    """

    feeds = "images"

    def __init__(self, problem: Problem, backbone: Backbone, *, lr: float, schedule: Schedule) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        if problem.classes is None:
            raise ConfigError(f"{type(self).__name__} needs a data set with classes to train on")
        self.output: nn.Module = nn.Linear(backbone.out_dim, problem.classes)

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy over all training classes; batch x (1, n, *shape), y (1, n)."""
        if not isinstance(batch, Batch):
            raise TypeError(f"{type(self).__name__} trains on images")
        logits: Tensor = self.output(self.embed(batch.x.flatten(0, 1)))
        return query_loss(self.problem, logits[None], batch)
