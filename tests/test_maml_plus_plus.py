from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import maml, maml_plus_plus
from metabench.algorithms.maml import Maml, flat
from metabench.algorithms.maml_plus_plus import MamlPlusPlus
from metabench.backbones import Conv4, Network
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Strategy

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3)
OFF: dict[str, Any] = {
    "multi_step": 0.0,
    "first_order": 0.0,
    "step_norm": False,
    "learned_rates": False,
    "schedule": "constant",
    "slope": 0.0,
}
NORMS = ["support", "each", "tasknorm", "layer", "batch"]


def episode(*, tasks: int = 2, shots: int = 2, queries: int = 2, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, 3 * count, 1, 16, 16, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(3).repeat_interleave(count).expand(tasks, -1), 3)

    return Episode(support=batch(shots), query=batch(queries), seeds=torch.arange(tasks))


def few_filters(norm: Any, *, gamma: bool, slope: float, pool: Any) -> Network:
    torch.manual_seed(1)
    body = Conv4(
        (1, 16, 16),
        norm=norm,
        pool=pool,
        average=pool == "stride",
        filters=3,
        eps=1e-3,
        gamma=gamma,
        glorot=True,
        slope=slope,
    )
    return Network(body, 3).double()


def small(*, pool: str = "max", **params: Any) -> MamlPlusPlus:
    """With few filters; gains, shifts and rates all unlike each other, so that each must be in its place."""
    made = maml_plus_plus.build(PROBLEM, **params)
    step_norm = params.get("step_norm", True)
    network = few_filters(params.get("norm", "support"), gamma=step_norm, slope=params.get("slope", 0.01), pool=pool)
    names = [n.removeprefix("network.") for n in made.state_dict() if n.startswith("network.")]
    if step_norm:
        maml_plus_plus._repeat(network, made.own)
    assert sorted(names) == sorted(network.state_dict())
    made.network = network
    made = made.double()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(word in name for word in ("beta", "gamma", "rates")):
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1)
    return made


def at(model: MamlPlusPlus, progress: float) -> MamlPlusPlus:
    model.total.fill_(1000)
    model.done.fill_(round(1000 * progress))
    return model


def gradients(model: Maml, data: Episode) -> dict[str, Tensor]:
    model.train().zero_grad()
    model.loss(data)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    difference = sum(float((got[n] - wanted[n]).square().sum()) for n in got) ** 0.5
    return difference / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5


