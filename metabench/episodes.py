"""Tasks and episodes: what an algorithm is trained on and judged by.

The task axis always comes first: a `Batch` holds T tasks at once, `x` is (T, n, *shape). Every episode is a pure
function of (data set and version, split, subset, ways, shots, queries, rotations, seed, index), made from
counter-based Philox words: episode i never depends on how many episodes were asked for before it, so that
resuming a training is setting a counter, and all algorithms, versions and machines see the same test episodes.
Image data sets live as one uint8 tensor on the device; sampling is index arithmetic plus one gather.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from metabench.errors import ConfigError, DataError

Loss = Literal["cross_entropy", "mse"]
Subset = Literal["train", "val", "test"]
Rotations = Literal["none", "classes", "per_class", "train_only", "episode"]
Within = Literal["none", "alphabet", "drawer"]

EMBED_AT_ONCE = 512  # images per call when a whole subset is embedded
WORDS_PER_COUNTER = 4  # one Philox-4x64 counter value yields four 64-bit words


@dataclass(frozen=True)
class Problem:
    """What there is to learn: one input of `shape` -> `ways` logits, or `outputs` numbers.

    `classes` counts all classes of the subset the tasks are drawn from (what plain classification training needs).
    """

    shape: tuple[int, ...]
    loss: Loss
    ways: int | None = None
    classes: int | None = None
    outputs: int = 1


@dataclass(frozen=True)
class Batch:
    """Labelled examples of T tasks: x (T, n, *shape); y (T, n) int64 in 0..ways-1, or (T, n, d) targets."""

    x: Tensor
    y: Tensor
    ways: int | None  # travels with the data: never inferred from y.max()

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return self.x.shape[0]

    def one_hot(self) -> Tensor:
        """Labels as (T, n, ways) floats of x's type."""
        if self.ways is None:
            raise ValueError("one_hot needs class labels")
        return torch.nn.functional.one_hot(self.y, self.ways).to(self.x.dtype)

    def pick(self, tasks: slice) -> Batch:
        """The same batch for a slice of its tasks."""
        return replace(self, x=self.x[tasks], y=self.y[tasks])


@dataclass(frozen=True)
class Episode:
    """T tasks: labelled support and query sets, one random seed and one content hash per task.

    `classes` (T, ways) are the class numbers behind the labels, for class-wise statistics only; no algorithm reads it.
    """

    support: Batch
    query: Batch
    seeds: Tensor  # (T,) int64
    ids: tuple[str, ...] = ()
    classes: np.ndarray | None = None


@dataclass(frozen=True)
class Stream(Batch):
    """T sequences of L images in which classes come again and again; the order is part of the task.

    At each step a class is to be named from what was shown before (Santoro et al. 2016): labels come one step late.
    """

    seeds: Tensor  # (T,) int64
    ids: tuple[str, ...] = ()
    classes: np.ndarray | None = None  # (T, ways), as an episode's

    def presentations(self) -> Tensor:
        """How often the class of each step (T, L) was shown by then, this step included: 1, 2, ..."""
        return self.one_hot().cumsum(1).gather(-1, self.y[..., None])[..., 0].long()

    def pick(self, tasks: slice) -> Stream:
        """See `Batch.pick`."""
        classes = None if self.classes is None else self.classes[tasks]
        return replace(
            self, x=self.x[tasks], y=self.y[tasks], seeds=self.seeds[tasks], ids=self.ids[tasks], classes=classes
        )


Composition = Literal["random", "equal"]


class TaskDistribution(Protocol):
    """A data set's subset with ways, shots, queries and rotations already bound."""

    problem: Problem

    def episodes(self, start: int, tasks: int) -> Episode:
        """Tasks start .. start+tasks-1; task i is the same whatever `start` and `tasks` are."""
        ...

    def images(self, start: int, n: int) -> Batch:
        """Examples start .. start+n-1 of a plain stream, T = 1, y over all classes of the subset."""
        ...

    def streams(self, start: int, tasks: int, length: int) -> Stream:
        """Sequences start .. start+tasks-1 of `length` images, each the same whatever `start` and `tasks` are."""
        ...


class Dataset(Protocol):
    """What a data-set plug-in's `build` returns."""

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
    ) -> TaskDistribution:
        """Bind a subset and the shape of a task; `within=` comes too where the data set declares it and a task asks."""
        ...


