"""What every algorithm of the registry promises, whatever its method: this file is the specification."""

from __future__ import annotations

import copy
import functools
import io
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metabench.algorithms.base import Algorithm, Learner, query_loss, uniform
from metabench.algorithms.metric import FeatureMethod
from metabench.backbones import Backbone
from metabench.catalogue import Plugin, catalogue
from metabench.episodes import Batch, Episode, ImageData, Problem, TaskDistribution

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 1, 2
FITS_A_HEAD = {
    "baseline",
    "baseline++",
    "fomaml",
    "lstm-metalearner",
    "maml",
    "maml++",
    "meta-sgd",
    "metanet",
    "reptile",
    "scratch",
}
"""Whose answer starts from initial output weights: labels are not interchangeable, and zero steps mean chance."""
READS_LABELS = {"mann", "lstm-baseline"}
"""Whose learned weights take labels in, as numbers: labels are not interchangeable."""


@dataclass(frozen=True)
class Case:
    """One algorithm with one choice of `norm` on one kind of problem."""

    name: str
    norm: str | None
    problem: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.norm, self.problem)))


def _norms(plugin: Plugin, problem: str) -> list[str | None]:
    norm = plugin.parameter("norm")
    if norm is None:
        return [None]
    return list(norm.choices) if problem == "classification" else [norm.default]  # type: ignore[list-item]


PLUGINS = catalogue().algorithms
REGRESSION = [p for p in catalogue().datasets.values() if p.meta["problem"] == "regression"]
CHEAPER = {
    "centre_images": 64,
    "epochs": 50,
    "filters": 16,
    "test_steps": 5,
    "memory_tasks": 24,
}  # parameters that cost time and change no promise
CASES = [
    Case(p.name, norm, kind)
    for p in PLUGINS.values()
    for kind in p.meta["problems"]
    if kind != "stream"
    for norm in _norms(p, kind)
]
DEFAULTS = [case for case in CASES if case.norm == getattr(PLUGINS[case.name].parameter("norm"), "default", None)]
CLASSIFIERS = [case for case in CASES if case.problem == "classification"]


def _over(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=str)


def _trained(cases: Iterable[Case]) -> Iterable[Case]:
    return (case for case in cases if PLUGINS[case.name].meta["feeds"] is not None)


every_case, every_default = _over(CASES), _over(DEFAULTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-11}
"""Of equal mathematics in another order. Float64 is the proof; gradient steps amplify float32's by unlike factors on
unlike processors."""


@functools.cache
def synthetic() -> ImageData:
    """Easy classes: each a coarse random pattern, its drawings differ by noise."""
    rng = np.random.default_rng(0)
    patterns = rng.random((24, 1, 4, 4)) < 0.4
    bright = np.kron(patterns, np.ones((4, 4), bool))
    flipped = rng.random((24, 8, 16, 16)) < 0.1
    images = np.where(bright ^ flipped, 255, 0).astype(np.uint8)
    subsets = {"train": np.arange(12), "val": np.arange(12, 14), "test": np.arange(14, 24)}
    return ImageData("synthetic", "1", "only", images, tuple(map(str, range(24))), subsets)


@functools.cache
def tasks(problem: str, subset: str = "test", shots: int = SHOTS, queries: int = QUERIES) -> TaskDistribution:
    if problem == "classification":
        dataset: Any = synthetic()
    else:
        dataset = REGRESSION[0].load().build()
    ways = WAYS if problem == "classification" else None
    return dataset.tasks(  # type: ignore[no-any-return]
        subset, ways=ways, shots=shots, queries=queries, rotations="none", seed=0, device="cpu"
    )


def fresh(case: Case, **params: Any) -> Algorithm:
    torch.manual_seed(3)
    plugin = PLUGINS[case.name]
    defaults = {p.name: p.default for p in plugin.parameters}
    chosen = {name: value for name, value in CHEAPER.items() if defaults.get(name) is not None} | params
    if case.norm:
        chosen["norm"] = case.norm
    built: Algorithm = plugin.load().build(tasks(case.problem, "train").problem, **chosen)
    return built


