"""MANN: an LSTM with an external memory, written to where it is least used and read by content.

Santoro, Bartunov, Botvinick, Wierstra and Lillicrap 2016, "One-shot Learning with Memory-Augmented Neural Networks"
(least recently used access, LRUA). A step of the memory, from the hidden state h_t of the LSTM, for heads j = 1 .. n
and slots i; k, a and g are linear in h_t before the named function:
- key k_j = tanh(W_k h_t), what is written a_j = tanh(W_a h_t), gate g_j = sigmoid(W_g h_t);
- least used slots l_1 .. l_n: those of the n smallest usages u_{t-1}, the smallest first; constants to the gradient;
- write weights w_j(i) = g_j r_j,t-1(i) + (1 - g_j) [i = l_j], between where the head read last and a least used slot;
- erasure: slot l_1 of M_{t-1} becomes zero;
- memory M_t(i) = M_{t-1}(i) + sum_j w_j(i) a_j;
- read weights r_j,t = softmax over i of cos(k_j, M_t(i)), not sharpened; read vectors sum_i r_j,t(i) M_t(i), which
  the output layer sees beside h_t, and the LSTM at the next step;
- usage u_t = 0.95 u_{t-1} + sum_j (r_j,t + w_j).
The equations are the paper's, with tanh and the order of the steps as in its reference implementation
tristandeleu/ntm-one-shot (mann/model.py). What the paper leaves open or says otherwise is settled as there, with the
differences of snowkylin/ntm as parameters:
- LSTM of 200 units, 128 slots of 40 numbers, 4 read heads = 4 write heads, usage decay 0.95;
- each head writes a vector a of its own, as in both implementations (`written="own"`; the paper's text writes the key,
  a = k: `"key"`);
- head j writes to the j-th least used slot (`write_to="one"`; in the paper's formula and snowkylin/ntm every head
  writes to all of the n least used, `"all"`). Exactly n slots: the formula's "at most the n-th smallest" would take
  every untouched slot, which all tie at the start; ties go to the lower slot;
- read weights by the cosine to the memory after writing (`read_weights="after"`; snowkylin/ntm: `"before"`). The
  cosine has an epsilon (1e-8 on squared lengths), so that an untouched slot (1e-6) resembles nothing, as there (1e-6
  on the product of squared lengths).
Initial state: memory 1e-6, read weights and usage one-hot at slot 0, all else 0. Adam 1e-3 and 16 tasks a step as in
both implementations; the paper's own optimiser settings are not verified. Images are divided by their maximum
(snowkylin/ntm); the paper's are 20x20 (`image_size=20`), here they are taken as they come.
Of the paper's augmentation only the quarter turns are done, where the tasks ask for them (`rotations`): not the random
rotations of up to pi/16 and shifts of up to 10 pixels of its training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabench.algorithms.base import Schedule
from metabench.algorithms.finetune import Finetune
from metabench.algorithms.metric import UNIT_EPS
from metabench.algorithms.sequence import Scale, SequenceLearner, State, at_least_one
from metabench.episodes import Problem
from metabench.errors import ConfigError

METABENCH = {
    "kind": "algorithm",
    "name": "mann",
    "family": "model",
    "paper": "Santoro et al. 2016",
    "url": "https://arxiv.org/abs/1605.06065",
    "feeds": "episodes",
    "control": False,
    "problems": ["classification", "stream"],
    "train": {"tasks": 16},
}

Written = Literal["own", "key"]
WriteTo = Literal["one", "all"]
ReadWeights = Literal["after", "before"]

UNTOUCHED = 1e-6  # what every slot of the memory holds at the start


def _cosine(key: Tensor, memory: Tensor) -> Tensor:
    """Of keys (T, m, heads, width) and the slots of memories (T, slots, width): (T, m, heads, slots)."""
    lengths = (memory.square().sum(-1) + UNIT_EPS).rsqrt()[:, None, None]
    return _products(key, memory) * (key.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt() * lengths


def _products(vectors: Tensor, memory: Tensor) -> Tensor:
    """Of vectors (T, m, heads, width) and slots: (T, m, heads, slots)."""
    return (vectors.flatten(1, 2) @ memory.mT).reshape(*vectors.shape[:3], -1)


def _read(weights: Tensor, memory: Tensor) -> Tensor:
    """The slots' content, weighted (T, m, heads, slots): vectors (T, m, heads, width)."""
    return (weights.flatten(1, 2) @ memory).reshape(*weights.shape[:3], -1)


