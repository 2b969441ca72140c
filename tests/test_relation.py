"""Relation networks against the authors' form: concatenated pairs through PyTorch's own layers, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms import relation
from metabench.algorithms.base import tracking
from metabench.algorithms.relation import RelationNet, build
from metabench.counts import flops
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 28, 28), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)


def make(problem: Problem = PROBLEM, **params: object) -> RelationNet:
    """With norms that are not the trivial ones, and scores that differ."""
    torch.manual_seed(0)
    algorithm: RelationNet = build(problem, **params).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in algorithm.named_parameters():
            if "gamma" in name or "beta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in algorithm.named_buffers():
            if "mean" in name or "var" in name:
                buffer.add_(0.2 * torch.rand_like(buffer))
    return algorithm


def episode(seed: int = 0, *, shots: int = 1, queries: int = 2, ways: int = 3, side: int = 28) -> Episode:
    g = torch.Generator().manual_seed(seed)

    def batch(count: int) -> Batch:
        x = torch.rand(2, ways * count, 1, side, side, generator=g, dtype=torch.float64)
        y = torch.arange(ways).repeat(count)
        return Batch(x, torch.stack([y[torch.randperm(len(y), generator=g)] for _ in range(2)]), ways)

    return Episode(batch(shots), batch(queries), SEEDS)


def norm_layer(owner: nn.Module, i: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(64, track_running_stats=hasattr(owner, f"mean{i}"))
    layer.weight, layer.bias = (nn.Parameter(owner.get_parameter(f"{name}{i}").detach()) for name in ("gamma", "beta"))
    if hasattr(owner, f"mean{i}"):
        layer.running_mean, layer.running_var = (owner.get_buffer(f"{name}{i}").clone() for name in ("mean", "var"))
    return layer


def conv_layer(owner: nn.Module, i: int, padding: int) -> nn.Conv2d:
    weight = owner.get_parameter(f"conv{i}").detach().clone()
    layer = nn.Conv2d(weight.shape[1], 64, 3, padding=padding)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(owner.get_parameter(f"bias{i}").detach().clone())
    return layer


class Textbook(nn.Module):
    """The authors' two networks, layer for layer, with an algorithm's weights."""

    def __init__(self, algorithm: RelationNet) -> None:
        super().__init__()
        body, module = algorithm.backbone, algorithm.module
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [conv_layer(body, i, 0 if i < 2 else 1), norm_layer(body, i), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (i < 2)
        self.encoder = nn.Sequential(*layers)
        layers = []
        for i in range(2):
            layers += [conv_layer(module, i, 1), norm_layer(module, i), nn.ReLU(), nn.MaxPool2d(2)]
        hidden, score = nn.Linear(64, 8).double(), nn.Linear(8, 1).double()
        hidden.load_state_dict(module.hidden.state_dict())
        score.load_state_dict(module.score.state_dict())
        self.relation = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), score)

    def pairs(self, support: Tensor, y: Tensor, queries: Tensor, ways: int, mean: bool = False) -> Tensor:
        """All pairs of a task's maps (m, N, 128, 5, 5): the class's, zero where it has none, before the query's."""
        rows = []
        for query in queries:
            for n in range(ways):
                own = [s for s, label in zip(support, y, strict=True) if label == n]
                total = sum(own, torch.zeros_like(query))
                rows.append(torch.cat([total / len(own) if mean and own else total, query]))
        return torch.stack(rows)


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("shots", [1, 2])
def test_evaluation_by_running_averages_is_the_textbooks(shots: int, combine: str) -> None:
    algorithm, task = make(combine=combine).eval(), episode(shots=shots)
    plain = Textbook(algorithm).eval()
    with torch.no_grad():
        output = algorithm.adapt(task.support, seeds=SEEDS)(task.query.x)
        for t in range(2):
            maps, others = plain.encoder(task.support.x[t]), plain.encoder(task.query.x[t])
            assert maps.shape[1:] == (64, 5, 5)
            wanted = plain.relation(plain.pairs(maps, task.support.y[t], others, 3, mean=combine == "mean"))
            torch.testing.assert_close(output[t], wanted.reshape(6, 3), rtol=1e-9, atol=1e-11)
    assert output.std() > 1e-3


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("counts", [(2, 1, 3), (3, 3, 0)])
def test_classes_may_have_unequal_numbers_of_examples(counts: tuple[int, ...], combine: str) -> None:
    algorithm, task = make(combine=combine).eval(), episode(4, shots=2)
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    support = replace(task.support, y=torch.stack([y, y.flip(0)]))
    plain = Textbook(algorithm).eval()
    with torch.no_grad():
        output = algorithm.adapt(support, seeds=SEEDS)(task.query.x)
        for t in range(2):
            maps, others = plain.encoder(support.x[t]), plain.encoder(task.query.x[t])
            wanted = plain.relation(plain.pairs(maps, support.y[t], others, 3, mean=combine == "mean"))
            torch.testing.assert_close(output[t], wanted.reshape(6, 3), rtol=1e-9, atol=1e-11)
    assert torch.isfinite(output).all()


