"""Clocks: how a piece of work is timed. Imports nothing of metabench."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WARM_UP_CALLS = 3
MIN_SAMPLES, MAX_SAMPLES = 7, 100
SLICE_SECONDS = 0.4  # enough samples for a median, short enough for a table of many rows


def sample(
    thunk: Callable[[], object],
    *,
    synchronise: Callable[[], None] = lambda: None,
    seconds: float = SLICE_SECONDS,
) -> list[float]:
    """Wall seconds of each call of `thunk`, after equal warm-up, with the garbage collector off.

    `synchronise` waits for a device to finish; it is called once before and once inside every sample.
    Takes samples for about `seconds`, at least 7 and at most 100.
    """
    for _ in range(WARM_UP_CALLS):
        thunk()
    samples: list[float] = []
    with _no_garbage_collection():
        end = time.perf_counter() + seconds
        while len(samples) < MIN_SAMPLES or (time.perf_counter() < end and len(samples) < MAX_SAMPLES):
            synchronise()
            start = time.perf_counter()
            thunk()
            synchronise()
            samples.append(time.perf_counter() - start)
    return samples


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
