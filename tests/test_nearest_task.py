"""Nearest task: the match against all permutations, the recalled and fitted heads against loops, in float64."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import protonet
from metabench.algorithms.nearest_task import NearestTask, best_match, build
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=4, classes=9)
SEEDS = torch.arange(2)


class Source:
    """Training tasks of 4 ways, 1 shot and 2 queries; each a pure function of its number."""

    problem = PROBLEM

    def episodes(self, start: int, tasks: int) -> Episode:
        x = torch.stack(
            [torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(start + t)) for t in range(tasks)]
        )
        x, y = x.double(), torch.arange(4).repeat(3).expand(tasks, -1)
        return Episode(Batch(x[:, :4], y[:, :4], 4), Batch(x[:, 4:], y[:, 4:], 4), torch.arange(tasks))


def make(**params: Any) -> NearestTask:
    torch.manual_seed(0)
    chosen = {"memory_tasks": 6, "finetune_steps": 3, "finetune_lr": 0.05, "temperature": 2.0} | params
    return build(PROBLEM, **chosen).double().eval()  # type: ignore[return-value]


def filled(**params: Any) -> NearestTask:
    """With random kept tasks."""
    algorithm, g = make(**params), torch.Generator().manual_seed(1)
    for name, buffer in algorithm.named_buffers():
        if name.startswith("kept"):
            buffer.copy_(torch.randn(buffer.shape, generator=g, dtype=torch.float64))
    return algorithm


def features(seed: int = 0, ways: int = 4, shots: int = 2) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = ways * shots
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(2)])
    x = torch.randn(2, n + 5, 64, generator=g, dtype=torch.float64)
    return Batch(x[:, :n], y, ways), x[:, n:]


def brute(costs: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """Every candidate, every way to match."""
    rows, columns = costs.shape[1:]
    best: tuple[float, int, tuple[int, ...]] = (np.inf, -1, ())
    for n in range(len(costs)):
        for picked in itertools.permutations(range(columns), rows):
            cost = sum(costs[n, i, j] for i, j in enumerate(picked))
            if cost < best[0]:
                best = (cost, n, picked)
    return best[1], best[2]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 4), candidates=st.integers(1, 7), spread=st.sampled_from([0.1, 3])
)
def test_the_match_is_the_best_of_all_permutations(seed: int, rows: int, candidates: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((candidates, rows, 4)) + spread * rng.random((candidates, 1, 1))
    n, columns = best_match(costs)
    assert (n, tuple(columns)) == brute(costs)


def test_of_equal_tasks_the_first_is_taken() -> None:
    costs = np.random.default_rng(0).random((1, 4, 4)).repeat(5, axis=0)
    costs[0] += 1
    assert best_match(costs)[0] == 1
    assert [best_match(np.zeros((3, 2, 4)))[0] for _ in range(2)] == [0, 0]
    rising = np.arange(24, dtype=float).reshape(2, 3, 4)[::-1]
    assert best_match(rising)[0] == 1  # the second is nearer, though it comes later


@pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("ways", [4, 3])
def test_the_recalled_head_is_the_nearest_tasks_with_its_columns_matched(distance: str, ways: int) -> None:
    algorithm = filled(distance=distance)
    support, x = features(ways=ways)
    output = algorithm.adapt_features(support, seeds=SEEDS, steps=0)(x)
    for t in range(2):
        centres = torch.stack([support.x[t][support.y[t] == n].mean(0) for n in range(ways)])
        costs = np.zeros((6, ways, 4))
        for n, i, j in itertools.product(range(6), range(ways), range(4)):
            kept = algorithm.kept_prototypes[n, j]
            near = (
                F.cosine_similarity(centres[i], kept, 0) if distance == "cosine" else -((centres[i] - kept) ** 2).sum()
            )
            costs[n, i, j] = -near
        n, columns = brute(costs)
        q = x[t] / x[t].norm(dim=1, keepdim=True) if distance == "cosine" else x[t]
        expected = q @ algorithm.kept_weights[n, list(columns)].T + algorithm.kept_biases[n, list(columns)]
        assert torch.allclose(output[t], expected, rtol=1e-7 if distance == "cosine" else 1e-11)


def descended(z: Tensor, y: Tensor, head: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, ...]:
    moved = tuple(value.detach().requires_grad_() for value in head)
    for _ in range(steps):
        gradient = torch.autograd.grad(F.cross_entropy(z @ moved[0].T + moved[1], y), moved)
        moved = tuple((v - 0.05 * g).detach().requires_grad_() for v, g in zip(moved, gradient, strict=True))
    return moved


def test_fine_tuning_goes_on_from_the_recalled_head() -> None:
    algorithm = filled()
    support, x = features()
    output = algorithm.adapt_features(support, seeds=SEEDS)(x)
    start = algorithm.linear(support)
    for t in range(2):
        head = descended(support.x[t], support.y[t], (start[0][t], start[1][t]), 3)
        assert torch.allclose(output[t], x[t] @ head[0].T + head[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output, algorithm.adapt_features(support, seeds=SEEDS, steps=0)(x), atol=1e-3)


def test_prepare_keeps_whole_training_tasks_and_their_fitted_heads() -> None:
    algorithm = make(memory_tasks=35)  # more than are embedded at once
    algorithm.prepare(Source())
    for n in (0, 34):
        episode = Source().episodes(n, 1)
        z = algorithm.embed(torch.cat([episode.support.x, episode.query.x], 1)[0]).detach()
        y = torch.cat([episode.support.y, episode.query.y], 1)[0]
        centres = torch.stack([z[y == c].mean(0) for c in range(4)])
        weight, bias = descended(z, y, (2 * centres / 2.0, -(centres**2).sum(1) / 2.0), 3)  # temperature 2
        assert torch.allclose(algorithm.kept_prototypes[n], centres, rtol=1e-9, atol=1e-12)
        assert torch.allclose(algorithm.kept_weights[n], weight, rtol=1e-9, atol=1e-12)
        assert torch.allclose(algorithm.kept_biases[n], bias, rtol=1e-9, atol=1e-12)
    before = algorithm.kept_weights.clone()
    algorithm.prepare(Source())
    assert torch.equal(before, algorithm.kept_weights)


def test_a_task_that_is_kept_recalls_itself() -> None:
    algorithm = make()
    algorithm.prepare(Source())
    order = torch.tensor([2, 0, 3, 1])
    tasks, columns = algorithm.recall(algorithm.kept_prototypes[:, order])
    assert tasks.tolist() == list(range(6)) and columns.tolist() == [order.tolist()] * 6


def test_permuting_labels_permutes_the_answer() -> None:
    algorithm = filled()
    support, x = features()
    answer = algorithm.adapt_features(support, seeds=SEEDS)(x)
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 5):
        new = torch.tensor(order)
        renamed = algorithm.adapt_features(replace(support, y=new[support.y]), seeds=SEEDS)(x)
        assert torch.allclose(renamed[..., new], answer, rtol=1e-11, atol=1e-12)


def test_the_memory_survives_a_round_trip() -> None:
    algorithm = make()
    algorithm.prepare(Source())
    file = io.BytesIO()
    torch.save(algorithm.state_dict(), file)
    file.seek(0)
    clone = make()
    clone.load_state_dict(torch.load(file, weights_only=True))
    support, x = features()
    assert torch.equal(clone.adapt_features(support, seeds=SEEDS)(x), algorithm.adapt_features(support, seeds=SEEDS)(x))
    assert algorithm.kept_weights.abs().max() > 0


def test_it_is_trained_as_a_prototypical_network() -> None:
    torch.manual_seed(0)
    theirs = protonet.build(PROBLEM).double()
    ours = make().train()
    episode = Source().episodes(0, 2)
    trainers = ours.trainer(2), theirs.trainer(2)
    for _ in range(2):
        for trainer in trainers:
            trainer.step(episode)
    mine = ours.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.state_dict().items())
    assert not ours.kept_weights.any()  # the memory is prepare's


def test_fewer_ways_than_kept_but_not_more() -> None:
    algorithm = make()
    assert algorithm.unsupported(replace(PROBLEM, ways=3)) is None
    assert "4 ways" in str(algorithm.unsupported(replace(PROBLEM, ways=5)))


@pytest.mark.parametrize(
    ("name", "value"), [("memory_tasks", 0), ("temperature", 0.0), ("finetune_steps", -1), ("finetune_lr", 0.0)]
)
def test_wrong_parameters_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must"):
        make(**{name: value})
    with pytest.raises(ConfigError, match="need ways"):
        build(replace(PROBLEM, ways=None))
