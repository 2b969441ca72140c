"""LSTM meta-learner: a learned optimiser whose cell state is the learner's parameters.

Ravi and Larochelle 2017, "Optimization as a Model for Few-Shot Learning", and the authors' code
(twitter/meta-learning-lstm) with its PyTorch port (markdtw/meta-learning-lstm-pytorch). For every coordinate of the
learner's parameters theta, with weights that all coordinates share:
    x_t = [pre(loss_t), pre(gradient_t)]            four numbers, p = 10
    h_t = LSTM(x_t)                                 4 -> 20, its state kept for each coordinate
    f_t = W_F [h_t, theta_{t-1}, f_{t-1}] + b_F     gates before the sigmoid, also the previous ones; i_t alike
    theta_t = sigmoid(f_t) theta_{t-1} - sigmoid(i_t) gradient_t
Losses and gradients are constants: the outer gradient runs through the gates into the LSTM and into theta_0, which is
learned. Each inner step sees the whole support set, as in the authors' settings.
- Initialisation: all weights of the meta-learner U(-0.01, 0.01), b_F U(4, 5), b_I U(-5, -4): it starts as gradient
  descent at a rate of about 0.01. theta_0 starts as a fresh learner.
- Learner: max-pool Conv-4 with 32 filters; gain and shift of its batch norm (epsilon 1e-3) are part of theta. Its
  statistics are the batch's in inner steps and for the queries of the training. In evaluation running averages of those
  of the support set, begun anew for each task at the first inner step, normalise the queries: no transduction.
- 12 inner steps for 1 shot and 8 for more; these averages' momentum 0.9 and 0.95; Adam 1e-3, gradient norm clipped at
  0.25; one episode a step.
- The authors' code divides the gradient, which is a mean over the examples already, by their number once more (as does
  the port). `divide_twice` does so too; by default the equation above holds.
The paper has no Omniglot figures. `frozen_gates` is the ablation to compare with: theta_0 is learned, while LSTM and
gates stay as they were initialised.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Algorithm, Learner, Trainer
from metabench.backbones import Network, Stats, make_backbone
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError
from metabench.tasks import Choice, Execution, Params, choose

METABENCH = {
    "kind": "algorithm",
    "name": "lstm-metalearner",
    "family": "optimisation",
    "paper": "Ravi & Larochelle 2017",
    "url": "https://openreview.net/forum?id=rJY0-Kcll",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {"tasks": 1},
}

HIDDEN = 20
P = 10.0  # of the preprocessing
CLIP = 0.25  # norm of the outer gradient
EPS = 1e-3  # of the learner's batch norm
COORDINATES = 2**17  # of all tasks that share a pass of the LSTM, in evaluation: its buffers fit the memory
State = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden and cell (T, 20, P), forget and input gate (T, P)


def preprocess(x: Tensor) -> Tensor:
    """Two numbers (T, 2, n) of comparable size for each of x (T, n): its magnitude as a logarithm and its sign, or x
    itself near 0.
    """
    tiny = x.abs() < math.exp(-P)
    size = torch.where(tiny, -1.0, x.abs().clamp_min(math.exp(-P)).log() / P)
    return torch.stack([size, torch.where(tiny, x * math.exp(P), x.sign())], dim=1)


class Gates(nn.Module):
    """The meta-learner: from losses and gradients to the learner's next parameters, each coordinate by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(4, HIDDEN)  # holds the weights; the forward pass is written out in `forward`
        self.gate_weight = nn.Parameter(torch.empty(2, HIDDEN + 2))  # rows: forget, input; columns: h, theta, gate
        self.gate_bias = nn.Parameter(torch.empty(2))
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.01, 0.01)
        nn.init.uniform_(self.gate_bias[0], 4, 5)
        nn.init.uniform_(self.gate_bias[1], -5, -4)

    def start(self, theta: Tensor) -> State:
        """All zeros, for parameters theta (T, P)."""
        hidden, gate = theta.new_zeros(len(theta), HIDDEN, theta.shape[1]), theta.new_zeros(theta.shape)
        return hidden, hidden, gate, gate

    def forward(self, theta: Tensor, loss: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
        """The next parameters (T, P) and state, from losses (T,) and gradients (T, P) at theta (T, P)."""
        h, c, forget, enter = state
        h, c = self._cell(preprocess(loss[:, None]), preprocess(gradient), h, c)
        weight, bias = self.gate_weight, self.gate_bias
        both = weight[:, :HIDDEN] @ h + bias[:, None]
        forget = both[:, 0] + weight[0, HIDDEN] * theta + weight[0, HIDDEN + 1] * forget
        enter = both[:, 1] + weight[1, HIDDEN] * theta + weight[1, HIDDEN + 1] * enter
        return forget.sigmoid() * theta - enter.sigmoid() * gradient, (h, c, forget, enter)

    def _cell(self, loss: Tensor, gradient: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """An LSTM cell on inputs [loss (T, 2, 1), gradient (T, 2, P)]; the loss's part is the same for all coordinates.

        Coordinates stand last in memory: so do the long runs that make the nonlinearities fast.
        """
        cell = self.lstm
        shared = cell.weight_ih[:, :2] @ loss + (cell.bias_ih + cell.bias_hh)[:, None]
        weight = torch.cat([cell.weight_ih[:, 2:], cell.weight_hh], 1).expand(len(h), -1, -1)
        sums = torch.baddbmm(shared, weight, torch.cat([gradient, h], 1))
        i, f, g, o = sums.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class LstmMetaLearner(Algorithm):
    """The parameters of `network`, one after the other as they are registered, are theta_0."""

    inner_loop = True

    def __init__(
        self,
        problem: Problem,
        network: Network,
        *,
        strategy: Choice,
        steps: int | None,
        momentum: float | None,
        divide_twice: bool,
        frozen_gates: bool,
        lr: float,
    ) -> None:
        super().__init__(problem)
        self.network, self.gates = network, Gates().requires_grad_(not frozen_gates)
        self.strategy, self.steps, self.momentum = strategy, steps, momentum
        self.divide_twice, self.lr = divide_twice, lr
        self.shapes = {name: value.shape for name, value in network.named_parameters()}

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Let the meta-learner train the learner on T support sets, for `steps` steps or the default number."""
        del seeds  # nothing here is random
        one_shot = support.x.shape[1] == support.ways
        count = steps if steps is not None else self.steps if self.steps is not None else 12 if one_shot else 8
        momentum = self.momentum if self.momentum is not None else 0.9 if one_shot else 0.95

        execution = self._execution(support.x)

        def learn(x: Tensor, y: Tensor) -> tuple[Tensor, Stats]:
            return self._learn(execution, x, y, count, momentum)

        theta, averages = execution.chunks(learn, support.x, support.y)

        def predict(x: Tensor) -> Tensor:
            answers: Tensor = self._execution(x).map(self._answer, theta, averages, support.x, x)
            return answers

        return predict

    def trainer(self, total_steps: int) -> Trainer:
        """Adam at a constant rate, the gradient's norm clipped; frozen gates are no part of it."""
        del total_steps
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return Trainer(self, torch.optim.Adam(learned, lr=self.lr), clip=CLIP)

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for: the head is part of theta_0."""
        if problem.ways != self.problem.ways:
            return f"the head was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def facts(self, support: Batch) -> dict[str, str]:
        """See `Algorithm.facts`."""
        return {"strategy": str(self._execution(support.x))}

    def _execution(self, x: Tensor) -> Execution:
        body = self.network.backbone
        execution = choose(self.strategy, x, widest=body.widest, stride=body.stride)
        room = max(1, COORDINATES // sum(shape.numel() for shape in self.shapes.values()))
        return replace(execution, chunk=min(execution.chunk, room))

    def _learn(self, execution: Execution, x: Tensor, y: Tensor, steps: int, momentum: float) -> tuple[Tensor, Stats]:
        """Some tasks: theta (t, P) after the inner steps and, in evaluation, the averages of their statistics."""
        start = torch.cat([value.flatten() for value in self.network.parameters()])
        theta = start.expand(len(x), -1)
        state = self.gates.start(theta)
        averages = self._fresh(theta) if self._averages else ()

        def look(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Params, tuple[Tensor, Stats]]:
            return execution.gradient_and_more(
                lambda params: self._support_loss(params["theta"], x, y), {"theta": theta}
            )

        for _ in range(steps):
            gradient, (loss, stats) = execution.map(look, theta.detach(), x, y)
            slope = gradient["theta"] / x.shape[1] if self.divide_twice else gradient["theta"]
            theta, state = self.gates(theta, loss, slope, state)
            averages = tuple(
                tuple(torch.lerp(old, new, momentum) for old, new in zip(*layers, strict=True))
                for layers in zip(averages, stats, strict=True)
            )
        return theta, averages

    @property
    def _averages(self) -> bool:
        """Whether queries are normalised by running averages of the support set: in evaluation."""
        return not self.training and self.network.backbone.norm == "support"

    def _fresh(self, theta: Tensor) -> Stats:
        """Averages that have seen nothing: mean 0 and variance 1 (t, C), for each normalisation layer."""
        widths = [shape[0] for name, shape in self.shapes.items() if name.startswith("backbone.beta")]
        return tuple((theta.new_zeros(len(theta), width), theta.new_ones(len(theta), width)) for width in widths)

    def _named(self, theta: Tensor) -> Params:
        """The learner's parameters (t, *shape) in theta (t, P)."""
        parts = torch.split(theta, [shape.numel() for shape in self.shapes.values()], dim=1)
        return {n: torch.unflatten(part, 1, shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _support_loss(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Stats]]:
        """The losses of some tasks, summed; each task's own; and the statistics of their batches, where they count."""
        params = self._named(theta)
        stats: Stats = ()
        if self._averages:
            output, used = self.network.with_stats(params, x)
            stats = unbiased(used, x)
        else:
            output = self.network.on_support(params, x)
        losses = F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).mean(1)
        return losses.sum(), (losses, stats)

    def _answer(self, theta: Tensor, averages: Stats, support: Tensor, x: Tensor) -> Tensor:
        """Some tasks: logits (t, m, ways) of their queries x (t, m, *shape)."""
        params = self._named(theta)
        if self._averages:
            return self.network.on_query(params, x, support, averages)
        return self.network.on_support(params, x)


def unbiased(stats: Stats, x: Tensor) -> Stats:
    """Statistics of images x (t, n, C, H, W) with the variances that running averages take: over count - 1.

    Layer number i of a max-pool Conv-4 sees its images halved i times.
    """
    counts = [x.shape[1] * (x.shape[-2] >> i) * (x.shape[-1] >> i) for i in range(len(stats))]
    return tuple((mean, var * (n / max(n - 1, 1))) for (mean, var), n in zip(stats, counts, strict=True))


def build(
    problem: Problem,
    *,
    norm: Literal["support", "batch"] = "support",
    filters: int = 32,
    inner_steps: int | None = None,
    momentum: float | None = None,
    divide_twice: bool = False,
    frozen_gates: bool = False,
    lr: float = 1e-3,
    strategy: Literal["auto", "serial", "vmap", "grouped", "unfold"] = "auto",
) -> LstmMetaLearner:
    """The LSTM meta-learner for `problem`; the defaults are the paper's.

    Args:
        problem: the images' shape, and `ways` classes.
        norm: what normalises queries in evaluation: `support`, running averages of the support set's statistics over
            the inner steps, or `batch`, the queries' own (transductive). In training it is the queries' own.
        filters: of the learner's convolutions.
        inner_steps: by default 12 for 1 shot and 8 for more.
        momentum: of the running averages: the newest statistics' share; by default 0.9 for 1 shot, 0.95 for more.
        divide_twice: divide the gradient by the number of support images once more, as the authors' code.
        frozen_gates: train theta_0 alone.
        lr: rate of the outer Adam.
        strategy: how tasks are executed (see `metabench.tasks`); `auto` is by shapes.

    Raises:
        ConfigError: inputs that are no images, or a momentum outside 0..1.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise ConfigError(f"momentum is the share of the newest statistics, above 0 and up to 1, not {momentum}")
    if problem.ways is None:
        raise ConfigError("lstm-metalearner answers with classes: use it for classification")
    body = make_backbone("conv4", problem.shape, norm=norm, eps=EPS, filters=filters)
    return LstmMetaLearner(
        problem,
        Network(body, problem.ways),
        strategy=strategy,
        steps=inner_steps,
        momentum=momentum,
        divide_twice=divide_twice,
        frozen_gates=frozen_gates,
        lr=lr,
    )
