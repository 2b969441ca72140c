from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import lstm_metalearner
from metabench.algorithms.base import query_loss
from metabench.algorithms.lstm_metalearner import LstmMetaLearner, preprocess
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Strategy

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3)
STRATEGIES = ["serial", "vmap", "grouped", "unfold"]


def episode(*, tasks: int = 2, shots: int = 1, queries: int = 2, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, 3 * count, 1, 16, 16, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(3).repeat_interleave(count).expand(tasks, -1), 3)

    return Episode(support=batch(shots), query=batch(queries), seeds=torch.arange(tasks))


def small(*, wild: bool = True, **params: Any) -> LstmMetaLearner:
    """With 3 filters; `wild`: weights of the meta-learner large enough for each of them to matter."""
    torch.manual_seed(0)
    made = lstm_metalearner.build(PROBLEM, **{"filters": 3, **params}).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "beta" in name or "gamma" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if wild and name.startswith("gates") and name != "gates.gate_bias":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def coordinate(number: float) -> list[float]:
    """The paper's two numbers for one loss or one coordinate of a gradient, p = 10."""
    if abs(number) >= math.exp(-10):
        return [math.log(abs(number)) / 10, math.copysign(1.0, number)]
    return [-1.0, math.exp(10) * number]


def network(theta: dict[str, Tensor], x: Tensor, averages: dict[str, Tensor] | None, momentum: float | None) -> Tensor:
    """The learner by PyTorch's own layers. With a momentum, batch norm moves its averages; without one it uses them."""
    for i in range(4):
        x = F.conv2d(x, theta[f"backbone.conv{i}"], theta[f"backbone.bias{i}"], padding=1)
        moving = (None, None) if averages is None else (averages[f"mean{i}"], averages[f"var{i}"])
        batch = averages is None or momentum is not None
        shift = theta[f"backbone.gamma{i}"], theta[f"backbone.beta{i}"]
        x = F.max_pool2d(F.batch_norm(x, *moving, *shift, batch, momentum or 0.0, 1e-3).relu(), 2)
    return F.linear(x.flatten(1), theta["head.weight"], theta["head.bias"])


def by_loops(model: LstmMetaLearner, data: Episode, *, steps: int, momentum: float, divide: float = 1.0) -> Tensor:
    """Logits (T, m, ways): one task after the other, parameter by parameter, with torch.nn.LSTMCell."""
    cell, weight, bias = model.gates.lstm, model.gates.gate_weight, model.gates.gate_bias
    answers = []
    for t in range(data.support.tasks):
        theta = dict(model.network.named_parameters())
        zeros = {n: torch.zeros(v.numel(), 20, dtype=torch.float64) for n, v in theta.items()}
        memory = {n: (z, z, torch.zeros(len(z)).double(), torch.zeros(len(z)).double()) for n, z in zeros.items()}
        averages = {f"mean{i}": torch.zeros(3).double() for i in range(4)}
        averages |= {f"var{i}": torch.ones(3).double() for i in range(4)}
        for _ in range(steps):
            leaves = {n: v.detach().requires_grad_() for n, v in theta.items()}
            loss = F.cross_entropy(network(leaves, data.support.x[t], averages, momentum), data.support.y[t])
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            new = {}
            for (n, value), gradient in zip(theta.items(), gradients, strict=True):
                slope, flat = gradient.flatten() / divide, value.flatten()
                rows = [coordinate(loss.item()) + coordinate(g) for g in slope.tolist()]
                inputs = torch.tensor(rows, dtype=torch.float64)
                h, c, f, i = memory[n]
                h, c = cell(inputs, (h, c))
                f = torch.cat([h, flat[:, None], f[:, None]], 1) @ weight[0] + bias[0]
                i = torch.cat([h, flat[:, None], i[:, None]], 1) @ weight[1] + bias[1]
                memory[n] = (h, c, f, i)
                new[n] = (torch.sigmoid(f) * flat - torch.sigmoid(i) * slope).reshape(value.shape)
            theta = new
        answers.append(network(theta, data.query.x[t], None if model.training else averages, None))
    return torch.stack(answers)


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    difference = sum(float((got[n] - wanted[n]).square().sum()) for n in got) ** 0.5
    return difference / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5


def gradients(model: LstmMetaLearner, output: Tensor, data: Episode) -> dict[str, Tensor]:
    model.zero_grad()
    query_loss(PROBLEM, output, data.query)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("training", "shots", "steps", "momentum"), [(True, 1, 3, 0.9), (False, 2, 3, 0.95)])
def test_answers_and_outer_gradients_are_those_of_the_loops(
    strategy: Strategy, training: bool, shots: int, steps: int, momentum: float
) -> None:
    """Also that losses and gradients are constants: the loops detach them."""
    model, data = small(strategy=strategy, inner_steps=steps).train(training), episode(shots=shots)
    wanted = by_loops(model, data, steps=steps, momentum=momentum)
    got = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    slow = {n: g.clone() for n, g in gradients(model, wanted, data).items()}
    assert slow.keys() == dict(model.named_parameters()).keys()
    assert relative_error(gradients(model, got, data), slow) < 1e-10


