from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import fomaml, maml
from metabench.algorithms.base import query_loss
from metabench.algorithms.maml import Maml
from metabench.backbones import Conv4, Network
from metabench.episodes import Batch, Episode, Problem
from metabench.tasks import Choice, Strategy

SIDE = 16  # the smallest image both poolings take
Pool = Literal["conv4", "conv4-strided"]
Norm = Literal["support", "each", "tasknorm", "layer", "batch"]


def problem(ways: int = 3) -> Problem:
    return Problem(shape=(1, SIDE, SIDE), loss="cross_entropy", ways=ways)


def episode(*, tasks: int = 2, ways: int = 3, shots: int = 2, queries: int = 2, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, ways * count, 1, SIDE, SIDE, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(ways).repeat_interleave(count).expand(tasks, -1), ways)

    return Episode(support=batch(shots), query=batch(queries), seeds=torch.arange(tasks))


def small(
    *,
    first_order: bool = False,
    backbone: Pool = "conv4-strided",
    strategy: Choice = "grouped",
    norm: Norm = "support",
    steps: int = 1,
    inner_lr: float = 0.4,
    inner_loss: Literal["per_class_sum", "mean"] = "per_class_sum",
    adapt_norm: bool = False,
) -> Maml:
    torch.manual_seed(0)
    made = (fomaml if first_order else maml).build(
        problem(),
        backbone=backbone,
        strategy=strategy,
        norm=norm,
        inner_steps=steps,
        inner_lr=inner_lr,
        inner_loss=inner_loss,
        adapt_norm=adapt_norm,
    )
    pool: Literal["max", "stride"] = "max" if backbone == "conv4" else "stride"
    average = pool == "stride"
    body = Conv4((1, SIDE, SIDE), norm=norm, pool=pool, average=average, filters=3, eps=1e-3, gamma=False, glorot=True)
    made.network = Network(body, 3)  # few filters: double precision is slow
    made = made.double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "beta" in name:
                parameter.normal_(std=0.3)  # off zero, so that nothing hides behind symmetry
    return made


