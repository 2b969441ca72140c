"""What recurrent meta-learners share: examples are shown one after another, each with the label of the one before.

The task format of Santoro et al. 2016: at step t the network sees [x_t, y_{t-1}] and answers y_t, so a label is learned
only after the answer was given. An N-way K-shot task is the sequence of its support set, in an order drawn from the
task's seed, and then one query, whose own label is never shown: each query follows the support set alone.

Fine-tuned (see `metabench.algorithms.finetune`), a task has an output layer of its own, tuned on the support examples
as if each came back as a query after the whole support set: what the network remembers stays as it is. A stream has no
support set, every label comes after its answer: `follow` never fine-tunes, and test tasks that are streams are refused
where `finetune_steps` is above 0 (`unfollowed`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Learner, Metrics, Schedule, Trainer, query_loss, schedule, uniform
from metabench.algorithms.finetune import Finetune, FineTuning, linear_scores
from metabench.episodes import Batch, Episode, Problem, Stream
from metabench.errors import ConfigError
from metabench.tasks import per_task

Scale = Literal["max", "none"]
State = tuple[Tensor, ...]
"""What a network remembers of T sequences: tensors (T, ...), hidden and cell state (T, 1, units) of its LSTM first.

Where several examples are tried as the next one, m instead of 1."""

DARKEST = 1e-6  # an image without anything brighter is left nearly as it is


class SequenceLearner(FineTuning):
    """An LSTM that reads [x_t, y_{t-1}] and whatever it remembers, under a softmax layer over the ways.

    Args:
        problem: images (C, H, W) or vectors, and the ways.
        units: of the LSTM.
        reads: numbers that come back from the step before, besides the hidden state.
        image_size: images are average-pooled to this height and width; None: taken as they are.
        scale: `max` divides an image by its brightest pixel.
        forget_bias: initial bias of the forget gate.
        lr: rate of Adam.
        schedule: how it moves over the training.
        finetune: gradient steps of the output layer in evaluation.
    """

    slow_start = math.inf  # labels come late and in random order: nothing is learned until all of remembering works

    def __init__(
        self,
        problem: Problem,
        *,
        units: int,
        reads: int,
        image_size: int | None,
        scale: Scale,
        forget_bias: float,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem)
        self.use(finetune)
        at_least_one(units=units)
        if problem.ways is None:
            raise ConfigError(f"{type(self).__name__} shows labels to its network: it needs a problem with ways")
        self.ways, self.units, self.image_size, self.scale = problem.ways, units, image_size, scale
        self.lr = lr
        self.schedule: Schedule = schedule
        self.inputs = nn.Linear(_pixels(problem.shape, image_size) + self.ways, 4 * units)
        self.recurrent = nn.Linear(units + reads, 4 * units, bias=False)
        self.output = nn.Linear(units + reads, self.ways)
        self._initialise(forget_bias)

    def _initialise(self, forget_bias: float) -> None:
        """Glorot uniform: the LSTM as the one matrix that its two parts are; biases 0 but for the forget gate's."""
        bound = math.sqrt(6 / (self.inputs.in_features + self.recurrent.in_features + 4 * self.units))
        nn.init.uniform_(self.inputs.weight, -bound, bound)
        nn.init.uniform_(self.recurrent.weight, -bound, bound)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.inputs.bias)
        nn.init.zeros_(self.output.bias)
        nn.init.constant_(self.inputs.bias[: self.units], forget_bias)

    @abstractmethod
    def start(self, tasks: int) -> State:
        """The state before the first example, for T sequences."""

    @abstractmethod
    def step(self, drive: Tensor, state: State, *, last: bool = False) -> State:
        """The state after one more example of each sequence, given what that adds to the gates (T, 1, 4 units).

        With `last` each of m examples (T, m, 4 units) is taken as the next one, and nothing follows: only what
        `exposed` reads of the state is needed.
        """

    @abstractmethod
    def exposed(self, state: State) -> Tensor:
        """What the output layer and the next step see of the state: (T, m, units + reads)."""

    def controller(self, drive: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """The LSTM's next hidden and cell state (T, m, units)."""
        gates = drive + self.recurrent(self.exposed(state))
        forget, enter, leave, update = gates.chunk(4, dim=-1)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * update.tanh()
        return leave.sigmoid() * cell.tanh(), cell

    def drive(self, x: Tensor, previous: Tensor) -> Tensor:
        """What examples x (T, n, *shape) and the labels before them (T, n, ways) add to the gates: (T, n, 4 units).

        It needs no state, so a whole sequence takes one matrix product.
        """
        drive: Tensor = self.inputs(torch.cat([self._prepared(x), previous], dim=-1))
        return drive

    def follow(self, stream: Stream) -> Tensor:
        """See `Algorithm.follow`; never fine-tuned."""
        shown, _ = self._show(stream)
        logits: Tensor = self.output(torch.cat(shown, dim=1))
        return logits

    def _show(self, batch: Batch) -> tuple[list[Tensor], State]:
        """Show examples in their order: what was exposed after each, and the state after the last."""
        drive = self.drive(batch.x, previous(batch.one_hot()))
        state, exposed = self.start(batch.tasks), []
        # split, not sliced: the gradient of each slice would be as large as all of them, and mostly zeros
        for one in torch.split(drive, 1, dim=1):
            state = self.step(one, state)
            exposed.append(self.exposed(state))
        return exposed, state

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """On episodes the loss on the queries; on streams the loss of all steps, first presentations included."""
        if isinstance(batch, Stream):
            return query_loss(self.problem, self.follow(batch), batch)
        return super().loss(batch)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Show the support sets, each in an order of its own; `steps` stands for `finetune_steps`, if above 0."""
        shown = in_random_order(support, seeds)
        latest, (_, state) = shown.one_hot()[:, -1:], self._show(shown)

        def seen(x: Tensor) -> Tensor:
            drive = self.drive(x, latest.expand(-1, x.shape[1], -1))
            return self.exposed(self.step(drive, state, last=True))

        count = self.tuning_steps(steps)
        if count == 0:
            return lambda x: self.output(seen(x))
        features, head = seen(support.x).detach(), per_task(dict(self.output.named_parameters()), support.tasks)
        head = self.tuned(support, head, lambda p: linear_scores(p, features), count)
        return lambda x: linear_scores(head, seen(x))

    def unfollowed(self) -> str | None:
        """See `Algorithm.unfollowed`: not where support sets are to be fine-tuned on."""
        if self.finetune.steps > 0:
            return "a stream has no support set to fine-tune on: leave finetune_steps at 0"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for: labels are inputs and outputs of learned weights."""
        if problem.ways != self.problem.ways:
            return f"its labels were trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def trainer(self, total_steps: int) -> Trainer:
        """Adam."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps))

    def _prepared(self, x: Tensor) -> Tensor:
        """Inputs (T, n, *shape) as the network sees them: (T, n, pixels)."""
        if self.image_size is not None:
            x = F.adaptive_avg_pool2d(x.flatten(0, 1), self.image_size).reshape(*x.shape[:2], -1)
        flat = x.flatten(2)
        if self.scale == "none":
            return flat
        return flat / flat.amax(-1, keepdim=True).clamp_min(DARKEST)


def in_random_order(batch: Batch, seeds: Tensor) -> Batch:
    """The examples of each task in an order drawn from the task's own seed."""
    order = uniform(seeds, batch.x.shape[1]).argsort(dim=-1).to(batch.x.device)
    tasks = torch.arange(batch.tasks, device=order.device)[:, None]
    return Batch(batch.x[tasks, order], batch.y[tasks, order], batch.ways)


def previous(labels: Tensor) -> Tensor:
    """One-hot labels (T, n, ways) shifted by one step: before the first example there is none (zeros)."""
    return F.pad(labels[:, :-1], (0, 0, 1, 0))


def at_least_one(**values: int) -> None:
    """Raise ConfigError for a size below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


def _pixels(shape: tuple[int, ...], image_size: int | None) -> int:
    """How many numbers an input of `shape` has, pooled to `image_size`."""
    if image_size is None:
        return math.prod(shape)
    if len(shape) != 3:
        raise ConfigError(f"image_size pools images, and an input has the shape {shape}: leave it out")
    if not 1 <= image_size <= min(shape[1:]):
        raise ConfigError(f"image_size must be from 1 to {min(shape[1:])} for images of {shape}, not {image_size}")
    return int(shape[0] * image_size**2)
