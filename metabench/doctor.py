"""How well a machine can measure time, and what to do about what disturbs it. Never imports torch: a probe does."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.text import Text

from metabench import environment
from metabench.errors import WorkerError

PROBE_SECONDS = 300  # it takes about ten where the machine is idle
SHELL = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD", "CUDA_LAUNCH_BLOCKING")
HOT = 90.0  # degrees Celsius; processors slow down from about 95
INDENT = 22


@dataclass(frozen=True)
class Finding:
    """One line of the examination: good as it is where there is no `remedy`, else a thing to look at."""

    what: str
    found: str
    remedy: str = ""


def examine() -> dict[str, Any]:
    """All about this machine as plain data: what it is, what was measured, and the findings.

    Raises:
        WorkerError: the probe died or took too long.
    """
    machine = {
        "environment": environment.stable({}),
        "readings": environment.volatile(),
        "physical_cores": psutil.cpu_count(logical=False),
        "smt": environment.smt(),
        "limits": environment.limits(),
        "libc": platform.libc_ver()[0],
        "shell": {name: os.environ.get(name) for name in SHELL},
        "probe": _probe(),
    }
    return {**machine, "findings": [asdict(finding) for finding in findings(machine)]}


def _probe() -> dict[str, Any]:
    command = [sys.executable, "-m", "metabench.probe"]
    variables = environment.worker_environment(environment.cores())
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"the probe did not end within {PROBE_SECONDS} s: stop other work and try again") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise WorkerError(f"the probe died: {last}; `{' '.join(command)}` shows all of it") from None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def as_json(machine: Mapping[str, Any]) -> str:
    """The examination for machines."""
    return json.dumps(machine, indent=1, ensure_ascii=False) + "\n"


def show(machine: Mapping[str, Any], console: Console) -> None:
    """Print the findings as a table as wide as `console`; colour and NO_COLOR are rich's business."""
    rows = [Finding(**finding) for finding in machine["findings"]]
    for row in rows:
        verdict = ("look at", "yellow") if row.remedy else ("good", "green")
        head = Text.assemble(f"{row.what:13}", (f"{verdict[0]:9}", verdict[1]))
        for text in (row.found, row.remedy):
            for line in Text(text).wrap(console, max(console.width - INDENT, 20)) if text else ():
                line.rstrip()
                console.print(Text.assemble(head, line), no_wrap=True, overflow="ignore", crop=False)
                head = Text(" " * INDENT)
    worse = sum(bool(row.remedy) for row in rows)
    console.print(f"{len(rows) - worse} good, {worse} to look at", style="dim")


def findings(machine: Mapping[str, Any]) -> list[Finding]:
    """What is to be said of an examined machine, in the order of the table."""
    sections = (_hardware, _software, _frequency, _load, _settings, _clock, _roofs, _noise)
    return [finding for section in sections for finding in section(machine)]


def _hardware(machine: Mapping[str, Any]) -> Iterator[Finding]:
    facts, physical, limits = machine["environment"], machine["physical_cores"], machine["limits"]
    cores = facts["cores"]
    alone = "one core: all else that runs disturbs what is measured; use a machine with two or more"
    yield Finding("processor", f"{facts['cpu']}, {_count(cores, 'core')}", alone if cores < 2 else "")
    if machine["smt"] is None:
        yield Finding("SMT", "not told by this machine")
    elif machine["smt"] and physical and cores > physical:
        remedy = f"threads that share a core disturb each other: set `threads: {physical}` in the suite"
        yield Finding("SMT", f"on: {cores} threads on {_count(physical, 'core')}", remedy)
    else:
        yield Finding("SMT", "on, but not among the cores used here" if machine["smt"] else "off")
    free = machine["readings"]["memory_free_gib"]
    little = "little is free: a machine that swaps measures its disk" if free < 1 else ""
    yield Finding("memory", f"{facts['memory_gib']} GiB, {free} GiB free", little)
    if limits:
        text = ", ".join(f"{value:g} {'cores' if name == 'cores' else 'GiB'}" for name, value in limits.items())
        remedy = "more threads than the container may run are stopped for a while: set fewer `threads` in the suite"
        yield Finding("container", f"limited to {text}", remedy if limits.get("cores", cores) < cores else "")
    else:
        yield Finding("container", "no limits seen")


def _software(machine: Mapping[str, Any]) -> Iterator[Finding]:
    facts, torch = machine["environment"], machine["probe"]["torch"]
    yield Finding("python", f"{facts['python']}, {facts['system']}, kernel {machine['readings']['kernel']}")
    parts = [torch["version"], f"BLAS {torch['blas']}", f"oneDNN {'yes' if torch['onednn'] else 'no'}"]
    parts += [f"OpenMP {'yes' if torch['openmp'] else 'no'}", torch["instructions"]]
    lacks = [name for name, there in (("oneDNN", torch["onednn"]), ("OpenMP", torch["openmp"])) if not there]
    remedy = f"this build lacks {' and '.join(lacks)}: PyTorch's own builds have both" if lacks else ""
    yield Finding("torch", ", ".join(parts), remedy)
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in torch["gpus"])
    seen = machine["readings"].get("gpu")
    if seen and not gpus:
        remedy = "torch cannot use the GPU that is here: install a CUDA build of torch"
        yield Finding("CUDA", f"{seen[0]['name']}, unused", remedy)
    else:
        yield Finding("CUDA", f"{torch['cuda']}: {gpus}" if gpus else "no GPU: cells for cuda are skipped")


