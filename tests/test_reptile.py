from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import reptile
from metabench.algorithms.reptile import Reptile, mini_batches
from metabench.backbones import Conv4, Network
from metabench.episodes import Batch, Episode, Problem, philox_key, words
from metabench.tasks import Choice, Execution

SIDE = 16
WAYS = 3
ReptileNorm = Literal["support", "each", "layer", "batch"]


def episode(*, tasks: int = 3, shots: int = 3, queries: int = 1, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, WAYS * count, 1, SIDE, SIDE, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(WAYS).repeat_interleave(count).expand(tasks, -1), WAYS)

    return Episode(support=batch(shots), query=batch(queries), seeds=torch.arange(tasks) + 7 * seed)


def small(
    *,
    norm: ReptileNorm = "support",
    strategy: Choice = "auto",
    inner_steps: int = 4,
    inner_lr: float = 1e-2,
) -> Reptile:
    torch.manual_seed(0)
    made = reptile.build(
        Problem(shape=(1, SIDE, SIDE), loss="cross_entropy", ways=WAYS),
        norm=norm,
        strategy=strategy,
        inner_steps=inner_steps,
        test_steps=6,
        inner_batch=5,
        eval_batch=4,
        inner_lr=inner_lr,
    )
    body = Conv4((1, SIDE, SIDE), norm=norm, pool="stride", filters=4, eps=1e-3, glorot=True)
    fresh = Reptile(
        made.problem,
        Network(body, WAYS),  # few filters: double precision is slow
        strategy=made.strategy,
        steps=(made.train_steps, made.test_steps),
        batches=(made.train_batch, made.test_batch),
        inner_lr=made.inner_lr,
    )
    return fresh.double()


class Plain(nn.Module):
    """The same network from PyTorch's own layers."""

    def __init__(self, source: Reptile) -> None:
        super().__init__()
        body = source.network.backbone
        blocks: list[nn.Module] = []
        for i in range(4):
            conv = nn.Conv2d(1 if i == 0 else 4, 4, 3, stride=2, padding=1)
            norm = nn.BatchNorm2d(4, eps=1e-3, track_running_stats=False)
            for parameter, name in (
                (conv.weight, "conv"),
                (conv.bias, "bias"),
                (norm.weight, "gamma"),
                (norm.bias, "beta"),
            ):
                assert parameter is not None
                parameter.data = body.get_parameter(f"{name}{i}").detach().clone()
            blocks += [conv, norm, nn.ReLU()]
        head = nn.Linear(4, WAYS)
        head.weight.data = source.network.head.weight.detach().clone()
        head.bias.data = source.network.head.bias.detach().clone()
        self.layers = nn.Sequential(*blocks, nn.Flatten(), head)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def ordered(source: Reptile) -> list[Tensor]:
    """Reptile's parameters in the order of `Plain.parameters()`."""
    body = source.network.backbone
    names = ("conv", "bias", "gamma", "beta")
    return [body.get_parameter(f"{n}{i}") for i in range(4) for n in names] + list(source.network.head.parameters())


def test_training_is_that_of_an_independent_implementation_with_pytorchs_adam() -> None:
    model = small().train()
    plain = Plain(model)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=(0.0, 0.999))  # one state for all tasks and steps
    total = 4
    trainer = model.trainer(total)
    for step in range(3):
        data = episode(seed=step)
        trainer.step(data)
        start = [p.detach().clone() for p in plain.parameters()]
        ends = []
        for task in range(3):
            for parameter, value in zip(plain.parameters(), start, strict=True):
                parameter.data = value.clone()
            x = torch.cat([data.support.x[task], data.query.x[task]])
            y = torch.cat([data.support.y[task], data.query.y[task]])
            for picked in mini_batches(data.seeds[task : task + 1], 12, 5, 4)[0]:
                adam.zero_grad()
                F.cross_entropy(plain(x[picked]), y[picked]).backward()
                adam.step()
            ends.append([p.detach().clone() for p in plain.parameters()])
        size = 1 - step / total
        for i, parameter in enumerate(plain.parameters()):
            parameter.data = start[i] + size * (torch.stack([e[i] for e in ends]).mean(0) - start[i])
    for got, wanted in zip(ordered(model), plain.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-6, atol=1e-8)
    assert int(model.updates) == 3 * 3 * 4


def test_evaluation_starts_from_the_trained_moments_and_changes_nothing() -> None:
    model = small()
    model.train().trainer(5).step(episode())
    model.eval()
    before = copy.deepcopy(model.state_dict())
    data = episode(seed=4)
    with torch.no_grad():
        warm = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    for name, buffer in model.named_buffers():
        if name.startswith("moment") and "bias" not in name:  # the batch norm takes a bias out again
            assert float(buffer.abs().max()) > 0
            buffer.zero_()
    model.updates.zero_()
    with torch.no_grad():
        cold = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    assert (warm - cold).abs().max() > 1e-4


