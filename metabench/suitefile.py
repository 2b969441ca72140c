"""The format of suite files: strict models of what may stand in them."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from metabench.catalogue import BUDGETS, NAME
from metabench.cells import MEASURES, Allocator, Layout
from metabench.document import MAX_INT, Document, Where
from metabench.errors import ConfigError, did_you_mean
from metabench.thresholds import PERCENT, POINTS, kind_of, parse

T = TypeVar("T")


def _listed(value: object) -> object:
    """One value is a list of one; None stays None."""
    return value if isinstance(value, list) or value is None else [value]


def _distinct(values: list[T]) -> list[T]:
    """Raise ValueError if a value is listed twice."""
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


def _counts(minimum: int) -> dict[str, Any]:
    """The JSON Schema of one whole number or a list of them."""
    one = {"type": "integer", "minimum": minimum, "maximum": MAX_INT}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Ways = Annotated[int, Field(ge=2, le=MAX_INT)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # many more, and the machine has none left for anybody
Seed = Annotated[int, Field(ge=0, le=MAX_INT)]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bf16"]


def _measure(name: str) -> str:
    """Raise ValueError for what is no measure."""
    if name not in MEASURES:
        raise ValueError(f"{name!r} is no measure{did_you_mean(name, MEASURES)}")
    return name


Measure = Annotated[str, AfterValidator(_measure), Field(json_schema_extra={"enum": [*MEASURES]})]
Measures = Annotated[list[Measure], AfterValidator(_distinct)]


class _Entry(BaseModel):
    """What all parts of a suite have in common: unknown keys and wrong types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Within = Literal["none", "alphabet", "drawer"]


class TrainEntry(_Entry):
    """Training: what a step sees and one budget. What is unset comes from the algorithm's file, then from the task."""

    ways: Ways | None = Field(default=None, description="Classes of a training task; default: those of the test task.")
    shots: Count | None = Field(
        default=None, description="Support examples per class; default: those of the test task."
    )
    queries: Count | None = Field(
        default=None, description="Query examples per class; default: those of the test task."
    )
    stream: Count | None = Field(
        default=None,
        description="Train on streams of so many images, not on shots and queries; default: as the test task.",
    )
    tasks: Count | None = Field(default=None, description="Tasks per step (episode-fed algorithms); default 1.")
    within: Within | None = Field(
        default=None, description="Training classes of one alphabet a task, as for test tasks; default: of any."
    )
    batch: Count | None = Field(default=None, description="Images per step (image-fed algorithms); default 64.")
    steps: Count | None = Field(default=None, description="Budget: training steps.")
    episodes: Count | None = Field(default=None, description="Budget: training tasks; resolved to steps.")
    images: Count | None = Field(default=None, description="Budget: images seen; resolved to steps.")
    seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Budget: wall time, for a quick look: such rows are never ranked or gated."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainEntry:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{len(given)} budgets: keep one of {', '.join(given)}")
        return self


def _or_stream(schema: dict[str, Any]) -> None:
    """Say in the JSON Schema that a stream stands for shots and queries."""
    schema["required"] = ["dataset"]
    schema["anyOf"] = [{"required": ["shots", "queries"]}, {"required": ["stream"]}]


class TaskEntry(_Entry):
    """Test tasks: a data set, and how many ways, shots and queries, or how long a stream. Lists are swept."""

    model_config = ConfigDict(json_schema_extra=_or_stream)

    dataset: str = Field(description="A data set, or one of its splits: 'omniglot[vinyals]'.")
    ways: Annotated[list[Ways] | None, BeforeValidator(_listed)] = Field(
        default=None, min_length=1, description="Classes of a task; none for regression.", json_schema_extra=_counts(2)
    )
    shots: Annotated[list[Count], BeforeValidator(_listed)] = Field(
        min_length=1, description="Support examples per class.", json_schema_extra=_counts(1)
    )
    queries: Count = Field(description="Query examples per class.")
    stream: Count | None = Field(
        default=None, description="Instead of shots and queries: so many images one after another, each to be named."
    )
    rotations: Literal["none", "classes", "per_class", "train_only", "episode"] = Field(
        default="none",
        description="Rotations by 90 degrees: new classes everywhere, or in training only, or augmentation.",
    )
    within: Within = Field(
        default="none",
        description="Test classes of one alphabet; 'drawer': besides, support by the same hands, queries by others.",
    )
    params: dict[str, Any] = Field(default={}, description="Parameters of the data set; a list of values is swept.")

    @model_validator(mode="before")
    @classmethod
    def _of_stream(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("stream") is None:
            return value
        if {"shots", "queries"} & value.keys():
            raise ValueError("a stream has no shots and no queries: leave them out, or the stream")
        return {**value, "shots": [1], "queries": 1}  # without a meaning


def _or_name(schema: dict[str, Any]) -> None:
    """Say in the JSON Schema that an algorithm may be just its name."""
    entry = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "description": "An algorithm's name."}, entry]


