"""The linear probe against scipy's optimisers, one task at a time, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import Tensor

from metabench.algorithms import baseline, linear_probe
from metabench.algorithms.baseline import with_bias
from metabench.algorithms.linear_probe import LinearProbe, build, logistic_regression
from metabench.algorithms.metric import unit
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)


def make(**params: object) -> LinearProbe:
    torch.manual_seed(0)
    return build(PROBLEM, **params).double().eval()  # type: ignore[arg-type, return-value]


def data(seed: int, *, tasks: int = 3, shots: int = 2, ways: int = 3, dim: int = 5) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = shots * ways
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(tasks)])
    x = torch.randn(tasks, n, dim, generator=g, dtype=torch.float64)
    return Batch(x, y, ways), torch.randn(tasks, 4, dim, generator=g, dtype=torch.float64)


def scipy_fit(x: np.ndarray, y: np.ndarray, ways: int, c: float) -> np.ndarray:
    """scikit-learn's objective, |W|^2 / 2 + C * summed cross-entropy, by trust regions with the exact Hessian."""
    n, dim = x.shape
    ones = np.concatenate([x, np.ones((n, 1))], 1)
    penalty = np.ones((dim + 1, ways))
    penalty[-1] = 0
    target = np.eye(ways)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(dim + 1, ways)
        value = (penalty * w**2).sum() / 2 - c * (target * log_softmax(ones @ w, axis=1)).sum()
        return value, (penalty * w + c * ones.T @ (softmax(ones @ w, axis=1) - target)).ravel()

    def hessian(flat: np.ndarray) -> np.ndarray:
        p = softmax(ones @ flat.reshape(dim + 1, ways), axis=1)
        blocks = np.einsum("nk,kl->nkl", p, np.eye(ways)) - p[:, :, None] * p[:, None, :]
        whole = c * np.einsum("na,nkl,nb->akbl", ones, blocks, ones).reshape(flat.size, flat.size)
        return whole + np.diag(penalty.ravel())

    w = minimize(loss, np.zeros((dim + 1) * ways), jac=True, hess=hessian, method="trust-exact").x
    for _ in range(3):  # the last digits
        w = w - np.linalg.pinv(hessian(w)) @ loss(w)[1]
    assert np.abs(loss(w)[1]).max() < 1e-12 * max(1, c)
    return w.reshape(dim + 1, ways)  # type: ignore[no-any-return]


@example(seed=0, shots=2, ways=3, c=1000.0)
@example(seed=0, shots=3, ways=4, c=0.01)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), shots=st.integers(1, 4), ways=st.integers(2, 4), c=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_fit_is_the_optimum(seed: int, shots: int, ways: int, c: float) -> None:
    support, queries = data(seed, shots=shots, ways=ways)
    output = make(c=c).adapt_features(support, seeds=torch.arange(3))(queries).log_softmax(-1)
    x, q = (z.numpy() for z in (unit(support.x), with_bias(unit(queries))))
    for t in range(3):
        head = scipy_fit(x[t], support.y[t].numpy(), ways, c)
        assert np.allclose(output[t].numpy(), log_softmax(q[t] @ head, axis=1), rtol=1e-9, atol=1e-10)


def test_unbalanced_and_contradictory_labels() -> None:
    """The free bias follows the share of the classes; equal items of two classes cannot be told apart."""
    x = torch.tensor([[[1.0, 0.0]] * 2 + [[0.6, 0.8]] * 4], dtype=torch.float64)
    support = Batch(x, torch.tensor([[0, 1, 1, 1, 2, 2]]), 3)
    output = make().adapt_features(support, seeds=torch.arange(1))(x).log_softmax(-1)
    head = scipy_fit(unit(x)[0].numpy(), support.y[0].numpy(), 3, 1.0)
    assert np.allclose(output[0].numpy(), log_softmax(with_bias(unit(x))[0].numpy() @ head, axis=1), rtol=1e-9)
    assert torch.allclose(output.exp().sum(1) / 6, torch.tensor([1.0, 3.0, 2.0]).double() / 6)  # free bias: exact


