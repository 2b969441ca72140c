"""What a worker does for rows of cost: makes kernels ready, times slices of them, counts their work.

The parent conducts (costs.py): it says which slice comes next, so that kernels of several workers can be interleaved.
Messages and answers are plain data; see `plan.cost_message`.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metabench import counts, roofs, timing
from metabench.errors import Unsupported
from metabench.kernels import Kernel, Subject, make_kernel
from metabench.measure import Workshop, backbone_name, bind, build, reason_of

Message = Mapping[str, Any]
COUNTS: dict[str, Callable[[Callable[[], object]], int]] = {
    "flops": counts.flops,
    "bytes": counts.bytes_moved,
    "launches": counts.launches,
}
UNITS = {"flops": "flop", "bytes": "B", "memory": "B", "nodes": "nodes", "launches": "launches"}


@dataclass(frozen=True)
class _Ready:
    """A kernel that waits for its slices: per part its thunk and the calls of a slice."""

    kernel: Kernel
    clock: timing.Clock
    calls: Mapping[int, int]


class Bench:
    """The kernels of one worker process."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.ready: dict[int, _Ready] = {}

    def answer(self, message: Message) -> dict[str, Any]:
        """Do what a message asks; what fails is an answer with its status and reason."""
        doing: dict[str, Callable[[Message], dict[str, Any]]] = {
            "prepare": self._prepare,
            "control": self._control,
            "slice": self._slice,
            "count": self._count,
            "modules": lambda asked: {"modules": sorted(imported(asked["names"]))},
            "roofs": lambda asked: {"roofs": roofs.measure(asked["device"])},
        }
        try:
            return {"status": "ok", **doing[message["kind"]](message)}
        except Unsupported as error:
            return {"status": "skipped", "reason": str(error)}
        except Exception as error:  # a failing kernel is a row with a reason; the others go on
            self.shop.emit("log", text=traceback.format_exc())
            return {"status": "failed", "reason": reason_of(error)}

    def _prepare(self, message: Message) -> dict[str, Any]:
        """Make a row's kernel ready; `calls` of an earlier process are used again.

        With `share` it is made slower by that share of the time that it takes in this process.
        """
        subject = self._subject(message, message["params"])
        kernel = make_kernel(message["kernel"], subject)
        facts = self._facts(subject, kernel)
        if share := message.get("share"):
            clock = timing.clock_of(message["device"])
            units = self._units(kernel, share, clock)
            slower = {part: timing.burdened(thunk, units[part], clock) for part, thunk in kernel.parts.items()}
            kernel = replace(kernel, parts=slower)
        return self._keep(message, kernel, _by_part(message.get("calls")), facts)

    def _units(self, kernel: Kernel, share: float, clock: timing.Clock) -> dict[int, int]:
        """The idle work that makes each part of a kernel slower by a share."""
        kernel.restore()
        return {part: round(share * timing.units_of(thunk, clock)) for part, thunk in kernel.parts.items()}

    def _control(self, message: Message) -> dict[str, Any]:
        """Make ready fixed work that none of our code takes part in."""
        kernel = Kernel({0: roofs.controls()[message["name"]]}, images=0)
        return self._keep(message, kernel, _by_part(message.get("calls")), {})

    def _keep(self, message: Message, kernel: Kernel, known: Mapping[int, int], facts: Message) -> dict[str, Any]:
        clock = timing.clock_of(message["device"])
        calls = {}
        for part, thunk in kernel.parts.items():
            kernel.restore()
            if part in known:
                timing.warm_up(thunk)
            calls[part] = known.get(part) or timing.calibrate(thunk, clock)
        self.ready[message["id"]] = _Ready(kernel, clock, calls)
        return {"calls": calls, "facts": dict(facts)}

    def _slice(self, message: Message) -> dict[str, Any]:
        """Time one slice of a kernel that is ready."""
        ready, part = self.ready[message["of"]], message["part"]
        ready.kernel.restore()
        taken = timing.take(ready.kernel.parts[part], ready.calls[part], ready.clock)
        return {**taken._asdict(), "launch_bound": taken.launch_bound}

    def _count(self, message: Message) -> dict[str, Any]:
        """Count a kernel's work, tasks one after the other: vmap reports other figures for the same work."""
        params = dict(message["params"])
        if "strategy" in params and message["aspect"] != "memory":
            params["strategy"] = "serial"
        subject = self._subject(message, params)
        kernel = make_kernel(message["kernel"], subject)
        values = {part: self._counted(message, kernel, thunk) for part, thunk in kernel.parts.items()}
        first, last = min(values), max(values)
        value = values[first] if first == last else (values[last] - values[first]) / (last - first)
        return {"value": value, "unit": UNITS[message["aspect"]], "facts": self._facts(subject, kernel)}

    def _counted(self, message: Message, kernel: Kernel, thunk: Callable[[], object]) -> int:
        aspect = message["aspect"]
        if aspect == "nodes":
            if kernel.loss is None:
                raise Unsupported("only meta_step has a graph: the others run without gradients")
            return counts.autograd_nodes(kernel.loss())
        if aspect == "memory":
            thunk()  # what is set up once is no part of a call
            return counts.peak_memory(thunk, message["device"])
        kernel.restore()
        return COUNTS[aspect](thunk)

    def _subject(self, message: Message, params: Mapping[str, Any]) -> Subject:
        dataset, call, stream = self.shop.dataset(message), message["call"], message["stream"]
        train, test = (bind(dataset, subset, message, message, seed=message["seed"]) for subset in ("train", "test"))
        algorithm = build({**message, "params": params, "layout": call["layout"]}, self.shop, train.problem)
        reason = algorithm.unsupported(test.problem) or (algorithm.unfollowed() if stream else None)
        if reason is not None:
            raise Unsupported(reason)
        how = {name: call[name] for name in ("tasks", "steps", "compile")}
        return Subject(algorithm, train, test, stream=stream, **how)

    def _facts(self, subject: Subject, kernel: Kernel) -> dict[str, Any]:
        return {
            "backbone": backbone_name(subject.algorithm),
            "threads": torch.get_num_threads(),
            "images": kernel.images,
            **subject.algorithm.facts(subject.shown()),
        }


def _by_part(numbers: Mapping[str, int] | None) -> dict[int, int]:
    """Keys as they were before JSON made them text."""
    return {int(part): number for part, number in (numbers or {}).items()}


def imported(names: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """(name, file, SHA-256) of every loaded module that is not installed, or under a top-level name in `names`.

    So a parent can tell which version of a project's code this process really runs.
    """
    paths = sysconfig.get_paths()
    installed = [Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    for key, module in list(sys.modules.items()):
        name = getattr(getattr(module, "__spec__", None), "name", key)  # that of __main__ is its own
        file = getattr(module, "__file__", None)
        if not file or not Path(file).is_file():
            continue
        path = Path(file).resolve()
        foreign = any(map(path.is_relative_to, installed)) or {"site-packages", "dist-packages"} & {*path.parts}
        if name.partition(".")[0] in names or not foreign:
            yield name, str(path), hashlib.sha256(path.read_bytes()).hexdigest()
