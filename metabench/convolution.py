"""3x3 convolution of several tasks at once, each with weights of its own, exact to the second order.

Tasks, images, pixels, channels: (S, N, H, W, C), whatever the order in memory. One task is an ordinary convolution;
more are one grouped convolution (memory order N, H, W, S, C), or one batched matrix product of the unfolded images
(memory order S, N, H, W, C). PyTorch's own second-order gradient of a grouped convolution loops over the groups; here
every gradient, of either order, is one convolution or matrix product again (`tests/test_convolution.py` proves them).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_UNFOLD: ContextVar[bool] = ContextVar("unfold", default=False)


@contextmanager
def unfolding(wanted: bool) -> Iterator[None]:
    """Whether `convolve` is a matrix product of unfolded images within the block."""
    before = _UNFOLD.set(wanted)
    try:
        yield
    finally:
        _UNFOLD.reset(before)


def arrange(x: Tensor, *, channels_last: bool) -> Tensor:
    """Images x (S, N, C, H, W) as (S, N, H, W, C), in the memory order that `convolve` likes best."""
    images = x.permute(0, 1, 3, 4, 2)
    if not channels_last:
        return images
    # `clone`: `contiguous` leaves the strides of one channel as they are, and all layers would run the slow way
    if _UNFOLD.get() or len(x) == 1:
        return images.clone(memory_format=torch.contiguous_format)
    return images.permute(1, 2, 3, 0, 4).clone(memory_format=torch.contiguous_format).permute(3, 0, 1, 2, 4)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int) -> Tensor:
    """Padded 3x3 convolution of x (S, N, H, W, C) by weight (S, O, C, 3, 3), bias (S or 1, O): (S, N, h, w, O).

    Grouped (S > 1, not unfolded) it can be differentiated twice, not three times, and not under `torch.func`.
    """
    tasks, filters = weight.shape[:2]
    if _UNFOLD.get():
        cols = unfold(x, stride=stride)
        out = torch.baddbmm(bias[:, None], cols.flatten(1, 3), weight.permute(0, 3, 4, 2, 1).flatten(1, 3))
        return torch.unflatten(out, 1, cols.shape[1:4])
    flat, biases = weight.flatten(0, 1), bias.expand(tasks, filters).flatten()
    if tasks == 1:
        return _split(F.conv2d(_side_by_side(x), flat, biases, stride=stride, padding=1), 1)
    # channels last: a plain flatten of weights expanded to the tasks would copy them twice
    flat = weight.permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)
    result: Tensor = _Grouped.apply(_side_by_side(x), flat, biases, stride, tasks)  # type: ignore[no-untyped-call]
    return _split(result, tasks)


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pooling of x (S, N, H, W, C)."""
    if _UNFOLD.get():
        pooled = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return torch.unflatten(pooled, 0, x.shape[:2])
    return _split(F.max_pool2d(_side_by_side(x), 2), x.shape[0])


def unfold(x: Tensor, *, stride: int) -> Tensor:
    """The 3x3 patches of x (S, N, H, W, C) around each output pixel: (S, N, h, w, 9 C), pixels before channels."""
    cols: Tensor = _Unfold.apply(x, stride)  # type: ignore[no-untyped-call]
    return cols


def patch_moments(x: Tensor, *, stride: int, sets: int) -> tuple[Tensor, Tensor]:
    """Mean (S, sets, 9 C, 1) and covariance (S, sets, 9 C, 9 C) of the 3x3 patches of x (S, sets * n, H, W, C)."""
    windows = torch.unflatten(_windows(x, stride), 1, (sets, -1))
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


def _windows(x: Tensor, stride: int) -> Tensor:
    """The 3x3 neighbourhoods of x (S, N, H, W, C) as a view (S, N, h, w, C, 3, 3) of a padded copy."""
    return F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)


class _Unfold(torch.autograd.Function):
    """Linear, and the adjoint of `_Fold`: so they are each other's gradients, to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:
        return _windows(x, stride).permute(0, 1, 2, 3, 5, 6, 4).flatten(4)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.shape, ctx.stride = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, cols: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(cols, ctx.shape, ctx.stride), None  # type: ignore[no-untyped-call]


class _Fold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cols: Tensor, shape: torch.Size, stride: int) -> Tensor:
        tasks, images, height, width, channels = shape
        h, w = cols.shape[2:4]
        patches = torch.unflatten(cols, 4, (3, 3, channels))
        padded = cols.new_zeros(tasks, images, height + 2, width + 2, channels)
        for i in range(3):
            for j in range(3):
                padded[:, :, i : i + stride * h : stride, j : j + stride * w : stride].add_(patches[:, :, :, :, i, j])
        return padded[:, :, 1:-1, 1:-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.stride = inputs[2]

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None, None]:
        return _Unfold.apply(x, ctx.stride), None, None  # type: ignore[no-untyped-call]


def _gradients(
    out: Tensor, x: Tensor, weight: Tensor, how: tuple[int, int], *, of_x: bool = False, of_weight: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a grouped convolution with respect to x and weight, given that of its result."""
    (stride, groups), pair = how, [1, 1]
    mask = (of_x, of_weight, False)
    found = torch.ops.aten.convolution_backward(
        out, x, weight, None, [stride, stride], pair, pair, False, [0, 0], groups, mask
    )
    return found[0], found[1]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = stride, groups
        return F.conv2d(x, weight, bias, stride=stride, padding=1, groups=groups)

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_GroupedGradient.apply(out, x, weight, ctx.how, ctx.needs_input_grad[0]), out.sum((0, 2, 3)), None, None  # type: ignore[no-untyped-call]