@pytest.mark.parametrize("c", [0.1, 1.0, 1000.0])
def test_a_whole_newton_step_may_be_too_long(c: float) -> None:
    """One class has most of the items, all look alike: the first full step would raise the loss."""
    g = torch.Generator().manual_seed(5)
    x = unit(torch.ones(1, 23, 5, dtype=torch.float64) + 0.1 * torch.randn(1, 23, 5, generator=g, dtype=torch.float64))
    support = Batch(x, torch.tensor([[0] * 19 + [1, 2, 3, 4]]), 5)
    output = make(c=c).adapt_features(support, seeds=torch.arange(1))(x).log_softmax(-1)
    head = scipy_fit(unit(x)[0].numpy(), support.y[0].numpy(), 5, c)
    assert np.allclose(output[0].numpy(), log_softmax(with_bias(unit(x))[0].numpy() @ head, axis=1), rtol=1e-8)


def test_features_that_are_all_the_same_tie() -> None:
    """As those of a network that has died; in float32 the largest C would leave no positive matrix."""
    support = Batch(torch.full((1, 20, 64), 0.3), torch.arange(4).repeat(5)[None], 4)
    for x in (support.x, torch.zeros_like(support.x)):
        output = make(c=1e6).adapt_features(replace(support, x=x), seeds=torch.arange(1))(x)
        assert output.dtype == torch.float32 and output.abs().max() < 1e-4


def test_the_gradient_is_zero_where_it_stops_and_it_stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _ = data(1, tasks=4, shots=5, ways=5, dim=64)
    solved: list[int] = []
    original = linear_probe._solve
    monkeypatch.setattr(linear_probe, "_solve", lambda *a: solved.append(1) or original(*a))
    x, y = with_bias(unit(support.x)), support.one_hot()
    w = logistic_regression(x, y, 1.0, 50)
    gradient = x.mT @ ((x @ w).softmax(-1) - y)
    gradient[:, :-1] += w[:, :-1]
    assert gradient.abs().max() < 1e-13 and 2 <= len(solved) <= 7


def test_a_task_does_not_depend_on_harder_ones_beside_it() -> None:
    support, queries = data(2, tasks=4)
    hard = replace(support, x=support.x.clone())
    hard.x[1:] = hard.x[1:, :1] + 1e-3 * hard.x[1:]  # almost one direction
    algorithm = make(c=100.0)
    together = algorithm.adapt_features(hard, seeds=torch.arange(4))(queries)
    one = slice(0, 1)
    among_easy = algorithm.adapt_features(support, seeds=torch.arange(4))(queries)
    assert torch.equal(together[0], among_easy[0])  # to the bit: it rests once it has arrived
    alone = algorithm.adapt_features(support.pick(one), seeds=torch.arange(1))(queries[one])
    assert torch.allclose(together[one], alone, rtol=1e-13, atol=1e-14)


def test_features_count_by_direction_only_and_seeds_not_at_all() -> None:
    support, queries = data(3)
    algorithm = make()
    output = algorithm.adapt_features(support, seeds=torch.arange(3))(queries)
    longer = algorithm.adapt_features(replace(support, x=7 * support.x), seeds=torch.arange(3) + 5)(0.1 * queries)
    assert torch.allclose(output, longer, atol=1e-6)  # but for `unit`'s guard at zero
    assert torch.equal(output, algorithm.adapt_features(support, seeds=torch.arange(3) + 9)(queries))
    assert torch.equal(algorithm.adapt_features(support, seeds=torch.arange(3), steps=0)(queries), 0 * output)


def test_it_is_trained_as_baseline_is() -> None:
    torch.manual_seed(4)
    theirs = baseline.build(PROBLEM)
    torch.manual_seed(4)
    ours = build(PROBLEM)
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(1, 10, 1, 16, 16, generator=g), torch.randint(9, (1, 10), generator=g), 9)
    trainers = ours.trainer(2), theirs.trainer(2)
    for _ in range(2):
        for trainer in trainers:
            trainer.step(batch)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("c", [0.0, -1.0, 1e9])
def test_wrong_parameters_are_named(c: float) -> None:
    with pytest.raises(ConfigError, match=r"c must be above 0 and at most .*smoother"):
        build(PROBLEM, c=c)
    with pytest.raises(ConfigError, match="classes"):
        build(replace(PROBLEM, classes=None))
