"""The machine's fingerprint: stable keys, which name it, apart from volatile readings, which explain its noise."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

PROTOCOL = 2  # of the lines that parent and worker speak
PACKAGES = ("torch", "numpy", "scipy", "pillow")
PEERS = ("higher", "torchopt", "easyfsl", "learn2learn")  # named where they are installed
# How glibc treats freed memory. Kept, because otherwise it maps, faults in and unmaps every large tensor at each step,
# which is both noise and 20-35 % of the time. returned at once where memory is weighed: left alone, glibc keeps some of
# what is freed, how much depends on what happens to lie above it, and one call's peak differs from process to process.
ALLOCATORS = {
    "kept": {
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "10000000000",
        "MALLOC_TOP_PAD_": "200000000",
    },
    "default": {},
    "returned": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"},
}
VOLATILE = frozenset({"readings", "roofs", "controls", "disturbances"})  # beside the stable keys, not in the name
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # spinning OpenMP threads beside other work cost 10 to 200 times
SYSTEM_CPU = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")
GPU_FIELDS = {
    "name": "name",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_mhz_max",
    "temperature.gpu": "celsius",
    "clocks_throttle_reasons.active": "throttle",
}
GPU_SECONDS = 10.0  # nvidia-smi may need seconds to wake a GPU
SET_GOVERNOR = "set it to performance (`cpupower frequency-set -g performance` as root)"

WIDE = 0.1  # relative interquartile range; from there torch.utils.benchmark warns as well
BUSY = 0.2  # cores of other work
BUSY_PROCESS = 0.05
STOLEN = 0.02


def worker_environment(threads: int, *, allocator: str = "kept") -> dict[str, str]:
    """The environment a worker is started with: ours, the variables above, and the thread count.

    `allocator` is one of `ALLOCATORS`; "default" leaves the C library's as it comes.
    """
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    ours = {name: value for name, value in os.environ.items() if name not in ALLOCATORS["kept"]}
    return {**ours, **_variables(allocator), **count}


def _variables(allocator: str) -> dict[str, str]:
    """Those of the variables above that a worker with this allocator has."""
    return {**PASSIVE, **ALLOCATORS[allocator]}


def cores() -> int:
    """The cores this process may use (a container's or taskset's share, not the machine's)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stable(worker: Mapping[str, Any], *, allocator: str = "kept") -> dict[str, Any]:
    """What names the machine and its software; `worker` adds what only the worker knows (torch build, threads)."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": _versions(),
        "variables": _variables(allocator),
        **worker,
    }


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def here(fingerprint: Mapping[str, Any]) -> bool:
    """Whether a stable fingerprint is of this machine and this software, whatever its threads and allocator."""
    return all(fingerprint.get(name) == value for name, value in stable({}).items() if name != "variables")


def volatile() -> dict[str, Any]:
    """Readings of the moment: load, free memory, time, kernel, and how fast the processor lets itself run.

    What a machine does not tell is None; `gpu` is there where nvidia-smi is.
    """
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": [round(x, 2) for x in os.getloadavg()],
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "kernel": platform.release(),
        "governor": governor(),
        "mhz": _mhz(),
        "celsius": _celsius(),
        "throttled": _throttles(),
        **({"gpu": gpu} if (gpu := _gpu()) else {}),
    }


def name(fingerprint: Mapping[str, Any]) -> str:
    """A short id of the stable keys: equal ids mean comparable timings."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def governor() -> str | None:
    """How the processor chooses its frequency: performance, powersave, schedutil, ...; None if it does not say."""
    return _text(SYSTEM_CPU / "cpu0/cpufreq/scaling_governor")


def smt() -> bool | None:
    """Whether two threads share a core; None if the machine does not say."""
    active = _text(SYSTEM_CPU / "smt/active")
    return None if active is None else active == "1"


def limits() -> dict[str, float]:
    """What a container allows: `cores` (time per time) and `memory_gib`, where it limits them."""
    found = {}
    for quota, period in (("cpu.max", ""), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, then 1
        words = f"{_text(CGROUP / quota) or ''} {_text(CGROUP / period) if period else ''}".split()
        if len(words) == 2 and all(word.isdecimal() for word in words):
            found["cores"] = int(words[0]) / int(words[1])
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        size = _text(CGROUP / file) or ""
        if size.isdecimal() and int(size) < psutil.virtual_memory().total:
            found["memory_gib"] = round(int(size) / 2**30, 1)
    return found


def _mhz() -> float | None:
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return round(frequency.current) if frequency else None


def _celsius() -> float | None:
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return max((s.current for name in CPU_SENSORS for s in sensors.get(name, ())), default=None)


def _throttles() -> int | None:
    """How often any core was slowed down because it was hot, since the machine started."""
    counts = [_text(file) for file in SYSTEM_CPU.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    return sum(int(count) for count in counts if count) if counts else None


def _gpu() -> list[dict[str, str]]:
    """Each GPU's clocks, temperature and reasons to run slower, as nvidia-smi words them; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GPU_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(GPU_FIELDS.values(), line, strict=True)) for line in lines if len(line) == len(GPU_FIELDS)]


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None


@dataclass(frozen=True)
class Reading:
    """The machine at one moment; two of them tell what happened between."""

    at: float  # seconds of the monotonic clock
    busy: float  # processor seconds of everyone here, over all cores
    stolen: float  # processor seconds that the host kept from this virtual machine
    ours: float  # processor seconds of our own processes
    others: Mapping[tuple[int, float], tuple[str, float]]  # of each other one: (pid, started) -> (name, seconds)
    governor: str | None
    throttles: int | None


def read(pids: Iterable[int] = ()) -> Reading:
    """Read the counters of the machine. Ours are this process, `pids`, and all that they started."""
    found = {p.pid: p.info for p in psutil.process_iter(["name", "ppid", "create_time", "cpu_times"])}
    ours = {pid for pid in (os.getpid(), *pids) if pid in found}
    while young := {pid for pid, info in found.items() if info["ppid"] in ours} - ours:
        ours |= young
    times = psutil.cpu_times()
    others = {
        (pid, info["create_time"]): (str(info["name"]), info["cpu_times"].user + info["cpu_times"].system)
        for pid, info in found.items()
        if pid not in ours and info["cpu_times"]
    }
    return Reading(
        at=time.monotonic(),
        busy=times.user + times.system + sum(getattr(times, k, 0.0) for k in ("nice", "irq", "softirq")),
        stolen=getattr(times, "steal", 0.0),
        ours=sum(_with_children(found[pid]["cpu_times"]) for pid in ours),
        others=others,
        governor=governor(),
        throttles=_throttles(),
    )


def _with_children(times: Any) -> float:
    """Of a process and those it started that are gone: nothing is lost when a child ends between two readings."""
    return float(sum((times.user, times.system, times.children_user, times.children_system))) if times else 0.0


def disturbance(before: Reading, after: Reading) -> dict[str, Any]:
    """What came between two readings, as plain data for `explain`.

    `own_load` and `other_load` are in cores, `steal` is the share of the wanted processor time that the host kept,
    `culprits` are the busiest other processes (as far as they can be seen from here), `throttled` counts.
    """
    seconds = max(after.at - before.at, 1e-9)
    busy, stolen = after.busy - before.busy, after.stolen - before.stolen
    ours = max(after.ours - before.ours, 0.0)
    counts = (before.throttles, after.throttles)
    return {
        "seconds": round(seconds, 3),
        "cores": cores(),
        "own_load": round(ours / seconds, 3),
        "other_load": round(max(busy - ours, 0.0) / seconds, 3),
        "culprits": _culprits(before, after, seconds),
        "steal": round(stolen / (busy + stolen), 4) if busy + stolen > 0 else 0.0,
        "governor": after.governor,
        "governor_changed": before.governor != after.governor,
        "throttled": max(counts[1] - counts[0], 0) if counts[0] is not None and counts[1] is not None else None,
    }


def _culprits(before: Reading, after: Reading, seconds: float) -> list[dict[str, Any]]:
    loads = {key: (used - before.others.get(key, ("", 0.0))[1]) / seconds for key, (_, used) in after.others.items()}
    worst = sorted((key for key in loads if loads[key] >= BUSY_PROCESS), key=lambda key: -loads[key])[:3]
    return [
        {"name": after.others[key][0], "pid": key[0], "load": round(loads[key], 2), "spins": _spins(key[0])}
        for key in worst
    ]


def _spins(pid: int) -> bool:
    """Whether a process has OpenMP threads that spin while they wait, as far as it can be seen from here."""
    try:
        process = psutil.Process(pid)
        if process.num_threads() < 2 or process.environ().get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
            return False
        return any(name in m.path for m in process.memory_maps() for name in ("libgomp", "libiomp", "libomp"))
    except (psutil.Error, OSError):
        return False


def explain(what: Mapping[str, Any], spread: float) -> list[str]:
    """Warnings for a measurement: each names a cause and its remedy. Empty if nothing disturbed it.

    Args:
        what: a `disturbance`.
        spread: the relative interquartile range of the samples. What shifts all samples alike (another load, a hot
            processor) is told even when it is small; what only widens them, when it is too wide.
    """
    out = [*_of_others(what), *_of_frequency(what)]
    if spread <= WIDE:
        return out
    if what["governor"] not in (None, "performance") and not what["governor_changed"]:
        out.append(f"the governor {what['governor']} varies the frequency: {SET_GOVERNOR}")
    if what["other_load"] <= BUSY and what["own_load"] > 0.95 * what["cores"]:
        out.append(f"all {what['cores']} cores are at work: leave one free with fewer `threads` in the suite")
    if not out:
        out.append("no cause was seen here: measure in more processes, and look at `metabench doctor`")
    return [f"the samples spread by {spread:.0%} (interquartile range)", *out]


def _of_others(what: Mapping[str, Any]) -> list[str]:
    out = []
    if what["other_load"] > BUSY:
        names = ", ".join(f"{c['name']} (pid {c['pid']}) {c['load']:.1f}" for c in what["culprits"])
        who = f"other processes kept {what['other_load']:.1f} of {what['cores']} cores busy"
        out.append(f"{who}{f': {names}' if names else ''}; stop them, or measure when they are done")
        out += [
            f"{c['name']} (pid {c['pid']}) has OpenMP threads that spin while they wait: start it with "
            "OMP_WAIT_POLICY=PASSIVE"
            for c in what["culprits"]
            if c["spins"]
        ]
    if what["steal"] > STOLEN:
        out.append(
            f"the host gave {what['steal']:.0%} of the processor time to others: measure at a quieter hour, in more "
            "processes, or on a machine of your own"
        )
    return out


def _of_frequency(what: Mapping[str, Any]) -> list[str]:
    out = []
    if what["governor_changed"]:
        out.append(f"the governor changed to {what['governor']} meanwhile: {SET_GOVERNOR}")
    if what["throttled"]:
        out.append(f"the processor was hot and slowed down {what['throttled']} times: let it cool, use fewer threads")
    return out
