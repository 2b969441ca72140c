"""Ordinary modules and loops over tasks: what the plug-ins that measure other libraries (suites/peers) share.

Few-shot libraries take an `nn.Module` and one task at a time. Here are the networks of `maml` and `protonet` in that
form, with the very same weights, and the loops around a library's own calls, so that a peer computes the same function
on the same batches and differs in nothing but how.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metabench.algorithms import maml
from metabench.algorithms.base import Algorithm, Learner, Metrics, Trainer
from metabench.backbones import Conv4
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import Unsupported

Answer = Callable[[Tensor], Tensor]
"""An adapted network of one task: queries (m, *shape) -> logits (m, ways)."""


class PlainMaml(Algorithm):
    """MAML on an ordinary module, task by task; `learn` says how, in a library's own words.

    The same function as `maml` with norm=batch and adapt_norm=true: libraries adapt all parameters, and their users'
    batch norm takes the statistics of the batch at hand (transductive). Weights from one seed are the same, too.
    """

    inner_loop = True

    def __init__(
        self,
        problem: Problem,
        *,
        library: Any = None,
        backbone: Literal["conv4", "conv4-strided"],
        inner_steps: int,
        test_steps: int | None,
        inner_lr: float | None,
    ) -> None:
        super().__init__(problem)
        self.library = library  # the peer's module, for `learn`
        twin = maml.build(
            problem,
            backbone=backbone,
            norm="batch",
            inner_steps=inner_steps,
            test_steps=test_steps,
            inner_lr=inner_lr,
            adapt_norm=True,
        )
        body, head = twin.network.backbone, twin.network.head
        assert isinstance(body, Conv4)
        self.net = nn.Sequential(plain_conv4(body), head)
        # a sum over the classes at rate r is the mean, which every library's user takes, at rate ways * r
        self.rate = twin.inner_lr * head.out_features
        self.train_steps, self.test_steps, self.lr = twin.train_steps, twin.test_steps, twin.lr

    @abstractmethod
    def learn(self, x: Tensor, y: Tensor, steps: int, *, second_order: bool) -> Answer:
        """Adapt to the support set x (n, *shape), y (n,) of one task by `steps` gradient steps; autograd is on.

        With `second_order` the answer is differentiable through the steps with respect to `self.net`.
        """

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """See `Algorithm.adapt`: the tasks one after the other."""
        del seeds  # nothing here is random
        default = self.train_steps if self.training else self.test_steps
        count = default if steps is None else steps
        second_order = torch.is_grad_enabled()
        with torch.enable_grad():
            tasks = zip(support.x, support.y, strict=True)
            answers = [self.learn(x, y, count, second_order=second_order) for x, y in tasks]
        return lambda x: torch.stack([answer(queries) for answer, queries in zip(answers, x, strict=True)])

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for, as `maml`."""
        if problem.ways != self.problem.ways:
            return f"the head was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def trainer(self, total_steps: int) -> Trainer:
        """Adam, one task after the other."""
        del total_steps
        return SerialTrainer(self, torch.optim.Adam(self.parameters(), lr=self.lr))


class SerialTrainer(Trainer):
    """A step on the mean loss of T tasks with a backward pass per task, as the libraries' examples accumulate it."""

    def step(self, batch: Episode | Batch) -> Metrics:
        """See `Trainer.step`; memory for the graph of one task only."""
        if not isinstance(batch, Episode):
            raise TypeError(f"{type(self.algorithm).__name__} trains on episodes")
        self.optimizer.zero_grad(set_to_none=True)
        tasks = batch.support.tasks
        found: list[Metrics] = []
        for t in range(tasks):
            one = slice(t, t + 1)
            task = Episode(batch.support.pick(one), batch.query.pick(one), batch.seeds[one])
            loss, metrics = self.algorithm.loss(task)
            (loss / tasks).backward()  # type: ignore[no-untyped-call]
            found.append(metrics)
        self.optimizer.step()
        return {name: torch.stack([metrics[name] for metrics in found]).mean() for name in found[0]}


def plain_conv4(backbone: Conv4) -> nn.Sequential:
    """The Conv-4 as ordinary modules in textbook order, with `backbone`'s weights: x (n, *shape) -> features (n, d).

    Batch norm keeps running averages where `backbone.norm` is running, else it always takes its batch's statistics.
    """
    layers: list[nn.Module] = []
    for i in range(4):
        weight, bias = (backbone.get_parameter(f"{name}{i}") for name in ("conv", "bias"))
        stride, padding = backbone.stride, backbone.padding[i]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride=stride, padding=padding)
        # NCHW, as modules come: a library's user who asks for nothing else gets nothing else
        conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        conv.bias = nn.Parameter(bias.detach().clone())
        layers += [conv, _batch_norm(backbone, i), nn.ReLU()]
        if i < backbone.pooled:
            layers.append(nn.MaxPool2d(2))
    if backbone.average:
        layers.append(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten())


def _batch_norm(backbone: Conv4, i: int) -> nn.BatchNorm2d:
    shift = backbone.get_parameter(f"beta{i}")
    norm = nn.BatchNorm2d(len(shift), eps=backbone.eps, track_running_stats=backbone.norm == "running")
    norm.bias = nn.Parameter(shift.detach().clone())
    if backbone._parameters.get(f"gamma{i}") is None:
        # a constant, not None: second-order gradients of torch's batch norm fail with a shift but no gain (torch 2.13)
        del norm.weight
        norm.register_buffer("weight", torch.ones(len(shift)))
    else:
        norm.weight = nn.Parameter(backbone.get_parameter(f"gamma{i}").detach().clone())
    return norm


def import_library(name: str) -> ModuleType:
    """Import a library of the extra `peers`.

    Raises:
        Unsupported: it is not there, or does not import; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"needs {name} ({error}): pip install 'metabench[peers]'") from error


def import_part(name: str, *, fix: str) -> ModuleType:
    """Import the module `name` ("package.part.module") without running the `__init__`s of the packages it stands in.

    easyfsl and learn2learn import torchvision and compiled extensions there that the part measured never uses, and
    that do not load everywhere. Nothing is left in `sys.modules`: an ordinary import later is an ordinary import.

    Raises:
        Unsupported: the package is not there, or the part does not import; `fix` says how to install it.
    """
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unsupported(f"needs {package}: {fix}")
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if _inside(key, package)}
    folders = list(spec.submodule_search_locations)
    try:
        parents = name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            shell = ModuleType(".".join(parents[:depth]))
            shell.__path__ = ["/".join([folder, *parents[1:depth]]) for folder in folders]
            sys.modules[shell.__name__] = shell
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"{name} of the installed {package} does not import ({error}): {fix}") from error
    finally:
        for key in [key for key in sys.modules if _inside(key, package)]:
            del sys.modules[key]
        sys.modules.update(before)


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
