"""Matching networks against equation 1, written as loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import protonet
from metabench.algorithms.base import query_loss
from metabench.algorithms.matching import MatchingNet, build
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)


def make(**params: object) -> MatchingNet:
    torch.manual_seed(0)
    return build(PROBLEM, **params).double()  # type: ignore[arg-type, no-any-return]


def data(seed: int, shots: int = 3, scale: float = 1.0) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(3).repeat(shots)[torch.randperm(3 * shots, generator=g)] for _ in range(2)])
    x = torch.randn(2, 3 * shots, 6, generator=g, dtype=torch.float64) * scale
    return Batch(x, y, 3), torch.randn(2, 4, 6, generator=g, dtype=torch.float64) * scale


def similarity(kind: str, q: Tensor, s: Tensor) -> float:
    if kind == "cosine":
        return 10.0 * F.cosine_similarity(q, s, 0, eps=0).item()
    if kind == "cosine_unnormalised_query":
        return (q @ s / s.norm()).item()
    return -((q - s) ** 2).sum().item()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(1, 4),
    kind=st.sampled_from(["cosine", "cosine_unnormalised_query", "sqeuclidean"]),
)
def test_equation_1(seed: int, shots: int, kind: str) -> None:
    support, x = data(seed, shots)
    output = make(similarity=kind).adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(x.shape[1]):
            weights = [math.exp(similarity(kind, x[t, q], s)) for s in support.x[t]]
            for n in range(3):
                voted = sum(w for w, y in zip(weights, support.y[t], strict=True) if y == n)
                assert output[t, q, n].item() == pytest.approx(math.log(voted / sum(weights)), rel=1e-5, abs=1e-7)


def test_the_loss_is_the_mixtures_likelihood() -> None:
    support, x = data(1)
    output = make().adapt_features(support, seeds=SEEDS)(x)
    assert torch.allclose(output.exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    y = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    loss = query_loss(PROBLEM, output, Batch(x, y, 3))[0]
    assert loss.item() == pytest.approx(-output.gather(-1, y[..., None]).mean().item())
    summed = 10 * torch.einsum(
        "tmn,tnk->tmk", F.normalize(x, dim=-1) @ F.normalize(support.x, dim=-1).mT, support.one_hot()
    )
    assert not torch.allclose(summed.log_softmax(-1), output, atol=0.1)  # another model (see the class)


def test_the_literal_form_cannot_be_sure() -> None:
    """With 5 support items and a raw cosine no answer exceeds e / (e + 4 / e)."""
    support = Batch(torch.cat([torch.ones(1, 1, 2), -torch.ones(1, 4, 2)], 1).double(), torch.arange(5)[None], 5)
    literal = make(temperature=1.0, learn_temperature=False)
    assert not any(p is literal.log_temperature for p in literal.parameters())
    best = literal.adapt_features(support, seeds=SEEDS[:1])(torch.ones(1, 1, 2).double()).exp().max().item()
    assert best == pytest.approx(math.e / (math.e + 4 / math.e), abs=1e-6)
    assert make().adapt_features(support, seeds=SEEDS[:1])(torch.ones(1, 1, 2).double()).exp().max() > 0.999


def test_one_shot_squared_distance_is_a_prototypical_network() -> None:
    support, x = data(2, shots=1)
    torch.manual_seed(0)
    prototypical = protonet.build(PROBLEM).double()
    expected = prototypical.adapt_features(support, seeds=SEEDS)(x).log_softmax(-1)
    assert torch.allclose(make(similarity="sqeuclidean").adapt_features(support, seeds=SEEDS)(x), expected, rtol=1e-10)


def test_far_classes_keep_finite_logits_and_gradients() -> None:
    support, x = data(3, scale=1e3)
    x.requires_grad_()
    output = make(similarity="sqeuclidean").adapt_features(support, seeds=SEEDS)(x)
    assert output.min() < -1e5
    output.sum().backward()
    assert torch.isfinite(output).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_the_temperature_is_learned_and_positive() -> None:
    algorithm = make(lr=1.0).float()
    assert algorithm.log_temperature.exp().item() == pytest.approx(10.0)
    trainer = algorithm.trainer(3)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3)[None].expand(2, -1)
    for _ in range(3):
        batch = Batch(torch.rand(2, 3, 1, 16, 16, generator=g), y, 3)
        trainer.step(Episode(batch, Batch(torch.rand(2, 3, 1, 16, 16, generator=g), y, 3), SEEDS))
    assert algorithm.log_temperature.exp().item() != pytest.approx(10.0, rel=0.1)
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        make(temperature=0.0)
