"""What can be timed of a meta-learner: its kernels, each an untimed preparation and a thunk.

All run on untrained models: the cost of a kernel does not depend on what was learned. In evaluation mode and without
gradients, but for `meta_step`, which is a training step with all that belongs to it.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm
from metabench.algorithms.metric import FeatureMethod
from metabench.episodes import Batch, Episode, TaskDistribution
from metabench.errors import Unsupported

Thunk = Callable[[], object]

STEP_COUNTS = (1, 3, 5)  # inner steps whose times give the cost of one, and the intercept
MANY_STEPS = 1000  # of the training that a timed step belongs to: its schedule does not matter to its cost


@dataclass(frozen=True)
class Kernel:
    """One kernel made ready: what to call, and what to know about a call.

    `parts` are the thunks by number of inner steps, or one under 0: where there are several, the kernel's cost is the
    slope over their step counts. `restore` undoes, untimed, what calls have changed. `loss` is the loss with its graph.
    `images` is how many a call works on (points in regression).
    """

    parts: Mapping[int, Thunk]
    images: int
    restore: Thunk = lambda: None
    loss: Callable[[], Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Subject:
    """What kernels are made of: an algorithm, its tasks for training and for testing, and how it is called.

    `stream` is the length of streams, where these are the tasks.
    """

    algorithm: Algorithm
    train: TaskDistribution
    test: TaskDistribution
    tasks: int
    steps: int | None
    compile: bool
    stream: int | None = None

    def episode(self) -> Episode:
        """The test tasks that share a call."""
        return self.test.episodes(0, self.tasks)

    def shown(self) -> Batch:
        """What it learns those tasks from: support sets, or the streams themselves."""
        return self.test.streams(0, self.tasks, self.stream) if self.stream else self.episode().support


def make_kernel(name: str, subject: Subject) -> Kernel:
    """The kernel called `name`, ready to be timed.

    Raises:
        Unsupported: this algorithm has no such kernel, or not called in this way.
    """
    if subject.compile and name != "embed":
        raise Unsupported(f"compile: torch.compile is offered for embed only, not for {name}")
    if subject.steps is not None and name not in ("adapt", "predict"):
        raise Unsupported(f"steps: {name} does not take a number of inner steps; use the algorithm's own parameters")
    if subject.steps is not None and not subject.algorithm.inner_loop:
        raise Unsupported("steps: it has no inner loop")
    return KERNELS[name](subject)


def _adapt(subject: Subject) -> Kernel:
    subject.algorithm.eval()
    return Kernel({0: _adaptation(subject, subject.steps)}, images=_images(subject.episode().support))


def _adaptation(subject: Subject, steps: int | None) -> Thunk:
    episode, algorithm = subject.episode(), subject.algorithm

    def thunk() -> object:
        with torch.no_grad():
            return algorithm.adapt(episode.support, seeds=episode.seeds, steps=steps)

    return thunk


def _inner_step(subject: Subject) -> Kernel:
    if not subject.algorithm.inner_loop:
        raise Unsupported("it has no inner loop")
    subject.algorithm.eval()
    parts = {steps: _adaptation(subject, steps) for steps in STEP_COUNTS}
    return Kernel(parts, images=_images(subject.episode().support))


def _predict(subject: Subject) -> Kernel:
    subject.algorithm.eval()
    if subject.stream:
        return _follow(subject)
    episode = subject.episode()
    with torch.no_grad():
        learner = subject.algorithm.adapt(episode.support, seeds=episode.seeds, steps=subject.steps)

    def thunk() -> object:
        with torch.no_grad():
            return learner(episode.query.x)

    return Kernel({0: thunk}, images=_images(episode.query))


def _follow(subject: Subject) -> Kernel:
    """A stream is learned while it is answered: the answers to all its steps are one call."""
    algorithm = subject.algorithm
    stream = subject.test.streams(0, subject.tasks, subject.stream or 0)

    def thunk() -> object:
        with torch.no_grad():
            return algorithm.follow(stream)

    return Kernel({0: thunk}, images=_images(stream))


def _embed(subject: Subject) -> Kernel:
    algorithm = subject.algorithm.eval()
    if not isinstance(algorithm, FeatureMethod):
        raise Unsupported("it has no embedding of its own")
    episode = subject.episode()
    images = torch.cat([episode.support.x, episode.query.x], dim=1).flatten(0, 1)
    embed = algorithm.embed
    if subject.compile:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise Unsupported(f"compile: torch.compile needs a C++ compiler, and {compiler} is not there")
        embed = torch.compile(embed, fullgraph=True, dynamic=False)

    def thunk() -> object:
        with torch.no_grad():
            return embed(images)

    return Kernel({0: thunk}, images=len(images))


def _meta_step(subject: Subject) -> Kernel:
    algorithm = subject.algorithm.train()
    if algorithm.feeds is None:
        raise Unsupported("there is nothing to train")
    batch = _batch(subject)
    trainer = algorithm.trainer(MANY_STEPS)
    before = copy.deepcopy(algorithm.state_dict())

    def restore() -> None:
        algorithm.load_state_dict(before)  # thousands of steps on one batch would leave what is normal for a float

    return Kernel(
        {0: lambda: trainer.step(batch)}, images=_images(batch), restore=restore, loss=lambda: algorithm.loss(batch)[0]
    )


def _batch(subject: Subject) -> Episode | Batch:
    """What one training step sees: whole tasks, or as many images of all classes."""
    if subject.stream:
        return subject.train.streams(0, subject.tasks, subject.stream)
    first = subject.train.episodes(0, subject.tasks)
    return subject.train.images(0, _images(first)) if subject.algorithm.feeds == "images" else first


def _episode(subject: Subject) -> Kernel:
    tasks, source, stream = subject.tasks, subject.train, subject.stream
    place = iter(range(0, 2**62, tasks))

    def drawn(start: int) -> Episode | Batch:
        return source.streams(start, tasks, stream) if stream else source.episodes(start, tasks)

    return Kernel({0: lambda: drawn(next(place))}, images=_images(drawn(0)))


def _images(batch: Episode | Batch) -> int:
    if isinstance(batch, Episode):
        return _images(batch.support) + _images(batch.query)
    return batch.x.shape[0] * batch.x.shape[1]


KERNELS: dict[str, Callable[[Subject], Kernel]] = {
    "adapt": _adapt,
    "predict": _predict,
    "inner_step": _inner_step,
    "embed": _embed,
    "meta_step": _meta_step,
    "episode": _episode,
}
