"""Embedding networks as pure functions of (parameters, input, statistics), and where these statistics come from.

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
import sys
from abc import ABC, abstractmethod
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


class Backbone(nn.Module, ABC):
    """x -> features. `apply_to` is pure; `forward` adds the running statistics of the `running` mode.

    Attributes:
        out_dim: the number of features d.
        name: its registry name.
        bf16: convolve in bfloat16 (parameters, statistics and gradients of the parameters stay as they are).
        tracking: set by the trainer only; running statistics move only while it is true.
        vmap_limit: up to so many examples a task, vmap over tasks with weights of their own beats a loop (on a CPU).
    """

    out_dim: int
    vmap_limit: int

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.name = ""
        self.tracking = False
        self.bf16 = False

    @abstractmethod
    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """Features (T, n, d) of x (T, n, *shape) and the statistics used; `stats` None: those of each task's x."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d) of x (N, *shape): ordinary batch norm when `norm` is running, else x is one task."""
        return self.apply_to(dict(self.named_parameters()), x[None])[0][0]

    def embed_support(self, params: Params, x: Tensor) -> tuple[Tensor, Stats]:
        """Features (T, n, d) of support sets and the statistics their queries need."""
        if self.norm == "running":
            return self._ordinary_features(x), ()
        return self.apply_to(params, x)

    def embed_query(self, params: Params, x: Tensor, support: Tensor, stats: Stats) -> Tensor:
        """Features (T, m, d) of queries x (T, m, *shape), normalised as `norm` says."""
        if self.norm == "running":
            return self._ordinary_features(x)
        if self.norm in ("batch", "layer"):
            return self.apply_to(params, x)[0]
        if self.norm == "each":
            return self._each(params, x, support)
        return self.apply_to(params, x, stats)[0]

    def _each(self, params: Params, x: Tensor, support: Tensor) -> Tensor:
        tasks, queries = x.shape[:2]
        crowd = support[:, None].expand(tasks, queries, *support.shape[1:])
        joint = torch.cat([crowd, x[:, :, None]], dim=2).flatten(0, 1)
        return self.apply_to(params, joint)[0][:, -1].reshape(tasks, queries, -1)

    def _ordinary_features(self, x: Tensor) -> Tensor:
        features: Tensor = self(x.flatten(0, 1))
        return features.reshape(*x.shape[:2], -1)


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
            self._add_block(i, channels if i == 0 else filters, filters, gamma=gamma, glorot=glorot)
            side = side // 2 if pool == "max" else math.ceil(side / 2)
        if side < 1:
            raise ConfigError(f"conv4 needs images of at least 16x16 pixels, got {shape[-2]}x{shape[-1]}")
        self.out_dim = filters if average else filters * side * side
        self.vmap_limit = 10 if pool == "stride" else 0

    def _add_block(self, i: int, channels: int, filters: int, *, gamma: bool, glorot: bool) -> None:
        conv = nn.Conv2d(channels, filters, 3)
        bias = conv.bias if conv.bias is not None else torch.zeros(filters)
        if glorot:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(bias)
        weight = conv.weight.detach().to(memory_format=torch.channels_last)
        self.register_parameter(f"conv{i}", nn.Parameter(weight))
        self.register_parameter(f"bias{i}", nn.Parameter(bias.detach()))
        self.register_parameter(f"gamma{i}", nn.Parameter(torch.ones(filters)) if gamma else None)
        self.register_parameter(f"beta{i}", nn.Parameter(torch.zeros(filters)))
        if self.norm == "tasknorm":
            self.register_parameter(f"scale{i}", nn.Parameter(torch.zeros(1)))
            self.register_parameter(f"offset{i}", nn.Parameter(torch.zeros(1)))
        if self.norm == "running":
            self.register_buffer(f"mean{i}", torch.zeros(filters))
            self.register_buffer(f"var{i}", torch.ones(filters))

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; batch norm from primitives, exact to any order of gradient and under vmap."""
        tasks = x.shape[0]
        used: list[tuple[Tensor, ...]] = []
        h = x.flatten(0, 1)
        for i in range(4):
            h = self._convolve(params, h, i).to(x.dtype)
            layer = self._statistics(params, h, i, tasks) if stats is None else stats[i]
            h = self._shrink(self._normalise(params, h, i, layer, tasks))
            used.append(layer)
        return self._flatten(h).reshape(*x.shape[:2], -1), tuple(used)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d): in running mode through the fused batch norm, batch statistics while training."""
        if self.norm != "running":
            return super().forward(x)
        params = dict(self.named_parameters())
        # `to`, not `contiguous`: with one channel the latter leaves the strides, and all layers would run the slow way
        h = x.to(memory_format=torch.channels_last)
        for i in range(4):
            h = self._shrink(self._ordinary(params, self._convolve(params, h, i), i))
        return self._flatten(h).to(x.dtype)

    def _convolve(self, params: Params, h: Tensor, i: int) -> Tensor:
        weight, bias = params[f"conv{i}"], params[f"bias{i}"]
        if self.bf16:
            h, weight, bias = h.bfloat16(), weight.bfloat16(), bias.bfloat16()
        return F.conv2d(h, weight, bias, stride=2 if self.pool == "stride" else 1, padding=1)

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
        split = h.reshape(tasks, -1, *h.shape[1:])
        mean = split.mean((1, 3, 4))
        var = (split - mean[:, None, :, None, None]).square().mean((1, 3, 4))
        if self.norm != "tasknorm":
            return mean, var
        blend = torch.sigmoid(params[f"scale{i}"] * split.shape[1] + params[f"offset{i}"])
        return mean, var, blend.expand(tasks, 1)

    def _normalise(self, params: Params, h: Tensor, i: int, layer: tuple[Tensor, ...], tasks: int) -> Tensor:
        split = h.reshape(tasks, -1, *h.shape[1:])
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

    MAML: 1-40-40; Reptile: 1-64-64. PyTorch's initialisation (MAML's code: truncated normal 0.01, which learns slower).
    """

    def __init__(self, shape: tuple[int, ...], *, norm: Norm, hidden: int = 40) -> None:
        super().__init__(norm)
        width = math.prod(shape)
        for i in range(2):
            layer = nn.Linear(width, hidden)
            for name, value in layer.named_parameters():
                self.register_parameter(f"{name}{i}", value)
            width = hidden
        self.out_dim = hidden
        self.vmap_limit = sys.maxsize

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; there are no statistics."""
        h = x.flatten(2)
        for i in range(2):
            h = F.relu(F.linear(h, params[f"weight{i}"], params[f"bias{i}"]))
        return h, ()


