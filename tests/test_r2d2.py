"""R2-D2's head against the primal normal equations of ridge regression, written as loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import query_loss
from metabench.algorithms.r2d2 import R2D2, build, ridge_weights
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)


def make(**params: object) -> R2D2:
    torch.manual_seed(0)
    return build(PROBLEM, **params).double()  # type: ignore[arg-type]


def data(seed: int, *, shots: int = 2, ways: int = 3, dim: int = 5, scale: float = 1.0) -> tuple[Batch, Batch]:
    """Support and query features of two tasks, labels in a random order."""
    g = torch.Generator().manual_seed(seed)
    n = shots * ways
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(2)])
    support = Batch(scale * torch.randn(2, n, dim, generator=g, dtype=torch.float64), y, ways)
    x = scale * torch.randn(2, 4, dim, generator=g, dtype=torch.float64)
    return support, Batch(x, torch.randint(ways, (2, 4), generator=g), ways)


def primal(support: Batch, x: Tensor, t: int, ridge: Tensor) -> Tensor:
    """One task: (E'E + lambda I) w = E'y for each class by itself, E and y summed up item by item."""
    dim, ways = support.x.shape[-1], support.ways or 0
    columns = []
    for n in range(ways):
        left, right = ridge * torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        for e, label in zip(support.x[t], support.y[t], strict=True):
            left = left + e[:, None] * e[None, :]
            right = right + e * float(label == n)
        columns.append(left.inverse() @ right)
    return x[t] @ torch.stack(columns, dim=1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(1, 4),  # up to 12 items of 5 numbers: systems larger and smaller than the primal one
    ways=st.integers(2, 4),
    ridge=st.sampled_from([0.1, 1.0, 50.0]),
    scale=st.sampled_from([0.5, 7.0]),
)
def test_logits_are_the_normal_equations(seed: int, shots: int, ways: int, ridge: float, scale: float) -> None:
    support, query = data(seed, shots=shots, ways=ways)
    algorithm = make(ridge=ridge, scale=scale)
    with torch.no_grad():
        algorithm.bias.fill_(0.3)
    output = algorithm.adapt_features(support, seeds=SEEDS)(query.x)
    for t in range(2):
        expected = scale * primal(support, query.x, t, algorithm.log_ridge.detach().exp()) + 0.3
        assert torch.allclose(output[t], expected, rtol=1e-10, atol=1e-11)


def test_classes_of_unequal_size_and_twice_the_same_item() -> None:
    x = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]], dtype=torch.float64)
    support = Batch(x, torch.tensor([[0, 1, 1, 1]]), 3)  # equal items of two classes; a class without any
    output = x @ ridge_weights(support, torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(output[0], primal(support, x, 0, torch.tensor(0.5)), rtol=1e-12, atol=1e-13)
    assert output[0, :, 2].abs().max() == 0


def test_the_gradient_goes_through_the_solver() -> None:
    """To the support features, lambda and the scale, as through the primal solution; the bias moves nothing."""
    support, query = data(1)
    ours, theirs = (support.x.clone().requires_grad_() for _ in range(2))
    algorithm = make(ridge=2.0, scale=3.0)
    output = algorithm.adapt_features(replace(support, x=ours), seeds=SEEDS)(query.x)
    query_loss(PROBLEM, output, query)[0].backward()
    log_ridge = algorithm.log_ridge.detach().clone().requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    plain = [scale * primal(replace(support, x=theirs), query.x, t, log_ridge.exp()) for t in range(2)]
    torch.stack([F.cross_entropy(plain[t], query.y[t]) for t in range(2)]).mean().backward()
    for mine, other in ((ours, theirs), (algorithm.log_ridge, log_ridge), (algorithm.scale, scale)):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-12) and mine.grad.abs().max() > 0
    assert algorithm.bias.grad is not None and abs(algorithm.bias.grad.item()) < 1e-15


def test_lambda_stays_positive_whatever_the_optimiser_does() -> None:
    algorithm = make(ridge=1e-3)
    with torch.no_grad():
        algorithm.log_ridge.sub_(5.0)
    assert 0 < algorithm.log_ridge.exp() < 1e-3
    support, query = data(2, dim=64)
    assert torch.isfinite(algorithm.adapt_features(support, seeds=SEEDS)(query.x)).all()


def test_features_of_any_size_are_answered_in_float32() -> None:
    support, query = data(3, dim=64, scale=1e3)
    output = make().float().adapt_features(replace(support, x=support.x.float()), seeds=SEEDS)(query.x.float())
    exact = make().adapt_features(support, seeds=SEEDS)(query.x)
    assert torch.allclose(output.double(), exact, atol=1e-3)
    zero = make().adapt_features(replace(support, x=torch.zeros_like(support.x)), seeds=SEEDS)(query.x)
    assert torch.equal(zero, torch.zeros_like(zero))  # equal logits: a tie of all classes


def test_defaults_and_what_is_learned() -> None:
    algorithm = make()
    assert algorithm.log_ridge.item() == pytest.approx(math.log(50.0))
    assert (algorithm.scale.item(), algorithm.bias.item()) == (1.0, 0.0)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 12, 1, 16, 16, generator=g).double()
    y = torch.arange(3).repeat_interleave(2).expand(2, -1)
    before = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
    algorithm.trainer(1).step(Episode(Batch(x[:, :6], y, 3), Batch(x[:, 6:], y, 3), SEEDS))
    moved = {name for name, value in algorithm.named_parameters() if not torch.equal(value, before[name])}
    assert {"log_ridge", "scale", "backbone.conv0", "backbone.conv3"} <= moved


def test_more_ways_in_the_test_than_in_training_is_fine() -> None:
    algorithm = make().eval()
    assert algorithm.unsupported(replace(PROBLEM, ways=20)) is None
    support, query = data(4, ways=4)
    assert algorithm.adapt_features(support, seeds=SEEDS)(query.x).shape == (2, 4, 4)


@pytest.mark.parametrize("params", [{"ridge": 0.0}, {"ridge": -1.0}, {"scale": 0.0}])
def test_wrong_parameters_are_named(params: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(params))} must be above 0"):
        build(PROBLEM, **params)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown backbone"):
        build(PROBLEM, backbone="conv5")
