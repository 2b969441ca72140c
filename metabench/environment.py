"""The machine's fingerprint: stable keys, which name it, apart from volatile readings, which explain its noise."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

PROTOCOL = 1  # of the lines that parent and worker speak
PACKAGES = ("torch", "numpy", "scipy", "pillow")
# Kept arenas: without them glibc maps, faults in and unmaps every large tensor at each step, which is both noise
# and 20-35 % of the time. Passive OpenMP threads: spinning ones beside other work cost 10 to 200 times.
WORKER_VARIABLES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def worker_environment(threads: int) -> dict[str, str]:
    """The environment a worker is started with: ours, the variables above, and the thread count."""
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, **WORKER_VARIABLES, **count}


def cores() -> int:
    """The cores this process may use (a container's or taskset's share, not the machine's)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stable(worker: Mapping[str, Any]) -> dict[str, Any]:
    """What names the machine and its software; `worker` adds what only the worker knows (torch build, threads)."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "variables": WORKER_VARIABLES,
        **worker,
    }


def volatile() -> dict[str, Any]:
    """Readings of the moment: load, free memory, time, kernel."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": [round(x, 2) for x in os.getloadavg()],
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "kernel": platform.release(),
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