def plain_forward(
    params: dict[str, Tensor], x: Tensor, pool: Pool, stats: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The network of one task written out: convolution, batch norm (no gain), ReLU, pooling in the textbook order."""
    used = []
    for i in range(4):
        stride = 1 if pool == "conv4" else 2
        x = F.conv2d(x, params[f"conv{i}"], params[f"bias{i}"], stride=stride, padding=1)
        if stats is None:
            mean = x.sum((0, 2, 3)) / (x.numel() / x.shape[1])
            spread = x - mean.reshape(1, -1, 1, 1)
            var = (spread * spread).sum((0, 2, 3)) / (x.numel() / x.shape[1])
        else:
            mean, var = stats[i]
        used.append((mean, var))
        x = (x - mean.reshape(1, -1, 1, 1)) / torch.sqrt(var.reshape(1, -1, 1, 1) + 1e-3)
        x = torch.relu(x + params[f"beta{i}"].reshape(1, -1, 1, 1))
        if pool == "conv4":
            x = F.max_pool2d(x, 2)
    features = x.flatten(1) if pool == "conv4" else x.mean((2, 3))
    return features @ params["weight"].T + params["bias"], used


def slow_outer_gradient(model: Maml, data: Episode, *, steps: int, pool: Pool, second_order: bool) -> dict[str, Tensor]:
    """The meta-gradient by explicit loops: every task alone, torch.autograd.grad with create_graph."""
    names = {
        n: n.removeprefix("network.").removeprefix("backbone.").removeprefix("head.")
        for n, _ in model.named_parameters()
    }
    meta = {names[n]: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = []
    for task in range(data.support.tasks):
        theta = dict(meta)
        fast = [n for n in theta if not n.startswith("beta")]
        for _ in range(steps):
            output, _ = plain_forward(theta, data.support.x[task], pool, None)
            shots = output.shape[0] // output.shape[1]
            loss = F.cross_entropy(output, data.support.y[task], reduction="sum") / shots
            gradients = torch.autograd.grad(loss, [theta[n] for n in fast], create_graph=second_order)
            for n, g in zip(fast, gradients, strict=True):
                theta[n] = theta[n] - 0.4 * (g if second_order else g.detach())
        _, stats = plain_forward(theta, data.support.x[task], pool, None)
        output, _ = plain_forward(theta, data.query.x[task], pool, stats)
        losses.append(F.cross_entropy(output, data.query.y[task]))
    values = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()))
    return dict(zip(names, values, strict=True))


def outer_gradient(model: Maml, data: Episode) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model.loss(data)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    difference = sum(float((got[n] - wanted[n]).square().sum()) for n in got) ** 0.5
    return difference / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5


@pytest.mark.parametrize("backbone", ["conv4", "conv4-strided"])
@pytest.mark.parametrize("strategy", ["serial", "vmap", "grouped", "unfold"])
@pytest.mark.parametrize(("first_order", "steps"), [(False, 1), (False, 3), (True, 3)])
def test_outer_gradient_is_that_of_the_slow_version(
    backbone: Pool, strategy: Strategy, first_order: bool, steps: int
) -> None:
    model = small(first_order=first_order, backbone=backbone, strategy=strategy, steps=steps)
    data = episode()
    wanted = slow_outer_gradient(model, data, steps=steps, pool=backbone, second_order=not first_order)
    assert relative_error(outer_gradient(model, data), wanted) < 1e-10


NORMS = ["support", "each", "tasknorm", "layer", "batch"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strategy", ["vmap", "grouped", "unfold"])
@pytest.mark.parametrize(
    ("backbone", "steps", "adapt_norm", "first_order"),
    [
        ("conv4-strided", 1, False, False),
        ("conv4-strided", 5, True, False),
        ("conv4-strided", 2, True, True),
        ("conv4", 5, False, False),
        ("conv4", 1, True, False),
    ],
)
def test_every_strategy_gives_the_serial_gradients(
    norm: Norm,
    strategy: Strategy,
    backbone: Pool,
    steps: int,
    adapt_norm: bool,
    first_order: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = episode(tasks=3)

    def gradient(strategy: Strategy) -> dict[str, Tensor]:
        return outer_gradient(
            small(
                norm=norm,
                strategy=strategy,
                backbone=backbone,
                steps=steps,
                adapt_norm=adapt_norm,
                first_order=first_order,
                inner_lr=0.1,
            ),
            data,
        )

    wanted = gradient("serial")
    widest = small(backbone=backbone).network.backbone.widest
    monkeypatch.setattr(tasks, "CACHE", 2 * 8 * widest * data.support.x.shape[1])  # two tasks and one: chunks
    assert relative_error(gradient(strategy), wanted) < 1e-10


@pytest.mark.parametrize("strategy", ["serial", "grouped", "unfold"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_precision_and_layout_are_the_same_training_but_for_rounding(
    strategy: Strategy, channels_last: bool
) -> None:
    data = episode()
    wanted = outer_gradient(small(strategy="serial", inner_lr=0.02), data)
    model = small(strategy=strategy, inner_lr=0.02)  # gentle: large steps blow rounding up
    model.network.backbone.channels_last = channels_last
    assert relative_error(outer_gradient(model, data), wanted) < 1e-10
    model.network.backbone.bf16 = True
    assert relative_error(outer_gradient(model, data), wanted) < 0.2


def test_tuning_settles_the_training_alone_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small(strategy="auto").train(), episode()
    trainer = model.trainer(3)
    trainer.step(data)
    assert model.settled == "auto"  # too small to matter
    monkeypatch.setattr(maml, "WORTH_MEASURING", 0)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for winner in ("grouped", "unfold"):
        monkeypatch.setattr(maml, "fastest", lambda run, candidates, w=winner: [run(c) for c in candidates] and w)
        model.tune(data)
        assert model.settled == winner and model.facts(data.support) == {"strategy": f"{winner}/2"}
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    model.settled = "grouped"
    assert model.eval().facts(data.support) == {"strategy": "unfold/2"}  # scores go by the rule
    fixed = small(strategy="serial").train()
    fixed.tune(data)
    assert fixed.settled == "auto" and fixed.facts(data.support) == {"strategy": "serial"}


def test_a_resumed_training_keeps_what_was_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maml, "WORTH_MEASURING", 0)
    model, data = small(strategy="auto").train(), episode()
    trainer = model.trainer(3)
    trainer.step(data)
    assert model.settled in ("unfold", "grouped")
    monkeypatch.setattr(maml, "fastest", lambda run, candidates: pytest.fail("measured again"))
    model.settled = "grouped"
    again = small(strategy="auto").train()
    resumed = again.trainer(3)
    resumed.load_state_dict(trainer.state_dict())
    resumed.step(data)
    assert again.settled == "grouped"


def test_first_order_gradient_is_the_query_gradient_at_the_adapted_weights() -> None:
    model, data = small(first_order=True, steps=2), episode(tasks=1)
    got = outer_gradient(model, data)
    moved = small(first_order=True, steps=2)
    fast, _ = moved._learn(moved._execution(data.support.x), data.support.x, data.support.y, 2)
    for name, parameter in moved.network.named_parameters():
        parameter.data = (fast[name][0] if name in fast else parameter).detach().clone()
    output = moved.adapt(data.support, seeds=data.seeds, steps=0)(data.query.x)
    query_loss(moved.problem, output, data.query)[0].backward()
    wanted = {n: p.grad for n, p in moved.named_parameters() if p.grad is not None}
    assert relative_error(got, wanted) < 1e-10


def test_first_and_second_order_differ_in_gradient_but_not_in_loss() -> None:
    first, second, data = small(first_order=True), small(), episode()
    assert torch.equal(first.train().loss(data)[0], second.train().loss(data)[0])
    assert relative_error(outer_gradient(first, data), outer_gradient(second, data)) > 1e-2


def test_rate_on_the_sum_over_classes_is_ways_times_the_rate_on_the_mean() -> None:
    data = episode()
    summed = small(inner_lr=0.4, inner_loss="per_class_sum").eval()
    mean = small(inner_lr=0.4 * 3, inner_loss="mean").eval()
    gentle = small(inner_lr=0.4, inner_loss="mean").eval()
    outputs = [m.adapt(data.support, seeds=data.seeds)(data.query.x) for m in (summed, mean, gentle)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


def test_norm_shifts_are_meta_learned_but_not_adapted() -> None:
    data = episode()
    model = small()
    fast, _ = model._learn(model._execution(data.support.x), data.support.x, data.support.y, 1)
    assert not any("beta" in name for name in fast)
    gradient = outer_gradient(model, data)
    assert all(gradient[f"network.backbone.beta{i}"].abs().max() > 0 for i in range(4))
    fast, _ = (full := small(adapt_norm=True))._learn(
        full._execution(data.support.x), data.support.x, data.support.y, 1
    )
    assert (fast["backbone.beta3"][0] - full.network.backbone.get_parameter("beta3")).abs().max() > 0
    assert "network.backbone.gamma0" not in dict(model.named_parameters())


@pytest.mark.parametrize("norm", ["support", "each", "tasknorm", "layer"])
def test_inductive_norms_answer_each_query_alone(norm: Literal["support", "each", "tasknorm", "layer"]) -> None:
    model, data = small(norm=norm).eval(), episode(queries=3)
    learner = model.adapt(data.support, seeds=data.seeds)
    together = learner(data.query.x)
    alone = torch.cat([learner(data.query.x[:, i : i + 1]) for i in range(9)], 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_batch_norm_over_queries_is_transductive() -> None:
    model, data = small(norm="batch").eval(), episode()
    learner = model.adapt(data.support, seeds=data.seeds)
    assert (learner(data.query.x)[:, :3] - learner(data.query.x[:, :3])).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", ["serial", "vmap", "grouped", "unfold"])
def test_without_grad_the_answer_is_the_same_and_detached(strategy: Strategy) -> None:
    model, data = small(strategy=strategy, steps=2).train(), episode()
    graphed = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    with torch.no_grad():
        bare = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    assert graphed.requires_grad and not bare.requires_grad
    torch.testing.assert_close(graphed.detach(), bare, rtol=1e-10, atol=1e-12)


def test_steps_default_to_the_mode_and_may_be_overridden() -> None:
    data = episode()
    model = small(steps=1)
    assert model.test_steps == 3
    at = {n: model.adapt(data.support, seeds=data.seeds, steps=n)(data.query.x) for n in (0, 1, 3)}
    assert torch.equal(model.train().adapt(data.support, seeds=data.seeds)(data.query.x), at[1])
    assert torch.equal(model.eval().adapt(data.support, seeds=data.seeds)(data.query.x), at[3])
    assert torch.equal(model.initial(data.support, seeds=data.seeds)(data.query.x), at[0])
    assert len({float(v.detach().sum()) for v in at.values()}) == 3


def test_a_step_of_the_trainer_moves_every_parameter_that_has_a_gradient() -> None:
    model = small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = model.train().trainer(10)
    figures = trainer.step(episode())
    assert figures.keys() == {"loss", "accuracy"} and not any(v.requires_grad for v in figures.values())
    assert all((p - before[n]).abs().max() > 0 for n, p in model.named_parameters() if "conv" in n or "beta" in n)


def test_defaults_follow_the_problem() -> None:
    classes = maml.build(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=5))
    assert (classes.inner_lr, classes.train_steps, classes.test_steps) == (0.4, 1, 3)
    assert sum(p.numel() for p in classes.parameters()) == 576 + 3 * 36_864 + 4 * 64 + 4 * 64 + 64 * 5 + 5
    assert 0.8 < float(classes.network.head.weight.detach().std()) < 1.2
    curve = maml.build(Problem(shape=(1,), loss="mse"))
    assert (curve.inner_lr, curve.train_steps, curve.test_steps) == (0.01, 1, 10)
    assert sum(p.numel() for p in curve.parameters()) == 80 + 1640 + 41


def test_other_ways_are_unsupported_with_a_reason() -> None:
    model = small()
    assert model.unsupported(problem(3)) is None
    assert "3 ways" in str(model.unsupported(problem(5)))
    assert model.unsupported(Problem(shape=(1,), loss="mse")) is not None


def test_cosine_schedule_ends_at_zero() -> None:
    model = maml.build(Problem(shape=(1,), loss="mse"), schedule="cosine", lr=0.01)
    trainer = model.train().trainer(4)
    x = torch.linspace(-1, 1, 6).reshape(1, 6, 1)
    data = Episode(Batch(x, x.sin(), None), Batch(x, x.cos(), None), torch.zeros(1, dtype=torch.int64))
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step(data)
    assert rates[0] == 0.01 and rates == sorted(rates, reverse=True)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_inner_steps_on_regression_reduce_the_support_error() -> None:
    torch.manual_seed(0)
    model = maml.build(Problem(shape=(1,), loss="mse")).eval()
    x = torch.linspace(-5, 5, 10).reshape(1, 10, 1)
    support = Batch(x, 2 * x.sin(), None)
    errors = [
        float(F.mse_loss(model.adapt(support, seeds=torch.zeros(1, dtype=torch.int64), steps=n)(x), support.y).detach())
        for n in (0, 5, 50)
    ]
    assert errors[0] > errors[1] > errors[2]