def batch(algorithm: Algorithm, case: Case, step: int, at_once: int = TASKS) -> Episode | Batch:
    source = tasks(case.problem, "train")
    return source.images(step * 16, 16) if algorithm.feeds == "images" else source.episodes(step * at_once, at_once)


@functools.cache
def _stepped(case: Case) -> Algorithm:
    algorithm = fresh(case)
    if algorithm.feeds is not None:
        trainer = algorithm.trainer(2)
        for step in range(2):
            trainer.step(batch(algorithm, case, step))
    algorithm.eval()
    with torch.no_grad():
        algorithm.prepare(tasks(case.problem, "train"))
    return algorithm


def ready(case: Case) -> Algorithm:
    """In eval mode after two training steps, so that running statistics and centres are not the trivial ones."""
    return copy.deepcopy(_stepped(case))


def episodes(case: Case, count: int = TASKS, *, dtype: torch.dtype = torch.float32) -> Episode:
    episode = tasks(case.problem).episodes(0, count)
    return replace(episode, support=_cast(episode.support, dtype), query=_cast(episode.query, dtype))


def _cast(part: Batch, dtype: torch.dtype) -> Batch:
    return replace(part, x=part.x.to(dtype), y=part.y.to(dtype) if part.y.is_floating_point() else part.y)


def answer(algorithm: Algorithm, episode: Episode, steps: int | None = None) -> Tensor:
    return algorithm.adapt(episode.support, seeds=episode.seeds, steps=steps)(episode.query.x)


def frozen(algorithm: Algorithm) -> Callable[[], bool]:
    """A check that nothing has moved since: parameters, buffers, gradients, modes and the global generators."""

    def look() -> list[Any]:
        modules = [(m.training, getattr(m, "tracking", None)) for m in algorithm.modules()]
        flags = [(p.requires_grad, p.grad is None) for p in algorithm.parameters()]
        return [modules, flags, random.getstate(), repr(np.random.get_state()), torch.is_grad_enabled()]

    state = {name: value.clone() for name, value in algorithm.state_dict().items()}
    generator, rest = torch.get_rng_state(), look()

    def unchanged() -> bool:
        now = algorithm.state_dict()
        same = state.keys() == now.keys() and all(torch.equal(state[name], now[name]) for name in state)
        return same and torch.equal(generator, torch.get_rng_state()) and rest == look()

    return unchanged


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    a, b = a.detach(), b.detach()
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def score(case: Case, output: Tensor, query: Batch) -> Tensor:
    """Per task: the accuracy, a tie among k scoring 1/k, or the squared error."""
    if case.problem == "regression":
        return (output - query.y).square().mean((1, 2))
    top = output == output.max(-1, keepdim=True).values
    return (top.gather(-1, query.y[..., None])[..., 0] / top.sum(-1)).mean(1)


def standard_error(accuracies: Tensor) -> float:
    """That of a mean over independent episodes, as they spread."""
    return float(accuracies.std()) / len(accuracies) ** 0.5


def is_chance(accuracies: Tensor) -> bool:
    """Whether a mean over independent episodes is 1/ways within 4 standard errors; ten points more are 6 of them."""
    assert standard_error(accuracies) <= 1 / 60
    return abs(float(accuracies.mean()) - 1 / WAYS) <= 4 * standard_error(accuracies) + 1e-6


def with_shuffled_labels(algorithm: Algorithm, case: Case) -> Tensor:
    """Accuracies of one-shot episodes whose support labels are shifted, each a mean over all shifts.

    Of a method to which labels are interchangeable, and which sees nothing else, every one of them is 1/ways. As many
    as it takes to see a leak.
    """
    found, source = torch.empty(0), tasks(case.problem, shots=1, queries=7)
    while len(found) == 0 or standard_error(found) > 1 / 60:
        episode = source.episodes(len(found), 20)
        total = torch.zeros(20)
        for shift in range(WAYS):
            support = replace(episode.support, y=(episode.support.y + shift) % WAYS)
            total += score(case, answer(algorithm, replace(episode, support=support)), episode.query)
        found = torch.cat([found, total / WAYS])
        assert len(found) <= 400
    return found


