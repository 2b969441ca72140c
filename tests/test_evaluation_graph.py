"""Scoring never builds a second-order graph, whatever the method: no gradient on the way asks for its own graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm
from metabench.catalogue import Plugin, catalogue
from metabench.episodes import ImageData, TaskDistribution
from metabench.scoring import score_episodes

PLUGINS = catalogue().algorithms
CLASSIFIERS = [plugin for plugin in PLUGINS.values() if "classification" in plugin.meta["problems"]]
TAKES_STEPS = {
    "fomaml",
    "lstm-metalearner",
    "maml",
    "maml++",
    "meta-sgd",
    "metanet",
    "nearest-task",
    "reptile",
    "scratch",
}
"""Whose adaptation takes gradients by autograd; that scoring asks for some is part of the test."""
CHEAPER = {"centre_images": 64, "filters": 8, "epochs": 5, "memory_tasks": 24}
OTHER_WAYS = {"strategy": ["serial", "grouped", "unfold"], "finetune_steps": [2]}
"""Parameters that lead an adaptation along other code. (Not `vmap`, which is never chosen by rule: torch.func.grad
always asks for a graph, at a level of its own that ends with it.)"""


def _tasks(subset: Any) -> TaskDistribution:
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 16, 16), dtype=np.uint8)
    subsets = {"train": np.arange(6), "val": np.arange(6, 8), "test": np.arange(8, 12)}
    data = ImageData("noise", "1", "only", images, tuple(map(str, range(12))), subsets)
    return data.tasks(subset, ways=3, shots=1, queries=2, rotations="none", seed=0, device="cpu")


def _built(plugin: Plugin, **params: Any) -> Algorithm:
    torch.manual_seed(0)
    known = {p.name: p.default for p in plugin.parameters}
    cheaper = {name: value for name, value in CHEAPER.items() if known.get(name) is not None}
    few = {"test_steps": 3} if "test_steps" in known else {}
    built: Algorithm = plugin.load().build(_tasks("train").problem, **(cheaper | few | params))
    return built


def _variants() -> Iterator[tuple[Plugin, dict[str, Any]]]:
    """Every method as it comes, and with each parameter that leads along other code."""
    for plugin in CLASSIFIERS:
        yield plugin, {}
        for name, values in OTHER_WAYS.items():
            if plugin.parameter(name):
                yield from ((plugin, {name: value}) for value in values)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each gradient taken by autograd has said of `create_graph` so far."""
    seen: list[bool] = []
    grad, backward = torch.autograd.grad, Tensor.backward

    def watched_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *rest: Any, **more: Any) -> Any:
        seen.append(bool(more.get("create_graph") or (len(rest) > 1 and rest[1])))
        return grad(outputs, inputs, grad_outputs, *rest, **more)

    def watched_backward(
        self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> Any:
        seen.append(bool(create_graph))
        return backward(self, gradient, retain_graph, create_graph, inputs)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.autograd, "grad", watched_grad)
    monkeypatch.setattr(Tensor, "backward", watched_backward)
    return seen


@pytest.mark.parametrize(
    ("plugin", "params"),
    [
        pytest.param(plugin, params, id="-".join(map(str, (plugin.name, *params.values()))))
        for plugin, params in _variants()
    ],
)
def test_scoring_asks_for_no_graph_of_a_gradient(plugin: Plugin, params: dict[str, Any], asked: list[bool]) -> None:
    algorithm = _built(plugin, **params).eval()
    with torch.no_grad():
        algorithm.prepare(_tasks("train"))
    asked.clear()
    score_episodes(algorithm.adapt, _tasks("test"), 3)
    assert not any(asked)
    assert bool(asked) == (plugin.name in TAKES_STEPS or "finetune_steps" in params)


@pytest.mark.parametrize(
    ("name", "params", "second_order"),
    [
        ("maml", {}, True),
        ("meta-sgd", {}, True),
        ("maml++", {"first_order": 0.0}, True),
        ("maml++", {"first_order": 1.0}, False),
        ("fomaml", {}, False),
    ],
)
def test_a_training_loss_of_the_second_order_does_ask(
    name: str, params: dict[str, Any], second_order: bool, asked: list[bool]
) -> None:
    """So the test above would see it; nor does it take more than asking in evaluation mode, with gradients enabled."""
    algorithm, episode = _built(PLUGINS[name], **params).train(), _tasks("train").episodes(0, 2)
    algorithm.loss(episode)
    assert asked and all(asked) == any(asked) == second_order
    asked.clear()
    algorithm.eval().adapt(episode.support, seeds=episode.seeds)
    assert any(asked) == (name != "fomaml")


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_is_watched_too(asked: list[bool]) -> None:
    x = torch.ones(1, requires_grad=True)
    x.square().sum().backward()
    (x**3).sum().backward(create_graph=True)
    torch.autograd.grad((x**3).sum(), [x], None, None, True)
    assert asked == [False, True, True]
