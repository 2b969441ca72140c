"""Fine-tuning at test time against plain loops: one task after the other, a fresh graph for every step, float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import (
    centroid,
    lstm_baseline,
    mann,
    matching,
    metanet,
    protonet,
    r2d2,
    relation,
    siamese,
    untrained,
)
from metabench.backbones import Conv4
from metabench.episodes import Batch, Episode, Problem, Stream
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "protonet": (protonet, {}),
    "protonet-cosine": (protonet, {"distance": "cosine"}),
    "matching": (matching, {}),
    "matching-unnormalised": (matching, {"similarity": "cosine_unnormalised_query"}),
    "matching-sqeuclidean": (matching, {"similarity": "sqeuclidean"}),
    "centroid": (centroid, {"distance": "cosine"}),
    "centroid-sqeuclidean": (centroid, {"transform": "l2", "distance": "sqeuclidean"}),
    "r2d2": (r2d2, {"scale": 5.0}),
}
LEARNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "siamese": (siamese, {}),
    "siamese-max": (siamese, {"combine": "max"}),
    "relation": (relation, {}),
    "relation-mean": (relation, {"loss": "ce", "combine": "mean"}),
}
"""Whose head was learned: it compares with the support set."""
OUTPUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mann": (mann, {"units": 8, "slots": 6, "width": 4, "heads": 2}),
    "lstm-baseline": (lstm_baseline, {"units": 8}),
    "metanet": (metanet, {"filters": 4}),
}
"""Whose head is an output layer: their equations stand in their own tests."""
ALL = {**METHODS, **LEARNED, **OUTPUTS}
SCOPED = [(method, scope) for method in ALL for scope in ("head", "all") if scope == "head" or method not in OUTPUTS]
every_method = pytest.mark.parametrize("method", list(METHODS))
every_learned = pytest.mark.parametrize("method", list(LEARNED))
any_method = pytest.mark.parametrize("method", list(ALL))
any_scope = pytest.mark.parametrize(("method", "scope"), SCOPED)


def make(method: str, **params: Any) -> Any:
    torch.manual_seed(0)
    module, own = ALL[method]
    if method in OUTPUTS:
        params = {name: value for name, value in params.items() if name != "finetune_scope"}
    algorithm = module.build(PROBLEM, **own, **params).double().eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights that matter
        for name, parameter in algorithm.named_parameters():
            if method in OUTPUTS or (method.startswith("relation") and name.endswith("weight")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    usual = 0.8 if method.startswith("relation") else 0.1  # its scores are not to be all too sure
    for name, buffer in algorithm.named_buffers():  # running averages and a centre that are not the trivial ones
        if "log_" not in name:
            buffer.copy_((usual if "var" in name else -0.05) + 0.1 * torch.rand(buffer.shape, generator=g))
    return algorithm


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


def conv4(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, *, maps: bool = False) -> Tensor:
    """Conv-4 on images of one task by torch's own layers, by running averages or the statistics of the batch."""
    for i in range(4):
        padding, pool = (int(i > 1), i < 2) if maps else (1, True)
        x = block(params, buffers, x, i, padding=padding, pool=pool)
    return x.flatten(1)


def block(
    params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, i: int, *, padding: int, pool: bool
) -> Tensor:
    x = F.conv2d(x, params[f"conv{i}"], params[f"bias{i}"], padding=padding)
    if f"mean{i}" in buffers:
        mean, var = buffers[f"mean{i}"], buffers[f"var{i}"]
    else:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    x = F.relu(x * params[f"gamma{i}"].view(shape) + params[f"beta{i}"].view(shape))
    return F.max_pool2d(x, 2) if pool else x


def by_comparing(method: str, algorithm: Any, head: dict[str, Tensor], z: Tensor, shown: Tensor, y: Tensor) -> Tensor:
    """One task's logits (m, 3) of features z, compared with those of the support set pair by pair."""
    rows = []
    for q in z:
        if method.startswith("siamese"):
            pairs = [head["weight"][0] @ (q - s).abs() + head["bias"][0] for s in shown]
            own = [torch.stack([p for p, label in zip(pairs, y, strict=True) if label == n]) for n in range(3)]
            rows.append(torch.stack([o.max() if method == "siamese-max" else o.mean() for o in own]))
            continue
        for n in range(3):
            members = shown[y == n]
            centre = members.sum(0) / (len(members) if method == "relation-mean" else 1)
            rows.append(torch.cat([centre.reshape(64, 2, 2), q.reshape(64, 2, 2)]))
    if method.startswith("siamese"):
        return torch.stack(rows)
    buffers = dict(algorithm.module.named_buffers())
    h = block(head, buffers, torch.stack(rows), 0, padding=1, pool=True)
    h = block(head, buffers, h, 1, padding=1, pool=False).flatten(1)  # a map of one pixel
    h = F.relu(h @ head["hidden.weight"].T + head["hidden.bias"])
    return (h @ head["score.weight"].T + head["score.bias"]).reshape(len(z), 3)


