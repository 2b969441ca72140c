"""What a meta-learner is: the one abstract verb `adapt`, and everything derived from it once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.episodes import Batch, Episode, Problem, Stream, TaskDistribution
from metabench.tasks import Choice

Learner = Callable[[Tensor], Tensor]
"""An adapted model: query x (T, m, *shape) -> logits (T, m, ways) or targets (T, m, d).

Valid until the next training step of the algorithm that made it."""

Metrics = dict[str, Tensor]

Schedule = Literal["constant", "cosine", "halving"]
HALVE_EVERY = 2000  # steps; Snell et al. 2017


class Algorithm(nn.Module, ABC):
    """A meta-learner, made by its file's `build(problem, *, typed keyword parameters)`.

    Promises, tested for every algorithm of the registry:
    - `adapt` switches autograd on for its own inner loop. With gradients enabled the Learner is differentiable with
      respect to the algorithm; under `torch.no_grad()` it is detached and builds no outer graph.
    - In `eval()` nothing in the algorithm nor any global generator changes; in `train()` only `Trainer.step` does.
    - All work that needs only the support set happens in `adapt`; randomness comes from `seeds`, per task.

    Attributes:
        problem: what it was built for.
        settled: how the training executes its tasks if its `strategy` leaves that open (`auto`: by rule); set by `tune`
            or a checkpoint, so that a resumed training repeats.
    """

    feeds: ClassVar[Literal["episodes", "images"] | None] = "episodes"
    inner_loop: bool = False  # whether adaptation takes steps, so that there is a prediction before them
    slow_start: ClassVar[float] = 1  # times the training steps that most methods need to learn anything

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.settled: Choice = "auto"

    @abstractmethod
    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Learn T tasks from their support sets, `seeds` (T,) int64; `steps` overrides the inner steps."""

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """The training loss of a step (0-d) and detached figures worth watching: adapt on support, loss on query."""
        if not isinstance(batch, Episode):
            raise TypeError(f"{type(self).__name__} trains on episodes")
        return self.objective(self.adapt(batch.support, seeds=batch.seeds)(batch.query.x), batch.query)

    def objective(self, output: Tensor, query: Batch) -> tuple[Tensor, Metrics]:
        """What training minimises, given the Learner's output (T, m, ways | d) on the query set; see `query_loss`."""
        return query_loss(self.problem, output, query)

    def follow(self, stream: Stream) -> Tensor:
        """Logits (T, L, ways) at every step of streams, from the images so far and the labels of the steps before.

        For algorithms that name "stream" among their problems.
        """
        raise TypeError(f"{type(self).__name__} does not follow streams")

    def unfollowed(self) -> str | None:
        """Why test tasks that are streams are refused with these parameters, or None."""
        return None

    def trainer(self, total_steps: int) -> Trainer:
        """The optimiser of a training of `total_steps` steps: Adam on `loss` by default."""
        del total_steps
        return Trainer(self, torch.optim.Adam(self.parameters(), lr=1e-3))

    def prepare(self, train: TaskDistribution) -> None:
        """Once, after training (in eval mode): statistics of the training set, kept in buffers."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why tasks of `problem` cannot be answered by this (trained) algorithm, or None."""
        if problem.loss != self.problem.loss:
            return f"trained for {self.problem.loss}, asked for {problem.loss}"
        return None

    def tune(self, batch: Episode | Batch) -> None:
        """Called by the trainer with its first batch: may set `settled` after a short measurement, and nothing else."""

    def facts(self, support: Batch) -> dict[str, str]:
        """How such tasks are executed in the present mode, for the record: {"strategy": "unfold/32"}, or nothing."""
        del support
        return {}

    def initial(self, support: Batch, *, seeds: Tensor) -> Learner:
        """The prediction before adaptation (the `mse_before` measure), where there is an inner loop: zero steps."""
        return self.adapt(support, seeds=seeds, steps=0)


def uniform(seeds: Tensor, *shape: int) -> Tensor:
    """Random numbers (T, *shape) in [0, 1), float64 on the CPU; a task's depend on its own seed only."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    return torch.stack([torch.rand(shape, generator=generator, dtype=torch.float64) for generator in generators])


def query_loss(problem: Problem, output: Tensor, query: Batch) -> tuple[Tensor, Metrics]:
    """Mean cross-entropy (with accuracy) or mean squared error of `output` (T, m, ways | d) on the query set."""
    if problem.loss == "mse":
        loss = F.mse_loss(output, query.y)
        return loss, {"mse": loss.detach()}
    loss = F.cross_entropy(output.flatten(0, 1), query.y.flatten())
    accuracy = (output.detach().argmax(-1) == query.y).float().mean()
    return loss, {"loss": loss.detach(), "accuracy": accuracy}


def schedule(
    optimizer: torch.optim.Optimizer,
    kind: Schedule,
    total_steps: int,
    *,
    floor: float = 0.0,
    halve_every: int = HALVE_EVERY,
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """How the learning rate moves: not at all, along half a cosine to 0 at `total_steps`, or halved every so often.

    The cosine ends at the share `floor` of the first rate. In closed form of the step, so that a resumed training sees
    exactly the rates of an uninterrupted one.
    """
    if kind == "constant":
        return None
    if kind == "halving":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // halve_every))
    swing = (1 - floor) / 2
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floor + swing + swing * math.cos(math.pi * min(step / max(total_steps, 1), 1.0))
    )


class Trainer:
    """One optimiser step per `step`; all that a training must remember beyond the algorithm's own state.

    `clip` bounds the norm of the gradient, that of each of the optimiser's parameter groups apart.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip: float | None = None,
    ) -> None:
        self.algorithm, self.optimizer, self.schedule, self.clip = algorithm, optimizer, schedule, clip
        self.tuned = False

    def step(self, batch: Episode | Batch) -> Metrics:
        """Train on one batch; return detached 0-d figures."""
        if not self.tuned:
            self.algorithm.tune(batch)
            self.tuned = True
        self.optimizer.zero_grad(set_to_none=True)
        with tracking(self.algorithm):
            loss, metrics = self.algorithm.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip is not None:
            for group in self.optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule; the algorithm's own state is saved beside it."""
        schedule = self.schedule.state_dict() if self.schedule is not None else None
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,
            "tuned": self.tuned,
            "settled": self.algorithm.settled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.tuned, self.algorithm.settled = state["tuned"], state["settled"]


@contextmanager
def tracking(algorithm: nn.Module) -> Iterator[None]:
    """Let modules that keep running statistics (attribute `tracking`) update them; only `Trainer.step` does so."""
    modules: list[Any] = [m for m in algorithm.modules() if hasattr(m, "tracking")]
    for module in modules:
        module.tracking = True
    try:
        yield
    finally:
        for module in modules:
            module.tracking = False
