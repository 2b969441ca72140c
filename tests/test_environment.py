"""The machine's fingerprint: what names it never moves, what moves never names it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from metabench import environment

WORKER = {"torch": "2.9.0+cpu", "gpu": None, "threads": 2}


def test_the_name_is_stable_and_does_not_depend_on_the_order():
    facts = environment.stable(WORKER)
    assert environment.name(facts) == environment.name(environment.stable(dict(reversed(WORKER.items()))))
    assert environment.name(facts) == environment.name(dict(reversed(facts.items())))


def test_every_stable_fact_names_the_machine():
    facts = environment.stable(WORKER)
    names = {environment.name({**facts, key: "other"}) for key in facts}
    assert len(names | {environment.name(facts)}) == len(facts) + 1


def test_readings_are_apart_from_what_names_the_machine():
    assert not environment.volatile().keys() & environment.stable(WORKER).keys()
    json.dumps([environment.volatile(), environment.stable(WORKER)])


def test_a_worker_gets_our_environment_the_allocators_and_its_threads(monkeypatch):
    monkeypatch.setenv("METABENCH_DATA", "somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    given = environment.worker_environment(3)
    assert given["METABENCH_DATA"] == "somewhere"
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"]) == ("3", "3")
    assert given["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "64"


def test_cores_are_those_this_process_may_use():
    if hasattr(os, "sched_getaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert environment.cores() == 1
        finally:
            os.sched_setaffinity(0, before)
    assert environment.cores() >= 1


def write(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def test_the_processor_s_state_is_read_where_the_system_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SYSTEM_CPU", tmp_path)
    assert (environment.governor(), environment.smt()) == (None, None)
    assert environment.volatile()["throttled"] is None
    write(tmp_path, cpu0__cpufreq__scaling_governor="powersave", smt__active=1)
    write(tmp_path, cpu0__thermal_throttle__core_throttle_count=3, cpu11__thermal_throttle__core_throttle_count=4)
    assert (environment.governor(), environment.smt()) == ("powersave", True)
    found = environment.volatile()
    assert (found["governor"], found["throttled"]) == ("powersave", 7)


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, {}),
        ({"cpu_dot_max": "max 100000", "memory_dot_max": "max"}, {}),
        ({"cpu_dot_max": "150000 100000", "memory_dot_max": 2**30}, {"cores": 1.5, "memory_gib": 1.0}),
        ({"cpu__cpu_dot_cfs_quota_us": -1, "cpu__cpu_dot_cfs_period_us": 100000}, {}),
        ({"cpu__cpu_dot_cfs_quota_us": 50000, "cpu__cpu_dot_cfs_period_us": 100000}, {"cores": 0.5}),
        ({"memory__memory_dot_limit_in_bytes": 2**62}, {}),
        ({"memory__memory_dot_limit_in_bytes": 2**29}, {"memory_gib": 0.5}),
    ],
)
def test_a_container_s_limits_are_seen_in_both_kinds_of_control_groups(files, limits, tmp_path, monkeypatch):
    write(tmp_path, **files)
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    assert environment.limits() == limits


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'A, 1410, 1980, 41, 0x0'", [("A", "1410", "1980", "41", "0x0")]),
        ("echo 'A, 1, 2, 3, [N/A]'; echo 'B, 4, 5, 6, 7'", [("A", "1", "2", "3", "[N/A]"), ("B", "4", "5", "6", "7")]),
        ("echo No devices were found", []),
        ("exit 9", []),
    ],
)
def test_the_clocks_of_gpus_are_read_from_their_driver(script, found, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [tuple(gpu.values()) for gpu in environment.volatile().get("gpu", [])] == found


def between(work, pids=()):
    before = environment.read(pids)
    work()
    return environment.disturbance(before, environment.read(pids))


BURN = "import time\nwhile time.process_time() < {}: pass"


def test_what_our_children_did_is_ours_even_when_they_are_gone():
    found = between(lambda: subprocess.run([sys.executable, "-c", BURN.format(0.4)], check=True))
    assert found["own_load"] * found["seconds"] >= 0.35
    json.dumps(found)


@contextlib.contextmanager
def stranger(code, **variables):
    """The pid of a process that is nobody's child."""
    command = f"\"{sys.executable}\" -c '{code}' >/dev/null 2>&1 & echo $!"
    env = {**os.environ, **variables}
    started = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=env)
    pid = int(started.stdout)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


