"""The least that a training step of ProtoNet takes with torch's convolutions: those of Conv-4 alone.

python docs/convolution_bound.py      (two cores; nothing else may run)

Forward and backward for the 120 images of a 20-way 1-shot episode with five queries, as a worker runs them (two
threads, the allocator kept). No normalisation, pooling, loss or optimiser, no gradient of the first layer's input.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from metabench.environment import worker_environment
from metabench.stats import median_interval

PROCESSES, WARM_UP, CALLS = 5, 5, 40
LAYERS = ((1, 28), (64, 14), (64, 7), (64, 3))  # input channels and side of each convolution
DTYPES = ("float32", "bfloat16")


def measure(dtype: str) -> float:
    """Median seconds in this process."""
    import torch

    kind = getattr(torch, dtype)
    layers = []
    for number, (channels, side) in enumerate(LAYERS):
        last = torch.channels_last
        x = torch.rand(120, channels, side, side, dtype=kind).contiguous(memory_format=last).requires_grad_(number > 0)
        weight = torch.randn(64, channels, 3, 3, dtype=kind).contiguous(memory_format=last).requires_grad_()
        layers.append((x, weight, torch.rand(120, 64, side, side, dtype=kind).contiguous(memory_format=last)))
    seconds = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        for x, weight, gradient in layers:
            y = torch.nn.functional.conv2d(x, weight, padding=1)
            torch.autograd.grad(y, [tensor for tensor in (x, weight) if tensor.requires_grad], gradient)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    """Print the median over fresh processes, with its 95 % interval."""
    for dtype in DTYPES:
        command = [sys.executable, __file__, dtype]
        medians = []
        for _ in range(PROCESSES):
            done = subprocess.run(command, env=worker_environment(2), capture_output=True, text=True, check=True)
            medians.append(float(done.stdout))
        found = median_interval(medians)
        low, high = (1e3 * bound for bound in (found.low or 0.0, found.high or 0.0))
        print(f"{dtype}: {1e3 * found.value:.1f} ms [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(measure(sys.argv[1]))
    else:
        main()
