"""Meta networks: every query is answered by weights of its own, read by attention from a memory of generated weights.

Munkhdalai and Yu 2017, "Meta Networks", Algorithm 1, and the authors' code (tsendeemts/metanet: MetaNetFull, utilsf).
As in both: two networks of five convolutions with ceil-mode pooling and two fully connected layers, without biases and
without batch norm; loss gradients, taken apart into size and sign (p = 7), are inputs of two generators that all
coordinates of convolutions share, and two more for the fully connected layers; every layer adds slow and fast weights
after their ReLUs. The gradients are constants, so that nothing here is of second order, and the output layer of the
representation learner, which serves only to make them, stays as it was drawn.

Where paper and code differ, or say nothing:
- the representation loss is the cross-entropy for any number of shots, as in the code; the paper has a contrastive
  loss on random pairs for more than one. The code takes the support set in T = 5 groups, whose mean losses give the
  gradients; so for five examples each is a group. Here the groups are drawn by the task's seed, every example is in
  one of them, and where they cannot be equal the last is shorter (7 examples: 2, 2, 2 and 1);
- `augment="last"`: the paper says that mini-ImageNet's model augments the last three layers, and that is what is done
  here (last convolution and both fully connected layers); the code there augments the last but one convolution too;
- initialisation is U(-0.1, 0.1) as in the paper (the code: Chainer's defaults), but the generators' last layers start
  near zero, N(0, 0.01), for otherwise their weights, which nothing scales, make the first losses explode;
- fine-tuned (see `metabench.algorithms.finetune`; not the paper's), a task has slow weights of its own in the output
  layer, tuned on the support examples as queries. They have no biases, as everywhere here, and all else stays: memory,
  attention, and the fast weights of the output layer, whose answers are added as before;
- the gradient's size is max(log|g| / p, -1), without the code's machine epsilon inside the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metabench.algorithms.base import Learner, Metrics, Schedule, Trainer, schedule
from metabench.algorithms.finetune import Finetune, FineTuning
from metabench.algorithms.reptile import mini_batches
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError
from metabench.tasks import Execution, Params, choose, per_task

METABENCH = {
    "kind": "algorithm",
    "name": "metanet",
    "family": "model",
    "paper": "Munkhdalai and Yu 2017",
    "url": "https://arxiv.org/abs/1703.00837",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification"],
    "train": {"queries": 10, "tasks": 1},
}

LAYERS = ("conv0", "conv1", "conv2", "conv3", "conv4", "hidden", "output")
LAST = 3  # layers augmented by `augment="last"`
UNITS = 20  # of the generators
P = 7.0  # of the gradients' preprocessing
CLIP = 10.0  # of the gradient's norm, in training
AT_ONCE = 8192  # coordinates whose weights are generated at once: what a generator computes stays in the cache
FEW = 4  # input channels up to which a convolution is cheaper unfolded
TOGETHER = 4  # how much cheaper a product is in one large matrix product than in many small ones

Augment = Literal["all", "last"]
Source = Callable[[str, Tensor], Tensor]
"""A layer's name and its input h (B, n, ...) -> what one set of weights makes of it, before any ReLU."""


class Layers(nn.Module):
    """The weights of a network: five 3x3 convolutions, a fully connected layer as wide as its input, an output."""

    def __init__(self, shape: tuple[int, ...], *, filters: int, ways: int) -> None:
        super().__init__()
        channels, *sides = shape
        features = filters * math.prod(math.ceil(side / 2**5) for side in sides)
        shapes = [(filters, channels if i == 0 else filters, 3, 3) for i in range(5)]
        for name, size in zip(LAYERS, [*shapes, (features, features), (ways, features)], strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size).uniform_(-0.1, 0.1)))

    def shared(self) -> Params:
        """The weights with an axis of one set."""
        return {name: value[None] for name, value in self.named_parameters()}


