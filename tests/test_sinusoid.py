from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench.datasets import sinusoid
from metabench.datasets.sinusoid import SinusoidTasks
from metabench.episodes import Subset
from metabench.errors import ConfigError


def bound(
    *, split: str = "maml", subset: Subset = "test", shots: int = 10, queries: int = 100, seed: int = 0
) -> SinusoidTasks:
    data = sinusoid.build(split="reptile" if split == "reptile" else "maml")
    return data.tasks(subset, ways=None, shots=shots, queries=queries, rotations="none", seed=seed, device="cpu")


def fitted(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Amplitude, phase and the worst residual of y = A sin(x - phase), by least squares on sin x and cos x."""
    amplitudes, phases, worst = [], [], 0.0
    for xs, ys in zip(x.double().numpy()[:, :, 0], y.double().numpy()[:, :, 0], strict=True):
        design = np.stack([np.sin(xs), -np.cos(xs)], 1)
        (a, b), *_ = np.linalg.lstsq(design, ys, rcond=None)
        worst = max(worst, float(np.abs(design @ [a, b] - ys).max()))
        amplitudes.append(math.hypot(a, b))
        phases.append(math.atan2(b, a) % (2 * math.pi))
    return np.array(amplitudes), np.array(phases), worst


def test_shapes_and_problem() -> None:
    tasks = bound(shots=5)
    episode = tasks.episodes(0, 3)
    assert episode.support.x.shape == episode.support.y.shape == (3, 5, 1)
    assert episode.query.x.shape == episode.query.y.shape == (3, 100, 1)
    assert episode.support.x.dtype == episode.support.y.dtype == torch.float32
    assert episode.support.ways is None
    assert (tasks.problem.shape, tasks.problem.loss, tasks.problem.ways, tasks.problem.outputs) == (
        (1,),
        "mse",
        None,
        1,
    )


@pytest.mark.parametrize(("split", "limit"), [("maml", math.pi), ("reptile", 2 * math.pi)])
def test_tasks_are_sinusoids_with_the_stated_ranges(split: str, limit: float) -> None:
    episode = bound(split=split).episodes(0, 600)
    amplitude, phase, worst = fitted(episode.query.x, episode.query.y)
    assert worst < 1e-5
    assert amplitude.min() > 0.0999 and amplitude.max() < 5.0001
    assert phase.max() < limit + 1e-3
    # a uniform variable's mean is within 5 standard errors of its centre
    assert abs(amplitude.mean() - 2.55) < 5 * 4.9 / math.sqrt(12 * 600)
    assert abs(phase.mean() - limit / 2) < 5 * limit / math.sqrt(12 * 600)
    x = episode.query.x
    assert x.min() >= -5 and x.max() <= 5
    assert abs(float(x.mean())) < 5 * 10 / math.sqrt(12 * x.numel())
    assert x.max() > 4.99 and x.min() < -4.99


def test_support_and_query_lie_on_the_same_curve() -> None:
    episode = bound().episodes(3, 20)
    _, _, worst = fitted(
        torch.cat([episode.support.x, episode.query.x], 1), torch.cat([episode.support.y, episode.query.y], 1)
    )
    assert worst < 1e-5


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 10_000), tasks=st.integers(1, 6), inside=st.integers(0, 5))
def test_a_task_is_a_function_of_its_index_alone(start: int, tasks: int, inside: int) -> None:
    inside = min(inside, tasks - 1)
    tasks_of = bound(shots=5, queries=7)
    many, one = tasks_of.episodes(start, tasks), tasks_of.episodes(start + inside, 1)
    for a, b in ((many.support, one.support), (many.query, one.query)):
        assert torch.equal(a.x[inside], b.x[0]) and torch.equal(a.y[inside], b.y[0])
    assert many.ids[inside] == one.ids[0] and many.seeds[inside] == one.seeds[0]


def test_golden_values() -> None:
    episode = bound(shots=5, queries=3).episodes(0, 2)
    assert episode.ids == ("20ccce8eb50f7cfc", "0cac12d1eaf3f13e")
    torch.testing.assert_close(
        episode.support.x[0, :, 0],
        torch.tensor([-4.5825539, -0.2075602, 3.5130906, 1.3397294, -0.8341925]),
        rtol=0,
        atol=1e-6,
    )
    torch.testing.assert_close(
        episode.support.y[0, :, 0],
        torch.tensor([0.2859279, -0.4002552, 0.2460253, 0.1531457, -0.4195606]),
        rtol=0,
        atol=1e-6,
    )


def test_every_coordinate_changes_the_tasks() -> None:
    variants = [
        bound(),
        bound(subset="train"),
        bound(subset="val"),
        bound(seed=1),
        bound(shots=5),
        bound(split="reptile"),
    ]
    ids = [tasks.episodes(0, 4).ids for tasks in variants]
    assert len({i for group in ids for i in group}) == 4 * len(variants)


def test_classification_only_requests_are_refused() -> None:
    data = sinusoid.build()
    with pytest.raises(ConfigError, match="ways"):
        data.tasks("test", ways=5, shots=5, queries=5, rotations="none", seed=0, device="cpu")
    with pytest.raises(ConfigError, match="rotat"):
        data.tasks("test", ways=None, shots=5, queries=5, rotations="classes", seed=0, device="cpu")
    with pytest.raises(ConfigError, match="no classes"):
        bound().images(0, 3)
    with pytest.raises(ConfigError, match="no classes, so there are no streams"):
        bound().streams(0, 3, 10)
