"""Training from scratch against ordinary modules and torch.optim.Adam, one task after the other, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms import scratch
from metabench.algorithms.scratch import METABENCH, Scratch, build
from metabench.backbones import Conv4, Network, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

IMAGES = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
WAVES = Problem(shape=(1,), loss="mse")
SEEDS = torch.tensor([5, 2**62 + 1])


def make(problem: Problem = IMAGES, **params: Any) -> Scratch:
    return build(problem, **params).double().eval()  # type: ignore[return-value]


def images(ways: int = 3, shots: int = 2, seed: int = 0) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = ways * shots
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(n, generator=g)] for _ in range(2)])
    x = torch.rand(2, n + 4, 1, 16, 16, generator=g, dtype=torch.float64)
    return Batch(x[:, :n], y, ways), x[:, n:]


class Plain(nn.Module):
    """The strided Conv-4 by torch's layers, batch norm by the batch or by kept statistics, with a network's weights."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        assert isinstance(network.backbone, Conv4)
        body = network.backbone
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(4):
            conv = nn.Conv2d(1 if i == 0 else 64, 64, 3, stride=2, padding=1)
            conv.weight = nn.Parameter(body.get_parameter(f"conv{i}").detach().clone())
            conv.bias = nn.Parameter(body.get_parameter(f"bias{i}").detach().clone())
            self.convs.append(conv)
            self.norms.append(nn.BatchNorm2d(64, momentum=None))
        self.head = network.head
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def trained(module: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, loss: Any) -> nn.Module:
    adam = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss(module(x), y).backward()
        adam.step()
    return module


def drawn(seed: int, outputs: int, **params: Any) -> Network:
    """What PyTorch draws after `manual_seed`."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    network = Network(make_backbone(**params), outputs)
    torch.set_rng_state(state)
    return network


@pytest.mark.parametrize("strategy", ["auto", "serial", "vmap", "grouped", "unfold"])
def test_it_is_ordinary_training_of_a_fresh_network(strategy: str) -> None:
    support, x = images()
    output = make(test_steps=4, inner_lr=1e-2, strategy=strategy).adapt(support, seeds=SEEDS)(x)
    for t in range(2):
        plain = Plain(drawn(int(SEEDS[t]), 3, name="conv4-strided", shape=(1, 16, 16), norm="support"))
        trained(plain, support.x[t], support.y[t], 4, 1e-2, F.cross_entropy)
        for norm in plain.norms:
            norm.reset_running_stats()  # type: ignore[operator]
        plain(support.x[t])  # the statistics of the support set at the trained weights...
        for norm in plain.norms:
            count = support.x.shape[1] * {0: 64, 1: 16, 2: 4, 3: 1}[list(plain.norms).index(norm)]
            norm.running_var.mul_((count - 1) / count)  # type: ignore[operator,union-attr]  # ...by n, not n - 1
        assert torch.allclose(output[t], plain.eval()(x[t]), rtol=1e-8, atol=1e-9)


def test_regression_is_ordinary_training_too() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 9, 1, generator=g, dtype=torch.float64)
    support = Batch(x[:, :5], torch.sin(9 * x[:, :5]), None)
    output = make(WAVES, test_steps=6).adapt(support, seeds=SEEDS)(x[:, 5:])
    for t in range(2):
        network = drawn(int(SEEDS[t]), 1, name="mlp", shape=(1,), norm="support")
        layers: list[nn.Module] = []
        for i in range(2):
            layer = nn.Linear(1 if i == 0 else 40, 40)
            layer.weight, layer.bias = (network.backbone.get_parameter(f"{name}{i}") for name in ("weight", "bias"))
            layers += [layer, nn.ReLU()]
        plain = nn.Sequential(*layers, network.head).double()
        trained(plain, support.x[t], support.y[t], 6, 1e-2, F.mse_loss)
        assert torch.allclose(output[t], plain(x[t, 5:]), rtol=1e-9, atol=1e-11)


def test_networks_come_from_the_tasks_own_seeds_and_no_generator_moves() -> None:
    algorithm = make()
    like = torch.zeros(1, dtype=torch.float64)
    state = torch.get_rng_state()
    params = algorithm.draw(SEEDS, like=like, outputs=3)
    assert torch.equal(state, torch.get_rng_state())
    swapped = algorithm.draw(SEEDS.flip(0), like=like, outputs=3)
    assert all(torch.equal(value, swapped[name].flip(0)) for name, value in params.items())
    assert not torch.equal(params["head.weight"][0], params["head.weight"][1])
    expected = dict(drawn(5, 3, name="conv4-strided", shape=(1, 16, 16), norm="support").named_parameters())
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name][0], value.double()) for name, value in expected.items())


def test_nothing_is_learned_before_and_nothing_kept() -> None:
    algorithm = make()
    assert algorithm.feeds is None and METABENCH["feeds"] is None and not METABENCH["control"]
    assert not list(algorithm.parameters()) and not algorithm.state_dict()
    support, x = images()
    assert not algorithm.adapt(support, seeds=SEEDS, steps=1)(x).requires_grad


def test_tasks_of_any_ways_are_answered() -> None:
    support, x = images(ways=4)
    assert make().unsupported(Problem(shape=(1, 16, 16), loss="cross_entropy", ways=4)) is None
    assert make().adapt(support, seeds=SEEDS, steps=1)(x).shape == (2, 4, 4)


def test_it_fits_its_support_set() -> None:
    support, _ = images()
    learner = make(test_steps=30, inner_lr=1e-2).adapt(support, seeds=SEEDS)
    assert torch.equal(learner(support.x).argmax(-1), support.y)


def test_defaults_by_problem_and_wrong_parameters() -> None:
    assert (make().steps, make(WAVES).steps, make(test_steps=0).steps, make().inner_lr) == (10, 200, 0, 0.01)
    for name, value, wanted in (("test_steps", -1, "negative"), ("inner_lr", 0.0, "above 0")):
        with pytest.raises(ConfigError, match=f"{name} must .*{wanted}"):
            make(**{name: value})
    with pytest.raises(ConfigError, match="needs images"):
        scratch.build(WAVES, backbone="conv4")
