"""The doctor: what disturbs a measurement is named with its remedy, in 80 columns, by a process that loads no torch."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from itertools import pairwise

import pytest
from conftest import environ, metabench
from rich.console import Console

from metabench import doctor, environment

PROBE = {
    "torch": {
        "version": "2.9", "threads": 4, "blas": "mkl", "onednn": True, "openmp": True, "instructions": "AVX2",
        "cuda": None, "gpus": [],
    },
    "clock": {"resolution": 1e-7, "faults": {"cpu": []}},
    "roofs": {"cpu": {"float32_flops": 2e11, "bf16_flops": 4e11, "bytes": 2e10, "threads": 4.0}},
    "controls": {
        "matmul": {"median": 0.002, "iqr": 0.02, "drift": 0.01, "seconds": [0.002]},
        "python": {"median": 0.003, "iqr": 0.01, "drift": 0.02, "seconds": [0.003]},
    },
    "disturbance": {
        "seconds": 4.0, "cores": 4, "own_load": 3.0, "other_load": 0.01, "culprits": [], "steal": 0.0,
        "governor": "performance", "governor_changed": False, "throttled": 0,
    },
}  # fmt: skip
GOOD = {
    "environment": {**environment.stable({}), "cpu": "A processor", "cores": 4, "memory_gib": 16},
    "readings": {
        "memory_free_gib": 8.0, "kernel": "6", "governor": "performance", "mhz": 3000, "celsius": 50.0, "throttled": 0,
    },
    "physical_cores": 4,
    "smt": False,
    "limits": {},
    "libc": "glibc",
    "shell": {**dict.fromkeys(doctor.SHELL), "OMP_WAIT_POLICY": "passive"},
    "probe": PROBE,
}  # fmt: skip
CULPRIT = {"name": "a-long-name-of-a-program", "pid": 123456, "load": 1.0, "spins": True}


def machine(path="", value=None):
    """The good machine with one thing changed, named like probe/torch/threads."""
    found = deepcopy(GOOD)
    *way, last = path.split("/")
    if path:
        place = found
        for word in way:
            place = place[word]
        place[last] = value
    return found


def looked_at(found):
    return {f.what: f.remedy for f in doctor.findings(found) if f.remedy}


def test_a_good_machine_has_nothing_to_look_at():
    assert looked_at(machine()) == {}


@pytest.mark.parametrize(
    ("path", "value", "what", "remedy"),
    [
        ("readings/memory_free_gib", 0.3, "memory", "swaps"),
        ("limits", {"cores": 1.5}, "container", "fewer `threads`"),
        ("probe/torch/onednn", False, "torch", "lacks oneDNN"),
        ("readings/gpu", [{"name": "A GPU"}], "CUDA", "CUDA build"),
        ("readings/governor", "powersave", "governor", "cpupower"),
        ("readings/celsius", 97.0, "frequency", "cool"),
        ("probe/disturbance/throttled", 2, "frequency", "cool"),
        ("probe/disturbance/other_load", 1.2, "load", "stop them"),
        ("probe/disturbance/steal", 0.1, "load", "quieter hour"),
        ("libc", "", "allocator", "page faults"),
        ("shell/LD_PRELOAD", "libjemalloc.so", "allocator", "unset LD_PRELOAD"),
        ("shell/OMP_WAIT_POLICY", None, "OpenMP waits", "export OMP_WAIT_POLICY=PASSIVE"),
        ("shell/OMP_WAIT_POLICY", "ACTIVE", "OpenMP waits", "export OMP_WAIT_POLICY=PASSIVE"),
        ("shell/CUDA_LAUNCH_BLOCKING", "1", "CUDA launches", "unset"),
        ("probe/torch/threads", 8, "threads", "fewer `threads`"),
        ("probe/clock/faults", {"cpu": [], "cuda": ["it stands still"]}, "clock cuda", "it stands still"),
        ("probe/roofs/cpu/bf16_flops", 1e11, "roofs", "no faster"),
        ("probe/controls/matmul/iqr", 0.3, "noise matmul", "no cause was seen"),
        ("probe/controls/python/drift", 0.3, "noise python", "no cause was seen"),
    ],
)
def test_each_thing_that_is_wrong_is_told_with_its_remedy(path, value, what, remedy):
    found = looked_at(machine(path, value))
    assert remedy in found[what]
    assert found.keys() <= {what, "roofs"}  # what others take makes the roofs low as well


def test_one_core_is_told():
    found = machine("environment/cores", 1)
    found["probe"]["torch"]["threads"] = 1
    assert "two or more" in looked_at(found)["processor"]


def test_threads_that_share_a_core_are_told():
    found = {**machine("smt", True), "physical_cores": 2}
    assert "threads: 2" in looked_at(found)["SMT"]
    assert looked_at(machine("smt", True)) == {}  # on, but one thread of each core is used here


def test_noise_with_a_known_cause_points_at_it():
    found = machine("probe/disturbance/other_load", 1.2)
    found["probe"]["controls"]["matmul"]["iqr"] = 0.4
    assert looked_at(found)["noise matmul"] == "see the load above"


def test_what_a_machine_does_not_tell_is_nothing_to_look_at():
    found = machine("smt", None)
    found["readings"].update(governor=None, mhz=None, celsius=None, throttled=None)
    found["probe"]["disturbance"].update(governor=None, throttled=None)
    assert looked_at(found) == {}
    assert {f.what for f in doctor.findings(found) if f.found == "not told by this machine"} == {
        "SMT", "governor", "frequency",
    }  # fmt: skip


def shown(found, width, **options):
    found["findings"] = [vars(finding) for finding in doctor.findings(found)]
    file = io.StringIO()
    doctor.show(found, Console(file=file, width=width, highlight=False, **options))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_loses_no_word(width):
    found = machine("probe/disturbance/other_load", 1.2)
    found["probe"]["disturbance"]["culprits"] = [CULPRIT] * 3
    text = shown(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert not any(line.endswith(" ") for line in text.splitlines())
    flat = " ".join(text.split())
    for finding in doctor.findings(found):
        assert " ".join(finding.found.split()) in flat
        assert " ".join(finding.remedy.split()) in flat
    assert looked_at(found).keys() == {"load", "roofs"}
    assert text.endswith(f"{len(doctor.findings(found)) - 2} good, 2 to look at\n")


def test_colour_is_for_terminals(monkeypatch):
    assert "\x1b" not in shown(machine(), 80)
    assert "\x1b[32m" in shown(machine(), 80, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(machine(), 80, force_terminal=True)


def test_this_machine_is_examined_by_the_command():
    done = metabench("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "measuring this machine" in done.stderr
    assert found["probe"]["clock"]["faults"]["cpu"] == []
    assert found["probe"]["torch"]["threads"] == environment.cores()
    assert found["shell"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert set(found["probe"]["controls"]) == {"matmul", "python"}
    for noise in found["probe"]["controls"].values():
        assert len(noise["seconds"]) >= 8
        assert min(noise["seconds"]) <= noise["median"] <= max(noise["seconds"])
        assert noise["iqr"] >= 0
    assert found["findings"] == [vars(finding) for finding in doctor.findings(found)]
    assert max(map(len, shown(found, 80).splitlines())) <= 80


def test_a_probe_that_dies_is_one_message(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1 is missing')\n")
    first = f"{tmp_path}:{environ().get('PYTHONPATH', '')}"
    done = metabench("doctor", env=environ(PYTHONPATH=first))
    assert done.returncode == 3
    assert "the probe died: ImportError: libgomp.so.1 is missing" in done.stderr
    assert "-m metabench.probe" in done.stderr


def test_noise_is_spread_and_drift_relative_to_the_median():
    from metabench import probe

    assert probe.noise([2.0] * 8) == {"median": 2.0, "iqr": 0.0, "drift": 0.0, "seconds": [2.0] * 8}
    steady = probe.noise([1.0, 3.0] * 20)
    assert (steady["iqr"], steady["drift"]) == (1.0, 0.0)
    slower = probe.noise([1.0] * 10 + [2.0] * 10 + [2.0] * 10 + [3.0] * 10)
    assert slower["drift"] == 1.0


def test_what_is_watched_is_interleaved_and_never_too_little_for_a_spread():
    from metabench import probe, timing

    said = []
    thunks = {name: (lambda name=name: said.append(name)) for name in ("one", "other")}
    found = probe.watch(thunks, timing.clock_of("cpu"), 0.0)
    assert {name: len(noise["seconds"]) for name, noise in found.items()} == {"one": 8, "other": 8}
    turns = [said[0]] + [b for a, b in pairwise(said) if a != b]
    assert len(turns) >= 8
