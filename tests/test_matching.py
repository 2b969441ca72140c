"""Matching networks against equation 1, written as loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms import protonet
from metabench.algorithms.base import query_loss, uniform
from metabench.algorithms.matching import Context, MatchingNet, build
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 16, 16), loss="cross_entropy", ways=3, classes=9)
SEEDS = torch.arange(2)


def make(**params: object) -> MatchingNet:
    torch.manual_seed(0)
    return build(PROBLEM, **params).double()  # type: ignore[arg-type, no-any-return]


def data(seed: int, shots: int = 3, scale: float = 1.0) -> tuple[Batch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(3).repeat(shots)[torch.randperm(3 * shots, generator=g)] for _ in range(2)])
    x = torch.randn(2, 3 * shots, 6, generator=g, dtype=torch.float64) * scale
    return Batch(x, y, 3), torch.randn(2, 4, 6, generator=g, dtype=torch.float64) * scale


def similarity(kind: str, q: Tensor, s: Tensor) -> float:
    if kind == "cosine":
        return 10.0 * F.cosine_similarity(q, s, 0, eps=0).item()
    if kind == "cosine_unnormalised_query":
        return (q @ s / s.norm()).item()
    return -((q - s) ** 2).sum().item()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(1, 4),
    kind=st.sampled_from(["cosine", "cosine_unnormalised_query", "sqeuclidean"]),
)
def test_equation_1(seed: int, shots: int, kind: str) -> None:
    support, x = data(seed, shots)
    output = make(similarity=kind).adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        for q in range(x.shape[1]):
            weights = [math.exp(similarity(kind, x[t, q], s)) for s in support.x[t]]
            for n in range(3):
                voted = sum(w for w, y in zip(weights, support.y[t], strict=True) if y == n)
                assert output[t, q, n].item() == pytest.approx(math.log(voted / sum(weights)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["cosine", "cosine_unnormalised_query", "sqeuclidean"])
@pytest.mark.parametrize("counts", [(2, 1, 3), (2, 0, 3)])
def test_classes_may_have_unequal_numbers_of_examples(counts: tuple[int, ...], kind: str) -> None:
    """Every example has its vote; the class that has none has no probability, and takes none from the others."""
    support, x = data(4)
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    support = Batch(support.x[:, : len(y)], torch.stack([y, y.flip(0)]), 3)
    output = make(similarity=kind).adapt_features(support, seeds=SEEDS)(x).exp()
    for t in range(2):
        for q in range(x.shape[1]):
            weights = [math.exp(similarity(kind, x[t, q], s)) for s in support.x[t]]
            for n in range(3):
                voted = sum(w for w, label in zip(weights, support.y[t], strict=True) if label == n)
                assert output[t, q, n].item() == pytest.approx(voted / sum(weights), rel=1e-5, abs=0)


def test_the_loss_is_the_mixtures_likelihood() -> None:
    support, x = data(1)
    output = make().adapt_features(support, seeds=SEEDS)(x)
    assert torch.allclose(output.exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    y = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    loss = query_loss(PROBLEM, output, Batch(x, y, 3))[0]
    assert loss.item() == pytest.approx(-output.gather(-1, y[..., None]).mean().item())
    summed = 10 * torch.einsum(
        "tmn,tnk->tmk", F.normalize(x, dim=-1) @ F.normalize(support.x, dim=-1).mT, support.one_hot()
    )
    assert not torch.allclose(summed.log_softmax(-1), output, atol=0.1)  # another model (see the class)


def test_the_literal_form_cannot_be_sure() -> None:
    """With 5 support items and a raw cosine no answer exceeds e / (e + 4 / e)."""
    support = Batch(torch.cat([torch.ones(1, 1, 2), -torch.ones(1, 4, 2)], 1).double(), torch.arange(5)[None], 5)
    literal = make(temperature=1.0, learn_temperature=False)
    assert not any(p is literal.log_temperature for p in literal.parameters())
    best = literal.adapt_features(support, seeds=SEEDS[:1])(torch.ones(1, 1, 2).double()).exp().max().item()
    assert best == pytest.approx(math.e / (math.e + 4 / math.e), abs=1e-6)
    assert make().adapt_features(support, seeds=SEEDS[:1])(torch.ones(1, 1, 2).double()).exp().max() > 0.999


def test_one_shot_squared_distance_is_a_prototypical_network() -> None:
    support, x = data(2, shots=1)
    torch.manual_seed(0)
    prototypical = protonet.build(PROBLEM).double()
    expected = prototypical.adapt_features(support, seeds=SEEDS)(x).log_softmax(-1)
    assert torch.allclose(make(similarity="sqeuclidean").adapt_features(support, seeds=SEEDS)(x), expected, rtol=1e-10)


def test_one_shot_raw_cosine_is_the_softmax_over_the_classes_cosines() -> None:
    """What a prototypical network with the cosine answers as well."""
    support, x = data(2, shots=1)
    output = make(temperature=1.0, learn_temperature=False).adapt_features(support, seeds=SEEDS)(x)
    for t in range(2):
        examples = [support.x[t, support.y[t].tolist().index(n)] for n in range(3)]
        for q in range(x.shape[1]):
            cosines = torch.stack([x[t, q] @ s / (x[t, q].norm() * s.norm()) for s in examples])
            torch.testing.assert_close(output[t, q].exp(), cosines.exp() / cosines.exp().sum(), rtol=1e-7, atol=0)
    prototypical = protonet.build(PROBLEM, distance="cosine").double()
    expected = prototypical.adapt_features(support, seeds=SEEDS)(x).log_softmax(-1)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_far_classes_keep_finite_logits_and_gradients() -> None:
    support, x = data(3, scale=1e3)
    x.requires_grad_()
    output = make(similarity="sqeuclidean").adapt_features(support, seeds=SEEDS)(x)
    assert output.min() < -1e5
    output.sum().backward()
    assert torch.isfinite(output).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_the_temperature_is_learned_and_positive() -> None:
    algorithm = make(lr=1.0).float()
    assert algorithm.log_temperature.exp().item() == pytest.approx(10.0)
    trainer = algorithm.trainer(3)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3)[None].expand(2, -1)
    for _ in range(3):
        batch = Batch(torch.rand(2, 3, 1, 16, 16, generator=g), y, 3)
        trainer.step(Episode(batch, Batch(torch.rand(2, 3, 1, 16, 16, generator=g), y, 3), SEEDS))
    assert algorithm.log_temperature.exp().item() != pytest.approx(10.0, rel=0.1)
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        make(temperature=0.0)


# Full context embeddings


def context(steps: int = 3) -> Context:
    torch.manual_seed(0)
    made = Context(6, steps=steps).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # away from where gates are half open and everything is nearly linear
    return made


def lstm(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of an LSTM on vectors; weights as PyTorch keeps them: input, hidden, and their biases."""
    gates = weights[0] @ x + weights[2] + weights[1] @ h + weights[3]
    i, f, g, o = gates.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def weights_of(cell: torch.nn.LSTMCell) -> list[Tensor]:
    return [cell.get_parameter(name).detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def slow_support(made: Context, x: Tensor, order: list[int]) -> Tensor:
    """g(x_i, S) of one task, x (n, d): the two passes written out."""
    found = x.clone()
    for cell, sequence in ((made.onwards, order), (made.backwards, order[::-1])):
        own = weights_of(cell)
        h = c = torch.zeros(6, dtype=torch.float64)
        for i in sequence:
            h, c = lstm(x[i], h, c, own)
            found[i] += h
    return found


def slow_query(made: Context, x: Tensor, g: Tensor) -> Tensor:
    """f(x, S) of one query."""
    weights = weights_of(made.cell)
    h, c = x, torch.zeros_like(x)
    for _ in range(made.steps):
        attention = [math.exp(float(h @ item)) for item in g]
        r = sum(a * item for a, item in zip(attention, g, strict=True)) / sum(attention)
        out, c = lstm(torch.cat([x, r]), h, c, weights)
        h = out + x
    return h


@pytest.mark.parametrize("steps", [1, 3])
def test_context_is_the_appendix(steps: int) -> None:
    made, (support, x) = context(steps), data(0)
    order = uniform(SEEDS, 9).argsort(-1)
    with torch.no_grad():
        g = made.support(support.x, order)
        f = made.query(x, g)
        for t in range(2):
            wanted = slow_support(made, support.x[t], order[t].tolist())
            torch.testing.assert_close(g[t], wanted, rtol=1e-10, atol=1e-12)
            for q in range(4):
                torch.testing.assert_close(f[t, q], slow_query(made, x[t, q], wanted), rtol=1e-10, atol=1e-12)


def test_reading_backwards_swaps_the_directions() -> None:
    made, swapped, (support, _) = context(), context(), data(1)
    swapped.onwards, swapped.backwards = swapped.backwards, swapped.onwards
    order = torch.stack([torch.randperm(9), torch.randperm(9)])
    torch.testing.assert_close(made.support(support.x, order), swapped.support(support.x, order.flip(1)))
    assert (made.support(support.x, order) - made.support(support.x, order.flip(1))).abs().max() > 0.01


@pytest.mark.parametrize("direction", ["onwards", "backwards"])
def test_each_item_gets_its_own_state(direction: str) -> None:
    """Not that of the item as far from the other end: with one direction mute, the first read knows no other."""
    made, (support, _) = context(), data(2)
    with torch.no_grad():
        for parameter in (made.backwards if direction == "onwards" else made.onwards).parameters():
            parameter.zero_()
    order = torch.randperm(9)
    x = support.x[:1].clone().requires_grad_()
    g = made.support(x, order[None])[0]
    sequence = order if direction == "onwards" else order.flip(0)
    for place, i in enumerate(sequence.tolist()):
        known = torch.autograd.grad(g[i].sum(), x, retain_graph=True)[0][0].abs().sum(1) > 0
        assert sorted(known.nonzero().flatten().tolist()) == sorted(sequence[: place + 1].tolist())


def test_permuting_the_support_permutes_its_context() -> None:
    made, (support, x) = context(), data(3)
    order, shuffle = torch.randperm(9), torch.randperm(9)
    g = made.support(support.x, order.expand(2, -1))
    # the same items in the same order of reading, at other places
    moved = made.support(support.x[:, shuffle], shuffle.argsort()[order].expand(2, -1))
    torch.testing.assert_close(moved, g[:, shuffle], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.query(x, moved), made.query(x, g), rtol=1e-12, atol=1e-14)


def test_without_memory_from_item_to_item_no_order_matters() -> None:
    made, (support, _) = context(), data(4)
    with torch.no_grad():
        for cell in (made.onwards, made.backwards):
            cell.weight_hh.zero_()
            cell.bias_ih[6:12] = -1e4  # the forget gates shut
    first, second = (made.support(support.x, torch.randperm(9).expand(2, -1)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def with_context(**params: object) -> MatchingNet:
    torch.manual_seed(0)
    return build(PROBLEM, fce=True, **params).double()  # type: ignore[arg-type, no-any-return]


def pictures(seed: int, tasks: int = 3) -> Episode:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(3).expand(tasks, -1)
    support, query = (torch.rand(tasks, 3, 1, 16, 16, generator=g, dtype=torch.float64) for _ in range(2))
    return Episode(Batch(support, y, 3), Batch(query, y, 3), torch.arange(tasks))


def test_with_context_the_decision_is_equation_1_on_contextual_features() -> None:
    algorithm, episode = with_context().eval(), pictures(0)
    assert algorithm.context is not None and algorithm.cacheable
    with torch.no_grad():
        z, x = (torch.stack([algorithm.embed(v) for v in part.x]) for part in (episode.support, episode.query))
        got = algorithm.adapt_features(replace(episode.support, x=z), seeds=episode.seeds)(x)
        g = algorithm.context.support(z, uniform(episode.seeds, 3).argsort(-1))
        f = algorithm.context.query(x, g)
        plain = make().adapt_features(replace(episode.support, x=g), seeds=episode.seeds)(f)
        torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(algorithm.adapt(episode.support, seeds=episode.seeds)(episode.query.x), got)


def test_with_context_neither_other_tasks_nor_other_queries_matter() -> None:
    algorithm, episode = with_context().eval(), pictures(1)
    with torch.no_grad():
        together = algorithm.adapt(episode.support, seeds=episode.seeds)(episode.query.x)
        for t in range(3):
            one = slice(t, t + 1)
            learner = algorithm.adapt(episode.support.pick(one), seeds=episode.seeds[one])
            for q in range(3):
                alone = learner(episode.query.x[one, q : q + 1])
                torch.testing.assert_close(alone[0, 0], together[t, q], rtol=1e-10, atol=1e-12)
        other = algorithm.adapt(episode.support, seeds=episode.seeds + 100)(episode.query.x)
        assert not torch.equal(other, together)  # the order of reading is the seed's


def test_with_context_renaming_the_labels_renames_the_answer() -> None:
    algorithm, episode = with_context().eval(), pictures(2)
    order = torch.tensor([2, 0, 1])
    renamed = replace(episode.support, y=order[episode.support.y])
    with torch.no_grad():
        plain = algorithm.adapt(episode.support, seeds=episode.seeds)(episode.query.x)
        got = algorithm.adapt(renamed, seeds=episode.seeds)(episode.query.x)
    torch.testing.assert_close(got[..., order], plain, rtol=1e-12, atol=1e-14)


def test_with_context_a_step_trains_every_part() -> None:
    algorithm, episode = with_context().float().train(), pictures(3)
    episode = Episode(*(replace(part, x=part.x.float()) for part in (episode.support, episode.query)), episode.seeds)
    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    algorithm.trainer(1).step(episode)
    same = [name for name, p in algorithm.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in same if not name.startswith("backbone.bias")]  # which batch norm takes away


def test_without_context_nothing_is_added() -> None:
    plain, contextual = make(), with_context()
    assert plain.context is None and not any("context" in name for name in plain.state_dict())
    for name, parameter in plain.named_parameters():  # and with it, the backbone begins the same
        assert torch.equal(parameter, contextual.get_parameter(name))
    with pytest.raises(ConfigError, match="fce_steps must be at least 1"):
        make(fce_steps=0)


def test_context_and_fine_tuning_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="a linear head knows no context: set finetune_steps=0 or fce=false"):
        with_context(finetune_steps=1)
    assert make(finetune_steps=1).finetune.steps == 1 and with_context(finetune_steps=0).context is not None
