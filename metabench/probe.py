"""A process of its own that measures a machine with torch: one JSON object on standard output.

`doctor` starts it as a worker is started, so that what it finds is what measurements meet.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch

from metabench import environment, roofs, timing

NOISE_SECONDS = 4.0
PARTS = 4  # of the watched time: drift is how far their medians lie apart


def main() -> None:
    """Measure, and print what was found."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not break the answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    clocks = {device: timing.clock_of(device) for device in devices}
    faults = {device: timing.self_test(clock) for device, clock in clocks.items()}
    peaks = {device: roofs.measure(device) for device in devices}
    before = environment.read()
    controls = watch(roofs.controls(), clocks["cpu"], NOISE_SECONDS)
    found = {
        "torch": build(),
        "clock": {"resolution": timing.resolution(clocks["cpu"]), "faults": faults},
        "roofs": peaks,
        "controls": controls,
        "disturbance": environment.disturbance(before, environment.read()),
    }
    with out:
        out.write(json.dumps(found, allow_nan=False) + "\n")


def build() -> dict[str, Any]:
    """Of torch: version, thread count, the libraries it computes with, and the GPUs it sees."""
    config = torch.__config__.show()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "blas": blas[1] if (blas := re.search(r"BLAS_INFO=(\w+)", config)) else None,
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "openmp": torch.backends.openmp.is_available(),  # type: ignore[no-untyped-call]
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": g.name, "memory_gib": round(g.total_memory / 2**30)} for g in gpus],
    }


def watch(thunks: Mapping[str, Callable[[], object]], clock: timing.Clock, seconds: float) -> dict[str, dict[str, Any]]:
    """Time all of `thunks` for about `seconds` together, in short slices in random order; their noise by name."""
    calls = {name: timing.calibrate(thunk, clock) for name, thunk in thunks.items()}
    slices: dict[str, list[timing.Slice]] = {name: [] for name in thunks}
    order, end = list(thunks), time.perf_counter() + seconds
    while time.perf_counter() < end or len(slices[order[0]]) < 2 * PARTS:
        random.shuffle(order)
        for name in order:
            slices[name].append(timing.take(thunks[name], calls[name], clock))
    return {name: noise([s.seconds for s in found]) for name, found in slices.items()}


def noise(seconds: Sequence[float]) -> dict[str, Any]:
    """Of samples in the order of time (8 or more): median, interquartile range and drift, both relative to it.

    Drift is the distance between the largest and the least of the medians of the quarters of the time.
    """
    middle = median(seconds)
    low, _, high = quantiles(seconds, n=4)
    bounds = [len(seconds) * part // PARTS for part in range(PARTS + 1)]
    parts = [median(seconds[a:b]) for a, b in pairwise(bounds)]
    drift = (max(parts) - min(parts)) / middle
    return {"median": middle, "iqr": (high - low) / middle, "drift": drift, "seconds": list(seconds)}


if __name__ == "__main__":
    main()
