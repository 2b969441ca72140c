"""Siamese networks against the paper's equation, written as loops over pairs in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import siamese
from metabench.algorithms.distortions import components, distorted, warp
from metabench.algorithms.siamese import Siamese, build, draw, similarities
from metabench.backbones import Koch
from metabench.counts import flops
from metabench.episodes import Batch, Episode, ImageData, Problem
from metabench.errors import ConfigError
from metabench.scoring import score_episodes

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)


def make(problem: Problem = PROBLEM, **params: object) -> Siamese:
    torch.manual_seed(0)
    return build(problem, **params).double()  # type: ignore[arg-type, no-any-return]


def features(seed: int, shots: int = 2, d: int = 64) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(3).repeat(shots)[torch.randperm(3 * shots, generator=g)] for _ in range(2)])
    x = torch.randn(2, 3 * shots, d, generator=g, dtype=torch.float64)
    return Batch(x, y, 3), torch.randn(2, 4, d, generator=g, dtype=torch.float64)


def images(seed: int, *, shots: int = 1, ways: int = 3, side: int = 16) -> Episode:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, ways * (shots + 1), 1, side, side, generator=g, dtype=torch.float64)
    y = torch.arange(ways)
    support = Batch(x[:, ways:], y.repeat_interleave(shots).expand(2, -1), ways)
    order = torch.stack([torch.randperm(ways, generator=g) for _ in range(2)])
    return Episode(support, Batch(x[:, :ways], order, ways), SEEDS)


def pair_logit(algorithm: Siamese, a: Tensor, b: Tensor) -> Tensor:
    """Section 3.1, component by component: the argument of the sigmoid."""
    total = algorithm.head.bias[0]
    for j in range(len(a)):
        total = total + algorithm.head.weight[0, j] * abs(a[j] - b[j])
    return total


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), shots=st.integers(1, 3), combine=st.sampled_from(["mean", "max"]))
def test_a_class_scores_by_its_pairs_with_the_query(seed: int, shots: int, combine: str) -> None:
    algorithm, (support, x) = make(combine=combine), features(seed, shots)
    output = algorithm.adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(x.shape[1]):
            logits = [pair_logit(algorithm, x[t, q], s).item() for s in support.x[t]]
            for n in range(3):
                own = [v for v, y in zip(logits, support.y[t], strict=True) if y == n]
                wanted = max(own) if combine == "max" else sum(own) / len(own)
                assert output[t, q, n].item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("counts", [(2, 1, 3), (2, 0, 3)])
def test_classes_may_have_unequal_numbers_of_examples(counts: tuple[int, ...], combine: str) -> None:
    """Each scores by its own pairs, however many; one without any does not disturb the others."""
    algorithm, (support, x) = make(combine=combine), features(3)
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    support = Batch(support.x[:, : len(y)], torch.stack([y, y.flip(0)]), 3)
    output = algorithm.adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(x.shape[1]):
            logits = [pair_logit(algorithm, x[t, q], s).item() for s in support.x[t]]
            for n in range(3):
                own = [v for v, label in zip(logits, support.y[t], strict=True) if label == n]
                got = output[t, q, n].item()
                if own:
                    wanted = max(own) if combine == "max" else sum(own) / len(own)
                    assert got == pytest.approx(wanted, rel=1e-10, abs=1e-12)
                else:
                    assert got == -math.inf if combine == "max" else math.isfinite(got)


def test_comparing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, (support, x) = make(), features(0, shots=3)
    whole = similarities(x, support.x, algorithm._score)
    monkeypatch.setattr(siamese, "ROOM", 2 * x.numel())
    torch.testing.assert_close(similarities(x, support.x, algorithm._score), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("pairs", ["drawn", "all"])
def test_the_loss_and_its_gradient_are_those_of_two_branches_over_a_list_of_pairs(pairs: str, shots: int) -> None:
    """Each image goes through the network once for every pair that it is in; here it is encoded once for all."""
    algorithm, episode = make(pairs=pairs).eval(), images(1, shots=shots)
    support, query = episode.support, episode.query
    same = query.y[:, :, None] == support.y[:, None]
    alike, different = draw(same, episode.seeds)
    losses: dict[bool, list[Tensor]] = {True: [], False: []}
    for t in range(2):
        for q in range(3):
            for i in range(support.x.shape[1]):
                if pairs == "drawn" and i not in (alike[t, q], different[t, q]):
                    continue
                one, other = (algorithm.embed(x[None])[0] for x in (query.x[t, q], support.x[t, i]))
                target = (query.y[t, q] == support.y[t, i]).double()
                logit = pair_logit(algorithm, one, other)
                losses[bool(target)].append(F.binary_cross_entropy_with_logits(logit, target))
    wanted = sum(losses[True]) / len(losses[True]) / 2 + sum(losses[False]) / len(losses[False]) / 2
    assert pairs == "all" or len(losses[True]) == len(losses[False]) == 6  # half and half
    gradients = torch.autograd.grad(wanted, list(algorithm.parameters()))
    got, metrics = algorithm.loss(episode)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(got, list(algorithm.parameters())), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert set(metrics) == {"loss", "pair_accuracy"}  # verification, which is no one-shot accuracy


@pytest.mark.parametrize("pairs", ["drawn", "all"])
def test_a_training_loss_encodes_every_image_exactly_once(pairs: str) -> None:
    algorithm, episode = make(pairs=pairs).train(), images(5, shots=2)
    every, encoded = torch.cat([episode.support.x, episode.query.x], 1).flatten(0, 1), []
    hook = algorithm.backbone.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    work = flops(lambda: algorithm.loss(episode))
    hook.remove()
    passed = [image.numpy().tobytes() for image in torch.cat(encoded)]
    assert sorted(passed) == sorted(image.numpy().tobytes() for image in every)
    compared = 2 * 3 * (6 if pairs == "all" else 2)
    assert work == flops(lambda: algorithm.embed(every)) + 2 * 64 * compared, "and none by another way"


@pytest.mark.parametrize("shots", [1, 3])
def test_all_pairs_are_what_drawn_pairs_are_on_average(shots: int) -> None:
    episode = images(2, shots=shots)
    drawn, every = make().eval(), make(pairs="all").eval()
    with torch.no_grad():
        found = torch.stack([drawn.loss(replace(episode, seeds=torch.tensor([i, -i])))[0] for i in range(100)])
        wanted = every.loss(episode)[0]
    assert abs(found.mean() - wanted) < 4 * found.std() / 10
    assert found.std() > 0


def test_pairs_are_drawn_uniformly_half_of_them_of_one_class_by_the_tasks_own_seed() -> None:
    labels, query = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 0, 1])
    same = (query[:, None] == labels).expand(3000, -1, -1)
    alike, different = draw(same, torch.arange(3000))
    assert (labels[alike] == query).all() and (labels[different] != query).all()
    for q in range(3):
        counts = torch.bincount(alike[:, q], minlength=6)[same[0, q]]
        assert (counts - 1500).abs().max() < 5 * math.sqrt(3000 / 4)
        counts = torch.bincount(different[:, q], minlength=6)[~same[0, q]]
        assert (counts - 750).abs().max() < 5 * math.sqrt(3000 * 3 / 16)
    alone = draw(same[:1], torch.tensor([17]))
    assert torch.equal(alone[0], alike[17:18]) and torch.equal(alone[1], different[17:18])


def test_the_papers_batch_is_an_episode_of_64_ways() -> None:
    y = torch.arange(64)[None]
    same = y[:, :, None] == y[:, None]
    alike, different = draw(same, torch.tensor([5]))
    assert siamese.METABENCH["train"] == {"ways": 64, "shots": 1, "queries": 1}
    assert alike.numel() + different.numel() == 128
    assert torch.equal(alike, y) and not (different == y).any()


def drawings(each: int = 4) -> ImageData:
    """24 classes of so many drawings, no two alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, each, 16, 16), dtype=np.uint8)
    subsets = {"train": np.arange(12), "val": np.arange(12, 14), "test": np.arange(14, 24)}
    return ImageData("drawings", "1", "only", pixels, tuple(map(str, range(24))), subsets)