def forward(
    p: dict[str, Tensor], x: Tensor, row: int, slope: float, stats: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """The max-pool network of one task written out, in the textbook order, with the batch norm of pass `row`."""
    used = []
    for i in range(4):
        x = F.conv2d(x, p[f"conv{i}"], p[f"bias{i}"], padding=1)
        if stats is None:
            mean = x.mean((0, 2, 3))
            var = ((x - mean.reshape(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
        else:
            mean, var = stats[2 * i], stats[2 * i + 1]
        used += [mean, var]
        x = (x - mean.reshape(1, -1, 1, 1)) / (var.reshape(1, -1, 1, 1) + 1e-3).sqrt()
        x = x * p[f"gamma{i}"][row].reshape(1, -1, 1, 1) + p[f"beta{i}"][row].reshape(1, -1, 1, 1)
        x = F.max_pool2d(torch.where(x > 0, x, slope * x), 2)
    return x.flatten(1) @ p["head.weight"].T + p["head.bias"], used


def by_loops(
    model: MamlPlusPlus, data: Episode, weights: list[float], *, second_order: bool
) -> tuple[float, dict[str, Tensor]]:
    """The multi-step loss and its gradients, task by task: step s uses its own rates, gains and shifts."""
    meta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    net = {n.removeprefix("network.").removeprefix("backbone."): p for n, p in meta.items() if "network" in n}
    adapted = [n for n in net if not n.startswith(("gamma", "beta"))]
    losses = []
    for t in range(data.support.tasks):
        theta = dict(net)
        for s, weight in enumerate(weights):
            loss = F.cross_entropy(forward(theta, data.support.x[t], s, 0.01, None)[0], data.support.y[t])
            moves = torch.autograd.grad(loss, [theta[n] for n in adapted], create_graph=True)
            theta = dict(theta)
            for n, move in zip(adapted, moves, strict=True):
                rate = meta["rates." + (flat(n) if n.startswith("head") else f"backbone_{n}")][s]
                theta[n] = theta[n] - rate * (move if second_order else move.detach())
            stats = forward(theta, data.support.x[t], s, 0.01, None)[1]
            output, _ = forward(theta, data.query.x[t], s, 0.01, stats)
            losses.append(weight * F.cross_entropy(output, data.query.y[t]))
    total = torch.stack(losses).sum() / data.support.tasks
    values = torch.autograd.grad(total, list(meta.values()), allow_unused=True)
    return float(total.detach()), {n: g for n, g in zip(meta, values, strict=True) if g is not None}


@pytest.mark.parametrize("strategy", ["serial", "vmap", "grouped", "unfold"])
@pytest.mark.parametrize(
    ("progress", "weights", "second_order"),
    [
        (0.0, [1 / 3, 1 / 3, 1 / 3], False),
        (0.05, [1 / 6, 1 / 6, 2 / 3], False),
        (0.099, [0.01, 0.01, 0.98], False),
        (0.1, [0.0, 0.0, 1.0], False),
        (0.5, [0.0, 0.0, 1.0], True),
    ],
)
def test_loss_and_gradients_are_those_of_the_loops(
    strategy: Strategy, progress: float, weights: list[float], second_order: bool
) -> None:
    model, data = at(small(inner_steps=3, strategy=strategy), progress), episode()
    loss, wanted = by_loops(model, data, weights, second_order=second_order)
    assert float(model.train().loss(data)[0].detach()) == pytest.approx(loss, rel=1e-10)
    assert relative_error(gradients(model, data), wanted) < 1e-10


@pytest.mark.parametrize(
    ("progress", "weights", "second_order"), [(0.0, [1 / 3, 1 / 3, 1 / 3], False), (0.5, [0.0, 0.0, 1.0], True)]
)
def test_so_they_are_from_a_zero_head(progress: float, weights: list[float], second_order: bool) -> None:
    model, data = at(small(inner_steps=3), progress), episode()
    with torch.no_grad():
        for parameter in model.network.head.parameters():
            parameter.zero_()
    loss, wanted = by_loops(model, data, weights, second_order=second_order)
    assert float(model.train().loss(data)[0].detach()) == pytest.approx(loss, rel=1e-10)
    assert wanted["network.backbone.conv0"].norm() > 1e-4
    assert relative_error(gradients(model, data), wanted) < 1e-10


@pytest.mark.parametrize("second_order", [False, True])
def test_the_multi_step_loss_is_exact_in_the_second_order_too(second_order: bool) -> None:
    model, data = small(inner_steps=2, first_order=0.0 if second_order else 1.0), episode()
    _, wanted = by_loops(model, data, [0.5, 0.5], second_order=second_order)
    assert relative_error(gradients(model, data), wanted) < 1e-10


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strategy", ["vmap", "grouped", "unfold"])
@pytest.mark.parametrize("adapt_norm", [False, True])
@pytest.mark.parametrize("progress", [0.05, 0.7])
def test_every_strategy_gives_the_serial_gradients(
    norm: str, strategy: Strategy, adapt_norm: bool, progress: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episode(tasks=3)
    params = {"norm": norm, "adapt_norm": adapt_norm, "inner_steps": 2, "first_order": 0.0, "pool": "stride"}
    wanted = gradients(at(small(strategy="serial", **params), progress), data)
    model = at(small(strategy=strategy, **params), progress)
    monkeypatch.setattr(tasks, "CACHE", 2 * 8 * model.network.backbone.widest * 6)  # two tasks and one: chunks
    assert relative_error(gradients(model, data), wanted) < 1e-10


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_with_all_off_it_is_maml(norm: Any, training: bool) -> None:
    data = episode()
    same: dict[str, Any] = {"backbone": "conv4", "norm": norm, "inner_steps": 3, "test_steps": 4, "inner_lr": 0.2}
    torch.manual_seed(0)
    ours = maml_plus_plus.build(PROBLEM, **same, **OFF, inner_loss="mean", head_init="normal").double()
    torch.manual_seed(0)
    plain = maml.build(PROBLEM, **same, inner_loss="mean").double()
    assert ours.state_dict().keys() - {"done", "total"} == plain.state_dict().keys()
    for model in (ours, plain):
        model.train(training)
    answers = [m.adapt(data.support, seeds=data.seeds)(data.query.x) for m in (ours, plain)]
    assert torch.equal(*answers)
    if training:
        trainers = [m.trainer(5) for m in (ours, plain)]
        for seed in range(2):
            for trainer in trainers:
                trainer.step(episode(seed=seed))
        assert all(torch.equal(v, ours.state_dict()[n]) for n, v in plain.state_dict().items())


@pytest.mark.parametrize("addition", [name for name in OFF if name != "schedule"])
def test_each_addition_matters_alone(addition: str) -> None:
    data = episode()
    torch.manual_seed(0)
    plain = maml_plus_plus.build(PROBLEM, **OFF, inner_steps=2).double()
    torch.manual_seed(0)
    one = maml_plus_plus.build(PROBLEM, **{k: v for k, v in OFF.items() if k != addition}, inner_steps=2).double()
    trainers = [m.train().trainer(10) for m in (plain, one)]
    for seed in range(2):
        for trainer in trainers:
            trainer.step(episode(seed=seed))
    answers = [m.eval().adapt(data.support, seeds=data.seeds)(data.query.x) for m in (plain, one)]
    assert (answers[0] - answers[1]).abs().max() > 1e-6


def test_annealing_of_the_multi_step_loss() -> None:
    model = maml_plus_plus.build(PROBLEM, multi_step=0.2)
    seen = {p: at(model, p).weights() for p in (0.0, 0.1, 0.19, 0.195, 0.199, 0.2, 0.5, 1.0)}
    assert seen[0.0] == pytest.approx([0.2] * 5)
    assert seen[0.1] == pytest.approx([0.1] * 4 + [0.6])
    assert seen[0.195] == seen[0.199] == pytest.approx([0.006] * 4 + [0.976])  # 0.03 / 5 is the floor
    assert seen[0.2] == seen[0.5] == seen[1.0] == [1.0]
    assert all(sum(weights) == pytest.approx(1) for weights in seen.values())
    assert maml_plus_plus.build(PROBLEM, inner_steps=1).weights() == [1.0]
    assert maml_plus_plus.build(PROBLEM, multi_step=0.0).weights() == [1.0]


def test_derivatives_of_the_second_order_begin_with_their_share_of_the_training() -> None:
    model, data = small(inner_steps=2), episode()
    first, second = (gradients(small(inner_steps=2, first_order=share), data) for share in (1.0, 0.0))
    assert relative_error(first, second) > 1e-3
    trainer = model.train().trainer(4)
    orders = []
    for _ in range(4):
        orders.append(model._differentiates())
        trainer.step(data)
    assert orders == [False, False, True, True]
    assert model.eval()._differentiates()  # a training is nothing to evaluation


def test_the_outer_rate_follows_a_cosine_to_a_hundredth() -> None:
    model = small(inner_steps=1, lr=0.01)
    trainer, rates = model.train().trainer(4), []
    for _ in range(5):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        if len(rates) < 5:
            trainer.step(episode())
    assert rates == pytest.approx([0.01, 0.0001 + 0.0099 * 0.8535533906, 0.00505, 0.0001 + 0.0099 * 0.1464466094, 1e-4])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_training_resumed_in_any_phase_ends_with_the_same_bits(stop: int) -> None:
    def fresh() -> MamlPlusPlus:
        return small(inner_steps=2, multi_step=0.4, first_order=0.6).train()

    def run(trainer: Any, first: int, last: int) -> list[float]:
        return [float(trainer.step(episode(seed=seed))["loss"]) for seed in range(first, last)]

    whole = fresh()
    run(whole.trainer(8), 0, 8)
    begun = fresh()
    trainer = begun.trainer(8)
    run(trainer, 0, stop)
    state = copy.deepcopy((begun.state_dict(), trainer.state_dict()))
    resumed = fresh()
    trainer = resumed.trainer(8)
    resumed.load_state_dict(state[0])
    trainer.load_state_dict(state[1])
    run(trainer, stop, 8)
    assert resumed.progress() == 1.0
    assert all(torch.equal(v, resumed.state_dict()[n]) for n, v in whole.state_dict().items())


def test_only_a_step_of_the_trainer_moves_the_training_on() -> None:
    model, data = small(inner_steps=1).train(), episode()
    trainer = model.trainer(10)
    model.loss(data)
    assert (int(model.done), int(model.total), model.progress()) == (0, 0, 0.0)
    trainer.step(data)
    assert (int(model.done), int(model.total), model.progress()) == (1, 10, 0.1)


def test_every_step_has_rates_gains_and_shifts_of_its_own_and_batch_norm_is_not_adapted() -> None:
    model, data = small(inner_steps=3), episode()
    assert model.rates is not None
    assert {tuple(rate.shape) for rate in model.rates.values()} == {(3,)}
    assert model.rates.keys() == {flat(n) for n in model.adapted}
    assert not any("gamma" in n or "beta" in n for n in model.adapted)
    body = model.network.backbone
    assert body.get_parameter("gamma2").shape == body.get_parameter("beta2").shape == (3, 3)
    got = gradients(at(model, 0.05), data)
    for name, value in got.items():  # no step's row is without use
        if "rates" in name:
            assert (value != 0).all() or "bias" in name  # batch norm hides biases of convolutions
        if "gamma" in name or "beta" in name:
            assert (value.abs().sum(1) > 0).all()


def test_no_running_statistics_and_inductive_by_default() -> None:
    model, data = small(inner_steps=2).eval(), episode(queries=3)
    assert {n for n, _ in model.named_buffers()} == {"done", "total"}
    learner = model.adapt(data.support, seeds=data.seeds)
    alone = torch.cat([learner(data.query.x[:, i : i + 1]) for i in range(9)], 1)
    torch.testing.assert_close(learner(data.query.x), alone, rtol=0, atol=1e-12)
    transductive = small(inner_steps=2, norm="batch").eval().adapt(data.support, seeds=data.seeds)
    assert (transductive(data.query.x)[:, :3] - transductive(data.query.x[:, :3])).abs().max() > 1e-3


def test_steps_beyond_those_of_the_training_are_as_its_last() -> None:
    model, data = small(inner_steps=2).eval(), episode()
    more = small(inner_steps=4).eval()
    state = model.state_dict()
    for name in state:
        if any(word in name for word in ("rates", "gamma", "beta")):
            state[name] = torch.cat([state[name], state[name][-1:], state[name][-1:]])
    more.load_state_dict(state)
    answers = [m.adapt(data.support, seeds=data.seeds, steps=4)(data.query.x) for m in (model, more)]
    assert torch.equal(*answers)
    before = model.adapt(data.support, seeds=data.seeds, steps=0)(data.query.x)
    assert torch.isfinite(before).all()


def test_defaults_are_the_papers() -> None:
    torch.manual_seed(0)
    model = maml_plus_plus.build(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=5))
    assert (model.train_steps, model.test_steps, model.inner_lr) == (5, 5, 0.1)
    assert (model.multi_step, model.first_order) == (0.1, 0.5)
    assert model.network.backbone.name == "conv4"
    assert sum(p.numel() for p in model.parameters()) == 576 + 3 * 36_864 + 4 * 64 * (1 + 2 * 5) + 325 + 10 * 5
    assert maml_plus_plus.METABENCH["train"] == {"tasks": 8}
    assert (model.inner_loss, model.lr, model.schedule) == ("mean", 1e-3, "cosine")
    assert isinstance(model.network.backbone, Conv4) and model.network.backbone.slope == 0.01
    assert not any("gamma" in n or "beta" in n for n in model.adapted)  # batch norm stays out of the inner loop
    assert model.rates is not None and all(torch.equal(r, torch.full((5,), 0.1)) for r in model.rates.values())
    head, bound = model.network.head, (6 / (64 + 5)) ** 0.5  # Xavier uniform
    assert 0.95 * bound < float(head.weight.detach().abs().max()) <= bound and not head.bias.any()
    twenty = maml_plus_plus.build(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=20))
    assert (twenty.train_steps, twenty.test_steps, twenty.inner_lr) == (5, 5, 0.1)
    curve = maml_plus_plus.build(Problem(shape=(1,), loss="mse"))
    assert curve.inner_lr == 0.01 and curve.network.backbone.name == "mlp"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"multi_step": 1.5}, "multi_step is a share of the training, from 0 to 1, not 1.5"),
        ({"first_order": -0.1}, "first_order is a share"),
        ({"inner_steps": 0}, "inner_steps must be at least 1, not 0"),
    ],
)
def test_wrong_parameters_say_what_to_do(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        maml_plus_plus.build(PROBLEM, **params)