def test_another_busy_process_is_named_and_ours_if_we_say_so():
    with stranger("while True: pass") as pid:
        found = between(lambda: time.sleep(1.0))
        assert found["other_load"] >= environment.BUSY_PROCESS
        assert pid in {c["pid"] for c in found["culprits"]} or len(found["culprits"]) == 3  # on a very busy machine
        mine = between(lambda: time.sleep(1.0), [pid])
        assert mine["own_load"] >= environment.BUSY_PROCESS
        assert pid not in {c["pid"] for c in mine["culprits"]}


@pytest.mark.parametrize(("policy", "spins"), [("", True), ("passive", False)])
def test_a_process_whose_openmp_threads_spin_is_known(policy, spins):
    spec = importlib.util.find_spec("torch")
    libraries = list(Path(spec.origin).parent.glob("lib/lib[gi]omp*")) if spec and spec.origin else []
    if not libraries:
        pytest.skip("no OpenMP library of its own with this torch")
    code = f"""import ctypes, threading, time
ctypes.CDLL("{libraries[0]}")
threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(60)"""
    with stranger(code, OMP_WAIT_POLICY=policy) as pid:
        if spins:
            until(lambda: environment._spins(pid), "OpenMP threads")
        else:
            time.sleep(0.5)
            assert not environment._spins(pid)
    assert not environment._spins(2**22 + 1)  # nobody's


QUIET = {
    "seconds": 1.0, "cores": 4, "own_load": 1.0, "other_load": 0.0, "culprits": [], "steal": 0.0,
    "governor": "performance", "governor_changed": False, "throttled": 0,
}  # fmt: skip
CULPRIT = {"name": "train", "pid": 7, "load": 1.5, "spins": True}


@given(st.floats(min_value=0.0, max_value=environment.WIDE))
def test_a_quiet_machine_needs_no_warning(spread):
    assert environment.explain(QUIET, spread) == []
    assert environment.explain({**QUIET, "governor": None, "throttled": None}, spread) == []


@pytest.mark.parametrize(
    ("what", "cause", "remedy"),
    [
        ({"other_load": 1.5}, "other processes kept 1.5 of 4 cores busy", "stop them"),
        ({"other_load": 1.5, "culprits": [CULPRIT]}, "train (pid 7) 1.5", "stop them"),
        ({"other_load": 1.5, "culprits": [CULPRIT]}, "train (pid 7) has OpenMP threads", "OMP_WAIT_POLICY=PASSIVE"),
        ({"steal": 0.08}, "the host gave 8%", "a machine of your own"),
        ({"governor": "powersave", "governor_changed": True}, "changed to powersave", "cpupower"),
        ({"throttled": 3}, "slowed down 3 times", "cool"),
    ],
)
def test_what_moves_a_measurement_is_told_with_its_remedy_even_where_the_spread_is_small(what, cause, remedy):
    found = environment.explain({**QUIET, **what}, 0.0)
    assert any(cause in text and remedy in text for text in found), found
    assert environment.explain({**QUIET, **what}, 0.5)[1:] == found


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"governor": "schedutil"}, "the governor schedutil"),
        ({"own_load": 4.0}, "all 4 cores are at work"),
        ({}, "no cause was seen"),
    ],
)
def test_what_only_widens_is_told_where_the_spread_is_wide(what, said):
    assert environment.explain({**QUIET, **what}, environment.WIDE) == []
    first, *found = environment.explain({**QUIET, **what}, 0.25)
    assert first == "the samples spread by 25% (interquartile range)"
    assert len(found) == 1
    assert said in found[0]
