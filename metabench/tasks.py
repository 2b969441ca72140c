"""How a batch of tasks is executed: in chunks, one task at a time, by vmap, or all tasks of a chunk as one network.

A function of tasks takes tensors with the task axis first and treats the tasks apart, however many they are; what it
is given is the strategy's business:
- `serial`: one task a call;
- `vmap`: one task, vectorised over the chunk by torch.func;
- `grouped` and `unfold`: the chunk itself, its parameters with a task axis too, convolved as groups of one convolution
  or as one matrix product (see `metabench.convolution`).
Whatever runs gives the gradients of the serial float64 version (a test proves it). Never nn.BatchNorm2d: vmap through
it gives wrong second-order gradients (torch 2.13).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from metabench.convolution import unfolding

Strategy = Literal["serial", "vmap", "grouped", "unfold"]
Choice = Literal["auto", "serial", "vmap", "grouped", "unfold"]
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Execution:
    """Runs functions of tasks over T tasks, `chunk` at a time, and takes inner-loop gradients in the way that fits."""

    strategy: Strategy
    chunk: int = 1

    def __str__(self) -> str:
        return self.strategy if self.strategy == "serial" else f"{self.strategy}/{self.chunk}"

    def map(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn applied to all tasks: every tensor in args and in the result has the task axis T first."""
        return self.chunks(lambda *part: self._run(fn, part), *args)

    def chunks(self, fn: Callable[..., Any], *args: Any) -> Any:
        """As `map`, but fn is given whole chunks: for work that itself calls `map` more than once on the same tasks."""
        leaves, spec = tree_flatten(args)
        size = 1 if self.strategy == "serial" else self.chunk
        if leaves[0].shape[0] <= size:
            return fn(*args)
        parts = [
            fn(*tree_unflatten([leaf[t : t + size] for leaf in leaves], spec))
            for t in range(0, leaves[0].shape[0], size)
        ]
        flat, shape = zip(*(tree_flatten(part) for part in parts), strict=True)
        return tree_unflatten([torch.cat(column) for column in zip(*flat, strict=True)], shape[0])

    def _run(self, fn: Callable[..., Any], args: Any) -> Any:
        if self.strategy != "vmap":
            with unfolding(self.strategy == "unfold"):
                return fn(*args)

        def one(*task: Any) -> Any:
            return tree_map(lambda leaf: leaf[0], fn(*tree_map(lambda leaf: leaf[None], task)))

        return torch.func.vmap(one, randomness="error")(*args)

    def gradient(self, loss: Callable[[Params], Tensor], params: Params, *, second_order: bool) -> Params:
        """The gradient of loss(params), the sum over tasks of their own losses, with respect to params (T, ...).

        With `second_order` it stays differentiable, where the caller has gradients enabled at all; else it is a
        constant (first-order MAML) and no graph is built beyond the one backward pass.
        """
        keep = second_order and torch.is_grad_enabled()
        if self.strategy == "vmap":
            if keep:
                return _functional(loss, params)
            with torch.no_grad():  # torch.func.grad minds the inner level only: this saves the outer graph
                return _functional(loss, {name: value.detach() for name, value in params.items()})
        leaves = {k: v if keep and v.requires_grad else v.detach().requires_grad_() for k, v in params.items()}
        with torch.enable_grad():
            value = loss(leaves)
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=keep), strict=True))

    def gradient_and_more(self, loss: Callable[[Params], tuple[Tensor, Any]], params: Params) -> tuple[Params, Any]:
        """The gradient of loss(params)[0] (see `gradient`) and what else loss(params) gives: all of it constants."""
        fixed = {name: value.detach() for name, value in params.items()}
        if self.strategy == "vmap":
            with torch.no_grad():
                return torch.func.grad(loss, has_aux=True)(fixed)  # type: ignore[no-any-return]
        leaves = {name: value.requires_grad_() for name, value in fixed.items()}
        with torch.enable_grad():
            value, more = loss(leaves)
        gradient = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, gradient, strict=True)), tree_map(torch.Tensor.detach, more)


def _functional(loss: Callable[[Params], Tensor], params: Params) -> Params:
    gradient: Params = torch.func.grad(loss)(params)
    return gradient


def per_task(params: Params, tasks: int) -> Params:
    """Parameters that all tasks share, with a task axis."""
    return {name: value.expand(tasks, *value.shape) for name, value in params.items()}


CACHE = 8 * 2**20  # bytes of its widest activations that a chunk may take
MEMORY = 2**30  # the same on a GPU
WORTH_MEASURING = 2**20  # activations of the widest layer, of all tasks together: below, any choice is good enough
ADVANTAGE = 1.25  # how much faster than the rule's choice a strategy must be to replace it
ROUNDS = 3


def choose(choice: Choice, x: Tensor, *, widest: int, stride: int) -> Execution:
    """How to work on x (T, n, *shape) with a network of up to `widest` activations an example, convolved at `stride`.

    A rule on shapes and nothing measured, so that scores repeat: chunks that fit the cache; unfolded where the
    unfolded images are small (stride 2: 9/4 of them), else grouped; for a single task PyTorch's own convolution.
    """
    if choice == "serial" or (choice == "auto" and x.shape[0] == 1):
        return Execution("serial")
    room = MEMORY if x.is_cuda else CACHE
    most = max(1, room // (x.shape[1] * widest * x.element_size()))
    chunk = math.ceil(x.shape[0] / math.ceil(x.shape[0] / most))  # chunks of like size, no small rest
    if choice == "auto":
        choice = "unfold" if stride > 1 else "grouped"
    return Execution(choice, chunk)


def fastest(run: Callable[[Strategy], object], candidates: Sequence[Strategy]) -> Strategy:
    """The candidate whose `run` is fastest; the first one, unless another is faster by a good margin.

    The margin keeps noise from deciding: trainings repeat to the bit unless something is clearly to be won. `run` must
    wait for its device. Candidates take turns, each once to warm up and then `ROUNDS` times; their minima count.
    """
    seconds: dict[Strategy, float] = dict.fromkeys(candidates, float("inf"))
    for turn in range(1 + ROUNDS):
        for candidate in candidates:
            start = time.perf_counter()
            run(candidate)
            if turn > 0:
                seconds[candidate] = min(seconds[candidate], time.perf_counter() - start)
    best = min(candidates, key=lambda candidate: seconds[candidate])
    return best if seconds[best] * ADVANTAGE < seconds[candidates[0]] else candidates[0]