@pytest.mark.parametrize("strategy", ["vmap", "grouped", "unfold"])
@pytest.mark.parametrize("norm", ["support", "batch"])
@pytest.mark.parametrize("training", [False, True])
def test_every_strategy_gives_the_serial_gradients(
    strategy: Strategy, norm: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = episode(tasks=3), []
    for choice in ("serial", strategy):
        model = small(strategy=choice, norm=norm, inner_steps=4).train(training)
        if choice == strategy:  # two tasks and one: chunks
            monkeypatch.setattr(tasks, "CACHE", 2 * 8 * model.network.backbone.widest * 3)
        output = model.adapt(data.support, seeds=data.seeds)(data.query.x)
        found.append({n: g.clone() for n, g in gradients(model, output, data).items()})
    assert relative_error(found[1], found[0]) < 1e-10


def test_chunks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small().eval(), episode(tasks=3)
    whole = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    monkeypatch.setattr(lstm_metalearner, "COORDINATES", 1)
    assert model._execution(data.support.x).chunk == 1
    torch.testing.assert_close(model.adapt(data.support, seeds=data.seeds)(data.query.x), whole)


@pytest.mark.parametrize("number", [0.0, 1.0, -1.0, 3e-5, -3e-5, 5e-5, -123.4, math.exp(-10), 1e-300])
def test_preprocessing_is_the_papers(number: float) -> None:
    got = preprocess(torch.tensor([[number]], dtype=torch.float64))
    torch.testing.assert_close(got[0, :, 0], torch.tensor(coordinate(number), dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_gradient_of_zero_takes_the_branch_of_small_numbers() -> None:
    assert preprocess(torch.zeros(2, 1)).tolist() == [[[-1.0], [0.0]], [[-1.0], [0.0]]]
    model, data = small(), episode()
    with torch.no_grad():
        model.network.backbone.get_parameter("beta3").fill_(-100.0)  # the last ReLU is dead: so is all before it
    output = model.train().adapt(data.support, seeds=data.seeds)(data.query.x)
    found = gradients(model, output, data)
    assert torch.isfinite(output).all() and all(bool(torch.isfinite(g).all()) for g in found.values())


def test_coordinates_keep_their_order_from_parameters_to_theta_to_gradient_and_back() -> None:
    model, data = small(), episode(tasks=1)
    params = dict(model.network.named_parameters())
    theta = torch.cat([value.flatten() for value in params.values()])[None]
    assert all(torch.equal(value[0], params[n]) for n, value in model._named(theta).items())
    execution = model._execution(data.support.x)
    gradient, _ = execution.gradient_and_more(
        lambda p: model._support_loss(p["theta"], data.support.x, data.support.y), {"theta": theta}
    )
    loss = F.cross_entropy(network(params, data.support.x[0], None, None), data.support.y[0])
    wanted = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    got = model._named(gradient["theta"])
    assert len({tuple(v.shape) for v in wanted.values()}) > 3
    assert relative_error({n: v[0] for n, v in got.items()}, wanted) < 1e-10


def test_it_starts_as_gradient_descent_at_a_rate_of_about_a_hundredth() -> None:
    model = small(wild=False)
    theta, gradient = torch.randn(2, 50).double(), torch.randn(2, 50).double()
    moved, _ = model.gates(theta, torch.ones(2).double(), gradient, model.gates.start(theta))
    kept, rate = torch.sigmoid(model.gates.gate_bias.detach()).tolist()
    assert 0.98 < kept < 0.9934 and 0.0066 < rate < 0.0181
    torch.testing.assert_close(moved.detach(), kept * theta - rate * gradient, rtol=0, atol=0.03 * rate * 4)
    for shift, wanted in ((10.0, theta), (-10.0, 0 * theta)):  # the forget gate keeps theta, the input gate moves it
        with torch.no_grad():
            model.gates.gate_bias.copy_(torch.tensor([shift, -30.0]))
        left, _ = model.gates(theta, torch.ones(2).double(), gradient, model.gates.start(theta))
        torch.testing.assert_close(left.detach(), wanted, rtol=0, atol=1e-3)


def test_an_input_gate_of_the_wrong_sign_throws_the_learner_about_at_once() -> None:
    data = episode()
    changes, rises = [], []
    for bias in (-4.5, 4.5):
        model = small(wild=False).train()
        with torch.no_grad():
            model.gates.gate_bias[1] = bias
            execution = model._execution(data.support.x)
            start, end = (model._learn(execution, data.support.x, data.support.y, n, 0.9)[0] for n in (0, 2))
            losses = [model._support_loss(theta, data.support.x, data.support.y)[0] for theta in (start, end)]
        changes.append(float((end - start).norm() / start.norm()))
        rises.append(float(losses[1] - losses[0]))
    assert changes[0] < 0.05 < 1 < changes[1]
    assert rises[0] < 0 < rises[1]


def test_statistics_begin_anew_for_each_task_and_never_see_a_query() -> None:
    model, data = small().eval(), episode(queries=3)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    learner = model.adapt(data.support, seeds=data.seeds)
    together = learner(data.query.x)
    alone = torch.cat([learner(data.query.x[:, i : i + 1]) for i in range(9)], 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    second = data.support.pick(slice(1, 2))
    torch.testing.assert_close(model.adapt(second, seeds=data.seeds[1:])(data.query.x[1:]), together[1:])
    assert not list(model.buffers()) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    training = model.train().adapt(data.support, seeds=data.seeds)(data.query.x)
    assert (training - together).abs().max() > 1e-3  # the training's queries have their own statistics
    transductive = small(norm="batch").eval().adapt(data.support, seeds=data.seeds)(data.query.x)
    torch.testing.assert_close(transductive, training)


def test_momentum_is_the_share_of_the_newest_statistics() -> None:
    data = episode()
    newest, mixed, old = (
        small(momentum=m).eval().adapt(data.support, seeds=data.seeds)(data.query.x) for m in (1.0, 0.9, 1e-9)
    )
    assert (mixed - newest).abs().max() < (mixed - old).abs().max()


def test_dividing_twice_is_the_authors_code() -> None:
    data = episode(shots=2)
    model = small(divide_twice=True, inner_steps=2).train()
    wanted = by_loops(model, data, steps=2, momentum=0.95, divide=6)
    torch.testing.assert_close(model.adapt(data.support, seeds=data.seeds)(data.query.x), wanted)
    once = small(inner_steps=2).train().adapt(data.support, seeds=data.seeds)(data.query.x)
    assert (once - wanted).abs().max() > 1e-3


def test_frozen_gates_stay_as_they_were_while_the_start_is_learned() -> None:
    moved = {}
    for frozen in (False, True):
        model = small(frozen_gates=frozen).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = model.trainer(2)
        for seed in range(2):
            trainer.step(episode(seed=seed))
        seen = (n for n in before if "backbone.bias" not in n)  # batch norm hides these
        moved[frozen] = {n for n in seen if not torch.equal(model.get_parameter(n), before[n])}
    assert moved[False] == {n for n, _ in small().named_parameters() if "backbone.bias" not in n}
    assert moved[True] == {n for n in moved[False] if n.startswith("network")}
    data = episode()
    answers = [small(frozen_gates=f).train().adapt(data.support, seeds=data.seeds)(data.query.x) for f in (False, True)]
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)  # the same method, until it is trained


def test_the_outer_gradient_is_clipped() -> None:
    model = small().train()
    model.trainer(1).step(episode())
    norms = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
    assert sum(norms) ** 0.5 == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(("shots", "steps", "momentum"), [(1, 12, 0.9), (2, 8, 0.95)])
def test_steps_and_momentum_follow_the_shots(shots: int, steps: int, momentum: float) -> None:
    data = episode(shots=shots)
    given = small(inner_steps=steps, momentum=momentum).eval()
    answers = [m.adapt(data.support, seeds=data.seeds)(data.query.x) for m in (small().eval(), given)]
    assert torch.equal(*answers)
    other = small(inner_steps=steps + 1, momentum=momentum).eval()
    assert not torch.equal(answers[0], other.adapt(data.support, seeds=data.seeds)(data.query.x))


@pytest.mark.parametrize(("shape", "parameters"), [((1, 28, 28), 28_485), ((3, 84, 84), 32_901)])
def test_sizes_and_initial_values_are_the_papers(shape: tuple[int, ...], parameters: int) -> None:
    model = lstm_metalearner.build(Problem(shape=shape, loss="cross_entropy", ways=5))
    assert sum(p.numel() for p in model.network.parameters()) == parameters
    assert sum(p.numel() for p in model.gates.parameters()) == 4 * 20 * (4 + 20 + 2) + 2 * (22 + 1)
    forget, enter = model.gates.gate_bias.tolist()
    assert 4 < forget < 5 and -5 < enter < -4
    weights = [p.detach() for n, p in model.gates.named_parameters() if n != "gate_bias"]
    assert all(float(p.abs().max()) <= 0.01 for p in weights) and all(float(p.std()) > 0.004 for p in weights)
    trainer = model.trainer(1)
    assert trainer.clip == 0.25 and trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_what_it_cannot_do_it_says() -> None:
    model = small()
    assert model.unsupported(PROBLEM) is None
    assert "3 ways, the test task has 5" in str(model.unsupported(replace(PROBLEM, ways=5)))
    with pytest.raises(ConfigError, match="momentum is the share of the newest statistics, above 0 and up to 1, not 2"):
        lstm_metalearner.build(PROBLEM, momentum=2.0)
    with pytest.raises(ConfigError, match="use it for classification"):
        lstm_metalearner.build(Problem(shape=(1,), loss="mse"))
