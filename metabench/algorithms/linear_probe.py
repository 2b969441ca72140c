"""Linear probe: plain classification of all training classes, then logistic regression on frozen features.

Chen et al. 2019 pre-train alike (`baseline`); the probe is the standard head beside the nearest centroid: features
scaled to length 1, L2-regularised softmax regression with scikit-learn's convention for C (the penalty |W|^2 / 2 stands
against C times the *summed* cross-entropy; the bias is free), C = 1. Where scikit-learn runs L-BFGS, all tasks here
take Newton steps together. The problem is convex with one optimum, so the solver leaves no trace but its time, and
nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from metabench.algorithms.base import Learner, Schedule
from metabench.algorithms.baseline import with_bias
from metabench.algorithms.classification import Classifier
from metabench.algorithms.metric import unit
from metabench.backbones import Backbone, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "linear-probe",
    "family": "transfer",
    "paper": "Chen et al. 2019",
    "url": "https://arxiv.org/abs/1904.04232",
    "feeds": "images",
    "control": False,
    "problems": ["classification"],
    "train": {},
}

NEWTON_STEPS = 50  # far more than needed
SOLVER_STEPS = 60  # of conjugate gradients, in each Newton step
LARGEST_C = 1e6  # beyond it the penalty drowns in rounding
HALVINGS = 30  # of a Newton step that would not lower the loss


class LinearProbe(Classifier):
    """Logistic regression per task on unit features, to its optimum."""

    def __init__(self, problem: Problem, backbone: Backbone, *, c: float, lr: float, schedule: Schedule) -> None:
        super().__init__(problem, backbone, lr=lr, schedule=schedule)
        if not 0 < c <= LARGEST_C:
            raise ConfigError(f"linear-probe: c must be above 0 and at most {LARGEST_C:g}, not {c}: less is smoother")
        self.c = c

    def adapt_features(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `FeatureMethod.adapt_features`; `steps` counts Newton steps from zero, None: to the optimum."""
        del seeds
        with torch.no_grad():
            # in float64, whatever the features: the optimum is the optimum, also where the system is ill-conditioned
            x, y = with_bias(unit(support.x)).double(), support.one_hot().double()
            head = logistic_regression(x, y, self.c, NEWTON_STEPS if steps is None else steps).to(support.x.dtype)
        return lambda x: with_bias(unit(x)) @ head


def logistic_regression(x: Tensor, y: Tensor, c: float, steps: int) -> Tensor:
    """Weights (T, d, ways) after at most `steps` Newton steps on T problems; the last row is the bias.

    Minimises the cross-entropy summed over x (T, n, d), the last feature 1, with labels y (T, n, ways) one-hot, plus
    |W|^2 / 2c without the bias. A task that has arrived stays where it is, so that no task depends on the others.
    """
    penalty = x.new_full((x.shape[-1], 1), 1 / c)
    penalty[-1] = 0
    # biases that rise together change no probability: their level has a penalty of its own, and stays at zero
    level = 1 - penalty * c
    w = x.new_zeros(*x.shape[::2], y.shape[-1])
    eps = torch.finfo(x.dtype).eps
    # Newton's matrix at w = 0, where every class has the same share: one for all classes, and close to all later ones
    close = torch.linalg.cholesky(x.mT @ x / y.shape[-1] + penalty[:, 0].diag())
    scale = _norm(x.mT @ y)

    def value(w: Tensor) -> Tensor:
        logits = x @ w
        return _sum(logits.logsumexp(-1, keepdim=True) - (logits * y).sum(-1, keepdim=True)) + _sum(w * push(w)) / 2

    def push(w: Tensor) -> Tensor:
        return penalty * w + level * w.mean(-1, keepdim=True)

    moving = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(steps):
        p = (x @ w).softmax(-1)
        gradient = x.mT @ (p - y) + push(w)

        def curve(v: Tensor, p: Tensor = p) -> Tensor:
            s = p * (x @ v)
            return x.mT @ (s - p * s.sum(-1, keepdim=True)) + push(v)

        step = _solve(curve, gradient, lambda r: torch.cholesky_solve(r, close), eps**0.5)
        w = torch.where(moving, _lower(value, w, step), w)
        # so near the optimum a step leaves nothing but rounding
        moving = moving & (_norm(gradient) > eps**0.5 * scale)
        if not moving.any():
            break
    return w


def _solve(
    matrix: Callable[[Tensor], Tensor], right: Tensor, close: Callable[[Tensor], Tensor], tolerance: float
) -> Tensor:
    """T systems of a positive matrix by conjugate gradients, `close` being nearly its inverse."""
    found, left = torch.zeros_like(right), right
    near = close(left)
    direction, before = near, _sum(left * near)
    limit = tolerance * _norm(right)
    for _ in range(SOLVER_STEPS):
        moving = _norm(left) > limit
        if not moving.any():
            break
        image = matrix(direction)
        size = torch.where(moving, before / _sum(direction * image), 0)  # no step where the system is solved
        found, left = found + size * direction, left - size * image
        near = close(left)
        now = _sum(left * near)
        direction = torch.where(moving, near + now / before * direction, direction)
        before = torch.where(moving, now, before)
    return found


def _lower(value: Callable[[Tensor], Tensor], w: Tensor, step: Tensor) -> Tensor:
    """w - step, or with the step halved, per task, until that is no higher than w but for rounding."""
    start = value(w)
    bound = start + 64 * torch.finfo(w.dtype).eps * start.abs()
    size = torch.ones_like(start)
    for _ in range(HALVINGS):
        higher = value(w - size * step) > bound
        if not higher.any():
            break
        size = torch.where(higher, size / 2, size)
    return w - size * step


def _sum(x: Tensor) -> Tensor:
    """The sum (T, 1, 1) of x (T, ...) of each task."""
    return x.sum((1, 2), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return _sum(x.square()).sqrt()


def build(
    problem: Problem,
    *,
    backbone: str = "conv4",
    norm: Literal["running", "support", "each", "tasknorm", "layer", "batch"] = "running",
    c: float = 1.0,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
) -> LinearProbe:
    """The linear probe; the same pre-training as `baseline`.

    Args:
        problem: the inputs' shape, and the number of training classes.
        backbone: any of metabench's.
        norm: whose statistics the batch norm uses (see `metabench.backbones`).
        c: inverse strength of the penalty, as scikit-learn's C.
        lr: rate of Adam in the pre-training.
        schedule: how it moves (see `metabench.algorithms.base.schedule`).

    Raises:
        ConfigError: c not above 0 or too large, a problem without training classes, or a backbone that does not fit.
    """
    return LinearProbe(problem, make_backbone(backbone, problem.shape, norm=norm), c=c, lr=lr, schedule=schedule)
