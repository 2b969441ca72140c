"""Clocks: how a piece of work is timed, and how a clock is shown to be right. Imports nothing of metabench but errors.

A slice is one timed region of some calls, short (about 20 ms) so that many kernels can be interleaved and a machine's
drift hits all alike. On CUDA the host waits for the device once before and once inside a region; events on the stream
give the device's own time beside the host's.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from itertools import pairwise, repeat
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metabench.errors import ConfigError, MetabenchError

WARM_UP_CALLS = 3
SLICE_SECONDS = 0.02
LAUNCH_SHARE = 0.9  # of the device's time spent launching: the device waits for the host
IDLE_UNITS, IDLE_CYCLES = 5000, 100  # a unit is some 10 nanoseconds on the CPU, so many cycles on CUDA
IDLE_ROUNDS = 5

READINGS = 1_000_000  # so many readings without a step: the clock stands still
COARSEST = SLICE_SECONDS / 1000  # a slice is read to a thousandth
STEPS = 1000
TRIALS = 5
ROUNDS = 4  # a busy machine may spoil one, a wrong clock spoils all
SLEEP = 0.01
UNIT_SECONDS = 0.0005  # of known work on the CPU: a scheduler rarely breaks into so little
MORE = 4  # times the known work
CUDA_SIZE = 4096  # of the square matrices in a unit of known work on CUDA: far longer than its launch
FACTOR = 2.0  # a reading this much off is no noise, even on a busy machine, if the best of several is


class ClockError(MetabenchError):
    """A time that cannot be: zero, negative or not a number."""

    exit_code = 3


@dataclass(frozen=True)
class Clock:
    """How one device is timed.

    `cache` is about CUDA alone: `cold` zeroes a buffer larger than the L2 cache before every call, outside the timed
    region (each call is then a region of its own); `warm` leaves there what the call before has left.

    Raises:
        ConfigError: an unknown device, or a cold cache on the CPU.
    """

    device: str = "cpu"
    cache: Literal["warm", "cold"] = "warm"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"no clock for the device {self.device!r}: cpu and cuda have one")
        if self.cache not in ("warm", "cold"):
            raise ConfigError(f"cache {self.cache!r}: choose warm or cold")
        if self.cache == "cold" and self.device == "cpu":
            raise ConfigError("cache cold: only cuda can empty its cache; on the cpu choose warm")

    @property
    def asynchronous(self) -> bool:
        """Whether a call may return before its work is done."""
        return self.device == "cuda"

    def now(self) -> float:
        """Seconds since some moment; never runs backwards."""
        return time.perf_counter()

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """An event at this place of the device's stream; None where the device has none."""
        if self.device != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def empty_cache(self) -> None:
        """Where `cache` is cold: overwrite what the caches hold."""
        if self.cache == "cold":
            _larger_than_the_cache().zero_()


def clock_of(device: str, cache: Literal["warm", "cold"] = "warm") -> Clock:
    """The clock of a device that is there.

    Raises:
        ConfigError: an unknown device, cuda where there is none, or a cold cache on the CPU.
    """
    clock = Clock(torch.device(device).type, cache)
    if clock.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available here: choose cpu")
    return clock


class Slice(NamedTuple):
    """One timed region: when it began, how many calls it held, and the seconds of one call."""

    at: float  # the clock at its start: order and distance in time, no date
    calls: int
    seconds: float  # of the host, until the device had done its work
    device_seconds: float | None  # by events on the device's stream; None on the CPU
    launch_seconds: float | None = None  # of the host, until the work was handed over; None on the CPU

    @property
    def launch_bound(self) -> bool:
        """Whether the host needs about as long to hand the work over as the device has it: the device waits.

        The whole time of the host cannot tell: it holds the wait for the device and so is never the shorter.
        """
        if self.device_seconds is None or self.launch_seconds is None:
            return False
        return self.launch_seconds >= LAUNCH_SHARE * self.device_seconds


def calibrate(
    thunk: Callable[[], object], clock: Clock, *, seconds: float = SLICE_SECONDS, limit: int = 100_000
) -> int:
    """How many calls make a slice of about `seconds`: at least 1, at most `limit`.

    Calls `thunk` a fixed number of times first, the same for all, then as often as it takes to fill half a slice.

    Raises:
        ClockError: the clock ran backwards or gave no number.
    """
    warm_up(thunk)
    calls = 1
    while True:
        taken = _region(thunk, calls, clock).host
        if not taken >= 0.0:
            raise _impossible(taken, calls)
        if taken >= seconds / 2 or calls == limit:
            break
        calls = min(limit, calls * 2)
    return max(1, min(limit, round(calls * seconds / taken))) if taken else calls


