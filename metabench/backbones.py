"""Embedding networks as pure functions of (parameters, input, statistics), and where normalisation takes its statistics.

Normalisation is the largest hidden variable of few-shot learning (Bronskill et al. 2020, TaskNorm), so it is a
parameter of every method, `norm`:
- `running`: batch statistics in training, running averages in evaluation (ordinary batch norm);
- `support`: statistics of the task's support set, reused for its queries ("MetaBN");
- `each`: every query is normalised in a batch of the support set and itself;
- `tasknorm`: support statistics blended with the image's own (TaskNorm-I);
- `layer`: the image's own statistics over channels and pixels (layer norm);
- `batch`: the query batch's own statistics, all queries at once: transductive, never ranked with the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.errors import ConfigError

Norm = Literal["running", "support", "each", "tasknorm", "layer", "batch"]
Params = Mapping[str, Tensor]
Stats = tuple[tuple[Tensor, ...], ...]  # per normalisation layer: mean (T, C), variance (T, C) [, blend (T, 1)]

MOMENTUM = 0.1  # of the running averages, PyTorch's default


class Backbone(nn.Module):
    """x -> features. `apply_to` is pure; `forward` adds the running statistics of the `running` mode.

    Attributes:
        out_dim: the number of features d.
        tracking: set by the trainer only; running statistics move only while it is true.
    """

    out_dim: int

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.tracking = False

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """Features (T, n, d) of x (T, n, *shape) and the statistics used; `stats` None: those of each task's x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d) of x (N, *shape): ordinary batch norm when `norm` is running, else x is one task."""
        return self.apply_to(dict(self.named_parameters()), x[None])[0][0]

    def embed_support(self, params: Params, x: Tensor) -> tuple[Tensor, Stats]:
        """Features (T, n, d) of support sets and the statistics their queries need."""
        if self.norm == "running":
            return self(x.flatten(0, 1)).unflatten(0, x.shape[:2]), ()
        return self.apply_to(params, x)

    def embed_query(self, params: Params, x: Tensor, support: Tensor, stats: Stats) -> Tensor:
        """Features (T, m, d) of queries x (T, m, *shape), normalised as `norm` says."""
        if self.norm == "running":
            features: Tensor = self(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return features
        if self.norm == "batch":
            return self.apply_to(params, x)[0]
        if self.norm == "each":
            return self._each(params, x, support)
        return self.apply_to(params, x, stats)[0]

    def _each(self, params: Params, x: Tensor, support: Tensor) -> Tensor:
        tasks, queries = x.shape[:2]
        crowd = support[:, None].expand(tasks, queries, *support.shape[1:])
        joint = torch.cat([crowd, x[:, :, None]], dim=2).flatten(0, 1)
        return self.apply_to(params, joint)[0][:, -1].unflatten(0, (tasks, queries))


class Conv4(Backbone):
    """Four blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pooling (Vinyals et al. 2016; Snell et al. 2017).

    `pool="max"`: pooled (28 -> 14 -> 7 -> 3 -> 1: 64 features). `pool="stride"`: stride-2 convolutions, no pooling
    (28 -> 14 -> 7 -> 4 -> 2), flattened to 256 features (Reptile) or, with `average`, the mean over 2x2: 64 (MAML).
    The pooling stands before the ReLU: equal, since both are monotone, and cheaper.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        norm: Norm,
        pool: Literal["max", "stride"] = "max",
        average: bool = False,
        filters: int = 64,
        eps: float = 1e-5,
        gamma: bool = True,
        glorot: bool = False,
    ) -> None:
        super().__init__(norm)
        self.pool, self.average, self.eps = pool, average, eps
        channels, side = shape[0], shape[-1]
        for i in range(4):
            conv = nn.Conv2d(channels if i == 0 else filters, filters, 3)
            if glorot:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.register_parameter(
                f"conv{i}", nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
            )
            self.register_parameter(f"bias{i}", conv.bias)
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.ones(filters)) if gamma else None)
            self.register_parameter(f"beta{i}", nn.Parameter(torch.zeros(filters)))
            if norm == "tasknorm":
                self.register_parameter(f"scale{i}", nn.Parameter(torch.zeros(1)))
                self.register_parameter(f"offset{i}", nn.Parameter(torch.zeros(1)))
            if norm == "running":
                self.register_buffer(f"mean{i}", torch.zeros(filters))
                self.register_buffer(f"var{i}", torch.ones(filters))
            side = side // 2 if pool == "max" else math.ceil(side / 2)
        if side < 1:
            raise ConfigError(f"conv4 needs images of at least 16x16 pixels, got {shape[-2]}x{shape[-1]}")
        self.out_dim = filters if average else filters * side * side

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; batch norm from primitives, exact to any order of gradient and under vmap."""
        tasks = x.shape[0]
        used: list[tuple[Tensor, ...]] = []
        h = x.flatten(0, 1)
        for i in range(4):
            h = self._convolve(params, h, i)
            layer = self._statistics(params, h, i, tasks) if stats is None else stats[i]
            h = self._shrink(self._normalise(params, h, i, layer, tasks))
            used.append(layer)
        return self._flatten(h).unflatten(0, x.shape[:2]), tuple(used)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d): in running mode through the fused batch norm, batch statistics while training."""
        if self.norm != "running":
            return super().forward(x)
        params = dict(self.named_parameters())
        h = x.contiguous(memory_format=torch.channels_last)
        for i in range(4):
            h = self._shrink(self._ordinary(params, self._convolve(params, h, i), i))
        return self._flatten(h)

    def _convolve(self, params: Params, h: Tensor, i: int) -> Tensor:
        return F.conv2d(h, params[f"conv{i}"], params[f"bias{i}"], stride=2 if self.pool == "stride" else 1, padding=1)

    def _shrink(self, h: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(h, 2) if self.pool == "max" else h)

    def _flatten(self, h: Tensor) -> Tensor:
        return h.mean((-2, -1)) if self.average else h.flatten(1)

    def _ordinary(self, params: Params, h: Tensor, i: int) -> Tensor:
        use_running = self.tracking or not self.training
        mean, var = (self.get_buffer(f"mean{i}"), self.get_buffer(f"var{i}")) if use_running else (None, None)
        return F.batch_norm(
            h, mean, var, params.get(f"gamma{i}"), params[f"beta{i}"], self.training, MOMENTUM, self.eps
        )

    def _statistics(self, params: Params, h: Tensor, i: int, tasks: int) -> tuple[Tensor, ...]:
        """Mean and variance (T, C) over each task's images and pixels; with TaskNorm also the learned blend."""
        if self.norm == "layer":
            return ()
        split = h.unflatten(0, (tasks, -1))
        mean = split.mean((1, 3, 4))
        var = (split - mean[:, None, :, None, None]).square().mean((1, 3, 4))
        if self.norm != "tasknorm":
            return mean, var
        blend = torch.sigmoid(params[f"scale{i}"] * split.shape[1] + params[f"offset{i}"])
        return mean, var, blend.expand(tasks, 1)

    def _normalise(self, params: Params, h: Tensor, i: int, layer: tuple[Tensor, ...], tasks: int) -> Tensor:
        split = h.unflatten(0, (tasks, -1))
        mean, var = self._moments(split, layer)
        inverse = torch.rsqrt(var + self.eps)
        gamma = params.get(f"gamma{i}")
        if gamma is not None:
            inverse = inverse * gamma[:, None, None]
        shift = params[f"beta{i}"][:, None, None] - mean * inverse
        return (split * inverse + shift).flatten(0, 1)

    def _moments(self, split: Tensor, layer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Mean and variance that broadcast over split (T, n, C, H, W)."""
        if self.norm == "layer":
            mean = split.mean((2, 3, 4), keepdim=True)
            return mean, (split - mean).square().mean((2, 3, 4), keepdim=True)
        mean, var = (m[:, None, :, None, None] for m in layer[:2])
        if self.norm != "tasknorm":
            return mean, var
        own = split.mean((3, 4), keepdim=True)
        own_var = (split - own).square().mean((3, 4), keepdim=True)
        blend = layer[2][:, :, None, None, None]
        mixed = blend * mean + (1 - blend) * own
        mixed_var = blend * (var + (mean - mixed).square()) + (1 - blend) * (own_var + (own - mixed).square())
        return mixed, mixed_var


class Mlp(Backbone):
    """Fully connected ReLU layers for vector inputs, no normalisation (the sinusoid network without its last layer).

    MAML: 1-40-40, truncated normal 0.01 initialisation; Reptile: 1-64-64.
    """

    def __init__(self, shape: tuple[int, ...], *, norm: Norm, hidden: int = 40) -> None:
        super().__init__(norm)
        width = math.prod(shape)
        for i in range(2):
            layer = nn.Linear(width, hidden)
            self.register_parameter(f"weight{i}", layer.weight)
            self.register_parameter(f"bias{i}", layer.bias)
            width = hidden
        self.out_dim = hidden

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; there are no statistics."""
        h = x.flatten(2)
        for i in range(2):
            h = F.relu(F.linear(h, params[f"weight{i}"], params[f"bias{i}"]))
        return h, ()


METABENCH_BACKBONES = {
    "conv4": "4 x [3x3 conv 64, norm, max-pool, ReLU] -> 64 features on 28x28 (Vinyals 2016, Snell 2017)",
    "conv4-strided": "stride-2 convolutions, no pooling, mean over 2x2 -> 64 features (Finn 2017)",
    "conv4-strided-flat": "stride-2 convolutions, no pooling -> 256 features on 28x28 (Nichol 2018)",
    "mlp": "two ReLU layers of 40 units for vectors (Finn 2017)",
    "mlp64": "two ReLU layers of 64 units for vectors (Nichol 2018)",
}


def make_backbone(
    name: str,
    shape: tuple[int, ...],
    *,
    norm: Norm,
    eps: float = 1e-5,
    gamma: bool = True,
    glorot: bool = False,
) -> Backbone:
    """The backbone called `name` for inputs of `shape`.

    Raises:
        ConfigError: an unknown name, or images for an MLP / vectors for a convolution.
    """
    if name in ("mlp", "mlp64"):
        return Mlp(shape, norm=norm, hidden=64 if name == "mlp64" else 40)
    if name not in METABENCH_BACKBONES:
        raise ConfigError(f"unknown backbone {name!r} (known: {', '.join(METABENCH_BACKBONES)})")
    if len(shape) != 3:
        raise ConfigError(f"backbone {name} needs images, this problem's inputs have shape {shape}: use mlp")
    pool: Literal["max", "stride"] = "max" if name == "conv4" else "stride"
    return Conv4(shape, norm=norm, pool=pool, average=name == "conv4-strided", eps=eps, gamma=gamma, glorot=glorot)
