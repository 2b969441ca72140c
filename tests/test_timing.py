"""Clocks: what is timed is what was asked for, and nothing else."""

from __future__ import annotations

import gc
import time

import pytest

from metabench import timing


def test_a_known_duration_is_measured_to_be_at_least_that():
    samples = timing.sample(lambda: time.sleep(0.002), seconds=0.0)
    assert len(samples) == timing.MIN_SAMPLES
    assert min(samples) >= 0.002


def test_quick_work_is_sampled_up_to_the_limit_and_warmed_up_equally():
    calls = []
    samples = timing.sample(lambda: calls.append(1), seconds=5.0)
    assert len(samples) == timing.MAX_SAMPLES
    assert len(calls) == timing.MAX_SAMPLES + timing.WARM_UP_CALLS


def test_the_time_of_a_slice_is_kept():
    start = time.perf_counter()
    samples = timing.sample(lambda: time.sleep(0.005), seconds=0.06)
    assert timing.MIN_SAMPLES <= len(samples) <= 13
    assert time.perf_counter() - start >= 0.06


def test_the_garbage_collector_is_off_inside_and_as_before_outside():
    seen = []
    timing.sample(lambda: seen.append(gc.isenabled()), seconds=0.0)
    assert not any(seen[timing.WARM_UP_CALLS :])
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.sample(_fails_after(timing.WARM_UP_CALLS + 1), seconds=0.0)
    assert gc.isenabled()
    gc.disable()
    try:
        timing.sample(lambda: None, seconds=0.0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def _fails_after(calls):
    left = iter(range(calls, -1, -1))
    return lambda: 1 / next(left)


def test_the_device_is_waited_for_before_and_inside_every_sample():
    said = []
    samples = timing.sample(lambda: said.append("work"), synchronise=lambda: said.append("wait"), seconds=0.0)
    assert said[timing.WARM_UP_CALLS :] == ["wait", "work", "wait"] * len(samples)
