"""Meta networks against Algorithm 1 of the paper, written as loops over tasks, support examples and queries."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench import tasks
from metabench.algorithms import metanet
from metabench.algorithms.base import query_loss
from metabench.algorithms.metanet import MetaNet, build, generate, loss_gradients, preprocess, reading
from metabench.algorithms.reptile import mini_batches
from metabench.episodes import Batch, Episode, Problem, philox_key, words
from metabench.errors import ConfigError

WAYS, SIDE = 3, 20  # 20 -> 10 -> 5 -> 3 -> 2 -> 1: odd sides, where floor and ceil differ
PROBLEM = Problem(shape=(1, SIDE, SIDE), loss="cross_entropy", ways=WAYS)
SPREAD = 0.2  # of the generators' parameters
Weights = dict[str, Tensor]


def episode(*, tasks: int = 2, shots: int = 1, queries: int = 2, side: int = SIDE, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        coarse = torch.randn(tasks * WAYS * count, 1, 4, 4, generator=draw, dtype=torch.float64)  # unlike each other
        x = F.interpolate(coarse, (side, side)).unflatten(0, (tasks, -1))
        return Batch(x, torch.arange(WAYS).repeat_interleave(count).expand(tasks, -1), WAYS)

    return Episode(batch(shots), batch(queries), torch.arange(tasks) + 5)


def small(**params: Any) -> MetaNet:
    """Few filters, weights so large that every part matters to the answer, and a draw that leaves no layer dead."""
    torch.manual_seed(71)
    model = build(PROBLEM, **({"filters": 4} | params)).double()
    with torch.no_grad():
        for weight in (*model.base.parameters(), *model.key.parameters()):
            weight.normal_(std=1.6 * weight[0].numel() ** -0.5)
        for parameter in (*model.task.parameters(), *model.example.parameters()):
            parameter.uniform_(-SPREAD, SPREAD)
    return model


def plain_network(x: Tensor, slow: Weights, fast: Weights, *, key: bool = False) -> Tensor:
    """One image (1, C, H, W) through slow and, where there are any, fast weights."""
    for i in range(5):
        name = f"conv{i}"
        h = F.relu(F.conv2d(x, slow[name], padding=1))
        if name in fast:
            h = h + F.relu(F.conv2d(x, fast[name], padding=1))
        x = F.max_pool2d(h, 2, ceil_mode=True)
    x = x.flatten(1)
    if key:
        return x @ slow["hidden"].T + (x @ fast["hidden"].T if "hidden" in fast else 0)
    h = F.relu(x @ slow["hidden"].T)
    if "hidden" in fast:
        h = h + F.relu(x @ fast["hidden"].T)
    return h @ slow["output"].T + (h @ fast["output"].T if "output" in fast else 0)


def plain_gradient(slow: Weights, names: list[str], x: Tensor, y: Tensor) -> Weights:
    """Of the mean loss of some examples, one after the other."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in slow.items()}
    losses = [
        F.cross_entropy(plain_network(one[None], leaves, {}), label[None]) for one, label in zip(x, y, strict=True)
    ]
    values = torch.autograd.grad(torch.stack(losses).mean(), [leaves[name] for name in names])
    return dict(zip(names, values, strict=True))


def two_cases(g: Tensor) -> Tensor:
    """Andrychowicz et al. 2016, Appendix A, with p = 7: (n,) -> (n, 2)."""
    rows = []
    for value in g.flatten().tolist():
        large = abs(value) >= math.exp(-7)
        rows.append([math.log(abs(value)) / 7, math.copysign(1, value)] if large else [-1, math.exp(7) * value])
    return torch.tensor(rows, dtype=g.dtype)