class Network(nn.Module):
    """A backbone and a linear head, as pure functions of one flat dict of parameters: what inner loops adapt.

    The functions are of ONE task, x (n, *shape), so that `tasks.Execution` can map them over the task axis.
    """

    def __init__(self, backbone: Backbone, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_dim, outputs)

    def on_support(self, params: Params, x: Tensor) -> tuple[Tensor, Stats]:
        """Outputs (n, outputs) of the images that the statistics come from, and these statistics."""
        features, stats = self.backbone.apply_to(_strip(params, "backbone."), x[None])
        return self._answer(params, features), stats

    def support_stats(self, params: Params, x: Tensor) -> Stats:
        """The statistics of support images x (n, *shape) if queries are normalised with them, else ()."""
        return self.on_support(params, x)[1] if self.backbone.norm in ("support", "tasknorm") else ()

    def on_query(self, params: Params, x: Tensor, support: Tensor, stats: Stats) -> Tensor:
        """Outputs (m, outputs) of queries x (m, *shape), normalised as the backbone's `norm` says."""
        features = self.backbone.embed_query(_strip(params, "backbone."), x[None], support[None], stats)
        return self._answer(params, features)

    def _answer(self, params: Params, features: Tensor) -> Tensor:
        return F.linear(features[0], params["head.weight"], params["head.bias"])


def _strip(params: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


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
    if name not in METABENCH_BACKBONES:
        raise ConfigError(f"unknown backbone {name!r} (known: {', '.join(METABENCH_BACKBONES)})")
    network: Backbone
    if name in ("mlp", "mlp64"):
        network = Mlp(shape, norm=norm, hidden=64 if name == "mlp64" else 40)
    elif len(shape) != 3:
        raise ConfigError(f"backbone {name} needs images, this problem's inputs have shape {shape}: use mlp")
    else:
        pool: Literal["max", "stride"] = "max" if name == "conv4" else "stride"
        average = name == "conv4-strided"
        network = Conv4(shape, norm=norm, pool=pool, average=average, eps=eps, gamma=gamma, glorot=glorot)
    network.name = name
    return network