def plain_loss(method: str, logits: Tensor, y: Tensor) -> Tensor:
    if method == "relation":
        return (torch.sigmoid(logits) - F.one_hot(y, 3)).square().mean()
    return F.cross_entropy(logits, y)


def learned_head(algorithm: Any) -> dict[str, Tensor]:
    module = algorithm.head if isinstance(algorithm, siamese.Siamese) else algorithm.module
    return {name: value.detach().requires_grad_() for name, value in module.named_parameters()}


def stepped(params: dict[str, Tensor], loss: Tensor, lr: float) -> dict[str, Tensor]:
    gradient = torch.autograd.grad(loss, list(params.values()))
    moves = zip(params.items(), gradient, strict=True)
    return {name: (value - lr * g).detach().requires_grad_() for (name, value), g in moves}


@every_learned
@pytest.mark.parametrize("shots", [1, 3])
def test_steps_of_a_learned_head_go_on_with_the_support_sets_own_pairs(method: str, shots: int) -> None:
    algorithm = make(method, finetune_steps=4, finetune_lr=0.1)
    support, x = features(shots=shots, dim=64 if method.startswith("siamese") else 256)
    output = algorithm.adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        z, y, head = support.x[t], support.y[t], learned_head(algorithm)
        for _ in range(4):
            head = stepped(head, plain_loss(method, by_comparing(method, algorithm, head, z, z, y), y), 0.1)
        expected = by_comparing(method, algorithm, head, x[t], z, y)
        assert torch.allclose(output[t], expected, rtol=1e-10, atol=1e-11)
        untouched = by_comparing(method, algorithm, learned_head(algorithm), x[t], z, y)
        assert not torch.allclose(expected, untouched, atol=1e-3)


@pytest.mark.parametrize("norm", ["running", "batch"])
@every_learned
def test_steps_of_all_move_what_a_learned_head_compares(method: str, norm: str) -> None:
    """Queries are compared with the support set as the moved backbone sees it."""
    algorithm = make(method, norm=norm, finetune_steps=3, finetune_lr=0.05, finetune_scope="all")
    support, x = images()
    with torch.no_grad():
        output = algorithm.adapt(support, seeds=SEEDS)(x)
    maps, buffers = method.startswith("relation"), dict(algorithm.backbone.named_buffers())
    for t in range(2):
        y, start = support.y[t], {f"body.{name}": p.detach() for name, p in algorithm.backbone.named_parameters()}
        moved = {name: p.requires_grad_() for name, p in (start | learned_head(algorithm)).items()}

        def embed(images: Tensor, moved: dict[str, Tensor]) -> Tensor:
            body = {name.removeprefix("body."): p for name, p in moved.items() if name.startswith("body.")}
            return conv4(body, buffers, images, maps=maps)

        for _ in range(3):
            z = embed(support.x[t], moved)
            moved = stepped(moved, plain_loss(method, by_comparing(method, algorithm, moved, z, z, y), y), 0.05)
        z = embed(support.x[t], moved)
        expected = by_comparing(method, algorithm, moved, embed(x[t], moved), z, y)
        assert torch.allclose(output[t], expected, rtol=1e-8, atol=1e-9)
        assert not torch.allclose(moved["body.conv0"], start["body.conv0"], atol=1e-6)