class _GroupedGradient(torch.autograd.Function):
    """The gradients with respect to x (where it is wanted) and weight; both are linear in `out`."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, weight: Tensor, how: tuple[int, int], inner: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(out, x, weight)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return _gradients(out, x, weight, how, of_x=inner, of_weight=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """A convolution is linear in x and in weight, so that its gradients swap roles: a product rule."""
        (out, x, weight), how = ctx.saved_tensors, ctx.how
        options: dict[str, Any] = {"stride": how[0], "padding": 1, "groups": how[1]}
        of_out = of_x = of_weight = None
        if to_weight is not None:
            of_out = F.conv2d(x, to_weight, **options)
            if ctx.needs_input_grad[1]:
                of_x = _gradients(out, x, to_weight, how, of_x=True)[0]
        if to_x is not None:
            moved = F.conv2d(to_x, weight, **options)
            of_out = moved if of_out is None else of_out.add_(moved)
            of_weight = _gradients(out, to_x, weight, how, of_weight=True)[1]
        return of_out, of_x, of_weight, None, None


def batch_norm(y: Tensor, gain: Tensor | None, shift: Tensor, eps: float) -> Tensor:
    """gain * (y - mean) / sqrt(variance + eps) + shift of y (K, R, C) over its R rows; gain, shift (K or 1, C).

    The gradients are written out, which takes a fifth of the operations. It can be differentiated twice.
    """
    scale = shift.new_ones(1, 1, 1) if gain is None else gain[:, None]
    result: Tensor = _BatchNorm.apply(y, scale, shift[:, None], eps)[0]  # type: ignore[no-untyped-call]
    return result


class _BatchNorm(torch.autograd.Function):
    """With xhat = (y - mean) * r: z = gain * xhat + shift. Also returns xhat and r, which are for the gradient only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        centred = y - y.mean(1, keepdim=True)
        r = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
        xhat = centred * r
        return torch.addcmul(shift, xhat, gain), xhat, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, gain, shift, _ = inputs
        _, xhat, r = output
        ctx.mark_non_differentiable(xhat, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gain, xhat, r)
        ctx.shapes = gain.shape, shift.shape

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dz is None:
            return None, None, None, None
        y, gain, xhat, r = ctx.saved_tensors
        dy, dgain, dshift = _BatchNormGradient.apply(dz, y, gain, xhat, r)  # type: ignore[no-untyped-call]
        return dy, dgain.sum_to_size(ctx.shapes[0]), dshift.sum_to_size(ctx.shapes[1]), None


class _BatchNormGradient(torch.autograd.Function):
    """dy = k (g - b - xhat a), k = gain r, b = mean(g), a = mean(g xhat); dgain = R a; dshift = R b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, y: Tensor, gain: Tensor, xhat: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (g * xhat).mean(1, keepdim=True), g.mean(1, keepdim=True)
        k = gain * r
        return _combine(-k * b, (g, k), (xhat, -k * a)), a * y.shape[1], b * y.shape[1]

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
        rows = y.shape[1]
        a, b, k = a / rows, b / rows, gain * r
        v = torch.zeros_like(g) if v is None else v
        vgain = torch.zeros_like(a) if vgain is None else vgain
        vshift = torch.zeros_like(b) if vshift is None else vshift
        big_a, big_b = (v * xhat).mean(1, keepdim=True), v.mean(1, keepdim=True)
        p = (v * g).mean(1, keepdim=True) - b * big_b - a * big_a
        w = vgain - k * big_a
        of_g = _combine(vshift - k * big_b, (v, k), (xhat, w))
        through_r = r * a * (w - k * big_a) + r * k * p
        of_y = _combine(r * (k * a * big_b - w * b), (v, -r * k * a), (g, r * w), (xhat, -through_r))
        return of_g, of_y, (r * rows * p).sum_to_size(gain.shape), None, None


def _combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """constant + the sum of tensor * coefficient."""
    for tensor, coefficient in terms:
        constant = torch.addcmul(constant, tensor, coefficient)
    return constant