def _or_list(schema: dict[str, Any]) -> None:
    """Say in the JSON Schema that one of the items may stand for the list."""
    items = schema.pop("items")
    schema["anyOf"] = [items, {"type": schema.pop("type"), "items": items}]


class AlgorithmEntry(_Entry):
    """An algorithm: its name alone, or with parameters (lists are swept) and training."""

    model_config = ConfigDict(json_schema_extra=_or_name)

    name: str = Field(description="An algorithm's name.")
    params: dict[str, Any] = Field(default={}, description="Parameters of the algorithm; a list of values is swept.")
    train: TrainEntry = Field(default=TrainEntry(), description="Its training, over the suite's.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class CallEntry(_Entry):
    """How kernels are called when their cost is measured. Lists are swept."""

    tasks: Annotated[list[Count], BeforeValidator(_listed)] = Field(
        default=[1], min_length=1, description="Tasks that share a call.", json_schema_extra=_counts(1)
    )
    steps: Annotated[list[Count] | None, BeforeValidator(_listed)] = Field(
        default=None,
        min_length=1,
        description="Inner steps in evaluation; default: the algorithm's own.",
        json_schema_extra=_counts(1),
    )
    threads: Annotated[list[Threads] | None, BeforeValidator(_listed)] = Field(
        default=None, min_length=1, description="Threads; default: the suite's.", json_schema_extra=_counts(1)
    )
    allocator: Annotated[list[Allocator], BeforeValidator(_listed)] = Field(
        default=["kept"], min_length=1, description="The C library's allocator: arenas kept, or as it comes."
    )
    layout: Annotated[list[Layout], BeforeValidator(_listed)] = Field(
        default=["channels_last"], min_length=1, description="The memory format of images."
    )
    compile: Annotated[list[bool], BeforeValidator(_listed)] = Field(
        default=[False], min_length=1, description="Whether torch.compile makes the kernel (embed only)."
    )


class GridEntry(_Entry):
    """The product of its axes."""

    tasks: list[TaskEntry] = Field(min_length=1, description="The test tasks.")
    algorithms: list[AlgorithmEntry] = Field(min_length=1, description="The algorithms.")
    devices: Annotated[list[Device], AfterValidator(_distinct)] = Field(
        default=["cpu"], min_length=1, description="The devices to run on."
    )
    precisions: Annotated[list[Precision], AfterValidator(_distinct)] = Field(
        default=["float32"], min_length=1, description="Number formats of training and adaptation."
    )
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] = Field(
        default=[0], min_length=1, description="Training seeds; the test episodes do not depend on them."
    )
    calls: list[CallEntry] = Field(
        default=[CallEntry()], min_length=1, description="How kernels are called; quality is measured once."
    )
    measures: Measures | None = Field(
        default=None, min_length=1, description="What is measured in this grid; default: the suite's measures."
    )


class CellEntry(_Entry):
    """One point besides the grid."""

    task: TaskEntry = Field(description="The test task.")
    algorithm: AlgorithmEntry = Field(description="The algorithm.")
    device: Device = Field(default="cpu", description="The device to run on.")
    precision: Precision = Field(default="float32", description="The number format of training and adaptation.")
    seed: Seed = Field(default=0, description="The training seed.")


class EvaluationEntry(_Entry):
    """How quality is measured."""

    episodes: Count = Field(default=1000, description="Test episodes.")
    seed: Seed = Field(default=0, description="The seed of the test episodes: the same ones for every algorithm.")
    selection: Literal["last", "val"] = Field(
        default="last", description="Which weights are tested: the last ones, or the best on validation episodes."
    )


class TimingEntry(_Entry):
    """How much is sampled when kernels are timed."""

    processes: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="Fresh processes, over which the interval is taken; one gives no interval."
    )
    slices: Annotated[int, Field(ge=3, le=10_000)] = Field(
        default=12, description="Samples of each kernel in each process, in random order among all kernels."
    )


def _with_unit(value: object, info: ValidationInfo) -> object:
    """Raise ValueError for a margin without the unit of its kind, the field's name."""
    return _margin(value, str(info.field_name))


def _margin(value: object, kind: str) -> object:
    try:
        parse(value, kind)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


def _of_measures(value: object) -> object:
    """Raise ValueError for a margin of a measure without its unit, or of no measure."""
    for name, text in value.items() if isinstance(value, dict) else ():
        _margin(text, kind_of(_measure(name)))
    return value


Percent = Annotated[
    str | None, BeforeValidator(_with_unit), Field(json_schema_extra={"type": "string", "pattern": f"^{PERCENT}$"})
]
Points = Annotated[
    str | None, BeforeValidator(_with_unit), Field(json_schema_extra={"type": "string", "pattern": f"^{POINTS}$"})
]