class TaskGenerator(nn.Module):
    """d of the paper: gradients (T, n) of n coordinates in T steps -> weights (n,), the last output of an LSTM.

    Units stand in rows, coordinates in columns: twice as fast on a CPU as nn.LSTM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(2 + UNITS, 4 * UNITS)  # of the input, then the hidden state
        self.out = nn.Linear(UNITS, 1)
        _start(self, self.out)

    def forward(self, gradients: Tensor) -> Tensor:
        """See the class."""
        of_input, of_hidden = torch.split(self.gates.weight, [2, UNITS], 1)
        hidden = cell = None
        for x in preprocess(gradients):
            gates = torch.addmm(self.gates.bias[:, None], of_input, x)
            if hidden is not None:
                gates = torch.addmm(gates, of_hidden, hidden)
            opened, new = torch.split(gates, [3 * UNITS, UNITS])
            let_in, keep, let_out = torch.split(opened.sigmoid(), UNITS)
            added = let_in * _tanh(new)
            cell = added if cell is None else torch.addcmul(added, keep, cell)
            hidden = let_out * _tanh(cell)
        assert hidden is not None
        return torch.addmm(self.out.bias[:, None], self.out.weight, hidden)[0]


class ExampleGenerator(nn.Module):
    """m of the paper: gradients (1, n) of n coordinates -> weights (n,), two ReLU layers and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, UNITS), nn.Linear(UNITS, UNITS)
        self.out = nn.Linear(UNITS, 1)
        _start(self, self.out)

    def forward(self, gradients: Tensor) -> Tensor:
        """See the class."""
        h = preprocess(gradients)[0]
        for layer in (self.first, self.second):
            h = F.relu(torch.addmm(layer.bias[:, None], layer.weight, h))
        return torch.addmm(self.out.bias[:, None], self.out.weight, h)[0]


def _tanh(x: Tensor) -> Tensor:
    """tanh, in a third of the time of PyTorch's on a CPU."""
    return (2 * x).sigmoid() * 2 - 1


def _start(generator: nn.Module, out: nn.Linear) -> None:
    for parameter in generator.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    nn.init.normal_(out.weight, std=0.01)
    nn.init.zeros_(out.bias)


def preprocess(gradient: Tensor) -> Tensor:
    """Size max(log|g| / p, -1) and sign clamp(e^p g, -1, 1) of gradients (T, n): (T, 2, n), with p = 7.

    The two cases of Andrychowicz et al. 2016: below e^-p the size is -1 and the sign has the value.
    """
    size = gradient.abs().clamp_min(math.exp(-P)).log() / P
    return torch.stack([size, (gradient * math.exp(P)).clamp(-1, 1)], 1)


