"""Layers of several tasks at once, each task with weights of its own, and exact to the second order.

Tasks, images, pixels, channels: (S, N, H, W, C), whatever the order in memory. A convolution of one task is PyTorch's
own; more tasks are one grouped convolution (in memory N, H, W, S, C) or, unfolded, one batched matrix product (in
memory S, N, H, W, C). The gradients of either order are written out: PyTorch's own second order loops over the groups
of a convolution, and takes a batch norm apart into many small steps. `tests/test_convolution.py` proves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_unfold = False  # a plain global, for torch.compile cannot read a ContextVar


@contextmanager
def unfolding(wanted: bool) -> Iterator[None]:
    """Whether `convolve` is a matrix product of unfolded images within the block."""
    global _unfold
    before, _unfold = _unfold, wanted
    try:
        yield
    finally:
        _unfold = before


def arrange(x: Tensor, *, channels_last: bool) -> Tensor:
    """Images x (S, N, C, H, W) as (S, N, H, W, C), in the memory order that `convolve` likes best."""
    images = x.permute(0, 1, 3, 4, 2)
    if not channels_last:
        return images
    # `clone`: `contiguous` leaves the strides of one channel as they are, and all layers would run the slow way
    if _unfold or len(x) == 1:
        return images.clone(memory_format=torch.contiguous_format)
    return images.permute(1, 2, 3, 0, 4).clone(memory_format=torch.contiguous_format).permute(3, 0, 1, 2, 4)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int = 1) -> Tensor:
    """3x3 convolution of x (S, N, H, W, C) by weight (S, O, C, 3, 3), bias (S or 1, O): (S, N, h, w, O).

    Padded by 1, or by 0 where the stride is 1. Of several tasks, or unfolded, it can be differentiated twice, not three
    times, and not under `torch.func`.
    """
    if len(weight) > 1 or _unfold:
        result: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, stride, _Unfolded if _unfold else _Grouped
        )
        return result if padding else result[:, :, 1:-1, 1:-1]  # unpadded: all but the rim
    return _split(F.conv2d(_side_by_side(x), weight.squeeze(0), bias.squeeze(0), stride=stride, padding=padding), 1)


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pooling of x (S, N, H, W, C)."""
    if _unfold:
        pooled = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return torch.unflatten(pooled, 0, x.shape[:2])
    return _split(F.max_pool2d(_side_by_side(x), 2), len(x))


def batch_norm(y: Tensor, gain: Tensor | None, shift: Tensor, eps: float) -> Tensor:
    """gain * (y - mean) / sqrt(variance + eps) + shift of y (S, sets, n, H, W, C), each set by its own statistics.

    gain and shift (S or 1, C). It can be differentiated twice.
    """
    rows = y.flatten(2, 4)
    scale = shift.new_ones(1, 1) if gain is None else gain
    result: Tensor = _BatchNorm.apply(rows, scale, shift, eps)[0]  # type: ignore[no-untyped-call]
    return result.reshape(y.shape)


def patch_moments(x: Tensor, *, stride: int, sets: int, padding: int = 1) -> tuple[Tensor, Tensor]:
    """Mean (S, sets, 9 C, 1) and covariance (S, sets, 9 C, 9 C) of the 3x3 patches of x (S, sets * n, H, W, C)."""
    windows = torch.unflatten(_windows(x, stride, padding), 1, (sets, -1))
    planes = windows.permute(0, 1, 6, 7, 5, 2, 3, 4).flatten(5).flatten(2, 4)  # long runs in memory: a cheap copy
    mean = planes.mean(3, keepdim=True)
    planes = planes - mean
    return mean, planes @ planes.mT / planes.shape[3]


def _side_by_side(x: Tensor) -> Tensor:
    """(S, N, H, W, C) -> (N, S * C, H, W)."""
    rows = x.squeeze(0) if len(x) == 1 else x.permute(1, 2, 3, 0, 4).flatten(3)
    return rows.permute(0, 3, 1, 2)


