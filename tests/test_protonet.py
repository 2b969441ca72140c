"""Prototypical networks against the paper's equations, written as loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import query_loss, schedule
from metabench.algorithms.metric import best_of_class, cosine, log_mixture, negative_sqeuclidean, prototypes
from metabench.algorithms.protonet import ProtoNet, build
from metabench.episodes import Batch, Episode, Problem

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)


def features(seed: int, *, tasks: int = 2, shots: int = 2, queries: int = 4, dim: int = 5, ways: int = 3) -> Episode:
    """Random float64 'features' as x, labels in a random order."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(ways).repeat(shots)
    labels = torch.stack([y[torch.randperm(len(y), generator=g)] for _ in range(tasks)])
    support = Batch(torch.randn(tasks, len(y), dim, generator=g, dtype=torch.float64), labels, ways)
    x = torch.randn(tasks, queries, dim, generator=g, dtype=torch.float64)
    query = Batch(x, torch.randint(ways, (tasks, queries), generator=g), ways)
    return Episode(support, query, torch.arange(tasks))


def images(seed: int, tasks: int = 2) -> Episode:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat_interleave(2).expand(tasks, -1)
    support = Batch(torch.rand(tasks, 6, 1, 16, 16, generator=g), y, 3)
    return Episode(support, Batch(torch.rand(tasks, 6, 1, 16, 16, generator=g), y, 3), torch.arange(tasks))


def seeded(**params: object) -> ProtoNet:
    torch.manual_seed(0)
    return build(PROBLEM, **params)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shots=st.integers(1, 4), ways=st.integers(2, 5))
def test_logits_are_the_equations(seed: int, shots: int, ways: int) -> None:
    episode = features(seed, shots=shots, ways=ways)
    support, query = episode.support, episode.query
    squared = seeded().adapt_features(support, seeds=episode.seeds)(query.x)
    angular = seeded(distance="cosine").adapt_features(support, seeds=episode.seeds)(query.x)
    for t in range(support.tasks):
        for n in range(ways):
            centre = support.x[t][support.y[t] == n].mean(0)
            for q in range(query.x.shape[1]):
                x = query.x[t, q]
                assert squared[t, q, n].item() == pytest.approx(-((x - centre) ** 2).sum().item(), rel=1e-12, abs=1e-12)
                assert angular[t, q, n].item() == pytest.approx(F.cosine_similarity(x, centre, 0).item(), abs=1e-6)


def test_prototypes_of_unequal_classes() -> None:
    x = torch.tensor([[[1.0], [3.0], [10.0]]])
    assert prototypes(Batch(x, torch.tensor([[1, 1, 0]]), 2)).tolist() == [[[10.0], [2.0]]]