def generate(generator: nn.Module, gradients: Tensor) -> Tensor:
    """The generator's weights (...) for gradients (T, ...), so many coordinates at once that memory stays bounded.

    What the generator computes on the way is not kept for the gradient but computed again.
    """
    parts = torch.split(gradients.flatten(1), AT_ONCE, 1)
    if torch.is_grad_enabled():
        made = [checkpoint(generator, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        made = [generator(part) for part in parts]
    return torch.cat(made).reshape(gradients.shape[1:])


def convolve(h: Tensor, weight: Tensor) -> Tensor:
    """Padded 3x3 convolution of h (B, n, C, H, W) by weight (B or 1, O, C, 3, 3), each set by its own: (B, n, O, H, W).

    Differentiable once, which is enough here, and then PyTorch's own grouped convolution is the fastest for one image
    a set.
    """
    sets, n, channels = h.shape[:3]
    if channels <= FEW:
        columns = torch.unflatten(F.unfold(h.flatten(0, 1), 3, padding=1), 0, (sets, n))
        return torch.unflatten(weight.flatten(2)[:, None] @ columns, 3, h.shape[3:])
    if len(weight) == 1:
        return torch.unflatten(F.conv2d(h.flatten(0, 1), weight[0], padding=1), 0, (sets, n))
    rows = h.transpose(0, 1).flatten(1, 2)
    y = F.conv2d(rows, weight.flatten(0, 1), padding=1, groups=sets)
    return torch.unflatten(y, 1, (sets, -1)).transpose(0, 1)


def apply_layer(name: str, h: Tensor, weight: Tensor) -> Tensor:
    """The layer called `name` on h (B, n, ...), by weight (B or 1, ...)."""
    return convolve(h, weight) if name.startswith("conv") else h.flatten(2) @ weight.mT


def using(params: Params) -> Source:
    """Weights (B or 1, ...) of each set."""
    return lambda name, h: apply_layer(name, h, params[name])


def reading(memory: Params, attention: Tensor) -> Source:
    """Weights of each query: sums of the memory's (T, S, ...) by the query's attention (T, M, S).

    Layers are linear in their weights, so that the sum may be taken before or after: whichever is cheaper.
    """

    def read(name: str, h: Tensor) -> Tensor:
        stored, pixels = memory[name], math.prod(h.shape[3:])
        size = stored.shape[1]
        if size * pixels <= TOGETHER * (size + pixels) or not name.startswith("conv"):
            answers = torch.unflatten(apply_layer(name, h, stored.flatten(1, 2)), 2, (size, -1))
            return (attention[:, :, None] @ answers.flatten(3)).reshape(*h.shape[:2], *answers.shape[3:])
        mixed = torch.unflatten(attention @ stored.flatten(2), 2, stored.shape[2:]).flatten(0, 1)
        return torch.unflatten(apply_layer(name, h.flatten(0, 1)[:, None], mixed)[:, 0], 0, h.shape[:2])

    return read


def walk(h: Tensor, names: Sequence[str], *sources: Source, inner: bool = False) -> Tensor:
    """The layers `names` on h (B, n, ...); what the sources make of h is added after a ReLU for each.

    A fully connected layer that comes last has no ReLU, unless it is an `inner` one; convolutions are pooled.
    """
    for name in names:
        parts = [source(name, h) for source in sources]
        if name.startswith("conv") or name != names[-1] or inner:
            parts = [F.relu(part) for part in parts]
        h = reduce(torch.add, parts)
        if name.startswith("conv"):
            h = torch.unflatten(F.max_pool2d(h.flatten(0, 1), 2, ceil_mode=True), 0, h.shape[:2])
    return h


def loss_gradients(net: Layers, names: Sequence[str], h: Tensor, y: Tensor) -> Params:
    """The gradients (T, S, ...) of the mean cross-entropies of T x S sets, by the layers `names` of `net` on h.

    h (T, S, n, ...), y (T, S, n). They are constants: without a graph, whatever the mode.
    """
    params = dict(net.named_parameters())
    own = {name: params[name].detach().expand(h.shape[0] * h.shape[1], *params[name].shape) for name in names}
    with torch.enable_grad():
        for weight in own.values():
            weight.requires_grad_()
        logits = walk(h.detach().flatten(0, 1), names, using(own))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[2]
    gradients = torch.autograd.grad(loss, list(own.values()))
    return {name: torch.unflatten(gradient, 0, h.shape[:2]) for name, gradient in zip(own, gradients, strict=True)}


def in_groups(order: Tensor, most: int) -> list[Tensor]:
    """Orders (T, n) cut into at most so many groups: (T, G, size), and (T, 1, rest) if the last group is shorter."""
    size = math.ceil(order.shape[1] / most)
    whole = order.shape[1] // size * size
    parts = [torch.unflatten(order[:, :whole], 1, (-1, size)), order[:, None, whole:]]
    return [part for part in parts if part.shape[2] > 0]


class MetaNet(FineTuning):
    """Munkhdalai and Yu 2017: a base learner and a representation learner, each of slow and generated fast weights.

    Attributes:
        base: slow weights W of the base learner.
        key: slow weights Q of the representation learner.
        task: the generators d of the representation learner's fast weights, for convolutions and for the rest.
        example: the generators m of the base learner's.
    """

    # every answer is the same until fast weights mean something, and that takes some hundred tasks: in a shorter
    # training the initial draw decides
    slow_start = math.inf

    def __init__(
        self,
        problem: Problem,
        *,
        augment: Augment,
        task_weights: bool,
        task_steps: int,
        filters: int,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        super().__init__(problem)
        self.use(finetune)
        if problem.ways is None or len(problem.shape) != 3:
            raise ConfigError(f"metanet classifies images, this problem's inputs have shape {problem.shape}")
        for name, value in (("task_steps", task_steps), ("filters", filters)):
            if value < 1:
                raise ConfigError(f"metanet: {name} must be at least 1, not {value}")
        self.base = Layers(problem.shape, filters=filters, ways=problem.ways)
        self.key = Layers(problem.shape, filters=filters, ways=problem.ways)
        self.example = nn.ModuleDict({"conv": ExampleGenerator(), "full": ExampleGenerator()})
        self.task = nn.ModuleDict({"conv": TaskGenerator(), "full": TaskGenerator()} if task_weights else {})
        first = 0 if augment == "all" else len(LAYERS) - LAST
        self.plain, self.augmented = LAYERS[:first], LAYERS[first:]
        self.task_steps, self.lr, self.schedule = task_steps, lr, schedule
        activations = 2 * filters * math.prod(problem.shape[1:])
        weights = sum(self.base.get_parameter(name).numel() for name in self.augmented)
        self.widest = max(activations if first == 0 else activations // 2, weights)

    def adapt(self, support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        """Fill the memories of T tasks; `steps` 0 leaves all fast weights out.

        Other numbers stand for `finetune_steps` where that is above 0, and else make no difference.
        """
        if steps == 0:
            slow = using(self.base.shared())
            return lambda x: self._execution(x).chunks(lambda part: walk(part, LAYERS, slow), x)
        examples = support.x.shape[1]
        order = mini_batches(seeds, examples, examples, 1)[:, 0].to(support.x.device)
        count = self.tuning_steps(steps)

        def learn(x: Tensor, y: Tensor, order: Tensor) -> tuple[Params, Params, Tensor, Params]:
            task, memory, keys = self._learn(x, y, order)
            return task, memory, keys, self._output(Batch(x, y, support.ways), task, memory, keys, steps=count)

        state = self._execution(support.x).chunks(learn, support.x, support.y, order)

        def predict(x: Tensor) -> Tensor:
            logits: Tensor = self._execution(x).chunks(self._answer, x, *state)
            return logits

        return predict

    def loss(self, batch: Episode | Batch) -> tuple[Tensor, Metrics]:
        """The queries' losses, summed over each task as in the paper, and averaged over tasks."""
        loss, metrics = super().loss(batch)
        assert isinstance(batch, Episode)
        return loss * batch.query.x.shape[1], metrics

    def trainer(self, total_steps: int) -> Trainer:
        """Adam, the gradient's norm clipped at 10."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, self.schedule, total_steps), clip=CLIP)

    def unsupported(self, problem: Problem) -> str | None:
        """Only tasks with the ways trained for: the slow output layer has one unit per class."""
        if problem.ways != self.problem.ways:
            return f"the output layer was trained for {self.problem.ways} ways, the test task has {problem.ways}"
        return super().unsupported(problem)

    def _execution(self, x: Tensor) -> Execution:
        return choose("grouped", x, widest=self.widest, stride=1)

    def _learn(self, x: Tensor, y: Tensor, order: Tensor) -> tuple[Params, Params, Tensor]:
        """Some tasks: fast weights (T, ...) of the representation learner, memory (T, S, ...), its keys (T, S, d).

        The first come from the examples in the order (T, S).
        """
        task = self._task_weights(x, y, order) if self.task else {}
        with torch.no_grad():
            h = walk(x, self.plain, using(self.base.shared()))
        gradients = loss_gradients(self.base, self.augmented, h[:, :, None], y[:, :, None])
        memory = {name: generate(_of(self.example, name), value[None]) for name, value in gradients.items()}
        return task, memory, self._keys(x, task)

    def _task_weights(self, x: Tensor, y: Tensor, order: Tensor) -> Params:
        """Fast weights (T, ...) of the representation learner from the losses of groups of the order (T, S) in turn."""
        with torch.no_grad():
            h = walk(x, self.plain, using(self.key.shared()))
        row = torch.arange(len(x), device=x.device)[:, None, None]
        turns = [
            loss_gradients(self.key, self.augmented, h[row, groups], y[row, groups])
            for groups in in_groups(order, self.task_steps)
        ]
        names = self.augmented[:-1]
        gradients = {name: torch.cat([turn[name] for turn in turns], 1) for name in names}
        return {name: generate(_of(self.task, name), gradients[name].transpose(0, 1)) for name in names}

    def _keys(self, x: Tensor, task: Params) -> Tensor:
        """r = u(Q, Q*, x) of images x (T, n, *shape): (T, n, d)."""
        slow = using(self.key.shared())
        h = walk(x, self.plain, slow)
        return walk(h, self.augmented[:-1], slow, *([using(task)] if task else []))

    def _output(self, support: Batch, task: Params, memory: Params, keys: Tensor, *, steps: int) -> Params:
        """Some tasks: the slow weights (T, ways, d) of the output layer after so many steps; nothing, if none."""
        if steps == 0:
            return {}
        last = LAYERS[-1]
        with torch.no_grad():
            fast, slow = self._read(support.x, task, memory, keys), using(self.base.shared())
            h = walk(walk(support.x, self.plain, slow), self.augmented[:-1], slow, fast, inner=True)
            added = fast(last, h)
        start = per_task({last: self.base.get_parameter(last)}, support.tasks)
        return self.tuned(support, start, lambda p: apply_layer(last, h, p[last]) + added, steps)

    def _read(self, x: Tensor, task: Params, memory: Params, keys: Tensor) -> Source:
        """Some tasks: the fast weights of queries x (T, M, *shape)."""
        attention = F.cosine_similarity(self._keys(x, task)[:, :, None], keys[:, None], dim=-1).softmax(-1)
        return reading(memory, attention)

    def _answer(self, x: Tensor, task: Params, memory: Params, keys: Tensor, output: Params) -> Tensor:
        """Some tasks: logits (T, M, ways) of queries x (T, M, *shape)."""
        slow = using({**self.base.shared(), **output})
        return walk(walk(x, self.plain, slow), self.augmented, slow, self._read(x, task, memory, keys))


def _of(generators: nn.ModuleDict, name: str) -> nn.Module:
    return generators["conv" if name.startswith("conv") else "full"]


def build(
    problem: Problem,
    *,
    augment: Literal["all", "last"] = "all",
    task_weights: bool = True,
    task_steps: int = 5,
    filters: int = 64,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
) -> MetaNet:
    """Meta networks for `problem`; as in the paper, one task a step, with ten queries per class.

    Args:
        problem: images and `ways` classes.
        augment: which layers have fast weights: all, or only the last three, which the paper does for mini-ImageNet.
        task_weights: whether the representation learner has fast weights; false is the paper's MetaNet-.
        task_steps: steps of the LSTM that makes them, at most: the support set is taken in so many groups, equal but
            for a last one that may be shorter.
        filters: of every convolution; the paper has 64 for Omniglot and 32 for mini-ImageNet.
        lr: Adam's rate.
        schedule: how it moves; the paper's is constant.
        finetune_steps: gradient steps of the slow output layer on support sets, in evaluation; not the paper's.
        finetune_lr: their size.

    Raises:
        ConfigError: inputs that are no images, a number below 1, or negative steps.
    """
    return MetaNet(
        problem,
        augment=augment,
        task_weights=task_weights,
        task_steps=task_steps,
        filters=filters,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr),
    )