def test_the_cases_cover_the_registry() -> None:
    assert {case.name for case in CASES} == set(PLUGINS) >= FITS_A_HEAD | READS_LABELS


@every_default
def test_the_metadata_tells_the_truth(case: Case) -> None:
    algorithm, meta = fresh(case), PLUGINS[case.name].meta
    assert algorithm.feeds == meta["feeds"]
    assert algorithm.feeds is None or not meta["control"]  # what stands in every table needs no training
    assert algorithm.problem == tasks(case.problem, "train").problem
    assert algorithm.unsupported(tasks(case.problem).problem) is None
    other = Problem((1,), "mse") if case.problem == "classification" else Problem((1, 16, 16), "cross_entropy", WAYS)
    assert algorithm.unsupported(other)


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_adapting_changes_nothing_and_repeats_exactly(case: Case, training: bool) -> None:
    algorithm, episode = ready(case).train(training), episodes(case)
    unchanged = frozen(algorithm)
    first = answer(algorithm, episode)
    with torch.no_grad():
        second = answer(algorithm, episode)
    third = answer(algorithm, episode)
    assert torch.isfinite(first).all()
    assert torch.equal(first, third) and close(second, first)
    assert unchanged()


@every_case
def test_the_answer_has_the_shape_of_the_task(case: Case) -> None:
    algorithm, episode = ready(case), episodes(case)
    output = answer(algorithm, episode)
    last = WAYS if case.problem == "classification" else episode.query.y.shape[-1]
    assert output.shape == (*episode.query.x.shape[:2], last) and output.dtype == torch.float32
    assert close(
        answer(algorithm, episode, steps=0), algorithm.initial(episode.support, seeds=episode.seeds)(episode.query.x)
    )


@every_case
def test_no_graph_without_gradients_and_a_graph_with_them(case: Case) -> None:
    algorithm, episode = ready(case), episodes(case)
    with torch.no_grad():
        learner = algorithm.adapt(episode.support, seeds=episode.seeds)
        assert not learner(episode.query.x).requires_grad
    if not list(algorithm.parameters()):
        return
    loss, metrics = query_loss(algorithm.problem, answer(algorithm, episode), episode.query)
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    gradients = [p.grad for p in algorithm.parameters() if p.grad is not None]
    assert any(bool(g.abs().max() > 0) for g in gradients) and all(bool(torch.isfinite(g).all()) for g in gradients)


@every_case
@every_dtype
def test_a_score_does_not_depend_on_how_many_tasks_share_a_call(case: Case, dtype: torch.dtype) -> None:
    algorithm, episode = ready(case).to(dtype), episodes(case, 3, dtype=dtype)
    with torch.no_grad():
        together = answer(algorithm, episode)
        for t in range(3):
            one = slice(t, t + 1)
            alone = Episode(episode.support.pick(one), episode.query.pick(one), episode.seeds[one])
            assert close(answer(algorithm, alone), together[one], ROUNDING[dtype])
            assert close(score(case, answer(algorithm, alone), alone.query), score(case, together, episode.query)[one])


@every_case
@every_dtype
def test_an_inductive_answer_does_not_depend_on_the_other_queries(case: Case, dtype: torch.dtype) -> None:
    algorithm, episode = ready(case).to(dtype), episodes(case, dtype=dtype)
    with torch.no_grad():
        learner = algorithm.adapt(episode.support, seeds=episode.seeds)
        together = learner(episode.query.x)
        alone = torch.cat([learner(episode.query.x[:, q : q + 1]) for q in range(episode.query.x.shape[1])], dim=1)
    assert together.dtype == dtype  # float64 throughout
    # a transductive answer must say so by its norm, and only such an answer may look at the other queries
    transductive = case.norm == "batch" and case.problem == "classification"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert close(alone, together, tolerance) != transductive


