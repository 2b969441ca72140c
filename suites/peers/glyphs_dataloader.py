"""glyphs through a DataLoader with an episodic batch sampler: for its time; in all else take `glyphs`."""

import random
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from metabench.datasets import glyphs
from metabench.episodes import Batch, Episode, ImageData, ImageTasks, Problem, Rotations, Subset, philox_key
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

Item = tuple[Tensor, int]  # an image (1, H, W) in 0..1, its class number
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support images and labels, query images and labels


class Images(Dataset[Item]):
    """Images in memory, one at a time: bytes that become floats when asked for, or `floats` from the start."""

    def __init__(self, images: Tensor, labels: list[int], *, floats: bool) -> None:
        self.images = images.float() / 255 if floats else images
        self.labels, self.floats = labels, floats

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        image = self.images[index]
        return image if self.floats else image.float() / 255, self.labels[index]


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

    def __init__(self, images: Images, plain: ImageTasks, *, shots: int, queries: int, key: int, device: str) -> None:
        assert plain.problem.ways is not None
        self.problem: Problem = plain.problem
        self._images, self._plain, self._key, self._device = images, plain, key, device
        self._ways, self._shots, self._per_way = plain.problem.ways, shots, shots + queries
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
        sampler = EpisodicSampler(self._images.labels, self._ways, self._per_way, key=self._key, start=start)
        # a generator of its own: a loader draws a seed for its workers, and would from the global one
        own = torch.Generator()
        return iter(DataLoader(self._images, batch_sampler=sampler, collate_fn=self._collate, generator=own))

    def _collate(self, items: list[Item]) -> Task:
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

    def __init__(self, data: ImageData, *, floats: bool) -> None:
        self._data, self._floats = data, floats

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
        plain = self._data.tasks(
            subset, ways=ways, shots=shots, queries=queries, rotations=rotations, seed=seed, device=device
        )
        members = torch.from_numpy(self._data.images[self._data.subsets[subset]])
        labels = [label for label in range(len(members)) for _ in range(members.shape[1])]
        images = Images(members.flatten(0, 1)[:, None], labels, floats=self._floats)
        key = philox_key("glyphs-dataloader", subset, ways, shots, queries, seed)
        return LoadedTasks(images, plain, shots=shots, queries=queries, key=key, device=device)


def build(*, split: Literal["alphabets"] = "alphabets", store: Literal["uint8", "float32"] = "uint8") -> Loaded:
    """The images of `glyphs` in memory as bytes, as `glyphs` has them, or as floats; served by a DataLoader."""
    return Loaded(glyphs.build(split=split), floats=store == "float32")
