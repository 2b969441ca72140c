from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import anil, maml
from metabench.algorithms.anil import Anil
from metabench.algorithms.base import query_loss
from metabench.backbones import Conv4, Network
from metabench.catalogue import catalogue
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3)
CURVE = Problem(shape=(2,), loss="mse", outputs=2)
NORMS = ["running", "support", "each", "tasknorm", "layer", "batch"]
HEADS = ("head.weight", "head.bias")


def episode(*, tasks: int = 2, ways: int = 3, shots: int = 2, queries: int = 2, seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.randn(tasks, ways * count, 1, 16, 16, generator=draw, dtype=torch.float64)
        return Batch(x, torch.arange(ways).repeat_interleave(count).expand(tasks, -1), ways)

    return Episode(support=batch(shots), query=batch(queries), seeds=torch.arange(tasks))


def curves(seed: int = 0) -> Episode:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, 5, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    return Episode(Batch(x, y, None), Batch(y, x, None), torch.arange(3))


def few_filters(norm: Any, ways: int = 3) -> Network:
    """Double precision is slow; shifts off zero, so that nothing hides behind symmetry."""
    torch.manual_seed(1)
    body = Conv4((1, 16, 16), norm=norm, filters=3, eps=1e-3, gamma=False, glorot=True)
    network = Network(body, ways).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "beta" in name:
                parameter.normal_(std=0.3)
    return network


def small(**params: Any) -> Anil:
    torch.manual_seed(0)
    made = anil.build(PROBLEM, **{"head_init": "normal", **params}).double()
    network = few_filters(params.get("norm", "support"))
    made.backbone = network.backbone
    if made.head is not None:
        made.head = network.head
    return made


def loops(model: Anil, support: Batch, query: Tensor, *, steps: int, rate: float) -> Tensor:
    """Features in, answers out: every task alone, autograd, and torch's own linear layer and losses."""
    answers = []
    for t in range(support.tasks):
        if model.head is None:
            width = support.x.shape[2]
            weight, bias = (torch.zeros(*s, dtype=torch.float64, requires_grad=True) for s in ((3, width), (3,)))
        else:
            weight, bias = model.head.weight, model.head.bias
        for _ in range(steps):
            output = F.linear(support.x[t], weight, bias)
            if support.ways is None:
                loss = ((output - support.y[t]) ** 2).mean()
            else:
                loss = F.cross_entropy(output, support.y[t])
            moves = torch.autograd.grad(loss, [weight, bias], create_graph=True)
            weight, bias = weight - rate * moves[0], bias - rate * moves[1]
        answers.append(F.linear(query[t], weight, bias))
    return torch.stack(answers)


@pytest.mark.parametrize(
    ("params", "rate"),
    [
        ({}, 2.0),
        ({"inner_loss": "mean"}, 0.4),
        ({"inner_loss": "mean", "inner_lr": 0.3}, 0.3),
        ({"inner_lr": 0.3}, 0.9),
        ({"head_init": "tied"}, 2.0),
        ({"head_init": "zero"}, 2.0),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_answers_and_gradients_are_those_of_the_loops(params: dict[str, Any], rate: float, steps: int) -> None:
    model, data = small(**params), episode(seed=5)
    wanted: list[Tensor] = []
    got: list[Tensor] = []
    for values, answer in ((got, "ours"), (wanted, "loops")):
        x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        q = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        support = replace(data.support, x=x)
        if answer == "ours":
            output = model.adapt_features(support, seeds=data.seeds, steps=steps)(q)
        else:
            output = loops(model, support, q, steps=steps, rate=rate)
        loss = query_loss(PROBLEM, output, data.query)[0]
        leaves = [x, *([] if model.head is None else model.head.parameters())]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if output.requires_grad and steps else ()
        values += [output, *(g for g in gradients if g is not None)]
    assert len(got) == len(wanted) and len(got) == (1 if steps == 0 else 2 if model.head is None else 4)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_regression_is_the_loops_too() -> None:
    torch.manual_seed(0)
    model, data = anil.build(CURVE, inner_lr=0.1).double(), curves()
    z = model.embed(data.support.x.flatten(0, 1)).reshape(3, 5, -1)
    q = model.embed(data.query.x.flatten(0, 1)).reshape(3, 5, -1)
    wanted = loops(model, replace(data.support, x=z), q, steps=3, rate=0.1)
    got = model.adapt(data.support, seeds=data.seeds, steps=3)(data.query.x)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "running"])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_maml_that_adapts_the_head_alone(norm: str, steps: int) -> None:
    """The saving is exact: loss and every second-order gradient are those of the whole network run anew each step."""
    data = episode()
    ours = small(norm=norm, inner_steps=steps).train()
    theirs = maml.build(PROBLEM, norm=norm, inner_steps=steps, strategy="serial").double().train()  # type: ignore[arg-type]
    theirs.network = few_filters(norm)
    theirs.adapted = HEADS
    losses = []
    for model in (ours, theirs):
        loss, _ = model.loss(data)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    wanted = {n.removeprefix("network."): p.grad for n, p in theirs.named_parameters()}
    assert ours.state_dict().keys() == {n.removeprefix("network.") for n in theirs.state_dict()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and wanted[name] is not None
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-11)


def test_features_are_computed_once_whatever_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small().eval(), episode()
    seen: list[int] = []
    run = Conv4._run

    def counted(self: Conv4, params: Any, x: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(x.shape[0] * x.shape[1])
        return run(self, params, x, *rest, **more)

    monkeypatch.setattr(Conv4, "_run", counted)
    model.adapt(data.support, seeds=data.seeds, steps=7)(data.query.x)
    assert seen == [12, 12]  # the support images of both tasks, then their queries


def test_the_inner_loop_moves_the_head_alone_and_the_outer_loop_everything() -> None:
    model, data = small().train(), episode()
    loss, _ = model.loss(data)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    grads = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.grad is not None}
    assert all(value > 0 for name, value in grads.items() if "bias" not in name)  # batch norm hides the body's biases


def test_the_body_learns_through_the_support_features_too() -> None:
    model, data = small().train(), episode()
    params = dict(model.backbone.named_parameters())
    features, stats = model.backbone.embed_support(params, data.support.x)
    query = model.backbone.embed_query(params, data.query.x, data.support.x, stats).detach()
    answer = model.adapt_features(replace(data.support, x=features), seeds=data.seeds)(query)
    (through,) = torch.autograd.grad(query_loss(PROBLEM, answer, data.query)[0], [params["conv0"]])
    assert through.abs().max() > 1e-4


def test_equal_weights_for_all_classes_are_zero_weights() -> None:
    model, data = small(head_init="zero").eval(), episode()
    tied = small(head_init="tied").eval()
    assert model.head is not None and tied.head is None
    model.head.weight.data = torch.randn(3, generator=torch.Generator().manual_seed(0)).double().expand(3, 3).clone()
    model.head.bias.data.fill_(0.7)
    ours, theirs = (m.adapt(data.support, seeds=data.seeds, steps=4)(data.query.x) for m in (tied, model))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-11, atol=1e-12)


