"""The LSTM baseline against torch.nn.LSTM, which is shown every task and query by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.lstm_baseline import METABENCH, LSTMBaseline, build
from metabench.episodes import Batch, Problem
from metabench.errors import ConfigError

PROBLEM = Problem(shape=(1, 4, 4), loss="cross_entropy", ways=3, classes=9)


def make(**params: object) -> LSTMBaseline:
    torch.manual_seed(0)
    return build(PROBLEM, units=6, **params).double()  # type: ignore[arg-type]


def in_torch(algorithm: LSTMBaseline) -> nn.LSTM:
    """The same weights; torch's order of the gates is input, forget, cell, output."""
    lstm = nn.LSTM(16 + 3, 6, batch_first=True).double()
    gates = torch.arange(24).reshape(4, 6)[[1, 0, 3, 2]].flatten()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(algorithm.inputs.weight[gates])
        lstm.weight_hh_l0.copy_(algorithm.recurrent.weight[gates])
        lstm.bias_ih_l0.copy_(algorithm.inputs.bias[gates])
        lstm.bias_hh_l0.zero_()
    return lstm


@pytest.mark.parametrize("shots", [1, 3])
def test_answers_are_those_of_torchs_lstm(shots: int) -> None:
    algorithm = make()
    g = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat_interleave(shots).expand(2, -1)
    support = Batch(torch.rand(2, 3 * shots, 1, 4, 4, generator=g, dtype=torch.float64), y, 3)
    x, seeds = torch.rand(2, 4, 1, 4, 4, generator=g, dtype=torch.float64), torch.tensor([5, 6])
    output = algorithm.adapt(support, seeds=seeds)(x)
    tuned = make(finetune_steps=3, finetune_lr=0.5).eval().adapt(support, seeds=seeds)(x)
    lstm = in_torch(algorithm)
    for t in range(2):
        draw = torch.rand(3 * shots, generator=torch.Generator().manual_seed(int(seeds[t])), dtype=torch.float64)
        order = draw.argsort()
        labels = F.one_hot(y[t][order], 3).double()

        def hidden(image: Tensor, t: int = t, order: Tensor = order, labels: Tensor = labels) -> Tensor:
            images = torch.cat([support.x[t][order], image[None]]).flatten(1)
            images = images / images.amax(1, keepdim=True)
            shown = torch.cat([images, torch.cat([torch.zeros(1, 3).double(), labels])], dim=1)
            last: Tensor = lstm(shown[None])[0][0, -1]
            return last.detach()

        head = copy.deepcopy(algorithm.output)  # fine-tuned on the support set, shown once more
        descent = torch.optim.SGD(head.parameters(), lr=0.5)
        for _ in range(3):
            descent.zero_grad()
            F.cross_entropy(head(torch.stack([hidden(image) for image in support.x[t]])), y[t]).backward()
            descent.step()
        for q in range(4):
            assert torch.allclose(output[t, q], algorithm.output(hidden(x[t, q])), rtol=1e-10, atol=1e-12)
            assert torch.allclose(tuned[t, q], head(hidden(x[t, q])), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(tuned, output, atol=1e-3)


def test_defaults_are_the_reference_implementations() -> None:
    algorithm = build(PROBLEM)
    assert algorithm.units == 200 and algorithm.lr == 1e-3 and METABENCH["train"] == {"tasks": 16}
    assert algorithm.inputs.bias[:200].eq(1).all() and not algorithm.inputs.bias[200:].any()


def test_it_has_no_memory() -> None:
    assert {name.partition(".")[0] for name, _ in make().named_parameters()} == {"inputs", "recurrent", "output"}
    assert [tuple(part.shape) for part in make().start(4)] == [(4, 1, 6), (4, 1, 6)]


def test_impossible_parameters_are_explained() -> None:
    with pytest.raises(ConfigError, match="units must be at least 1, not 0"):
        build(PROBLEM, units=0)
    with pytest.raises(ConfigError, match="it needs a problem with ways"):
        build(Problem((1,), "mse"))
