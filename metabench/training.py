"""Meta-training to a budget, with a checkpoint that continues to the same final numbers on CPU."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm, Trainer
from metabench.episodes import Batch, Episode, TaskDistribution
from metabench.errors import Diverged, StoreError
from metabench.scoring import Scores, Stopped, follow_streams, score_episodes

PROGRESS_SECONDS = 0.5
CHECKPOINT_SECONDS = 20.0
VALIDATIONS, VALIDATION_EPISODES = 10, 200
POINTS = 100  # of a learning curve: the means of as many equal parts of the training


@dataclass
class Progress:
    """Where a training stands; all of it goes into the checkpoint."""

    steps: int
    step: int = 0
    seconds: float = 0.0
    resumed: int = 0
    best: float = -math.inf
    best_step: int = 0
    best_state: dict[str, Tensor] | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the metrics since the curve's last point

    def note(self, metrics: Mapping[str, Tensor], part: int) -> None:
        """Add a step's metrics to the curve, whose points are means over `part` steps; one not finite is left out."""
        self.sums = {key: self.sums.get(key, 0.0) + value.detach() for key, value in metrics.items()}
        if self.step % part == 0:
            means = {key: float(value) / part for key, value in self.sums.items()}
            finite = {key: value for key, value in means.items() if math.isfinite(value)}
            self.curve.append({"step": self.step, "seconds": self.seconds, **finite})
            self.sums = {}


@dataclass(frozen=True)
class Plan:
    """One training: its tasks, its spec (see `next_batch`), where to keep and what to watch.

    `twin` makes an equal, fresh algorithm (to measure the price of a step); `validation` None: the last step counts;
    `synchronise` waits for the device.
    """

    source: TaskDistribution
    spec: Mapping[str, Any]
    checkpoint: Path
    twin: Callable[[], Algorithm]
    validation: TaskDistribution | None
    stopping: Callable[[], bool]
    synchronise: Callable[[], None]
    emit: Callable[..., None]


def train(algorithm: Algorithm, plan: Plan) -> dict[str, Any]:
    """Meta-train to the budget, or on from the checkpoint; returns the facts of the training, its `curve` among them:
    points of step, seconds, and either the mean metrics since the last one or the score on validation episodes.

    Raises:
        Stopped: a stop was asked for; the checkpoint is on disk.
        Diverged: the final parameters are not finite.
    """
    state = _load(plan.checkpoint)
    progress = Progress(**state["progress"]) if state else Progress(steps=resolve_steps(plan))
    trainer = algorithm.trainer(progress.steps)
    if state:
        algorithm.load_state_dict(state["algorithm"])
        trainer.load_state_dict(state["trainer"])
        torch.set_rng_state(state["generator"])
        progress.resumed += progress.step < progress.steps
    algorithm.train()
    _loop(algorithm, trainer, plan, progress)
    algorithm.eval()
    if not all(bool(torch.isfinite(p).all()) for p in algorithm.parameters()):
        raise Diverged(f"parameters not finite after {progress.steps} training steps; lower the learning rate")
    if progress.best_state is not None:
        algorithm.load_state_dict(progress.best_state)
    with torch.no_grad():
        algorithm.prepare(plan.source)
    return {
        "train_steps": progress.steps,
        "train_seconds": progress.seconds,
        "resumed": progress.resumed,
        "selected_step": progress.best_step or progress.steps,
        "train_strategy": algorithm.settled,
        "curve": progress.curve,
    }


def _loop(algorithm: Algorithm, trainer: Trainer, plan: Plan, progress: Progress) -> None:
    said = saved = mark = time.perf_counter()
    every, part = (max(1, progress.steps // parts) for parts in (VALIDATIONS, POINTS))
    while progress.step < progress.steps:
        metrics = trainer.step(next_batch(plan.source, plan.spec, algorithm.feeds, progress.step))
        progress.step += 1
        plan.synchronise()  # a device that still works on the step would work outside the clock
        now = time.perf_counter()
        progress.seconds += now - mark
        progress.note(metrics, part)
        if now - said > PROGRESS_SECONDS or progress.step == progress.steps:
            said = now
            finite = {k: float(v) for k, v in metrics.items() if bool(torch.isfinite(v))}
            plan.emit("progress", step=progress.step, steps=progress.steps, metrics=finite)
        if plan.validation is not None and (progress.step % every == 0 or progress.step == progress.steps):
            _select(algorithm, plan, plan.validation, progress)
        stopping = plan.stopping()
        if stopping or now - saved > CHECKPOINT_SECONDS or progress.step == progress.steps:
            saved = now
            _save(plan.checkpoint, algorithm, trainer, progress)
        if stopping:
            raise Stopped
        mark = time.perf_counter()  # checkpoints, validation and messages are not training time


def next_batch(source: TaskDistribution, spec: Mapping[str, Any], feeds: str | None, step: int) -> Episode | Batch:
    """The batch of training step `step`: a pure function of it, so that resuming is a counter."""
    if feeds == "images":
        return source.images(step * spec["batch"], spec["batch"])
    if spec.get("stream"):
        return source.streams(step * spec["tasks"], spec["tasks"], spec["stream"])
    return source.episodes(step * spec["tasks"], spec["tasks"])


def resolve_steps(plan: Plan) -> int:
    """The budget in steps; one in seconds is resolved once, by the median of a few steps of a twin."""
    if plan.spec.get("steps"):
        return int(plan.spec["steps"])
    twin = plan.twin()
    trainer = twin.trainer(1000)
    twin.train()
    seconds = []
    for step in range(8):
        start = time.perf_counter()
        trainer.step(next_batch(plan.source, plan.spec, twin.feeds, step))
        plan.synchronise()
        seconds.append(time.perf_counter() - start)
    each = statistics.median(seconds[3:])
    return max(1, round(float(plan.spec["seconds"]) / each))


def _select(algorithm: Algorithm, plan: Plan, validation: TaskDistribution, progress: Progress) -> None:
    """Keep the best state seen on validation tasks; the first of equals wins."""
    algorithm.eval()
    with torch.no_grad():
        algorithm.prepare(plan.source)
    found = _validate(algorithm, plan, validation)
    algorithm.train()
    if found.not_finite:
        return
    score = statistics.fmean(found.scores)
    progress.curve.append({"step": progress.step, "seconds": progress.seconds, "validation": score})
    better = score * (1 if algorithm.problem.loss == "cross_entropy" else -1)
    if better > progress.best:
        progress.best, progress.best_step = better, progress.step
        progress.best_state = {k: v.detach().clone() for k, v in algorithm.state_dict().items()}


def _validate(algorithm: Algorithm, plan: Plan, validation: TaskDistribution) -> Scores:
    """Scores on what the training is on: episodes, or all the steps of streams as long as its own."""
    if stream := plan.spec.get("stream"):
        return follow_streams(algorithm.follow, validation, VALIDATION_EPISODES, stream).everywhere()
    return score_episodes(algorithm.adapt, validation, VALIDATION_EPISODES)


def _save(file: Path, algorithm: Algorithm, trainer: Trainer, progress: Progress) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    state = {
        "algorithm": algorithm.state_dict(),
        "trainer": trainer.state_dict(),
        "generator": torch.get_rng_state(),
        "progress": vars(progress),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{file.parent}: cannot write the training's checkpoint: the disk may be full") from error


def _load(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception:  # torn or foreign: a checkpoint only saves time, the training starts again
        file.unlink()
        return None
    return state
