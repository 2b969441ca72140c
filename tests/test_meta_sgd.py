from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import maml, meta_sgd
from metabench.algorithms.maml import Maml, flat
from metabench.algorithms.meta_sgd import MetaSgd
from metabench.backbones import Conv4, Network
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Strategy

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3)


def episode(*, tasks: int = 2, shots: int = 2, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, 3 * count, 1, 16, 16, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(3).repeat_interleave(count).expand(tasks, -1), 3)

    return Episode(support=batch(shots), query=batch(2), seeds=torch.arange(tasks))


def few_filters(norm: Any) -> Network:
    torch.manual_seed(1)
    body = Conv4((1, 16, 16), norm=norm, pool="stride", average=True, filters=3, eps=1e-3, gamma=False, glorot=True)
    network = Network(body, 3).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "beta" in name:
                parameter.normal_(std=0.3)
    return network


def small(**params: Any) -> MetaSgd:
    """With few filters, and rates of both signs."""
    made = meta_sgd.build(PROBLEM, **params).double()
    made.network = few_filters(params.get("norm", "support"))
    draw = torch.Generator().manual_seed(2)
    sizes = {n: p for n, p in made.network.named_parameters() if n in made.adapted}
    made.rates = torch.nn.ParameterDict(
        {flat(n): torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3 for n, p in sizes.items()}
    )
    return made


def gradients(model: Maml, data: Episode) -> dict[str, Tensor]:
    model.train().zero_grad()
    model.loss(data)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    difference = sum(float((got[n] - wanted[n]).square().sum()) for n in got) ** 0.5
    return difference / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5