@dataclass(frozen=True)
class _Versions:
    """T memories (T, slots, width), each in m versions, of which only what is read is made.

    A version adds `content` (T, m, heads, width) with the weights `write` (T, m, heads, slots). It is never written
    out: m queries of a task need no m memories.
    """

    memory: Tensor
    write: Tensor
    content: Tensor

    def cosine(self, key: Tensor) -> Tensor:
        """As `_cosine`, each key's with its own version."""
        products = _products(key, self.memory) + key @ self.content.mT @ self.write
        overlap = 2 * _products(self.content, self.memory) + self.content @ self.content.mT @ self.write
        squares = self.memory.square().sum(-1)[:, None] + (self.write * overlap).sum(2)
        lengths = (squares.clamp_min(0) + UNIT_EPS).rsqrt()[:, :, None]
        return products * (key.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt() * lengths

    def read(self, weights: Tensor) -> Tensor:
        """As `_read`, with each version's own weights."""
        return _read(weights, self.memory) + weights @ self.write.mT @ self.content


class Mann(SequenceLearner):
    """State: hidden and cell state, read vectors (T, 1, heads * width), memory (T, slots, width), read weights
    (T, 1, heads, slots), usage (T, slots).
    """

    def __init__(
        self,
        problem: Problem,
        *,
        units: int,
        slots: int,
        width: int,
        heads: int,
        decay: float,
        written: Written,
        write_to: WriteTo,
        read_weights: ReadWeights,
        image_size: int | None,
        scale: Scale,
        forget_bias: float,
        lr: float,
        schedule: Schedule,
        finetune: Finetune,
    ) -> None:
        at_least_one(slots=slots, width=width, heads=heads)
        if heads > slots:
            raise ConfigError(f"heads must be at most the number of slots, {slots}, not {heads}: each writes to one")
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay must be from 0 to 1, not {decay}")
        super().__init__(
            problem,
            units=units,
            reads=heads * width,
            image_size=image_size,
            scale=scale,
            forget_bias=forget_bias,
            lr=lr,
            schedule=schedule,
            finetune=finetune,
        )
        self.slots, self.width, self.heads, self.decay = slots, width, heads, decay
        self.written, self.write_to, self.read_weights = written, write_to, read_weights
        self.parts = (width, 1, width) if written == "own" else (width, 1)  # key, gate and what is written
        self.head = nn.Linear(units, heads * sum(self.parts))
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def start(self, tasks: int) -> State:
        """See `SequenceLearner.start`."""
        like = self.output.weight
        zeros = like.new_zeros(tasks, 1, self.units)
        reads = like.new_zeros(tasks, 1, self.heads * self.width)
        memory = like.new_full((tasks, self.slots, self.width), UNTOUCHED)
        first = like.new_zeros(tasks, self.slots)
        first[:, 0] = 1
        return zeros, zeros, reads, memory, first[:, None, None].expand(-1, 1, self.heads, -1), first

    def step(self, drive: Tensor, state: State, *, last: bool = False) -> State:
        """See `SequenceLearner.step`."""
        memory, read, usage = state[3:]
        hidden, cell = self.controller(drive, state)
        key, gate, *more = self.head(hidden).unflatten(-1, (self.heads, -1)).split(self.parts, dim=-1)
        key, gate = key.tanh(), gate.sigmoid()
        content = more[0].tanh() if more else key
        least = self.least_used(usage)
        target = least if self.write_to == "one" else least.sum(1, keepdim=True)
        write = gate * read + (1 - gate) * target[:, None]
        kept = memory * (1 - least[:, 0, :, None])  # the least used slot of all is emptied first
        if last:
            after = _Versions(kept, write, content)
            read = (after.cosine(key) if self.read_weights == "after" else _cosine(key, memory)).softmax(-1)
            return hidden, cell, after.read(read).flatten(-2)
        # one example: written out, which takes half of the operations
        whole = torch.baddbmm(kept, write[:, 0].mT, content[:, 0])
        read = _cosine(key, whole if self.read_weights == "after" else memory).softmax(-1)
        # the usage only decides where to write, and no gradient passes a decision: it needs no graph
        usage = self.decay * usage + (read + write).detach().sum((1, 2))
        return hidden, cell, _read(read, whole).flatten(-2), whole, read, usage

    def least_used(self, usage: Tensor) -> Tensor:
        """The `heads` least used slots of usage (T, slots), the least first, as one-hot rows: a constant."""
        order = usage.argsort(dim=-1, stable=True)[:, : self.heads]
        return F.one_hot(order, self.slots).to(usage.dtype)

    def exposed(self, state: State) -> Tensor:
        """See `SequenceLearner.exposed`: the hidden state and the read vectors."""
        return torch.cat([state[0], state[2]], dim=-1)


def build(
    problem: Problem,
    *,
    units: int = 200,
    slots: int = 128,
    width: int = 40,
    heads: int = 4,
    decay: float = 0.95,
    written: Literal["own", "key"] = "own",
    write_to: Literal["one", "all"] = "one",
    read_weights: Literal["after", "before"] = "after",
    image_size: int | None = None,
    scale: Literal["max", "none"] = "max",
    forget_bias: float = 1.0,
    lr: float = 1e-3,
    schedule: Literal["constant", "cosine", "halving"] = "constant",
    finetune_steps: int = 0,
    finetune_lr: float = 0.01,
) -> Mann:
    """MANN for `problem`.

    Args:
        problem: the inputs' shape and the ways.
        units: of the LSTM.
        slots: of the memory.
        width: numbers in a slot.
        heads: read heads, and as many write heads.
        decay: of the usage, at each step.
        written: what a head writes: a vector of its own, or its key.
        write_to: the share (1 - gate) of a head goes to one least used slot, or to all of them.
        read_weights: whether heads compare their keys with the memory after writing, or before.
        image_size: images are average-pooled to this height and width; None: taken as they are.
        scale: `max` divides an image by its brightest pixel.
        forget_bias: initial bias of the LSTM's forget gate.
        lr: rate of Adam.
        schedule: how it moves over the training.
        finetune_steps: gradient steps of the output layer on support sets, in evaluation; not the paper's. None on
            streams (see `metabench.algorithms.sequence`).
        finetune_lr: their size.

    Raises:
        ConfigError: a size that is not possible, negative steps, or a problem without ways.
    """
    return Mann(
        problem,
        units=units,
        slots=slots,
        width=width,
        heads=heads,
        decay=decay,
        written=written,
        write_to=write_to,
        read_weights=read_weights,
        image_size=image_size,
        scale=scale,
        forget_bias=forget_bias,
        lr=lr,
        schedule=schedule,
        finetune=Finetune(steps=finetune_steps, lr=finetune_lr),
    )