def test_training_embeds_support_and_query_in_one_pass() -> None:
    algorithm, episode = seeded(), images(0)
    x = torch.cat([episode.support.x, episode.query.x], dim=1)
    z = algorithm.backbone(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    decide = algorithm.adapt_features(replace(episode.support, x=z[:, :6]), seeds=episode.seeds)
    expected = query_loss(PROBLEM, decide(z[:, 6:]), episode.query)[0]
    assert torch.equal(algorithm.loss(episode)[0], expected)
    apart = query_loss(PROBLEM, algorithm.adapt(episode.support, seeds=episode.seeds)(episode.query.x), episode.query)[
        0
    ]
    assert not torch.isclose(expected, apart, rtol=1e-4)  # batch statistics of the two halves differ

    algorithm.trainer(1).step(episode)
    weight, bias = (seeded().backbone.get_parameter(name) for name in ("conv0", "bias0"))
    mixed = F.conv2d(x.flatten(0, 1), weight, bias, padding=1).mean((0, 2, 3))
    assert torch.allclose(algorithm.backbone.get_buffer("mean0"), 0.1 * mixed, atol=1e-6)


def test_evaluation_uses_the_running_averages() -> None:
    algorithm, episode = seeded(), images(1)
    trainer = algorithm.trainer(3)
    for step in range(3):
        trainer.step(images(step))
    algorithm.eval()
    together = algorithm.embed(episode.query.x[0])
    assert torch.allclose(together[:1], algorithm.embed(episode.query.x[0, :1]), atol=1e-5)
    algorithm.train()
    assert not torch.allclose(together[:1], algorithm.embed(episode.query.x[0])[:1], atol=1e-3)


@pytest.mark.parametrize(
    ("norm", "cacheable"), [("running", True), ("layer", True), ("support", False), ("batch", False)]
)
def test_cacheable_says_whether_features_depend_on_the_image_alone(norm: str, cacheable: bool) -> None:
    algorithm = seeded(norm=norm).eval()
    x = images(2).query.x[0]
    assert algorithm.cacheable == cacheable
    assert torch.allclose(algorithm.embed(x)[:2], algorithm.embed(x[:2]), atol=1e-5) == cacheable


def test_gradient_of_the_loss_is_that_of_the_loops() -> None:
    episode = features(3)
    x = episode.support.x.clone().requires_grad_()
    decide = seeded().adapt_features(replace(episode.support, x=x), seeds=episode.seeds)
    query_loss(PROBLEM, decide(episode.query.x), episode.query)[0].backward()
    y = episode.support.x.clone().requires_grad_()
    losses = []
    for t in range(2):
        centres = torch.stack([y[t][episode.support.y[t] == n].mean(0) for n in range(3)])
        losses.append(F.cross_entropy(-torch.cdist(episode.query.x[t], centres).square(), episode.query.y[t]))
    torch.stack(losses).mean().backward()
    assert x.grad is not None and y.grad is not None and torch.allclose(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_best_of_class_and_log_mixture() -> None:
    support = Batch(torch.zeros(1, 3, 1), torch.tensor([[1, 0, 1]]), 2)
    scores = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert best_of_class(scores, support).tolist() == [[[2.0, 3.0]]]
    expected = torch.tensor([2.0, (torch.tensor([1.0, 3.0]).logsumexp(0)).item()]).log_softmax(0)
    assert torch.allclose(log_mixture(scores, support)[0, 0], expected)


def test_distances_of_points_far_from_the_origin() -> None:
    x = torch.tensor([[[1000.0, 1.0]]], dtype=torch.float64)
    assert negative_sqeuclidean(x, x - 1).item() == pytest.approx(-2.0, abs=1e-9)
    assert cosine(torch.zeros(1, 1, 2, requires_grad=True), x.float()).item() == 0.0


def test_cosine_has_a_finite_gradient_at_zero() -> None:
    x = torch.zeros(1, 1, 2, requires_grad=True)
    cosine(x, torch.ones(1, 1, 2)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("kind", "rates"), [("constant", [1.0] * 4), ("halving", [1.0, 1.0, 0.5, 0.25]), ("cosine", [1.0, 0.75, 0.25, 0.0])]
)
def test_schedules(kind: str, rates: list[float]) -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=2.0)
    plan = schedule(optimizer, kind, 6000)  # type: ignore[arg-type]
    seen: dict[int, float] = {}
    for step in range(6001):
        seen[step] = optimizer.param_groups[0]["lr"] / 2.0
        optimizer.step()
        if plan is not None:
            plan.step()
    at = {"halving": [0, 1999, 2000, 4000]}.get(kind, [0, 2000, 4000, 6000])
    assert [seen[step] for step in at] == pytest.approx(rates, abs=1e-12)


def test_more_ways_in_the_test_than_in_training_is_fine() -> None:
    algorithm = seeded().eval()
    assert algorithm.unsupported(replace(PROBLEM, ways=20)) is None
    assert algorithm.unsupported(Problem((1,), "mse"))
    episode = features(0, ways=5)
    output: Tensor = algorithm.adapt_features(episode.support, seeds=episode.seeds)(episode.query.x)
    assert output.shape[-1] == 5
