"""One point of a suite's grid, as plain data, and the id that names it.

An id reads aloud: `maml[inner_steps=5,train=5w1s1q*3000]/omniglot[vinyals]/5w1s15q/support/cpu-float32/seed0` is MAML
with five inner steps, trained for 3000 steps of one 5-way 1-shot task with one query per class, on the vinyals split
of Omniglot, tested on 5-way 1-shot tasks with 15 queries per class, normalising by the support set. Parsing an id and
printing it again gives the same text, and unequal cells have unequal ids; so an id is all that a row needs to keep.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from metabench.catalogue import BUDGETS, WITHIN, Catalogue, Plugin, Value
from metabench.errors import ConfigError

Item = tuple[str, Value]

PRESENTATIONS = {f"accuracy_at_{k}": k for k in (1, 2, 5, 10)}
"""Of streams: the accuracy at the k-th presentation of a class, 1 counting the first, whose label nobody can know."""
QUALITY = ("accuracy", "mse", "mse_before", "val_accuracy", *PRESENTATIONS)
KERNELS = {
    "adapt": "the inner loop: from support sets to adapted models (evaluation mode)",
    "predict": "adapted models on their queries, or following streams",
    "inner_step": "one step of the inner loop: the slope of adapt over step counts",
    "embed": "the embedding of images",
    "meta_step": "one training step, optimiser included",
    "episode": "the data of training tasks alone",
}
ASPECTS = ("time", "flops", "bytes", "memory", "nodes", "launches")
KERNEL_MEASURES = tuple(f"{kernel}_{aspect}" for kernel in KERNELS for aspect in ASPECTS)
MEASURES = (*QUALITY, "train_time", *KERNEL_MEASURES)
OF_STREAMS = tuple(f"{kernel}_{aspect}" for kernel in ("predict", "meta_step", "episode") for aspect in ASPECTS)
"""The costs that streams have: there is no support set to adapt to, and no inner step."""
DEVICES = ("cpu", "cuda")
PRECISIONS = ("float32", "bf16")
ROTATIONS = ("none", "classes", "per_class", "train_only", "episode")

_COUNT = "([1-9][0-9]*)"
_EPISODES = rf"(?:(?:{_COUNT}w)?{_COUNT}s{_COUNT}q|{_COUNT}w{_COUNT}t)"
_BARE = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_][A-Za-z0-9_.+-]*")
_STRUCTURE = re.compile(r"[^!-~]|[,\[\]=/]")
_ID = re.compile(rf"([^/]+)/([^/]+)/{_EPISODES}/([^/]+)/(\w+)-(\w+)/seed(0|[1-9][0-9]*)(?:/([^/]+))?")
_WITHIN = "|".join(WITHIN)
_TRAIN = re.compile(rf"(?:{_EPISODES}(?:x{_COUNT})?(?:@({_WITHIN}))?|{_COUNT}i)\*(?:{_COUNT}|([0-9][0-9.e+-]*)s)")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How a meta-learner is trained: what one step sees and for how long.

    Fed with episodes: `tasks` episodes a step, each of `ways` classes (None: regression) with `shots` and `queries`
    examples per class, or with `stream` images of `ways` classes one after another, no `shots` and no `queries`;
    `within` says whether an episode keeps to one alphabet. Fed with images: `batch` images a step, the rest None.
    Exactly one of `steps` and `seconds`.
    """

    ways: int | None = None
    shots: int | None = None
    queries: int | None = None
    stream: int | None = None
    tasks: int | None = None
    within: str = "none"
    batch: int | None = None
    steps: int | None = None
    seconds: float | None = None

    @property
    def text(self) -> str:
        """As in cell ids: '5w1s1qx8*3000', '5w1s1q@alphabet*3000', '5w50tx16*3000', '64i*3000', '10s10q*75s'."""
        budget = f"{self.steps}" if self.steps is not None else f"{self.seconds!r}".removesuffix(".0") + "s"
        if self.batch is not None:
            return f"{self.batch}i*{budget}"
        shape = _shape(self.ways, self.shots, self.queries, self.stream)
        many, within = f"x{self.tasks}" if self.tasks != 1 else "", f"@{self.within}" if self.within != "none" else ""
        return f"{shape}{many}{within}*{budget}"

    @property
    def images_per_step(self) -> int:
        """How many images (or points) one step sees."""
        if self.batch is not None:
            return self.batch
        of_task = self.stream or (self.ways or 1) * ((self.shots or 0) + (self.queries or 0))
        return of_task * (self.tasks or 1)


