"""What a job does: train one meta-learner, then measure the cells that share it.

A job is plain data, made by `plan.Job.message`. Results leave through `emit`, one per finished measure, so that the
parent can make each durable before the next begins.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metabench.algorithms.base import Algorithm, Learner
from metabench.algorithms.metric import FeatureMethod
from metabench.backbones import Backbone
from metabench.episodes import Dataset, ImageData, ImageTasks, Problem, Subset, TaskDistribution, philox_key
from metabench.errors import ConfigError, Diverged, MetabenchError, Unsupported
from metabench.scoring import Followed, Scores, Stopped, follow_streams, score_episodes
from metabench.training import Plan, train

Job = Mapping[str, Any]


@dataclass
class Workshop:
    """What a worker keeps between jobs: the plug-in loader, data sets, and its line to the parent."""

    load: Callable[[str, str], Any]  # (kind, name) -> plug-in module
    emit: Callable[..., None]  # (kind of message, **content)
    stopping: Callable[[], bool]
    datasets: dict[str, Dataset] = field(default_factory=dict)

    def dataset(self, job: Job) -> Dataset:
        """The job's data set, loaded once."""
        key = repr((job["dataset"], sorted(job["data_params"].items())))
        if key not in self.datasets:
            self.datasets[key] = self.load("dataset", job["dataset"]).build(**job["data_params"])
        return self.datasets[key]


def run_job(job: Job, shop: Workshop) -> None:
    """Do one job: every (cell, measure) of it is emitted exactly once.

    Raises:
        Stopped: the parent asked for a stop; what is not emitted is pending.
    """
    left = [(cell["id"], measure) for cell in job["cells"] for measure in cell["measures"]]

    def result(cell: str, measure: str, status: str, **content: Any) -> None:
        shop.emit("result", cell=cell, measure=measure, status=status, **content)
        left.remove((cell, measure))

    def rest(status: str, reason: str) -> None:
        for cell, measure in list(left):
            result(cell, measure, status, reason=reason)

    try:
        _Cells(job, shop, result).run()
    except Stopped:
        raise
    except Unsupported as error:
        rest("skipped", str(error))
    except Diverged as error:
        rest("diverged", str(error))
    except Exception as error:  # a failing cell is a row with a reason; the suite goes on
        shop.emit("log", text=traceback.format_exc())
        rest("failed", reason_of(error))