def plain_lstm(params: Weights, gradients: list[Tensor]) -> Tensor:
    """d: one LSTM over the gradients of a tensor of weights, all of its coordinates apart; its last output."""
    hidden = cell = torch.zeros(gradients[0].numel(), 20, dtype=torch.float64)
    for gradient in gradients:
        both = torch.cat([two_cases(gradient), hidden], 1)
        gates = both @ params["gates.weight"].T + params["gates.bias"]
        let_in, keep, let_out, new = gates[:, :20], gates[:, 20:40], gates[:, 40:60], gates[:, 60:]
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(let_in) * torch.tanh(new)
        hidden = torch.sigmoid(let_out) * torch.tanh(cell)
    return (hidden @ params["out.weight"].T + params["out.bias"]).reshape(gradients[0].shape)


def plain_mlp(params: Weights, gradient: Tensor) -> Tensor:
    """m: two ReLU layers of 20 units and a linear one, coordinate by coordinate."""
    h = two_cases(gradient)
    for layer in ("first", "second"):
        h = F.relu(h @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return (h @ params["out.weight"].T + params["out.bias"]).reshape(gradient.shape)


def plain_groups(seed: int, examples: int, most: int) -> list[list[int]]:
    """All examples in the random order that a task's seed gives, cut off in equal parts, so far as they go."""
    draw = words(philox_key("reptile", seed), 0, 1, examples)[0].tolist()
    left = [place for _, place in sorted(zip(draw, range(examples), strict=True))]
    size = math.ceil(examples / most)
    groups: list[list[int]] = []
    while left:
        groups.append(left[:size])
        left = left[size:]
    return groups


def plain_logits(
    model: MetaNet,
    params: Weights,
    data: Episode,
    *,
    augment: str,
    task_weights: bool,
    outputs: list[Tensor] | None = None,
) -> Tensor:
    """Algorithm 1 of the paper, one thing after the other; `outputs`: slow output layers of the tasks' own."""

    def part(prefix: str) -> Weights:
        return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}

    def generator(kind: str, name: str) -> Weights:
        return part(f"{kind}.{'conv' if name.startswith('conv') else 'full'}.")

    base, key = part("base."), part("key.")
    names = ["conv4", "hidden", "output"] if augment == "last" else list(base)
    n = data.support.x.shape[1]
    answers = []
    for t in range(data.support.tasks):
        x, y = data.support.x[t], data.support.y[t]
        task: Weights = {}
        groups = plain_groups(int(data.seeds[t]), n, model.task_steps)
        if task_weights:
            turns = [plain_gradient(key, names, x[group], y[group]) for group in groups]
            task = {name: plain_lstm(generator("task", name), [g[name] for g in turns]) for name in names}
        memory, keys = [], []
        for i in range(n):
            gradient = plain_gradient(base, names, x[i : i + 1], y[i : i + 1])
            memory.append({name: plain_mlp(generator("example", name), gradient[name]) for name in names})
            keys.append(plain_network(x[i : i + 1], key, task, key=True)[0])
        for query in data.query.x[t]:
            r = plain_network(query[None], key, task, key=True)[0]
            attention = torch.stack([F.cosine_similarity(r, one, dim=0) for one in keys]).softmax(0)
            fast = {name: sum(a * one[name] for a, one in zip(attention, memory, strict=True)) for name in names}
            own = base if outputs is None else {**base, "output": outputs[t]}
            answers.append(plain_network(query[None], own, fast)[0])
    return torch.stack(answers).unflatten(0, (data.support.tasks, -1))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("augment", ["all", "last"])