def test_transductive_scores_are_those_of_networks_in_train_mode() -> None:
    """As the authors evaluate: support, queries and pairs of a task each by their own statistics."""
    algorithm, task = make(norm="batch").eval(), episode(shots=2)
    plain = Textbook(algorithm).train()
    with torch.no_grad():
        output = algorithm.adapt(task.support, seeds=SEEDS)(task.query.x)
        for t in range(2):
            maps, others = plain.encoder(task.support.x[t]), plain.encoder(task.query.x[t])
            wanted = plain.relation(plain.pairs(maps, task.support.y[t], others, 3))
            torch.testing.assert_close(output[t], wanted.reshape(6, 3), rtol=1e-9, atol=1e-11)


def joint_loss(plain: Textbook, task: Episode, kind: str) -> Tensor:
    """All tasks of a step in one pass: support and queries through the encoder, all pairs through the module."""
    x = torch.cat([task.support.x, task.query.x], 1)
    n = task.support.x.shape[1]
    maps = plain.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    pairs = [plain.pairs(m[:n], y, m[n:], 3) for m, y in zip(maps, task.support.y, strict=True)]
    return loss_of(plain.relation(torch.cat(pairs)).reshape(2, -1, 3), task, kind)


def separate_loss(plain: Textbook, task: Episode, kind: str) -> Tensor:
    """Each task for itself, and of it support, queries and pairs each in a pass of their own."""
    scores = []
    for support, y, query in zip(task.support.x, task.support.y, task.query.x, strict=True):
        pairs = plain.pairs(plain.encoder(support), y, plain.encoder(query), 3)
        scores.append(plain.relation(pairs).reshape(-1, 3))
    return loss_of(torch.stack(scores), task, kind)


def loss_of(scores: Tensor, task: Episode, kind: str) -> Tensor:
    if kind == "ce":
        return F.cross_entropy(scores.flatten(0, 1), task.query.y.flatten())
    errors = []
    for t in range(2):
        for q, label in enumerate(task.query.y[t]):
            errors += [(torch.sigmoid(scores[t, q, n]) - float(n == label)) ** 2 for n in range(3)]
    return torch.stack(errors).mean()


def blocks(algorithm: RelationNet, plain: Textbook) -> list[tuple[nn.Module, int, nn.Conv2d, nn.BatchNorm2d]]:
    """The blocks of the encoder and then of the relation module: their owner and number, and the textbook's layers."""
    found = []
    for own, theirs in ((algorithm.backbone, plain.encoder), (algorithm.module, plain.relation)):
        convs = [m for m in theirs if isinstance(m, nn.Conv2d)]
        norms = [m for m in theirs if isinstance(m, nn.BatchNorm2d)]
        found += [(own, i, *layers) for i, layers in enumerate(zip(convs, norms, strict=True))]
    assert len(found) == 6
    return found


