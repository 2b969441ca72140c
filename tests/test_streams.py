"""Streams: sequences in which classes come again, no drawing does, and nothing tells which class is next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metabench.episodes import ImageData, Stream
from metabench.errors import ConfigError


def streams(start: int = 0, tasks: int = 4, length: int = 15, *, per_class: int = 6, **more: Any) -> Stream:
    data = small(per_class)
    bound = data.tasks(
        "test",
        ways=3,
        shots=1,
        queries=1,
        rotations=more.pop("rotations", "none"),
        seed=more.pop("seed", 0),
        device="cpu",
    )
    return bound.streams(start, tasks, length, **more)


def small(per_class: int) -> ImageData:
    """Every drawing has a value of its own: class * per_class + number."""
    values = np.arange(8 * per_class, dtype=np.uint8).reshape(8, per_class, 1, 1)
    images = np.broadcast_to(values, (8, per_class, 4, 4)).copy()
    subsets = {"train": np.arange(4), "val": np.arange(0), "test": np.arange(4, 8)}
    return ImageData("small", "1", "only", images, tuple("abcdefgh"), subsets)


def values(stream: Stream) -> np.ndarray:
    """The number of each drawing shown."""
    return (stream.x[:, :, 0, 0, 0] * 255).round().long().numpy()


@pytest.mark.parametrize("composition", ["random", "equal"])
@pytest.mark.parametrize("length", [3, 15, 18])
def test_no_drawing_comes_twice_in_a_stream(composition: Any, length: int) -> None:
    stream = streams(tasks=50, length=length, composition=composition)
    seen = values(stream)
    assert stream.x.shape == (50, length, 1, 4, 4) and stream.y.shape == (50, length)
    assert all(len(set(row)) == length for row in seen)
    assert stream.classes is not None
    assert (np.take_along_axis(stream.classes, stream.y.numpy(), 1) == seen // 6).all()
    assert (stream.classes >= 4).all() and len({tuple(row) for row in stream.classes}) > 10
    counts = stream.one_hot().sum(1)
    assert (counts == length // 3).all() == (composition == "equal" or length == 18)


def test_each_step_of_a_random_stream_draws_its_class_anew() -> None:
    """So counting what was shown does not tell what comes: with equal counts the last step would be certain."""
    random, equal = (streams(tasks=2000, length=6, composition=c) for c in ("random", "equal"))  # type: ignore[arg-type]
    for stream, repeats in ((random, 1 / 3), (equal, 1 / 5)):
        same = float((stream.y[:, 1:] == stream.y[:, :-1]).float().mean())
        assert abs(same - repeats) < 4 * (repeats / 10000) ** 0.5
    for step in range(6):
        assert random.y[:, step].bincount(minlength=3).min() > 2000 / 3 - 100


def test_a_stream_is_a_function_of_its_index_and_of_nothing_else() -> None:
    whole, part = streams(0, 6), streams(2, 3)
    assert torch.equal(whole.x[2:5], part.x) and torch.equal(whole.y[2:5], part.y) and whole.ids[2:5] == part.ids
    assert torch.equal(whole.seeds[2:5], part.seeds) and len(set(whole.ids)) == 6
    picked = whole.pick(slice(2, 5))
    assert picked.ids == part.ids and torch.equal(picked.seeds, part.seeds) and torch.equal(picked.x, part.x)
    assert not torch.equal(streams(0, 6, seed=1).x, whole.x)
    assert not torch.equal(streams(0, 6, length=14).x, whole.x[:, :14])
    other = small(6).tasks("test", ways=3, shots=2, queries=3, rotations="none", seed=0, device="cpu")
    assert torch.equal(other.streams(0, 6, 15).x, whole.x) and other.streams(0, 6, 15).ids == whole.ids
    assert streams(0, 6, length=18).ids != whole.ids


@pytest.mark.parametrize("rotations", ["classes", "per_class", "episode", "train_only"])
def test_streams_turn_as_episodes_do(rotations: Any) -> None:
    stream = streams(rotations=rotations, length=18, per_class=6)
    assert stream.classes is not None and (stream.classes < 8).all()
    assert (np.take_along_axis(stream.classes, stream.y.numpy(), 1) == values(stream) // 6).all()


def test_presentations_count_from_one() -> None:
    stream = Stream(torch.zeros(1, 6, 1), torch.tensor([[1, 0, 1, 1, 2, 0]]), 3, torch.zeros(1, dtype=torch.int64))
    assert stream.presentations().tolist() == [[1, 1, 2, 3, 1, 2]]


def test_impossible_streams_are_explained() -> None:
    with pytest.raises(ConfigError, match="a stream of 19 images: 3 classes have 18 drawings in all"):
        streams(length=19)
    with pytest.raises(ConfigError, match="10 images are no equal number of each of 3 classes"):
        streams(length=10, composition="equal")
    with pytest.raises(ConfigError, match="streams need a number of ways"):
        small(6).tasks("test", ways=None, shots=1, queries=1, rotations="none", seed=0, device="cpu").streams(0, 1, 5)
