from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from metabench.convolution import batch_norm, convolve, max_pool, patch_moments, unfolding


def made(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
def test_convolution_is_pytorchs_for_each_task_and_exact_to_the_second_order(
    stride: int, unfolded: bool, tasks: int
) -> None:
    x, weight, bias = made(tasks, 2, 5, 4, 2), made(tasks, 3, 2, 3, 3, seed=1), made(tasks, 3, seed=2)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with unfolding(unfolded):
            return convolve(x, weight, bias, stride=stride)

    wanted = [F.conv2d(x[t].permute(0, 3, 1, 2), weight[t], bias[t], stride, 1) for t in range(tasks)]
    torch.testing.assert_close(run(x, weight, bias), torch.stack(wanted).permute(0, 1, 3, 4, 2))
    assert gradcheck(run, (x, weight, bias))
    assert gradgradcheck(run, (x, weight, bias))
    images = x.detach()  # data: no gradient wanted, so none is computed
    assert gradgradcheck(lambda weight, bias: run(images, weight, bias), (weight, bias))


@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
def test_an_unpadded_convolution_is_pytorchs_too(unfolded: bool, tasks: int) -> None:
    x, weight, bias = made(tasks, 2, 5, 4, 2), made(tasks, 3, 2, 3, 3, seed=1), made(tasks, 3, seed=2)
    with unfolding(unfolded):
        got = convolve(x, weight, bias, stride=1, padding=0)
    wanted = [F.conv2d(x[t].permute(0, 3, 1, 2), weight[t], bias[t]) for t in range(tasks)]
    torch.testing.assert_close(got, torch.stack(wanted).permute(0, 1, 3, 4, 2))


def test_a_bias_may_be_shared_by_all_tasks() -> None:
    x, weight, bias = made(3, 2, 4, 4, 2), made(3, 3, 2, 3, 3, seed=1), made(1, 3, seed=2)
    plain = convolve(x, weight, bias, stride=2)
    with unfolding(True):
        torch.testing.assert_close(convolve(x, weight, bias, stride=2), plain)


@pytest.mark.parametrize("unfolded", [False, True])
def test_pooling_is_pytorchs(unfolded: bool) -> None:
    x = made(3, 2, 5, 4, 2)
    with unfolding(unfolded):
        got = max_pool(x)
    torch.testing.assert_close(
        got, F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).unflatten(0, (3, 2))
    )


def test_unfolding_ends_with_the_block() -> None:
    x, weight, bias = made(2, 2, 4, 4, 1), made(2, 1, 1, 3, 3), made(2, 1)
    with pytest.raises(ZeroDivisionError), unfolding(True):
        _ = 1 / 0
    assert not convolve(x, weight, bias, stride=1).is_contiguous()  # in memory images before tasks: grouped


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_moments_of_patches_are_those_of_a_convolutions_output(stride: int, padding: int) -> None:
    x, weight = made(2, 6, 5, 4, 2).detach(), made(2, 3, 2, 3, 3, seed=1).detach()
    mean, covariance = patch_moments(x, stride=stride, sets=2, padding=padding)
    y = convolve(x, weight, torch.zeros(1, 3, dtype=torch.float64), stride=stride, padding=padding)
    y = torch.unflatten(y, 1, (2, 3)).flatten(2, 4)  # (S, sets, rows, O)
    rows = weight.permute(0, 1, 3, 4, 2).flatten(2)[:, None]
    torch.testing.assert_close((rows @ mean)[..., 0], y.mean(2))
    torch.testing.assert_close((rows @ covariance * rows).sum(-1), y.var(2, correction=0))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gained", [False, True])
def test_batch_norm_is_pytorchs_and_exact_to_the_second_order(shared: bool, gained: bool) -> None:
    y, shift = made(2, 2, 3, 2, 1, 3), made(1 if shared else 2, 3, seed=1)
    gain = made(*shift.shape, seed=2) if gained else None

    def run(y: Tensor, shift: Tensor, *gain: Tensor) -> Tensor:
        return batch_norm(y, gain[0] if gain else None, shift, 1e-3)

    inputs = (y, shift) if gain is None else (y, shift, gain)
    shifts, gains = (v.expand(2, 3) for v in (shift, torch.ones(1, 3, dtype=torch.float64) if gain is None else gain))
    for s in range(2):
        for k in range(2):
            rows = y[s, k].flatten(0, 2)
            wanted = F.batch_norm(rows, None, None, gains[s], shifts[s], True, 0.0, 1e-3)
            torch.testing.assert_close(run(*inputs)[s, k].flatten(0, 2), wanted)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)
