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
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Strategy = Literal["serial", "vmap"]
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

        With `second_order` it stays differentiable, else it is a constant (first-order MAML).
        """
        if self.strategy == "vmap":
            gradient: Params = torch.func.grad(loss)(params)
        else:
            leaves = params if second_order else tree_map(Tensor.detach, params)
            leaves = {k: v if v.requires_grad else v.detach().requires_grad_() for k, v in leaves.items()}
            with torch.enable_grad():
                value = loss(leaves)
                values = torch.autograd.grad(value, list(leaves.values()), create_graph=second_order)
            gradient = dict(zip(leaves, values, strict=True))
        return gradient if second_order else {k: v.detach() for k, v in gradient.items()}
