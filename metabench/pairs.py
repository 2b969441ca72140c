"""Two versions of the code side by side: fresh pairs of live workers, of which one runs while the other waits.

A shared machine's speed drifts by tens of per cent within seconds, so two versions that run one after the other cannot
be told apart; alternating in slices of tens of milliseconds, they can. What a process makes of a kernel (where its
memory lies) is constant in it, so the pair of processes is the unit, and each pair gets a layout of its own. How the
slices of one pair become one number stands in `log_ratio`. Never imports torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import os
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from metabench import environment
from metabench.costs import CONTROLS, Setting
from metabench.errors import ConfigError, WorkerError
from metabench.workers import Worker, last_words

Which = Literal["base", "candidate"]
Blamed = Literal["base", "candidate", "both sides"]
SIDES: tuple[Which, Which] = ("base", "candidate")
FEWEST_SLICES, MOST_SLICES = 7, 60  # of a kernel on each side of a pair
SPARED = 3  # pairs without a number that a row may have, however few pairs there are; then a quarter of them
_NOT_OURS = {"tests", "test", "docs", "doc", "examples", "vendor", "_vendor", "third_party", "external"}  # as folders
PADDING = 4096  # bytes of environment: the stack begins somewhere else in its page


class Name(NamedTuple):
    """A row of the gate: its key, and by what share the candidate is made slower on purpose."""

    cell: str
    measure: str
    share: float = 0.0


@dataclass(frozen=True)
class Side:
    """One of the two versions: what its workers are started with.

    `label` names it to people. `tree` is where its code must come from; None where both sides run the same files.
    """

    which: Which
    label: str
    plugins: tuple[Path, ...] = ()
    tree: Path | None = None
    python: Path = Path(sys.executable)
    folder: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A kernel to be timed on both sides: the question to each side's worker, and what the workers are started with."""

    name: Name
    messages: Mapping[Which, Mapping[str, Any]]
    setting: Setting


@dataclass(frozen=True)
class Fault:
    """Why an item cannot be measured: on which side, with which status ("skipped", "failed")."""

    which: Blamed
    status: str
    reason: str


NO_CUDA = Fault("both sides", "skipped", "no CUDA device on this machine")