Allocator = Literal["kept", "default"]
Layout = Literal["channels_last", "contiguous"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a kernel is called when its cost is measured; quality does not depend on it.

    `tasks` share a call. `steps` replaces the algorithm's own inner steps in evaluation (None: its own). `threads`
    None means the suite's. `allocator` "default" leaves the C library's as it comes. `layout` is the memory format of
    images, `compile` whether torch.compile made the kernel.
    """

    tasks: int = 1
    steps: int | None = None
    threads: int | None = None
    allocator: Allocator = "kept"
    layout: Layout = "channels_last"
    compile: bool = False

    @property
    def text(self) -> str:
        """What differs from the default, as in cell ids: 'tasks=8,threads=1'; '' for the default call."""
        values = [(one.name, getattr(self, one.name), one.default) for one in fields(self)]
        return ",".join(_texts((name, value) for name, value, default in values if value != default))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid without the measure; a row's key is (cell.id, measure).

    `params` and `data_params` are the explicit non-default parameters, sorted by name; `resolved` all parameters of
    the algorithm (it follows from `params`, and does not count when cells are compared). `split` is the class
    partition; cells are measured on its test subset (by `val_accuracy` alone on its validation subset). `within` says
    whether a test task keeps to one alphabet; of training tasks, `train` does. `ways` is None for regression; `stream`
    is the length of a stream, whose `shots` and `queries` are 0, and None for episodes. `train` is None where there is
    nothing to train, and for an algorithm that cannot do this problem. A `norm` that differs from the default stands in
    `params` too; it is "none" for an algorithm without that parameter.
    """

    algorithm: str
    params: tuple[Item, ...] = ()
    dataset: str
    split: str
    data_params: tuple[Item, ...] = ()
    rotations: str = "none"
    within: str = "none"
    ways: int | None
    shots: int
    queries: int
    stream: int | None = None
    train: TrainSpec | None
    norm: str = "none"
    device: str = "cpu"
    precision: str = "float32"
    seed: int = 0
    call: Call = Call()
    resolved: tuple[Item, ...] = field(default=(), compare=False, repr=False)

    @property
    def id(self) -> str:
        """The cell's name: reads aloud, and `parse_id` reads it back."""
        items = [item for item in self.params if item[0] != "norm"]
        name = f"{self._trained(items)}/{self._data(self.within)}/{self.task}/{_print(self.norm)}/{self._where}"
        return f"{name}/{self.call.text}" if self.call.text else name

    @property
    def training_id(self) -> str:
        """The training's name, with all parameters: cells that differ only in the test task share it."""
        return f"{self._trained(self.resolved)}/{self._data()}/{self._where}"

    @property
    def bn_mode(self) -> str:
        """'transductive' if predictions depend on the other queries (norm "batch"), else 'inductive'."""
        return "transductive" if self.norm == "batch" else "inductive"

    @property
    def problem(self) -> str:
        """'classification', 'regression' or 'stream'."""
        return "stream" if self.stream else "regression" if self.ways is None else "classification"

    @property
    def task(self) -> str:
        """The test task: '5w1s15q' (ways, shots, queries per class), '10s100q' for regression, '5w50t' for a stream."""
        return _shape(self.ways, self.shots, self.queries, self.stream)

    def measures(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Return those of the `wanted` measures that make sense for this cell, in the same order."""
        unfit = {"mse", "mse_before"} if self.ways is not None else {"accuracy", "val_accuracy"}
        if self.stream and self.ways:  # some class comes k times in every stream, or k is left out
            unfit |= {"accuracy", "val_accuracy", *KERNEL_MEASURES} - {*OF_STREAMS}
            unfit |= {name for name, k in PRESENTATIONS.items() if (k - 1) * self.ways >= self.stream}
        else:
            unfit |= {*PRESENTATIONS}
        if self.train is None:
            unfit.add("train_time")
        if self.call != Call():
            unfit |= {*QUALITY, "train_time"}
        return tuple(one for one in wanted if one not in unfit)

    @property
    def _where(self) -> str:
        return f"{self.device}-{self.precision}/seed{self.seed}"

    def _data(self, within: str = "none") -> str:
        drawn = [("rotations", self.rotations), ("within", within)]
        items = [item for item in drawn if item[1] != "none"]
        return _bracket(self.dataset, [self.split, *_texts([*items, *self.data_params])])

    def _trained(self, items: Iterable[Item]) -> str:
        return _bracket(self.algorithm, [*_texts(items), *([f"train={self.train.text}"] if self.train else [])])


@dataclass(frozen=True, kw_only=True)
class Task:
    """A test task bound to its data: what a cell has besides algorithm, training, device, precision and seed."""

    dataset: Plugin
    split: str
    params: tuple[Item, ...] = ()
    rotations: str = "none"
    within: str = "none"
    ways: int | None
    shots: int
    queries: int
    stream: int | None = None

    @property
    def problem(self) -> str:
        """'classification', 'regression' or 'stream'."""
        return "stream" if self.stream else self.kind

    @property
    def kind(self) -> str:
        """The data set's own problem: 'classification' or 'regression'."""
        return str(self.dataset.meta["problem"])

    @property
    def name(self) -> str:
        """The data set with its split: 'omniglot[vinyals]'."""
        return f"{self.dataset.name}[{self.split}]"

    @property
    def images(self) -> int | None:
        """Images per class; None for regression, where points are drawn without end."""
        return None if self.kind == "regression" else int(self.dataset.meta["images_per_class"])

    def classes(self, subset: str) -> int:
        """Return the classes of a subset, rotated copies counted where they are classes of their own."""
        rotated = self.rotations == "classes" or (self.rotations == "train_only" and subset == "train")
        return int(self.dataset.meta["splits"][self.split][subset]) * (4 if rotated else 1)


def make_cell(
    algorithm: Plugin,
    task: Task,
    *,
    params: Mapping[str, Value],
    train: TrainSpec | None,
    device: str = "cpu",
    precision: str = "float32",
    seed: int = 0,
    call: Call = Call(),
) -> Cell:
    """Return the cell in its one canonical form. Raises ConfigError for parameters that it does not take."""
    resolved = algorithm.resolve(params)
    norm = resolved.get("norm")
    return Cell(
        algorithm=algorithm.name,
        params=explicit(algorithm, params),
        dataset=task.dataset.name,
        split=task.split,
        data_params=task.params,
        rotations=task.rotations,
        within=task.within,
        ways=task.ways,
        shots=task.shots,
        queries=task.queries,
        stream=task.stream,
        train=train,
        norm=norm if isinstance(norm, str) else "none",
        device=device,
        precision=precision,
        seed=seed,
        call=call,
        resolved=tuple(sorted(resolved.items())),
    )


def explicit(plugin: Plugin, params: Mapping[str, Value]) -> tuple[Item, ...]:
    """Return the parameters that differ from their defaults, sorted by name, each in its canonical form."""
    items = []
    for name, value in sorted(params.items()):
        parameter = plugin.parameter(name)
        if parameter is not None and (parameter.required or parameter.canonical(value) != parameter.default):
            items.append((name, parameter.canonical(value)))
    return tuple(items)


def unsupported(cell: Cell, catalogue: Catalogue) -> str | None:
    """Return why the algorithm cannot do the cell's problem (the row is skipped with this reason), or None."""
    return no_match(catalogue.algorithm(cell.algorithm), cell.problem)


def no_match(algorithm: Plugin, problem: str) -> str | None:
    """Return why the algorithm cannot do the problem, or None."""
    problems = algorithm.meta["problems"]
    if problem in problems:
        return None
    return f"{algorithm.name} does {' and '.join(problems)}, not {problem}"


def matches(key: str, filter: str) -> bool:
    """Return whether every space-separated word of `filter` (-k) occurs in `key`, a 'cell.id/measure'."""
    return all(word in key for word in filter.split())


def merge_training(layers: Iterable[Mapping[str, Value]]) -> dict[str, Any]:
    """Lay training settings over one another, weakest first; a budget replaces a weaker budget of any kind."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if any(key in layer for key in BUDGETS):
            merged = {key: value for key, value in merged.items() if key not in BUDGETS}
        merged |= layer
    return merged


def train_spec(given: Mapping[str, Any], *, feeds: str, task: Task) -> TrainSpec:
    """Return the training that merged settings mean for a task, the budget resolved to steps (seconds stay seconds).

    What is unset comes from the test task: its ways, its shots, and its queries as far as a class has images; or the
    length of its stream, unless shots or queries ask for episodes.
    `given` holds one budget, and not `episodes` if it feeds images: `training_problems` says so.
    """
    ways = None if task.ways is None else int(given.get("ways", task.ways))
    stream = _stream_of(given, task)
    if feeds == "images":
        spec = TrainSpec(batch=int(given.get("batch", 64)))
    elif stream:
        spec = TrainSpec(ways=ways, stream=int(stream), tasks=int(given.get("tasks", 1)))
    else:
        shots = int(given.get("shots", task.shots or 1))
        room = task.queries if task.images is None else max(1, task.images - shots)
        queries = int(given.get("queries", min(task.queries or 1, room)))
        tasks, within = int(given.get("tasks", 1)), str(given.get("within", "none"))
        spec = TrainSpec(ways=ways, shots=shots, queries=queries, tasks=tasks, within=within)
    if "seconds" in given:
        return replace(spec, seconds=float(given["seconds"]))
    per_step = {"steps": 1, "episodes": spec.tasks or 1, "images": spec.images_per_step}
    budget = next(key for key in per_step if key in given)
    return replace(spec, steps=-(-int(given[budget]) // per_step[budget]))


def _stream_of(given: Mapping[str, Any], task: Task) -> int | None:
    """The length of the streams that a training is on; None: it is on episodes (or images)."""
    stream: int | None = given.get("stream", None if {"shots", "queries"} & given.keys() else task.stream)
    return stream


def training_problems(
    given: Mapping[str, Any], *, feeds: str, task: Task, follows: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with merged training settings for a task: the key at fault ('' if one lacks), and why.

    `follows` says whether the algorithm can do streams.
    """
    if not any(key in given for key in BUDGETS):
        yield "", "no training budget: give it one, such as train: {steps: 1000}"
    elif feeds == "images" and "episodes" in given:
        yield "episodes", "it is fed with images, not episodes: give it a budget in steps or images"
    if feeds == "images":
        return
    if (within := given.get("within", "none")) not in ("none", *task.dataset.meta["within"]):
        yield "within", f"{task.dataset.name} has no tasks within one {within}"
    elif within != "none" and _stream_of(given, task):
        yield "within", "a stream is drawn from all classes: leave within out"
    if "stream" in given and not (follows and task.images is not None):
        yield "stream", "it cannot be trained on streams here: leave stream out"
        return
    if "stream" in given and {"shots", "queries"} & given.keys():
        yield "stream", "a training is on streams, or on episodes with shots and queries: keep one of them"
    if task.images is None:
        return
    spec = train_spec({**given, "steps": 1}, feeds=feeds, task=task)
    if spec.ways is not None and spec.ways > (classes := task.classes("train")):
        yield "ways", f"{spec.ways} training ways are more than the {classes} training classes of {task.name}"
    if spec.stream is not None and spec.stream > (drawings := (spec.ways or 0) * task.images):
        yield "stream", f"a stream of {spec.stream} in training: {spec.ways} classes have {drawings} images"
    if (examples := (spec.shots or 0) + (spec.queries or 0)) > task.images:
        why = f"{spec.shots} shots + {spec.queries} queries in training are {examples}"
        yield "queries" if "queries" in given else "shots", f"{why}: a class of {task.name} has {task.images} images"


def in_seconds(train_spec: str) -> bool:
    """Whether a training ended by the clock (5w1s15q*75s), which repeats on no other machine: never ranked or gated."""
    return re.search(r"\*[0-9][0-9.e+-]*s$", train_spec) is not None


def parse_id(text: str, catalogue: Catalogue) -> Cell:
    """Return the cell that `text` names. Raises ConfigError if it is no cell id, or not in its canonical form."""
    match = _ID.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"not a cell id: {text!r}: it must read algorithm[...]/dataset[...]/5w1s15q/norm/device/seed0"
        )
    trained, data, *shape, norm, device, precision, seed, call = match.groups()
    try:
        algorithm, params, train = _parse_trained(trained, catalogue)
        if algorithm.parameter("norm"):
            params["norm"] = _parse(norm)
        task = _parse_task(data, shape, catalogue)
        where = {"device": device, "precision": precision}
        cell = make_cell(algorithm, task, params=params, train=train, seed=int(seed), call=_parse_call(call), **where)
    except (ValueError, OverflowError, RecursionError) as error:  # of json, int and float, too
        raise ConfigError(f"not a cell id: {text!r}: {error}") from error
    if cell.id != text or device not in DEVICES or precision not in PRECISIONS:
        raise ConfigError(f"not a cell id: {text!r}: it should read {cell.id!r}")
    return cell


def coordinates_of(text: str) -> dict[str, Any]:
    """What a cell id says by itself, without a catalogue: the columns of results.csv that stand in it.

    `trained` and `data` are its first two segments, `call` its last one ("" for the default call). For ids out of files
    that others wrote: a plug-in need not be here. Raises ConfigError if it is no cell id.
    """
    match = _ID.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        trained, data, *shape, norm, device, precision, seed, call = match.groups()
        ways, shots, queries, stream = _parse_shape(shape)
        (algorithm, items), (dataset, (split, *parts)) = _unbracket(trained), _unbracket(data)
        settings, drawn, number = dict(map(_pair, items)), dict(map(_pair, parts)), int(seed)
    except ValueError:
        raise ConfigError(f"not a cell id: {text[:200]!r}") from None
    return {
        "trained": trained, "data": data, "call": call or "", "algorithm": algorithm, "dataset": dataset,
        "split": split, "rotations": drawn.get("rotations", "none"), "within": drawn.get("within", "none"),
        "ways": ways, "shots": shots, "queries": queries, "stream": stream, "norm": norm,
        "bn_mode": "transductive" if norm == "batch" else "inductive", "device": device, "precision": precision,
        "seed": number, "train_spec": settings.get("train", ""),
    }  # fmt: skip


def _parse_trained(text: str, catalogue: Catalogue) -> tuple[Plugin, dict[str, Value], TrainSpec | None]:
    """Return the algorithm, its parameters and its training from an id's first segment."""
    name, items = _unbracket(text)
    pairs = dict(_pair(item) for item in items)
    train = pairs.pop("train", None)
    params = {key: _parse(value) for key, value in pairs.items()}
    return catalogue.algorithm(name), params, None if train is None else _parse_train(train)


def _parse_task(text: str, shape: Sequence[str | None], catalogue: Catalogue) -> Task:
    """Return the task from an id's second segment and the digits of its third."""
    name, params, rotations, within = _parse_data(text, catalogue)
    dataset, split = catalogue.dataset(name), str(params.pop("split"))
    ways, shots, queries, stream = _parse_shape(shape)
    task = Task(
        dataset=dataset,
        split=split,
        params=explicit(dataset, params),
        rotations=rotations,
        within=within,
        ways=ways,
        shots=shots or 0,
        queries=queries or 0,
        stream=stream,
    )
    known = rotations in ROTATIONS and within in ("none", *dataset.meta["within"])
    if not known or (ways is None) != (task.kind == "regression"):
        raise ValueError(f"no such task of {name}")
    return task


def parse_data(text: str, catalogue: Catalogue) -> tuple[str, dict[str, Value], str, str]:
    """Return what an id's second segment names: the data set, its parameters (split too), rotations and within.

    Raises ConfigError where the catalogue has no such data.
    """
    try:
        return _parse_data(text, catalogue)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"not a data set's part of a cell id: {text!r}: {error}") from error