def _split(x: Tensor, tasks: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return torch.unflatten(x, 1, (tasks, -1)).permute(1, 0, 3, 4, 2)


def _windows(x: Tensor, stride: int, padding: int = 1) -> Tensor:
    """The 3x3 neighbourhoods of x (S, N, H, W, C) as a view (S, N, h, w, C, 3, 3) of a padded copy."""
    return F.pad(x, (0, 0, *[padding] * 4)).unfold(2, 3, stride).unfold(3, 3, stride)


class _Engine(Protocol):
    """A convolution in parts, each linear in every tensor but the bias; `out` is the gradient of its result."""

    @staticmethod
    def prepare(x: Tensor, stride: int) -> Tensor:
        """What the other functions need of x (S, N, H, W, C)."""

    @staticmethod
    def forward(ready: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """The convolution."""

    @staticmethod
    def gradients(
        out: Tensor, ready: Tensor, weight: Tensor, shape: torch.Size, stride: int, *, x: bool, weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to x (of this shape) and weight, as far as wanted."""


class _Grouped:
    @staticmethod
    def prepare(x: Tensor, stride: int) -> Tensor:
        return _side_by_side(x)

    @staticmethod
    def forward(ready: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        tasks, filters = weight.shape[:2]
        flat = None if bias is None else bias.expand(tasks, filters).flatten()
        return _split(F.conv2d(ready, _Grouped._flat(weight), flat, stride=stride, padding=1, groups=tasks), tasks)

    @staticmethod
    def gradients(
        out: Tensor, ready: Tensor, weight: Tensor, shape: torch.Size, stride: int, *, x: bool, weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        how = [stride, stride], [1, 1], [1, 1], False, [0, 0], shape[0]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            _side_by_side(out), ready, _Grouped._flat(weight), None, *how, (x, weights, False)
        )
        return _split(dx, shape[0]) if x else None, torch.unflatten(dw, 0, weight.shape[:2]) if weights else None

    @staticmethod
    def _flat(weight: Tensor) -> Tensor:
        # channels last: a plain flatten of weights expanded to the tasks would copy them twice
        return weight.permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)


class _Unfolded:
    @staticmethod
    def prepare(x: Tensor, stride: int) -> Tensor:
        """(S, N, h, w, 9 C), pixels before channels."""
        return _windows(x, stride).permute(0, 1, 2, 3, 5, 6, 4).flatten(4)

    @staticmethod
    def forward(ready: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        rows, flat = ready.flatten(1, 3), _Unfolded._flat(weight).mT
        y = torch.bmm(rows, flat) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, flat)
        return torch.unflatten(y, 1, ready.shape[1:4])

    @staticmethod
    def gradients(
        out: Tensor, ready: Tensor, weight: Tensor, shape: torch.Size, stride: int, *, x: bool, weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, cols = out.flatten(1, 3), ready.flatten(1, 3)
        dx = _Unfolded._fold(torch.bmm(rows, _Unfolded._flat(weight)), out.shape, shape, stride) if x else None
        if not weights:
            return dx, None
        # the narrower factor first: with few channels the product is five times as fast that way
        narrow = cols.shape[2] < rows.shape[2]
        product = torch.bmm(cols.mT, rows).mT if narrow else torch.bmm(rows.mT, cols)
        return dx, torch.unflatten(product, 2, (3, 3, -1)).permute(0, 1, 4, 2, 3)

    @staticmethod
    def _fold(cols: Tensor, out: torch.Size, shape: torch.Size, stride: int) -> Tensor:
        """The adjoint of `prepare`: the sum of all patches, each at its place."""
        patches = cols.view(*out[:4], 3, 3, shape[4])
        padded = cols.new_zeros(*shape[:2], shape[2] + 2, shape[3] + 2, shape[4])
        for i in range(3):
            for j in range(3):
                there = padded[:, :, i : i + stride * out[2] : stride, j : j + stride * out[3] : stride]
                there.add_(patches[:, :, :, :, i, j])
        return padded[:, :, 1:-1, 1:-1]

    @staticmethod
    def _flat(weight: Tensor) -> Tensor:
        return weight.permute(0, 1, 3, 4, 2).flatten(2)  # (S, O, 9 C)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, engine: type[_Engine]) -> Tensor:
        ready = engine.prepare(x, stride)
        ctx.save_for_backward(x, weight, ready)
        ctx.shape, ctx.how = bias.shape, (stride, engine)
        return engine.forward(ready, weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0]
        dx, dw, db = _Gradient.apply(out, *ctx.saved_tensors, wanted, *ctx.how)  # type: ignore[no-untyped-call]
        return dx, dw, db.sum_to_size(ctx.shape), None, None


class _Gradient(torch.autograd.Function):
    """The gradients with respect to x (where it is wanted), weight and bias; all are linear in `out`."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        ready: Tensor,
        wanted: bool,
        stride: int,
        engine: type[_Engine],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(out, weight, ready)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.how = x.shape, (stride, engine)
        return *engine.gradients(out, ready, weight, x.shape, stride, x=wanted, weights=True), out.sum((1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_x: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The product rule: a convolution is linear in x and in weight, so that they swap roles."""
        (out, weight, ready), (stride, engine), shape = ctx.saved_tensors, ctx.how, ctx.shape
        of_out = None if to_bias is None else to_bias[:, None, None, None].expand_as(out)
        of_x = of_weight = None
        if to_weight is not None:
            of_out = engine.forward(ready, to_weight, to_bias, stride)
            if ctx.needs_input_grad[1]:
                of_x = engine.gradients(out, ready, to_weight, shape, stride, x=True, weights=False)[0]
        if to_x is not None:
            moved = engine.prepare(to_x, stride)
            y = engine.forward(moved, weight, None, stride)
            of_out = y if of_out is None else y + of_out
            of_weight = engine.gradients(out, moved, weight, shape, stride, x=False, weights=True)[1]
        return of_out, of_x, of_weight, None, None, None, None


class _BatchNorm(torch.autograd.Function):
    """With xhat = (y - mean) * r: z = gain * xhat + shift. Also returns xhat and r, which are for the gradient only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        centred = y - y.mean(2, keepdim=True)
        r = torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)
        xhat = centred * r
        return torch.addcmul(_wide(shift), xhat, _wide(gain)), xhat, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, gain, shift, _ = inputs
        _, xhat, r = output
        ctx.mark_non_differentiable(xhat, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gain, xhat, r)
        ctx.shape = shift.shape

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dz is None:
            return None, None, None, None
        y, gain, xhat, r = ctx.saved_tensors
        dy, dgain, dshift = _BatchNormGradient.apply(dz, y, gain, xhat, r)  # type: ignore[no-untyped-call]
        return dy, dgain.sum(1).sum_to_size(gain.shape), dshift.sum(1).sum_to_size(ctx.shape), None


class _BatchNormGradient(torch.autograd.Function):
    """dy = k (g - b - xhat a), k = gain r, b = mean(g), a = mean(g xhat); dgain = R a, dshift = R b (S, sets, C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, y: Tensor, gain: Tensor, xhat: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (g * xhat).mean(2, keepdim=True), g.mean(2, keepdim=True)
        k, rows = _wide(gain) * r, y.shape[2]
        return _combine(-k * b, (g, k), (xhat, -k * a)), (a * rows).squeeze(2), (b * rows).squeeze(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vgain: Tensor | None, vshift: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of sum(v dy) + sum(vgain dgain) + sum(vshift dshift) with respect to g, y and gain.

        y acts through xhat, with q = d/dxhat = (vgain - k A) g - k a v, and through r (dr/dy = -r^2 xhat / R).
        """
        g, y, gain, xhat, r, a, b = ctx.saved_tensors
        rows = y.shape[2]
        a, b, k = a.unsqueeze(2) / rows, b.unsqueeze(2) / rows, _wide(gain) * r
        v = torch.zeros_like(g) if v is None else v
        big_a, big_b = (v * xhat).mean(2, keepdim=True), v.mean(2, keepdim=True)
        p = (v * g).mean(2, keepdim=True) - b * big_b - a * big_a
        w = -k * big_a if vgain is None else vgain.unsqueeze(2) - k * big_a
        of_g = _combine(-k * big_b if vshift is None else vshift.unsqueeze(2) - k * big_b, (v, k), (xhat, w))
        through_r = r * a * (w - k * big_a) + r * k * p
        of_y = _combine(r * (k * a * big_b - w * b), (v, -r * k * a), (g, r * w), (xhat, -through_r))
        return of_g, of_y, (r * rows * p).sum((1, 2)).sum_to_size(gain.shape), None, None


def _wide(parameter: Tensor) -> Tensor:
    """(S or 1, C) so that it broadcasts over (S, sets, R, C)."""
    return parameter[:, None, None]


def _combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """constant + the sum of tensor * coefficient."""
    for tensor, coefficient in terms:
        constant = torch.addcmul(constant, tensor, coefficient)
    return constant
