"""The transfer methods: the closed-form fit against torch's own layers and optimiser, SimpleShot against its text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms import baseline, centroid
from metabench.algorithms.baseline import draw, with_bias
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)


def make(module: Any = baseline, **params: Any) -> Any:
    torch.manual_seed(0)
    return module.build(PROBLEM, **params).double().eval()


def data(seed: int, tasks: int = 3, shots: int = 2, ways: int = 3, dim: int = 5) -> tuple[Batch, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = shots * ways
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(tasks)])
    x = torch.randn(tasks, n, dim, generator=g, dtype=torch.float64)
    queries = torch.randn(tasks, 4, dim, generator=g, dtype=torch.float64)
    return Batch(x, y, ways), queries, torch.randint(2**62, (tasks,), generator=g)


def torch_fit(support: Batch, t: int, head: Tensor, orders: Tensor, options: dict[str, Any]) -> nn.Linear:
    """Task t with nn.Linear, cross_entropy, autograd and torch.optim.SGD."""
    layer = nn.Linear(head.shape[-1] - 1, head.shape[-2]).double()
    with torch.no_grad():
        layer.weight.copy_(head[t, :, :-1])
        layer.bias.copy_(head[t, :, -1])
    size, n = options.pop("batch_size"), support.x.shape[1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=options.pop("head_lr"), **options)
    for order in orders[t]:
        for start in range(0, n, size):
            picked = order[start : start + size]
            optimizer.zero_grad()
            F.cross_entropy(layer(support.x[t, picked]), support.y[t, picked]).backward()
            optimizer.step()
    return layer


@example(seed=0, shots=2, batch_size=4, momentum=0.0, dampening=0.9, weight_decay=0.1)
@example(seed=0, shots=2, batch_size=4, momentum=0.9, dampening=0.9, weight_decay=1e-3)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_the_fit_is_torchs_sgd(
    seed: int, shots: int, batch_size: int, momentum: float, dampening: float, weight_decay: float
) -> None:
    """Ragged last mini-batches, momentum, dampening (not at the first step) and decay of the bias included."""
    options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    options |= {"head_lr": 0.05, "batch_size": batch_size}
    support, x, seeds = data(seed, shots=shots)
    output = make(epochs=4, **options).adapt_features(support, seeds=seeds)(x)
    head, orders = draw(seeds, like=with_bias(support.x), ways=3, epochs=4)
    for t in range(3):
        layer = torch_fit(support, t, head, orders, dict(options))
        assert torch.allclose(output[t], layer(x[t]), rtol=1e-10, atol=1e-12)


def test_defaults_are_the_papers() -> None:
    fit = make().fit
    assert (fit.lr, fit.momentum, fit.dampening) == (0.01, 0.9, 0.9)
    assert (fit.weight_decay, fit.epochs, fit.batch_size) == (1e-3, 100, 4)


def test_draws_depend_on_the_tasks_own_seed_alone() -> None:
    support, x, seeds = data(5, tasks=4)
    algorithm = make(epochs=6)
    together = algorithm.adapt_features(support, seeds=seeds)(x)
    for t in range(4):
        alone = algorithm.adapt_features(support.pick(slice(t, t + 1)), seeds=seeds[t : t + 1])(x[t : t + 1])
        assert torch.allclose(alone[0], together[t], rtol=1e-12)
    head, orders = draw(seeds, like=with_bias(support.x), ways=3, epochs=6)
    again = draw(seeds.flip(0), like=with_bias(support.x), ways=3, epochs=6)
    assert torch.equal(head.flip(0), again[0]) and torch.equal(orders.flip(0), again[1])
    assert not torch.equal(head[0], head[1])
    assert torch.equal(orders.sort(-1).values, torch.arange(6).expand(4, 6, 6))  # each epoch sees each item once
    assert not torch.equal(orders[:, 0], orders[:, 1])


def test_a_fresh_head_is_spread_like_a_linear_layers() -> None:
    support = Batch(torch.zeros(200, 3, 15), torch.zeros(200, 3, dtype=torch.int64), 3)
    head, _ = draw(torch.arange(200), like=with_bias(support.x), ways=3, epochs=1)
    bound = 1 / math.sqrt(15)
    assert head.abs().max() <= bound and head.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(head.mean().item()) < 0.01 and head.shape == (200, 3, 16)


def test_steps_count_mini_batches() -> None:
    support, x, seeds = data(6)
    algorithm = make(epochs=3)  # 6 items in batches of 4: 2 steps an epoch
    assert torch.equal(
        algorithm.adapt_features(support, seeds=seeds, steps=6)(x), algorithm.adapt_features(support, seeds=seeds)(x)
    )
    head, _ = draw(seeds, like=with_bias(support.x), ways=3, epochs=0)
    assert torch.equal(algorithm.adapt_features(support, seeds=seeds, steps=0)(x), with_bias(x) @ head.mT)


@pytest.mark.parametrize("module", [baseline, centroid])
def test_pre_training_classifies_all_classes(module: Any) -> None:
    algorithm = make(module)
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(1, 10, 1, 16, 16, generator=g).double(), torch.randint(9, (1, 10), generator=g), 9)
    logits = algorithm.output(algorithm.backbone(batch.x[0]))
    assert logits.shape == (10, 9)
    assert torch.allclose(algorithm.loss(batch)[0], F.cross_entropy(logits, batch.y[0]))
    with pytest.raises(ConfigError, match="classes"):
        module.build(Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3))
    with pytest.raises(TypeError, match="images"):
        algorithm.loss(None)


def simple_shot(support: Batch, x: Tensor, t: int, centre: Tensor | None) -> Tensor:
    """Wang et al. 2019, section 3: centre, scale to length 1, mean per class, Euclidean distance to that mean."""

    def transformed(z: Tensor) -> Tensor:
        z = z if centre is None else z - centre
        return z / z.norm(dim=-1, keepdim=True)

    means = torch.stack([transformed(support.x[t][support.y[t] == n]).mean(0) for n in range(3)])
    return -(transformed(x[t])[:, None] - means[None]).square().sum(-1)


@pytest.mark.parametrize("transform", ["l2", "cl2"])
def test_centroid_is_simple_shot(transform: str) -> None:
    support, x, seeds = data(7, dim=64)
    algorithm = make(centroid, transform=transform)
    algorithm.centre.copy_(torch.linspace(-1, 1, 64))
    output = algorithm.adapt_features(support, seeds=seeds)(x)
    for t in range(3):
        expected = simple_shot(support, x, t, algorithm.centre if transform == "cl2" else None)
        assert torch.allclose(output[t], expected, atol=1e-7)


def test_centroid_by_cosine_is_a_variant_that_ranks_alike_with_one_shot() -> None:
    support, x, seeds = data(7, dim=64)
    one = replace(support, x=support.x[:, :3], y=torch.arange(3).expand(3, 3))
    for shots, few in ((1, one), (2, support)):
        methods = (make(centroid, distance=distance) for distance in ("sqeuclidean", "cosine"))
        near, alike = (method.adapt_features(few, seeds=seeds)(x).argsort(-1) for method in methods)
        assert torch.equal(near, alike) == (shots == 1)


def test_centroid_without_transform_can_be_euclidean() -> None:
    support, x, seeds = data(8, dim=64)
    output = make(centroid, transform="none", distance="sqeuclidean").adapt_features(support, seeds=seeds)(x)
    means = torch.stack([torch.stack([support.x[t][support.y[t] == n].mean(0) for n in range(3)]) for t in range(3)])
    assert torch.allclose(output, -torch.cdist(x, means).square())


def test_the_centre_is_the_mean_feature_of_training_images() -> None:
    class Source:
        problem = PROBLEM

        def images(self, start: int, n: int) -> Batch:
            g = torch.Generator()
            x = torch.stack([torch.rand(1, 16, 16, generator=g.manual_seed(i)) for i in range(start, start + n)])
            return Batch(x[None], torch.zeros(1, n, dtype=torch.int64), 9)

    algorithm = make(centroid, centre_images=300)  # not a multiple of what is embedded at once
    algorithm.prepare(Source())
    expected = algorithm.embed(Source().images(0, 300).x[0].double()).mean(0)
    assert torch.allclose(algorithm.centre, expected) and expected.abs().max() > 0
    assert "centre" in algorithm.state_dict()