def philox_key(*coordinates: object) -> int:
    """A 128-bit Philox key from coordinates (their text): unequal coordinates give unrelated streams."""
    text = "\x1f".join(str(c) for c in coordinates)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def words(key: int, start: int, rows: int, width: int) -> np.ndarray:
    """Random 64-bit words (rows, width): row r is a pure function of (key, start + r, width)."""
    counters = -(-width // WORDS_PER_COUNTER)
    stream = np.random.Philox(key=key, counter=start * counters)
    raw = stream.random_raw(rows * counters * WORDS_PER_COUNTER)
    return raw.reshape(rows, counters * WORDS_PER_COUNTER)[:, :width]


def smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` smallest keys of the last axis in rising order: a draw without replacement."""
    if count == keys.shape[-1]:
        return np.argsort(keys, axis=-1, kind="stable")
    few = _smallest_of_many(keys, count)
    if few is not None:
        return few
    picked = np.argpartition(keys, count, axis=-1)[..., :count]
    order = np.argsort(np.take_along_axis(keys, picked, -1), axis=-1, kind="stable")
    return np.take_along_axis(picked, order, -1)


def _smallest_of_many(keys: np.ndarray, count: int) -> np.ndarray | None:
    """The same in less time where few of many are drawn: uniform words below a low bound are few, and sorted alone.

    None where that does not pay, or a row has too few words below the bound.
    """
    size = keys.shape[-1]
    share = (count + 4 * count**0.5 + 8) / size
    if share > 0.25:
        return None
    rows = keys.reshape(-1, size)
    row, position = np.nonzero(rows < np.uint64(share * 2**64))
    found = np.bincount(row, minlength=len(rows))
    if found.min() < count:
        return None
    order = np.lexsort((rows[row, position], row))
    first = np.cumsum(found) - found
    picked: np.ndarray = position[order][first[:, None] + np.arange(count)]
    return picked.reshape(*keys.shape[:-1], count)


def scaled(word: np.ndarray, bound: int) -> np.ndarray:
    """Words to integers in 0..bound-1 (the bias of at most bound / 2^53 is far below anything measurable)."""
    unit = (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.minimum((unit * bound).astype(np.int64), bound - 1)


def task_seeds(word: np.ndarray) -> np.ndarray:
    """Words to non-negative int64 seeds."""
    return (word >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class ImageData:
    """An image data set: images uint8 (C, n, H, W), strokes or objects bright on 0; `subsets` name class numbers.

    `version` is part of the identity of every episode: change the pixels, change the version.

    Raises:
        DataError: pixels of another type or shape, or subsets that share a class or name one that is not there.
    """

    name: str
    version: str
    split: str
    images: np.ndarray
    classes: tuple[str, ...]
    subsets: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or len(self.images) != len(self.classes):
            shape = f"{self.images.dtype} {self.images.shape}"
            raise DataError(f"{self.name}: images must be uint8 ({len(self.classes)}, n, H, W), not {shape}")
        members = np.concatenate([np.asarray(m, dtype=np.int64) for m in self.subsets.values()])
        if len(np.unique(members)) < len(members):
            raise DataError(f"{self.name}[{self.split}]: a class stands in two subsets: train, val and test never meet")
        if members.size and not 0 <= members.min() <= members.max() < len(self.classes):
            raise DataError(f"{self.name}[{self.split}]: a subset names a class outside 0..{len(self.classes) - 1}")

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
        within: Within = "none",
    ) -> ImageTasks:
        """Bind `subset` and the shape of a task.

        Raises:
            ConfigError: ways above the subset's classes (of any alphabet, for tasks within one), or shots + queries
                above the images of a class.
        """
        return ImageTasks(self, subset, ways, shots, queries, rotations, seed, device, within)

    @functools.cached_property
    def alphabets(self) -> np.ndarray:
        """Per class the number of its alphabet: what its name says before the slash."""
        numbers: np.ndarray = np.unique([name.rpartition("/")[0] for name in self.classes], return_inverse=True)[1]
        return numbers

    @functools.cached_property
    def pixels_hash(self) -> str:
        """Hash of the pixels themselves; every row keeps it."""
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _bank(data: ImageData, rotated: bool, device: str) -> Tensor:
    """All images as one uint8 tensor (angles * C * n, 1, H, W) on the device; angle-major when rotated."""
    angles = [np.rot90(data.images, k, axes=(-2, -1)) for k in range(4 if rotated else 1)]
    stack = np.stack([np.ascontiguousarray(a) for a in angles])
    return torch.from_numpy(stack).reshape(-1, 1, *data.images.shape[-2:]).to(device)


def _left_to_draw(labels: np.ndarray, ways: int, per_class: int) -> np.ndarray:
    """Labels (T, L), where a class has no drawings left changed to the next one that has."""
    labels = labels.copy()
    for row in labels:
        if np.bincount(row).max() > per_class:
            left = np.full(ways, per_class)
            for step, label in enumerate(row):
                row[step] = next(c for c in (label + np.arange(ways)) % ways if left[c])
                left[row[step]] -= 1
    return labels


class ImageTasks:
    """N-way K-shot tasks over one subset of an `ImageData` (see `TaskDistribution`).

    Rotations (multiples of 90 degrees; reference names who uses which):
    `none`; `classes`: each angle is a class of its own, in all subsets (Snell et al. 2017); `per_class`: a random
    angle per class and episode (Finn et al. 2017); `train_only`: as `classes` in training, none in val and test
    (Nichol et al. 2018); `episode`: one random angle for all classes of an episode (Sung et al. 2018).

    Within: `alphabet` draws an alphabet for each episode, among those that have the ways, and its classes from that
    alphabet at one angle: the hard tasks of Omniglot (Lake et al. 2015). `drawer` does so too, and shows every class
    by the same drawings' numbers: in Omniglot all support by the same hands, all queries by others (Koch et al. 2015).
    """

    def __init__(
        self,
        data: ImageData,
        subset: Subset,
        ways: int | None,
        shots: int,
        queries: int,
        rotations: Rotations,
        seed: int,
        device: str,
        within: Within = "none",
    ) -> None:
        as_classes = rotations == "classes" or (rotations == "train_only" and subset == "train")
        members = np.asarray(data.subsets[subset], dtype=np.int64)
        count, per_class = len(data.classes), data.images.shape[1]
        angles = 4 if as_classes else 1
        # a "class" below is angle * C + class number
        self._pool = np.concatenate([members + angle * count for angle in range(angles)])
        self._count, self._per_class = count, per_class
        self._ways, self._shots, self._queries = ways, shots, queries
        self._turn: Literal["per_class", "episode", "none"] = (
            "per_class" if rotations == "per_class" else "episode" if rotations == "episode" else "none"
        )
        self._within = within
        self._check(data.name, subset)
        self._groups = None if within == "none" else self._groups_of(data)
        self._bank = _bank(data, rotations != "none", device)
        self._scale = 1 / 255
        drawn = (rotations,) if within == "none" else (rotations, within)
        self._key = philox_key(data.name, data.version, data.split, subset, ways, shots, queries, *drawn, seed)
        self._of_streams = (data.name, data.version, data.split, subset, ways, "streams", rotations, seed)
        names = hashlib.sha256("\n".join(data.classes).encode()).hexdigest()
        self._named = f"{data.name}\x1f{data.version}\x1f{names}\x1f".encode()
        self._prefix = self._named + f"{shots}\x1f".encode()
        self._hashed = subset != "train"
        self.problem = Problem(
            shape=(1, *data.images.shape[-2:]), loss="cross_entropy", ways=ways, classes=len(self._pool)
        )

    def _check(self, name: str, subset: str) -> None:
        if self._ways is not None and self._ways > len(self._pool):
            raise ConfigError(f"{self._ways} ways, but {name} has {len(self._pool)} classes in its {subset} set")
        if self._shots + self._queries > self._per_class:
            raise ConfigError(
                f"{self._shots} shots + {self._queries} queries, but {name} has {self._per_class} images per class"
            )

    def _groups_of(self, data: ImageData) -> np.ndarray:
        """Which of the pool's classes an episode may be drawn from: bool (alphabets, pool), those with enough classes.

        Raises:
            ConfigError: no alphabet has so many classes.
        """
        # rotated classes are alphabets of their own
        alphabets = data.alphabets[self._pool % self._count] + self._pool // self._count * len(data.classes)
        groups = alphabets == np.unique(alphabets)[:, None]
        sizes: np.ndarray = groups.sum(1)
        if self._ways is not None and self._ways > sizes.max():
            raise ConfigError(
                f"{self._ways} ways within one alphabet, but the largest of {data.name} here has {sizes.max()} classes"
            )
        large: np.ndarray = groups[sizes >= (self._ways or 1)]
        return large

    def _drawn_from(self, keys: np.ndarray, start: int) -> np.ndarray:
        """The random keys (T, pool) of classes, those outside the task's alphabet put last."""
        if self._groups is None:
            return keys
        group = scaled(words(self._key ^ 3, start, len(keys), 1)[:, 0], len(self._groups))
        return np.where(self._groups[group], keys, np.iinfo(np.uint64).max)

    def episodes(self, start: int, tasks: int) -> Episode:
        """Tasks start .. start+tasks-1: support (T, ways*shots) ordered by label, query (T, ways*queries) shuffled."""
        if self._ways is None:
            raise ConfigError("episodes need a number of ways")
        ways, pool, per_class = self._ways, len(self._pool), self._per_class
        raw = words(self._key, start, tasks, 2 + pool + ways + ways * per_class)
        seeds, turn, keys, turns, drawings = np.split(raw, np.cumsum([1, 1, pool, ways]), axis=1)
        # (T, ways): the order is the label, random per task
        classes = self._turned(self._pool[smallest(self._drawn_from(keys, start), ways)], turn, turns)
        drawings = drawings.reshape(tasks, ways, per_class)
        if self._within == "drawer":
            drawings = np.broadcast_to(drawings[:, :1], drawings.shape)
        picks = smallest(drawings, self._shots + self._queries)
        index = classes[:, :, None] * per_class + picks
        ids = self._ids(classes, picks) if self._hashed else ()
        # the order of the queries must not give their labels away
        order = smallest(words(self._key ^ 2, start, tasks, ways * self._queries), ways * self._queries)
        return Episode(
            support=self._gather(index[:, :, : self._shots]),
            query=self._gather(index[:, :, self._shots :], order),
            seeds=torch.from_numpy(task_seeds(seeds[:, 0])),
            ids=ids,
            classes=classes % self._count,
        )

    def images(self, start: int, n: int) -> Batch:
        """n images drawn uniformly from the whole subset: x (1, n, 1, H, W), y (1, n) over all its classes."""
        key = self._key ^ 1  # another stream than the episodes'
        raw = words(key, start, n, 3)
        label, drawing = scaled(raw[:, 0], len(self._pool)), scaled(raw[:, 1], self._per_class)
        classes = self._pool[label]
        if self._turn != "none":
            classes = classes + self._count * scaled(raw[:, 2], 4)
        index = torch.from_numpy(classes * self._per_class + drawing)[None]
        x = self._pixels(index)
        return Batch(x, torch.from_numpy(label)[None].to(x.device), ways=len(self._pool))

    def streams(self, start: int, tasks: int, length: int, *, composition: Composition = "random") -> Stream:
        """Streams start .. start+tasks-1: x (T, length, 1, H, W), no drawing twice in one.

        Composition: `random` draws the class of each step anew, among those that have drawings left; `equal` shows
        every class equally often, which lets the last steps be guessed by counting. Shots and queries play no part.

        Raises:
            ConfigError: no ways, or a length that the drawings of a class, or equal counts, do not allow; or within
                an alphabet, which streams are never drawn from.
        """
        if self._ways is None:
            raise ConfigError("streams need a number of ways")
        if self._within != "none":
            raise ConfigError("a stream is drawn from all classes: leave `within` out")
        ways, pool, per_class = self._ways, len(self._pool), self._per_class
        if not 1 <= length <= ways * per_class:
            raise ConfigError(f"a stream of {length} images: {ways} classes have {ways * per_class} drawings in all")
        if composition == "equal" and length % ways:
            raise ConfigError(f"{length} images are no equal number of each of {ways} classes: make it a multiple")
        key = philox_key(*self._of_streams, length, composition)
        raw = words(key, start, tasks, 2 + pool + ways + ways * per_class + length)
        seeds, turn, keys, turns, drawings, steps = np.split(
            raw, np.cumsum([1, 1, pool, ways, ways * per_class]), axis=1
        )
        classes = self._turned(self._pool[smallest(keys, ways)], turn, turns)
        if composition == "equal":
            labels = smallest(steps, length) % ways
        else:
            labels = _left_to_draw(scaled(steps, ways), ways, per_class)
        shown = np.cumsum(labels[:, :, None] == np.arange(ways), axis=1) - 1
        rank = np.take_along_axis(shown, labels[:, :, None], 2)[:, :, 0]
        deck = smallest(drawings.reshape(tasks, ways, per_class), per_class)
        rows = np.arange(tasks)[:, None]
        index = classes[rows, labels] * per_class + deck[rows, labels, rank]
        x = self._pixels(torch.from_numpy(index))
        return Stream(
            x,
            torch.from_numpy(labels).to(x.device),
            ways,
            torch.from_numpy(task_seeds(seeds[:, 0])),
            self._stream_ids(index, labels) if self._hashed else (),
            classes % self._count,
        )

    def _turned(self, classes: np.ndarray, turn: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Classes (T, ways) at the angles that random words choose for the task (T, 1), or for each (T, ways)."""
        if self._turn == "none":
            return classes
        turned: np.ndarray = classes + self._count * scaled(turns if self._turn == "per_class" else turn, 4)
        return turned

    @property
    def images_in_all(self) -> int:
        """How many images `features` embeds: the subset's, at every angle that its episodes may show."""
        return len(self._rows())

    def features(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """`embed` of every image of the subset: a table (images, d) for `over`, zeros elsewhere."""
        table: Tensor | None = None
        for part in torch.split(torch.from_numpy(self._rows()), EMBED_AT_ONCE):
            z = embed(self._pixels(part[None])[0])
            table = z.new_zeros((len(self._bank), z.shape[1])) if table is None else table
            table[part.to(z.device)] = z
        assert table is not None
        return table

    def _rows(self) -> np.ndarray:
        """The numbers of the subset's images in the bank."""
        members = np.unique(self._pool % self._count)
        angles = np.arange(len(self._bank) // (self._count * self._per_class))
        classes = (angles[:, None] * self._count + members).reshape(-1)
        rows: np.ndarray = classes[:, None] * self._per_class + np.arange(self._per_class)
        return rows.reshape(-1)

    def over(self, features: Tensor) -> ImageTasks:
        """The same tasks with features (T, n, d) of the images in the place of their pixels."""
        same = copy.copy(self)
        same._bank, same._scale = features, 1.0
        return same

    def _gather(self, index: np.ndarray, order: np.ndarray | None = None) -> Batch:
        """Images (T, ways, per way) as a batch, its label the position of the way; `order` (T, n) shuffles it."""
        tasks, ways, per_way = index.shape
        flat = index.reshape(tasks, -1)
        labels = np.broadcast_to(np.repeat(np.arange(ways), per_way), flat.shape)
        if order is not None:
            flat, labels = np.take_along_axis(flat, order, 1), np.take_along_axis(labels, order, 1)
        x = self._pixels(torch.from_numpy(flat))
        return Batch(x, torch.from_numpy(labels.copy()).to(x.device), ways=ways)

    def _pixels(self, index: Tensor) -> Tensor:
        """Image numbers (T, n) -> float32 (T, n, 1, H, W) in [0, 1]."""
        rows = self._bank.index_select(0, index.flatten().to(self._bank.device))
        x = rows * self._scale  # of uint8: converted and scaled in one pass
        return x.reshape(*index.shape, *x.shape[1:])

    def _ids(self, classes: np.ndarray, picks: np.ndarray) -> tuple[str, ...]:
        """A content hash per task: data version, class names, shots, rotation, drawings, label order; not pixels."""
        table = np.concatenate([classes[:, :, None], picks], axis=2).astype("<i4")
        return tuple(hashlib.sha256(self._prefix + row.tobytes()).hexdigest()[:16] for row in table)

    def _stream_ids(self, index: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
        """A content hash per stream: data version, class names, drawings at their angles and labels in their order."""
        table = np.stack([index, labels], axis=2).astype("<i4")
        return tuple(hashlib.sha256(self._named + b"stream\x1f" + row.tobytes()).hexdigest()[:16] for row in table)