def _parse_data(text: str, catalogue: Catalogue) -> tuple[str, dict[str, Value], str, str]:
    name, (split, *items) = _unbracket(text)
    dataset = catalogue.dataset(name)
    if split not in dataset.meta["splits"]:
        raise ValueError(f"{name} has no split {split!r}")
    pairs = dict(_pair(item) for item in items)
    rotations, within = pairs.pop("rotations", "none"), pairs.pop("within", "none")
    params = {key: _parse(value) for key, value in pairs.items()}
    if dataset.check({**params, "split": split}) or "split" in params:
        raise ValueError(f"wrong parameters of {name}")
    return name, {**params, "split": split}, rotations, within


def _parse_train(text: str) -> TrainSpec:
    match = _TRAIN.fullmatch(text)
    if match is None:
        raise ValueError(f"no training reads {text!r}")
    *shape, tasks, within, batch, steps, seconds = match.groups()
    if seconds is not None and not 0 < float(seconds) < math.inf:
        raise ValueError(f"no training reads {text!r}")
    ways, shots, queries, stream = _parse_shape(shape)
    spec = TrainSpec(
        ways=ways, shots=shots, queries=queries, stream=stream, tasks=int(tasks or 1), within=within or "none"
    )
    spec = TrainSpec(batch=int(batch)) if batch else spec
    return replace(
        spec, steps=None if steps is None else int(steps), seconds=None if seconds is None else float(seconds)
    )