def test_a_tied_head_knows_no_labels_and_any_number_of_ways() -> None:
    model, data = small(head_init="tied").eval(), episode()
    order = torch.tensor([2, 0, 1])
    renamed = replace(data.support, y=order[data.support.y])
    plain = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    torch.testing.assert_close(model.adapt(renamed, seeds=data.seeds)(data.query.x)[..., order], plain)
    assert (model.adapt(data.support, seeds=data.seeds, steps=0)(data.query.x) == 0).all()  # a tie of all classes
    five = episode(ways=5)
    assert model.unsupported(replace(PROBLEM, ways=5)) is None
    assert model.adapt(five.support, seeds=five.seeds)(five.query.x).shape == (2, 10, 5)


def test_a_head_of_its_own_per_class_answers_only_the_ways_it_was_trained_for() -> None:
    model = small()
    assert model.unsupported(PROBLEM) is None
    assert "3 ways, the test task has 5" in str(model.unsupported(replace(PROBLEM, ways=5)))
    assert model.unsupported(Problem((1,), "mse"))
    assert small(nil=True).unsupported(replace(PROBLEM, ways=5)) is None


def test_nil_weights_support_labels_by_cosine_in_evaluation_only() -> None:
    data = episode()
    model, plain = small(nil=True).train(), small().train()
    assert torch.equal(model.loss(data)[0], plain.loss(data)[0])
    model.eval()
    got = model.adapt(data.support, seeds=data.seeds)(data.query.x)
    params = dict(model.backbone.named_parameters())
    z, stats = model.backbone.embed_support(params, data.support.x)
    q = model.backbone.embed_query(params, data.query.x, data.support.x, stats)
    for t in range(2):
        for m in range(6):
            wanted = torch.zeros(3, dtype=torch.float64)
            for n in range(6):
                wanted[data.support.y[t, n]] += F.cosine_similarity(q[t, m], z[t, n], 0)
            torch.testing.assert_close(got[t, m], wanted, rtol=0, atol=1e-6)  # metric.cosine bends at the zero vector


