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
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.convolution import arrange, batch_norm, convolve, max_pool, patch_moments
from metabench.errors import ConfigError

Norm = Literal["running", "support", "each", "tasknorm", "layer", "batch"]
Pool = Literal["max", "stride", "early"]
Params = Mapping[str, Tensor]
Stats = tuple[tuple[Tensor, ...], ...]  # per normalisation layer: mean (T, C), variance (T, C) [, blend (T, 1)]

MOMENTUM = 0.1  # of the running averages, PyTorch's default
AT_ONCE = 2**24  # activations of the widest layer that the network of Koch et al. works on at a time
FORESEEN = 4  # input channels up to which a layer's statistics are cheaper to foresee from its patches


class Backbone(nn.Module, ABC):
    """x -> features. `apply_to` is pure; `forward` adds the running statistics of the `running` mode.

    Attributes:
        out_dim: the number of features d.
        widest: the largest number of activations of a layer, for one input.
        stride: of its convolutions.
        name: its registry name.
        bf16: convolve in bfloat16 (parameters, statistics and gradients of the parameters stay as they are).
        tracking: set by the trainer only; running statistics move only while it is true.
        channels_last: lay activations and weights out with the channels last (faster on CPUs).
    """

    out_dim: int
    widest: int
    stride: int = 1

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.name = ""
        self.tracking = False
        self.bf16 = False
        self.channels_last = True

    @abstractmethod
    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """Features (T, n, d) of x (T, n, *shape) and the statistics used; `stats` None: those of each task's x.

        A parameter may have a first axis S, for weights that differ: task t uses number t // (T / S) of them.
        """

    @abstractmethod
    def features(self, params: Params, x: Tensor) -> Tensor:
        """`apply_to` for those who want no statistics, which is cheaper: features (T, n, d) of x (T, n, *shape)."""

    def averages(self, tasks: int) -> Stats | None:
        """The running averages, where there are any, as the statistics of so many tasks: for `apply_to`."""
        del tasks
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d) of x (N, *shape): ordinary batch norm when `norm` is running, else x is one task."""
        return self.features(dict(self.named_parameters()), x[None])[0]

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
            return self.features(params, x)
        if self.norm == "each":
            return self._each(params, x, support)
        return self.apply_to(params, x, stats)[0]

    def _each(self, params: Params, x: Tensor, support: Tensor) -> Tensor:
        tasks, queries = x.shape[:2]
        crowd = support[:, None].expand(tasks, queries, *support.shape[1:])
        joint = torch.cat([crowd, x[:, :, None]], dim=2).flatten(0, 1)
        return self.features(params, joint)[:, -1].reshape(tasks, queries, -1)

    def _ordinary_features(self, x: Tensor) -> Tensor:
        features: Tensor = self(x.flatten(0, 1))
        return features.reshape(*x.shape[:2], -1)


class Conv4(Backbone):
    """Four blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pooling (Vinyals et al. 2016; Snell et al. 2017).

    `pool="max"`: pooled (28 -> 14 -> 7 -> 3 -> 1: 64 features). `pool="stride"`: stride-2 convolutions, no pooling
    (28 -> 14 -> 7 -> 4 -> 2), flattened to 256 features (Reptile) or, with `average`, the mean over 2x2: 64 (MAML).
    `pool="early"`: the first two blocks are pooled and their convolutions not padded (28 -> 13 -> 5 -> 5 -> 5), for the
    maps of a relation network. The pooling stands before the ReLU: equal, since both are monotone, and cheaper. With a
    `slope` the ReLU is leaky.

    Attributes:
        map: channels, height and width of the last block's output.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        norm: Norm,
        pool: Pool = "max",
        average: bool = False,
        filters: int = 64,
        eps: float = 1e-5,
        gamma: bool = True,
        glorot: bool = False,
        slope: float = 0.0,
    ) -> None:
        super().__init__(norm)
        self.average, self.eps, self.slope = average, eps, slope
        self.stride = 2 if pool == "stride" else 1
        self.padding = (0, 0, 1, 1) if pool == "early" else (1, 1, 1, 1)
        self.pooled = {"max": 4, "stride": 0, "early": 2}[pool]  # the first blocks, so many of them
        self.widest = filters * math.prod(self._convolved(side, 0) for side in shape[-2:])
        channels, side = shape[0], shape[-1]
        for i in range(4):
            self._add_block(i, channels if i == 0 else filters, filters, gamma=gamma, glorot=glorot)
            side = self._convolved(side, i) // (2 if i < self.pooled else 1)
        if side < 1:
            least = 10 if pool == "early" else 16
            raise ConfigError(f"conv4 needs images of at least {least}x{least} pixels, got {shape[-2]}x{shape[-1]}")
        self.out_dim = filters if average else filters * side * side
        self.map = (filters, side, side)

    def _convolved(self, side: int, i: int) -> int:
        """The side of an image after the convolution of block i."""
        return (side + 2 * self.padding[i] - 3) // self.stride + 1

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
        return self._run(params, x, stats, keep=True)

    def features(self, params: Params, x: Tensor) -> Tensor:
        """See `Backbone.features`; exact to the second order."""
        return self._run(params, x, None, keep=False)[0]

    def averages(self, tasks: int) -> Stats | None:
        """See `Backbone.averages`."""
        if self.norm != "running":
            return None
        return tuple(tuple(self.get_buffer(f"{n}{i}").expand(tasks, -1) for n in ("mean", "var")) for i in range(4))

    def _run(self, params: Params, x: Tensor, stats: Stats | None, *, keep: bool) -> tuple[Tensor, Stats]:
        weights = _own(params, "conv0").shape[0]
        sets = x.shape[0] // weights  # of each weight
        used: list[tuple[Tensor, ...]] = []
        h = arrange(torch.unflatten(x, 0, (weights, sets)).flatten(1, 2), channels_last=self.channels_last)
        for i in range(4):
            h, layer = self._block(params, h, i, sets, None if stats is None else stats[i], keep)
            h = self._shrink(h, i)
            used.append(layer)
        return self._flatten(h).reshape(*x.shape[:2], -1), tuple(used)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, d): in running mode batch statistics while training, else the running averages."""
        if self.norm != "running":
            return super().forward(x)
        params = dict(self.named_parameters())
        h = arrange(x[None], channels_last=self.channels_last)
        for i in range(4):
            h = self._shrink(self._ordinary(params, h, i), i)
        return self._flatten(h)[0].to(x.dtype)

    def _block(
        self, params: Params, h: Tensor, i: int, sets: int, layer: tuple[Tensor, ...] | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Convolution and normalisation of h (S, N, H, W, C), N images of `sets` sets, and the statistics used.

        Where they come from this batch and nobody wants to keep them, they are ().
        """
        weight, bias = _own(params, f"conv{i}"), _own(params, f"bias{i}")
        plain = self.norm not in ("layer", "tasknorm")
        if layer is None and plain and i == 0 and weight.shape[2] <= FORESEEN:
            layer = self._foreseen(weight, bias, h, sets)
        if layer is not None and plain and sets == 1:
            return self._folded(params, h, i, layer).to(layer[0].dtype), layer
        y = torch.unflatten(self._convolve(h, i, weight, bias).to(bias.dtype), 1, (sets, -1))  # (S, sets, n, H, W, C)
        if layer is None and plain and not keep:
            gamma = _own(params, f"gamma{i}") if f"gamma{i}" in params else None
            return batch_norm(y, gamma, _own(params, f"beta{i}"), self.eps).flatten(1, 2), ()
        if layer is None:
            layer = self._statistics(params, y, i)
        scale, shift = self._affine(params, i, *self._moments(y, layer))
        return torch.addcmul(shift, y, scale).flatten(1, 2), layer

    def _folded(self, params: Params, h: Tensor, i: int, layer: tuple[Tensor, ...]) -> Tensor:
        """Convolution and normalisation in one: known statistics go into the weights, which saves passes over y."""
        gamma = _own(params, f"gamma{i}") if f"gamma{i}" in params else 1.0
        scale = torch.rsqrt(layer[1] + self.eps) * gamma
        weight = _own(params, f"conv{i}") * scale[:, :, None, None, None]
        return self._convolve(h, i, weight, (_own(params, f"bias{i}") - layer[0]) * scale + _own(params, f"beta{i}"))

    def _convolve(self, h: Tensor, i: int, weight: Tensor, bias: Tensor) -> Tensor:
        if self.bf16:
            h, weight, bias = h.bfloat16(), weight.bfloat16(), bias.bfloat16()
        if not self.channels_last:
            weight = weight.contiguous()
        return convolve(h, weight, bias, stride=self.stride, padding=self.padding[i])

    def _shrink(self, h: Tensor, i: int) -> Tensor:
        h = max_pool(h) if i < self.pooled else h
        return F.leaky_relu(h, self.slope) if self.slope else F.relu(h)

    def _flatten(self, h: Tensor) -> Tensor:
        """h (S, N, H, W, C) -> features (S, N, d), channels before pixels."""
        return h.mean((2, 3)) if self.average else h.permute(0, 1, 4, 2, 3).flatten(2)

    def _ordinary(self, params: Params, h: Tensor, i: int) -> Tensor:
        """Convolution and ordinary batch norm of h (1, N, H, W, C), all of it one set."""
        weight, bias = _own(params, f"conv{i}"), _own(params, f"bias{i}")
        mean, var = self.get_buffer(f"mean{i}"), self.get_buffer(f"var{i}")
        if not self.training:
            return self._folded(params, h, i, (mean[None], var[None]))
        if i == 0 and weight.shape[2] <= FORESEEN:
            layer = self._foreseen(weight, bias, h, 1)
            y = self._folded(params, h, i, layer)
            if self.tracking:
                count = y[..., 0].numel()
                mean.lerp_(layer[0][0].detach(), MOMENTUM)
                var.lerp_(layer[1][0].detach() * (count / (count - 1)), MOMENTUM)
            return y
        gamma, beta = params.get(f"gamma{i}"), params[f"beta{i}"]
        y = self._convolve(h, i, weight, bias).squeeze(0).permute(0, 3, 1, 2)
        averages = (mean, var) if self.tracking else (None, None)
        z = F.batch_norm(y, averages[0], averages[1], gamma, beta, True, MOMENTUM, self.eps)
        return z.permute(0, 2, 3, 1).unsqueeze(0)

    def _foreseen(self, weight: Tensor, bias: Tensor, h: Tensor, sets: int) -> tuple[Tensor, ...]:
        """Mean and variance (S sets, C) of a convolution's output, from its input's patches alone.

        The output is linear in the patches: its variance is w' V w, V their covariance (9 C x 9 C, of few channels).
        """
        centre, covariance = patch_moments(h, stride=self.stride, sets=sets, padding=self.padding[0])
        rows = weight.permute(0, 1, 3, 4, 2).flatten(2)[:, None]  # (S, 1, O, 9 C)
        mean = (rows @ centre).squeeze(3) + bias[:, None]
        return mean.flatten(0, 1), (rows @ covariance * rows).sum(-1).flatten(0, 1)

    def _statistics(self, params: Params, y: Tensor, i: int) -> tuple[Tensor, ...]:
        """Mean and variance (S sets, C) over each set's images and pixels; with TaskNorm also the learned blend."""
        if self.norm == "layer":
            return ()
        mean = y.mean((2, 3, 4), keepdim=True)
        layer = mean[:, :, 0, 0, 0].flatten(0, 1), (y - mean).square().mean((2, 3, 4)).flatten(0, 1)
        if self.norm != "tasknorm":
            return layer
        blend = torch.sigmoid(_own(params, f"scale{i}") * y.shape[2] + _own(params, f"offset{i}"))  # (S or 1, 1)
        return *layer, blend[:, None].expand(*y.shape[:2], 1).flatten(0, 1)

    def _moments(self, y: Tensor, layer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Mean and variance that broadcast over y (S, sets, n, H, W, C)."""
        if self.norm == "layer":
            mean = y.mean((3, 4, 5), keepdim=True)
            return mean, (y - mean).square().mean((3, 4, 5), keepdim=True)
        mean, var = (_open(m, y.shape[1]) for m in layer[:2])
        if self.norm != "tasknorm":
            return mean, var
        own = y.mean((3, 4), keepdim=True)
        own_var = (y - own).square().mean((3, 4), keepdim=True)
        blend = _open(layer[2], y.shape[1])
        mixed = blend * mean + (1 - blend) * own
        mixed_var = blend * (var + (mean - mixed).square()) + (1 - blend) * (own_var + (own - mixed).square())
        return mixed, mixed_var

    def _affine(self, params: Params, i: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that normalise; all broadcast over (S, sets, n, H, W, C)."""
        scale = torch.rsqrt(var + self.eps)
        if f"gamma{i}" in params:
            scale = scale * _own(params, f"gamma{i}")[:, None, None, None, None]
        return scale, _own(params, f"beta{i}")[:, None, None, None, None] - mean * scale


def _open(statistic: Tensor, sets: int) -> Tensor:
    """A statistic (S sets, C) so that it broadcasts over (S, sets, n, H, W, C)."""
    return torch.unflatten(statistic, 0, (-1, sets))[:, :, None, None, None]


def _own(params: Params, name: str) -> Tensor:
    """The parameter with its axis of weights: (1, ...) where all tasks share it."""
    value = params[name]
    return value if value.dim() > _DIMS.get(name.rstrip("0123456789"), 1) else value[None]


_DIMS = {"conv": 4, "weight": 2}  # of a parameter without an axis of weights; all others are vectors


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
        self.out_dim = self.widest = hidden

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; there are no statistics."""
        return self.features(params, x), ()

    def features(self, params: Params, x: Tensor) -> Tensor:
        """See `Backbone.features`."""
        weights = _own(params, "weight0").shape[0]
        h = x.flatten(2).reshape(weights, -1, x[0, 0].numel())
        for i in range(2):
            h = F.relu(h @ _own(params, f"weight{i}").mT + _own(params, f"bias{i}")[:, None])
        return h.reshape(*x.shape[:2], -1)


class Koch(Backbone):
    """Koch et al. 2015, section 3.1: four unpadded convolutions with ReLU and max-pooling, one sigmoid layer; no norm.

    105x105, kernels 10-7-4-4 with 64-128-128-256 filters, pooled after the first three: 96-48-42-21-18-9-6, so that
    9216 activations enter a layer of 4096 units. The paper's reduced form takes 35x35 (its section 4.4), kernels
    5-3-2-2 here, for it does not give them: 31-15-13-6-5-2-1, 256 activations. Initialised as section 3.2 says:
    N(0, 0.01^2) convolutions, N(0, 0.2^2) weights of the last layer, N(0.5, 0.01^2) biases. The 105x105 form is born
    saturated that way: the biases alone bring 9216 activations of about 0.5, whose weighted sums have a standard
    deviation of 10, so that two thirds of the sigmoids begin outside 0.01 to 0.99 (of the reduced form's, hardly any).
    """

    KERNELS: ClassVar[dict[int, tuple[int, ...]]] = {105: (10, 7, 4, 4), 35: (5, 3, 2, 2)}
    FILTERS = (64, 128, 128, 256)
    UNITS = 4096

    def __init__(self, shape: tuple[int, ...], *, norm: Norm, side: int = 105) -> None:
        super().__init__(norm)
        kernels = self.KERNELS[side]
        if shape[-2:] != (side, side):
            size = f"{shape[-2]}x{shape[-1]}"
            raise ConfigError(
                f"koch{side} needs images of {side}x{side} pixels, got {size}: give the data set size: {side}"
            )
        channels, self.widest = shape[0], 0
        for i, (kernel, filters) in enumerate(zip(kernels, self.FILTERS, strict=True)):
            side, before = side - kernel + 1, channels
            self._add_layer(f"conv{i}", f"bias{i}", (filters, before, kernel, kernel), std=0.01)
            self.widest, channels = max(self.widest, filters * side * side), filters
            side //= 2 if i < 3 else 1
        self._add_layer("weight4", "bias4", (self.UNITS, channels * side * side), std=0.2)
        self.out_dim = self.UNITS

    def _add_layer(self, weight: str, bias: str, shape: tuple[int, ...], *, std: float) -> None:
        self.register_parameter(weight, nn.Parameter(torch.randn(shape) * std))
        self.register_parameter(bias, nn.Parameter(0.5 + 0.01 * torch.randn(shape[0])))

    def apply_to(self, params: Params, x: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats]:
        """See `Backbone.apply_to`; there are no statistics."""
        return self.features(params, x), ()

    def features(self, params: Params, x: Tensor) -> Tensor:
        """See `Backbone.features`; weights that differ take their turns."""
        own = {name: _own(params, name) for name in params}
        sets = torch.unflatten(x, 0, (len(own["conv0"]), -1)).flatten(1, 2)
        rows = []
        for s, images in enumerate(sets):
            mine = {name: value[s % len(value)] for name, value in own.items()}
            rows.append(torch.cat([self._embed(mine, part) for part in images.split(max(1, AT_ONCE // self.widest))]))
        return torch.stack(rows).reshape(*x.shape[:2], -1)

    def _embed(self, params: Params, x: Tensor) -> Tensor:
        """Features (N, d) of images (N, C, H, W)."""
        h = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        for i in range(4):
            weight, bias = params[f"conv{i}"], params[f"bias{i}"]
            if self.bf16:
                h, weight, bias = h.bfloat16(), weight.bfloat16(), bias.bfloat16()
            h = F.conv2d(h, weight, bias)
            h = F.relu(F.max_pool2d(h, 2) if i < 3 else h)
        return F.linear(h.flatten(1).to(x.dtype), params["weight4"], params["bias4"]).sigmoid()


class Network(nn.Module):
    """A backbone and a linear head, as pure functions of one flat dict of parameters: what inner loops adapt.

    The parameters may have a task axis, as for `Backbone.apply_to`.
    """

    def __init__(self, backbone: Backbone, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_dim, outputs)

    def on_support(self, params: Params, x: Tensor) -> Tensor:
        """Outputs (T, n, outputs) of images x (T, n, *shape) normalised by their own statistics."""
        return self._answer(params, self.backbone.features(_strip(params, "backbone."), x))

    def with_stats(self, params: Params, x: Tensor) -> tuple[Tensor, Stats]:
        """`on_support`, and the statistics that normalised x."""
        features, stats = self.backbone.apply_to(_strip(params, "backbone."), x)
        return self._answer(params, features), stats

    def support_stats(self, params: Params, x: Tensor) -> Stats:
        """The statistics of support images x (T, n, *shape) if queries are normalised with them, else ()."""
        if self.backbone.norm not in ("support", "tasknorm"):
            return ()
        return self.backbone.apply_to(_strip(params, "backbone."), x)[1]

    def on_query(self, params: Params, x: Tensor, support: Tensor, stats: Stats) -> Tensor:
        """Outputs (T, m, outputs) of queries x (T, m, *shape), normalised as the backbone's `norm` says."""
        return self._answer(params, self.backbone.embed_query(_strip(params, "backbone."), x, support, stats))

    def _answer(self, params: Params, features: Tensor) -> Tensor:
        head = _strip(params, "head.")
        return features @ _own(head, "weight").mT + _own(head, "bias")[:, None]


def _strip(params: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


METABENCH_BACKBONES = {
    "conv4": "4 x [3x3 conv 64, norm, max-pool, ReLU] -> 64 features on 28x28 (Vinyals 2016, Snell 2017)",
    "conv4-strided": "stride-2 convolutions, no pooling, mean over 2x2 -> 64 features (Finn 2017)",
    "conv4-strided-flat": "stride-2 convolutions, no pooling -> 256 features on 28x28 (Nichol 2018)",
    "conv4-maps": "unpadded and pooled in the first two blocks -> 64 maps of 5x5 on 28x28 (Sung 2018)",
    "koch105": "4 convolutions, 10x10 to 4x4, and 4096 sigmoid units for 105x105, no norm (Koch 2015)",
    "koch35": "the same for 35x35, 5x5 to 2x2 (Koch 2015, reduced)",
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
    filters: int = 64,
    slope: float = 0.0,
) -> Backbone:
    """The backbone called `name` for inputs of `shape`; all but `norm` is for convolutions (see `Conv4`).

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
    elif name in ("koch105", "koch35"):
        network = Koch(shape, norm=norm, side=105 if name == "koch105" else 35)
    else:
        pools: dict[str, Pool] = {"conv4": "max", "conv4-maps": "early"}
        network = Conv4(
            shape,
            norm=norm,
            pool=pools.get(name, "stride"),
            average=name == "conv4-strided",
            filters=filters,
            eps=eps,
            gamma=gamma,
            glorot=glorot,
            slope=slope,
        )
    network.name = name
    return network