def plain_order(seed: int, examples: int, batch: int, steps: int) -> list[list[int]]:
    """Which examples each step sees: shuffled passes over all of them one after another, cut into equal parts."""
    stream: list[int] = []
    for draw in words(philox_key("reptile", seed), 0, 1 + batch * steps // examples, examples).tolist():
        stream += [place for _, place in sorted(zip(draw, range(examples), strict=True))]
    return [stream[start : start + batch] for start in range(0, batch * steps, batch)]


def adapted(model: Reptile, data: Episode, task: int) -> Plain:
    """A task's network after the evaluation's steps of PyTorch's Adam, whose state is the training's."""
    plain = Plain(model)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=(0.0, 0.999))
    names = [name for name, _ in model.network.named_parameters()]
    moments = {id(model.network.get_parameter(name)): model.moments()[name] for name in names}
    for parameter, ours in zip(plain.parameters(), ordered(model), strict=True):
        adam.state[parameter] = {
            "step": torch.tensor(float(model.updates)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": moments[id(ours)].clone(),
        }
    x, y = data.support.x[task], data.support.y[task]
    for picked in plain_order(int(data.seeds[task]), len(x), 4, 6):
        adam.zero_grad()
        F.cross_entropy(plain(x[picked]), y[picked]).backward()
        adam.step()
    return plain


@pytest.mark.parametrize("norm", ["each", "batch"])
def test_predictions_in_evaluation_are_those_of_an_independent_implementation(norm: ReptileNorm) -> None:
    """The paper's two protocols: a query in a batch with the whole support set, or all queries in one batch."""
    model = small(norm=norm)
    model.train().trainer(5).step(episode())
    data = episode(seed=4, shots=3, queries=2)
    with torch.no_grad():
        got = model.eval().adapt(data.support, seeds=data.seeds)(data.query.x)
    for task in range(3):
        plain, support, queries = adapted(model, data, task), data.support.x[task], data.query.x[task]
        with torch.no_grad():
            one_by_one = torch.cat([plain(torch.cat([support, query[None]]))[-1:] for query in queries])
            wanted = one_by_one if norm == "each" else plain(queries)
        torch.testing.assert_close(got[task], wanted, rtol=1e-6, atol=1e-7)
    assert (got[0] - got[1]).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "serial", "vmap", "grouped", "unfold"])
