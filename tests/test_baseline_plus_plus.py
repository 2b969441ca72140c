"""Baseline++: its heads against torch's own weight normalisation, autograd and SGD, one task at a time in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from metabench.algorithms.baseline import draw, with_bias
from metabench.algorithms.baseline_plus_plus import BaselinePlusPlus, CosineLinear, build
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)


def make(classes: int = 9, **params: Any) -> BaselinePlusPlus:
    torch.manual_seed(0)
    return build(replace(PROBLEM, classes=classes), **params).double().eval()  # type: ignore[return-value]


def data(seed: int, tasks: int = 3, shots: int = 2, ways: int = 3, dim: int = 5) -> tuple[Batch, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = shots * ways
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(tasks)])
    x = torch.randn(tasks, n, dim, generator=g, dtype=torch.float64)
    queries = torch.randn(tasks, 4, dim, generator=g, dtype=torch.float64)
    return Batch(x, y, ways), queries, torch.randint(2**62, (tasks,), generator=g)


class Plain(nn.Module):
    """Scores as the paper's code makes them, with torch's weight normalisation: g (ways, 1) and v (ways, d)."""

    def __init__(self, v: Tensor, scale: float) -> None:
        super().__init__()
        layer = nn.Linear(v.shape[1], v.shape[0], bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(v)
        self.layer, self.scale = weight_norm(layer, dim=0), scale  # starts from g = |v|

    def forward(self, x: Tensor) -> Tensor:
        scores = [self.layer(one / (one.norm() + 1e-5)) for one in x]
        return self.scale * torch.stack(scores)


def torch_fit(support: Batch, t: int, head: Tensor, orders: Tensor, scale: float, options: dict[str, Any]) -> Plain:
    layer, size = Plain(head[t, :, :-1], scale), options["batch_size"]
    kept = {name: options[name] for name in ("momentum", "dampening", "weight_decay")}
    optimizer = torch.optim.SGD(layer.parameters(), lr=options["head_lr"], **kept)
    for order in orders[t]:
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            optimizer.zero_grad()
            F.cross_entropy(layer(support.x[t, picked]), support.y[t, picked]).backward()
            optimizer.step()
    return layer


@example(seed=0, shots=2, batch_size=4, momentum=0.9, dampening=0.9, weight_decay=1e-3, scale=None)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([None, 7.0]),
)
def test_the_fit_is_torchs_sgd_and_weight_norm(seed: int, shots: int, scale: float | None, **options: Any) -> None:
    options["head_lr"] = 0.1
    support, x, seeds = data(seed, shots=shots)
    output = make(scale=scale, epochs=3, **options).adapt_features(support, seeds=seeds)(x)
    head, orders = draw(seeds, like=with_bias(support.x), ways=3, epochs=3)
    for t in range(3):
        layer = torch_fit(support, t, head, orders, scale or 2.0, options)
        assert torch.allclose(output[t], layer(x[t]), rtol=1e-10, atol=1e-12)


def test_pre_training_is_the_same_head_over_all_classes() -> None:
    algorithm = make()
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(1, 10, 1, 16, 16, generator=g).double(), torch.randint(9, (1, 10), generator=g), 9)
    assert isinstance(algorithm.output, CosineLinear)
    with torch.no_grad():  # to all digits of float64
        algorithm.output.lengths.copy_(algorithm.output.directions.norm(dim=-1, keepdim=True))
    plain = Plain(algorithm.output.directions.detach(), 2.0)
    z = algorithm.backbone(batch.x[0])
    loss = algorithm.loss(batch)[0]
    expected = F.cross_entropy(plain(z), batch.y[0])
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    (z_gradient,) = torch.autograd.grad(expected, plain.layer.parametrizations.weight.original1, retain_graph=True)
    assert torch.allclose(algorithm.output.directions.grad, z_gradient, rtol=1e-9, atol=1e-14)  # type: ignore[arg-type]
    assert algorithm.output.lengths.grad is not None and algorithm.output.lengths.grad.abs().max() > 0


def test_lengths_are_learned_so_that_it_is_no_pure_cosine() -> None:
    algorithm = make()
    g = torch.Generator().manual_seed(1)
    batch = Batch(torch.rand(1, 10, 1, 16, 16, generator=g).double(), torch.randint(9, (1, 10), generator=g), 9)
    before = algorithm.output.get_parameter("lengths").detach().clone()
    algorithm.trainer(1).step(batch)
    assert not torch.equal(before, algorithm.output.get_parameter("lengths"))
    support, x, seeds = data(1)
    scores = algorithm.adapt_features(support, seeds=seeds)(x)
    assert torch.allclose(
        scores, algorithm.adapt_features(support, seeds=seeds)(9 * x), rtol=1e-4
    )  # queries: direction


@pytest.mark.parametrize(("classes", "factor"), [(9, 2.0), (200, 2.0), (201, 10.0), (4112, 10.0)])
def test_the_factor_is_the_papers(classes: int, factor: float) -> None:
    algorithm = make(classes)
    assert algorithm.output.scale == factor and algorithm._factor(20) == 2.0
    assert make(classes, scale=5.0).output.scale == 5.0


def test_steps_count_mini_batches_and_none_means_a_drawn_head() -> None:
    support, x, seeds = data(6)
    algorithm = make(epochs=3)
    whole = algorithm.adapt_features(support, seeds=seeds)(x)
    assert torch.equal(algorithm.adapt_features(support, seeds=seeds, steps=6)(x), whole)
    head, _ = draw(seeds, like=with_bias(support.x), ways=3, epochs=0)
    drawn = 2 * (x / (x.norm(dim=-1, keepdim=True) + 1e-5)) @ head[..., :-1].mT  # g v / |v| = v at the start
    assert torch.allclose(algorithm.adapt_features(support, seeds=seeds, steps=0)(x), drawn, rtol=1e-12)


def test_features_of_zero_are_no_trouble() -> None:
    algorithm = make()
    z = torch.zeros(2, 64, dtype=torch.float64, requires_grad=True)
    algorithm.output(z).sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_wrong_parameters_are_named(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale must be above 0"):
        build(PROBLEM, scale=scale)
    with pytest.raises(ConfigError, match="classes"):
        build(replace(PROBLEM, classes=None))
