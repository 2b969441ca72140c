"""Meta-training: budgets, exact resuming, selection, divergence."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metabench import training
from metabench.algorithms.base import Algorithm, Trainer, query_loss, schedule
from metabench.catalogue import catalogue
from metabench.episodes import ImageData
from metabench.errors import Diverged, StoreError
from metabench.scoring import Stopped
from metabench.training import Plan, next_batch, resolve_steps, train

SPEC = {"ways": 3, "shots": 1, "queries": 2, "tasks": 2, "steps": 10}


class Noisy(Algorithm):
    """Uses every kind of state there is: parameters, buffers, moments, a schedule, the global generator."""

    def __init__(self, problem, *, lr=0.05):
        super().__init__(problem)
        self.lr, self.embedding = lr, nn.Linear(64, 4)
        self.register_buffer("mean", torch.zeros(64))

    def adapt(self, support, *, seeds, steps=None):
        centres = support.one_hot().transpose(1, 2) @ self.embedding(support.x.flatten(2) - self.mean)
        return lambda x: -(self.embedding(x.flatten(2) - self.mean)[:, :, None] - centres[:, None]).square().sum(-1)

    def loss(self, batch):
        with torch.no_grad():
            self.mean.lerp_(batch.support.x.flatten(2).mean((0, 1)), 0.1)
        noisy = replace(batch.support, x=batch.support.x + torch.rand_like(batch.support.x))
        return query_loss(self.problem, self.adapt(noisy, seeds=batch.seeds)(batch.query.x), batch.query)

    def trainer(self, total_steps):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return Trainer(self, optimizer, schedule=schedule(optimizer, "cosine", total_steps), clip=1.0)


def data():
    rng = np.random.default_rng(0)
    images = (rng.random((12, 6, 8, 8)) * 255).astype(np.uint8)
    subsets = {"train": np.arange(6), "val": np.arange(6, 9), "test": np.arange(9, 12)}
    return ImageData("d", "1", "only", images, tuple(map(str, range(12))), subsets)


DATA = data()


def tasks(subset="train"):
    return DATA.tasks(subset, ways=3, shots=1, queries=2, rotations="none", seed=0, device="cpu")


def fresh(make=Noisy):
    torch.manual_seed(7)
    return make(tasks().problem)


def plan(folder, **changes):
    default = Plan(
        source=tasks(),
        spec=SPEC,
        checkpoint=folder / "deep" / "c.pt",
        twin=fresh,
        validation=None,
        stopping=lambda: False,
        synchronise=lambda: None,
        emit=lambda kind, **content: None,
    )
    return replace(default, **changes)


def state(algorithm):
    return {k: v.clone() for k, v in algorithm.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def peace(tmp_path):
    """The state at the end of an uninterrupted training."""
    algorithm = fresh()
    train(algorithm, plan(tmp_path / "peace"))
    return state(algorithm)


def stop_after(steps):
    left = iter(range(steps))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("stops", [[1], [9], [4, 3], [1] * 9])
def test_stopped_anywhere_and_resumed_it_ends_in_the_same_state(tmp_path, peace, stops):
    for steps in stops:
        with pytest.raises(Stopped):
            train(fresh(), plan(tmp_path, stopping=stop_after(steps - 1)))
        torch.rand(5)  # what else went on in the process must not matter
    algorithm = fresh()
    facts = train(algorithm, plan(tmp_path))
    assert facts["train_steps"] == 10
    assert facts["resumed"] == len(stops)
    assert same(state(algorithm), peace)


def test_a_finished_training_is_not_trained_again(tmp_path, peace):
    algorithm = fresh()
    first = train(algorithm, plan(tmp_path))
    again = fresh()
    second = train(again, plan(tmp_path))
    assert second["train_seconds"] == first["train_seconds"]
    assert second["resumed"] == 0
    assert same(state(again), peace)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", None])
def test_a_torn_checkpoint_costs_time_but_no_number(tmp_path, peace, damage):
    with pytest.raises(Stopped):
        train(fresh(), plan(tmp_path, stopping=stop_after(4)))
    file = plan(tmp_path).checkpoint
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    algorithm = fresh()
    train(algorithm, plan(tmp_path))
    assert same(state(algorithm), peace)


def test_a_checkpoint_is_written_whole_and_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoreError, match="checkpoint"):
        train(fresh(), plan(tmp_path))
    assert not list(plan(tmp_path).checkpoint.parent.iterdir())


def test_seconds_become_steps_once_and_stay_what_they_were(tmp_path, monkeypatch):
    resolved = []

    def resolve(given):
        resolved.append(resolve_steps(given))
        return resolved[-1]

    monkeypatch.setattr(training, "resolve_steps", resolve)
    spec = {**SPEC, "steps": None, "seconds": 0.2}
    with pytest.raises(Stopped):
        train(fresh(), plan(tmp_path, spec=spec, stopping=stop_after(0)))
    facts = train(fresh(), plan(tmp_path, spec=spec))
    assert len(resolved) == 1
    assert facts["train_steps"] == resolved[0] > 1


def test_the_price_of_a_step_leaves_the_algorithm_alone(tmp_path):
    algorithm = fresh()
    before = state(algorithm)
    assert resolve_steps(plan(tmp_path, spec={**SPEC, "steps": None, "seconds": 1e-9})) == 1
    assert same(state(algorithm), before)


def test_batches_are_a_pure_function_of_the_step():
    for feeds in ("episodes", "images"):
        spec = {**SPEC, "batch": 5}
        first, again = next_batch(tasks(), spec, feeds, 3), next_batch(tasks(), spec, feeds, 3)
        other = next_batch(tasks(), spec, feeds, 4)
        x = [b.x if feeds == "images" else b.support.x for b in (first, again, other)]
        assert torch.equal(x[0], x[1])
        assert not torch.equal(x[0], x[2])
    spec = {"ways": 3, "stream": 6, "tasks": 2}
    first, again, other = (next_batch(tasks(), spec, "episodes", step) for step in (3, 3, 4))
    assert first.x.shape[:2] == (2, 6) and torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)


class Peak(Algorithm):
    """Best in the middle of its training; the level at each step is known."""

    def __init__(self, problem):
        super().__init__(problem)
        self.step = nn.Parameter(torch.zeros(()))

    def adapt(self, support, *, seeds, steps=None):
        good = int((self.step - 6).abs().item() < 1.5)  # steps 5, 6, 7
        known = characters(support.x)
        return lambda x: good * (characters(x)[:, :, None] == known[:, None]).float() + 0 * self.step

    def trainer(self, total_steps):
        return Count(self)


def characters(x):
    """The class of every image (T, n), told by the sum of its pixels."""
    sums = torch.from_numpy(DATA.images.reshape(72, -1).sum(1).astype(np.int64))
    return (x.flatten(2).mul(255).round().long().sum(-1)[..., None] == sums).float().argmax(-1) // 6


class Count:
    def __init__(self, algorithm):
        self.algorithm = algorithm

    def step(self, batch):
        with torch.no_grad():
            self.algorithm.step += 1
        return {"loss": torch.tensor(math.nan)}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("stops", [[], [6]])
def test_selection_on_validation_keeps_the_first_of_the_best(tmp_path, stops):
    validation = tasks("val")
    for steps in stops:
        with pytest.raises(Stopped):
            train(fresh(Peak), plan(tmp_path, validation=validation, stopping=stop_after(steps)))
    algorithm = fresh(Peak)
    facts = train(algorithm, plan(tmp_path, validation=validation))
    assert facts["selected_step"] == 5
    assert float(algorithm.step.detach()) == 5
    last = fresh(Peak)
    assert train(last, plan(tmp_path / "last"))["selected_step"] == 10
    assert float(last.step.detach()) == 10


@pytest.mark.parametrize("stops", [[], [3], [2, 4]])
def test_the_learning_curve_is_the_same_after_stops(tmp_path, monkeypatch, stops):
    monkeypatch.setattr(training, "POINTS", 5)  # of ten steps: two a point
    for steps in stops:
        with pytest.raises(Stopped):
            train(fresh(), plan(tmp_path, validation=tasks("val"), stopping=stop_after(steps)))
    curve = train(fresh(), plan(tmp_path, validation=tasks("val")))["curve"]
    learned = [point for point in curve if "loss" in point]
    assert [point["step"] for point in learned] == [2, 4, 6, 8, 10]
    assert [point["step"] for point in curve if "validation" in point] == list(range(1, 11))
    assert all(0 <= point["validation"] <= 1 for point in curve if "validation" in point)
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(curve))
    # a point is the mean over its steps
    losses = []
    algorithm = fresh()
    trainer = algorithm.trainer(10)
    algorithm.train()
    source = tasks()
    for step in range(10):
        losses.append(float(trainer.step(next_batch(source, SPEC, "episodes", step))["loss"]))
    expected = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [point["loss"] for point in learned] == pytest.approx(expected, rel=1e-5)


def test_a_training_on_streams_is_selected_on_streams(tmp_path):
    """As long as its own, by the accuracy over all steps; support sets are never shown."""
    seen = []

    class Follower(Peak):
        def follow(self, stream):
            seen.append((self.training, tuple(stream.x.shape[:2])))
            right = torch.nn.functional.one_hot(stream.y, stream.ways).float()
            return right * (5 - (self.step - 5).abs() - stream.presentations()[..., None] + 1e-3)

        def adapt(self, support, *, seeds, steps=None):
            raise AssertionError("no episodes here")

    spec = {"ways": 3, "stream": 7, "tasks": 2, "steps": 10}
    algorithm = fresh(Follower)
    facts = train(algorithm, plan(tmp_path, spec=spec, validation=tasks("val")))
    assert facts["selected_step"] == 5 and float(algorithm.step.detach()) == 5
    assert set(seen) == {(False, (200, 7))} and len(seen) == 10


def test_parameters_that_are_not_finite_are_told(tmp_path):
    with pytest.raises(Diverged, match="10 training steps"):
        train(fresh(lambda problem: Noisy(problem, lr=math.inf)), plan(tmp_path))


def test_progress_is_told_without_what_json_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PROGRESS_SECONDS", -1.0)
    said = []
    train(fresh(Peak), plan(tmp_path, emit=lambda kind, **content: said.append((kind, content))))
    assert [content["step"] for _, content in said] == list(range(1, 11))
    assert all(kind == "progress" and content["metrics"] == {} for kind, content in said)


SHIPPED = [p for p in catalogue().algorithms.values() if p.meta["feeds"] and "classification" in p.meta["problems"]]


CHEAP = {"memory_tasks": 8, "centre_images": 32, "filters": 8}


@pytest.mark.parametrize("plugin", SHIPPED, ids=lambda plugin: plugin.name)
def test_every_shipped_method_resumes_exactly(tmp_path, plugin):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (8, 6, 16, 16)).astype(np.uint8)  # 16 pixels: what four poolings need
    subsets = {"train": np.arange(4), "val": np.arange(4, 6), "test": np.arange(6, 8)}
    data = ImageData("noise16", "1", "only", images, tuple(map(str, range(8))), subsets)
    source = data.tasks("train", ways=3, shots=1, queries=2, rotations="none", seed=0, device="cpu")
    params = {name: value for name, value in CHEAP.items() if plugin.parameter(name)}

    def make():
        torch.manual_seed(3)
        return plugin.load().build(source.problem, **params)

    same_for_all = {"source": source, "spec": {**SPEC, "tasks": 1, "batch": 6, "steps": 4}, "twin": make}
    whole = make()
    train(whole, plan(tmp_path / "a", **same_for_all))
    with pytest.raises(Stopped):
        train(make(), plan(tmp_path / "b", **same_for_all, stopping=stop_after(1)))
    resumed = make()
    train(resumed, plan(tmp_path / "b", **same_for_all))
    assert same(state(resumed), state(whole))