def test_the_recorded_execution_is_that_of_the_inner_steps(
    strategy: Choice, crowded: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`crowded`: where the cache holds one task a chunk."""
    model, data = small(strategy=strategy).train(training), episode()
    if crowded:
        monkeypatch.setattr(tasks, "CACHE", 8 * model.network.backbone.widest * data.support.x.shape[1])
    used: set[str] = set()
    gradient = Execution.gradient

    def watched(self: Execution, *args: Any, **more: Any) -> Any:
        used.add(str(self))
        return gradient(self, *args, **more)

    monkeypatch.setattr(Execution, "gradient", watched)
    recorded = model.facts(data.support)
    if training:
        model.trainer(5).step(data)
    else:
        with torch.no_grad():
            model.adapt(data.support, seeds=data.seeds)
    alone = training or crowded
    rule = "serial" if alone else "unfold"
    wanted = rule if strategy == "auto" else strategy
    assert used == {recorded["strategy"]} == {wanted if wanted == "serial" else f"{wanted}/{1 if alone else 3}"}


def test_the_state_of_a_training_is_complete() -> None:
    whole, resumed = small().train(), small().train()
    first = whole.trainer(4)
    for step in range(2):
        first.step(episode(seed=step))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    second = resumed.trainer(4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(2, 4):
        first.step(episode(seed=step))
        second.step(episode(seed=step))
    assert all(torch.equal(v, resumed.state_dict()[n]) for n, v in whole.state_dict().items())


def test_outer_step_falls_linearly_to_nothing() -> None:
    model = small(inner_steps=1).train()
    trainer = model.trainer(3)
    sizes = []
    for step in range(4):
        sizes.append(trainer.optimizer.param_groups[0]["lr"])
        before = model.network.head.weight.detach().clone()
        trainer.step(episode(seed=step))
        moved = not torch.equal(before, model.network.head.weight)
        assert moved == (step < 3)
    assert sizes == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_one_inner_step_is_joint_training() -> None:
    """k = 1 without moments: the mean over tasks of a normalised gradient step; here with one task, Adam itself."""
    model = small(inner_steps=1).train()
    plain = Plain(model)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=(0.0, 0.999))
    data = episode(tasks=1)
    model.trainer(10).step(data)
    picked = mini_batches(data.seeds, 12, 5, 1)[0, 0]
    x, y = torch.cat([data.support.x[0], data.query.x[0]]), torch.cat([data.support.y[0], data.query.y[0]])
    F.cross_entropy(plain(x[picked]), y[picked]).backward()
    adam.step()
    torch.testing.assert_close(model.network.head.weight.data, plain.layers[-1].weight.data, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(examples=st.integers(1, 30), batch=st.integers(1, 40), steps=st.integers(1, 12), seed=st.integers(0, 2**62))
def test_mini_batches_cycle_without_replacement_across_epochs(examples: int, batch: int, steps: int, seed: int) -> None:
    order = mini_batches(torch.tensor([seed]), examples, batch, steps)
    assert order.shape == (1, steps, batch)
    stream = order.flatten().tolist()
    for start in range(0, len(stream) - examples + 1, examples):
        assert sorted(stream[start : start + examples]) == list(range(examples))
    rest = stream[len(stream) // examples * examples :]
    assert len(set(rest)) == len(rest)


def test_mini_batches_depend_on_the_tasks_seed_alone() -> None:
    many = mini_batches(torch.tensor([3, 4, 5]), 20, 6, 9)
    assert torch.equal(many[1], mini_batches(torch.tensor([4]), 20, 6, 9)[0])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0, 0], torch.arange(6))
    passes = many[0].flatten()
    assert not torch.equal(passes[:20], passes[20:40])  # reshuffled at each pass


@pytest.mark.parametrize("norm", ["support", "each", "layer", "batch"])
def test_strategies_agree(norm: ReptileNorm) -> None:
    data = episode(shots=2)
    answers = []
    for strategy in ("serial", "vmap"):
        model = small(norm=norm, strategy="serial" if strategy == "serial" else "vmap").eval()
        with torch.no_grad():
            answers.append(model.adapt(data.support, seeds=data.seeds)(data.query.x))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("norm", ["support", "each", "layer"])
def test_inductive_norms_answer_each_query_alone(norm: ReptileNorm) -> None:
    model, data = small(norm=norm).eval(), episode(shots=1, queries=2)
    with torch.no_grad():
        learner = model.adapt(data.support, seeds=data.seeds)
        together = learner(data.query.x)
        alone = torch.cat([learner(data.query.x[:, i : i + 1]) for i in range(2 * WAYS)], 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_learner_is_differentiable_to_first_order() -> None:
    model, data = small().eval(), episode()
    answer = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    answer.square().sum().backward()
    assert model.network.head.weight.grad is not None and model.network.head.weight.grad.abs().max() > 0
    with torch.no_grad():
        bare = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    assert not bare.requires_grad
    torch.testing.assert_close(bare, answer.detach(), rtol=1e-10, atol=1e-12)


def test_zero_steps_is_the_initialisation() -> None:
    model, data = small().eval(), episode(tasks=1)
    with torch.no_grad():
        got = model.initial(data.support, seeds=data.seeds)(data.query.x)[0]
        params = dict(model.network.named_parameters())
        stats = model.network.support_stats(params, data.support.x[:1])
        wanted = model.network.on_query(params, data.query.x[:1], data.support.x[:1], stats)[0]
    torch.testing.assert_close(got, wanted)


def test_defaults_follow_the_problem() -> None:
    images = reptile.build(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=5))
    assert sum(p.numel() for p in images.parameters()) == 576 + 3 * 36_864 + 4 * 64 * 3 + 256 * 5 + 5
    curve = reptile.build(Problem(shape=(1,), loss="mse"))
    assert sum(p.numel() for p in curve.parameters()) == 128 + 64 * 65 + 65
    assert (images.inner_lr, curve.inner_lr) == (1e-3, 1e-2)
    assert "5 ways" in str(images.unsupported(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=20)))


def test_a_task_is_trained_on_with_more_examples_than_a_test_task_has() -> None:
    """Ten a class by default, for one shot as for five: 9 and 1, which are merged."""
    assert reptile.METABENCH["train"] == {"shots": 9, "queries": 1, "tasks": 5}
    data = episode(shots=9, queries=1)
    assert reptile._merged(data, 1).x.shape[1] == 10 * WAYS
    assert reptile._merged(data, 1).y.flatten().bincount().tolist() == [10] * WAYS


@pytest.mark.parametrize(
    ("ways", "rate", "batches", "steps"),
    [(5, 1e-3, (10, 5), (5, 50)), (10, 1e-3, (10, 5), (5, 50)), (20, 5e-4, (20, 10), (10, 50))],
)
def test_defaults_are_the_papers_for_5_and_for_20_ways(
    ways: int, rate: float, batches: tuple[int, int], steps: tuple[int, int]
) -> None:
    model = reptile.build(Problem(shape=(1, 28, 28), loss="cross_entropy", ways=ways))
    assert model.inner_lr == rate
    assert (model.train_batch, model.test_batch) == batches
    assert (model.train_steps, model.test_steps) == steps
    assert model.network.backbone.name == "conv4-strided-flat"
