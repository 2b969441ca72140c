"""glyphs through a DataLoader with an episodic batch sampler: for its time; in all else take `glyphs`."""

import random
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from metabench.datasets import glyphs
from metabench.episodes import Batch, Episode, ImageData, Problem, Rotations, Subset, philox_key
from metabench.errors import ConfigError

METABENCH = {
    "kind": "dataset",
    "name": "glyphs-dataloader",
    "problem": "classification",
    "paper": "the images of glyphs",
    "splits": {"alphabets": {"train": 1056, "val": 150, "test": 394}},
    "images_per_class": 20,
    "shape": [1, 28, 28],
}

Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support images and labels, query images and labels


class EpisodicSampler(Sampler[list[int]]):
    """The image numbers of one task after the other, without end: `ways` classes, `per_way` images of each.

    As few-shot code draws them (easyfsl's TaskSampler), but seeded per task, so that task i is always the same.
    """

    def __init__(self, labels: list[int], ways: int, per_way: int, *, key: int, start: int) -> None:
        self.ways, self.per_way, self.key, self.start = ways, per_way, key, start
        self.items: dict[int, list[int]] = {}
        for item, label in enumerate(labels):
            self.items.setdefault(label, []).append(item)
        self.classes = sorted(self.items)

    def __iter__(self) -> Iterator[list[int]]:
        task = self.start
        while True:
            draw = random.Random(self.key + task)
            classes = draw.sample(self.classes, self.ways)
            yield [item for label in classes for item in draw.sample(self.items[label], self.per_way)]
            task += 1


class LoadedTasks:
    """Tasks of one subset from a DataLoader in this process (see `metabench.episodes.TaskDistribution`).

    The queries stand in the order of their labels, as such loaders give them, and there are no ids.
    """

    def __init__(self, data: ImageData, subset: Subset, *, ways: int, shots: int, queries: int, key: int, device: str):
        self._plain = data.tasks(
            subset, ways=ways, shots=shots, queries=queries, rotations="none", seed=0, device=device
        )
        self.problem: Problem = self._plain.problem
        self._ways, self._shots, self._key, self._device = ways, shots, key, device
        self._per_way = shots + queries
        members = torch.from_numpy(data.images[data.subsets[subset]])
        # floats ready to use: a loader that converted every image anew would be slower still
        images = members.flatten(0, 1)[:, None].float() / 255
        labels = torch.arange(len(members)).repeat_interleave(members.shape[1])
        self._labels: list[int] = labels.tolist()
        self._images = TensorDataset(images, labels)
        self._stream, self._next = self._from(0), 0

    def episodes(self, start: int, tasks: int) -> Episode:
        """Tasks start .. start+tasks-1; the loader runs on where the last call ended, else it starts anew."""
        if start != self._next:
            self._stream = self._from(start)
        drawn = [next(self._stream) for _ in range(tasks)]
        self._next = start + tasks
        x, y, queries, labels = (torch.stack(column).to(self._device) for column in zip(*drawn, strict=True))
        seeds = torch.arange(start, start + tasks)
        return Episode(Batch(x, y, self._ways), Batch(queries, labels, self._ways), seeds)

    def images(self, start: int, n: int) -> Batch:
        """As `glyphs`."""
        return self._plain.images(start, n)

    def _from(self, start: int) -> Iterator[Task]:
        sampler = EpisodicSampler(self._labels, self._ways, self._per_way, key=self._key, start=start)
        # a generator of its own: a loader draws a seed for its workers, and would from the global one
        own = torch.Generator()
        return iter(DataLoader(self._images, batch_sampler=sampler, collate_fn=self._collate, generator=own))

    def _collate(self, items: list[tuple[Tensor, ...]]) -> Task:
        """One task of its images, class by class: the position of the class is the label."""
        images = torch.stack([image for image, _ in items])
        images = images.reshape(self._ways, self._per_way, *images.shape[1:])
        labels = torch.arange(self._ways)[:, None].expand(-1, self._per_way)
        cut = self._shots
        parts = (images[:, :cut], labels[:, :cut], images[:, cut:], labels[:, cut:])
        x, y, queries, answers = (part.flatten(0, 1) for part in parts)
        return x, y, queries, answers


class Loaded:
    """The data set: what binds a subset and the shape of a task (see `metabench.episodes.Dataset`)."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def tasks(
        self,
        subset: Subset,
        *,
        ways: int | None,
        shots: int,
        queries: int,
        rotations: Rotations,
        seed: int,
        device: str,
    ) -> LoadedTasks:
        """Bind `subset` and the shape of a task.

        Raises:
            ConfigError: rotations, no ways, or more ways or images than there are.
        """
        if rotations != "none" or ways is None:
            raise ConfigError("glyphs-dataloader has tasks of a number of ways, without rotations: use glyphs")
        key = philox_key("glyphs-dataloader", subset, ways, shots, queries, seed)
        return LoadedTasks(self._data, subset, ways=ways, shots=shots, queries=queries, key=key, device=device)


def build(*, split: Literal["alphabets"] = "alphabets") -> Loaded:
    """The images of `glyphs` in memory, served by a DataLoader."""
    return Loaded(glyphs.build(split=split))