def reason_of(error: BaseException) -> str:
    """One line that says what failed and where."""
    if isinstance(error, MetabenchError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {text[:300]} ({Path(where.filename).name}:{where.lineno})"


class _Cells:
    """The cells of one job, and what they share."""

    def __init__(self, job: Job, shop: Workshop, result: Callable[..., None]) -> None:
        self.job, self.shop, self.result = job, shop, result
        self.features: dict[Subset, Tensor] = {}
        self.followed: dict[str, Followed] = {}
        self.dataset = shop.dataset(job)
        self.source = self._bind("train", job["train"]) if job["train"] else None
        self.tests: dict[str, TaskDistribution] = {}
        self.curve: list[dict[str, float]] = []

    def run(self) -> None:
        self._bind_tests()
        if not self.tests:
            return
        problem = self.source.problem if self.source else next(iter(self.tests.values())).problem
        algorithm = build(self.job, self.shop, problem)
        facts = {"backbone": backbone_name(algorithm), "threads": torch.get_num_threads()}
        cells = self._supported(algorithm)
        if not cells:
            return
        if self.source is not None:
            trained = train(algorithm, self._plan())
            self.curve = trained.pop("curve")
            facts |= trained
        algorithm.eval()
        for cell in cells:
            for measure in cell["measures"]:
                self._measure(algorithm, cell, measure, facts)

    def _wait(self) -> None:
        """Until the device has done all it was given."""
        if self.job["device"] == "cuda":
            torch.cuda.synchronize()

    def _bind(self, subset: Subset, shape: Mapping[str, Any]) -> TaskDistribution:
        seed = self.job["seed"] if subset == "train" else self.job["evaluation"]["seed"]
        return bind(self.dataset, subset, self.job, shape, seed=seed)

    def _bind_tests(self) -> None:
        """The test tasks of every cell; a cell without any (no alphabet has so many classes) fails alone."""
        for cell in self.job["cells"]:
            try:
                self.tests[cell["id"]] = self._bind("test", cell)
            except ConfigError as error:
                for measure in cell["measures"]:
                    self.result(cell["id"], measure, "failed", reason=str(error))

    def _supported(self, algorithm: Algorithm) -> list[Mapping[str, Any]]:
        """The cells this algorithm can answer; the others become skipped rows with the reason."""
        possible = []
        for cell in (one for one in self.job["cells"] if one["id"] in self.tests):
            reason = algorithm.unsupported(self.tests[cell["id"]].problem)
            if reason is None and cell["stream"]:
                reason = algorithm.unfollowed()
            if reason is None:
                possible.append(cell)
                continue
            for measure in cell["measures"]:
                self.result(cell["id"], measure, "skipped", reason=reason)
        return possible

    def _plan(self) -> Plan:
        job, spec = self.job, self.job["train"]
        assert self.source is not None
        source = self.source
        return Plan(
            source=source,
            spec=spec,
            checkpoint=Path(job["checkpoint"]),
            twin=lambda: build(job, self.shop, source.problem),
            validation=self._validation() if job["evaluation"]["selection"] == "val" else None,
            stopping=self.shop.stopping,
            synchronise=self._wait,
            emit=self.shop.emit,
        )

    def _validation(self) -> TaskDistribution:
        """Validation tasks in the shape of the training's (plain image batches: 5-way 1-shot), whatever is tested.

        A training on streams follows validation streams, as long as its own (see `training`).

        Never more ways than there are validation classes.
        """
        spec = self.job["train"]
        shape = {**spec, "shots": spec["shots"] or 1, "queries": spec["queries"] or 5}
        classes = self._bind("val", {**shape, "ways": None}).problem.classes
        if classes is not None:
            shape["ways"] = min(spec["ways"] or 5, classes)
        return self._bind("val", shape)

    def _measure(self, algorithm: Algorithm, cell: Mapping[str, Any], measure: str, facts: Mapping[str, Any]) -> None:
        if measure == "train_time":
            each = self.job["train"]["images_per_step"]
            curve = [{**point, "images": point["step"] * each} for point in self.curve]
            samples = {"seconds": [facts["train_seconds"]], "curve": curve}
            self.result(cell["id"], measure, "ok", unit="s", samples=samples, facts=facts)
            return
        if measure == "mse_before" and not algorithm.inner_loop:
            self.result(cell["id"], measure, "skipped", reason="no inner loop, so nothing before it", facts=facts)
            return
        found = self._score(algorithm, cell, measure)
        known = {**facts, "episodes_hash": found.episodes_hash}
        if isinstance(self.dataset, ImageData):
            known["pixels"] = self.dataset.pixels_hash
        if found.credit is not None:
            name = hashlib.sha256(f"{cell['id']} {measure}".encode()).hexdigest()[:16]
            known["predictions"] = found.credit.save(Path(self.job["predictions"]), name)
        self.result(
            cell["id"],
            measure,
            "diverged" if found.not_finite else "ok",
            reason=f"{found.not_finite} predictions were not finite" if found.not_finite else "",
            unit="fraction" if "accuracy" in measure else "squared error",
            # a mean error over some episodes only would be no error of the method: then there is no value at all
            samples=None if found.not_finite and found.credit is None else found.samples,
            facts=known,
        )

    def _score(self, algorithm: Algorithm, cell: Mapping[str, Any], measure: str) -> Scores:
        """The scores of a measure of quality; the streams of a cell are followed once for all its presentations."""
        test, count = self.tests[cell["id"]], self.job["evaluation"]["episodes"]
        subset: Subset = "test"
        if measure == "val_accuracy":  # what hyper-parameters are chosen by: test classes stay unseen
            test, subset = self._bind("val", cell), "val"
        if measure.startswith("accuracy_at_"):
            if cell["id"] not in self.followed:
                self.followed[cell["id"]] = follow_streams(
                    algorithm.follow, test, count, cell["stream"], stopping=self.shop.stopping
                )
            return self.followed[cell["id"]].at(int(measure.rpartition("_")[2]))
        adapt, test = self._on_features(algorithm, test, subset, cell)
        adapt = algorithm.initial if measure == "mse_before" else adapt
        return score_episodes(adapt, test, count, stopping=self.shop.stopping)

    def _on_features(
        self, algorithm: Algorithm, test: TaskDistribution, subset: Subset, cell: Mapping[str, Any]
    ) -> tuple[Callable[..., Learner], TaskDistribution]:
        """Where the method allows it and it saves work, embed the subset's images once; run all episodes on features.

        A cell's own size decides, so that its score never depends on which other cells share the job.
        """
        if not (isinstance(algorithm, FeatureMethod) and algorithm.cacheable and isinstance(test, ImageTasks)):
            return algorithm.adapt, test
        seen = self.job["evaluation"]["episodes"] * cell["ways"] * (cell["shots"] + cell["queries"])
        if seen <= test.images_in_all:
            return algorithm.adapt, test
        if subset not in self.features:
            with torch.no_grad():
                self.features[subset] = test.features(algorithm.embed)
        return algorithm.adapt_features, test.over(self.features[subset])


def bind(dataset: Dataset, subset: Subset, job: Job, shape: Mapping[str, Any], *, seed: int) -> TaskDistribution:
    """The subset's tasks in the shape a cell or a training spec declares."""
    return dataset.tasks(
        subset,
        ways=shape.get("ways"),
        shots=shape.get("shots") or 1,
        queries=shape.get("queries") or 1,
        rotations=job["rotations"],
        seed=seed,
        device=job["device"],
        # only where it is asked for: a data set that does not declare it need not know it
        **({"within": shape["within"]} if shape.get("within", "none") != "none" else {}),
    )


def build(job: Job, shop: Workshop, problem: Problem) -> Algorithm:
    """A fresh algorithm with seeded initial parameters, on the job's device and in its precision."""
    torch.manual_seed(philox_key("initialisation", job["seed"]) % 2**63)
    algorithm: Algorithm = shop.load("algorithm", job["algorithm"]).build(problem, **job["params"])
    backbones = [module for module in algorithm.modules() if isinstance(module, Backbone)]
    if job["precision"] == "bf16" and not backbones:
        raise Unsupported("bf16: it has no backbone of ours whose convolutions could run in bfloat16")
    for backbone in backbones:
        backbone.bf16 = job["precision"] == "bf16"
        backbone.channels_last = job.get("layout", "channels_last") == "channels_last"
    return algorithm.to(job["device"])


def backbone_name(algorithm: Algorithm) -> str:
    """The backbone's registry name: what was built, not what was asked for (`auto`)."""
    names = [module.name for module in algorithm.modules() if isinstance(module, Backbone)]
    return names[0] if names else ""