def test_running_averages_belong_to_the_body_that_is_tested() -> None:
    """Why `running` is sensible here and not for MAML: no inner step changes the weights that they were taken with."""
    model = small(norm="running", inner_lr=0.1).train()
    trainer = model.trainer(200)
    data = episode(tasks=16)
    for _ in range(120):
        trainer.step(data)
    means, after = [], []
    for training, found in ((True, means), (False, after)):
        model.train(training)
        with torch.no_grad():
            found.append(model.embed(torch.cat([data.support.x, data.query.x], 1).flatten(0, 1)))
    assert (means[0] - after[0]).abs().mean() < 0.1 * means[0].abs().mean()
    assert model.cacheable


@pytest.mark.parametrize("steps", [1, 3])
def test_support_and_query_share_a_pass_under_running_norm(steps: int) -> None:
    model, data = small(norm="running", inner_steps=steps).train(), episode()
    x = torch.cat([data.support.x, data.query.x], 1)
    z = model.embed(x.flatten(0, 1)).reshape(2, 12, -1)
    answer = loops(model, replace(data.support, x=z[:, :6]), z[:, 6:], steps=steps, rate=2.0)
    torch.testing.assert_close(model.loss(data)[0], query_loss(PROBLEM, answer, data.query)[0], rtol=1e-11, atol=0)


def test_defaults_are_mamls() -> None:
    model, sinus = anil.build(PROBLEM, head_init="normal"), anil.build(Problem((1,), "mse"))
    assert (model.train_steps, model.test_steps, model.inner_lr * 3) == (1, 3, 2.0)
    assert (sinus.train_steps, sinus.test_steps, sinus.inner_lr) == (1, 10, 0.01)
    assert model.head is not None and 0.8 < float(model.head.weight.detach().std()) < 1.2
    assert anil.build(PROBLEM).head is None and sinus.head is not None
    assert model.backbone.name == "conv4-strided" and sinus.backbone.name == "mlp"


@pytest.mark.parametrize(("ways", "rate"), [(5, 0.4), (20, 0.1)])
def test_the_inner_rate_is_mamls_for_5_and_for_20_ways(ways: int, rate: float) -> None:
    problem = Problem((1, 28, 28), "cross_entropy", ways)
    assert anil.build(problem).inner_lr == pytest.approx(rate, rel=1e-12)
    assert anil.build(problem, inner_loss="mean").inner_lr == 0.4


def test_running_averages_are_offered() -> None:
    """Unlike where the inner loop moves the body; see the tests of `maml`."""
    assert catalogue().algorithms["anil"].resolve({"norm": "running"})["norm"] == "running"


def test_the_head_of_the_paper_is_at_chance_before_its_first_step() -> None:
    """It has a preference for every image, but none that has to do with labels which are drawn anew for each task."""
    torch.manual_seed(0)
    model = anil.build(PROBLEM, head_init="normal", inner_lr=0.1).eval()
    classes = torch.rand(200, 3, 1, 16, 16)
    support, query = (Batch(classes + 0.1 * torch.rand_like(classes), torch.arange(3).expand(200, -1), 3) for _ in "sq")
    spread = (2 / 9 / 600) ** 0.5
    with torch.no_grad():
        before, after = (
            float(query_loss(PROBLEM, learner(query.x), query)[1]["accuracy"])
            for learner in (model.adapt(support, seeds=torch.arange(200), steps=steps) for steps in (0, 20))
        )
    assert abs(before - 1 / 3) < 4 * spread
    assert after > 1 / 3 + 8 * spread


@pytest.mark.parametrize(
    ("params", "message"),
    [({"head_init": "tied"}, "head_init: tied .* use zero"), ({"nil": True}, "nil: .* leave it false")],
)
def test_what_needs_classes_says_so(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        anil.build(CURVE, **params)
    with pytest.raises(ConfigError, match="backbone conv4 needs images"):
        anil.build(CURVE, backbone="conv4")