def warm_up(thunk: Callable[[], object]) -> None:
    """Call `thunk` untimed, as often for every kernel: an adaptive warm-up would favour one of two compared."""
    for _ in range(WARM_UP_CALLS):
        thunk()


def burdened(thunk: Callable[[], object], units: int, clock: Clock) -> Callable[[], object]:
    """`thunk`, then so many units of idle work on the clock's device: a slowdown that is known."""

    def slower() -> object:
        result = thunk()
        _idle(units, clock)
        return result

    return slower


def units_of(thunk: Callable[[], object], clock: Clock) -> float:
    """How many units of idle work take as long as one call of `thunk`.

    Both are timed in turns, so that a machine's drift hits both; the burden is work, not waiting for a time to pass,
    so that it stays the same share of a call when the machine becomes slower.
    """

    def some() -> None:
        _idle(IDLE_UNITS, clock)

    calls, own = calibrate(thunk, clock), calibrate(some, clock)
    ratios = [take(thunk, calls, clock).seconds / take(some, own, clock).seconds for _ in range(IDLE_ROUNDS)]
    return median(ratios) * IDLE_UNITS


def _idle(units: int, clock: Clock) -> None:
    if clock.device == "cuda":
        torch.cuda._sleep(units * IDLE_CYCLES)  # type: ignore[no-untyped-call]  # on the device: nobody waits
        return
    for _ in repeat(None, units):
        pass


def take(thunk: Callable[[], object], calls: int, clock: Clock) -> Slice:
    """Time `calls` calls as one region, after one untimed call that brings the caches back.

    The garbage collector is off inside. With a cold cache every call is a region of its own, and the times are means.

    Raises:
        ClockError: the time is zero, negative or not a number, or there is nothing to time.
    """
    if calls < 1:
        raise ClockError(f"a slice of {calls} calls: time at least one")
    thunk()
    if clock.cache == "cold":
        regions = [_region(thunk, 1, clock) for _ in range(calls)]
    else:
        regions = [_region(thunk, calls, clock)]
    host, device = sum(r.host for r in regions), _sum(r.device for r in regions)
    for taken in (host,) if device is None else (host, device):
        if not 0.0 < taken < math.inf:
            raise _impossible(taken, calls)
    launch = None if device is None else sum(r.launch for r in regions) / calls
    return Slice(regions[0].at, calls, host / calls, None if device is None else device / calls, launch)


class _Region(NamedTuple):
    at: float
    launch: float
    host: float
    device: float | None


def _region(thunk: Callable[[], object], calls: int, clock: Clock) -> _Region:
    """The seconds of all `calls` calls together, between two synchronisations."""
    with _collector_off():
        clock.empty_cache()
        clock.synchronise()
        start = clock.now()
        first = clock.mark()
        for _ in repeat(None, calls):
            thunk()
        last = clock.mark()
        launched = clock.now()
        clock.synchronise()
        end = clock.now()
    device = first.elapsed_time(last) / 1000 if first is not None and last is not None else None
    return _Region(start, launched - start, end - start, device)


