"""Fine-tuning at test time against plain loops: one task after the other, a fresh graph for every step, float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import centroid, matching, protonet, r2d2, untrained
from metabench.algorithms.finetune import LinearHead
from metabench.backbones import Conv4
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "protonet": (protonet, {}),
    "protonet-cosine": (protonet, {"distance": "cosine"}),
    "matching": (matching, {}),
    "matching-unnormalised": (matching, {"similarity": "cosine_unnormalised_query"}),
    "matching-sqeuclidean": (matching, {"similarity": "sqeuclidean"}),
    "centroid": (centroid, {}),
    "centroid-sqeuclidean": (centroid, {"transform": "l2", "distance": "sqeuclidean"}),
    "r2d2": (r2d2, {"scale": 5.0}),
}
every_method = pytest.mark.parametrize("method", list(METHODS))


def make(method: str, **params: Any) -> LinearHead:
    torch.manual_seed(0)
    module, own = METHODS[method]
    algorithm = module.build(PROBLEM, **own, **params).double().eval()
    g = torch.Generator().manual_seed(1)
    for name, buffer in algorithm.named_buffers():  # running averages and a centre that are not the trivial ones
        if "log_" not in name:
            buffer.copy_((0.1 if "var" in name else -0.05) + 0.1 * torch.rand(buffer.shape, generator=g))
    return algorithm  # type: ignore[no-any-return]


def features(seed: int = 0, shots: int = 2, dim: int = 64) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(3).repeat(shots)[torch.randperm(3 * shots, generator=g)] for _ in range(2)])
    x = torch.rand(2, 3 * shots, dim, generator=g, dtype=torch.float64)
    return Batch(x, y, 3), torch.rand(2, 4, dim, generator=g, dtype=torch.float64)


def images(seed: int = 0, shots: int = 2) -> tuple[Batch, Tensor]:
    support, x = features(seed, shots, dim=256)
    return replace(support, x=support.x.unflatten(2, (1, 16, 16))), x.unflatten(2, (1, 16, 16))


def by_cosine(q: Tensor, p: Tensor) -> Tensor:
    return q / q.norm() @ (p / p.norm())


def start_of(method: str, algorithm: Any, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One task's linear head, written out: weights and biases."""
    if method.startswith("matching"):
        rows = z
    elif method == "r2d2":
        eye, one = torch.eye(z.shape[1], dtype=z.dtype), F.one_hot(y, 3).to(z)
        rows = algorithm.scale * (torch.linalg.inv(z.T @ z + algorithm.log_ridge.exp() * eye) @ z.T @ one).T
        return rows, torch.zeros(3, dtype=z.dtype)
    else:
        rows = torch.stack([shown(method, algorithm, z)[y == n].mean(0) for n in range(3)])
    if method.endswith("sqeuclidean") or method == "protonet":
        return 2 * rows, -(rows**2).sum(1)
    tau = 10.0 if method == "matching" else 1.0
    return tau * rows / rows.norm(dim=1, keepdim=True), torch.zeros(len(rows), dtype=z.dtype)


def shown(method: str, algorithm: Any, z: Tensor) -> Tensor:
    """What the prototypes are made of."""
    if method == "centroid":
        z = z - algorithm.centre
    return z / z.norm(dim=1, keepdim=True) if method.startswith("centroid") else z