def test_no_pair_is_one_drawing_twice() -> None:
    shape = {"ways": 12, "shots": 2, "queries": 2, "rotations": "none", "seed": 0, "device": "cpu"}
    episode = drawings().tasks("train", **shape).episodes(0, 20)  # type: ignore[arg-type]
    support, query = episode.support, episode.query
    alike, _ = draw(query.y[:, :, None] == support.y[:, None], episode.seeds)
    chosen = torch.stack([x[i] for x, i in zip(support.x, alike, strict=True)])
    assert (chosen - query.x).abs().flatten(2).amax(-1).min() > 0


@pytest.mark.parametrize("what", ["head", "backbone"])
@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("shots", [1, 2, 5, 10])
def test_a_constant_network_scores_exactly_chance(what: str, combine: str, shots: int) -> None:
    """Since all classes tie for every query: any one answer for all of them would score chance as well, on average."""
    algorithm = make(combine=combine).float().eval()
    with torch.no_grad():
        for parameter in algorithm.head.parameters() if what == "head" else algorithm.backbone.parameters():
            parameter.zero_()
    shape = {"ways": 5, "shots": shots, "queries": 2, "rotations": "none", "seed": 0, "device": "cpu"}
    found = score_episodes(algorithm.adapt, drawings(12).tasks("test", **shape), 10)  # type: ignore[arg-type]
    assert found.credit is not None and found.credit.ties.shape == (10, 10) and (found.credit.ties == 5).all()
    assert found.scores == pytest.approx([0.2] * 10, abs=1e-12)