def _parse_call(text: str | None) -> Call:
    """Return the call of an id's last segment; its canonical form is checked by printing the cell again."""
    given: dict[str, Any] = {key: _parse(value) for key, value in map(_pair, text.split(","))} if text else {}
    if text and not given.keys() <= {one.name for one in fields(Call)}:
        raise ValueError(f"no call reads {text!r}")
    return Call(**given)


def _parse_shape(shape: Sequence[str | None]) -> tuple[int | None, int | None, int | None, int | None]:
    """Return ways, shots, queries and the length of a stream from the groups of `_EPISODES`."""
    ways, shots, queries, ways_of_stream, stream = (None if digits is None else int(digits) for digits in shape)
    return ways if stream is None else ways_of_stream, shots, queries, stream


def _shape(ways: int | None, shots: int | None, queries: int | None, stream: int | None) -> str:
    if stream:
        return f"{ways}w{stream}t"
    return f"{'' if ways is None else f'{ways}w'}{shots}s{queries}q"


def _texts(items: Iterable[Item]) -> list[str]:
    return [f"{name}={_print(value)}" for name, value in items]


def _bracket(name: str, texts: Sequence[str]) -> str:
    return f"{name}[{','.join(texts)}]" if texts else name


def _unbracket(text: str) -> tuple[str, list[str]]:
    name, bracket, inside = text.partition("[")
    if not bracket:
        return name, []
    if not inside.endswith("]"):
        raise ValueError(f"{text!r} lacks a closing bracket")
    return name, inside[:-1].split(",")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not name=value")
    return name, value


def _print(value: Value) -> str:
    """Return the value so that `_parse` gives it back, type included, and no structure of the id occurs in it."""
    if isinstance(value, str) and not _BARE.fullmatch(value):
        return _STRUCTURE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value))
    return value if isinstance(value, str) else json.dumps(value)


def _parse(text: str) -> Value:
    """Return the value that `_print` printed. Raises ValueError."""
    value: Value = text if _BARE.fullmatch(text) else json.loads(text)
    return value
