"""Clocks: what is timed is what was asked for, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import math
import queue
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabench import timing
from metabench.errors import ConfigError, MetabenchError
from metabench.timing import Clock, ClockError, Slice, Work

UNIT = 0.004  # seconds of the fake device's unit of work


def test_the_garbage_collector_is_off_inside_and_as_before_outside():
    seen = []
    timing.take(lambda: seen.append(gc.isenabled()), 3, Clock())
    assert seen == [True, False, False, False] and gc.isenabled()  # the first call is untimed
    gc.disable()
    try:
        timing.take(lambda: None, 3, Clock())
        assert not gc.isenabled()
    finally:
        gc.enable()


def _fails_after(calls):
    left = iter(range(calls, -1, -1))
    return lambda: 1 / next(left)


class Other(Clock):
    """A clock with a reading of its own."""

    def __init__(self, read):
        super().__init__()
        object.__setattr__(self, "read", read)

    def now(self):
        return self.read()


class Device:
    """A device that answers at once and works later, one piece after the other."""

    def __init__(self):
        self.given = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while (piece := self.given.get()) is not None:
            piece()
            self.given.task_done()

    def start(self, amount):
        self.given.put(lambda: time.sleep(amount * UNIT))

    def finish(self):
        done = threading.Event()
        self.given.put(done.set)
        done.wait()


class Event:
    """The time at which the device came to a place in its work."""

    def __init__(self, device):
        self.reached = queue.Queue()
        device.given.put(lambda: self.reached.put(time.perf_counter()))

    def elapsed_time(self, later):
        return (later.reached.get() - self.reached.get()) * 1000


class DeviceClock(Clock):
    """The right clock of a fake device; `wrong` says in what it is not."""

    def __init__(self, device, wrong=""):
        super().__init__()
        self.__dict__.update(fake=device, wrong=wrong, marked=Device() if wrong == "another stream" else device)

    asynchronous = True

    def synchronise(self):
        if self.wrong != "never waits":
            self.fake.given.join()

    def mark(self):
        return Event(self.marked)


@contextlib.contextmanager
def fake_device():
    device = Device()
    yield device
    device.given.put(None)


def backwards():
    readings = iter(range(10**9))
    return lambda: time.perf_counter() - (0.001 if next(readings) % 1000 > 500 else 0.0)


def dearer():
    readings = iter(range(10**9))
    return lambda: time.perf_counter() + 0.005 * next(readings)


WRONG = {
    "half the speed": (lambda: time.perf_counter() / 2, "for a sleep of 0.01 s"),
    "a tenth short": (lambda: time.perf_counter() * 0.9, "for a sleep of 0.01 s"),
    "three times the speed": (lambda: time.perf_counter() * 3, "times what the system's clock read"),
    "frozen": (lambda: 5.0, "stands still"),
    "coarse": (lambda: time.perf_counter() // 0.0156 * 0.0156, "too coarse: steps of 0.0156 s"),
    "backwards": (backwards(), "runs backwards"),
    "no number": (lambda: math.nan, "nan"),
    "five milliseconds on every reading": (dearer(), "times the time for 4 times the work"),
}


def test_the_clock_that_is_used_is_right():
    assert timing.self_test(timing.clock_of("cpu")) == []
    assert 0.0 < timing.resolution() < timing.COARSEST


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_clock_is_caught(name):
    read, fault = WRONG[name]
    assert fault in "\n".join(timing.self_test(Other(read)))


def test_a_device_that_is_waited_for_passes():
    with fake_device() as device:
        assert timing.self_test(DeviceClock(device), work=Work(device.start, device.finish)) == []


def test_device_work_without_waiting_is_caught():
    with fake_device() as device:
        found = timing.self_test(DeviceClock(device, "never waits"), work=Work(device.start, device.finish))
    assert any("does not wait for the device" in fault for fault in found), found


def test_events_that_do_not_enclose_the_work_are_caught():
    with fake_device() as device:
        found = timing.self_test(DeviceClock(device, "another stream"), work=Work(device.start, device.finish))
    assert len(found) == 1
    assert "the device's events read" in found[0]


def test_a_device_that_blocks_at_each_launch_is_told():
    with fake_device() as device:

        def start(amount):
            device.start(amount)
            device.finish()

        found = timing.self_test(DeviceClock(device), work=Work(start, device.finish))
    assert any("CUDA_LAUNCH_BLOCKING" in fault for fault in found), found


def test_earlier_work_is_not_counted():
    class Late(DeviceClock):
        def synchronise(self):
            """Waits for all but the first time of two: what was begun before a region falls into it."""
            self.__dict__["turn"] = not self.__dict__.get("turn", False)
            if not self.__dict__["turn"]:
                super().synchronise()

    with fake_device() as device:
        found = timing.self_test(Late(device), work=Work(device.start, device.finish))
    assert any("counts earlier work" in fault for fault in found), found


def test_a_slice_of_known_length_has_the_calls_asked_for_and_one_untimed():
    calls = []

    def thunk():
        calls.append(gc.isenabled())
        time.sleep(0.003)

    before = time.perf_counter()
    found = timing.take(thunk, 4, Clock())
    assert calls == [True, False, False, False, False]
    assert gc.isenabled()
    assert found.calls == 4
    assert found.seconds >= 0.003
    assert before + 0.003 <= found.at <= time.perf_counter() - 4 * 0.003
    assert found.device_seconds is None
    assert not found.launch_bound


def test_the_device_is_waited_for_once_before_and_once_inside_a_slice():
    said = []

    class Telling(Clock):
        def synchronise(self):
            said.append("wait")

    timing.take(lambda: said.append("work"), 3, Telling())
    assert said == ["work", "wait", "work", "work", "work", "wait"]


def test_a_cold_cache_is_emptied_before_every_call_outside_its_region():
    said = []

    class Cold(Clock):
        def empty_cache(self):
            said.append("empty")

        def synchronise(self):
            said.append("wait")

    clock = Cold()
    object.__setattr__(clock, "cache", "cold")
    found = timing.take(lambda: said.append("work"), 2, clock)
    assert said == ["work"] + ["empty", "wait", "work", "wait"] * 2
    assert found.calls == 2


def test_a_device_s_slice_has_its_own_time_and_tells_who_waits_for_whom():
    with fake_device() as device:
        clock = DeviceClock(device)
        busy = timing.take(lambda: device.start(1), 5, clock)
        assert busy.device_seconds >= UNIT
        assert busy.seconds >= busy.device_seconds
        assert busy.launch_seconds < UNIT / 2
        assert not busy.launch_bound

        def launch():
            time.sleep(0.002)
            device.given.put(lambda: None)

        assert timing.take(launch, 5, clock).launch_bound


@given(st.floats(min_value=1e-9, max_value=10), st.floats(min_value=1e-9, max_value=10))
def test_a_slice_is_launch_bound_where_the_launch_takes_as_long_as_the_work(launch, device):
    found = Slice(0.0, 1, max(launch, device), device, launch)
    assert found.launch_bound == (launch >= timing.LAUNCH_SHARE * device)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_never_a_slice(step):
    readings = iter([1.0, 1.0, 1.0 + step])
    with pytest.raises(ClockError, match="metabench doctor"):
        timing.take(lambda: None, 1, Other(lambda: next(readings)))
    assert issubclass(ClockError, MetabenchError)


def test_nothing_cannot_be_timed():
    with pytest.raises(ClockError, match="at least one"):
        timing.take(lambda: None, 0, Clock())


def test_calibration_fills_a_slice_after_equal_warm_up():
    calls = []
    found = timing.calibrate(lambda: (calls.append(1), time.sleep(0.001)), Clock())
    assert 4 <= found <= 20  # 20 on an idle machine: a sleep is never too short
    assert timing.calibrate(lambda: time.sleep(0.03), Clock()) == 1
    calls.clear()
    assert timing.calibrate(lambda: calls.append(1), Clock(), seconds=100.0, limit=50) == 50
    assert len(calls) >= 50 + timing.WARM_UP_CALLS


def test_calibration_knows_a_time_too_short_to_read_from_one_that_cannot_be():
    assert timing.calibrate(lambda: None, Other(lambda: 7.0), limit=64) == 64
    for bad in (-1.0, math.nan):
        readings = iter([1.0, 1.0, bad])
        with pytest.raises(ClockError):
            timing.calibrate(lambda: None, Other(lambda: next(readings)))  # noqa: B023


def test_the_collector_is_on_again_after_a_failure():
    with pytest.raises(ZeroDivisionError):
        timing.take(_fails_after(1), 3, Clock())
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Clock("tpu"), "cpu and cuda"),
        (lambda: Clock("cpu", "cold"), "only cuda"),
        (lambda: Clock("cuda", "hot"), "warm or cold"),
    ],
)
def test_a_clock_that_does_not_exist_says_what_does(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_the_clock_of_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device"):
        timing.clock_of("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_the_clock_of_cuda_is_right(cache):
    assert timing.self_test(timing.clock_of("cuda", cache)) == []


def test_idle_work_is_measured_in_its_own_units_and_slows_by_the_share_asked_for():
    clock = timing.Clock()
    known = timing.burdened(lambda: None, 200_000, clock)
    units = min((timing.units_of(known, clock) for _ in range(3)), key=lambda found: abs(found - 200_000))
    assert units == pytest.approx(200_000, rel=0.15)
    twice = timing.burdened(known, 200_000, clock)
    ratios = [timing.take(twice, 4, clock).seconds / timing.take(known, 4, clock).seconds for _ in range(30)]
    assert sorted(ratios)[15] == pytest.approx(2, rel=0.15)