def test_sure_pairs_do_not_tie() -> None:
    """Probabilities that round to 1 would; the logits still say which is nearer."""
    algorithm = make().float()
    with torch.no_grad():
        algorithm.head.weight.fill_(-1.0)
        algorithm.head.bias.fill_(40.0)
    x = torch.zeros(1, 3, 64)
    x[:, 1:] += torch.tensor([0.01, 0.02])[None, :, None]
    output = algorithm.adapt_features(Batch(x, torch.arange(3)[None], 3), seeds=SEEDS[:1])(x[:, :1])
    assert (output.sigmoid() == 1).all()
    assert output.argsort(-1, descending=True).flatten().tolist() == [0, 1, 2]


def test_the_papers_network_begins_with_the_papers_head_and_is_not_saturated() -> None:
    problem = replace(PROBLEM, shape=(1, 35, 35))
    algorithm = make(problem, backbone="koch35")
    assert isinstance(algorithm.backbone, Koch)
    weight, bias = algorithm.head.weight.detach(), algorithm.head.bias.detach()
    assert weight.shape == (1, 4096) and abs(weight.mean()) < 0.02
    assert weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert bias.item() == pytest.approx(0.5, abs=0.05)
    episode = images(3, side=35)
    h = algorithm.embed(episode.query.x[0])
    assert ((h > 0.01) & (h < 0.99)).double().mean() > 0.9
    algorithm.loss(episode)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in algorithm.parameters())


@pytest.mark.parametrize(("backbone", "lr"), [("conv4", 1e-3), ("koch35", 3e-4)])
def test_a_few_steps_lower_the_loss(backbone: str, lr: float) -> None:
    """A loss that stays at log 2 = 0.693 is the sign of a rate too high, or of saturated sigmoids."""
    side = 35 if backbone == "koch35" else 16
    algorithm = make(replace(PROBLEM, shape=(1, side, side)), backbone=backbone, lr=lr).float().train()
    g = torch.Generator().manual_seed(0)
    patterns = torch.rand(12, 1, side, side, generator=g).round()
    y = torch.arange(12)[None]
    noisy = [(patterns + 0.2 * torch.rand(patterns.shape, generator=g))[None] for _ in range(2)]
    episode = Episode(Batch(noisy[0], y, 12), Batch(noisy[1], y, 12), SEEDS[:1])
    trainer = algorithm.trainer(30)
    for step in range(30):
        loss = trainer.step(replace(episode, seeds=torch.tensor([step])))["loss"]
    assert loss < 0.4