def _frequency(machine: Mapping[str, Any]) -> Iterator[Finding]:
    readings, disturbance = machine["readings"], machine["probe"]["disturbance"]
    governor = readings["governor"]
    varies = f"it varies the frequency: {environment.SET_GOVERNOR}"
    steady = governor in (None, "performance")
    yield Finding("governor", governor or "not told by this machine", "" if steady else varies)
    mhz, celsius = readings["mhz"], readings["celsius"]
    text = ", ".join(f"{value:g} {unit}" for value, unit in ((mhz, "MHz"), (celsius, "°C")) if value)
    hot = disturbance["throttled"] or (celsius or 0.0) >= HOT
    remedy = "it is hot and slows down: let it cool, use fewer threads" if hot else ""
    yield Finding("frequency", text or "not told by this machine", remedy)


def _load(machine: Mapping[str, Any]) -> Iterator[Finding]:
    what = machine["probe"]["disturbance"]
    text = f"{what['other_load']:.1f} of {what['cores']} cores busy with others, {what['steal']:.1%} stolen by the host"
    yield Finding("load", text, "\n".join(_loads(what)))


def _loads(what: Mapping[str, Any]) -> list[str]:
    """The warnings of the row `load`; what moved the frequency has a row of its own."""
    return environment.explain({**what, "governor_changed": False, "throttled": None}, 0.0)


def _settings(machine: Mapping[str, Any]) -> Iterator[Finding]:
    facts, shell = machine["environment"], machine["shell"]
    threads = machine["probe"]["torch"]["threads"]
    many = "more threads than cores wait for each other: set fewer `threads` in the suite"
    yield Finding("threads", f"{threads} in a worker", many if threads > facts["cores"] else "")
    if machine["libc"] != "glibc":
        remedy = "the settings that keep freed memory are glibc's: times hold page faults here"
        yield Finding("allocator", machine["libc"] or "unknown C library", remedy)
    elif shell["LD_PRELOAD"]:
        remedy = "a preloaded library may replace the allocator: unset LD_PRELOAD for times that compare"
        yield Finding("allocator", f"LD_PRELOAD={shell['LD_PRELOAD']}", remedy)
    else:
        yield Finding("allocator", "glibc, freed memory kept in workers")
    policy = shell["OMP_WAIT_POLICY"]
    remedy = "workers are passive in any case; export OMP_WAIT_POLICY=PASSIVE for other programs that run beside them"
    passive = (policy or "").upper() == "PASSIVE"
    yield Finding("OpenMP waits", f"OMP_WAIT_POLICY={policy}" if policy else "unset here", "" if passive else remedy)
    if shell["CUDA_LAUNCH_BLOCKING"] not in (None, "", "0"):
        yield Finding("CUDA launches", "CUDA_LAUNCH_BLOCKING is set", "unset it: each launch waits for the device")


def _clock(machine: Mapping[str, Any]) -> Iterator[Finding]:
    clock = machine["probe"]["clock"]
    for device, faults in clock["faults"].items():
        name = "clock" if device == "cpu" else f"clock {device}"
        text = f"steps of {clock['resolution'] * 1e9:.0f} ns, " if device == "cpu" else ""
        remedy = f"{'; '.join(faults)}: do not trust times of {device} from here" if faults else ""
        yield Finding(name, f"{text}self-test {'failed' if faults else 'passed'}", remedy)


def _roofs(machine: Mapping[str, Any]) -> Iterator[Finding]:
    busy = bool(_loads(machine["probe"]["disturbance"]))
    for device, peak in machine["probe"]["roofs"].items():
        f32, bf16 = peak["float32_flops"] / 1e9, peak["bf16_flops"] / 1e9
        text = f"float32 {f32:,.0f} and bf16 {bf16:,.0f} GFLOP/s, copies {peak['bytes'] / 1e9:,.1f} GB/s"
        remedy = "bf16 is no faster than float32 here: use it for comparison only" if bf16 <= f32 else ""
        if device == "cpu" and busy:
            remedy = "lower than they are, because of the load above: run doctor again without it"
        yield Finding("roofs" if device == "cpu" else f"roofs {device}", text, remedy)


def _noise(machine: Mapping[str, Any]) -> Iterator[Finding]:
    what = machine["probe"]["disturbance"]
    for name, noise in machine["probe"]["controls"].items():
        text = f"{noise['median'] * 1e3:.2f} ms, spread {noise['iqr']:.1%}, drift {noise['drift']:.1%}"
        worst = max(noise["iqr"], noise["drift"])
        told = _loads(what)
        causes = [cause for cause in environment.explain(what, worst)[1:] if cause not in told]
        remedy = "\n".join([*causes, *(["see the load above"] if told else [])]) if worst > environment.WIDE else ""
        yield Finding(f"noise {name}", text, remedy)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
