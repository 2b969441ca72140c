"""Control: the nearest class mean in the features of a backbone that was never trained."""

from __future__ import annotations

from typing import Literal

from metabench.algorithms.protonet import ProtoNet
from metabench.backbones import make_backbone
from metabench.episodes import Problem

METABENCH: dict[str, object] = {
    "kind": "algorithm",
    "name": "untrained",
    "family": "control",
    "paper": "",
    "url": "",
    "feeds": None,
    "control": True,
    "problems": ["classification"],
    "train": {},
}


class Untrained(ProtoNet):
    """A prototypical network at its random initialisation: what the architecture alone brings.

    With `running` the running averages are those of the initialisation (mean 0, variance 1): no normalisation at all.
    """

    feeds = None


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
) -> Untrained:
    """A prototypical network before its first training step."""
    network = make_backbone(backbone, problem.shape, norm=norm)
    return Untrained(problem, network, distance="sqeuclidean", lr=0.0, schedule="constant")