def test_a_distorted_image_is_the_papers_map_pixel_by_pixel() -> None:
    """Section 3.2, T = (turn, shears, scales, shifts): for each new pixel, the point of the old image it comes from."""
    side, drawn = 9, components(torch.tensor([3]), 6)[0]
    image = torch.rand(6, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = warp(image, drawn)
    for i, (angle, shear_x, shear_y, scale_x, scale_y, shift_x, shift_y) in enumerate(drawn.tolist()):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        forward = turn @ np.array([[1, shear_x], [shear_y, 1]]) @ np.diag([scale_x, scale_y])
        for row in range(side):
            for column in range(side):
                middle = (side - 1) / 2
                moved = np.array([column - middle - shift_x * side, row - middle - shift_y * side])
                x, y = np.linalg.solve(forward, moved) + middle
                wanted = 0.0
                for r in (math.floor(y), math.floor(y) + 1):
                    for c in (math.floor(x), math.floor(x) + 1):
                        if 0 <= r < side and 0 <= c < side:
                            wanted += (1 - abs(y - r)) * (1 - abs(x - c)) * image[i, 0, r, c].item()
                assert got[i, 0, row, column].item() == pytest.approx(wanted, abs=1e-12)
    still = torch.tensor([[0.0, 0, 0, 1, 1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(warp(image[:1], still), image[:1], rtol=0, atol=1e-12)


def test_each_distortion_takes_part_in_half_of_the_images_and_keeps_to_its_range() -> None:
    drawn = components(torch.arange(100), 40)
    away = (drawn - torch.tensor([0, 0, 0, 1, 1, 0, 0])).reshape(-1, 7)
    part = away != 0
    assert ((part.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(4000)).all()
    ranges = torch.tensor([math.radians(10), 0.3, 0.3, 0.2, 0.2, 2 / 105, 2 / 105], dtype=torch.float64)
    assert (away.abs() <= ranges).all()
    assert (away.amax(0) > 0.98 * ranges).all() and (away.amin(0) < -0.98 * ranges).all()
    together = torch.corrcoef(torch.cat([part.double(), away], 1).T) - torch.eye(14)
    assert together.abs().max() < 5 / math.sqrt(4000), "independent of each other"
    assert torch.equal(components(torch.tensor([17]), 40)[0], drawn[17]), "a task's own seed"


def test_training_alone_is_distorted_support_and_query_each_image_for_itself() -> None:
    plain, algorithm, episode = make().eval(), make(distort=True).eval(), images(4)
    changed = distorted(episode)
    shifts = torch.cat([changed.support.x - episode.support.x, changed.query.x - episode.query.x], 1)
    assert (shifts.flatten(2).abs().amax(-1) > 0).double().mean() > 0.9  # one in 2^7 stays as it is
    torch.testing.assert_close(algorithm.loss(episode)[0], plain.loss(changed)[0], rtol=0, atol=0)
    assert algorithm.loss(episode)[0] != plain.loss(episode)[0]
    answers = [one.adapt(episode.support, seeds=SEEDS)(episode.query.x) for one in (plain, algorithm)]
    assert torch.equal(*answers)
    twins = replace(episode, support=replace(episode.support, x=episode.query.x))
    both = distorted(twins)
    assert not torch.equal(both.support.x, both.query.x)


def test_ordinary_weight_decay() -> None:
    optimizer = make(weight_decay=0.1).trainer(1).optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_impossible_requests_name_the_fix() -> None:
    with pytest.raises(ConfigError, match="weight_decay must be 0 or more"):
        make(weight_decay=-1.0)
    with pytest.raises(ConfigError, match=r"koch105 needs images of 105x105 pixels, got 16x16.*size: 105"):
        make(backbone="koch105")
    with pytest.raises(ConfigError, match="koch35 has no normalisation, so norm cannot be batch: leave it out"):
        make(replace(PROBLEM, shape=(1, 35, 35)), backbone="koch35", norm="batch")
    with pytest.raises(TypeError, match="trains on episodes"):
        make().loss(images(0).support)