@pytest.mark.parametrize(
    ("task_weights", "shots", "task_steps"),
    [(True, 1, 5), (True, 1, 2), (True, 2, 2), (True, 2, 4), (False, 2, 5)],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_answers_and_gradients_are_those_of_the_loops(
    augment: Literal["all", "last"],
    task_weights: bool,
    shots: int,
    task_steps: int,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small(augment=augment, task_weights=task_weights, task_steps=task_steps)
    data = episode(tasks=3 if chunked else 2, shots=shots)
    if chunked:  # two tasks and one, 100 coordinates at a time
        monkeypatch.setattr(tasks, "CACHE", 2 * 8 * model.widest * data.query.x.shape[1])
        monkeypatch.setattr(metanet, "AT_ONCE", 100)
    params = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    wanted = plain_logits(model, params, data, augment=augment, task_weights=task_weights)
    with torch.no_grad():
        got = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    assert relative_error(got, wanted.detach()) < 1e-10

    queries = data.query.y.shape[1]
    total = F.cross_entropy(wanted.flatten(0, 1), data.query.y.flatten(), reduction="sum") / data.support.tasks
    slow = dict(zip(params, torch.autograd.grad(total, list(params.values()), allow_unused=True), strict=True))
    loss, metrics = model.loss(data)
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    assert float(metrics["loss"]) == pytest.approx(float(total.detach()) / queries, rel=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = slow[name]
        if expected is None:
            assert parameter.grad is None and name == "key.output"
            continue
        assert parameter.grad is not None and expected.norm() > 1e-4  # not a comparison of zeros
        assert relative_error(parameter.grad, expected) < 1e-10, name


@pytest.mark.parametrize("augment", ["all", "last"])
def test_fine_tuning_moves_the_slow_output_layer_of_each_task(augment: Literal["all", "last"]) -> None:
    """On the support set as queries; memory, keys and fast weights stay those of the untouched network."""
    model, data = small(augment=augment, finetune_steps=3, finetune_lr=0.1).eval(), episode(shots=2)
    with torch.no_grad():
        got = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    params = {name: value.detach() for name, value in model.named_parameters()}
    how: dict[str, Any] = {"augment": augment, "task_weights": True}
    asked = Episode(data.support, data.support, data.seeds)
    outputs = [params["base.output"].clone() for _ in range(2)]
    for _ in range(3):
        leaves = [value.detach().requires_grad_() for value in outputs]
        logits = plain_logits(model, params, asked, outputs=leaves, **how)
        loss = sum(F.cross_entropy(*task) for task in zip(logits, data.support.y, strict=True))
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, leaves)
        outputs = [value - 0.1 * g for value, g in zip(leaves, gradients, strict=True)]
    wanted = plain_logits(model, params, data, outputs=outputs, **how).detach()
    assert relative_error(got, wanted) < 1e-10
    assert relative_error(got, plain_logits(model, params, data, **how)) > 1e-2


def test_the_loss_gradients_are_constants() -> None:
    model, data = small(), episode()
    gradients = loss_gradients(model.base, model.augmented, data.support.x[:, :, None], data.support.y[:, :, None])
    assert set(gradients) == set(metanet.LAYERS)
    assert all(value.shape[:2] == (2, WAYS) and not value.requires_grad for value in gradients.values())
    model.loss(data)[0].backward()
    # what serves only to make gradients gets none: the representation learner's own output layer
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["key.output"]


def test_preprocessing_is_the_two_case_rule() -> None:
    small_and_large = [0.0, 1e-30, -1e-5, math.exp(-7), -math.exp(-7), 9.2e-4, 0.03, -0.5, 1.0, -40.0]
    g = torch.tensor(small_and_large, dtype=torch.float64)
    assert torch.allclose(preprocess(g[None])[0].T, two_cases(g), rtol=1e-13, atol=1e-15)
    assert torch.isfinite(preprocess(g[None].float())).all()


@pytest.mark.parametrize("name", ["conv1", "hidden"])
def test_a_mixture_may_be_taken_before_or_after_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    shape = (2, 4, 5, 6, 3, 3) if name == "conv1" else (2, 4, 5, 6)
    memory = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    side = (4, 4) if name == "conv1" else (1, 1)
    h = torch.randn(2, 3, 6, *side, generator=g, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(2, 3, 4, generator=g, dtype=torch.float64).softmax(-1).requires_grad_()
    found = []
    for factor in (0.0, math.inf):
        monkeypatch.setattr(metanet, "TOGETHER", factor)
        answer = reading({name: memory}, attention)(name, h)
        found.append([answer, *torch.autograd.grad(answer.square().sum(), [memory, attention, h])])
    for one, other in zip(*found, strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-12


def test_many_coordinates_are_generated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    gradients = torch.randn(4, 2, 5, 7, dtype=torch.float64)
    upstream = torch.randn(2, 5, 7, dtype=torch.float64)
    for generator in (model.task["conv"], model.example["full"]):
        parameters = list(generator.parameters())
        found = []
        for size in (10**6, 9):
            monkeypatch.setattr(metanet, "AT_ONCE", size)
            made = generate(generator, gradients)
            assert made.shape == (2, 5, 7)
            found.append([made, *torch.autograd.grad((made * upstream).sum(), parameters)])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
        with torch.no_grad():
            assert torch.equal(generate(generator, gradients), made)


@pytest.mark.parametrize("augment", ["all", "last"])
def test_no_explosion_at_the_start(augment: Literal["all", "last"]) -> None:
    torch.manual_seed(0)
    model = build(Problem((1, 28, 28), "cross_entropy", WAYS), augment=augment)
    data = episode(tasks=1, side=28)
    support, query = (Batch(part.x.float(), part.y, WAYS) for part in (data.support, data.query))
    with torch.no_grad():
        _, metrics = query_loss(PROBLEM, model.adapt(support, seeds=data.seeds)(query.x), query)
        assert 0.8 * math.log(WAYS) < metrics["loss"] < 2 * math.log(WAYS)
    for generator in (*model.task.values(), *model.example.values()):
        assert generator.out.weight.std() <= 0.015 and not generator.out.bias.any()


def test_every_query_has_weights_of_its_own() -> None:
    model, data = small(), episode(queries=3)
    with torch.no_grad():
        learner = model.adapt(data.support, seeds=data.seeds)
        together = learner(data.query.x)
        alone = torch.cat([learner(data.query.x[:, q : q + 1]) for q in range(9)], 1)
        assert relative_error(together, alone) < 1e-12
        _, _, keys = model._learn(data.support.x, data.support.y, torch.arange(3).expand(2, -1))
        attention = F.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1).softmax(-1)
        assert len({round(float(a), 9) for a in attention[0, 0]}) == WAYS


def test_the_network_is_the_papers() -> None:
    torch.manual_seed(0)
    model = build(Problem((1, 28, 28), "cross_entropy", 5))
    network = 576 + 4 * 36_864 + 4096 + 5 * 64
    lstm, mlp = 80 * 22 + 80 + 21, 60 + 420 + 21
    assert sum(p.numel() for p in model.parameters()) == 2 * network + 2 * lstm + 2 * mlp
    assert not list(model.buffers())  # no batch norm
    assert {tuple(p.shape) for p in model.base.parameters() if p.dim() == 2} == {(64, 64), (5, 64)}
    assert float(model.base.conv1.detach().abs().max()) <= 0.1
    assert float(model.base.conv1.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    mini = build(Problem((3, 84, 84), "cross_entropy", 5), filters=32, augment="last")
    assert mini.base.hidden.shape == (288, 288)  # as in the authors' code


def test_only_the_last_three_layers_are_augmented() -> None:
    model, data = small(augment="last"), episode()
    order = torch.arange(3).expand(2, -1)
    task, memory, keys = model._learn(data.support.x, data.support.y, order)
    assert list(memory) == ["conv4", "hidden", "output"] and list(task) == ["conv4", "hidden"]
    assert memory["conv4"].shape == (2, WAYS, 4, 4, 3, 3) and keys.shape == (2, WAYS, 4)
    whole = small()._learn(data.support.x, data.support.y, order)
    assert list(whole[1]) == list(metanet.LAYERS) and list(whole[0]) == list(metanet.LAYERS[:-1])


def test_without_task_weights_there_is_no_d() -> None:
    model = small(task_weights=False)
    assert not list(model.task.parameters())
    assert sum(p.numel() for p in small().parameters()) - sum(p.numel() for p in model.parameters()) == 2 * 1861


@pytest.mark.parametrize(
    ("shots", "task_steps", "sizes"),
    [
        (1, 5, [1, 1, 1]),
        (2, 5, [2, 2, 2]),
        (4, 3, [4, 4, 4]),
        (1, 1, [3]),
        (1, 2, [2, 1]),
        (3, 5, [2, 2, 2, 2, 1]),
        (4, 5, [3, 3, 3, 3]),
        (3, 4, [3, 3, 3]),
    ],
)
def test_every_support_example_is_in_one_of_the_groups(
    shots: int, task_steps: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: an image that came twice would weigh twice in what the representation learner makes of the task."""
    model, data = small(task_steps=task_steps), episode(shots=shots)
    seen: list[Tensor] = []  # images of each call, (tasks, groups, size, ...)

    def gradients(net: Any, names: Any, h: Tensor, y: Tensor) -> Weights:
        if net is model.key:
            seen.append(h)
        return loss_gradients(net, names, h, y)

    monkeypatch.setattr(metanet, "loss_gradients", gradients)
    with torch.no_grad():
        model.adapt(data.support, seeds=data.seeds)
    groups = [group for call in seen for group in call.unbind(1)]
    assert [group.shape[1] for group in groups] == sizes
    shown = torch.cat(groups, 1).flatten(2)
    for got, task in zip(shown, data.support.x.flatten(2), strict=True):
        places = [[torch.equal(one, image) for image in task].index(True) for one in got]
        assert sorted(places) == list(range(WAYS * shots))
    assert not torch.equal(*shown.sum(-1)) or sizes == [3]


def test_equal_groups_give_the_bits_that_mini_batches_of_reptile_gave() -> None:
    """Results before groups could be unequal stay what they were: the paper's protocols all have equal ones."""
    model, data = small(task_steps=5), episode(shots=2)
    order = mini_batches(data.seeds, 6, 6, 1)[:, 0]
    with torch.no_grad():
        got = model._task_weights(data.support.x, data.support.y, order)
        groups, row = mini_batches(data.seeds, 6, 2, 3), torch.arange(2)[:, None, None]
        x, y = data.support.x[row, groups], data.support.y[row, groups]
        gradients = loss_gradients(model.key, model.augmented, x, y)
        for name in got:
            generator = model.task["conv" if name.startswith("conv") else "full"]
            assert torch.equal(got[name], generate(generator, gradients[name].transpose(0, 1)))
    assert got.keys() == set(metanet.LAYERS[:-1])


def test_zero_steps_leave_the_fast_weights_out() -> None:
    model, data = small(), episode()
    with torch.no_grad():
        got = model.adapt(data.support, seeds=data.seeds, steps=0)(data.query.x)
    slow = dict(model.base.named_parameters())
    wanted = torch.stack([torch.stack([plain_network(x[None], slow, {})[0] for x in task]) for task in data.query.x])
    assert relative_error(got, wanted.detach()) < 1e-12


def test_training_is_the_papers() -> None:
    model = small()
    trainer = model.trainer(10)
    assert trainer.clip == 10 and trainer.schedule is None
    assert trainer.optimizer.defaults["lr"] == 1e-3 and trainer.optimizer.defaults["betas"] == (0.9, 0.999)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.step(episode())
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == ["key.output"], still
    assert small(schedule="cosine").trainer(10).schedule is not None


@pytest.mark.parametrize(("name", "value"), [("filters", 0), ("task_steps", 0)])
def test_numbers_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not {value}"):
        build(PROBLEM, **{name: value})  # type: ignore[arg-type]


def test_only_images_and_the_ways_trained_for() -> None:
    with pytest.raises(ConfigError, match="metanet classifies images"):
        build(Problem((1,), "mse"))
    model = small()
    assert model.unsupported(PROBLEM) is None
    assert "3 ways" in str(model.unsupported(Problem((1, SIDE, SIDE), "cross_entropy", 20)))
    assert model.unsupported(Problem((1,), "mse"))
