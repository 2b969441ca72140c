"""LSTM baseline: a plain LSTM that is shown a task's examples with their labels one step late.

The network that MANN (Santoro et al. 2016) is compared with: the same controller without memory, and the softmax
layer on its hidden state. Settled as the reference implementation snowkylin/ntm has it: 200 units in one layer, forget
bias 1 (TensorFlow's default there), Glorot uniform weights, Adam 1e-3, 16 tasks a step, images divided by their
maximum. The paper's own optimiser settings are not verified.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from metabench.algorithms.finetune import Finetune
from metabench.algorithms.sequence import SequenceLearner, State
from metabench.episodes import Problem

METABENCH = {
    "kind": "algorithm",
    "name": "lstm-baseline",
    "family": "model",
    "paper": "Santoro et al. 2016",
    "url": "https://arxiv.org/abs/1605.06065",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "stream"],
    "train": {"tasks": 16},
}


class LSTMBaseline(SequenceLearner):
    """State: hidden and cell state of the LSTM."""

    def start(self, tasks: int) -> State:
        """See `SequenceLearner.start`: zeros."""
        zeros = self.output.weight.new_zeros(tasks, 1, self.units)
        return zeros, zeros

    def step(self, drive: Tensor, state: State, *, last: bool = False) -> State:
        """See `SequenceLearner.step`."""
        del last
        return self.controller(drive, state)

    def exposed(self, state: State) -> Tensor:
        """See `SequenceLearner.exposed`: the hidden state."""
        return state[0]


def build(
    problem: Problem,
    *,
    units: int = 200,
    image_size: int | None = None,
    scale: Literal["max", "none"] = "max",
    forget_bias: float = 1.0,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
) -> LSTMBaseline:
    """The LSTM without memory; the parameters are MANN's.

    Raises:
        ConfigError: a size that is not possible, negative steps, or a problem without ways.
    """
    return LSTMBaseline(
        problem,
        units=units,
        reads=0,
        image_size=image_size,
        scale=scale,
        forget_bias=forget_bias,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr),
    )