def _sum(seconds: Iterator[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if known else None


def _impossible(taken: float, calls: int) -> ClockError:
    return ClockError(
        f"the clock read {taken} s for {calls} calls, which cannot be; `metabench doctor` tests the clock"
    )


@contextmanager
def _collector_off() -> Iterator[None]:
    """No collection inside, and none forced before: it takes longer than a slice."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@once
def _larger_than_the_cache() -> Tensor:
    """A buffer of twice the L2 cache, kept: what fills the cache leaves nothing of the call before."""
    size: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def resolution(clock: Clock | None = None) -> float:
    """The smallest step that the clock was seen to make, in seconds; infinite if it stands still."""
    clock = clock or Clock()
    smallest, steps, before = math.inf, 0, clock.now()
    for _ in range(READINGS):
        now = clock.now()
        if now > before:
            smallest, steps = min(smallest, now - before), steps + 1
        if steps == STEPS:
            break
        before = now
    return smallest


@dataclass(frozen=True)
class Work:
    """Work of known size, whose end shows without the clock's own waiting.

    `start(k)` begins k equal units and may return before they are done; `finish` needs what they yield, and so can
    not return before.
    """

    start: Callable[[int], object]
    finish: Callable[[], object]


def self_test(clock: Clock, *, work: Work | None = None) -> list[str]:
    """What is wrong with a clock, empty if nothing; takes about a second.

    It must never run backwards, make steps far smaller than a slice, read no less than a known sleep and not much
    more, read k times the work as about k times the time, and wait for a device that answers before it has finished.
    `work` is the known work; the default is a loop in Python, on CUDA a product of matrices.
    """
    work = work or (_cuda_work() if clock.device == "cuda" else _python_work())
    faults: list[str] = []
    for check in (_steps, _sleeps, _amounts, _waits):
        for _ in range(ROUNDS):
            found = _faults(check, clock, work)
            if not found:
                break
        faults += found
    return list(dict.fromkeys(faults))


def _faults(check: Callable[[Clock, Work], Iterator[str]], clock: Clock, work: Work) -> list[str]:
    try:
        return list(check(clock, work))
    except ClockError as error:
        return [str(error)]


def _steps(clock: Clock, work: Work) -> Iterator[str]:
    del work
    readings = [clock.now() for _ in range(READINGS // 100)]
    back = min(b - a for a, b in pairwise(readings))
    if not back >= 0.0:
        yield f"it runs backwards, by {-back:.3g} s"
    step = resolution(clock)
    if step > COARSEST:
        yield "it stands still" if step == math.inf else f"it is too coarse: steps of {step:.3g} s"


def _sleeps(clock: Clock, work: Work) -> Iterator[str]:
    """Too little is always wrong; too much only beside a second clock that saw the same sleep, for sleeps overrun."""
    del work
    seen: list[float] = []

    def sleep() -> None:
        start = time.time()
        time.sleep(SLEEP)
        seen.append(time.time() - start)

    ratios, shortest = [], math.inf
    for _ in range(TRIALS):
        reading = take(sleep, 1, clock).seconds
        shortest = min(shortest, reading)
        ratios.append(reading / max(seen[-1], SLEEP))
    if shortest < SLEEP * (1 - 1e-6):
        yield f"it read {shortest:.3g} s for a sleep of {SLEEP} s"
    if median(ratios) > FACTOR:
        yield f"it read {median(ratios):.2g} times what the system's clock read for a sleep"


def _amounts(clock: Clock, work: Work) -> Iterator[str]:
    """The least of some readings: load only ever adds."""

    def do(amount: int) -> float:
        def thunk() -> None:
            work.start(amount)

        return take(thunk, 1, clock).seconds

    pairs = [(do(1), do(MORE)) for _ in range(TRIALS)]
    work.finish()
    ratio = min(more for _, more in pairs) / min(one for one, _ in pairs)
    if not MORE / FACTOR <= ratio <= MORE * FACTOR:
        yield f"it read {ratio:.2g} times the time for {MORE} times the work"


def _waits(clock: Clock, work: Work) -> Iterator[str]:
    """What a clock reads against the time until the work's result is there."""
    whole, handed, readings, after, device = [], [], [], [], []
    for _ in range(TRIALS):
        work.finish()
        start = clock.now()
        work.start(MORE)
        handed.append(clock.now() - start)
        work.finish()
        whole.append(clock.now() - start)
        reading = take(lambda: work.start(MORE), 1, clock)
        readings.append(reading.seconds)
        device += [] if reading.device_seconds is None else [reading.device_seconds]
        work.finish()
        after.append(_after(clock, work))
    true = min(whole)
    if min(readings) < true / FACTOR:
        yield f"it does not wait for the device: it read {min(readings):.3g} s of work that takes {true:.3g} s"
    if clock.asynchronous and min(after) > true / FACTOR:
        yield f"it counts earlier work: it read {min(after):.3g} s for nothing"
    if device and not true / FACTOR <= min(device) <= true * FACTOR:
        yield f"the device's events read {min(device):.3g} s of work that takes {true:.3g} s"
    if clock.asynchronous and min(handed) > true / FACTOR:
        yield "the device makes the host wait at every launch (CUDA_LAUNCH_BLOCKING?): such times are no one's"


def _after(clock: Clock, work: Work) -> float:
    """The reading of nothing, right after work was begun."""
    work.start(MORE)
    reading = _region(lambda: None, 1, clock).host
    work.finish()
    return reading


def _python_work() -> Work:
    def loop(count: int) -> None:
        for _ in repeat(None, count):
            pass

    start, count = time.perf_counter(), 100_000
    loop(count)
    unit = max(1, round(count * UNIT_SECONDS / max(time.perf_counter() - start, 1e-6)))
    return Work(lambda amount: loop(amount * unit), lambda: None)


def _cuda_work() -> Work:
    a = torch.full((CUDA_SIZE, CUDA_SIZE), 1.0 / CUDA_SIZE, device="cuda")
    out = torch.empty_like(a)

    def start(amount: int) -> None:
        for _ in range(amount):
            torch.mm(a, a, out=out)

    def finish() -> float:
        return float(out[0, 0])

    start(WARM_UP_CALLS)  # loads the library
    finish()
    return Work(start, finish)