class _Died(Exception):
    def __init__(self, name: Name, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.name, self.fault = name, fault


class Again(Exception):
    """Raised by what `Pairs.rehearse` tells the workers to, where one died of it: fresh ones are told again."""


@dataclass
class _Running:
    """An item in the pair at hand: its number on each side, and the parts and calls of a slice."""

    name: Name
    workers: Mapping[Which, Worker]
    numbers: Mapping[Which, int]
    parts: Sequence[int]
    slices: dict[int, list[tuple[float, float]]] = field(default_factory=dict)


class Pairs:
    """Makes pairs of processes for a list of items, which shrinks by what cannot be timed (`faults` says why)."""

    def __init__(self, base: Side, candidate: Side, items: Sequence[Item], folder: Path, *, seconds: float, seed: int):
        self.sides: dict[Which, Side] = {"base": base, "candidate": candidate}
        self.items = {item.name: item for item in items}
        self.folder, self.seconds, self.seed = folder, seconds, seed
        self.faults: dict[Name, Fault] = {}
        self.calls: dict[Name, Mapping[str, int]] = {}  # of a slice: found on the base, once, and used everywhere
        self.rounds: dict[Name, int] = {}
        self.hellos: dict[Which, Mapping[str, Any]] = {}
        self.disturbances: list[dict[str, Any]] = []
        self.lost: dict[Name, int] = {}  # pairs that gave an item no number, though it ran
        self.many = len(self.settings(self.items)) > 1  # so controls are named by the setting of their workers
        self.taken = 0  # pairs, each with a layout of its own
        self.numbers = itertools.count()

    def rehearse(self, also: Callable[[Sequence[Mapping[Which, Worker]]], None]) -> None:
        """Make every item ready once: finds what cannot be timed, how many calls make a slice, how many slices.

        `also` is then told the workers, a pair for each setting, to ask them what it likes; it is told fresh ones after
        an `Again`.

        Raises:
            ConfigError: the base does not start, or speaks another protocol.
            WorkerError: the candidate does not start, or a control cannot be run.
        """
        while True:
            try:
                with self._hired(random.Random(self.seed), self.items) as crew:
                    self._rehearse(crew)
                    also(list(crew.values()))
                return
            except _Died as death:
                self._drop(death)
            except Again:
                continue

    def take(self, names: Sequence[Name]) -> dict[Name, float]:
        """Time the named items, and the controls, in a fresh pair of processes; their ln(candidate / base).

        An item that cannot be timed is not in the answer, and in `faults` from then on. One that this pair alone gave
        no number (a slope lost in noise) is only not in the answer.

        Raises:
            WorkerError: a control cannot be run.
        """
        number, self.taken = self.taken, self.taken + 1
        while True:
            wanted = [name for name in names if name in self.items]
            chance = random.Random(f"{self.seed}/{number}")
            try:
                with self._hired(chance, wanted) as crew:
                    return self._time(crew, wanted, chance)
            except _Died as death:
                self._drop(death)

    def settings(self, names: Sequence[Name] | Mapping[Name, Any]) -> list[Setting]:
        """What workers the named items need."""
        return list(dict.fromkeys(self.items[name].setting for name in names))

    def _drop(self, death: _Died) -> None:
        if death.name not in self.items:
            raise WorkerError(f"the control {death.name.measure} could not be timed: {death.fault.reason}")
        self.faults[death.name] = death.fault
        del self.items[death.name]

    @contextmanager
    def _hired(
        self, chance: random.Random, names: Sequence[Name] | Mapping[Name, Any]
    ) -> Iterator[dict[Setting, dict[Which, Worker]]]:
        """Fresh workers of both sides for every setting, not pinned yet, and gone at the end."""
        with ExitStack() as stack:
            crew: dict[Setting, dict[Which, Worker]] = {}
            hash_seed = str(chance.randrange(2**32))  # the same on both sides: the order of sets is part of the work
            for setting in self.settings(names) or [Setting(1, "kept")]:
                crew[setting] = {}
                for which in chance.sample(SIDES, 2):
                    worker = self._start(self.sides[which], setting, hash_seed, chance.randrange(PADDING))
                    stack.callback(worker.close)
                    crew[setting][which] = worker
            for pair in crew.values():
                for which, worker in pair.items():
                    self._greet(self.sides[which], worker)
            yield crew

    def _start(self, side: Side, setting: Setting, hash_seed: str, padding: int) -> Worker:
        layout = {"PYTHONHASHSEED": hash_seed, "METABENCH_PADDING": "x" * padding}
        try:
            return Worker(
                setting.threads,
                side.plugins,
                self._log(side.which),
                allocator=setting.allocator,
                python=side.python,
                folder=side.folder,
                more={**side.variables, **layout},
            )
        except OSError as error:
            raise ConfigError(f"{side.label}: cannot be started: {error}") from None

    def _greet(self, side: Side, worker: Worker) -> None:
        """Hear its hello; one that does not come, or of another protocol, is the base's fault or the candidate's."""
        try:
            hello = next(worker.messages())
            said = hello["v"] if hello.get("kind") == "hello" else None
        except (WorkerError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = last_words(self._log(side.which)) or str(error)
            text = f"{side.label} cannot be run: {why}"
            raise (ConfigError(f"{text}; choose another base") if side.which == "base" else WorkerError(text)) from None
        if said != environment.PROTOCOL:
            raise ConfigError(
                f"{side.label} speaks protocol {said} with its worker, this metabench {environment.PROTOCOL}: "
                "the two cannot be run side by side; choose a newer base"
            )
        worker.environment = side.label
        self.hellos[side.which] = hello

    def _log(self, which: Which) -> Path:
        return self.folder / f"{which}.log"

    def _rehearse(self, crew: Mapping[Setting, Mapping[Which, Worker]]) -> None:
        """Prepare all items, base first: what it finds, the candidate gets."""
        _pin(crew)
        for name, item in list(self.items.items()):
            if item.messages["base"]["device"] == "cuda" and not all(self.hellos[which]["cuda"] for which in SIDES):
                self.faults[name] = NO_CUDA
                del self.items[name]
                continue
            running = self._prepare(item, crew[item.setting], SIDES)
            if running is not None:
                taken = [self._slice(running, part, "base") for part in running.parts]
                calls = [self.calls[name][str(part)] for part in running.parts]
                both = 2 * sum(seconds * (n + 1) for seconds, n in zip(taken, calls, strict=True))
                self.rounds[name] = min(MOST_SLICES, max(FEWEST_SLICES, round(self.seconds / both)))
        for setting, workers in crew.items():
            for control in CONTROLS:
                self._prepare_control(control, setting, workers)

    def _prepare(self, item: Item, workers: Mapping[Which, Worker], order: Sequence[Which]) -> _Running | None:
        """Make an item ready on both sides; None, and a fault, where it cannot be."""
        numbers: dict[Which, int] = {}
        faults: list[Fault] = []
        for which, heard in self._readied(item, workers, order):
            if heard["status"] != "ok":
                faults.append(Fault(which, heard["status"], heard["reason"]))
                continue
            self.calls.setdefault(item.name, heard["calls"])
            numbers[which] = heard["id"]
        if faults:
            self.faults[item.name] = one_fault(faults)
            del self.items[item.name]
            return None
        return _Running(item.name, workers, numbers, [int(part) for part in self.calls[item.name]])

    def _readied(
        self, item: Item, workers: Mapping[Which, Worker], order: Sequence[Which]
    ) -> Iterator[tuple[Which, dict[str, Any]]]:
        """What each side answers when it makes an item ready.

        Both do it at once where nothing is timed at that: the calls of a slice are known, and no copy is made slower.
        Else one waits for the other, so that the second gets the calls that the first found.
        """
        asked = ((which, self._send(item.name, which, workers, self._ready_message(item, which))) for which in order)
        at_once = item.name in self.calls and not item.name.share
        for which, number in list(asked) if at_once else asked:
            yield which, self._hear(item.name, which, workers, number)

    def _ready_message(self, item: Item, which: Which) -> dict[str, Any]:
        message = {**item.messages[which], "kind": "prepare", "calls": self.calls.get(item.name)}
        if item.name.share and which == "candidate":
            message["share"] = item.name.share
        return message

    def _prepare_control(self, control: str, setting: Setting, workers: Mapping[Which, Worker]) -> _Running:
        label = f"{control} ({setting.threads} threads, {setting.allocator})" if self.many else control
        name, numbers = Name("", label), {}
        for which in SIDES:
            message = {"kind": "control", "name": control, "device": "cpu", "calls": self.calls.get(name)}
            heard = self._ask(name, which, workers, message)
            if heard["status"] != "ok":
                raise _Died(name, Fault(which, heard["status"], heard["reason"]))
            self.calls.setdefault(name, heard["calls"])
            numbers[which] = heard["id"]
        running = _Running(name, workers, numbers, [int(part) for part in self.calls[name]])
        if name not in self.rounds:
            seconds = self._slice(running, 0, "base") * (self.calls[name]["0"] + 1)
            self.rounds[name] = min(MOST_SLICES, max(FEWEST_SLICES, round(self.seconds / 2 / (2 * seconds))))
        return running

    def _time(
        self, crew: Mapping[Setting, Mapping[Which, Worker]], names: Sequence[Name], chance: random.Random
    ) -> dict[Name, float]:
        """Slices of all items, interleaved; then each item's number."""
        order = [*names]
        chance.shuffle(order)  # where a kernel's memory lies depends on what was made ready before it
        running = [
            one
            for name in order
            if (one := self._prepare(self.items[name], crew[self.items[name].setting], chance.sample(SIDES, 2)))
        ]
        for setting, workers in crew.items():
            running += [self._prepare_control(control, setting, workers) for control in CONTROLS]
        _pin(crew)
        pids = [worker.pid for workers in crew.values() for worker in workers.values()]
        before = environment.read(pids)
        for one, part in self._rounds(running, chance):
            seconds = {which: self._slice(one, part, which) for which in chance.sample(SIDES, 2)}
            one.slices.setdefault(part, []).append((seconds["base"], seconds["candidate"]))
        self.disturbances.append(environment.disturbance(before, environment.read(pids)))
        found = {}
        for one in running:
            ratio = log_ratio(one.slices)
            if ratio is None:
                self._lose(one.name)
            else:
                found[one.name] = ratio
        return found

    def _lose(self, name: Name) -> None:
        """One pair without a number is chance; in a quarter of the pairs it is the kernel."""
        self.lost[name] = self.lost.get(name, 0) + 1
        if self.lost[name] > max(SPARED, self.taken / 4):
            reason = "the slope over inner steps is not above 0: a step costs less than the noise of this machine"
            self.faults[name] = Fault("both sides", "failed", reason)
            self.items.pop(name, None)

    def _rounds(self, running: Sequence[_Running], chance: random.Random) -> Iterator[tuple[_Running, int]]:
        """Every part of every item as often as it is due, each spread over the whole time, in random order."""
        due = []
        for one in running:
            rounds = self.rounds[one.name]
            due += [((n + chance.random()) / rounds, one, part) for n in range(rounds) for part in one.parts]
        for _, one, part in sorted(due, key=lambda entry: entry[0]):
            yield one, part

    def _slice(self, one: _Running, part: int, which: Which) -> float:
        """Seconds of a call, in one slice: the device's own where it has a clock of events."""
        message = {"kind": "slice", "of": one.numbers[which], "part": part}
        heard = self._ask(one.name, which, one.workers, message)
        if heard["status"] != "ok":
            raise _Died(one.name, Fault(which, heard["status"], heard["reason"]))
        device = heard["device_seconds"]
        return float(heard["seconds"] if device is None else device)

    def _ask(
        self, name: Name, which: Which, workers: Mapping[Which, Worker], message: Mapping[str, Any]
    ) -> dict[str, Any]:
        return self._hear(name, which, workers, self._send(name, which, workers, message))

    def _send(self, name: Name, which: Which, workers: Mapping[Which, Worker], message: Mapping[str, Any]) -> int:
        number = next(self.numbers)
        with _told_of(name, which):
            workers[which].send({**message, "id": number})
        return number

    def _hear(self, name: Name, which: Which, workers: Mapping[Which, Worker], number: int) -> dict[str, Any]:
        with _told_of(name, which):
            return workers[which].answer(number)


def _pin(crew: Mapping[Setting, Mapping[Which, Worker]]) -> None:
    """Keep all workers on the same cores: what runs on the one then runs on the other."""
    for workers in crew.values():
        for worker in workers.values():
            worker.pin()


@contextmanager
def _told_of(name: Name, which: Which) -> Iterator[None]:
    """A worker that dies meanwhile died of this item."""
    try:
        yield
    except WorkerError as error:
        raise _Died(name, Fault(which, "failed", str(error))) from error


def one_fault(faults: Sequence[Fault]) -> Fault:
    """What one side or both said, as one; where they differ, the base's reason."""
    return replace(faults[0], which="both sides") if len(faults) == len(SIDES) else faults[0]


def log_ratio(slices: Mapping[int, Sequence[tuple[float, float]]]) -> float | None:
    """One pair's ln(candidate / base) of an item, from paired slices (base, candidate) in seconds by part.

    For a kernel of one part the median of the slices' log ratios. Where the cost is the slope over numbers of inner
    steps, each part's base median times its median ratio stands for the candidate, so that both slopes are of the same
    moments; None where a slope is not above 0.
    """
    ratios = {part: statistics.median(math.log(c / b) for b, c in pairs) for part, pairs in slices.items()}
    if len(ratios) == 1:
        return next(iter(ratios.values()))
    base = {part: statistics.median(b for b, _ in pairs) for part, pairs in slices.items()}
    candidate = {part: base[part] * math.exp(ratio) for part, ratio in ratios.items()}
    slopes = [statistics.linear_regression([*side], [*side.values()]).slope for side in (base, candidate)]
    return math.log(slopes[1] / slopes[0]) if min(slopes) > 0 else None


def module_path(root: Path, tree: Path) -> dict[str, str]:
    """The variables that make a worker import the project from `tree` wherever this process would from `root`.

    What lies on our own module path inside `root` (a folder on PYTHONPATH, an editable installation) is taken inside
    `tree`, the rest as it is.
    """
    ours = [Path(entry or ".").resolve() for entry in sys.path]
    inside = [path for path in ours if path.is_relative_to(root) and not installed(path)]
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    outside = [path for path in given if not path.is_relative_to(root)]
    entries = dict.fromkeys([*(tree / path.relative_to(root) for path in inside), *outside])
    return {"PYTHONPATH": os.pathsep.join(map(str, entries))}


def installed(path: Path) -> bool:
    """Whether a file or folder belongs to an interpreter or a virtual environment, which may lie inside a project."""
    if {"site-packages", "dist-packages"} & {*path.parts}:
        return True
    return any(path.is_relative_to(Path(prefix).resolve()) for prefix in {sys.prefix, sys.base_prefix})


def top_names(root: Path) -> set[str]:
    """The top-level names that this process would import from `root`."""
    folders = {Path(entry or ".").resolve() for entry in sys.path}
    found: set[str] = set()
    for folder in (one for one in folders if one.is_relative_to(root) and not installed(one) and one.is_dir()):
        found |= {file.stem for file in folder.glob("*.py")}
        found |= {init.parent.name for init in folder.glob("*/__init__.py")}
    return found - sys.stdlib_module_names


def tracked_names(files: Iterable[str]) -> set[str]:
    """The top-level names that a repository's files (relative to its root) give to what it would install.

    Modules at the root and in src/, and packages wherever they begin. So an installed copy is known for one even where
    nothing of the repository is on the module path. Tests, documents and foreign code are named like others' too. What
    metabench itself needs (a folder `backends/torch`, say) is never taken for the project's.
    """
    found: set[str] = set()
    paths = [PurePosixPath(file) for file in files if file.endswith(".py")]
    packages = {path.parent for path in paths if path.name == "__init__.py"}
    for path in paths:
        folders = path.parts[:-1]
        if _NOT_OURS & {*folders}:
            continue
        if folders in ((), ("src",)):
            found.add(path.stem)
        elif folders[0] == "src":
            found.add(folders[1])  # a namespace package too, which has no __init__.py
        elif path.parent in packages:
            found.add(next(folder.name for folder in reversed([path.parent, *path.parents]) if folder in packages))
    return found - sys.stdlib_module_names - _needed()


@functools.cache
def _needed() -> set[str]:
    """The top-level names of the packages that metabench requires, its extras apart."""
    try:
        lines = importlib.metadata.requires("metabench") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source, not installed
        return set()
    always = [line for line in lines if "extra ==" not in line]
    required = {_canonical(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]) for line in always}
    owners = importlib.metadata.packages_distributions()
    return {name for name, packages in owners.items() if required & {*map(_canonical, packages)}}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Module(NamedTuple):
    """A module that a worker has loaded: its full name, its file, and a hash of what stands in it."""

    name: str
    file: Path
    digest: str


def modules_of(worker: Worker, names: set[str]) -> list[Module]:
    """The modules that a worker has loaded, installed ones only where their top-level name is given."""
    heard = worker.ask({"kind": "modules", "id": -1, "names": sorted(names)})
    if heard["status"] != "ok":
        raise WorkerError(f"{worker.environment} cannot say which modules it runs: {heard['reason']}")
    return [Module(name, Path(file), digest) for name, file, digest in heard["modules"]]
