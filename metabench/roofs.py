"""The machine's own roofs, measured: its rates of matrix products and of copying; and fixed work to watch it by."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

SECONDS, MIN_REPEATS = 0.1, 5  # per size
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
FIRST_SIDE, LAST_SIDE = 512, 16384
LONG_ENOUGH = 0.01  # seconds: starting a product that long costs nothing beside it, and its matrices leave the caches
COPIED = 2**28  # bytes: much more than any last-level cache that a few cores share
CONTROL_SIDE, CONTROL_LOOPS = 640, 60_000


def measure(device: str = "cpu") -> dict[str, float]:
    """Peak rates of `device` under the present settings, the best of several repeats each, in about a second in all.

    Returns "float32_flops" and "bf16_flops" (operations per second of a square matrix product, with torch's present
    setting for TF32), "bytes" (read plus written per second, copying a tensor of 256 MiB; a second one is needed) and
    "threads" (torch's, on the CPU). A busy machine gives lower figures: take the best of several processes.
    """
    rates = {f"{name}_flops": _matmul_rate(dtype, device) for name, dtype in PRECISIONS.items()}
    return {**rates, "bytes": _copy_rate(device), "threads": float(torch.get_num_threads())}


def controls() -> dict[str, Callable[[], object]]:
    """Fixed work of a few milliseconds on the CPU: its time changes only if the machine does.

    "matmul" is a matrix product on all of torch's threads, "python" a plain loop of the interpreter.
    """
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(CONTROL_SIDE, CONTROL_SIDE, generator=draw) for _ in range(2))
    product = torch.empty(CONTROL_SIDE, CONTROL_SIDE)

    def matmul() -> object:
        return torch.mm(left, right, out=product)

    return {"matmul": matmul, "python": _loop}


def _loop() -> int:
    total = 0
    for i in range(CONTROL_LOOPS):
        total += i * i
    return total


def _matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Operations per second; the side doubles until one product takes `LONG_ENOUGH`."""
    draw = torch.Generator(device).manual_seed(0)  # the global generator stays as it is
    best, side, seconds = 0.0, FIRST_SIDE, 0.0
    while seconds < LONG_ENOUGH and side <= LAST_SIDE:
        left, right = (torch.randn(side, side, generator=draw, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(partial(torch.mm, left, right, out=torch.empty_like(left)), device)
        best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


def _copy_rate(device: str) -> float:
    """Bytes read and written per second."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several calls, after one untimed."""
    work()
    samples: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(samples) < MIN_REPEATS or time.perf_counter() < end:
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        samples.append(time.perf_counter() - start)
    return min(samples)


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