def assert_same_gradients(algorithm: RelationNet, plain: Textbook) -> None:
    same = []
    for own, i, conv, norm in blocks(algorithm, plain):
        layers = {"conv": conv.weight, "bias": conv.bias, "gamma": norm.weight, "beta": norm.bias}
        same += [(own.get_parameter(f"{name}{i}"), value) for name, value in layers.items()]
    for mine, theirs in ((algorithm.module.hidden, plain.relation[-3]), (algorithm.module.score, plain.relation[-1])):
        same += [(mine.weight, theirs.weight), (mine.bias, theirs.bias)]
    assert {id(mine) for mine, _ in same} == {id(p) for p in algorithm.parameters()}
    for mine, other in same:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", ["mse", "ce"])
def test_training_loss_gradient_and_averages_are_those_of_concatenated_pairs(kind: str) -> None:
    """The first convolution is never given the concatenation; its gradient is as if it had been."""
    algorithm, task = make(loss=kind).train(), episode(1, shots=2)
    plain = Textbook(algorithm).train()
    wanted = joint_loss(plain, task, kind)
    wanted.backward()
    with tracking(algorithm):
        got, metrics = algorithm.loss(task)
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert metrics["loss"] == got.detach()
    assert_same_gradients(algorithm, plain)
    for own, i, _, norm in blocks(algorithm, plain):
        # by 0.1 a step; the authors' momentum of 1 keeps the last batch's statistics alone
        torch.testing.assert_close(own.get_buffer(f"mean{i}"), norm.running_mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(own.get_buffer(f"var{i}"), norm.running_var, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["mse", "ce"])
def test_transductive_training_loss_and_gradient_are_those_of_separate_passes(kind: str) -> None:
    """The authors' own mode: no statistics are shared by support and queries, nor by two tasks."""
    algorithm, task = make(norm="batch", loss=kind).train(), episode(1, shots=2)
    plain = Textbook(algorithm).train()
    wanted = separate_loss(plain, task, kind)
    wanted.backward()
    with tracking(algorithm):
        got, metrics = algorithm.loss(task)
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert metrics["loss"] == got.detach()
    assert_same_gradients(algorithm, plain)
    assert abs(joint_loss(plain, task, kind).item() - wanted.item()) > 1e-4  # not one pass over all


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_the_first_convolution_meets_every_map_once_and_no_pair(norm: str) -> None:
    """Of two tasks with 5 classes and 7 queries: 5 + 7 maps through half of its weights each, 35 through the second."""
    algorithm = make(replace(PROBLEM, ways=5), norm=norm).eval()
    g = torch.Generator().manual_seed(0)
    support, x = (torch.rand(2, n, 1600, generator=g, dtype=torch.float64) for n in (5, 7))
    learners = []

    def compare() -> None:
        shown = Batch(support, torch.arange(5).expand(2, -1), 5)
        learners.append(algorithm.adapt_features(shown, seeds=SEEDS))

    block = 2 * 64 * 64 * 9  # of a pixel
    assert flops(compare) == 2 * (5 * block * 25 + 2 * 5 * 5 * 1600)  # and the sum over the examples of each class
    later = block * 4 + 2 * 64 * 8 + 2 * 8  # of a pair: the second block on its map of 2x2, and the linear layers
    assert flops(lambda: learners[0](x)) == 2 * (7 * block * 25 + 7 * 5 * later)


def test_comparing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, task = make().eval(), episode(2, queries=3)
    with torch.no_grad():
        whole = algorithm.adapt(task.support, seeds=SEEDS)(task.query.x)
        monkeypatch.setattr(relation, "ROOM", 2 * 3 * 1600 * 4)  # four queries of each task at a time
        assert len(torch.split(whole, 4, dim=1)) == 3
        parts = algorithm.adapt(task.support, seeds=SEEDS)(task.query.x)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


def test_the_initialisation_is_the_authors() -> None:
    torch.manual_seed(0)
    algorithm = build(PROBLEM)
    assert sum(p.numel() for p in algorithm.module.parameters()) == 64 * 128 * 9 + 64 * 64 * 9 + 6 * 64 + 65 * 8 + 9
    for name, parameter in algorithm.named_parameters():
        value, last = parameter.detach(), name.rpartition(".")[2]
        if last.startswith("conv"):
            spread = math.sqrt(2 / (9 * 64))
            assert value.std().item() == pytest.approx(spread, rel=0.1) and abs(value.mean()) < 0.01, name
        elif last == "weight":
            assert 0.003 < value.std() < 0.02 and value.abs().max() < 0.05, name
        else:
            assert (value == (1.0 if last == "bias" or last.startswith("gamma") else 0.0)).all(), name


def test_answering_no_to_everything_costs_a_twentieth_at_twenty_ways() -> None:
    """The plateau on which training begins."""
    query = Batch(torch.zeros(1, 4, 1), torch.tensor([[0, 7, 19, 3]]), 20)
    algorithm = build(replace(PROBLEM, ways=20))
    assert algorithm.objective(torch.full((1, 4, 20), -100.0), query)[0].item() == pytest.approx(0.05)
    perfect = 200 * query.one_hot() - 100
    assert algorithm.objective(perfect, query)[0].item() == pytest.approx(0.0)


def test_sure_scores_do_not_tie() -> None:
    """A probability that rounds to 1 would: the Learner gives what stands before the sigmoid."""
    algorithm, task = make().float().eval(), episode()
    with torch.no_grad():
        algorithm.module.score.bias.add_(50.0)
        support = replace(task.support, x=task.support.x.float())
        output = algorithm.adapt(support, seeds=SEEDS)(task.query.x.float())
    assert (output.sigmoid() == 1).all() and (output[..., 0] != output[..., 1]).all()


def test_a_step_is_that_of_two_adams_with_gradients_clipped_apart() -> None:
    """And both rates halved on the same schedule; the clipping is felt."""
    ours, theirs = (build(replace(PROBLEM, shape=(1, 16, 16)), lr=0.01, halve_every=2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    parts = [list(part.parameters()) for part in (theirs.backbone, theirs.module)]
    optimizers = [torch.optim.Adam(part, lr=0.01) for part in parts]
    trainer = ours.trainer(4)
    ours.train()
    theirs.train()
    task = episode(side=16)
    task = Episode(*(replace(part, x=50 * part.x.float()) for part in (task.support, task.query)), SEEDS)
    felt = 0
    for step in range(4):
        trainer.step(task)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = 0.01 * 0.5 ** (step // 2)
        with tracking(theirs):
            theirs.loss(task)[0].backward()
        felt += sum(bool(nn.utils.clip_grad_norm_(part, 0.5) > 0.5) for part in parts)
        for optimizer in optimizers:
            optimizer.step()
    assert felt >= 1
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_a_map_of_one_pixel_is_not_pooled() -> None:
    algorithm = make(replace(PROBLEM, shape=(1, 10, 10))).eval()
    assert algorithm.map == (64, 1, 1) and algorithm.module.hidden.in_features == 64
    task = episode(side=10)
    assert algorithm.adapt(task.support, seeds=SEEDS)(task.query.x).shape == (2, 6, 3)


def test_impossible_requests_name_the_fix() -> None:
    with pytest.raises(ConfigError, match="conv4-strided has no feature maps to compare: use conv4-maps"):
        build(PROBLEM, backbone="conv4-strided")
    with pytest.raises(ConfigError, match="clip must be above 0"):
        build(PROBLEM, clip=0.0)
    with pytest.raises(ConfigError, match="halve_every must be at least 1 step"):
        build(PROBLEM, halve_every=0)