class MarginEntry(_Entry):
    """What change is no matter, per kind of measure; what is unset comes from the suite, then from the defaults."""

    time: Percent = Field(default=None, description="Margin of times; default 2%.")
    unchanged: Percent = Field(
        default=None, description="A time that surely changed by less counts as unchanged; default 5%."
    )
    accuracy: Points = Field(default=None, description="Equivalence margin of accuracies; default '0.5 points'.")
    mse: Percent = Field(default=None, description="Equivalence margin of errors; default 5%.")
    memory: Percent = Field(default=None, description="Margin of peaks of memory; default 5%.")
    counts: Percent = Field(
        default=None, description="Margin of operations, bytes, nodes and launches; default 0%: they must be equal."
    )
    measures: Annotated[dict[str, str], BeforeValidator(_of_measures)] = Field(
        default={}, description="Margins of single measures: {adapt_time: 3%}."
    )


class OverrideEntry(MarginEntry):
    """Margins of some cells, over the suite's; a later entry lies over an earlier one."""

    algorithm: str | None = Field(default=None, description="Only cells of this algorithm.")
    match: str = Field(default="", description="Only cells whose id holds all of these words.")


class ThresholdsEntry(MarginEntry):
    """Margins for comparing results of this suite."""

    overrides: list[OverrideEntry] = Field(default=[], description="Margins of some cells, over the suite's.")


def _rising(looks: list[int]) -> list[int]:
    """Raise ValueError for looks that do not come one after the other."""
    if looks != sorted(set(looks)):
        raise ValueError("looks must rise, such as [14, 28]")
    return looks


Looks = Annotated[list[Annotated[int, Field(ge=1, le=500)]], AfterValidator(_rising)]


class GateEntry(_Entry):
    """How `metabench check SUITE` measures and decides; margins stand in `thresholds`. `selftest` recommends these."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.01, description="The chance of any false alarm in a whole live check, over all rows and looks."
    )
    looks: Looks = Field(
        default=[14, 28], min_length=1, description="After so many pairs of processes it is decided what can be."
    )
    seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        default=1.0, description="Time for each kernel in each pair of processes, both sides together."
    )


class SuiteEntry(_Entry):
    """A metabench suite: what is compared, on what, and how it is measured."""

    suite: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = Field(
        default=None, description="The suite's name; default: the file's."
    )
    description: str = Field(default="", description="One line on what the suite is for.")
    plugins: list[str] = Field(default=[], description="Plug-in files (algorithms, data sets), relative to this file.")
    grid: list[GridEntry] = Field(
        default=[],
        description="The product of tasks, algorithms, devices, precisions, seeds and calls, or a list of such.",
        json_schema_extra=_or_list,
    )
    cells: list[CellEntry] = Field(default=[], description="Explicit cells, besides the grid or instead of it.")
    train: TrainEntry = Field(default=TrainEntry(), description="Training of all algorithms that do not say otherwise.")
    evaluation: EvaluationEntry = Field(
        default=EvaluationEntry(), description="The test episodes and the weights tested."
    )
    timing: TimingEntry = Field(default=TimingEntry(), description="How the times of kernels are measured.")
    gate: GateEntry = Field(default=GateEntry(), description="How `metabench check` decides on times.")
    measures: Measures = Field(
        default=["accuracy", "mse", "mse_before", "train_time", "adapt_time"],
        min_length=1,
        description="What is measured; what does not fit a task is left out for it.",
    )
    controls: bool = Field(default=True, description="Add every control (chance, ...) that fits the tasks.")
    reference: str | None = Field(default=None, description="The algorithm that tables compare the others with.")
    threads: Threads | None = Field(default=None, description="Threads of one cell; default: all cores.")
    thresholds: ThresholdsEntry = Field(
        default=ThresholdsEntry(), description="What change is no matter when results are compared."
    )


_PARTS: dict[str | int, type[BaseModel]] = {
    "grid": GridEntry,
    "cells": CellEntry,
    "tasks": TaskEntry,
    "task": TaskEntry,
    "algorithms": AlgorithmEntry,
    "algorithm": AlgorithmEntry,
    "train": TrainEntry,
    "evaluation": EvaluationEntry,
    "timing": TimingEntry,
    "gate": GateEntry,
    "calls": CallEntry,
    "thresholds": ThresholdsEntry,
    "overrides": OverrideEntry,
}


def validate(document: Document) -> SuiteEntry | None:
    """Return the suite's entry without its bad parts, which are reported; None if nothing is left.

    All mistakes are collected: a bad part is left out, and the rest is checked further.
    """
    document.listed("grid")
    for attempt in itertools.count():
        try:
            return SuiteEntry.model_validate(document.data)
        except ValidationError as error:
            bad = set()
            for detail in error.errors(include_url=False):
                bad.add(_present(document, detail["loc"]))
                # Once bad parts are out, what is missing or too short is only their consequence.
                if attempt == 0 or detail["type"] == "value_error":
                    document.report(detail["loc"], document.explained(detail, SuiteEntry, _PARTS))
        if () in bad:
            return None
        document.prune(bad)
    return None


def _present(document: Document, loc: Where) -> Where:
    """Return that part of an error's place which the file has: a missing key it has not."""
    while loc not in document.lines:
        loc = loc[:-1]
    return loc