@any_scope
def test_labels_stay_interchangeable(method: str, scope: str) -> None:
    if method in OUTPUTS:
        pytest.skip("their weights know labels as numbers, fine-tuned or not")
    algorithm = make(method, finetune_steps=3, finetune_lr=0.1, finetune_scope=scope)
    (support, x), order = images(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = algorithm.adapt(support, seeds=SEEDS)(x)
        renamed = algorithm.adapt(replace(support, y=order[support.y]), seeds=SEEDS)(x)
    assert torch.allclose(renamed[..., order], expected, rtol=1e-9, atol=1e-10)


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
@pytest.mark.parametrize("method", ["protonet", "siamese"])
def test_all_normalises_queries_as_without_steps(method: str, norm: str) -> None:
    """Steps of no size: whatever the statistics, the answer is that without the phase."""
    support, x = images()
    still = make(method, norm=norm, finetune_steps=2, finetune_lr=1e-30, finetune_scope="all")
    off = make(method, norm=norm)
    with torch.no_grad():
        expected = off.adapt(support, seeds=SEEDS)(x).softmax(-1)
        assert torch.allclose(still.adapt(support, seeds=SEEDS)(x).softmax(-1), expected, rtol=1e-9, atol=1e-12)


@any_scope
def test_off_is_off_to_the_bit(method: str, scope: str) -> None:
    support, x = images()
    plain, off = make(method), make(method, finetune_steps=0, finetune_scope=scope, finetune_lr=0.5)
    on = make(method, finetune_steps=3, finetune_scope=scope, finetune_lr=0.5)
    expected = plain.adapt(support, seeds=SEEDS)(x)
    assert torch.equal(off.adapt(support, seeds=SEEDS)(x), expected)
    assert torch.equal(off.adapt(support, seeds=SEEDS, steps=5)(x), expected)  # there is no phase to take steps in
    before = plain.adapt(support, seeds=SEEDS, steps=0)(x)  # of a meta network: without its fast weights
    assert torch.equal(before, expected) or method == "metanet"
    assert torch.equal(on.adapt(support, seeds=SEEDS, steps=0)(x), before)
    assert not torch.allclose(on.adapt(support, seeds=SEEDS)(x).softmax(-1), expected.softmax(-1), atol=1e-4)
    assert (plain.inner_loop, off.inner_loop, on.inner_loop) == (False, False, True)


@any_scope
def test_training_never_fine_tunes(method: str, scope: str) -> None:
    support, x = images()
    episode = Episode(support, Batch(x, torch.tensor([[0, 1, 2, 0]] * 2), 3), SEEDS)
    if method.startswith("centroid"):
        pytest.skip("it is trained on images")
    plain, on = make(method), make(method, finetune_steps=3, finetune_scope=scope, finetune_lr=0.5)
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


@pytest.mark.parametrize(
    ("method", "scope"),
    [("protonet", "head"), ("protonet", "all"), ("siamese", "all"), ("relation", "all"), ("relation", "head")]
    + [(method, "head") for method in OUTPUTS],
)
def test_the_gradient_is_first_order_and_tasks_do_not_meet(method: str, scope: str) -> None:
    """As if the descent were a constant shift: that of the loss at the end of it."""
    support, x = images()
    algorithm = make(method, finetune_steps=3, finetune_lr=0.1, finetune_scope=scope)
    unchanged = {name: value.clone() for name, value in algorithm.state_dict().items()}
    together = algorithm.adapt(support, seeds=SEEDS)(x)
    for t in range(2):
        one = slice(t, t + 1)
        alone = algorithm.adapt(support.pick(one), seeds=SEEDS[one])(x[one])
        assert torch.allclose(alone, together[one], rtol=1e-11, atol=1e-12)
    together.square().sum().backward()
    gradients = {name: p.grad for name, p in algorithm.named_parameters() if name != "key.output"}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert max(float(g.abs().max()) for g in gradients.values() if g is not None) > 0
    assert all(torch.equal(value, unchanged[name]) for name, value in algorithm.state_dict().items())
    with torch.no_grad():
        again = algorithm.adapt(support, seeds=SEEDS)(x)
    assert not again.requires_grad and torch.allclose(again, together, rtol=1e-12)


@any_scope
def test_the_steps_lower_the_loss_of_the_support_set(method: str, scope: str) -> None:
    support, _ = images(shots=5)
    losses, rate = [], 0.01 if scope == "head" else 0.0002
    for steps in (0, 2, 10):
        algorithm = make(method, finetune_steps=steps, finetune_lr=rate, finetune_scope=scope)
        with torch.no_grad():
            logits = algorithm.adapt(support, seeds=SEEDS)(support.x)
        losses.append(sum(float(plain_loss(method, *task)) for task in zip(logits, support.y, strict=True)))
    assert losses[0] > losses[1] > losses[2]


def test_streams_are_never_fine_tuned() -> None:
    """There is no support set; asked for streams as test tasks with steps, they refuse."""
    g = torch.Generator().manual_seed(0)
    stream = Stream(torch.rand(2, 7, 1, 16, 16, generator=g, dtype=torch.float64), torch.randint(3, (2, 7)), 3, SEEDS)
    for method in ("mann", "lstm-baseline"):
        plain, on = make(method), make(method, finetune_steps=3)
        assert torch.equal(plain.follow(stream), on.follow(stream))
        assert plain.unfollowed() is None and "leave finetune_steps at 0" in on.unfollowed()


def test_the_control_stays_what_it_is() -> None:
    assert untrained.build(PROBLEM).finetune.steps == 0


@any_method
@pytest.mark.parametrize(("name", "value"), [("finetune_steps", -1), ("finetune_lr", 0.0), ("finetune_lr", -0.1)])
def test_wrong_parameters_are_named(method: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must.*off"):
        make(method, **{name: value})