@_over(case for case in CLASSIFIERS if case.name not in FITS_A_HEAD | READS_LABELS)
def test_labels_are_interchangeable(case: Case) -> None:
    algorithm, episode = ready(case), episodes(case)
    order = torch.tensor([2, 0, 1])
    renamed = replace(episode, support=replace(episode.support, y=order[episode.support.y]))
    with torch.no_grad():
        assert close(answer(algorithm, renamed)[..., order], answer(algorithm, episode))


@_over(case for case in DEFAULTS if case in CLASSIFIERS and case.name in FITS_A_HEAD | READS_LABELS)
def test_no_class_number_is_preferred_on_average(case: Case) -> None:
    """Weights per class make single answers depend on the numbering; scores over many tasks must not."""
    count = 200
    algorithm, episode = ready(case), episodes(case, count)
    orders = torch.stack([torch.randperm(WAYS, generator=torch.Generator().manual_seed(t)) for t in range(count)])
    renamed = replace(
        episode,
        support=replace(episode.support, y=orders.gather(1, episode.support.y)),
        query=replace(episode.query, y=orders.gather(1, episode.query.y)),
    )
    with torch.no_grad():
        gap = score(case, answer(algorithm, renamed), renamed.query) - score(
            case, answer(algorithm, episode), episode.query
        )
    assert abs(float(gap.mean())) <= 3 * float(gap.std()) / count**0.5


