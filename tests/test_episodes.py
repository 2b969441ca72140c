"""Episodes are pure functions of their coordinates, and hold what they say."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench.episodes import Batch, Episode, ImageData, ImageTasks, philox_key, scaled, smallest, words
from metabench.errors import ConfigError, DataError

COUNT, PER_CLASS, SIDE = 14, 6, 5
SUBSETS = {"train": np.arange(8), "val": np.arange(8, 10), "test": np.arange(10, 14)}
GOLDEN_IDS = ("b577a81cc17432b8", "1dfac0f9d586f7b0", "12f62c4c831a2952")
GOLDEN_TURNED = ("2583b1aa999357ab",)
GOLDEN_PIXELS = "5b77fc64be3c8634"
GOLDEN_SEEDS = [5561512949586426135, 5240886936998108384]
ROTATIONS = ("none", "classes", "per_class", "train_only", "episode")


def coded() -> np.ndarray:
    """Images that say what they are: pixel (0, 0) the class, (0, 1) the drawing, (0, 2) a mark to tell the angle."""
    images = np.zeros((COUNT, PER_CLASS, SIDE, SIDE), np.uint8)
    images[:, :, 0, 0] = np.arange(COUNT)[:, None] + 1
    images[:, :, 0, 1] = np.arange(PER_CLASS)[None] + 101
    images[:, :, 0, 2] = 255
    return images


def make(**changes: object) -> ImageData:
    fields: dict[str, object] = {
        "name": "coded",
        "version": "1",
        "split": "only",
        "images": coded(),
        "classes": tuple(f"class {i}" for i in range(COUNT)),
        "subsets": SUBSETS,
    }
    return ImageData(**(fields | changes))  # type: ignore[arg-type]


DATA = make()


def bind(subset: str = "train", rotations: str = "none", **options: object) -> ImageTasks:
    spec: dict[str, object] = {"ways": 3, "shots": 2, "queries": 3, "seed": 0, "device": "cpu"}
    data = options.pop("data", DATA)
    return data.tasks(subset, rotations=rotations, **(spec | options))  # type: ignore[attr-defined, no-any-return]


def read(x: torch.Tensor) -> np.ndarray:
    """(class, drawing, angle) of every image of x (T, n, 1, H, W): (T, n, 3)."""
    pixels = (x * 255).round().to(torch.int64).numpy()[:, :, 0]
    found = np.full((*pixels.shape[:2], 3), -1)
    for angle in range(4):
        upright = np.rot90(pixels, -angle, axes=(-2, -1))
        here = upright[:, :, 0, 2] == 255
        found[here] = np.stack(
            [upright[:, :, 0, 0] - 1, upright[:, :, 0, 1] - 101, np.full_like(here, angle, int)], -1
        )[here]
    assert (found >= 0).all()
    return found


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.ways == b.ways


@settings(max_examples=40, deadline=None)
@given(
    subset=st.sampled_from(["train", "test"]),
    rotations=st.sampled_from(ROTATIONS),
    ways=st.integers(1, 4),
    shots=st.integers(1, 3),
    start=st.integers(0, 2**40),
    tasks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_episode_is_the_same_however_it_is_asked_for(
    subset: str, rotations: str, ways: int, shots: int, start: int, tasks: int, seed: int
) -> None:
    distribution = bind(subset, rotations, ways=ways, shots=shots, seed=seed)
    together = distribution.episodes(start, tasks)
    for t in range(tasks):
        alone = bind(subset, rotations, ways=ways, shots=shots, seed=seed).episodes(start + t, 1)
        assert same(alone.support, together.support.pick(slice(t, t + 1)))
        assert same(alone.query, together.query.pick(slice(t, t + 1)))
        assert torch.equal(alone.seeds, together.seeds[t : t + 1])
        assert alone.ids == together.ids[t : t + 1]
        assert np.array_equal(alone.classes, together.classes[t : t + 1])  # type: ignore[arg-type, index]


@pytest.mark.parametrize("rotations", ROTATIONS)
@pytest.mark.parametrize("subset", ["train", "val", "test"])
def test_what_an_episode_holds(subset: str, rotations: str) -> None:
    ways = 2
    episode = bind(subset, rotations, ways=ways).episodes(0, 200)
    support, query = read(episode.support.x), read(episode.query.x)
    assert support.shape == (200, ways * 2, 3) and query.shape == (200, ways * 3, 3)
    assert episode.support.y.tolist() == [[0, 0, 1, 1]] * 200  # balanced, ordered by label
    assert episode.query.y.sort(dim=1).values.tolist() == [[0, 0, 0, 1, 1, 1]] * 200
    assert len({tuple(row) for row in episode.query.y.tolist()}) == 20  # every order: none gives a label away
    assert episode.support.ways == episode.query.ways == ways
    assert episode.support.x.dtype == torch.float32
    assert episode.classes is not None
    for task in range(200):
        characters = [
            set(map(tuple, support[task, episode.support.y[task] == label][:, [0, 2]])) for label in range(ways)
        ]
        queried = [set(map(tuple, query[task, episode.query.y[task] == label][:, [0, 2]])) for label in range(ways)]
        assert characters == queried and all(len(one) == 1 for one in characters)  # one (class, angle) per label
        assert len(set.union(*characters)) == ways  # ... and another for each label
        assert [next(iter(one))[0] for one in characters] == episode.classes[task].tolist()
        drawn = list(map(tuple, np.concatenate([support[task], query[task]])))
        assert len(set(drawn)) == len(drawn)  # support and query share no drawing, nor does either repeat one
    assert set(np.unique(support[..., 0])) == set(SUBSETS[subset])  # all classes of the subset, no other


def test_rotations_each_keep_their_convention() -> None:
    def angles(subset: str, rotations: str) -> tuple[np.ndarray, np.ndarray]:
        found = read(bind(subset, rotations, ways=4, shots=1, queries=1).episodes(0, 300).support.x)
        return found[..., 0], found[..., 2]  # (300, 4)

    for subset in ("train", "test"):
        assert not angles(subset, "none")[1].any()
        for convention in ("per_class", "episode"):
            characters, turned = angles(subset, convention)
            assert all(len(set(row)) == 4 for row in characters)  # never the same character twice
            assert set(np.unique(turned)) == {0, 1, 2, 3}
            assert all(len(set(row)) == 1 for row in turned) == (convention == "episode")
    characters, turned = angles("test", "classes")
    assert any(len(set(row)) < 4 for row in characters)  # a character at two angles is two classes
    assert np.array_equal(turned, angles("test", "classes")[1]) and turned.any()
    assert angles("train", "train_only")[1].any() and not angles("test", "train_only")[1].any()
    assert bind("train", "classes").problem.classes == 32 == bind("train", "train_only").problem.classes
    assert bind("test", "train_only").problem.classes == 4 == bind("test", "per_class").problem.classes


LETTERS = make(classes=tuple(f"{'greek' if i < 5 else 'latin' if i < 8 else 'runes'}/{i:02}" for i in range(COUNT)))


@pytest.mark.parametrize("rotations", ["none", "classes", "per_class"])
@pytest.mark.parametrize("within", ["alphabet", "drawer"])
def test_an_episode_within_keeps_to_one_alphabet(within: str, rotations: str) -> None:
    tasks = bind("train", rotations, data=LETTERS, within=within, shots=1, queries=2)
    episode = tasks.episodes(0, 400)
    support, query = read(episode.support.x), read(episode.query.x)
    greek = (support[..., 0] < 5).astype(int)
    assert all(len(set(row)) == 1 for row in greek)
    # an alphabet is drawn, not a class: both come equally often, though one is larger
    assert abs(greek[:, 0].mean() - 0.5) < 0.1
    assert all(len({(c, a) for c, _, a in row}) == 3 for row in support)
    assert set(np.unique(support[..., 0])) == set(range(8))
    if rotations == "classes":
        assert all(len(set(row)) == 1 for row in support[..., 2])  # an alphabet at another angle is another one
    hands = [(set(s), set(q)) for s, q in zip(support[..., 1], query[..., 1], strict=True)]
    assert not any(s & q for s, q in hands) or within == "alphabet"
    assert all(len(s) == 1 and len(q) == 2 for s, q in hands) == (within == "drawer")
    part = tasks.episodes(123, 5)
    assert torch.equal(part.query.x, episode.query.x[123:128])


def test_within_is_part_of_an_episodes_identity_and_needs_the_classes() -> None:
    ids = {
        within: bind("test", "classes", data=LETTERS, within=within).episodes(0, 30).ids
        for within in ("none", "alphabet", "drawer")
    }
    assert len(set().union(*map(set, ids.values()))) == 90
    assert ids["none"] == bind("test", "classes", data=LETTERS).episodes(0, 30).ids
    with pytest.raises(ConfigError, match="6 ways within one alphabet, but the largest of coded here has 5 classes"):
        bind("train", data=LETTERS, within="alphabet", ways=6)
    bind("train", data=LETTERS, within="alphabet", ways=5).episodes(0, 3)
    with pytest.raises(ConfigError, match="drawn from all classes"):
        bind("train", data=LETTERS, within="alphabet").streams(0, 1, 5)


def test_draws_are_uniform() -> None:
    tasks = 8000
    episode = bind("train", "per_class", ways=2, shots=1, queries=1).episodes(0, tasks)
    support, query = read(episode.support.x), read(episode.query.x)
    for found, cells in ((support[..., 0], 8), (support[..., 1], 6), (query[..., 1], 6), (support[..., 2], 4)):
        for label in range(2):
            counts = np.bincount(found[:, label], minlength=cells)
            # chi-square with `cells` - 1 <= 7 degrees of freedom: 35 is beyond 1e-5
            assert ((counts - tasks / cells) ** 2 / (tasks / cells)).sum() < 35
    pairs = np.bincount(support[:, 0, 0] * 8 + support[:, 1, 0], minlength=64).reshape(8, 8)
    assert not pairs.diagonal().any()
    assert ((pairs[~np.eye(8, dtype=bool)] - tasks / 56) ** 2 / (tasks / 56)).sum() < 120  # 55 degrees of freedom


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"shots": 1},
        {"queries": 2},
        {"ways": 4},
        {"rotations": "episode"},
        {"subset": "test"},
        {"data": make(version="2")},
        {"data": make(split="other")},
        {"data": make(name="other")},
    ],
)
def test_every_coordinate_gives_other_episodes(change: dict[str, object]) -> None:
    base, other = bind().episodes(0, 50), bind(**change).episodes(0, 50)  # type: ignore[arg-type]
    assert not (base.seeds == other.seeds).any()
    ways = min(base.classes.shape[1], other.classes.shape[1])  # type: ignore[union-attr]
    assert (base.classes[:, :ways] == other.classes[:, :ways]).all(1).mean() < 0.5  # type: ignore[index]


def test_seeds_are_distinct_and_valid_for_torch() -> None:
    seeds = bind().episodes(0, 1000).seeds
    assert seeds.dtype == torch.int64 and (seeds >= 0).all() and len(seeds.unique()) == 1000
    torch.Generator().manual_seed(int(seeds.max()))


def test_golden_ids_and_pixels() -> None:
    """Frozen for ever: a change here means that stored results no longer compare."""
    assert bind("test").episodes(0, 3).ids == GOLDEN_IDS
    assert bind("test", "per_class").episodes(1000, 1).ids == GOLDEN_TURNED
    episode = bind("test", "classes", ways=4).episodes(7, 2)
    pixels = torch.cat([episode.support.x, episode.query.x], dim=1).mul(255).round().to(torch.uint8).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == GOLDEN_PIXELS
    assert episode.seeds.tolist() == GOLDEN_SEEDS


def test_ids_follow_the_content_alone() -> None:
    renamed = make(classes=tuple(f"other {i}" for i in range(COUNT)))
    repainted = make(images=255 - coded())
    ids = bind("test").episodes(0, 20).ids
    assert len(set(ids)) == 20
    assert bind("test", data=repainted).episodes(0, 20).ids == ids
    assert not set(bind("test", data=renamed).episodes(0, 20).ids) & set(ids)
    assert repainted.pixels_hash != DATA.pixels_hash == make().pixels_hash
    assert bind("train").episodes(0, 20).ids == ()  # training episodes are many and never compared


def test_images_stream() -> None:
    whole = bind("train", "classes").images(5, 4000)
    assert whole.x.shape == (1, 4000, 1, SIDE, SIDE) and whole.y.shape == (1, 4000) and whole.ways == 32
    found, labels = read(whole.x)[0], whole.y[0].numpy()
    assert np.array_equal(found[:, 0] + 8 * found[:, 2], labels)  # the train subset is classes 0..7, angle-major
    for values, cells in ((labels, 32), (found[:, 1], 6)):
        counts = np.bincount(values, minlength=cells)
        assert ((counts - 4000 / cells) ** 2 / (4000 / cells)).sum() < 85  # 31 degrees of freedom: beyond 1e-6
    part = bind("train", "classes").images(105, 7)
    assert torch.equal(part.x, whole.x[:, 100:107]) and torch.equal(part.y, whole.y[:, 100:107])
    turned = bind("test", "per_class").images(0, 500)
    assert turned.ways == 4 and set(turned.y.unique().tolist()) == {0, 1, 2, 3}
    assert np.array_equal(read(turned.x)[0, :, 0] - 10, turned.y[0].numpy())
    assert set(np.unique(read(turned.x)[..., 2])) == {0, 1, 2, 3}


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 ways, but coded has 4 classes in its test set"):
        bind("test", ways=5)
    bind("test", "classes", ways=16)
    with pytest.raises(ConfigError, match="4 shots \\+ 3 queries, but coded has 6 images per class"):
        bind(shots=4)
    with pytest.raises(ConfigError, match="number of ways"):
        bind(ways=None).episodes(0, 1)


def test_damaged_data_is_refused() -> None:
    with pytest.raises(DataError, match="never meet"):
        make(subsets={"train": np.arange(8), "test": np.arange(7, 14)})
    with pytest.raises(DataError, match=r"outside 0\.\.13"):
        make(subsets={"train": np.array([14])})
    with pytest.raises(DataError, match="uint8"):
        make(images=coded().astype(np.float32))
    with pytest.raises(DataError, match="uint8"):
        make(classes=("too few",))


def test_one_hot_and_pick() -> None:
    episode = bind().episodes(0, 4)
    labels = episode.query.one_hot()
    assert labels.shape == (4, 9, 3) and labels.dtype == episode.query.x.dtype
    assert torch.equal(labels.argmax(-1), episode.query.y) and torch.equal(labels.sum(-1), torch.ones(4, 9))
    assert episode.query.pick(slice(1, 3)).tasks == 2
    with pytest.raises(ValueError, match="labels"):
        Batch(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), ways=None).one_hot()
    assert isinstance(episode, Episode)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**64 - 1))
def test_words_are_counter_based(start: int, rows: int, width: int, key: int) -> None:
    block = words(key, start, rows, width)
    assert block.shape == (rows, width)
    for r in range(rows):
        assert np.array_equal(words(key, start + r, 1, width)[0], block[r])
    assert len(np.unique(block)) == block.size


def test_words_are_frozen() -> None:
    assert words(philox_key("test", 1), 5, 1, 3)[0].tolist() == [
        11259420352049466854,
        13750198268789014863,
        3345915917606230623,
    ]
    assert len({philox_key("a", 1), philox_key("a1"), philox_key("a", "1", ""), philox_key(1, "a")}) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30, unique=True), st.data())
def test_smallest_is_a_sorted_draw(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    keys = np.array([values], dtype=np.uint64)
    assert smallest(keys, count).tolist() == [np.argsort(keys[0], kind="stable")[:count].tolist()]


@given(st.integers(0, 2**64 - 1), st.integers(1, 10**6))
def test_scaled_stays_below_its_bound(word: int, bound: int) -> None:
    value = int(scaled(np.array([word], dtype=np.uint64), bound)[0])
    assert 0 <= value < bound and abs(value - word * bound // 2**64) <= 1
