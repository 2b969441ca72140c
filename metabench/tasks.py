"""How a batch of tasks is executed: one function of one task, run over the task axis serially or by vmap.

Whatever runs gives the gradients of the serial float64 version (a test proves it). Batch norm must come from
primitives: vmap through nn.BatchNorm2d gives wrong second-order gradients (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Strategy = Literal["serial", "vmap"]
Choice = Literal["auto", "serial", "vmap"]
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Execution:
    """Runs functions of one task over T tasks, and takes inner-loop gradients in the way that fits."""

    strategy: Strategy = "vmap"

    def map(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn applied to each task: every tensor in args and in the result has the task axis T first."""
        if self.strategy == "vmap":
            return torch.func.vmap(fn, randomness="error")(*args)
        leaves, spec = tree_flatten(args)
        results = [fn(*tree_unflatten([leaf[t] for leaf in leaves], spec)) for t in range(leaves[0].shape[0])]
        flat, shape = zip(*(tree_flatten(r) for r in results), strict=True)
        return tree_unflatten([torch.stack(column) for column in zip(*flat, strict=True)], shape[0])

    def gradient(self, loss: Callable[[Params], Tensor], params: Params, *, second_order: bool) -> Params:
        """The gradient of loss(params) with respect to params.

        With `second_order` it stays differentiable, where the caller has gradients enabled at all; else it is a
        constant (first-order MAML) and no graph is built beyond the one backward pass.
        """
        if second_order and torch.is_grad_enabled():
            return self._differentiable(loss, params)
        constants = {name: value.detach() for name, value in params.items()}
        if self.strategy == "vmap":
            with torch.no_grad():  # torch.func.grad minds the inner level only: this saves the outer graph
                gradient: Params = torch.func.grad(loss)(constants)
            return gradient
        leaves = {name: value.requires_grad_() for name, value in constants.items()}
        with torch.enable_grad():
            value = loss(leaves)
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    def _differentiable(self, loss: Callable[[Params], Tensor], params: Params) -> Params:
        if self.strategy == "vmap":
            gradient: Params = torch.func.grad(loss)(params)
            return gradient
        leaves = {k: v if v.requires_grad else v.detach().requires_grad_() for k, v in params.items()}
        values = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
        return dict(zip(leaves, values, strict=True))


def choose(choice: Choice, x: Tensor, *, limit: int) -> Execution:
    """How to work on x (T, n, *shape): `auto` is vmap for tasks of up to `limit` examples (on a GPU any), else serial.

    A rule on shapes and nothing measured, so that a training resumed elsewhere runs in the same way.
    """
    if choice != "auto":
        return Execution(choice)
    return Execution("vmap" if x.shape[0] > 1 and (x.is_cuda or x.shape[1] <= limit) else "serial")