@_over(case for case in _trained(DEFAULTS) if PLUGINS[case.name].parameter("strategy"))
def test_every_strategy_gives_the_serial_gradients(case: Case) -> None:
    """Of the training loss with respect to all parameters, second order where the method is."""

    def gradients(strategy: str) -> list[Tensor | None]:
        algorithm = fresh(case, strategy=strategy).double().train()
        loss, _ = algorithm.loss(_doubled(batch(algorithm, case, 0, 3)))
        return list(torch.autograd.grad(loss, list(algorithm.parameters()), allow_unused=True))

    strategies = [s for s in PLUGINS[case.name].parameter("strategy").choices if s not in ("auto", "serial")]  # type: ignore[union-attr]
    serial = gradients("serial")
    assert strategies and any(g is not None and bool(g.abs().max() > 0) for g in serial)
    for strategy in strategies:
        for ours, theirs in zip(gradients(str(strategy)), serial, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or close(ours, theirs, 1e-10)


def _doubled(batch: Episode | Batch) -> Episode | Batch:
    if isinstance(batch, Batch):
        return _cast(batch, torch.float64)
    return replace(batch, support=_cast(batch.support, torch.float64), query=_cast(batch.query, torch.float64))


@every_case
def test_cached_features_give_the_same_answer(case: Case) -> None:
    algorithm, episode = ready(case), episodes(case)
    if not (isinstance(algorithm, FeatureMethod) and algorithm.cacheable):
        pytest.skip("features depend on the support set, or there are none")
    support, query = episode.support, episode.query
    with torch.no_grad():
        images = torch.cat([support.x, query.x], dim=1)
        features = torch.stack([algorithm.embed(x[None])[0] for x in images.flatten(0, 1)]).unflatten(
            0, images.shape[:2]
        )
        n = support.x.shape[1]
        cached = algorithm.adapt_features(replace(support, x=features[:, :n]), seeds=episode.seeds)(features[:, n:])
        assert close(cached, answer(algorithm, episode))


@_over(case for case in DEFAULTS if PLUGINS[case.name].parameter("finetune_steps"))
def test_fine_tuning_keeps_the_promises(case: Case) -> None:
    """Two steps or none: of each task by itself, inductive, and leaving the algorithm as it was."""
    episode, trained = episodes(case, 3, dtype=torch.float64), ready(case).state_dict()
    algorithm, off = (fresh(case, finetune_steps=steps).eval() for steps in (2, 0))
    algorithm.load_state_dict(trained)
    off.load_state_dict(trained)
    algorithm, off = algorithm.double(), off.double()
    assert algorithm.inner_loop and not off.inner_loop
    unchanged, together = frozen(algorithm), answer(algorithm, episode)
    assert torch.equal(answer(algorithm, episode), together) and unchanged()
    assert not torch.equal(answer(off, episode), together)
    with torch.no_grad():
        learner = algorithm.adapt(episode.support, seeds=episode.seeds)
        alone = torch.cat([learner(episode.query.x[:, q : q + 1]) for q in range(episode.query.x.shape[1])], dim=1)
        assert not alone.requires_grad and close(alone, together, 1e-11)
        for t in range(3):
            one = slice(t, t + 1)
            task = Episode(episode.support.pick(one), episode.query.pick(one), episode.seeds[one])
            assert close(answer(algorithm, task), together[one], 1e-11)


FOLLOWERS = [case for case in DEFAULTS if "stream" in PLUGINS[case.name].meta["problems"]]


@_over(FOLLOWERS)
def test_an_answer_in_a_stream_knows_what_came_before_it_and_nothing_else(case: Case) -> None:
    """Not its own label, and nothing that comes later; each stream by itself, however many share a call."""
    algorithm, stream = ready(case).double(), tasks("classification").streams(0, 3, 8)
    stream = replace(stream, x=stream.x.double())
    with torch.no_grad():
        logits = algorithm.follow(stream)
        assert logits.shape == (3, 8, WAYS)
        for step in range(8):
            x, y = stream.x.clone(), stream.y.clone()
            x[:, step + 1 :], y[:, step:] = 0.5, 0
            assert close(algorithm.follow(replace(stream, x=x, y=y))[:, : step + 1], logits[:, : step + 1], 1e-11)
            if step:
                y = stream.y.clone()
                y[:, step - 1] = (y[:, step - 1] + 1) % WAYS
                assert not torch.equal(algorithm.follow(replace(stream, y=y))[:, step], logits[:, step])
        for t in range(3):
            assert close(algorithm.follow(stream.pick(slice(t, t + 1))), logits[t : t + 1], 1e-11)


@_over(FOLLOWERS)
def test_training_on_streams_fits_a_few(case: Case) -> None:
    algorithm, stream = fresh(case), tasks("classification", "train").streams(0, 3, 8)
    trainer = algorithm.trainer(60)
    losses = [float(next(iter(trainer.step(stream).values()))) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@_over(_trained(CASES))
def test_only_a_trainer_step_moves_running_statistics(case: Case) -> None:
    algorithm = fresh(case).train()
    first, trainer = batch(algorithm, case, 0), algorithm.trainer(1)
    averages = [b for m in algorithm.modules() if isinstance(m, Backbone) for b in m.buffers()]
    before = [b.clone() for b in averages]
    unchanged = frozen(algorithm)
    loss, _ = algorithm.loss(first)
    assert loss.dim() == 0 and unchanged()
    trainer.step(first)
    assert bool(averages) == (case.norm == "running")
    assert not any(torch.equal(old, new) for old, new in zip(before, averages, strict=True))
    assert not any(getattr(m, "tracking", False) for m in algorithm.modules())


@_over(_trained(DEFAULTS))
def test_training_learns_what_is_easy(case: Case) -> None:
    # the rate of 2.0 on the mean loss that MAML's paper uses makes so short a training a matter of rounding
    params: dict[str, Any] = {"inner_loss": "mean"} if PLUGINS[case.name].parameter("inner_loss") else {}
    algorithm = fresh(case, **params)
    if math.isinf(algorithm.slow_start):
        pytest.skip("so short a training shows nothing: the next test does")
    steps, at_once = (20, 8) if case.problem == "regression" else (30, 1) if algorithm.feeds == "images" else (16, 3)
    steps *= int(algorithm.slow_start)
    watched = batch(algorithm, case, 1000, 16)
    trainer, before = algorithm.trainer(steps), _loss(algorithm, watched)
    for step in range(steps):
        metrics = trainer.step(batch(algorithm, case, step, at_once))
        assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())
    assert _loss(algorithm, watched) < before
    algorithm.eval()
    with torch.no_grad():
        algorithm.prepare(tasks(case.problem, "train"))
        episode = episodes(case, 30)
        reached = score(case, answer(algorithm, episode), episode.query).mean()
    assert case.problem == "regression" or reached > 0.75


@_over(_trained(DEFAULTS))
def test_training_fits_a_few_tasks(case: Case) -> None:
    algorithm = fresh(case)
    if not math.isinf(algorithm.slow_start):
        pytest.skip("it learns at once: see the test before")
    few = batch(algorithm, case, 0, 3)
    trainer, before = algorithm.trainer(120), _loss(algorithm, few)
    for step in range(120):
        trainer.step(few)
        if step % 10 == 9 and _loss(algorithm, few) < 0.5 * before:
            return
    pytest.fail("the loss on three tasks is no half of what it was, after 120 steps on them")


def _loss(algorithm: Algorithm, watched: Episode | Batch) -> float:
    with torch.no_grad():
        if isinstance(watched, Batch):
            return float(algorithm.loss(watched)[0])
        return float(query_loss(algorithm.problem, answer(algorithm, watched), watched.query)[0])


@_over(case for case in DEFAULTS if case in CLASSIFIERS)
def test_shuffled_support_labels_give_chance(case: Case) -> None:
    """Whoever beats chance without true labels has seen the query's labels, or the order of the classes."""
    algorithm = ready(case)
    with torch.no_grad():
        assert is_chance(with_shuffled_labels(algorithm, case))


def test_a_leak_worth_ten_points_is_no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 15 of 100 tasks the labels are told from the places of the support set, which is in their order."""
    case = next(case for case in CLASSIFIERS if case.name == "pixel-nn")
    algorithm = ready(case)
    honest = algorithm.adapt

    def leaky(support: Batch, *, seeds: Tensor, steps: int | None = None) -> Learner:
        places = torch.arange(WAYS).expand_as(support.y)
        told = (uniform(seeds, 1) < 0.15).expand_as(places)
        return honest(replace(support, y=torch.where(told, places, support.y)), seeds=seeds, steps=steps)

    monkeypatch.setattr(algorithm, "adapt", leaky)
    accuracies = with_shuffled_labels(algorithm, case)
    assert 0.38 < accuracies.mean() < 0.48 and not is_chance(accuracies)


@_over(case for case in DEFAULTS if case in CLASSIFIERS and case.name in FITS_A_HEAD)
def test_zero_steps_mean_chance_for_methods_that_take_steps(case: Case) -> None:
    algorithm, episode = ready(case), tasks(case.problem, shots=1, queries=3).episodes(0, 200)
    with torch.no_grad():
        assert is_chance(score(case, answer(algorithm, episode, steps=0), episode.query))


@_over(_trained(DEFAULTS))
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_resumed_training_ends_with_the_same_bits(case: Case, schedule: str) -> None:
    params = {"schedule": schedule} if PLUGINS[case.name].parameter("schedule") else {}

    def run(algorithm: Algorithm, trainer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            trainer.step(batch(algorithm, case, step))

    whole = fresh(case, **params)
    run(whole, whole.trainer(4), 0, 4)
    begun = fresh(case, **params)
    trainer = begun.trainer(4)
    run(begun, trainer, 0, 2)
    file = io.BytesIO()
    torch.save({"algorithm": begun.state_dict(), "trainer": trainer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = fresh(case, **params)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)  # the state must bring everything
    trainer = resumed.trainer(4)
    resumed.load_state_dict(state["algorithm"])
    trainer.load_state_dict(state["trainer"])
    run(resumed, trainer, 2, 4)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_default
def test_saved_and_loaded_it_answers_with_the_same_bits(case: Case, tmp_path: Path) -> None:
    algorithm, episode, file = ready(case), episodes(case), tmp_path / "weights.safetensors"
    save_file({name: value.contiguous().clone() for name, value in algorithm.state_dict().items()}, file)
    loaded = fresh(case).eval()
    loaded.load_state_dict(load_file(file))
    with torch.no_grad():
        assert torch.equal(answer(loaded, episode), answer(algorithm, episode))