def by_loops(model: MetaSgd, data: Episode) -> dict[str, Tensor]:
    """Every task alone, the network written out, one step at each coordinate's own rate, differentiated through."""
    meta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    net = {n.removeprefix("network.").removeprefix("backbone."): p for n, p in meta.items() if "network" in n}

    def forward(p: dict[str, Tensor], x: Tensor, stats: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        used = []
        for i in range(4):
            x = F.conv2d(x, p[f"conv{i}"], p[f"bias{i}"], stride=2, padding=1)
            if stats is None:
                mean = x.mean((0, 2, 3))
                var = ((x - mean.reshape(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
            else:
                mean, var = stats[2 * i], stats[2 * i + 1]
            used += [mean, var]
            x = (x - mean.reshape(1, -1, 1, 1)) / (var.reshape(1, -1, 1, 1) + 1e-3).sqrt()
            x = (x + p[f"beta{i}"].reshape(1, -1, 1, 1)).relu()
        return x.mean((2, 3)) @ p["head.weight"].T + p["head.bias"], used

    losses = []
    for t in range(data.support.tasks):
        names = [n for n in net if "beta" not in n]
        loss = F.cross_entropy(forward(net, data.support.x[t], None)[0], data.support.y[t])
        moves = torch.autograd.grad(loss, [net[n] for n in names], create_graph=True)
        theta = dict(net)
        for n, move in zip(names, moves, strict=True):
            rate = meta["rates." + (flat(n) if n.startswith("head") else f"backbone_{n}")]
            theta[n] = net[n] - rate * move
        stats = forward(theta, data.support.x[t], None)[1]
        losses.append(F.cross_entropy(forward(theta, data.query.x[t], stats)[0], data.query.y[t]))
    values = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()))
    return dict(zip(meta, values, strict=True))


@pytest.mark.parametrize("strategy", ["serial", "vmap", "grouped", "unfold"])
def test_outer_gradients_of_weights_and_rates_are_those_of_the_loops(strategy: Strategy) -> None:
    model, data = small(strategy=strategy), episode()
    assert relative_error(gradients(model, data), by_loops(model, data)) < 1e-10


def test_so_they_are_from_a_zero_head() -> None:
    model, data = small(), episode()
    with torch.no_grad():
        for parameter in model.network.head.parameters():
            parameter.zero_()
    wanted = by_loops(model, data)
    assert wanted["rates.head_weight"].norm() > 1e-4 and wanted["network.backbone.conv0"].norm() > 1e-4
    assert not wanted["rates.backbone_conv0"].any()  # its inner gradient passes a head of zeros
    assert relative_error(gradients(model, data), wanted) < 1e-10


@pytest.mark.parametrize("norm", ["support", "each", "tasknorm", "layer", "batch"])
@pytest.mark.parametrize("strategy", ["vmap", "grouped", "unfold"])
@pytest.mark.parametrize("adapt_norm", [False, True])
def test_every_strategy_gives_the_serial_gradients(
    norm: str, strategy: Strategy, adapt_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episode(tasks=3)
    wanted = gradients(small(norm=norm, strategy="serial", adapt_norm=adapt_norm), data)
    model = small(norm=norm, strategy=strategy, adapt_norm=adapt_norm)
    widest = model.network.backbone.widest
    monkeypatch.setattr(tasks, "CACHE", 2 * 8 * widest * data.support.x.shape[1])  # two tasks and one: chunks
    assert relative_error(gradients(model, data), wanted) < 1e-10


def test_equal_rates_are_maml() -> None:
    data = episode()
    ours = small()
    for rate in ours.rates.values():
        rate.data.fill_(0.3)
    plain = maml.build(PROBLEM, inner_loss="mean", inner_lr=0.3).double()
    plain.network = few_filters("support")
    got, wanted = gradients(ours, data), gradients(plain, data)
    assert relative_error({n: got[n] for n in wanted}, wanted) < 1e-12
    answers = [m.eval().adapt(data.support, seeds=data.seeds, steps=3)(data.query.x) for m in (ours, plain)]
    torch.testing.assert_close(*answers)


def test_a_rate_may_be_negative_and_moves_its_own_coordinate_alone() -> None:
    model, data = small().eval(), episode(tasks=1)
    for rate in model.rates.values():
        rate.data.zero_()
    model.rates["head_weight"].data[1, 2] = -0.5
    fast, _ = model._learn(model._execution(data.support.x), data.support.x, data.support.y, 1)
    params = dict(model.network.named_parameters())
    moved = {n: (fast[n][0] - params[n]).detach() for n in fast}
    leaf = params["head.weight"]
    loss = F.cross_entropy(model.network.on_support(params, data.support.x)[0], data.support.y[0])
    (gradient,) = torch.autograd.grad(loss, [leaf])
    wanted = torch.zeros_like(leaf)
    wanted[1, 2] = 0.5 * gradient[1, 2]
    assert wanted.abs().max() > 0
    torch.testing.assert_close(moved.pop("head.weight"), wanted, rtol=1e-10, atol=1e-15)
    assert all((value == 0).all() for value in moved.values())


def test_training_may_take_a_rate_below_zero() -> None:
    torch.manual_seed(0)
    model = meta_sgd.build(PROBLEM, rate_low=0.0, rate_high=1e-5).train()
    data = episode(tasks=4)
    data = replace(
        data,
        support=replace(data.support, x=data.support.x.float()),
        query=replace(data.query, x=data.query.x.float()),
    )
    trainer = model.trainer(2)
    for _ in range(2):
        trainer.step(data)
    assert all(bool((rate < 0).any()) for rate in model.rates.values() if rate.dim() > 1)  # biases have few numbers


def test_weight_decay_never_touches_the_rates() -> None:
    data, after = episode(), []
    for decay in (0.0, 0.5):
        model = small(weight_decay=decay)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.train().trainer(1).step(data)
        after.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
    rates = {n for n in after[0] if n.startswith("rates.")}
    assert len(rates) == 10 and all(torch.equal(after[0][n], after[1][n]) for n in rates)
    assert not torch.equal(after[0]["network.head.weight"], after[1]["network.head.weight"])
    groups = small(weight_decay=0.5).trainer(1).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_one_step_in_training_and_evaluation() -> None:
    model, data = small(), episode()
    one = model.adapt(data.support, seeds=data.seeds, steps=1)(data.query.x)
    for training in (False, True):
        assert torch.equal(model.train(training).adapt(data.support, seeds=data.seeds)(data.query.x), one)


def test_rates_have_the_shapes_of_what_they_move_and_start_between_the_bounds() -> None:
    model = meta_sgd.build(PROBLEM, rate_low=0.2, rate_high=0.4)
    params = dict(model.network.named_parameters())
    assert model.rates.keys() == {flat(n) for n in params if "beta" not in n}
    for name in model.adapted:
        rate = model.rates[flat(name)].detach()
        assert rate.shape == params[name].shape and 0.2 <= float(rate.min()) <= float(rate.max()) < 0.4
    weights = model.rates["backbone_conv1"].detach()
    assert float(weights.min()) < 0.21 and float(weights.max()) > 0.39
    constant = meta_sgd.build(PROBLEM, rate_low=0.3, rate_high=0.3)
    assert all(bool((rate == 0.3).all()) for rate in constant.rates.values())


def test_bounds_the_wrong_way_round() -> None:
    with pytest.raises(ConfigError, match=r"rate_low is 1.0 and rate_high 0.1: swap them"):
        meta_sgd.build(PROBLEM, rate_low=1.0)