def logits_of(method: str, algorithm: Any, z: Tensor, head: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    z = shown(method, algorithm, z)
    if method in ("protonet-cosine", "matching", "centroid"):
        z = z / z.norm(dim=1, keepdim=True)
    scores = z @ head[0].T + head[1]
    if not method.startswith("matching"):
        return scores
    p = scores.softmax(1)
    return torch.stack([p[:, y == n].sum(1) for n in range(3)], dim=1).log()


@every_method
def test_the_linear_head_starts_as_the_methods_own_decision(method: str) -> None:
    algorithm = make(method)
    support, x = features()
    own = algorithm.adapt_features(support, seeds=SEEDS)(x)
    weight, bias = algorithm.linear(support)
    linear = algorithm.read(algorithm.see(x) @ weight.mT + bias[:, None], support)
    assert torch.allclose(own.softmax(-1), linear.softmax(-1), rtol=1e-7)  # `unit`'s guard counts once more


@every_method
@pytest.mark.parametrize("shots", [1, 3])
def test_steps_of_the_head_are_gradient_descent(method: str, shots: int) -> None:
    algorithm = make(method, finetune_steps=4, finetune_lr=0.3)
    support, x = features(shots=shots)
    output = algorithm.adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        z, y = support.x[t], support.y[t]
        head = tuple(value.detach().requires_grad_() for value in start_of(method, algorithm, z, y))
        for _ in range(4):
            loss = F.cross_entropy(logits_of(method, algorithm, z, head, y), y)  # type: ignore[arg-type]
            gradient = torch.autograd.grad(loss, head)
            head = tuple((v - 0.3 * g).detach().requires_grad_() for v, g in zip(head, gradient, strict=True))
        expected = logits_of(method, algorithm, x[t], head, y)  # type: ignore[arg-type]
        assert torch.allclose(output[t], expected, rtol=1e-6, atol=1e-7)  # the guard of `unit` in all of them
        if method in ("protonet", "r2d2"):
            assert torch.allclose(output[t], expected, rtol=1e-11, atol=1e-11)


def conv4(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
    """Conv-4 on images of one task by torch's own layers, by running averages or the statistics of the batch."""
    for i in range(4):
        x = F.conv2d(x, params[f"conv{i}"], params[f"bias{i}"], padding=1)
        if f"mean{i}" in buffers:
            mean, var = buffers[f"mean{i}"], buffers[f"var{i}"]
        else:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        x = F.max_pool2d(F.relu(x * params[f"gamma{i}"].view(shape) + params[f"beta{i}"].view(shape)), 2)
    return x.flatten(1)


@pytest.mark.parametrize("norm", ["running", "batch"])
@pytest.mark.parametrize("method", ["protonet", "matching", "r2d2", "centroid"])
def test_steps_of_all_move_the_backbone_too(method: str, norm: str) -> None:
    algorithm = make(method, norm=norm, finetune_steps=3, finetune_lr=0.02, finetune_scope="all")
    support, x = images()
    with torch.no_grad():
        output = algorithm.adapt(support, seeds=SEEDS)(x)
    assert isinstance(algorithm.backbone, Conv4)
    buffers = dict(algorithm.backbone.named_buffers())
    for t in range(2):
        body = {name: value.detach().requires_grad_() for name, value in algorithm.backbone.named_parameters()}
        y = support.y[t]
        start = start_of(method, algorithm, conv4(body, buffers, support.x[t]), y)
        moved = {**body, "weight": start[0].detach().requires_grad_(), "bias": start[1].detach().requires_grad_()}
        for _ in range(3):
            z = conv4(moved, buffers, support.x[t])
            loss = F.cross_entropy(logits_of(method, algorithm, z, (moved["weight"], moved["bias"]), y), y)
            gradient = torch.autograd.grad(loss, list(moved.values()))
            steps = zip(moved.items(), gradient, strict=True)
            moved = {name: (value - 0.02 * g).detach().requires_grad_() for (name, value), g in steps}
        z = conv4(moved, buffers, x[t])
        expected = logits_of(method, algorithm, z, (moved["weight"], moved["bias"]), y)
        assert torch.allclose(output[t], expected, rtol=1e-6, atol=1e-6)
        if method in ("protonet", "r2d2"):
            assert torch.allclose(output[t], expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(moved["conv0"], body["conv0"], atol=1e-6)  # the backbone has moved


@pytest.mark.parametrize("norm", ["support", "each", "tasknorm", "layer"])
def test_all_normalises_queries_as_without_steps(norm: str) -> None:
    """Steps of no size: whatever the statistics, the answer is that without the phase."""
    support, x = images()
    still = make("protonet", norm=norm, finetune_steps=2, finetune_lr=1e-30, finetune_scope="all")
    off = make("protonet", norm=norm)
    with torch.no_grad():
        expected = off.adapt(support, seeds=SEEDS)(x).softmax(-1)
        assert torch.allclose(still.adapt(support, seeds=SEEDS)(x).softmax(-1), expected, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("scope", ["head", "all"])
def test_off_is_off_to_the_bit(method: str, scope: str) -> None:
    support, x = images()
    plain, off = make(method), make(method, finetune_steps=0, finetune_scope=scope, finetune_lr=0.5)
    on = make(method, finetune_steps=3, finetune_scope=scope, finetune_lr=0.5)
    expected = plain.adapt(support, seeds=SEEDS)(x)
    assert torch.equal(off.adapt(support, seeds=SEEDS)(x), expected)
    assert torch.equal(off.adapt(support, seeds=SEEDS, steps=5)(x), expected)  # there is no phase to take steps in
    assert torch.equal(on.adapt(support, seeds=SEEDS, steps=0)(x), expected)
    assert not torch.allclose(on.adapt(support, seeds=SEEDS)(x).softmax(-1), expected.softmax(-1), atol=1e-4)
    assert (plain.inner_loop, off.inner_loop, on.inner_loop) == (False, False, True)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_training_never_fine_tunes(scope: str) -> None:
    support, x = images()
    episode = Episode(support, Batch(x, torch.tensor([[0, 1, 2, 0]] * 2), 3), SEEDS)
    plain, on = make("protonet"), make("protonet", finetune_steps=3, finetune_scope=scope, finetune_lr=0.5)
    for algorithm in (plain, on):
        algorithm.train()
        trainer = algorithm.trainer(2)
        for _ in range(2):
            trainer.step(episode)
    ours, theirs = on.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(on.adapt(support, seeds=SEEDS)(x), plain.adapt(support, seeds=SEEDS)(x))


def test_only_a_moving_backbone_forbids_caching() -> None:
    assert make("protonet", finetune_steps=3).cacheable
    moving = make("protonet", finetune_steps=3, finetune_scope="all")
    assert not moving.cacheable and copy.deepcopy(moving).train().cacheable
    assert make("protonet", finetune_steps=0, finetune_scope="all").cacheable


@pytest.mark.parametrize("scope", ["head", "all"])
def test_the_gradient_is_first_order_and_tasks_do_not_meet(scope: str) -> None:
    """As if the descent were a constant shift: that of the loss at the end of it."""
    support, x = images()
    algorithm = make("protonet", finetune_steps=3, finetune_lr=0.1, finetune_scope=scope)
    unchanged = {name: value.clone() for name, value in algorithm.state_dict().items()}
    together = algorithm.adapt(support, seeds=SEEDS)(x)
    for t in range(2):
        one = slice(t, t + 1)
        alone = algorithm.adapt(support.pick(one), seeds=SEEDS[one])(x[one])
        assert torch.allclose(alone, together[one], rtol=1e-11, atol=1e-12)
    together.square().sum().backward()
    gradients = [p.grad for p in algorithm.backbone.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients if g is not None) > 0
    assert all(torch.equal(value, unchanged[name]) for name, value in algorithm.state_dict().items())
    with torch.no_grad():
        again = algorithm.adapt(support, seeds=SEEDS)(x)
    assert not again.requires_grad and torch.allclose(again, together, rtol=1e-12)


def test_the_steps_lower_the_loss_of_the_support_set() -> None:
    support, _ = features(shots=5)
    losses = []
    for steps in (0, 2, 10):
        algorithm = make("protonet", finetune_steps=10, finetune_lr=0.05)
        logits = algorithm.adapt_features(support, seeds=SEEDS, steps=steps)(support.x)
        losses.append(F.cross_entropy(logits.flatten(0, 1), support.y.flatten()).item())
    assert losses[0] > losses[1] > losses[2]


def test_the_control_stays_what_it_is() -> None:
    assert untrained.build(PROBLEM).finetune.steps == 0


@every_method
@pytest.mark.parametrize(("name", "value"), [("finetune_steps", -1), ("finetune_lr", 0.0), ("finetune_lr", -0.1)])
def test_wrong_parameters_are_named(method: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must.*off"):
        make(method, **{name: value})
