"""The controls: each must be exactly as ignorant, or as knowing, as it says."""

from __future__ import annotations

import pytest
import torch

from metabench.algorithms import chance, oracle, pixel_nn, protonet, untrained
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

IMAGES = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
WAVES = Problem(shape=(1,), loss="mse")
SEEDS = torch.arange(2)


def support(seed: int = 0, shots: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(3).repeat(shots)[torch.randperm(3 * shots, generator=g)] for _ in range(2)])
    return Batch(torch.rand(2, 3 * shots, 1, 16, 16, generator=g, dtype=torch.float64), y, 3)


def waves(points: int, seed: int = 0) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Support, query inputs and query targets of two sinusoids."""
    g = torch.Generator().manual_seed(seed)
    amplitude = 0.1 + 4.9 * torch.rand(2, 1, 1, generator=g, dtype=torch.float64)
    phase = torch.pi * torch.rand(2, 1, 1, generator=g, dtype=torch.float64)
    x = 10 * torch.rand(2, points + 20, 1, generator=g, dtype=torch.float64) - 5
    y = amplitude * torch.sin(x - phase)
    return Batch(x[:, :points], y[:, :points], None), x[:, points:], y[:, points:]


def test_chance_prefers_no_class() -> None:
    learner = chance.build(IMAGES).adapt(support(), seeds=SEEDS)
    assert torch.equal(learner(torch.rand(2, 7, 1, 16, 16)), torch.zeros(2, 7, 3))


def test_chance_in_regression_is_the_support_mean() -> None:
    known, x, _ = waves(5)
    output = chance.build(WAVES).adapt(known, seeds=SEEDS)(x)
    assert output.shape == (2, 20, 1)
    assert torch.equal(output, known.y.mean(1, keepdim=True).expand(2, 20, 1))


def test_pixel_nn_is_brute_force() -> None:
    known, g = support(), torch.Generator().manual_seed(1)
    x = torch.rand(2, 5, 1, 16, 16, generator=g, dtype=torch.float64)
    output = pixel_nn.build(IMAGES).adapt(known, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(5):
            distances = ((known.x[t] - x[t, q]) ** 2).sum((1, 2, 3))
            for n in range(3):
                expected = -distances[known.y[t] == n].min().item()
                assert output[t, q, n].item() == pytest.approx(expected, abs=1e-10)
            assert output[t, q].argmax() == known.y[t, distances.argmin()]


def test_pixel_nn_by_cosine_is_brute_force() -> None:
    known, g = support(), torch.Generator().manual_seed(1)
    x = torch.rand(2, 5, 1, 16, 16, generator=g, dtype=torch.float64)
    output = pixel_nn.build(IMAGES, distance="cosine").adapt(known, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(5):
            a = x[t, q].flatten()
            cosines = torch.stack([(a @ b) / (a.norm() * b.norm()) for b in known.x[t].flatten(1)])
            for n in range(3):
                assert output[t, q, n].item() == pytest.approx(cosines[known.y[t] == n].max().item(), abs=1e-9)


def test_pixel_nn_ties_equal_images_of_grey_pixels_in_float32() -> None:
    known = support().x[:, :1].float()
    twice = Batch(known.expand(2, 3, 1, 16, 16), torch.arange(3).expand(2, 3), 3)
    for distance in ("sqeuclidean", "cosine"):
        output = pixel_nn.build(IMAGES, distance=distance).adapt(twice, seeds=SEEDS)(torch.rand(2, 4, 1, 16, 16))
        assert (output == output[..., :1]).all()


def test_pixel_nn_knows_its_own_support_and_ties_equal_images() -> None:
    known = support()
    output = pixel_nn.build(IMAGES).adapt(known, seeds=SEEDS)(known.x)
    assert torch.equal(output.argmax(-1), known.y)
    binary = Batch((known.x[:, :1] > 0.5).double().expand(2, 3, 1, 16, 16), torch.arange(3).expand(2, 3), 3)
    same = pixel_nn.build(IMAGES).adapt(binary, seeds=SEEDS)(binary.x)
    assert torch.equal(same, torch.zeros(2, 3, 3))  # one image under three labels: a tie of three


def test_untrained_is_a_prototypical_network_before_training() -> None:
    torch.manual_seed(5)
    control = untrained.build(IMAGES).eval()
    torch.manual_seed(5)
    network = protonet.build(IMAGES).eval()
    known = Batch(support().x.float(), support().y, 3)
    x = torch.rand(2, 4, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(control.adapt(known, seeds=SEEDS)(x), network.adapt(known, seeds=SEEDS)(x))
    assert control.feeds is None and untrained.METABENCH["control"] is True


@pytest.mark.parametrize("points", [2, 3, 10])
def test_the_oracle_recovers_every_sinusoid(points: int) -> None:
    for seed in range(20):
        known, x, y = waves(points, seed)
        error = (oracle.build(WAVES).adapt(known, seeds=SEEDS)(x) - y).abs().max()
        assert error < (1e-4 if points == 2 else 1e-8)  # two points may lie almost a period apart


def test_the_oracle_in_float32_and_with_a_single_point() -> None:
    known, x, y = waves(10)
    single = Batch(known.x.float(), known.y.float(), None)
    assert (oracle.build(WAVES).adapt(single, seeds=SEEDS)(x.float()) - y).abs().max() < 1e-4
    one = Batch(known.x[:, :1], known.y[:, :1], None)
    learner = oracle.build(WAVES).adapt(one, seeds=SEEDS)
    assert torch.allclose(learner(one.x), one.y) and learner(x).abs().max() <= known.y[:, 0].abs().max() + 1e-12


def test_the_oracle_refuses_images() -> None:
    with pytest.raises(ConfigError, match="sinusoid only"):
        oracle.build(IMAGES)
